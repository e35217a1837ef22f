"""Faults planted in our own forward kernel: every one is found, and the kernel itself is clean.

A fault counts as found when the checker reports it, when the kernel cannot finish, or when its
numbers leave the tolerance of the float64 reference. ``FOUND_BY_THE_CHECKER`` are the kinds of
fault that must not need the numbers: synchronisation, bounds, divergence, alignment.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx
import pytest

from metalgen import simulator
from metalgen.calls.verify import verify
from metalgen.devices.kernel import KernelDevice
from metalgen.devices.simulator import SimulatorDevice
from metalgen.families import Schedule, default_schedule
from metalgen.problem.config import AttentionConfig
from metalgen.simulator.errors import ExecutionError
from metalgen.source.render import KernelSource

Edit = Callable[[str], str]

STAGED = Schedule(bq=32, bk=16, bd=64, simdgroups=4)
"""K and V through one buffer, four barriers a pass, Q in registers; passes are written twice."""
BUFFERED = Schedule(
    bq=32, bk=16, bd=24, simdgroups=4, q_source="threadgroup", buffers=2, load_width=4
)
"""Two buffers, Q in threadgroup memory, rows that no vector load fits."""
DIRECT = Schedule(bq=16, bk=16, bd=32, simdgroups=2, k_source="device", v_source="device")
"""K and V straight from device memory, no barrier."""

DIRECT_Q_STAGED = replace(DIRECT, q_source="threadgroup")
"""The same with Q in threadgroup memory: one simdgroup barrier."""

CASES = {
    "staged": (AttentionConfig(64, causal=True), STAGED),
    "staged, not causal": (AttentionConfig(64), STAGED),
    "buffered": (AttentionConfig(20, causal=True, return_lse=True), BUFFERED),
    "direct": (AttentionConfig(32, heads_per_kv=2), DIRECT),
    "direct, Q staged": (AttentionConfig(32), DIRECT_Q_STAGED),
}


class FaultyDevice(KernelDevice):
    """The simulator, with an edit of the source between rendering and compiling."""

    name = "simulator"
    language = "metal"

    def __init__(self, edit: Edit) -> None:
        self.edit = edit

    def unavailable(self) -> str | None:
        return None

    def compile(self, source: KernelSource) -> Callable[..., list[mx.array]]:
        mark = "\n// body\n"
        header, body = self.edit(source.header + mark + source.source).split(mark)
        return SimulatorDevice().compile(replace(source, header=header, source=body))


def substitute(pattern: str, replacement: str, which: int = 0) -> Edit:
    """Replace the ``which``-th match of a regular expression; the text must have it."""

    def edit(text: str) -> str:
        matches = list(re.finditer(pattern, text))
        assert len(matches) > which, f"the kernel has no {pattern!r} number {which}"
        found = matches[which]
        changed = text[: found.start()] + found.expand(replacement) + text[found.end() :]
        assert changed != text
        return changed

    return edit


BARRIER = r"threadgroup_barrier\(mem_flags::mem_threadgroup\);"


def barrier_fault(which: int, replacement: str) -> Edit:
    return substitute(rf"(?<!simdgroup_){BARRIER}", replacement, which)


def move_barrier(which: int, *, before: str) -> Edit:
    """Move a barrier up, in front of the last match of ``before`` that precedes it."""

    def edit(text: str) -> str:
        barriers = list(re.finditer(BARRIER, text))
        barrier = barriers[which]
        target = [m for m in re.finditer(before, text) if m.start() < barrier.start()][-1]
        without = text[: barrier.start()] + text[barrier.end() :]
        return without[: target.start()] + barrier.group() + "\n" + without[target.start() :]

    return edit


@dataclass(frozen=True)
class Fault:
    case: str
    edit: Edit
    checker: bool = True
    """Whether the checker alone must find it; otherwise wrong numbers count too."""


def barrier_faults() -> dict[str, Fault]:
    faults = {}
    replacements = {
        "dropped": "",
        "weakened to mem_none": "threadgroup_barrier(mem_flags::mem_none);",
        "weakened to mem_device": "threadgroup_barrier(mem_flags::mem_device);",
        "narrowed to a simdgroup": "simdgroup_barrier(mem_flags::mem_threadgroup);",
    }
    for case, count in (("staged", 8), ("buffered", 4)):
        for which in range(count):
            for title, replacement in replacements.items():
                faults[f"{case}: barrier {which} {title}"] = Fault(
                    case, barrier_fault(which, replacement)
                )
        faults[f"{case}: barrier 1 reached by one simdgroup only"] = Fault(
            case, barrier_fault(1, "if (sg == 0) threadgroup_barrier(mem_flags::mem_threadgroup);")
        )
        faults[f"{case}: barrier 1 reached by half of the lanes"] = Fault(
            case,
            barrier_fault(1, "if (lane < 16) threadgroup_barrier(mem_flags::mem_threadgroup);"),
        )
    staging = r"const int near = kv_len"
    faults["staged: barrier 5 moved in front of the staging of K"] = Fault(
        "staged", move_barrier(5, before=staging)
    )
    faults["staged: barrier 7 moved in front of the staging of V"] = Fault(
        "staged", move_barrier(7, before=staging)
    )
    for title, replacement in list(replacements.items())[:2]:
        faults[f"direct, Q staged: the simdgroup barrier after Q {title}"] = Fault(
            "direct, Q staged",
            substitute(
                BARRIER.replace("threadgroup_b", "simdgroup_b", 1),
                replacement.replace("threadgroup_b", "simdgroup_b", 1),
            ),
        )
    return faults


STAGE_BOUND = r"for \(int n = 0; n < 1; n\+\+\)"
OUT_BOUND = r"if \((\w+) < (\w+)\)(?= \{\n[^\n]*o_row = )"
ROW_BOUND = r"near = kv_len - 1 - \(k0\)"

FAULTS: dict[str, Fault] = {
    **barrier_faults(),
    # Bounds, off by one.
    "K is read one row past its end": Fault(
        "staged", substitute(ROW_BOUND, "near = kv_len - (k0)")
    ),
    "V is read one row past its end": Fault(
        "staged", substitute(ROW_BOUND, "near = kv_len - (k0)", 1)
    ),
    "the last row of K is not staged": Fault(
        "staged, not causal", substitute(ROW_BOUND, "near = kv_len - 2 - (k0)"), checker=False
    ),
    "the staging of K runs one trip too far": Fault(
        "staged", substitute(STAGE_BOUND, "for (int n = 0; n < 2; n++)")
    ),
    "the staging of V runs one trip too far": Fault(
        "staged", substitute(STAGE_BOUND, "for (int n = 0; n < 2; n++)", 1)
    ),
    "the staging of K stops one trip early": Fault(
        "staged", substitute(STAGE_BOUND, "for (int n = 0; n < 0; n++)")
    ),
    "the staging of V stops one trip early": Fault(
        "staged", substitute(STAGE_BOUND, "for (int n = 0; n < 0; n++)", 1), checker=False
    ),
    "the next tile of K is read one row past its end": Fault(
        "buffered",
        substitute(r"near = kv_len - 1 - \(k0 \+ BK\)", "near = kv_len - (k0 + BK)"),
    ),
    "one row of the output too many is written": Fault(
        "staged", substitute(OUT_BOUND, r"if (\1 <= \2)")
    ),
    "one row of the output too few is written": Fault(
        "staged", substitute(OUT_BOUND, r"if (\1 + 1 < \2)"), checker=False
    ),
    "every row of the output is written": Fault("direct", substitute(OUT_BOUND, "")),
    "Q is read one row past its end": Fault(
        "staged", substitute(r"\+ row, (\w+) - 1", r"+ row, \1")
    ),
    "Q is read without a bound": Fault(
        "direct", substitute(r"min\((first \+ r \* 8 \+ row), \w+ - 1\)", r"(\1)")
    ),
    "a masked key counts": Fault(
        "staged, not causal", substitute(r"past = kv_len -", "past = kv_len + 1 -"), checker=False
    ),
    "the mask hides the diagonal": Fault(
        "staged", substitute(r"place \+ 1\)", "place)"), checker=False
    ),
    "the mask shows one key beyond the diagonal": Fault(
        "staged", substitute(r"place \+ 1\)", "place + 2)"), checker=False
    ),
    "a ragged pass counts as whole": Fault(
        "staged, not causal",
        substitute(r"kv_len - BK \+ 1, k_end", "kv_len, k_end"),
        checker=False,
    ),
    "the last pass is left out": Fault(
        "staged, not causal", substitute(r"!\(k0 < k_end\)", "!(k0 + BK < k_end)"), checker=False
    ),
    "K directly from device is read past its end": Fault(
        "direct", substitute(r"kv_len - 1", "kv_len + BK")
    ),
    "a part of a row of K is read past its end": Fault(
        "buffered", substitute(r"n < count \? from\[n\]", "n <= count + 64 ? from[n + count]")
    ),
    "a part of a row of the output is written past its end": Fault(
        "buffered", substitute(r"if \(n < count\) to\[n\]", "if (n <= count + 9) to[n]")
    ),
    "the output's rows lie too far apart": Fault(
        "staged", substitute(r"(o_row = [^;]*\)) \* DV", r"\1 * (DV + 1)")
    ),
    # Arrays too short, pitches too small, vectors out of alignment.
    "the tile is a row short": Fault(
        "staged", substitute(r"(kv_memory\[[^\]]*/ 16)\]", r"\1 - 2]")
    ),
    "the tile of Q is a row short": Fault(
        "buffered", substitute(r"(q_memory\[[^\]]*/ 16)\]", r"\1 - 2]")
    ),
    "the second buffer overlaps the first by a row": Fault(
        "buffered", substitute(r"KV_SLOT = (\d+);", r"KV_SLOT = \1 - KV_STRIDE;")
    ),
    "the accumulator is one fragment short": Fault(
        "staged",
        substitute(r"o\[ROW_BLOCKS\]\[V_FRAGMENTS\]", "o[ROW_BLOCKS][V_FRAGMENTS - 1]"),
        checker=False,
    ),
    "the scores are one fragment short": Fault(
        "direct",
        substitute(r"s\[ROW_BLOCKS\]\[K_FRAGMENTS\]", "s[ROW_BLOCKS][K_FRAGMENTS - 1]"),
        checker=False,
    ),
    "the pitch of the tile is odd": Fault(
        "staged", substitute(r"KV_STRIDE = (\d+);", r"KV_STRIDE = \1 - 1;")
    ),
    "every simdgroup stages Q in the same rows": Fault(
        "buffered", substitute(r"\+ sg \* ROWS \* Q_STRIDE", "")
    ),
    # Divergence.
    "a simdgroup without rows leaves before the barriers": Fault(
        "staged", substitute(r"(\n  int k0 = )", r"\n  if (first >= q_len) return;\1")
    ),
    "half of the lanes take part in the row maximum": Fault(
        "staged", substitute(r"peak = mg_row_max\(peak\);", "if (col < 4) peak = mg_row_max(peak);")
    ),
    "lanes without keys leave out the row sum": Fault(
        "staged",
        substitute(r"= mg_row_sum\(l\[r\]\)", "= lane % 3 == 0 ? l[r] : mg_row_sum(l[r])"),
    ),
    "some lanes skip the multiplication": Fault(
        "direct", substitute(r"(simdgroup_multiply_accumulate\(s\[)", r"if (lane != 5) \1")
    ),
    # Wrong lane maps.
    "the row of a lane takes the wrong bit": Fault(
        "staged",
        substitute(r"row = \(\(lane >> 2\) & 4\)", "row = ((lane >> 1) & 4)"),
        checker=False,
    ),
    "the column of a lane takes the wrong bit": Fault(
        "staged",
        substitute(r"col = \(\(lane >> 1\) & 4\)", "col = ((lane >> 2) & 4)"),
        checker=False,
    ),
    "row and column of a lane are exchanged": Fault(
        "direct",
        substitute(
            r"const int row = ([^;]*);\s*const int col = ([^;]*);",
            r"const int col = \1;\n  const int row = \2;",
        ),
        checker=False,
    ),
    "the row maximum takes the wrong lanes": Fault(
        "staged",
        substitute(
            r"return max\(x, simd_shuffle_xor\(x, 8\)\)", "return max(x, simd_shuffle_xor(x, 4))"
        ),
        checker=False,
    ),
    "the row sum takes the wrong lanes": Fault(
        "staged",
        substitute(r"return x \+ simd_shuffle_xor\(x, 8\)", "return x + simd_shuffle_xor(x, 2)"),
        checker=False,
    ),
    "the two elements of a lane of P are exchanged": Fault(
        "staged",
        substitute(
            r"p\[r\]\.thread_elements\(\)\[1\] = F\(s\[r\]\[f\]\.thread_elements\(\)\[1\]\)",
            "p[r].thread_elements()[1] = F(s[r][f].thread_elements()[0])",
        ),
        checker=False,
    ),
}


def run(case: str, edit: Edit) -> tuple[list[simulator.Findings], bool]:
    """Run the kernel checked; return all findings and whether its numbers were right."""
    config, schedule = CASES[case]
    with simulator.record(checked=True) as runs, simulator.limits(seconds=20):
        try:
            right = verify(FaultyDevice(edit), config, schedule).ok
        except ExecutionError:
            right = False
    return [launch.findings for launch in runs if launch.findings is not None], right


def test_there_are_at_least_forty_faults() -> None:
    assert len(FAULTS) >= 40


@pytest.mark.parametrize("title", FAULTS)
def test_a_seeded_fault_is_found(title: str) -> None:
    fault = FAULTS[title]
    findings, right = run(fault.case, fault.edit)
    reported = sum(len(each) for each in findings)
    if fault.checker:
        assert reported, (
            f"the checker said nothing; the numbers were {'right' if right else 'wrong'}"
        )
    else:
        assert reported or not right


CLEAN = {
    **CASES,
    **{
        f"default schedule, D={dim}, {dtype}, {'causal' if causal else 'full'}": (
            AttentionConfig(dim, dtype=dtype, causal=causal),
            default_schedule(AttentionConfig(dim, dtype=dtype, causal=causal)),
        )
        for dim in (8, 20, 64, 128, 256)
        for dtype in ("float16", "bfloat16", "float32")
        for causal in (False, True)
        if dim in (64, 128) or (dtype, causal) == ("float16", True)
    },
    "K from device, V staged": (
        AttentionConfig(64, causal=True),
        Schedule(bq=32, bk=32, bd=64, simdgroups=4, k_source="device"),
    ),
    "V from device, K staged in slices": (
        AttentionConfig(64, causal=True),
        Schedule(bq=32, bk=32, bd=32, simdgroups=4, v_source="device", buffers=2),
    ),
    "sliced staging": (
        AttentionConfig(128, causal=True),
        Schedule(bq=32, bk=32, bd=32, simdgroups=4),
    ),
    "two row blocks, widened fragments": (
        AttentionConfig(64, value_head_dim=40, heads_per_kv=3),
        Schedule(bq=32, bk=24, bd=64, simdgroups=2, row_blocks=2, fragment="float32"),
    ),
}


@pytest.mark.parametrize("title", CLEAN)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_kernel_itself_is_clean_and_right(title: str, seed: int) -> None:
    config, schedule = CLEAN[title]
    with simulator.record(checked=True, seed=seed) as runs:
        result = verify(SimulatorDevice(), config, schedule)
    assert result.ok, result.detail
    for launch in runs:
        assert launch.findings is not None
        assert not len(launch.findings), launch.findings.report()
