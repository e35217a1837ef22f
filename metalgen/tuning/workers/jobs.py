"""What the parent knows of its helper processes: what each is doing, and how it ended."""

from __future__ import annotations

import multiprocessing as mp
import signal
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any

from metalgen.families import Schedule
from metalgen.tuning.timing.measure import Stop

Kernel = tuple[str, Schedule]
"""What a helper compiles once: the key of a config, and a schedule."""


@dataclass
class Job:
    """An operation of one helper, and its answer; ``ahead`` where nobody waits for it yet.

    ``stop`` decides after each sample of a measurement whether it was the last.
    """

    operation: str
    arguments: tuple[Any, ...]
    kernel: Kernel | None = None
    ahead: bool = False
    answer: tuple[Any, ...] | None = None
    stop: Stop | None = None


@dataclass(eq=False)
class Helper:
    """A process, the channel to it, and what it is doing.

    ``holds`` is what it compiled ahead: until that is measured it compiles nothing else.
    """

    process: mp.process.BaseProcess
    channel: connection.Connection[Any, Any]
    log: Path
    due: float
    ready: bool = False
    job: Job | None = None
    holds: Kernel | None = None
    compiled: set[Kernel] = field(default_factory=set)

    def last_words(self) -> str:
        """The last line that the process wrote; empty where there is none."""
        try:
            lines = self.log.read_bytes()[-4096:].decode("utf-8", errors="replace").split("\n")
        except OSError:
            return ""
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def how_it_ended(self) -> str:
        """How its process ended, and its last words."""
        self.process.join(5.0)
        code = self.process.exitcode
        how = "its process ended"
        if code is not None and code < 0:
            how += f" by {signal.Signals(-code).name}"
        elif code is not None:
            how += f" with exit code {code}"
        words = self.last_words()
        return f"{how}: {words}" if words else how
