"""The race checker against the definition of a race, on programs made up at random.

A program is a row of barriers of every kind and of reads and writes of threadgroup memory, each by
some threads. Two accesses of one element by different threads, one of them a write, race unless a
barrier with the threadgroup flag stands between: threadgroup_barrier for any two threads,
simdgroup_barrier for two of one simdgroup.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

Run = Callable[..., Any]
THREADS, ELEMENTS, RACE = 64, 24, 1
THREADGROUP, SIMDGROUP, NOTHING = "threadgroup", "simdgroup", "nothing"
BARRIERS = [
    ("threadgroup_barrier(mem_flags::mem_threadgroup);", THREADGROUP, 4),
    ("threadgroup_barrier(mem_flags::mem_device);", NOTHING, 1),
    ("threadgroup_barrier(mem_flags::mem_none);", NOTHING, 1),
    ("simdgroup_barrier(mem_flags::mem_threadgroup);", SIMDGROUP, 3),
    ("simdgroup_barrier(mem_flags::mem_none);", NOTHING, 1),
    ("x += simd_sum(1.0f);", NOTHING, 1),
]


@dataclass(frozen=True)
class Access:
    """Threads with t % among < first access `size` elements from (factor * t + offset) % extent."""

    write: bool
    factor: int
    offset: int
    extent: int
    among: int
    first: int
    size: int

    def elements(self, t: int) -> range:
        start = (self.factor * t + self.offset) % self.extent
        return range(start, start + self.size) if t % self.among < self.first else range(0)

    def text(self) -> str:
        at = f"({self.factor}u * t + {self.offset}u) % {self.extent}u"
        kind = "pair" if self.size == 2 else "float"
        value = f"*(threadgroup {kind}*)(s + {at})"
        if self.write:
            action = f"{value} = {'pair{x, x}' if self.size == 2 else 'x'};"
        else:
            action = f"{kind} v = {value}; x += {'v.b' if self.size == 2 else 'v'};"
        return f"if (t % {self.among}u < {self.first}u) {{ {action} }}"


Step = Access | tuple[str, str, int]


def program(draw: random.Random) -> list[Step]:
    steps: list[Step] = []
    for _ in range(draw.randint(3, 7)):
        if draw.random() < 0.45:
            steps += draw.choices(BARRIERS, weights=[weight for *_, weight in BARRIERS])
        else:
            steps.append(
                Access(
                    write=draw.random() < 0.4,
                    factor=draw.choice([1, 1, 1, 0, 5, 3]),
                    offset=draw.randint(0, ELEMENTS),
                    extent=draw.choice([4, 12, ELEMENTS]),
                    among=draw.randint(1, 16),
                    first=draw.randint(1, 3),
                    size=draw.choice([1, 1, 2]),
                )
            )
    return steps


def races(steps: list[Step]) -> bool:
    """Whether any two accesses race, by looking at all pairs."""
    group_epoch = simdgroup_epoch = 0
    seen: dict[int, list[tuple[int, bool, int, int]]] = {}
    for step in steps:
        if not isinstance(step, Access):
            group_epoch += step[1] == THREADGROUP
            simdgroup_epoch += step[1] in (THREADGROUP, SIMDGROUP)
            continue
        for t in range(THREADS):
            for element in step.elements(t):
                for other, wrote, their_group, their_simdgroup in seen.get(element, []):
                    if other == t or not (wrote or step.write):
                        continue
                    together = other // 32 == t // 32
                    if (
                        (their_simdgroup == simdgroup_epoch)
                        if together
                        else (their_group == group_epoch)
                    ):
                        return True
                seen.setdefault(element, []).append((t, step.write, group_epoch, simdgroup_epoch))
    return False


PROGRAMS = [program(random.Random(number)) for number in range(30)]


def test_the_programs_are_of_both_kinds() -> None:
    assert 8 <= sum(races(steps) for steps in PROGRAMS) <= 22


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_a_race_is_reported_exactly_where_there_is_one(run: Run, number: int) -> None:
    steps = PROGRAMS[number]
    lines = [step.text() if isinstance(step, Access) else step[0] for step in steps]
    body = (
        f"threadgroup float s[{ELEMENTS + 2}]; float x = 0; if (t < {ELEMENTS + 2}) s[t] = t;\n"
        "threadgroup_barrier(mem_flags::mem_threadgroup);\n" + "\n".join(lines) + "\na[i] = x;"
    )
    for seed in (0, 1, 7):
        out = [np.zeros(THREADS, np.float32)]
        kinds = run(body, out, seed=seed, before="struct pair { float a, b; };").kinds
        assert kinds == ({RACE} if races(steps) else set()), body
