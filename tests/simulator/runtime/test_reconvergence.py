"""Lanes that part meet again at the end of the branch or loop, in programs made up at random.

Each program nests branches, loops, break and continue around simd_sum; which way a lane takes
depends on the lane and on its value. `execute` gives the meaning: masks of active lanes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Statement = tuple[Any, ...]
Run = Callable[..., Any]
LANES = range(32)


def condition(draw: random.Random) -> tuple[str, Callable[[int, int], bool]]:
    """The text of a condition on `lane` and `x`, and the condition."""
    m, k = draw.randint(2, 7), draw.randint(1, 6)
    return draw.choice(
        [
            (f"lane % {m} < {k}", lambda lane, x: lane % m < k),
            (f"((lane * {m} + x) & 7) > {k}", lambda lane, x: (lane * m + x) & 7 > k),
            (
                f"lane == {m * k} || x % 3 == {k % 3}",
                lambda lane, x: lane == m * k or x % 3 == k % 3,
            ),
        ]
    )


def program(draw: random.Random, depth: int, in_loop: bool = False) -> list[Statement]:
    return [statement(draw, depth, in_loop) for _ in range(draw.randint(1, 3))]


def statement(draw: random.Random, depth: int, in_loop: bool) -> Statement:
    choice = draw.random()
    if depth == 0 or choice < 0.4:
        return "sum", draw.randint(1, 9)
    if choice < 0.65:
        other = program(draw, depth - 1, in_loop) if draw.random() < 0.5 else []
        return "if", condition(draw), program(draw, depth - 1, in_loop), other
    if in_loop and choice < 0.75:
        return draw.choice(["break", "continue"]), condition(draw)
    return "for", draw.randint(1, 3), draw.randint(1, 4), program(draw, depth - 1, True)


def text(statements: list[Statement], depth: int = 0) -> str:
    out = []
    for each in statements:
        if each[0] == "sum":
            out.append(f"x = x * 5u + simd_sum(x % 1000u + {each[1]}u);")
        elif each[0] == "if":
            out.append(
                f"if ({each[1][0]}) {{\n{text(each[2], depth)}\n}} else {{\n{text(each[3], depth)}\n}}"
            )
        elif each[0] == "for":
            k, n = f"k{depth}", f"n{depth}"
            inner = text(each[3], depth + 1)
            out.append(
                f"{{ uint {n} = {each[1]}u + (lane + x) % {each[2]}u;\n"
                f"for (uint {k} = 0; {k} < {n}; {k}++) {{\n{inner}\n}} }}"
            )
        else:
            out.append(f"if ({each[1][0]}) {each[0]};")
    return "\n".join(out)


Lanes = set[int]


def execute(statements: list[Statement], active: Lanes, x: list[int]) -> tuple[Lanes, Lanes, Lanes]:
    """Runs `statements` for the active lanes; returns those that went on, broke out, continued."""
    going, broke, continued = set(active), set[int](), set[int]()
    for each in statements:
        taken = {i for i in going if each[0] not in ("sum", "for") and each[1][1](i, x[i])}
        if each[0] == "sum":
            total = sum(x[i] % 1000 + each[1] for i in going)
            for i in going:
                x[i] = (x[i] * 5 + total) % 2**32
        elif each[0] == "if":
            ends = [execute(each[2], taken, x), execute(each[3], going - taken, x)]
            going = ends[0][0] | ends[1][0]
            broke |= ends[0][1] | ends[1][1]
            continued |= ends[0][2] | ends[1][2]
        elif each[0] == "for":
            turns = {i: each[1] + (i + x[i]) % 2**32 % each[2] for i in going}
            inside, turn = set(going), 0
            while inside := {i for i in inside if turn < turns[i]}:
                ended = execute(each[3], inside, x)
                inside, turn = ended[0] | ended[2], turn + 1
        else:
            going -= taken
            (broke if each[0] == "break" else continued).update(taken)
    return going, broke, continued


@pytest.mark.parametrize("number", range(24))
def test_lanes_meet_where_branches_and_loops_end(run: Run, number: int) -> None:
    statements = [*program(random.Random(number), 3), ("sum", 1)]
    expected = list(LANES)
    execute(statements, set(LANES), expected)
    body = f"uint x = lane;\n{text(statements)}\na[i] = x;"
    for mode, seed in (("plain", 0), ("plain", 9), ("checked", 0)):
        out = [np.zeros(32, np.uint32)]
        run(body, out, mode=mode, threads=32, threadgroup=32, seed=seed)
        assert out[0].tolist() == expected, body
