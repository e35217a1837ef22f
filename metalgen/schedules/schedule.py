"""How to run an attention: values of the knobs that a family has with a matrix kind.

A schedule is typed by its family and its kind: a knob that means nothing there is no attribute of
it. The types are made from declarations (`metalgen.schedules.knob.Knob`) and registered by
`metalgen.families`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from metalgen.errors import ArgumentError
from metalgen.schedules.knob import Knob

SIMD_WIDTH = 32
"""Threads per simdgroup, on Apple GPUs and NVIDIA GPUs alike."""


class _Typed(type):
    """Makes ``Schedule(..., family=, kind=)`` an instance of the type of that pair."""

    def __call__(cls, **values: Any) -> Any:
        if cls is not Schedule:
            return super().__call__(**values)
        family, kind = values.pop("family", "forward"), values.pop("kind", "simdgroup")
        return schedule_type(family, values.pop("language", kind))(**values)


class Schedule(metaclass=_Typed):
    """The values of all knobs of a family with a kind; keyword arguments only.

    ``Schedule(bq=64, bk=32, bd=64, simdgroups=4, row_blocks=2)`` is a forward schedule for
    simdgroup matrices; ``family="decode"`` and ``kind="mma"`` name others. Families without matrix
    products have a language instead of a kind. Values are checked against a config by
    `metalgen.families.check_schedule`, not here.

    Attributes:
        family, kind, language: what it is a schedule of; the kind is empty where there is none.
        knobs: the declarations of its attributes, by name, in the order in which a search
            enumerates them.
        required_kind: whether stored keys state the kind: they leave out the first of a language.
        own, traversed: names of the operands whose rows a threadgroup owns, and of those that it
            passes over.
        together: whether the rows of a pass are fetched together, of all operands.
        copying_simdgroups: simdgroups of a threadgroup that copy for the others.
    """

    family: ClassVar[str]
    kind: ClassVar[str]
    language: ClassVar[str]
    knobs: ClassVar[dict[str, Knob]] = {}
    required_kind: ClassVar[bool] = False
    own: ClassVar[tuple[str, ...]] = ()
    traversed: ClassVar[tuple[str, ...]] = ()
    together: ClassVar[bool] = False
    copying_simdgroups: ClassVar[int] = 0
    words: ClassVar[Callable[[Any], list[str]]]

    if TYPE_CHECKING:  # what the types made by `define_schedule` have
        __dataclass_fields__: ClassVar[dict[str, Any]]

        def __init__(self, **values: Any) -> None: ...

        def __getattr__(self, name: str) -> Any: ...

        bq: int
        bk: int
        simdgroups: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) not in (int, str):  # an integer of another library, say
                plain = self.knobs[name].canonical(value)
                object.__setattr__(self, name, plain)

    @property
    def threads(self) -> int:
        """Threads per threadgroup."""
        return (self.simdgroups + self.copying_simdgroups) * SIMD_WIDTH

    @functools.cached_property
    def partials(self) -> int:
        """Outputs of each row that a combine step merges; 1: there is no such step."""
        found = (getattr(self, name, 1) for name in ("splits", "key_simdgroups"))
        return next(found) * next(found)

    @functools.cached_property
    def key(self) -> str:
        """Canonical JSON: the required knobs, and others where they differ from their defaults."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    def to_dict(self) -> dict[str, Any]:
        """The required knobs, others that differ from their defaults, and a kind if stated."""
        found = {
            name: getattr(self, name)
            for name, knob in self.knobs.items()
            if knob.is_required or getattr(self, name) != knob.default
        }
        return found | ({"kind": self.kind} if self.required_kind else {})

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Schedule:
        """The schedule of this type that a dictionary states; its values are typed and in range.

        Raises:
            ArgumentError: not a dictionary, an unknown or missing knob, or a value outside of the
                declared choices.
        """
        if not isinstance(fields, dict):
            raise ArgumentError("schedule", "an object of fields", fields)
        for name, value in fields.items():
            if name not in cls.knobs:
                raise ArgumentError("schedule", f"fields among {', '.join(cls.knobs)}", name)
            cls.knobs[name].check(cls.knobs[name].canonical(value))
        for name, knob in cls.knobs.items():
            if knob.is_required and name not in fields:
                raise ArgumentError("schedule", f"a field {name}", sorted(fields))
        return cls(**fields)

    def __str__(self) -> str:
        """A short name, such as ``64x32x64 sg4x2 q:reg k:tg v:tg buf1 w8``.

        The name of a kind that is not its language's first follows.
        """
        words = type(self).words(self)
        return " ".join([*words, self.kind] if self.required_kind else words)

    def __repr__(self) -> str:
        values = [f"{name}={value!r}" for name, value in self.to_dict().items() if name != "kind"]
        own = f"kind={self.kind!r}" if self.kind else f"language={self.language!r}"
        return f"Schedule({', '.join([*values, f'family={self.family!r}', own])})"

    def __reduce__(self) -> tuple[Any, ...]:
        values = {name: getattr(self, name) for name in self.knobs}
        return _unpickled, (self.family, self.kind or self.language, values)


def _unpickled(family: str, kind: str, values: dict[str, Any]) -> Schedule:
    return schedule_type(family, kind)(**values)


_types: dict[tuple[str, str], Callable[[], type[Schedule]]] = {}
"""What makes the types, by family and by kind or language; each is made when it is first asked for:
a process needs a few of them."""


def define_schedule(
    family: str,
    kind: str,
    knobs: tuple[Knob, ...],
    words: Callable[[Any], list[str]],
    *,
    language: str,
    required_kind: bool = False,
    operands: tuple[tuple[str, ...], tuple[str, ...], bool, bool] = ((), (), False, False),
    copying_simdgroups: int = 0,
) -> None:
    """Register the type of a family's schedules with a kind.

    Args:
        family, kind: names of both; an empty kind for a family without matrix products.
        knobs: in the order in which a search enumerates them.
        words: what ``str()`` of a schedule says.
        language: name of the language of its kernels.
        required_kind: whether stored keys state the kind.
        operands: names of those whose rows are owned, and of those that are passed over; whether
            the rows of a pass are fetched together, and whether a product contracts owned rows.
        copying_simdgroups: simdgroups of a threadgroup that copy for the others.
    """
    attributes = {
        "family": family,
        "kind": kind,
        "language": language,
        "knobs": {knob.name: knob for knob in knobs},
        "words": staticmethod(words),
        "required_kind": required_kind,
        "own": operands[0],
        "traversed": operands[1],
        "together": operands[2],
        "copying_simdgroups": copying_simdgroups,
        "adds": operands[3],
        "__module__": __name__,
    }
    name = f"{family.title()}{(kind or language).title()}Schedule"
    _types[family, kind or language] = functools.cache(
        functools.partial(_make_type, name, knobs, attributes)
    )


def _make_type(name: str, knobs: tuple[Knob, ...], attributes: dict[str, Any]) -> type[Schedule]:
    fields = [
        (k.name, type(k.choices[0]))
        if k.is_required
        else (k.name, type(k.choices[0]), dataclasses.field(default=k.default))
        for k in knobs
    ]
    options = {"frozen": True, "kw_only": True, "repr": False}
    return dataclasses.make_dataclass(
        name, fields, bases=(Schedule,), namespace=attributes, **options
    )


def forget_schedules(family: str, kind: str = "") -> None:
    """Take back the types of a family's schedules: all of them, or those with a kind."""
    for known, own in [*_types]:
        if known == family and own == (kind or own):
            del _types[known, own]


def schedule_type(family: str, kind: str) -> type[Schedule]:
    """The type of a family's schedules with a kind, or in a language where it has no kinds.

    Raises:
        ArgumentError: a pair that has no kernels.
    """
    try:
        return _types[family, kind]()
    except KeyError:
        known = ", ".join(f"{family} with {kind}" for family, kind in _types)
        got = f"{family} with {kind}"
        raise ArgumentError("schedule", f"a family and a kind among {known}", got) from None


def schedule_types() -> tuple[type[Schedule], ...]:
    """The types of all schedules: of each family with each kind, or in each language."""
    return tuple(made() for made in _types.values())


def all_knobs() -> dict[str, Knob]:
    """Every knob of schedules with a kind, by name; choices are those of all of them together."""
    found: dict[str, Knob] = {}
    for made in (made for made in schedule_types() if made.kind):
        for name, knob in made.knobs.items():
            known = found.setdefault(name, knob)
            if known.choices != knob.choices:
                choices = tuple(dict.fromkeys([*known.choices, *knob.choices]))
                found[name] = dataclasses.replace(known, choices=choices)
    return found


def kinds_of(family: str) -> list[str]:
    """Names of the kinds that a family has schedules with."""
    return [made.kind for made in schedule_types() if made.family == family and made.kind]
