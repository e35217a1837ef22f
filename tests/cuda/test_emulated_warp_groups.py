"""What kernels of warp groups compute, without a GPU (see emulator.h and warp_groups.h)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from emulated_cuda import EmulatedCuda

from metalgen.problem.config import AttentionConfig
from metalgen.source.render import KernelSource
from metalgen.testing.cases import FEATURES
from metalgen.testing.fuzz import Case, default_case, fault, made_up

DTYPES = ("float16", "bfloat16")
PLAIN = [name for name in FEATURES if "kv_bits" not in FEATURES[name]]
WIDTHS = ((64, 64), (128, 128), (256, 256), (192, 128), (72, 20), (80, 96), (160, 160), (8, 8))


def hopper(offset: int = 0, seed: int = 0) -> EmulatedCuda:
    return EmulatedCuda(offset, seed, ("wgmma",))


class Changed(EmulatedCuda):
    """The same GPU, whose kernels have one thing changed before they are compiled."""

    def __init__(self, change: Callable[[str], str]) -> None:
        super().__init__(instructions=("wgmma",))
        self.change = change

    def compile(self, source: KernelSource) -> Callable[..., list[mx.array]]:
        text = self.change(source.source)
        assert text != source.source, "nothing was changed"
        return super().compile(replace(source, source=text))


@pytest.fixture(scope="module")
def gpu() -> EmulatedCuda:
    device = hopper()
    if reason := device.unavailable():
        pytest.skip(f"emulated CUDA: {reason}")
    return device


def case_of(device: EmulatedCuda, config: AttentionConfig, **sizes: Any) -> Case:
    """A case of the default schedule, with a schedule's fields changed."""
    case = default_case(config, device.limits, "forward", **{"batch": 2, "kv_heads": 1} | sizes)
    assert case.schedule.kind == "wgmma"
    return case


@pytest.mark.parametrize(("dim", "v_dim"), WIDTHS)
def test_widths(gpu: EmulatedCuda, dim: int, v_dim: int) -> None:
    dtype = DTYPES[dim // 8 % 2]
    config = AttentionConfig(dim, dtype, value_head_dim=v_dim, causal=True, return_lse=True)
    assert not (wrong := fault(gpu, case_of(gpu, config))), wrong


@pytest.mark.parametrize(
    "sizes",
    [
        {"simdgroups": 4, "bq": 64, "bk": 16, "buffers": 2},
        {"simdgroups": 8, "bq": 128, "bk": 80, "buffers": 3},
        {"simdgroups": 12, "bq": 192, "bk": 112, "buffers": 6},
        {"simdgroups": 4, "bq": 64, "bk": 176, "buffers": 2, "value_parts": 2},
        {"simdgroups": 4, "bq": 64, "bk": 16, "buffers": 2, "overlap": "softmax"},
        {"simdgroups": 8, "bq": 128, "bk": 80, "buffers": 3, "overlap": "softmax"},
    ],
    ids=str,
)
def test_schedules(gpu: EmulatedCuda, sizes: dict[str, Any]) -> None:
    config = AttentionConfig(64, "float16", causal=True, return_lse=True, heads_per_kv=2)
    case = case_of(gpu, config, q_len=203, kv_len=300)
    case = replace(case, schedule=replace(case.schedule, **sizes))
    assert not (wrong := fault(gpu, case)), wrong


@pytest.mark.parametrize("name", PLAIN)
def test_features(gpu: EmulatedCuda, name: str) -> None:
    turn = list(FEATURES).index(name)
    config = AttentionConfig(
        (64, 96, 128)[turn % 3], DTYPES[turn % 2], heads_per_kv=2, return_lse=True, **FEATURES[name]
    )
    assert not (wrong := fault(gpu, case_of(gpu, config))), wrong


@pytest.mark.parametrize("name", ["window", "sinks", "pages", "packed", "dropout", "softcap"])
def test_features_with_overlap(gpu: EmulatedCuda, name: str) -> None:
    """Passes without a key that is seen come before, between and behind the others."""
    fields = {"window": {"causal": True, "window_left": 40}, "softcap": {"softcap": 20.0}}
    config = AttentionConfig(64, "bfloat16", return_lse=True, **(FEATURES | fields)[name])
    for seed in range(2):
        case = case_of(gpu, config, q_len=203, kv_len=300, seed=seed)
        schedule = replace(case.schedule, bk=32, buffers=3, overlap="softmax")
        case = replace(case, schedule=schedule)
        assert not (wrong := fault(gpu, case)), wrong


@pytest.mark.parametrize("offset", [4, 8])
def test_rows_that_start_anywhere(gpu: EmulatedCuda, offset: int) -> None:
    """Where no 16 bytes can be copied at once, rows are stored element by element."""
    config = AttentionConfig(64, "bfloat16", kv_lens=True, rope="half", causal=True)
    other = hopper(offset, seed=offset)
    assert not (wrong := fault(other, case_of(other, config))), wrong


OVERLAP_FAULTS: dict[str, tuple[str, str, str]] = {
    "values that are multiplied before they are there": (
        "mg_barrier_wait(full + before, (ring == 0 ? round ^ 1 : round));",
        "",
        "",
    ),
    "scores that are read too early": ("mg_products_wait<1>();", "", ""),
    "an output that is scaled too early": (
        "mg_products_wait<0>();\n      mg_products_end(mg_flat(o[0]));",
        "",
        "",
    ),
    "an old factor": ("o[r >> 1][f][(r & 1) * 2 + e] *= o_factor[r];", "", "relative error"),
}
FAULTS: dict[str, tuple[str, str, str]] = {
    "no wait for a tile": ("mg_barrier_wait(full + ring, round);", "", ""),
    "no wait for the queries": ("mg_barrier_wait(owned, 0);", "", ""),
    "a tile that is filled while it is read": (
        "mg_barrier_wait(empty + ring, round ^ 1);",
        "",
        "",
    ),
    "no proxy fence": ("mg_proxy_fence();", "", "without a proxy fence"),
    "products that are not waited for": ("mg_products_wait<0>();", "", "product"),
    "a product that is read too early": (
        "mg_products_wait<0>();",
        "mg_products_wait<1>();",
        "",
    ),
    "no fence before a product": ("mg_products_begin(sum);", "", "without a fence"),
    "a tile that nobody frees": (
        "if (lane == 0) mg_barrier_arrive(empty + ring);",
        "",
        "wait for each other",
    ),
    "panels that are not aligned": (
        "mg_shared(kv_tile), 0)",
        "mg_shared(kv_tile) + 128, 0)",
        "not aligned",
    ),
    "a panel stride that is wrong": ("a = d / 4 * ", "a = 8 + d / 4 * ", ""),
    "warps that do not agree": (
        "const bool live = ",
        "const bool live = (k0 < k_begin + BK || sg % 4 != 1) && ",
        "",
    ),
    "keys beyond the last": ("f * 8 + e < past ?", "true ?", "relative error"),
}


@pytest.mark.parametrize("name", [*FAULTS, *OVERLAP_FAULTS])
def test_faults_are_found(gpu: EmulatedCuda, name: str) -> None:
    """The emulator's own test: each of these is wrong, and some would show on no GPU every time."""
    text, instead, says = (FAULTS | OVERLAP_FAULTS)[name]
    config = AttentionConfig(128, "bfloat16")
    case = case_of(gpu, config, batch=1, q_len=70, kv_len=700)
    if name in OVERLAP_FAULTS:
        sizes = {"bq": 128, "simdgroups": 8, "overlap": "softmax"}
        case = replace(case, schedule=replace(case.schedule, **sizes))
        assert not fault(gpu, case)
    try:
        found = fault(Changed(lambda source: source.replace(text, instead)), case)
    except RuntimeError as error:
        found = str(error)
    assert found and says in found


@pytest.mark.parametrize("shard", range(2))
def test_small_combinations_at_random(gpu: EmulatedCuda, shard: int) -> None:
    """The first 20, of any features, that a search may try with this kind."""
    cases = (made_up(number, gpu.limits, small=True) for number in range(shard * 100, 1000))
    chosen = (case for case in cases if case.schedule.kind == "wgmma")
    for _, case in zip(range(10), chosen, strict=False):
        assert not (wrong := fault(gpu, case)), f"{wrong}\n{case}"
