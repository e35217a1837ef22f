"""What a chip allows a threadgroup."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a chip allows a threadgroup, and the language of its kernels.

    Args:
        threadgroup_bytes: bytes of threadgroup memory.
        threads: threads per threadgroup.
        language: name of the language, as in `metalgen.languages.LANGUAGES`.
    """

    threadgroup_bytes: int = 32768
    threads: int = 1024
    language: str = "metal"


APPLE = Limits()
"""The limits of every Apple GPU."""
