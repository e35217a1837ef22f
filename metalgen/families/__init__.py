"""Kernel families: what is tuned, the rules of their schedules, and the spaces of them."""

from metalgen.families.base import Family, Step
from metalgen.families.decode import DECODE, DECODE_QUERIES
from metalgen.families.forward import FORWARD
from metalgen.families.registry import FAMILIES, get_family, register
from metalgen.families.rules import (
    check_schedule,
    decode_schedule,
    default_schedule,
    is_valid,
    language_of,
    threadgroup_bytes,
)
from metalgen.families.space import Parameter, Space, enumerate_valid, space
from metalgen.schedules import APPLE, SIMD_WIDTH, Limits, Schedule

__all__ = [
    "APPLE",
    "DECODE",
    "DECODE_QUERIES",
    "FAMILIES",
    "FORWARD",
    "SIMD_WIDTH",
    "Family",
    "Limits",
    "Parameter",
    "Schedule",
    "Space",
    "Step",
    "check_schedule",
    "decode_schedule",
    "default_schedule",
    "enumerate_valid",
    "get_family",
    "is_valid",
    "language_of",
    "register",
    "space",
    "threadgroup_bytes",
]
