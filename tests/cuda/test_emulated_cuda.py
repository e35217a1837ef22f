"""What CUDA kernels compute, without a GPU: their sources run on this CPU (see emulator.h)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from emulated_cuda import EmulatedCuda

from metalgen.calls import backward
from metalgen.calls.verify import relative_error
from metalgen.calls.verify_gradients import cotangents_of, exact_gradients, verify_gradients
from metalgen.database.hit import Hit
from metalgen.families import default_schedule
from metalgen.families.backward import backward_config
from metalgen.families.sizes import Problem
from metalgen.kinds import mma_plan
from metalgen.problem.config import AttentionConfig
from metalgen.problem.inputs import Inputs
from metalgen.problem.samples import sample_call
from metalgen.source.render import KernelSource
from metalgen.testing.cases import DTYPES, FEATURES, WAYS
from metalgen.testing.fuzz import Case, default_case, fault, hostile, made_up

QUANTIZED = [name for name in FEATURES if "kv_bits" in FEATURES[name]]
ROWS = {
    "half a chunk of scales": (32, 32, 4, {}),
    "scales in the middle of four bytes": (96, 32, 4, {}),
    "scales in the middle, in pages": (96, 32, 8, {"page_size": 8, "varlen": True}),
    "one scale": (128, 128, 4, {"page_size": 64}),
    "words of 36 chunks": (576, 64, 8, {"value_head_dim": 128}),
    "sixteen bytes of scales": (256, 32, 4, {"kv_lens": True}),
}
"""Head dimension, group, bits and other fields."""


class Changed(EmulatedCuda):
    """The same GPU, whose kernels have one thing changed before they are compiled."""

    def __init__(self, change: Callable[[str], str]) -> None:
        super().__init__()
        self.change = change

    def compile(self, source: KernelSource) -> Callable[..., list[mx.array]]:
        text = self.change(source.source)
        assert text != source.source, "nothing was changed"
        return super().compile(replace(source, source=text))


@pytest.fixture(scope="module")
def gpu() -> EmulatedCuda:
    device = EmulatedCuda()
    if reason := device.unavailable():
        pytest.skip(f"emulated CUDA: {reason}")
    return device


def case_of(config: AttentionConfig, family: str = "forward", **sizes: Any) -> Case:
    """A case of the default schedule, with a schedule's fields changed."""
    case = default_case(config, EmulatedCuda().limits, family)
    knobs = case.schedule.knobs
    fields = {n: sizes.pop(n) for n in list(sizes) if n in knobs}
    if "simdgroups" in fields and "key_simdgroups" in knobs:
        fields = {"key_simdgroups": 1} | fields
    schedule = replace(case.schedule, **fields)
    sharing = getattr(schedule, "key_simdgroups", 1)
    rows = 16 * schedule.row_blocks * schedule.simdgroups // sharing
    return replace(case, schedule=replace(schedule, bq=rows), **sizes)


@pytest.mark.parametrize("fields", [{"causal": True, "heads_per_kv": 2}, {"softcap": 20.0}])
def test_one_kernel_makes_all_gradients(gpu: EmulatedCuda, fields: dict[str, Any]) -> None:
    """Also of 8 warps that share the rows of dQ."""
    config = AttentionConfig(32, "bfloat16", **fields)
    default = default_schedule(config, gpu.limits, "backward_all")
    many = replace(default, simdgroups=8, row_blocks=1, bq=128, bk=64)
    for schedule in (default, many):
        result = verify_gradients(gpu, config, schedule)
        assert result.ok, result.detail


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("seconds", "measured"), [(0.9, True), (1.1, True), (0.9, False)])
def test_one_kernel_is_used_where_it_was_measured_as_faster(
    gpu: EmulatedCuda,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    measured: bool,
    deterministic: bool,
) -> None:
    """Than both others together; never where the order of sums matters."""
    config = AttentionConfig(32, "bfloat16", softcap=20.0, deterministic=deterministic)
    times = {"backward_rows": 0.4, "backward_keys": 0.6, "backward_all": seconds}

    def on_record(where: Any, problem: Problem, family: str) -> Hit:
        schedule = default_schedule(backward_config(config), gpu.limits, family)
        kind = "measured" if measured else "modelled"
        return Hit(schedule, kind, "a test", "H200", True, seconds=times[family])

    monkeypatch.setattr(backward, "_on_record", on_record)
    forward = default_schedule(config, gpu.limits)
    problem = Problem(config, 4, 64, 64)
    found = backward.kernel_gradients(backward.Where(gpu, gpu.limits), problem, forward, [])
    assert found is not None
    joint = seconds < 1.0 and measured and not deterministic
    both = {"backward_rows", "backward_keys"}
    assert {each.family for each in found.used} == ({"backward_all"} if joint else both)
    assert all(f"{name} " in found.explain() for name in ({"backward_all"} if joint else both))


def test_gradients_of_one_kernel_reach_all_arrays(
    gpu: EmulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AttentionConfig(32, "bfloat16", causal=True, heads_per_kv=2)
    call = sample_call(config, q_len=37, kv_len=53, seed=1)
    results, cotangents = cotangents_of(config, call, 0.25, 1)
    families = ("backward_rows", "backward_keys", "backward_all")
    rows, keys, joint = (default_schedule(config, gpu.limits, each) for each in families)
    monkeypatch.setattr(backward, "passes", lambda *_: True)
    forward = default_schedule(config, gpu.limits)
    own = backward.KernelGradients(gpu, config, (rows, keys), forward, joint=joint)
    found = own.of(0.25, call[3])(*call[:3], *results, *cotangents)
    exact = exact_gradients(config, call, cotangents, 0.25)
    for name, array in zip("qkv", found, strict=True):
        assert relative_error(array, exact[name]) < 1e-2, name


@pytest.mark.parametrize(
    ("rows", "columns", "warps", "found"),
    [(2, 8, 4, (2, 2, 4, 1, False)), (4, 2, 8, (1, 1, 2, 4, False)), (2, 5, 4, (2, 2, 4, 1, True))],
)
def test_warps_share_out_what_is_added(
    rows: int, columns: int, warps: int, found: tuple[Any, ...]
) -> None:
    made = mma_plan.shares(rows, columns, warps)
    assert (made.rows, made.columns, made.warps, made.apart, made.ragged) == found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", QUANTIZED)
def test_features_of_quantized_keys(gpu: EmulatedCuda, name: str, way: str) -> None:
    dtype = DTYPES[(QUANTIZED.index(name) + list(WAYS).index(way)) % len(DTYPES)]
    config = AttentionConfig(64, dtype, heads_per_kv=2, return_lse=True, **FEATURES[name])
    family, splits = WAYS[way]
    case = case_of(config, family, **({"splits": splits} if family == "decode" else {}))
    assert not (wrong := fault(gpu, case)), f"{wrong}\n{case}"


@pytest.mark.parametrize("offset", [0, 4, 8])
@pytest.mark.parametrize("simdgroups", [1, 4])
@pytest.mark.parametrize("name", ROWS)
def test_rows_of_any_size(gpu: EmulatedCuda, name: str, simdgroups: int, offset: int) -> None:
    """By one warp, which makes fragments of words, and by four, which share a work tile.

    With an offset arrays start where no 16 bytes can be copied at once.
    """
    other = EmulatedCuda(offset, seed=offset) if offset else gpu
    dim, group, bits, fields = ROWS[name]
    config = AttentionConfig(
        dim, "bfloat16", heads_per_kv=3, kv_bits=bits, kv_group=group, return_lse=True, **fields
    )
    case = case_of(config, "decode", simdgroups=simdgroups, bk=16, splits=2, buffers=3)
    assert not (wrong := fault(other, case)), f"{wrong}\n{case}"


@pytest.mark.parametrize("name", [name for name in FEATURES if name not in QUANTIZED])
def test_features_of_plain_keys(gpu: EmulatedCuda, name: str) -> None:
    turn = list(FEATURES).index(name)
    dtype, family = DTYPES[turn % 3], ("forward", "decode")[turn % 2]
    config = AttentionConfig(72, dtype, heads_per_kv=2, return_lse=True, **FEATURES[name])
    case = case_of(config, family, batch=3)
    assert not (wrong := fault(gpu, case)), f"{wrong}\n{case}"


@pytest.mark.parametrize("name", ["plain", "deterministic", "limited work", *FEATURES])
def test_warps_share_the_keys_of_a_pass(gpu: EmulatedCuda, name: str) -> None:
    """Two or four of them, with and without splits, Q kept in both ways; types take turns."""
    extra: dict[str, dict[str, Any]] = {
        "plain": {},
        "deterministic": {"deterministic": True},
        "limited work": {"max_work": 1 << 16},
    }
    fields = extra | FEATURES
    turn = list(fields).index(name)
    config = AttentionConfig(64, DTYPES[turn % 3], heads_per_kv=2, return_lse=True, **fields[name])
    for sharing, splits, kept in ((2, 1, "threadgroup"), (4, 8, "registers")):
        schedule = {"simdgroups": 4, "key_simdgroups": sharing, "splits": splits}
        case = case_of(config, "decode", bk=64, q_source=kept, kv_len=300, **schedule)
        assert not (wrong := fault(gpu, case)), f"{wrong}\n{case}"


@pytest.mark.parametrize("cached", [1, 3, 4, 100])
@pytest.mark.parametrize("fields", [{}, {"value_head_dim": 512}, {"page_size": 8}], ids=str)
def test_blocks_of_sections_of_heads_are_each_computed_once(
    gpu: EmulatedCuda, fields: dict[str, Any], cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten heads of all entries, in sections of so many: 10, 4, 3 (of 3, 3, 3, 1) and 1."""
    monkeypatch.setattr(mma_plan, "cached_keys", lambda config: cached * 100)
    config = AttentionConfig(64, causal=True, return_lse=True, **fields)
    sizes = {"batch": 2, "kv_heads": 5, "q_len": 100, "kv_len": 100}
    case = case_of(config, simdgroups=1, bk=16, **sizes)
    assert not (wrong := fault(gpu, case)), f"{wrong}\n{case}"


@pytest.mark.parametrize("simdgroups", [1, 2])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_levels_times_scale_plus_bias_are_rounded_once(
    gpu: EmulatedCuda, dtype: str, bits: int, simdgroups: int
) -> None:
    """A single key has weight 1: the output is its values, to the bit."""
    config = AttentionConfig(64, dtype, kv_bits=bits, kv_group=32)
    choices = np.random.default_rng(bits)
    words = mx.array(choices.integers(0, 2**32, (64, 2, 1, 64 * bits // 32), np.uint32))
    scales, biases = (
        mx.array(choices.normal(size=(64, 2, 1, 2)).astype(np.float32)).astype(getattr(mx, dtype))
        for _ in range(2)
    )
    q = mx.ones((64, 2, 1, 64), scales.dtype)
    zeros = mx.zeros_like(scales)
    inputs = Inputs(k_scales=zeros, k_biases=zeros, v_scales=scales, v_biases=biases)
    schedule = replace(
        default_schedule(config, gpu.limits, "decode"),
        splits=1,
        simdgroups=simdgroups,
        key_simdgroups=1,
        bq=16 * simdgroups,
    )
    out, _ = gpu.build(config, schedule)(q, words, words, 1.0, inputs)
    levels = np.array(words)[..., None] >> np.arange(0, 32, bits, dtype=np.uint32) & (2**bits - 1)
    scale, bias = (np.repeat(np.array(x.astype(mx.float32)), 32, axis=3) for x in (scales, biases))
    exact = scale.astype(np.float64) * levels.reshape(out.shape) + bias
    expected = mx.array(exact.astype(np.float32)).astype(out.dtype)
    rounding = 2**-21 if dtype == "float32" else 0  # of a float that is two tf32 numbers
    found, expected = (np.array(x.astype(mx.float32)) for x in (out, expected))
    np.testing.assert_allclose(found, expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("simdgroups", [1, 4])
def test_hostile_tables_and_lengths_read_nothing_else(
    gpu: EmulatedCuda, bits: int, simdgroups: int
) -> None:
    config = AttentionConfig(32, page_size=16, varlen=True, kv_bits=bits, kv_group=32)
    case = case_of(config, "decode", simdgroups=simdgroups)
    q, k, v, _ = case.call()
    for seed in range(3):
        run = gpu.build(case.config, case.schedule)
        mx.eval(run(q, k, v, 0.25, hostile(case, seed))[0])  # raises for a read out of bounds


FAULTS: dict[str, tuple[int, str, str]] = {
    "a wait for one copy less": (1, "mg_wait<0>();", "mg_wait<1>();"),
    "no barrier before a raw tile": (4, "mg_wait<0>();\n    __syncthreads();", "mg_wait<0>();"),
    "no barrier after the work tile": (
        4,
        "__syncthreads();\n\n    const unsigned",
        "const unsigned",
    ),
    "keys beyond the last": (1, "const bool there = index < kv_len;", "const bool there = true;"),
    "scales of the next row": (4, "* 4)[unit", "* 4 + 4)[unit"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(gpu: EmulatedCuda, name: str) -> None:
    """The emulator's own test: each of these is wrong, and no other test would say so."""
    simdgroups, text, instead = FAULTS[name]
    config = AttentionConfig(64, kv_bits=8, kv_group=32)
    case = case_of(config, "decode", simdgroups=simdgroups, splits=1, buffers=2)
    assert not fault(gpu, case)
    try:
        found = fault(Changed(lambda source: source.replace(text, instead)), case)
    except RuntimeError as error:
        found = str(error)
    assert found


@pytest.mark.parametrize("shard", range(4))
def test_small_combinations_at_random(gpu: EmulatedCuda, shard: int) -> None:
    """The first 40, of any features."""
    for number in range(shard * 10, shard * 10 + 10):
        case = made_up(number, gpu.limits, small=True)
        assert not (wrong := fault(gpu, case)), f"{wrong}\n{case}"


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(10))
def test_combinations_at_random(gpu: EmulatedCuda, shard: int) -> None:
    """Of the first 500 those with quantized keys, unless they are too large."""
    for number in range(shard * 50, shard * 50 + 50):
        case = made_up(number, gpu.limits)
        config = case.config
        work = case.batch * case.kv_heads * config.head_dim * (case.q_len + 1) * (case.kv_len + 1)
        if config.kv_bits is None or work > 3e8:
            continue
        assert not (wrong := fault(gpu, case)), f"{wrong}\n{case}"
