"""Which chip this machine has: macOS only. Tested with recorded outputs, never run on a Mac."""

from __future__ import annotations

import functools
import re
import sys

from metalgen.chips.chip import Chip, UnknownChip, all_chips, get_chip

# /usr/sbin is not on every PATH that Python is started with.
BRAND = ("/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string")
ACCELERATOR = ("/usr/sbin/ioreg", "-r", "-d", "1", "-c", "AGXAccelerator")
SECONDS = 5.0


@functools.cache
def detect() -> Chip | None:
    """This machine's chip, with its own core count; None off macOS or when it is not known."""
    system: str = sys.platform  # a plain string, or mypy drops what it believes unreachable
    if system != "darwin":
        return None
    return identify(_output(BRAND), _output(ACCELERATOR))


def identify(brand: str, accelerator: str) -> Chip | None:
    """The chip of what ``sysctl`` and ``ioreg`` print.

    Args:
        brand: ``machdep.cpu.brand_string``, such as ``"Apple M3 Max"``.
        accelerator: the I/O registry's entry of the GPU, which holds ``"gpu-core-count" = 30``.

    Returns None for a chip that is not on record. Where the core count is missing, or is none
    that is on record, the chip of that name with the nearest count.
    """
    match = re.search(r"Apple M\d+(?: (?:Pro|Max|Ultra))?", brand)
    if match is None:
        return None
    try:
        chip = get_chip(match[0])
    except UnknownChip:
        return None
    count = re.search(r'"gpu-core-count"\s*=\s*(\d+)', accelerator)
    if count is None:
        return chip
    sizes = [c for c in all_chips() if c.family == chip.family]
    return min(sizes, key=lambda c: abs(c.cores - int(count[1])))


def _output(command: tuple[str, ...]) -> str:
    import subprocess

    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout
