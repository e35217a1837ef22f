"""Which chip this machine has.

An Apple chip by what macOS says (tested with recorded outputs, never run on a Mac), an NVIDIA GPU
by what MLX's CUDA back end says.
"""

from __future__ import annotations

import functools
import re
import sys

from metalgen.chips.chip import Chip, UnknownChip, all_chips, get_chip

# /usr/sbin is not on every PATH that Python is started with.
BRAND = ("/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string")
ACCELERATOR = ("/usr/sbin/ioreg", "-r", "-d", "1", "-c", "AGXAccelerator")
SECONDS = 5.0
NVIDIA_WORDS = r"NVIDIA|GeForce|Tesla|PCIe|NVL|SXM\d?|HBM\w*|\d+GB"
"""Words of a product's name that say nothing of the GPU in it (but for the H100's)."""


@functools.cache
def detect() -> Chip | None:
    """This machine's chip, an Apple one with its own core count; None when it is not known."""
    system: str = sys.platform  # a plain string, or mypy drops what it believes unreachable
    if system == "darwin":
        return identify(_output(BRAND), _output(ACCELERATOR))
    return identify_nvidia(_cuda_device())


def identify_nvidia(device_name: str) -> Chip | None:
    """The chip of an NVIDIA product's name, such as ``"NVIDIA H100 80GB HBM3"``; None if unknown.

    What is left beside vendor, form and memory is the model: a GH200 is no H200, a part of a GPU
    (MIG) no whole one, and a laptop's RTX 4090 not the desktop's.
    """
    words = re.split(r"[\s-]+", device_name.strip())
    model = "".join(word for word in words if not re.fullmatch(NVIDIA_WORDS, word, re.IGNORECASE))
    if model == "H100" and "pcie" in map(str.lower, words):
        model = "H100-114"
    return next((c for c in all_chips() if c.kind == "nvidia" and c.name == model), None)


def _cuda_device() -> str:
    """What MLX calls this machine's first NVIDIA GPU; empty where it has none."""
    import mlx.core as mx

    if not mx.cuda.is_available():
        return ""
    return str(mx.device_info(mx.Device(mx.gpu, 0)).get("device_name", ""))


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
