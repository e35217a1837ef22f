"""Schedules: how kernels run; their types, the knobs that they are made of, and limits of chips."""

from metalgen.schedules.knob import REQUIRED, Knob, Point, always
from metalgen.schedules.limits import APPLE, Limits
from metalgen.schedules.schedule import (
    SIMD_WIDTH,
    Schedule,
    all_knobs,
    define_schedule,
    forget_schedules,
    kinds_of,
    schedule_type,
    schedule_types,
)

__all__ = [
    "APPLE",
    "REQUIRED",
    "SIMD_WIDTH",
    "Knob",
    "Limits",
    "Point",
    "Schedule",
    "all_knobs",
    "always",
    "define_schedule",
    "forget_schedules",
    "kinds_of",
    "schedule_type",
    "schedule_types",
]
