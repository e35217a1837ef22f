from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from metalgen import ArgumentError, AttentionConfig, InvalidSchedule, Schedule
from metalgen.families import default_schedule
from metalgen.families.operands import attention_operands
from metalgen.kinds.simdgroup_plan import Run, SimdgroupPlan, simdgroup_plan
from metalgen.source import render

GOLDEN = Path(__file__).parent / "golden"
PLAIN = Schedule(bq=64, bk=32, bd=64, simdgroups=4, row_blocks=2)
CASES = {
    "forward_f16_d64_causal": (AttentionConfig(64, causal=True), PLAIN),
    "forward_bf16_d72_v20_lse_direct": (
        AttentionConfig(72, "bfloat16", value_head_dim=20, heads_per_kv=4, return_lse=True),
        Schedule(
            bq=32,
            bk=16,
            bd=72,
            simdgroups=4,
            q_source="threadgroup",
            k_source="device",
            v_source="device",
        ),
    ),
    "forward_f32_d128_two_buffers": (
        AttentionConfig(128, "float32"),
        Schedule(bq=32, bk=16, bd=64, simdgroups=4, buffers=2, load_width=4),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_sources_are_the_golden_ones(name: str) -> None:
    """After a change that is meant: python -m tests.test_render writes them anew; review them."""
    assert render.render(*CASES[name]).text == (GOLDEN / f"{name}.metal").read_text()


def test_a_name_belongs_to_one_source() -> None:
    sources = {}
    for config in (AttentionConfig(64), AttentionConfig(64, causal=True), AttentionConfig(72)):
        for change in ({}, {"load_width": 4}, {"buffers": 2}, {"math_mode": "fast"}):
            source = render.render(config, replace(PLAIN, **change))  # type: ignore[arg-type]
            assert source.name not in sources
            assert re.fullmatch(r"metalgen_forward_f16_d\d+_[0-9a-f]{10}", source.name)
            sources[source.name] = source
    again = render.render(AttentionConfig(64), PLAIN)
    assert sources[again.name] == again


def test_the_source_keeps_to_what_metal_kernel_takes() -> None:
    for config, schedule in CASES.values():
        source = render.render(config, schedule)
        assert source.text.isascii()
        assert "{{" not in source.text and "{%" not in source.text
        assert source.source.count("{") == source.source.count("}")
        for attribute in (
            "thread_index_in_simdgroup",
            "simdgroup_index_in_threadgroup",
            "threadgroup_position_in_grid",
        ):
            assert attribute in source.source
        # Names that MLX's substring search would take for attributes we do not use.
        assert "thread_position_in_grid" not in source.source
        assert "grid_size" not in source.source


def test_no_widening_of_half_fragments() -> None:
    source = render.render(*CASES["forward_f16_d64_causal"]).source
    assert "typedef half F;" in source
    assert set(re.findall(r"simdgroup_matrix<(\w+), 8, 8>", source)) == {"F", "float"}
    accumulators = set(re.findall(r"simdgroup_matrix<float, 8, 8> (\w+)", source))
    assert accumulators == {"s", "o"}


def test_barriers_a_pass_follow_from_buffers_and_slices() -> None:
    def barriers(**change: object) -> int:
        source = render.render(AttentionConfig(64), replace(PLAIN, **change))  # type: ignore[arg-type]
        found = source.source.count("threadgroup_barrier(")
        assert found % 2 == 0
        return found // 2  # as many in passes that mask scores as in those that mask none

    assert barriers() == 4
    assert barriers(buffers=2) == 2
    assert barriers(bd=32) == 8
    assert barriers(bd=32, buffers=2) == 4
    assert barriers(k_source="device") == 2
    assert barriers(k_source="device", buffers=2) == 1
    assert barriers(k_source="device", v_source="device") == 0


def test_whole_passes_have_no_mask_no_branch_and_no_clamp() -> None:
    """They are the inner one of two loops."""
    source = render.render(*CASES["forward_f16_d64_causal"]).source
    inner = source[source.index("for (; k0 < inside_past; k0 += BK) {") :]
    inner, rest = inner.split("if (!(k0 < k_end)) break;")
    for text in ("live", "past", "near"):
        assert not re.search(rf"\b{text}\b", inner[inner.index("{") :]), text
        assert re.search(rf"\b{text}\b", rest), text


def plan_of(config: AttentionConfig, schedule: Schedule) -> SimdgroupPlan:
    return simdgroup_plan(attention_operands(config, schedule), schedule)


def test_wide_loads_cover_every_column_once() -> None:
    for head_dim in range(8, 257):
        for width in (2, 4, 8):
            for bd in (24, 64, 256):
                schedule = Schedule(
                    bq=32, bk=8, bd=min(bd, -(-head_dim // 8) * 8), simdgroups=4, load_width=width
                )
                plan = plan_of(AttentionConfig(head_dim), schedule)
                for runs in (plan.own_runs["q"], plan.out_runs["o"]):
                    columns = [
                        run.column + 8 * run.fragments * block + n
                        for run in runs
                        for block in range(run.count)
                        for n in range(8 * run.fragments)
                    ]
                    assert columns == list(range(-(-head_dim // 8) * 8))
                    for run in runs:
                        end = run.column + 8 * run.fragments * run.count
                        assert run.ragged == (end > head_dim)


def test_a_ragged_width_by_hand() -> None:
    plan = plan_of(AttentionConfig(76), Schedule(bq=32, bk=16, bd=80, simdgroups=4))
    # 76 columns in fragments of 8: two blocks of four fragments, and one of two, partly empty.
    assert plan.own_runs["q"] == (Run(0, 0, 2, 4, False), Run(64, 64, 1, 2, True))
    (k_step, v_step) = plan.steps
    assert (k_step.operand.name, v_step.operand.name) == ("k", "v")
    assert k_step.copy is not None and k_step.copy.ragged
    assert plan.slot_stride == 80 + 8


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ArgumentError, match="a family and a kind among .*, but got 'forward with"):
        Schedule(bq=64, bk=32, bd=64, simdgroups=4, kind="vulkan")
    with pytest.raises(InvalidSchedule, match=r"\(bq\)"):
        render.render(AttentionConfig(64), replace(PLAIN, bq=32))


def test_every_default_renders() -> None:
    for dtype in ("float16", "float32"):
        for head_dim in (8, 13, 64, 100, 192, 256):
            config = AttentionConfig(head_dim, dtype, causal=True, return_lse=True)
            assert (
                f"constexpr int D = {head_dim};"
                in render.render(config, default_schedule(config)).source
            )


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, case in CASES.items():
        (GOLDEN / f"{name}.metal").write_text(render.render(*case).text)
