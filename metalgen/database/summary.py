"""What a merge, a comparison or a check of files came to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

MAX_REASONS = 20
"""Rejected rows whose reason is kept; all are counted."""


@dataclass
class Summary:
    """What a merge does. A measurement that several sources have counts once.

    Args:
        new: measurements that were not there.
        pooled: measurements that were there and changed.
        same: measurements that were there, and to which nothing was added.
        rejected: rows that were left out.
        conflicts: measurements that one side has as ok and another as failed; counted above too.
        refused: whole files that were left out.
        reasons: why rows or whole files were left out: file, line or row, reason.
    """

    new: int = 0
    pooled: int = 0
    same: int = 0
    rejected: int = 0
    conflicts: int = 0
    refused: int = 0
    reasons: list[tuple[str, str, str]] = field(default_factory=list)

    def reject(self, path: Path, place: str, reason: str, *, whole: bool = False) -> None:
        """Count a row, or a whole file, that was left out."""
        self.refused += whole
        self.rejected += not whole
        if whole or len(self.reasons) < MAX_REASONS:
            self.reasons.append((str(path), place, reason))
