"""What a look-up answers with, and how its path is told."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from metalgen.families import Schedule

MISSING = ": no verified "
"""Between a place and what it lacks, in the steps of a path."""


@dataclass(frozen=True)
class Hit:
    """A schedule that was found, and how good an answer it is.

    Args:
        schedule: valid for the config on this chip.
        provenance: ``"measured"``, ``"modelled"``, or ``"pinned"``.
        place: where it was found, such as ``"user database, this chip"``; an inexact one says so.
        chip: the chip that the row is about.
        exact: this very chip and bucket, not stale, and by the standard policy's cold cache.
        stale: measured with another MLX, or another major version of the operating system.
        seconds, default_seconds, mlx_seconds: the row's time, and in the same run the default
            schedule's and MLX's own attention's.
        verified: the kernel passed its check against the float64 reference.
        error: relative error in that check.
        path: what was tried before, and why each better place missed.
    """

    schedule: Schedule
    provenance: str
    place: str
    chip: str
    exact: bool
    stale: bool = False
    seconds: float | None = None
    default_seconds: float | None = None
    mlx_seconds: float | None = None
    verified: bool = False
    error: float | None = None
    path: list[str] = field(default_factory=list, compare=False)

    @property
    def is_measured(self) -> bool:
        """Measured on this very chip, under this MLX."""
        return self.exact and self.provenance == "measured"

    @property
    def beats_mlx(self) -> bool:
        """Measured on this very chip, under this MLX, as faster than MLX's own attention."""
        return (
            self.is_measured
            and self.seconds is not None
            and self.mlx_seconds is not None
            and self.seconds < self.mlx_seconds
        )


def brief(path: Sequence[str]) -> list[str]:
    """The steps of a path; places one after the other that lack the same are one step."""
    steps: list[str] = []
    for missing, group in itertools.groupby(path, lambda step: step.partition(MISSING)[2]):
        if missing:
            places = ", ".join(step.partition(MISSING)[0] for step in group)
            steps.append(f"no verified {missing}: {places}")
        else:
            steps += group
    return steps
