"""What matrix kinds make of operands: which tile is fetched when, and where it stands. By hand."""

from __future__ import annotations

import pytest

from metalgen.families.operands import attention_operands
from metalgen.kinds.mma_plan import MmaPlan, cached_keys, mma_plan
from metalgen.kinds.simdgroup_plan import SimdgroupPlan, Slot, simdgroup_plan
from metalgen.problem.config import AttentionConfig
from metalgen.schedules import Schedule


def simdgroup(**fields: object) -> SimdgroupPlan:
    values = {"bq": 32, "bk": 16, "bd": 32, "simdgroups": 4, "buffers": 2} | fields
    schedule = Schedule(**values)
    return simdgroup_plan(attention_operands(AttentionConfig(64), schedule), schedule)


def mma(config: AttentionConfig, **fields: object) -> MmaPlan:
    values = {"bq": 64, "bk": 32, "bd": 64, "simdgroups": 4, "kind": "mma"} | fields
    schedule = Schedule(**values)
    return mma_plan(attention_operands(config, schedule), schedule)


def test_an_even_number_of_slices_goes_through_two_buffers_in_turn() -> None:
    """Two slices of K, two of V, 32 columns each."""
    plan = simdgroup()
    assert [(s.operand.name, s.column) for s in plan.steps] == [
        ("k", 0),
        ("k", 32),
        ("v", 0),
        ("v", 32),
    ]
    assert [step.slot for step in plan.steps] == [Slot(0), Slot(1), Slot(0), Slot(1)]
    assert [step.next for step in plan.steps] == [*plan.steps[1:], None]


def test_whole_passes_have_a_text_of_their_own_where_both_fit_the_cache() -> None:
    """Products of a pass: 16 rows and 32 keys at 64 columns are 2 * 4 * (8 + 8) of 8x8x8."""
    fits = simdgroup(bq=64, bk=32, row_blocks=2)
    assert fits.products == 128
    assert fits.whole_passes
    assert not simdgroup(bq=64, bk=64, row_blocks=2).whole_passes
    direct = {"k_source": "device", "v_source": "device", "buffers": 1, "bd": 64}
    assert simdgroup(bk=32, **direct).whole_passes
    assert not simdgroup(bq=64, bk=32, row_blocks=2, **direct).whole_passes


@pytest.mark.parametrize(
    ("fields", "whole"),
    [
        ({"causal": True}, True),
        ({"window_left": 3, "window_right": 5}, True),
        ({"array_mask": True}, False),
        ({"kv_bits": 8}, False),
    ],
)
def test_only_bounds_on_rows_that_need_no_unpacking_leave_whole_passes(
    fields: dict[str, object], whole: bool
) -> None:
    schedule = Schedule(bq=32, bk=16, bd=64, simdgroups=4)
    operands = attention_operands(AttentionConfig(64, **fields), schedule)
    assert simdgroup_plan(operands, schedule).whole_passes == whole


def test_an_odd_number_of_slices_begins_each_pass_in_the_other_buffer() -> None:
    """K is staged, in one slice, and V is not."""
    plan = simdgroup(bd=64, v_source="device")
    (step,) = plan.staged
    assert step.slot == Slot(None, 0)
    assert step.slot.later(1) == Slot(None, 1)  # of the next pass, counted from this one
    assert step.next is None


def test_with_one_buffer_there_is_none_to_choose() -> None:
    assert {step.slot for step in simdgroup(buffers=1).steps} == {None}


@pytest.mark.parametrize(
    ("buffers", "first", "fetched"),
    [
        (1, [], [("k", 0, 0), ("v", 0, 0)]),  # each when it is needed
        (2, [("k", 0, 0)], [("v", 1, 0), ("k", 1, 1)]),  # V with K, then the next K with V
        (3, [("k", 0, 0), ("v", 1, 0)], [("k", 2, 1), ("v", 2, 1)]),
        (4, [("k", 0, 0), ("v", 1, 0), ("k", 2, 1)], [("v", 3, 1), ("k", 3, 2)]),
    ],
)
def test_the_ring_is_filled_as_far_ahead_as_there_are_tiles(
    buffers: int, first: list[tuple[str, int, int]], fetched: list[tuple[str, int, int]]
) -> None:
    """Operand, tiles ahead in the ring, passes ahead: before the loop, then with K and with V."""
    plan = mma(AttentionConfig(64), buffers=buffers)
    assert [(f.operands[0][0].name, f.ahead, f.later) for f in plan.first] == first
    steps = [step.fetch for step in plan.steps]
    assert [(f.operands[0][0].name, f.ahead, f.later) for f in steps] == fetched
    assert plan.waiting == max(0, buffers - 2)


def test_rows_are_copied_in_the_background_where_they_are_whole_chunks() -> None:
    plan = mma(AttentionConfig(64, page_size=16))
    assert plan.aligned["k"] == (
        "D % 8 == 0 && k_strides[3] == 1 && "
        "((reinterpret_cast<uintptr_t>(k_head) | k_pitch | k_page) & 15) == 0"
    )
    assert "q_page" not in plan.aligned["q"]
    assert plan.page_rows == 16


def test_keys_of_a_section_fill_the_cache() -> None:
    """32 MiB, of keys and values of 64 and 32 columns of 2 bytes, read by 4 heads each."""
    config = AttentionConfig(64, value_head_dim=32, heads_per_kv=4, causal=True)
    schedule = Schedule(bq=64, bk=32, bd=64, simdgroups=4, kind="mma")
    operands = attention_operands(config, schedule)
    assert cached_keys(operands) == (32 << 20) * 4 // (2 * (64 + 32))
    assert attention_operands(config, schedule, head_rows=True).ordered_heads == 0
