"""What the source transformation raises."""

from __future__ import annotations


class TransformError(Exception):
    """Metal that the transformation cannot take; `line` counts in the user's text (0: unknown)."""

    def __init__(self, message: str, line: int = 0) -> None:
        super().__init__(message)
        self.line = line
