"""Which schedules can run a config, which runs it by default, and what stored ones are."""

from __future__ import annotations

from typing import Any

from metalgen.errors import ArgumentError, InvalidSchedule
from metalgen.families.registry import get_family
from metalgen.kinds import Kind, get_kind, kinds_in
from metalgen.kinds.base import Require
from metalgen.problem.config import AttentionConfig
from metalgen.schedules import APPLE, Limits, Schedule, kinds_of, schedule_type


def check_schedule(config: AttentionConfig, schedule: Schedule, limits: Limits = APPLE) -> None:
    """Whether a kernel can run `config` by `schedule` within `limits`.

    Raises:
        InvalidSchedule: with the name of the first rule that is broken.
    """

    def require(rule: str, holds: bool, detail: str) -> None:
        if not holds:
            raise InvalidSchedule(rule, detail)

    for name, knob in schedule.knobs.items():
        try:
            knob.check(getattr(schedule, name))
        except ArgumentError as error:
            raise InvalidSchedule("choices", str(error)) from None
    require(
        "language",
        schedule.language == limits.language,
        f"{limits.language} has no {schedule.kind or schedule.language} kernels",
    )
    if schedule.kind:
        _check_products(config, schedule, limits, require)
    get_family(schedule.family).check(config, schedule, require)
    if schedule.kind:
        size = threadgroup_bytes(config, schedule)
        require(
            "threadgroup memory",
            size <= limits.threadgroup_bytes,
            f"{size} bytes of at most {limits.threadgroup_bytes}",
        )


def _check_products(
    config: AttentionConfig, schedule: Schedule, limits: Limits, require: Require
) -> None:
    """The rules of all schedules with a matrix kind, and the kind's own."""
    s, kind = schedule, get_kind(schedule.kind)
    require(
        "instructions",
        not kind.instructions or kind.instructions in limits.instructions,
        f"the chip has no {kind.instructions}",
    )
    require("dtype", config.dtype in kind.dtypes, f"{kind.name} has no {config.dtype} kernels")
    sharing = getattr(s, "key_simdgroups", 1)
    require(
        "key_simdgroups",
        s.simdgroups % sharing == 0,
        f"simdgroups must be a multiple of key_simdgroups={sharing}, not {s.simdgroups}",
    )
    rows = kind.row_block * s.row_blocks * s.simdgroups // sharing
    factors = "row_blocks * simdgroups" + (" / key_simdgroups" if sharing > 1 else "")
    require("bq", s.bq == rows, f"bq must be {kind.row_block} * {factors} = {rows}, not {s.bq}")
    most = min(limits.threads, kind.threads)
    require("threads", s.threads <= most, f"{s.threads} threads of at most {most}")
    depth = kind.depth * sharing
    require("bk", s.bk % depth == 0, f"bk must be a multiple of {depth}, not {s.bk}")
    group = 1 if config.kv_bits is None else config.v_group
    require(
        "value_parts",
        s.value_parts == 1 or config.v_dim % (s.value_parts * max(kind.depth, group)) == 0,
        f"value_parts must cut {config.v_dim} columns into whole matrices and groups",
    )
    kind.check(config, s, require)


def is_valid(config: AttentionConfig, schedule: Schedule, limits: Limits = APPLE) -> bool:
    """Whether `check_schedule` finds nothing."""
    try:
        check_schedule(config, schedule, limits)
    except InvalidSchedule:
        return False
    return True


def device_kinds(limits: Limits, family: str) -> list[Kind]:
    """The kinds by which a family has kernels within some limits, the preferred one first."""
    known, own = kinds_of(family), ("", *limits.instructions)
    found = [kind for kind in kinds_in(limits.language) if kind.name in known]
    return sorted(
        (kind for kind in found if kind.instructions in own), key=lambda kind: not kind.instructions
    )


def default_schedule(
    config: AttentionConfig, limits: Limits = APPLE, family: str = "forward", kind: str = ""
) -> Schedule:
    """The schedule that runs a config before anything was tuned, and that races in every search.

    The first valid one that the kind names; those that are likely to spill registers come last.

    Args:
        config: what to compute.
        limits: of the chip.
        family: name of the kernel family.
        kind: name of the matrix kind; empty: the first that has a valid schedule.

    Raises:
        InvalidSchedule: none fits the limits.
    """
    defaults, registers = get_family(family).defaults, get_family(family).registers
    kinds = [get_kind(kind)] if kind else device_kinds(limits, family)
    for own in kinds:
        made = schedule_type(family, own.name)
        spilling = None
        for values in defaults(own, config, limits):
            schedule = made(**{name: value for name, value in values.items() if name in made.knobs})
            if not is_valid(config, schedule, limits):
                continue
            if (registers(own, config, schedule) or 0) <= own.most_registers:
                return schedule
            spilling = spilling or schedule
        if spilling is not None:
            return spilling
    raise InvalidSchedule("default", f"no default schedule for {config} fits {limits}")


def threadgroup_bytes(config: AttentionConfig, schedule: Schedule) -> int:
    """Bytes of threadgroup memory that a kernel takes."""
    return get_kind(schedule.kind).threadgroup_bytes(config, schedule)


def language_of(schedule: Schedule) -> str:
    """Name of the language that a schedule's kernels are written in."""
    return schedule.language


def decode_schedule(fields: dict[str, Any], family: str, language: str = "") -> Schedule:
    """The schedule that stored fields state; its values are typed and in range.

    Args:
        fields: as `Schedule.to_dict` gives them; the kind is left out where it is the language's
            first.
        family: name of the kernel family.
        language: name of the language; empty where it is not known: the first by whose rows the
            fields are consistent.

    Raises:
        ArgumentError: not a dictionary, an unknown family, kind or knob, or a value outside of the
            declared choices.
    """
    get_family(family)
    if not isinstance(fields, dict):
        raise ArgumentError("schedule", "an object of fields", fields)
    fields = dict(fields)
    if "kind" in fields:
        kind = get_kind(str(fields.pop("kind")))
        if language and kind.language != language:
            raise ArgumentError("kind", f"one of {language}", kind.name)
        return schedule_type(family, kind.name).from_dict(fields)
    if language:
        known = [kind for kind in kinds_in(language) if kind.name in kinds_of(family)]
        if not known:
            return schedule_type(family, language).from_dict(fields)
        return schedule_type(family, known[0].name).from_dict(fields)
    found: list[Schedule] = []
    errors: list[ArgumentError] = []
    for name in kinds_of(family):
        made = schedule_type(family, name)
        if made.required_kind:
            continue
        try:
            schedule = made.from_dict(fields)
        except ArgumentError as error:
            errors.append(error)
            continue
        values = {knob: getattr(schedule, knob) for knob in made.knobs}
        if schedule.bq == get_kind(name).rows(values):
            return schedule
        found.append(schedule)
    if found:
        return found[0]
    if errors:
        raise errors[0]
    raise ArgumentError("schedule", "a field kind", sorted(fields))
