"""What every device must do with every feature. Inherit `FeatureConformance` in a test module.

    class TestSimulator(FeatureConformance):
        name = "simulator"

All expected values come from `metalgen.reference.attention_float64`. Calls are made up by
`metalgen.problem.samples.sample_call`: ragged lengths, pages in any order, views into larger
caches, and NaN wherever nothing may be looked at. Combinations: `metalgen.testing.fuzz`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metalgen import simulator
from metalgen.calls.resolve import get_kernel
from metalgen.calls.verify import TOLERANCE, relative_error
from metalgen.families import Schedule, default_schedule, get_attention, is_valid
from metalgen.kinds import kinds_in
from metalgen.problem.config import AttentionConfig
from metalgen.problem.inputs import Inputs
from metalgen.problem.samples import sample_call
from metalgen.reference import attention_float64, attention_mlx, config_features
from metalgen.testing.base import OnDevice
from metalgen.testing.cases import BY_TILES, DTYPES, FEATURES, WAYS, WHERE
from metalgen.testing.devices import normal
from metalgen.testing.fuzz import Case, default_case, fault, functions, hostile


def apart(x: mx.array, step: int) -> mx.array:
    """The same array, the elements of its last axis so many places apart in memory."""
    places = x[..., ::-1] if step < 0 else x
    wide = mx.contiguous(mx.repeat(places, abs(step), axis=-1))
    return wide[..., ::step]


class FeatureConformance(OnDevice):
    """Tests of one device; `name` is all that a subclass must set."""

    def case(self, config: AttentionConfig, way: str = "forward", **sizes: int) -> Case:
        self.require(config.dtype)
        limits = self.device.limits
        family, splits = WAYS[way]
        case = default_case(config, limits, family, **sizes)
        if splits == 1 and "splits" not in case.schedule.knobs:
            return case
        return replace(case, schedule=replace(case.schedule, splits=splits))

    def check(self, case: Case) -> None:
        found = fault(self.device, case)
        assert not found, f"{found}\n{case}"

    def run(self, case: Case, *arrays: Any) -> tuple[mx.array, mx.array | None]:
        """What a case's kernel gives, for its own arrays or for others."""
        runner = self.device.build(case.config, case.schedule)
        q, k, v, inputs = arrays or case.call()
        return runner(q, k, v, 0.25, inputs)

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("name", FEATURES)
    def test_features(self, name: str, way: str) -> None:
        """Each with one type, which changes from test to test."""
        turn = list(FEATURES).index(name) + list(WAYS).index(way)
        dtypes = [d for d in DTYPES if d in kinds_in(self.device.limits.language)[0].dtypes]
        config = AttentionConfig(
            64, dtypes[turn % len(dtypes)], heads_per_kv=2, return_lse=True, **FEATURES[name]
        )
        self.check(self.case(config, way))

    @pytest.mark.parametrize("name", BY_TILES)
    def test_array_masks_by_tiles(self, name: str) -> None:
        """Masks with tiles of each kind: those with all keys, with some, and with none."""
        dtypes = [d for d in DTYPES if d in kinds_in(self.device.limits.language)[0].dtypes]
        dtype = dtypes[list(BY_TILES).index(name) % len(dtypes)]
        config = AttentionConfig(64, dtype, heads_per_kv=2, return_lse=True, **BY_TILES[name])
        self.check(self.case(config, q_len=150, kv_len=300))

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("name", FEATURES)
    def test_features_in_all_types_and_widths(self, name: str, way: str, dtype: str) -> None:
        dims = (64, 96, 128) if "kv_bits" in FEATURES[name] else (40, 64, 72, 128)
        for dim in dims:
            fields = FEATURES[name]
            if dim % fields.get("kv_group", 1):
                continue
            config = AttentionConfig(dim, dtype, heads_per_kv=3, return_lse=True, **fields)
            for seed in range(3):
                self.check(self.case(config, way, seed=seed))

    @pytest.mark.parametrize("page_size", [8, 24, 64, 256])
    def test_pages_of_any_size(self, page_size: int) -> None:
        """Tiles of keys end inside of pages, and hold several."""
        config = AttentionConfig(32, page_size=page_size, causal=True, return_lse=True)
        for way in ("forward", "decode in 8"):
            self.check(self.case(config, way, kv_len=300, seed=page_size))

    @pytest.mark.parametrize(
        ("dim", "fields"),
        [
            (576, {"value_head_dim": 512, "page_size": 64}),
            (256, {"rope": "half", "rope_dims": 64, "causal": True}),
            (192, {"value_head_dim": 128, "varlen": True, "causal": True}),
        ],
    )
    def test_wide_heads(self, dim: int, fields: dict[str, Any]) -> None:
        """The absorbed form of multi-head latent attention, and others."""
        config = AttentionConfig(dim, heads_per_kv=4, return_lse=True, **fields)
        self.check(self.case(config, "decode in 8", batch=2, kv_heads=1, kv_len=150))
        self.check(self.case(config, "forward", batch=2, kv_heads=1, q_len=9, kv_len=40))

    @pytest.mark.parametrize("way", WAYS)
    def test_arrays_of_few_elements(self, way: str) -> None:
        """MLX binds inputs of fewer than eight elements to kernels in another way."""
        fields: dict[str, Any] = dict.fromkeys(("alibi", "sinks", "bias", "kv_lens"), True)
        fields |= {"kv_bits": 4, "kv_group": 32, "rope": "pairs", "rope_dims": 2}
        config = AttentionConfig(32, **fields)
        self.check(self.case(config, way, batch=1, kv_heads=1, q_len=1, kv_len=1))
        paged = AttentionConfig(32, varlen=True, page_size=8, array_mask=False)
        self.check(self.case(paged, way, batch=1, kv_heads=1, q_len=1, kv_len=1))

    @pytest.mark.parametrize("step", [3, -1], ids=["gaps", "reversed"])
    @pytest.mark.parametrize("way", ["forward", "decode in 8"])
    @pytest.mark.parametrize("fields", [{}, {"rope": "pairs"}, *WHERE.values()], ids=str)
    def test_elements_of_a_row_apart(self, fields: dict[str, Any], way: str, step: int) -> None:
        """Of every array that has rows: the same numbers as of rows without gaps, to the bit."""
        case = self.case(AttentionConfig(64, heads_per_kv=2, **fields), way, kv_len=50)
        q, k, v, inputs = case.call()
        close = np.array(self.run(case, q, k, v, inputs)[0])
        rows = [apart(x, step) for x in (q, k, v)]
        beside: dict[str, Any] = {
            n: apart(x, step) for n, x in inputs.named.items() if n[0] in "kv" and x.ndim == 4
        }
        for given in ((*rows, inputs), (q, k, v, replace(inputs, **beside))):
            assert np.array_equal(close, np.array(self.run(case, *given)[0]))

    @pytest.mark.parametrize("fields", WHERE.values(), ids=WHERE)
    @pytest.mark.parametrize(("q_len", "kv_len"), [(0, 9), (9, 0), (0, 0), (1, 1)])
    def test_lengths_of_none(self, fields: dict[str, Any], q_len: int, kv_len: int) -> None:
        config = AttentionConfig(32, **fields)
        self.check(self.case(config, batch=3, q_len=q_len, kv_len=kv_len))

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("fields", WHERE.values(), ids=WHERE)
    def test_hostile_tables_and_lengths(self, fields: dict[str, Any], way: str) -> None:
        """Any integers: nothing is read or written out of bounds, and nothing hangs."""
        case = self.case(AttentionConfig(32, **fields), way)
        q, k, v, _ = case.call()
        for seed in range(2):
            inputs = hostile(case, seed)
            if self.name != "simulator":
                out, _ = self.run(case, q, k, v, inputs)
                mx.eval(out)
                assert out.shape == q.shape
                continue
            with simulator.record(checked=True) as runs:
                mx.eval(self.run(case, q, k, v, inputs)[0])
            # Sequences that overlap are written by more than one threadgroup: in bounds, though.
            found = [f for run in runs for f in run.findings or ()]
            wrong = [f for f in found if f.kind != "race between threadgroups"]
            assert len(runs), "nothing ran"
            assert not wrong, f"{wrong[0]}\n{case}"

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("sink", [-float("inf"), -1e38, -80.0, 8.0])
    def test_sinks_of_any_weight(self, sink: float, way: str) -> None:
        """Of none at all, too; beside rows that see no key, which have the sink alone."""
        config = AttentionConfig(32, causal=True, sinks=True, return_lse=True)
        case = self.case(config, way, batch=1, kv_heads=1, q_len=9, kv_len=4)
        q, k, v, inputs = case.call()
        inputs = replace(inputs, sinks=mx.full(q.shape[1], sink))
        out, lse = self.run(case, q, k, v, inputs)
        expected, expected_lse = attention_float64(
            q, k, v, scale=0.25, inputs=inputs, **config_features(config)
        )
        assert lse is not None
        assert relative_error(out, expected) <= TOLERANCE[config.dtype]
        np.testing.assert_allclose(np.array(lse), expected_lse, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("kv_len", [1, 31, 32, 200])
    def test_listed_blocks_beyond_the_last_key_are_left_out(self, kv_len: int) -> None:
        """A block mask is made for all keys; lengths say how many there are."""
        for mask in functions()[1]:
            config = AttentionConfig(32, mask_mod=mask, block_mask=True, kv_lens=True)
            self.check(self.case(config, kv_len=kv_len))

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("name", ["packed", "lengths", "pages"])
    def test_deterministic_rows_do_not_depend_on_what_is_beside_them(
        self, name: str, way: str
    ) -> None:
        if self.name == "reference" and mx.default_device().type == mx.DeviceType.gpu:
            pytest.skip("plain MLX sums products on a GPU in orders that depend on their sizes")
        fields = {n: x for n, x in WHERE[name].items() if n != "rope"}
        config = AttentionConfig(32, deterministic=True, heads_per_kv=2, **fields)
        case = self.case(config, way, batch=3, kv_len=300, seed=4)
        q, k, v, inputs = case.call()
        whole = np.array(self.run(case, q, k, v, inputs)[0])
        for n in range(3):
            own, place = _alone(q, k, v, inputs, n)
            if 0 in own[0].shape or 0 in own[1].shape:
                continue
            alone = np.array(self.run(case, *own)[0])
            assert np.array_equal(alone, whole[place])

    @pytest.mark.parametrize("way", WAYS)
    def test_work_is_cut_into_dispatches_with_the_same_numbers(self, way: str) -> None:
        fields: dict[str, Any] = {"causal": True, "alibi": True, "return_lse": True, "dropout": 0.1}
        config = AttentionConfig(16, heads_per_kv=2, max_work=1 << 16, **fields)
        family, splits = WAYS[way]
        q_len = 33 if get_attention(family).head_rows else 100
        case = self.case(config, way, batch=2, q_len=q_len, kv_len=700)
        with simulator.record() as runs:
            self.check(case)
        assert self.name != "simulator" or len(runs) > min(splits, 2)  # the combine step is one
        uncut = replace(case, config=replace(config, max_work=None))
        outs = [np.array(self.run(c)[0]) for c in (case, uncut)]
        assert np.array_equal(outs[0], outs[1])

    @pytest.mark.parametrize(
        "fields",
        [
            {"varlen": True, "page_size": 8, "kv_bits": 8, "kv_group": 32, "rope": "half"},
            {"varlen": True, "sinks": True, "causal": True, "alibi": True},
            {"kv_lens": True, "bias": True, "array_mask": True, "dropout": 0.2},
        ],
    )
    def test_gradients_reach_every_array_of_numbers(self, fields: dict[str, Any]) -> None:
        """Those of the plain definition; none of tables, lengths and quantized words."""
        config = AttentionConfig(32, "float32", heads_per_kv=2, **fields)
        q, k, v, inputs = sample_call(config, batch=5, q_len=9, kv_len=30, seed=1)
        names = [n for n in ("alibi_slopes", "bias", "sinks") if n in inputs.named]
        arrays = [q, *(getattr(inputs, n) for n in names)]
        if config.kv_bits is None:
            arrays += [k, v]

        def gradients(run: Callable[..., Any]) -> list[mx.array]:
            def total(arrays: list[mx.array]) -> mx.array:
                named: dict[str, Any] = dict(zip(names, arrays[1:], strict=False))
                keys = (k, v) if config.kv_bits else arrays[-2:]
                out: mx.array = run(arrays[0], *keys, replace(inputs, **named))
                return (out * mx.cos(mx.arange(out.size).reshape(out.shape))).sum()

            found: list[mx.array] = mx.grad(total)(arrays)
            return found

        kernel = get_kernel(config, device=self.name, q_len=9)
        features = config_features(config)
        found = gradients(lambda q, k, v, given: kernel(q, k, v, scale=0.25, inputs=given))
        expected = gradients(
            lambda q, k, v, given: attention_mlx(q, k, v, scale=0.25, **features, inputs=given)[0]
        )
        for ours, theirs in zip(found, expected, strict=True):
            assert np.abs(np.array(theirs)).max() > 1e-3
            np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=1e-4, atol=1e-5)

    def test_dropout_drops_the_same_whatever_the_schedule(self) -> None:
        """Values are unit vectors, so that the output shows every weight."""
        config = AttentionConfig(8, "float32", value_head_dim=72, heads_per_kv=2, dropout=0.5)
        q, k = normal((2, 4, 7, 8)), normal((2, 2, 70, 8), seed=1)
        v = mx.broadcast_to(mx.eye(70, 72), (2, 2, 70, 72))
        inputs = Inputs(dropout_key=mx.random.key(3))
        found = []
        for way in WAYS:
            case = self.case(config, way)
            for bk in (8, 32):
                own = replace(case, schedule=replace(case.schedule, bk=bk, bd=72))
                if not is_valid(config, own.schedule, self.device.limits):
                    continue
                found.append(np.array(self.run(own, q, k, v, inputs)[0]) != 0)
        assert all(np.array_equal(each, found[0]) for each in found)
        assert not found or 0.45 < found[0][..., :70].mean() < 0.55

    def test_what_lies_where_nothing_is_looked_at_does_not_matter(self) -> None:
        """Not even to a bit: NaN there, or numbers."""
        for fields in WHERE.values():
            case = self.case(AttentionConfig(32, **fields))
            q, k, v, inputs = case.call()
            clean = [_without_nan(x) for x in (q, k, v)]
            named = {n: _without_nan(x) for n, x in inputs.named.items()}
            changed: dict[str, Any] = named
            outs = [
                np.array(self.run(case, *arrays)[0])
                for arrays in ((q, k, v, inputs), (*clean, replace(inputs, **changed)))
            ]
            assert np.isfinite(outs[0]).all() and np.array_equal(outs[0], outs[1])

    def test_the_default_schedule_passes_the_check(self) -> None:
        from metalgen.calls.verify import verify

        for name in ("everything on scores", "everything on keys"):
            config = AttentionConfig(64, return_lse=True, **FEATURES[name])
            for family in ("forward", "decode"):
                schedule: Schedule = default_schedule(config, self.device.limits, family)
                result = verify(self.device, config, schedule)
                assert result.ok, result.detail
                assert 0 < result.error <= result.tolerance


def _without_nan(x: mx.array) -> mx.array:
    return mx.where(mx.isnan(x), mx.array(3.0, x.dtype), x) if "float" in str(x.dtype) else x


def _alone(
    q: mx.array, k: mx.array, v: mx.array, inputs: Inputs, n: int
) -> tuple[tuple[mx.array, mx.array, mx.array, Inputs], Any]:
    """A sequence of a call by itself, and where its rows lie in the whole call's output."""
    if inputs.cu_q is None or inputs.cu_k is None:
        table = None if inputs.block_table is None else inputs.block_table[n : n + 1]
        assert inputs.kv_lens is not None
        own = replace(inputs, kv_lens=inputs.kv_lens[n : n + 1], block_table=table)
        keys = (k, v) if table is not None else (k[n : n + 1], v[n : n + 1])
        return (q[n : n + 1], *keys, own), slice(n, n + 1)
    (a, b), (c, d) = ((int(starts[n]), int(starts[n + 1])) for starts in (inputs.cu_q, inputs.cu_k))
    own = dataclasses.replace(inputs, cu_q=mx.array([0, b - a]), cu_k=mx.array([0, d - c]))
    rows = (slice(None), slice(None), slice(a, b))
    return (q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], own), rows
