"""Features of attention, one module each, and the registry of them.

Their order is that of the inputs of kernels and of what hooks hold. A feature from outside is
registered behind them; its fields' values are kept in `Fields.others`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from metalgen.features.alibi import Alibi, AlibiBySequence
from metalgen.features.array_mask import ArrayMask
from metalgen.features.base import Feature, Field, OptionalInput
from metalgen.features.bias import Bias
from metalgen.features.block_mask import Blocks
from metalgen.features.deterministic import Deterministic
from metalgen.features.dropout import Dropout
from metalgen.features.fields import Fields
from metalgen.features.functions import Functions
from metalgen.features.lengths import Lengths
from metalgen.features.lse import LogSumExp
from metalgen.features.max_work import MaxWork
from metalgen.features.offset import Offset
from metalgen.features.pages import Pages
from metalgen.features.quantized import Quantized
from metalgen.features.rotary import Rotary
from metalgen.features.sinks import Sinks
from metalgen.features.softcap import Softcap
from metalgen.features.starts import Starts
from metalgen.features.tf32 import Tf32
from metalgen.features.used import Used
from metalgen.features.varlen import Varlen
from metalgen.features.window import Window

__all__ = ["FEATURES", "FIELDS", "INPUTS", "OTHERS", "register", "unregister", "used"]

FEATURES: dict[str, Feature] = {}
"""All features, by name, in order."""
FIELDS: dict[str, Field] = {}
"""The fields that features declare, by name."""
INPUTS: dict[str, OptionalInput] = {}
"""The inputs that features declare, by name."""
OTHERS: dict[str, Field] = {}
"""Those of `FIELDS` that `Fields` does not declare: of features from outside."""

_TRIGGERS: dict[str, frozenset[str]] = {}
"""Of each feature the fields that use it."""
_OWN = frozenset(each.name for each in dataclasses.fields(Fields))


def register(feature: Feature) -> None:
    """Make a feature known; its name, and those of its fields and inputs, must be new.

    Raises:
        ValueError: a name that is taken.
    """
    fields = {each.name: each for each in feature.fields}
    inputs = {each.name: each for each in feature.inputs}
    taken = {feature.name} & {*FEATURES} | {*fields} & {*FIELDS} | {*inputs} & {*INPUTS}
    if taken:
        raise ValueError(f"a feature has this name, field or input already: {', '.join(taken)}")
    FEATURES[feature.name] = feature
    _TRIGGERS[feature.name] = frozenset((*fields, *feature.used_by))
    FIELDS.update(fields)
    INPUTS.update(inputs)
    OTHERS.update({name: each for name, each in fields.items() if name not in _OWN})


def used(fields: Collection[str]) -> tuple[Feature, ...]:
    """The features that a config uses of which these fields are not at their defaults."""
    return tuple(
        feature for name, feature in FEATURES.items() if not _TRIGGERS[name].isdisjoint(fields)
    )


def unregister(name: str) -> None:
    """Forget a feature."""
    feature = FEATURES.pop(name)
    del _TRIGGERS[name]
    for each in feature.fields:
        del FIELDS[each.name]
        OTHERS.pop(each.name, None)
    for given in feature.inputs:
        del INPUTS[given.name]


for _feature in (
    Window(),
    Softcap(),
    Blocks(),
    Functions(),
    Varlen(),
    Lengths(),
    Starts(),
    Used(),
    Offset(),
    Pages(),
    Quantized(),
    Rotary(),
    Alibi(),
    AlibiBySequence(),
    Bias(),
    ArrayMask(),
    Sinks(),
    Dropout(),
    MaxWork(),
    Deterministic(),
    Tf32(),
    LogSumExp(),
):
    register(_feature)
