"""What backward kernels must do on every device. Inherit `BackwardConformance` in a test module.

    class TestSimulator(BackwardConformance):
        name = "simulator"

All expected values come from `metalgen.reference.gradients_float64`. Calls are made up by
`metalgen.problem.samples.sample_call`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metalgen.calls.verify import relative_error
from metalgen.calls.verify_gradients import (
    GRADIENT_TOLERANCE,
    allowed_error,
    cotangents_of,
    exact_gradients,
    verify_gradients,
)
from metalgen.errors import InvalidSchedule
from metalgen.families import Schedule, default_schedule
from metalgen.families.backward import (
    backward_config,
    backward_families,
    cached_by,
    made_by,
    unsupported,
)
from metalgen.families.rules import device_kinds
from metalgen.problem.config import AttentionConfig
from metalgen.problem.inputs import NOTHING, Inputs
from metalgen.problem.samples import Call, sample_call
from metalgen.testing.base import OnDevice
from metalgen.testing.cases import BY_TILES, DTYPES, FEATURES
from metalgen.testing.devices import normal
from metalgen.testing.fuzz import functions

DIMS = ((8, 8), (20, 20), (64, 64), (72, 24), (9, 40), (128, 128), (256, 256))
LENGTHS = ((1, 1), (1, 77), (33, 33), (70, 131), (40, 8))
SHAPES = ((113, 203), (128, 217), (108, 256))
"""Of flash-attention's tests."""
PATHS: dict[str, dict[str, Any]] = {
    "two blocks of rows": {"row_blocks": 2, "bk": 16},
    "one simdgroup": {"simdgroups": 1, "bk": 16},
    "two buffers": {"buffers": 2},
    "one buffer": {"buffers": 1},
    "three buffers": {"buffers": 3, "bk": 16},
    "slices": {"bd": 24, "buffers": 1},
    "slices in two buffers": {"bd": 32, "buffers": 2},
    "all from device": {"k_source": "device", "v_source": "device", "bd": 64, "buffers": 1},
    "owned rows re-read": {"q_source": "threadgroup", "dout_source": "threadgroup"},
    "owned rows in registers": {"q_source": "registers", "dout_source": "registers"},
    "apart": {"apart": 1},
}
"""Changes of a default schedule that take every path of the templates; q and dout are owned there,
and their names exchanged with those of k and v where keys are."""
TOGETHER: dict[str, dict[str, Any]] = {
    "dense": {"dim": 128},
    "causal, heads that share keys": {"dim": 64, "causal": True, "heads_per_kv": 2},
    "padded columns": {"dim": 72, "value_head_dim": 24, "knobs": {"bk": 16}},
    "an odd width": {"dim": 9, "value_head_dim": 40, "window_left": 9},
    "warps that share rows": {"dim": 32, "knobs": {"simdgroups": 8, "row_blocks": 1, "bk": 64}},
    "packed, one buffer": {"dim": 20, "varlen": True, "causal": True, "knobs": {"buffers": 1}},
    "features": {"dim": 64, "softcap": 20.0, "alibi": True, "dropout": 0.2, "kv_lens": True},
    "array mask": {"dim": 96, "array_mask": True, "knobs": {"simdgroups": 1, "row_blocks": 1}},
    "queries that are used": {"dim": 16, "seqused_q": True, "rope": "half"},
}
"""Fields of a config, and knobs of the schedule, of the kernel that makes all gradients."""
SUMMED: dict[str, dict[str, Any]] = {
    "slopes": {"alibi": True, "causal": True},
    "slopes by sequence": {"alibi": True, "alibi_by_sequence": True, "softcap": 5.0},
    "slopes of packed sequences": {"alibi": True, "alibi_by_sequence": True, "varlen": True},
    "a bias of queries": {"bias": True, "bias_shape": (2, 1, 37, 1), "dropout": 0.2},
    "a bias of keys": {"bias": True, "bias_shape": (1, 4, 1, 53), "causal": True},
    "a bias of both": {"bias": True, "bias_shape": (2, 4, 37, 53), "causal": True},
    "a bias that entries share": {"bias": True, "bias_shape": (1, 4, 37, 53)},
    "a bias that heads share": {"bias": True, "bias_shape": (2, 1, 37, 53), "window_left": 9},
    "a bias of one number": {"bias": True, "bias_shape": (1, 1, 1, 1), "array_mask": True},
    "captured arrays": {"function": 0, "causal": True},
    "captured arrays, packed": {"function": 1, "varlen": True},
    "captured arrays and lengths": {"function": 1, "kv_lens": True, "alibi": True},
}
"""What other arrays calls bring whose gradients kernels sum: fields of a config, the shape of its
bias, and which of `functions` it has."""
KEY_NAMES = {"q_source": "k_source", "dout_source": "v_source"}
KEY_NAMES |= {own: other for other, own in KEY_NAMES.items()}


class BackwardConformance(OnDevice):
    """Tests of one device; `name` is all that a subclass must set."""

    def schedules(self, config: AttentionConfig, **changes: Any) -> tuple[Schedule, ...]:
        """The default schedules with some changes: those of knobs that there are."""
        bare, found = backward_config(config), []
        for family in backward_families(bare):
            own = default_schedule(bare, self.device.limits, family.name)
            names = {n: KEY_NAMES.get(n, n) if own.own[0] == "k" else n for n in changes}
            given = {names[n]: x for n, x in changes.items() if names[n] in own.knobs}
            given = {n: x for n, x in given.items() if x in own.knobs[n].choices}
            blocks = given.get("row_blocks", own.row_blocks) * given.get(
                "simdgroups", own.simdgroups
            )
            rows = own.bq // (own.row_blocks * own.simdgroups)
            found.append(replace(own, **given, bq=rows * blocks))
        return tuple(found)

    def check(
        self,
        config: AttentionConfig,
        call: Call,
        *,
        scale: float = 0.25,
        schedules: tuple[Schedule, ...] | None = None,
    ) -> dict[str, mx.array]:
        """The gradients of q, k and v, compared with the formulas in float64."""
        self.require(config.dtype)
        chosen = schedules or self.schedules(config)
        results, cotangents = cotangents_of(config, call, scale, 7)
        run = self.device.build_gradients(config, chosen)
        found = run(*call[:3], results, cotangents, scale, call[3])
        exact = exact_gradients(config, call, cotangents, scale)
        names = [name[1] for schedule in chosen for name in made_by(schedule)]
        for name, array in zip(names, found, strict=True):
            assert array.dtype == call[0].dtype and array.shape == exact[name].shape
            error = relative_error(array, exact[name])
            if error > GRADIENT_TOLERANCE[config.dtype]:
                assert error <= allowed_error(
                    config, call, results, cotangents, scale, exact, name
                ), name
        return dict(zip(names, found, strict=True))

    def call(
        self, config: AttentionConfig, q_len: int, kv_len: int, heads: int = 2, batch: int = 1
    ) -> Call:
        """A call without other inputs: heads of q, of which each group shares one of k."""
        kv_heads = heads // config.heads_per_kv
        q = normal((batch, heads, q_len, config.head_dim), config.dtype, 1)
        k = normal((batch, kv_heads, kv_len, config.head_dim), config.dtype, 2)
        return q, k, normal((batch, kv_heads, kv_len, config.v_dim), config.dtype, 3), NOTHING

    @pytest.mark.parametrize(("dim", "v_dim"), DIMS)
    def test_head_dimensions(self, dim: int, v_dim: int) -> None:
        dtype = DTYPES[DIMS.index((dim, v_dim)) % 3]
        self.test_head_dimensions_in_all_types(dtype, dim, v_dim)

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("dim", "v_dim"), DIMS)
    def test_head_dimensions_in_all_types(self, dtype: str, dim: int, v_dim: int) -> None:
        config = AttentionConfig(dim, dtype, value_head_dim=v_dim, causal=True, heads_per_kv=2)
        self.check(config, self.call(config, 35, 41), scale=dim**-0.5)

    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize(("q_len", "kv_len"), LENGTHS)
    def test_lengths(self, q_len: int, kv_len: int, causal: bool) -> None:
        config = AttentionConfig(32, "float32", causal=causal)
        self.check(config, self.call(config, q_len, kv_len, batch=2))

    @pytest.mark.parametrize("path", PATHS)
    def test_schedules(self, path: str) -> None:
        dtype = DTYPES[list(PATHS).index(path) % 3]
        config = AttentionConfig(64, dtype, causal=True, heads_per_kv=2)
        schedules = self.schedules(config, **PATHS[path])
        try:
            self.check(config, self.call(config, 75, 83, heads=4), schedules=schedules)
        except InvalidSchedule as error:
            pytest.skip(f"{self.name} has no such schedule: {error}")

    @pytest.mark.parametrize("name", FEATURES)
    def test_features(self, name: str) -> None:
        dtype = DTYPES[list(FEATURES).index(name) % 3]
        config = AttentionConfig(64, dtype, heads_per_kv=2, **FEATURES[name])
        if reason := unsupported(backward_config(config)):
            pytest.skip(f"gradients of {reason} are computed in plain MLX")
        try:
            schedules = self.schedules(config)
        except InvalidSchedule as error:
            pytest.skip(f"{self.name} has no such kernels: {error}")
        call = sample_call(config, batch=3, q_len=37, kv_len=53, seed=1)
        found = self.check(config, call, schedules=schedules)
        assert set(found) == set("q" if cached_by(config) else "qkv")

    @pytest.mark.parametrize("name", [n for n in BY_TILES if "page_size" not in BY_TILES[n]])
    def test_array_masks_by_tiles(self, name: str) -> None:
        dtype = DTYPES[list(BY_TILES).index(name) % 3]
        config = AttentionConfig(64, dtype, heads_per_kv=2, **BY_TILES[name])
        self.check(config, sample_call(config, batch=2, q_len=150, kv_len=140, seed=1))

    @pytest.mark.parametrize("name", TOGETHER)
    def test_all_gradients_by_one_kernel(self, name: str) -> None:
        """Those of queries by atomic adds, on devices that have such kernels."""
        fields = dict(TOGETHER[name])
        dim, knobs = fields.pop("dim"), fields.pop("knobs", {})
        dtype = DTYPES[2 * (list(TOGETHER).index(name) % 2)]
        config = AttentionConfig(dim, dtype, **fields)
        self.require(dtype)
        bare, limits = backward_config(config), self.device.limits
        if not device_kinds(limits, "backward_all"):
            pytest.skip(f"{self.name} has no kernels that make all gradients at once")
        schedule = replace(default_schedule(bare, limits, "backward_all"), **knobs)
        rows = 16 * schedule.row_blocks * schedule.simdgroups
        schedule = replace(schedule, bq=rows)
        call = sample_call(config, batch=2, q_len=37, kv_len=75, seed=1)
        found = self.check(config, call, schedules=(schedule,))
        assert set(found) == set("qkv")

    @pytest.mark.parametrize("name", SUMMED)
    def test_sums_for_other_arrays(self, name: str) -> None:
        """Gradients of slopes, of biases with axes of one element, and of captured arrays."""
        dtype = DTYPES[list(SUMMED).index(name) % 3]
        fields = dict(SUMMED[name])
        shape, function = fields.pop("bias_shape", None), fields.pop("function", None)
        if function is not None:
            fields["score_mod"] = functions()[0][function]
        config = AttentionConfig(32, dtype, heads_per_kv=2, **fields)
        call = sample_call(config, batch=2, q_len=37, kv_len=53, seed=1)
        if shape is not None:
            bias = normal(tuple(shape), "float32", 5)
            call = (*call[:3], replace(call[3], bias=bias))
        self.check_sums(config, call)

    def check_sums(self, config: AttentionConfig, call: Call) -> None:
        """The gradients of all inputs for which there are sums, compared with the formulas."""
        self.require(config.dtype)
        results, cotangents = cotangents_of(config, call, 0.25, 7)
        exact = exact_gradients(config, call, cotangents, 0.25)
        found: dict[str, mx.array] = {}
        for feature in config.features:
            for each in feature.sums(config, call[3]):
                schedule = self.schedules(config)[each.by == "key"]
                run = self.device.build_sum(config, schedule, each)
                (part,) = run(*call[:3], results, cotangents, 0.25, call[3])
                found[each.array] = found[each.array] + part if each.array in found else part
        assert found
        for name, array in found.items():
            error = relative_error(array, exact[name])
            assert error <= 2 * GRADIENT_TOLERANCE[config.dtype], (name, error)

    @pytest.mark.parametrize("number", range(3))
    def test_functions(self, number: int) -> None:
        """Score functions with captured arrays and branches, mask functions, and their blocks."""
        scores, masks = functions()
        fields: dict[str, Any] = {"score_mod": scores[number], "mask_mod": masks[number]}
        config = AttentionConfig(32, DTYPES[number], heads_per_kv=2, **fields)
        self.check(config, sample_call(config, batch=2, q_len=37, kv_len=53, seed=1))
        blocks: dict[str, Any] = {"mask_mod": masks[number], "block_mask": True}
        config = AttentionConfig(32, DTYPES[number], heads_per_kv=2, **blocks)
        self.check(config, sample_call(config, batch=2, q_len=150, kv_len=201, seed=1))

    @pytest.mark.parametrize(
        ("dtype", "cap"), [("float32", 0.5), ("bfloat16", 20.0), ("float16", 200.0)]
    )
    def test_softcap(self, dtype: str, cap: float) -> None:
        """Beyond the cap, where its derivative is small, and far below it."""
        config = AttentionConfig(32, dtype, softcap=cap, causal=True, return_lse=True)
        self.check(config, self.call(config, 41, 45))

    @pytest.mark.parametrize(("left", "right"), [(None, 0), (5, None), (0, 0), (5, 7)])
    def test_windows(self, left: int | None, right: int | None) -> None:
        config = AttentionConfig(16, window_left=left, window_right=right)
        for kv_len in (100, 40):
            self.check(config, self.call(config, 70, kv_len))

    @pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2), (8, 1)])
    def test_heads_that_share_keys_are_summed(self, heads: int, kv_heads: int) -> None:
        config = AttentionConfig(16, "float32", heads_per_kv=heads // kv_heads)
        self.check(config, self.call(config, 10, 12, heads=heads, batch=2))

    @pytest.mark.parametrize("scale", [-0.3, 0.0, 7.5])
    def test_any_finite_scale(self, scale: float) -> None:
        config = AttentionConfig(16, "float32", causal=True)
        self.check(config, self.call(config, 21, 21), scale=scale)

    def test_rows_that_see_no_key_have_no_gradient(self) -> None:
        config = AttentionConfig(16, "float16", causal=True)
        found = self.check(config, self.call(config, 20, 4))
        assert not np.array(found["q"])[:, :, :16].any()
        bias = mx.where(mx.arange(9)[:, None] == 4, -mx.inf, mx.zeros((9, 9)))[None, None]
        config = AttentionConfig(16, "float16", bias=True)
        q, k, v, _ = self.call(config, 9, 9)
        found = self.check(config, (q, k, v, Inputs(bias=bias)))
        assert not np.array(found["q"])[:, :, 4].any()

    @pytest.mark.parametrize(("q_len", "kv_len", "batch"), [(0, 5, 1), (5, 0, 1), (3, 3, 0)])
    def test_empty_arrays_have_zeros(self, q_len: int, kv_len: int, batch: int) -> None:
        config = AttentionConfig(16, "float16")
        call = self.call(config, q_len, kv_len, batch=batch)
        run = self.device.build_gradients(config, self.schedules(config))
        q, k, v, inputs = call
        out, lse = mx.zeros((*q.shape[:3], 16), mx.float16), mx.full(q.shape[:3], -mx.inf)
        found = run(q, k, v, (out, lse), (out, None), 0.25, inputs)
        for array, of in zip(found, (q, k, v), strict=True):
            assert np.array_equal(np.array(array), np.zeros(of.shape))

    @pytest.mark.parametrize("view", ["heads last", "gaps", "reversed"])
    def test_strided_inputs(self, view: str) -> None:
        config = AttentionConfig(32, "float16", causal=True)
        q, k, v, inputs = self.call(config, 37, 45, batch=2)
        if view == "heads last":
            q, k, v = (mx.contiguous(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (q, k, v))
        elif view == "gaps":
            q, k, v = (mx.repeat(x, 2, axis=3)[..., ::2] for x in (q, k, v))
        else:
            q, k, v = (x[:, :, ::-1] for x in (q, k, v))
        self.check(config, (q, k, v, inputs))

    def test_the_same_bits_every_time(self) -> None:
        config = AttentionConfig(32, "bfloat16", causal=True, heads_per_kv=2)
        call = self.call(config, 70, 90)
        first, again = (self.check(config, call) for _ in range(2))
        for name in "qkv":
            assert mx.array_equal(first[name].view(mx.uint16), again[name].view(mx.uint16)).item()

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    @pytest.mark.parametrize("dim", [32, 40, 59, 64, 96, 111, 128, 160, 192, 224, 256])
    @pytest.mark.parametrize(("q_len", "kv_len"), SHAPES)
    @pytest.mark.parametrize("causal", [False, True])
    def test_shapes_of_flash_attention(
        self, q_len: int, kv_len: int, dim: int, dtype: str, causal: bool
    ) -> None:
        config = AttentionConfig(dim, dtype, causal=causal, heads_per_kv=3)
        self.check(config, self.call(config, q_len, kv_len, heads=6), scale=dim**-0.5)

    @pytest.mark.parametrize("family", ["backward_rows", "backward_keys"])
    def test_the_default_schedules_pass_the_check(self, family: str) -> None:
        config = AttentionConfig(64, "float16", causal=True, softcap=30.0)
        schedule = default_schedule(backward_config(config), self.device.limits, family)
        result = verify_gradients(self.device, config, schedule)
        assert result.ok, result.detail
        assert 0 < result.error <= result.tolerance
