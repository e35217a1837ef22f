"""What every device must do. Inherit `DeviceConformance` in a test module and name the device.

    class TestSimulator(DeviceConformance):
        name = "simulator"

All expected values come from `metalgen.reference.attention_float64`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metalgen.calls.check import failure_status, first_line
from metalgen.calls.verify import TOLERANCE, relative_error, verify
from metalgen.devices.kernel import KernelDevice
from metalgen.errors import InvalidSchedule
from metalgen.families import Schedule, default_schedule
from metalgen.kinds import MMA, SIMDGROUP
from metalgen.languages import CUDA, METAL, get_language
from metalgen.problem.config import AttentionConfig
from metalgen.problem.inputs import Inputs
from metalgen.reference import attention_float64, config_features
from metalgen.source.render import render
from metalgen.testing.base import OnDevice


def normal(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> mx.array:
    """Unit-variance values of a type, the same for a seed."""
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(getattr(mx, dtype))


def schedules_of(config: AttentionConfig) -> dict[str, Schedule]:
    """Schedules that together take every path of the forward template, by what they show."""
    whole = SIMDGROUP.widest_row(config, 1)
    plain = Schedule(bq=32, bk=16, bd=whole, simdgroups=2, row_blocks=2)
    direct: dict[str, Any] = {"k_source": "device", "v_source": "device"}
    found = {
        "one simdgroup": Schedule(bq=8, bk=8, bd=whole, simdgroups=1),
        "rows of four blocks": replace(plain, bq=64, row_blocks=4),
        "two buffers": replace(plain, buffers=2),
        "slices": replace(plain, bd=min(whole, 24)),
        "slices in two buffers": replace(plain, bd=min(whole, 32), buffers=2),
        "Q re-read": replace(plain, q_source="threadgroup"),
        "K from device": replace(plain, k_source="device"),
        "V from device in two buffers": replace(plain, v_source="device", buffers=2),
        "all from device": replace(plain, **direct),
        "Q re-read, rest from device": replace(plain, q_source="threadgroup", **direct),
        "load width 2": replace(plain, load_width=2),
        "load width 4": replace(plain, load_width=4, **direct),
    }
    if config.dtype != "float32":
        found["float fragments"] = replace(plain, fragment="float32")
    return found


def cuda_schedules(config: AttentionConfig) -> dict[str, Schedule]:
    """The same for CUDA."""
    whole = MMA.widest_row(config, 1)
    plain = Schedule(bq=32, bk=32, bd=whole, simdgroups=2, q_source="threadgroup", kind="mma")
    return {
        "one simdgroup": Schedule(bq=16, bk=16, bd=whole, simdgroups=1, kind="mma"),
        "rows of four blocks": replace(plain, bq=128, row_blocks=4),
        "two buffers": replace(plain, buffers=2),
        "three buffers": replace(plain, buffers=3),
        "four buffers": replace(plain, buffers=4, bk=16, q_source="registers"),
        "Q re-read": plain,
        "five simdgroups": replace(plain, bq=80, simdgroups=5),
    }


SCHEDULES = {METAL.name: schedules_of, CUDA.name: cuda_schedules}


def paths_of(language: str, config: AttentionConfig) -> dict[str, Schedule]:
    """Schedules that together take every path of the forward template in a language."""
    return SCHEDULES[language](config)


PATHS = tuple(dict.fromkeys(name for of in SCHEDULES.values() for name in of(AttentionConfig(64))))
DIMS = ((8, 8), (20, 20), (64, 64), (72, 72), (96, 96), (128, 128), (64, 24), (9, 40), (256, 256))
LENGTHS = ((1, 1), (1, 77), (33, 33), (70, 131), (9, 3), (40, 8))


class DeviceConformance(OnDevice):
    """Tests of one device; `name` is all that a subclass must set."""

    def run(
        self,
        config: AttentionConfig,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        *,
        scale: float = 0.25,
        schedule: Schedule | None = None,
    ) -> tuple[mx.array, mx.array | None]:
        self.require(config.dtype)
        limits = self.device.limits
        runner = self.device.build(config, schedule or default_schedule(config, limits))
        return runner(q, k, v, scale)

    def schedules(self, config: AttentionConfig) -> dict[str, Schedule]:
        """Schedules that together take every path of the forward template here."""
        return paths_of(self.device.limits.language, config)

    def check(
        self, config: AttentionConfig, q: mx.array, k: mx.array, v: mx.array, **options: Any
    ) -> None:
        """Output and log-sum-exp against the reference, computed from the same rounded inputs."""
        out, lse = self.run(config, q, k, v, **options)
        exact = [np.array(x.astype(mx.float32), dtype=np.float64) for x in (q, k, v)]
        expected, expected_lse = attention_float64(
            *exact, scale=options.get("scale", 0.25), **config_features(config)
        )
        assert out.dtype == q.dtype
        assert relative_error(out, expected) <= TOLERANCE[config.dtype]
        if config.return_lse:
            assert lse is not None and lse.dtype == mx.float32
            np.testing.assert_allclose(np.array(lse), expected_lse, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    @pytest.mark.parametrize(("dim", "v_dim"), DIMS)
    def test_head_dimensions(self, dtype: str, dim: int, v_dim: int) -> None:
        config = AttentionConfig(
            dim, dtype, value_head_dim=v_dim, causal=True, return_lse=True, heads_per_kv=2
        )
        q = normal((1, 2, 35, dim), dtype, 1)
        k, v = normal((1, 1, 41, dim), dtype, 2), normal((1, 1, 41, v_dim), dtype, 3)
        self.check(config, q, k, v, scale=dim**-0.5)

    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize(("q_len", "kv_len"), LENGTHS)
    def test_lengths(self, q_len: int, kv_len: int, causal: bool) -> None:
        config = AttentionConfig(32, "float32", causal=causal, return_lse=True)
        q = normal((2, 2, q_len, 32), seed=1)
        k, v = (normal((2, 2, kv_len, 32), seed=s) for s in (2, 3))
        self.check(config, q, k, v)

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize(
        ("dtype", "dim", "v_dim"), [("float16", 64, 64), ("float32", 44, 28), ("bfloat16", 80, 96)]
    )
    def test_schedules(self, path: str, dtype: str, dim: int, v_dim: int) -> None:
        config = AttentionConfig(dim, dtype, value_head_dim=v_dim, causal=True, return_lse=True)
        schedule = self.schedules(config).get(path)
        if schedule is None:
            pytest.skip(f"{self.name} has no path {path!r} for {dtype}")
        q = normal((1, 1, 75, dim), dtype, 4)
        k, v = normal((1, 1, 83, dim), dtype, 5), normal((1, 1, 83, v_dim), dtype, 6)
        self.check(config, q, k, v, schedule=schedule, scale=dim**-0.5)

    @pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2), (8, 1)])
    def test_heads_that_share_keys(self, heads: int, kv_heads: int) -> None:
        config = AttentionConfig(16, "float32", heads_per_kv=heads // kv_heads)
        q = normal((3, heads, 10, 16), seed=1)
        k, v = (normal((3, kv_heads, 12, 16), seed=s) for s in (2, 3))
        self.check(config, q, k, v)

    def test_rows_that_see_no_key_are_zeros(self) -> None:
        config = AttentionConfig(16, "float16", causal=True, return_lse=True)
        x = normal((1, 1, 20, 16), "float16")
        out, lse = self.run(config, x, x[:, :, :4], x[:, :, :4])
        assert lse is not None
        assert np.array_equal(np.array(out)[0, 0, :16], np.zeros((16, 16)))
        assert np.isneginf(np.array(lse)[0, 0, :16]).all()
        assert np.isfinite(np.array(lse)[0, 0, 16:]).all()

    @pytest.mark.parametrize(("q_len", "kv_len", "batch"), [(0, 5, 1), (5, 0, 1), (3, 3, 0)])
    def test_empty_arrays_give_zeros(self, q_len: int, kv_len: int, batch: int) -> None:
        config = AttentionConfig(16, "float16", return_lse=True)
        q = mx.ones((batch, 2, q_len, 16), mx.float16)
        k = mx.ones((batch, 2, kv_len, 16), mx.float16)
        out, lse = self.run(config, q, k, k)
        assert lse is not None
        assert np.array_equal(np.array(out), np.zeros((batch, 2, q_len, 16)))
        assert np.array_equal(np.array(lse), np.full((batch, 2, q_len), -np.inf))

    @pytest.mark.parametrize(
        "view", ["heads last", "cache slice", "gaps", "transposed", "broadcast", "reversed"]
    )
    def test_strided_inputs(self, view: str) -> None:
        config = AttentionConfig(32, "float16", causal=True)
        q = normal((2, 2, 37, 32), "float16", 1)
        if view == "heads last":
            k, v = (normal((2, 45, 2, 32), "float16", s).swapaxes(1, 2) for s in (2, 3))
        elif view == "cache slice":
            k, v = (normal((2, 2, 90, 32), "float16", s)[:, :, 7:52] for s in (2, 3))
        elif view == "gaps":
            k, v = (normal((2, 2, 45, 64), "float16", s)[..., ::2] for s in (2, 3))
        elif view == "transposed":
            k, v = (normal((2, 2, 32, 45), "float16", s).swapaxes(2, 3) for s in (2, 3))
        elif view == "broadcast":
            one = (normal((2, 1, 45, 32), "float16", s) for s in (2, 3))
            k, v = (mx.broadcast_to(x, (2, 2, 45, 32)) for x in one)
        else:
            k, v = (normal((2, 2, 45, 32), "float16", s)[:, :, ::-1] for s in (2, 3))
        self.check(config, q, k, v)

    @pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-20, 7.5])
    def test_any_finite_scale(self, scale: float) -> None:
        config = AttentionConfig(16, "float32", causal=True, return_lse=True)
        q, k, v = (normal((1, 1, 21, 16), seed=s) for s in (1, 2, 3))
        self.check(config, q, k, v, scale=scale)

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_scores_of_magnitude_ten_thousand(self, dtype: str) -> None:
        config = AttentionConfig(64, dtype, causal=True)
        q, k, v = (normal((1, 1, 40, 64), dtype, s) for s in (1, 2, 3))
        q = q * 40
        k = k * 40
        scores = np.array(q.astype(mx.float32) @ k.astype(mx.float32).swapaxes(2, 3))
        assert np.abs(scores).max() > 10_000
        out, _ = self.run(config, q, k, v, scale=1.0)
        # A softmax this sharp picks one key: its value, unless two scores nearly tie.
        assert np.isfinite(np.array(out.astype(mx.float32))).all()
        exact = [np.array(x.astype(mx.float32), dtype=np.float64) for x in (q, k, v)]
        expected, _ = attention_float64(*exact, scale=1.0, causal=True)
        assert relative_error(out, expected) <= 10 * TOLERANCE[dtype]

    @pytest.mark.parametrize("left", [None, 0, 5, 200])
    @pytest.mark.parametrize("right", [None, 0, 7])
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("schedule", ["two buffers", "V from device in two buffers"])
    def test_windows(
        self, left: int | None, right: int | None, causal: bool, schedule: str
    ) -> None:
        config = AttentionConfig(
            16, causal=causal, window_left=left, window_right=right, return_lse=True
        )
        own = self.schedules(config).get(schedule)
        q = normal((1, 2, 70, 16), "float16", 1)
        for kv_len in (100, 40):
            k, v = (normal((1, 2, kv_len, 16), "float16", s) for s in (2, 3))
            self.check(config, q, k, v, schedule=own)

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    @pytest.mark.parametrize(("cap", "size"), [(50.0, 1.0), (30.0, 10.0), (5.0, 10.0)])
    def test_softcap(self, dtype: str, cap: float, size: float) -> None:
        """At scores of magnitude 100 and more, where a rough hyperbolic tangent would show."""
        config = AttentionConfig(64, dtype, causal=True, softcap=cap, return_lse=True)
        q = normal((1, 2, 45, 64), dtype, 1) * size
        k, v = (normal((1, 2, 52, 64), dtype, s) for s in (2, 3))
        self.check(config, q, k, v, scale=1.0)

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    @pytest.mark.parametrize("cap", [0.5, 50.0, 51.0])
    @pytest.mark.parametrize("family", ["forward", "decode"])
    def test_softcap_at_both_of_its_ends(self, dtype: str, cap: float, family: str) -> None:
        """Rows of lowest scores alone, of highest, and of both: each as exact as the other."""
        self.require(dtype)
        config = AttentionConfig(16, dtype, softcap=cap, sinks=True, return_lse=True)
        q = mx.array([-8.0, 8.0, 0.1, 3.0])[None, None, :, None] * mx.ones((1, 1, 4, 16))
        k = mx.sign(mx.random.normal((1, 1, 40, 16), key=mx.random.key(1)))
        k = mx.where(mx.arange(40)[:, None] < 20, mx.abs(k), k)
        v = mx.random.normal((1, 1, 40, 16), key=mx.random.key(2)) * 1e4
        q[:, :, 3] = mx.sign(mx.random.normal((16,), key=mx.random.key(3))) * 60
        inputs = Inputs(sinks=mx.array([-cap]))
        q, k, v = (x.astype(getattr(mx, dtype)) for x in (q, k, v))
        schedule = default_schedule(config, self.device.limits, family)
        run = self.device.build(config, schedule)
        out, lse = run(q, k, v, 1.0, inputs)
        exact = [np.array(x.astype(mx.float32), dtype=np.float64) for x in (q, k, v)]
        expected, expected_lse = attention_float64(
            *exact, scale=1.0, inputs=inputs, **config_features(config)
        )
        for row in range(4):
            assert relative_error(out[:, :, row], expected[:, :, row]) <= TOLERANCE[dtype]
        np.testing.assert_allclose(np.array(lse), expected_lse, rtol=1e-5, atol=1e-5)

    def test_tf32_has_the_error_of_11_bits_where_it_is_asked_for(self) -> None:
        config = AttentionConfig(64, "float32", causal=True, tf32=True)
        result = verify(self.device, config, default_schedule(config, self.device.limits))
        assert result.ok, result.detail
        exact = not get_language(self.device.limits.language).tf32
        assert (result.error <= TOLERANCE["float32"]) == exact

    def test_nan_stays_in_the_rows_that_see_it(self) -> None:
        config = AttentionConfig(16, "float32", causal=True)
        q, k, v = (normal((1, 1, 24, 16), seed=s) for s in (1, 2, 3))
        k[0, 0, 20, 3] = float("nan")
        out, _ = self.run(config, q, k, v)
        rows = np.isnan(np.array(out)[0, 0]).any(axis=1)
        assert rows.tolist() == [False] * 20 + [True] * 4

    def test_the_default_schedule_passes_the_check(self) -> None:
        config = AttentionConfig(64, "float16", causal=True, return_lse=True)
        result = verify(self.device, config, default_schedule(config, self.device.limits))
        assert result.ok, result.detail
        assert 0 < result.error <= result.tolerance

    @pytest.mark.parametrize(
        ("rule", "changes"),
        [
            ("choices", {"bk": 9}),
            ("bq", {"bq": 1024}),
            ("bd", {"bd": 288}),
            ("threadgroup memory", {"bk": 256}),
        ],
    )
    def test_a_schedule_that_breaks_a_rule_is_refused_when_it_is_built(
        self, rule: str, changes: dict[str, Any]
    ) -> None:
        if self.device.language is None:
            pytest.skip(f"{self.name} runs no kernels")
        config = AttentionConfig(256, "float32")
        schedule = replace(default_schedule(config, self.device.limits), **changes)
        with pytest.raises(InvalidSchedule) as caught:
            self.device.build(config, schedule)
        assert caught.value.rule == rule

    def test_a_source_that_does_not_compile_is_a_failure_of_the_compiler(self) -> None:
        if not isinstance(self.device, KernelDevice):
            pytest.skip(f"{self.name} compiles nothing")
        config = AttentionConfig(16)
        schedule = default_schedule(config, self.device.limits)
        source = render(config, schedule)
        broken = replace(source, name=f"{source.name}_broken", source="  this is no statement;\n")
        kernel = self.device.compile(broken)
        with pytest.raises(RuntimeError) as caught:
            mx.eval(
                kernel(
                    inputs=[mx.zeros((64,), mx.uint8) for _ in source.inputs],
                    output_shapes=[(64,)],
                    output_dtypes=[mx.float16],
                    grid=(32, 1, 1),
                    threadgroup=(32, 1, 1),
                )
            )
        assert failure_status(caught.value) == "compile"
        assert "error" in first_line(caught.value)
        x = normal((1, 1, 9, 16), "float16")
        self.check(config, x, x, x)  # the next kernel runs all the same

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    @pytest.mark.parametrize("splits", [1, 2, 8])
    @pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (1, 300), (5, 70), (64, 65), (9, 4)])
    def test_decode(self, dtype: str, splits: int, q_len: int, kv_len: int) -> None:
        """Few queries, heads that share keys in one tile, and keys shared out."""
        config = AttentionConfig(40, dtype, heads_per_kv=3, causal=True, return_lse=True)
        self.require(dtype)
        schedule = default_schedule(config, self.device.limits, "decode")
        schedule = replace(schedule, splits=splits)
        q = normal((2, 6, q_len, 40), dtype, 1)
        k, v = (normal((2, kv_len, 2, 40), dtype, s).swapaxes(1, 2) for s in (2, 3))
        out, lse = self.device.build(config, schedule)(q, k, v, 0.2)
        exact = [np.array(x.astype(mx.float32), dtype=np.float64) for x in (q, k, v)]
        expected, expected_lse = attention_float64(*exact, scale=0.2, **config_features(config))
        assert out.dtype == q.dtype
        assert relative_error(out, expected) <= TOLERANCE[dtype]
        np.testing.assert_allclose(np.array(lse), expected_lse, rtol=1e-5, atol=1e-5)
