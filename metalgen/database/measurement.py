"""One measurement, and the line of JSON that carries it from machine to machine."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import platform
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from metalgen.arguments import as_number
from metalgen.database.layout import MAX_TEXT, PHASES, PROVENANCES, STATUSES
from metalgen.database.schedules import schedule_on
from metalgen.errors import ArgumentError
from metalgen.families import Schedule, tuned_families
from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig


def now() -> str:
    """The time, UTC, to the second, such as ``2026-11-21T08:00:00Z``."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@functools.cache
def host() -> dict[str, str]:
    """Operating system, MLX and metalgen version of this process: columns of every row."""
    import mlx.core as mx

    from metalgen._version import __version__

    macos = platform.mac_ver()[0]
    system = f"macOS {macos}" if macos else f"{platform.system()} {platform.release()}"
    return {
        "os": system,
        "mlx_version": getattr(mx, "__version__", ""),
        "metalgen_version": __version__,
    }


@dataclass(frozen=True)
class Measurement:
    """One schedule of one problem on one chip: what came out, and where it came from.

    Args:
        problem, schedule: what was computed, and how.
        template_hash: the templates that the source was rendered from (16 hex digits).
        source_hash: what was rendered (`metalgen.source.digests`); empty where nobody knows.
        chip, cores: the chip's name, and its GPU cores.
        device: what executed it (``"metal"``), or ``"model"`` where nothing did.
        provenance: ``"measured"`` or ``"modelled"``.
        policy: how times were taken (canonical JSON), or the version of the chip model.
        phase: ``"search"``, or ``"final"`` (interleaved with the default and MLX).
        status: ``"ok"``, ``"pruned"`` (ended early: it could not win), ``"invalid"``,
            ``"compile"``, ``"runtime"``, ``"timeout"``, ``"wrong"``.
        seconds: the median of ``samples``, or the predicted time; None where there is none.
        spread: the samples' interquartile range in seconds.
        samples: every sample, in seconds, in the order they were taken.
        default_seconds, mlx_seconds: the default schedule and MLX's fused attention, same run.
        verified: a check against the float64 reference passed, and none failed.
        error: relative error (norm over norm) of that check.
        detail: why a status is not ``"ok"``; of a final that is, why it does not count as faster
            than the default although its median is less.
    """

    problem: Problem
    schedule: Schedule
    template_hash: str
    chip: str
    cores: int
    device: str
    provenance: str
    policy: str
    status: str = "ok"
    seconds: float | None = None
    spread: float | None = None
    samples: tuple[float, ...] = ()
    default_seconds: float | None = None
    mlx_seconds: float | None = None
    phase: str = "search"
    verified: bool = False
    error: float | None = None
    detail: str = ""
    source_hash: str = ""
    os: str = ""
    mlx_version: str = ""
    metalgen_version: str = ""
    run: str = ""
    created: str = field(default_factory=now)

    def __post_init__(self) -> None:
        for name, choices in (
            ("provenance", PROVENANCES),
            ("phase", PHASES),
            ("status", STATUSES),
        ):
            if getattr(self, name) not in choices:
                raise ArgumentError(name, f"one of {', '.join(choices)}", getattr(self, name))
        for name in ("seconds", "spread", "default_seconds", "mlx_seconds", "error"):
            _check_number(name, getattr(self, name))
        for sample in self.samples:
            _check_number("samples", sample)
        if self.status == "ok" and not self.seconds:
            raise ArgumentError("seconds", "a time above 0 for a row that is ok", self.seconds)

    def to_record(self) -> dict[str, Any]:
        """The measurement as plain values; fields at their default are left out."""
        record: dict[str, Any] = {
            "config": self.problem.config.to_dict(),
            "family": self.problem.family,
            "batch_heads": self.problem.batch_heads,
            "q_len": self.problem.q_len,
            "kv_len": self.problem.kv_len,
            "schedule": self.schedule.to_dict(),
        }
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name not in ("problem", "schedule", "run") and value != f.default:
                record[f.name] = list(value) if f.name == "samples" else value
        return record

    def to_line(self) -> str:
        """Canonical JSON of `to_record`: sorted names, no spaces."""
        return json.dumps(self.to_record(), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_record(cls, record: object) -> Measurement:
        """The measurement of a record; every value is typed and within its declared choices.

        Raises:
            ArgumentError: which field was expected to be what, and what came.
        """
        if not isinstance(record, dict):
            raise ArgumentError("record", "an object of fields", record)
        fields = dict(record)
        shape = {
            name: fields.pop(name, None)
            for name in ("config", "family", "batch_heads", "q_len", "kv_len", "schedule")
        }
        if shape["family"] not in [*tuned_families()]:
            known = ", ".join(tuned_families())
            raise ArgumentError("family", f"one of {known}", shape["family"])
        problem = Problem(
            AttentionConfig.from_dict(shape["config"]),
            shape["batch_heads"],
            shape["q_len"],
            shape["kv_len"],
            family=shape["family"],
        )
        schedule = schedule_on(fields.get("chip"), problem.family, shape["schedule"])
        return cls.from_fields(problem, schedule, fields)

    @classmethod
    def from_fields(
        cls, problem: Problem, schedule: Schedule, fields: dict[str, Any]
    ) -> Measurement:
        """The measurement of a problem and schedule, and other fields; raises as `from_record`."""
        for name, value in fields.items():
            check_field(name, value)
        missing = [name for name in _REQUIRED if name not in fields]
        if missing:
            raise ArgumentError("record", f"a field {missing[0]}", sorted(fields))
        samples = tuple(fields.get("samples", ()))
        return cls(**(fields | {"problem": problem, "schedule": schedule, "samples": samples}))

    @classmethod
    def from_line(cls, line: str) -> Measurement:
        """The measurement of one line of JSON; raises as `from_record`."""
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ArgumentError("record", "a line of JSON", line[:80]) from error
        return cls.from_record(record)


_REQUIRED = ("template_hash", "chip", "cores", "device", "provenance", "policy", "created")
_TEXTS = (
    *("template_hash", "chip", "device", "provenance", "policy", "status", "phase", "detail"),
    *("source_hash", "os", "mlx_version", "metalgen_version", "run", "created"),
)
_PATTERNS = {
    "template_hash": (re.compile("[0-9a-f]{16}"), "16 hexadecimal digits"),
    "source_hash": (re.compile("([0-9a-f]{16})?"), "16 hexadecimal digits, or nothing"),
    "chip": (re.compile("[A-Za-z0-9]{1,24}(-[0-9]{1,4})?"), "the name of a chip"),
    "device": (re.compile("[a-z]{1,16}"), "the name of a device"),
    "created": (re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"), "a time such as " + now()),
}
_NUMBERS = ("seconds", "spread", "default_seconds", "mlx_seconds", "error")


def check_fields(m: Measurement) -> None:
    """Whether a measurement would come back from a record: its texts, names and numbers.

    Raises:
        ArgumentError: which field was expected to be what, and what came.
    """
    for f in dataclasses.fields(m):
        value = getattr(m, f.name)
        if f.name not in ("problem", "schedule"):
            check_field(f.name, list(value) if f.name == "samples" else value)
    for sample in m.samples:
        _check_number("samples", sample)


def check_field(name: str, value: object) -> None:
    """Raise `ArgumentError` for what cannot be the value of a field of a measurement."""
    if name in _TEXTS:
        if not isinstance(value, str) or len(value) > MAX_TEXT:
            raise ArgumentError(name, f"text of at most {MAX_TEXT} characters", value)
        if name in _PATTERNS:
            pattern, expected = _PATTERNS[name]
            if not pattern.fullmatch(value):
                raise ArgumentError(name, expected, value[:80])
        elif not value.isprintable():  # a terminal would obey it
            raise ArgumentError(name, "printable text", value[:80])
    elif name in _NUMBERS:
        _check_number(name, value)
    elif name == "cores":
        if type(value) is not int or not 0 <= value <= 100_000:
            raise ArgumentError(name, "a number of GPU cores", value)
    elif name == "verified":
        if type(value) is not bool:
            raise ArgumentError(name, "true or false", value)
    elif name == "samples":
        if not isinstance(value, list) or len(value) > 100_000:
            raise ArgumentError(name, "a list of times in seconds", value)
    else:
        raise ArgumentError("record", "only known fields", name)


def finite(name: str, value: object) -> float | None:
    """A number of a check; None where it is not finite, as of a kernel that gives NaN.

    Raises:
        ArgumentError: it is negative, or no number.
    """
    number = as_number(value)
    if value is not None and (number is None or number < 0):
        raise ArgumentError(name, "a number that is not negative, or None", value)
    return number if number is not None and math.isfinite(number) else None


def _check_number(name: str, value: object) -> None:
    if value is None:
        return
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not math.isfinite(value)
        or value < 0
    ):
        raise ArgumentError(name, "a finite number that is not negative", value)
