"""Recording which calls of attention a program makes, with their sizes and counts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any

from metalgen.errors import ArgumentError, MetalgenError
from metalgen.families.sizes import MAX_BATCH_HEADS, MAX_LENGTH, Problem
from metalgen.problem.config import AttentionConfig

FORMAT = 1
HEAD = "metalgen_recording"
BALANCE = 64
"""Operations that a GPU does, roughly, while it reads one byte."""


class Recording:
    """The calls of attention between entering and leaving it, in all threads.

    >>> with metalgen.record("calls.json") as recording:
    ...     run_my_program()
    >>> print(recording)

    A call inside ``mx.compile`` counts when it is traced. Sizes are kept by powers of two, as
    tuning keeps them. The file is written at the end, also where an error ends the block; then
    ``metalgen tune --recorded calls.json`` tunes what was called, the costliest first.

    Args:
        path: the file to write; None: none.

    Attributes:
        calls: how many calls there were, by `metalgen.families.sizes.Problem`.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.calls: Counter[Problem] = Counter()

    def __enter__(self) -> Recording:
        global active
        if active is not None:
            raise ArgumentError("record", "one recording at a time", self.path)
        if self.path is not None and not self.path.absolute().parent.is_dir():
            raise ArgumentError("path", "a file in a folder that exists", str(self.path))
        active = self
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global active
        active = None
        if self.path is not None:
            self.write(self.path)

    def note(self, config: AttentionConfig, batch_heads: int, q_len: int, kv_len: int) -> None:
        """Count a call."""
        rows = max(1, min(batch_heads, MAX_BATCH_HEADS))
        queries, keys = (max(1, min(n, MAX_LENGTH)) for n in (q_len, kv_len))
        self.calls[Problem(config, rows, queries, keys)] += 1

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What was called, the costliest first (`cost`)."""
        return costliest(self.calls)

    def write(self, path: str | Path) -> None:
        """Write the recording, all of it or nothing.

        Raises:
            OSError: the file cannot be written.
        """
        rows = [
            {
                "config": problem.config.to_dict(),
                "batch_heads": problem.batch_heads,
                "q_len": problem.q_len,
                "kv_len": problem.kv_len,
                "calls": self.calls[problem],
            }
            for problem in self.problems
        ]
        target = Path(path)
        part = target.with_name(f".{target.name}.part")
        part.write_text(json.dumps({HEAD: FORMAT, "calls": rows}, indent=1) + "\n", "utf-8")
        part.replace(target)

    def __str__(self) -> str:
        lines = [f"{sum(self.calls.values()):,} calls of attention, of {len(self.calls)} kinds"]
        lines += [f"{self.calls[p]:>9,}  {p}" for p in self.problems]
        return "\n".join(lines)


active: Recording | None = None
"""The recording that calls are noted in; None: none, and nothing is noted."""


def record(path: str | Path | None = None) -> Recording:
    """A context manager that records the calls of attention inside of it; see `Recording`.

    Args:
        path: a file to write at the end; None: none, and the recording is in what ``with`` gives.
    """
    return Recording(path)


def cost(problem: Problem) -> float:
    """What one call costs, for ordering: operations, and bytes of keys and values as operations.

    ``2 * batch_heads * q_len * kv_len * (D + Dv)`` operations, half of them where the mask is
    causal and there are as many queries as keys, no more than a window leaves, and at least
    `BALANCE` for each byte of keys and values.
    """
    config = problem.config
    seen = problem.kv_len
    if config.window_left is not None:
        seen = min(seen, config.window_left + 1)
    elif config.causal and problem.q_len == problem.kv_len:
        seen //= 2
    width = config.head_dim + config.v_dim
    operations = 2 * problem.batch_heads * problem.q_len * seen * width
    moved = problem.batch_heads / config.heads_per_kv * seen * config.kv_row_bytes
    return max(operations, BALANCE * moved)


def costliest(calls: Counter[Problem]) -> tuple[Problem, ...]:
    """Problems by what all of their calls cost, the costliest first."""
    return tuple(sorted(calls, key=lambda p: (-calls[p] * cost(p), p.key)))


def read_recording(path: str | Path) -> Recording:
    """A recording from its file; nothing in it is executed.

    Raises:
        ArgumentError: no recording, or one with something that is none of a call's.
    """
    expected = "a file that metalgen.record or `metalgen lm --record` wrote"
    try:
        read: Any = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise ArgumentError("recorded", f"{expected} ({error.strerror})", str(path)) from None
    except ValueError:
        raise ArgumentError("recorded", f"{expected}, which is JSON", str(path)) from None
    if not isinstance(read, dict) or read.get(HEAD) != FORMAT:
        raise ArgumentError("recorded", expected, str(path))
    found = Recording()
    for number, row in enumerate(read.get("calls") or ()):
        try:
            config = AttentionConfig.from_dict(row["config"])
            problem = Problem(config, row["batch_heads"], row["q_len"], row["kv_len"])
            count = row["calls"]
            if type(count) is not int or count < 1:
                raise ArgumentError("calls", "a positive integer", count)
        except (KeyError, TypeError, MetalgenError) as error:
            raise ArgumentError(
                "recorded", f"a call as number {number + 1} ({error})", str(path)
            ) from None
        found.calls[problem] += count
    return found
