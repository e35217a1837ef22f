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
        instructions: those that not every chip of the language has, by the names by which matrix
            kinds require them, such as ``"wgmma"``.
    """

    threadgroup_bytes: int = 32768
    threads: int = 1024
    language: str = "metal"
    instructions: tuple[str, ...] = ()


APPLE = Limits()
"""The limits of every Apple GPU."""
