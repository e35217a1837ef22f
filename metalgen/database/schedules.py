"""Schedules as they are stored: by whose declarations their fields are read."""

from __future__ import annotations

import functools
from typing import Any

from metalgen.errors import MetalgenError
from metalgen.families import Limits, Schedule, decode_schedule


@functools.lru_cache(maxsize=1 << 10)
def chip_limits(chip: str) -> Limits:
    """The limits of a chip.

    Raises:
        ArgumentError: an unknown chip.
    """
    from metalgen.chips import get_chip

    return get_chip(chip).limits


def chip_language(chip: object) -> str:
    """The language of a chip's kernels; empty for a chip that is unknown."""
    try:
        return chip_limits(chip).language if isinstance(chip, str) else ""
    except MetalgenError:
        return ""


def schedule_on(chip: object, family: str, fields: dict[str, Any]) -> Schedule:
    """The schedule that fields state which were stored for a chip.

    Raises:
        ArgumentError: as `metalgen.families.decode_schedule`.
    """
    return decode_schedule(fields, family, chip_language(chip))
