"""Kernel families: their steps, the rules of their schedules, and the spaces of them."""

from metalgen.families.append import APPEND, append_schedule
from metalgen.families.attention import AttentionFamily
from metalgen.families.base import Family, Step
from metalgen.families.decode import DECODE, DECODE_QUERIES
from metalgen.families.forward import FORWARD
from metalgen.families.registry import (
    FAMILIES,
    ORDINARY,
    attention_families,
    choose_family,
    get_attention,
    get_family,
    get_tuned,
    register,
    tuned_families,
    unregister,
)
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
    "APPEND",
    "APPLE",
    "DECODE",
    "DECODE_QUERIES",
    "FAMILIES",
    "FORWARD",
    "ORDINARY",
    "SIMD_WIDTH",
    "AttentionFamily",
    "Family",
    "Limits",
    "Parameter",
    "Schedule",
    "Space",
    "Step",
    "append_schedule",
    "attention_families",
    "check_schedule",
    "choose_family",
    "decode_schedule",
    "default_schedule",
    "enumerate_valid",
    "get_attention",
    "get_family",
    "get_tuned",
    "is_valid",
    "language_of",
    "register",
    "space",
    "threadgroup_bytes",
    "tuned_families",
    "unregister",
]
