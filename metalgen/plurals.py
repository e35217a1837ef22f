"""Numbers in messages."""

from __future__ import annotations


def counted(number: int, noun: str, plural: str = "") -> str:
    """``1 row``, ``2 rows``; `plural` for a noun that takes more than an s."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
