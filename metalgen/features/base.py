"""What a feature of attention declares, once, for everything that reads it.

A config is checked by its features' fields, a call by their inputs; devices bind and cut those
inputs, samples make them up, templates take the features' hooks. None of these knows a feature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import mlx.core as mx

from metalgen.errors import ArgumentError
from metalgen.features.arrays import Arrays, Shape, check_type
from metalgen.features.bounds import Bound
from metalgen.features.checks import Check
from metalgen.features.fields import Fields

if TYPE_CHECKING:
    from metalgen.features.sampler import Sampler


class Field(NamedTuple):
    """A field of a config.

    Args:
        name: of the field, and of the keys of what is stored.
        check: its canonical value. Fields are checked in the order of features, so it may rely on
            those before it.
        default: what means that the feature is not used.
        option: what the option of `metalgen.attention` is called that the field is taken from, or
            whose presence the field says; in errors about the options it stands for the name.
        counted: whether the chip model's counts hold with it.
    """

    name: str
    check: Check
    default: Any = None
    option: str = ""
    counted: bool = False


class Binder(NamedTuple):
    """How a device hands arrays to a kernel.

    Args:
        scores: ``(B, H, Lq, Lk)`` of the call.
        bq, bk: rows and keys of the kernel's tiles.
        rows: an array of rows (of Q, of keys, or of what belongs to keys) as kernels of the
            device's language take it.
        keys_owned: whether the kernel's rows are those of keys, `bq` of them in a tile.
    """

    scores: tuple[int, ...]
    bq: int
    bk: int
    rows: Callable[[mx.array], mx.array]
    keys_owned: bool = False


HALF_LOG2E = f"constexpr float HALF_LOG2E = {0.5 / math.log(2):.9e}f;"
HALF_UNIT = f"{2 / math.log(2):.9e}f"
"""What makes an exponent of 2 of half of a natural score."""
"""What turns natural scores into exponents of 2; declared once, however many features ask."""

Cut = Literal["whole", "entries", "heads", "scores", "keys"]
"""How an input is cut for a call in pieces: not at all; by its first axis, as batch entries or as
query heads, and of two axes as both; as ``(B, H, ...)``, each of which may be 1; as keys are."""
Binding = Literal["contiguous", "broadcast", "rows"]
"""How an input is bound: without gaps; broadcast to ``(B, H, Lq, Lk)``; as rows."""
Contents = Callable[[Any, Arrays], Iterable[tuple[Any, str]]]
"""``contents(values, arrays)``: which elements of a NumPy array are wrong, and what was expected.

In that, ``{name}`` stands for the array's, ``{index}`` and ``{before}`` for the place and the value
of the element before."""


class OptionalInput(NamedTuple):
    """An array that calls bring in addition to q, k and v.

    Args:
        name: of the field of `metalgen.problem.inputs.Inputs`, and in kernels.
        dtypes: types that kernels take; ``"config"`` is the config's.
        shape: what its shape must be.
        option: the option of `metalgen.attention` that it is, or the part of an argument, such as
            ``"k[1]"``: what errors about a call of that function name.
        convert: ``convert(option, value, config)``: an option's value in a type that kernels take.
            None: not an option by itself.
        sample: makes one up; None: it follows from the layout of the sequences.
        required: whether a config that uses the feature requires it; None: each does.
        contents: what it must contain.
        cut: how it is cut for a call in pieces.
        binding: how it is bound.
    """

    name: str
    dtypes: tuple[str, ...]
    shape: Shape
    option: str = ""
    convert: Callable[[str, Any, Any], mx.array | None] | None = None
    sample: Callable[[Sampler], mx.array] | None = None
    required: Callable[[Fields], bool] | None = None
    contents: Contents | None = None
    cut: Cut = "whole"
    binding: Binding = "contiguous"

    def check(self, array: mx.array, name: str, arrays: Arrays) -> None:
        """Whether an array has the type and the shape; raises `ArgumentError` that names `name`."""
        allowed = [arrays.config.dtype if d == "config" else d for d in self.dtypes]
        check_type(name, array, allowed)
        if (expected := self.shape(array, arrays)) is not None:
            raise ArgumentError(f"{name}.shape", expected, array.shape)


SumBy = Literal["query", "key", "pair"]


class Summed(NamedTuple):
    """The gradient of an input, summed by a kernel from dY, the gradient of changed scores.

    Args:
        array: name of the input, as `metalgen.reference.gradients_float64` has it.
        by: what there is a sum for: each ``"query"``, each ``"key"``, each of every head, or each
            element of the input, to which pairs of both (``"pair"``) add.
        add: which of the adds of `Hooks` has the derivative of scores in it; empty: the functions.
        node: of the score function's graph, the load whose elements these are.
    """

    array: str
    by: SumBy
    add: str = ""
    node: int = -1


class Site(NamedTuple):
    """Where a feature's code stands in a kernel.

    Args:
        language: what user functions are printed in.
        bk: keys of a pass.
        head_rows: whether rows of several heads share a group.
        share: keys of a share of the keys that is the same whatever else is in the call; None where
            shares depend on the number of keys, or there are none.
        keys_owned: whether rows of keys are owned, and queries passed over.
        backward: whether the kernel computes gradients.
        summed: of which input it sums the gradient; None: of none.
    """

    language: Any
    bk: int
    head_rows: bool = False
    share: int | None = None
    keys_owned: bool = False
    backward: bool = False
    summed: Summed | None = None


_NONE: Mapping[str, Any] = MappingProxyType({})


class Macros(NamedTuple):
    """The macros of ``templates/features/NAME.jinja``, rendered with these variables."""

    file: str
    variables: Mapping[str, Any] = _NONE


class Hooks(NamedTuple):
    """What a feature puts into a kernel; `templates/families/forward.jinja` says where each stands.

    At a hook stand `Macros`, or any object whose functions return what those macros would.

    Args:
        places: which sequence a group's rows belong to, and how many queries and keys that has.
        pages: how keys are found where they do not follow each other, by at most one feature.
        lists: which passes a group makes, where not all.
        maps: what a raw score becomes.
        adds: what is added to it, by the name of what rows keep for that.
        bounds: masks that are intervals.
        masks: others; whether a key is seen.
        probabilities: what a probability becomes.
        outputs: what a row's sum takes in at the end, by the same.
        functions: printed functions of users.
        constants: integers of the kernel, by name.
        lines: declarations at its beginning.
        header: files of functions in the language's header.
        variables: what templates substitute in addition.
    """

    places: Sequence[Any] = ()
    pages: Any = None
    lists: Sequence[Any] = ()
    maps: Sequence[Any] = ()
    adds: Mapping[str, Any] = _NONE
    bounds: Sequence[Bound] = ()
    masks: Sequence[Any] = ()
    probabilities: Sequence[Any] = ()
    outputs: Mapping[str, Any] = _NONE
    functions: Sequence[Any] = ()
    constants: Mapping[str, int] = _NONE
    lines: Sequence[str] = ()
    header: Sequence[str] = ()
    variables: Mapping[str, Any] = _NONE


def unused(**variables: Any) -> Mapping[str, Any]:
    """What templates substitute where a feature is not used."""
    return MappingProxyType(variables)


class Feature:
    """One thing that attention may do. A subclass declares it; its one instance is registered.

    Attributes:
        name: unique.
        fields: of the config, which uses the feature where one of them is not at its default.
        used_by: fields of other features that use it, too.
        inputs: that calls bring where the feature is used, in the order of kernels' inputs.
        variables: what templates substitute where the feature is not used.
        rank: where its words stand in a config's short name; features of one rank in their order.
        captures: whether calls bring something else for it than the inputs that it declares.
        adds: whether it adds to scores, so that a softcap does not bound them.
        numbered: whether its results depend on the numbers of batch entries and heads, so that a
            call cannot be cut into pieces that each count from 0.
        one_head: whether the rows of a threadgroup must be those of one head.
        has_backward: whether backward kernels have all of its hooks; else gradients of configs
            that use it are computed in plain MLX.
        freezes_keys: whether keys and values are a cache, of which kernels make no gradients.
    """

    name: ClassVar[str]
    fields: ClassVar[tuple[Field, ...]] = ()
    used_by: ClassVar[tuple[str, ...]] = ()
    inputs: ClassVar[tuple[OptionalInput, ...]] = ()
    variables: ClassVar[Mapping[str, Any]] = unused()
    rank: ClassVar[int] = 0
    captures: ClassVar[bool] = False
    adds: ClassVar[bool] = False
    numbered: ClassVar[bool] = False
    one_head: ClassVar[bool] = False
    has_backward: ClassVar[bool] = False
    freezes_keys: ClassVar[bool] = False

    def excludes(self, config: Fields) -> Mapping[str, str]:
        """Fields that must be at their defaults, each with what an error says was expected."""
        return {}

    def check(self, config: Fields) -> None:
        """Whether fields of a config that uses it go together; raises `ArgumentError`."""

    def words(self, config: Fields) -> Iterable[str]:
        """What a config's short name says of it: its name where nothing else is said."""
        return (self.name,)

    def required(self, config: Fields) -> list[OptionalInput]:
        """The inputs that calls of a config which uses it bring."""
        return [each for each in self.inputs if each.required is None or each.required(config)]

    def kernel_inputs(self, config: Fields) -> list[str]:
        """Names of its inputs in kernels, in the order in which `bind` returns them."""
        return [each.name for each in self.required(config)]

    def launch_inputs(self, config: Fields) -> list[str]:
        """Names of inputs that each dispatch of a call brings, behind all others."""
        return []

    def bind(self, config: Fields, inputs: Any, binder: Binder) -> list[mx.array]:
        """Its inputs of a call as kernels take them."""
        bound = []
        for each in self.required(config):
            array = inputs.get(each.name)
            if each.binding == "broadcast":
                bound.append(mx.broadcast_to(array, binder.scores))
            elif each.binding == "rows":
                bound.append(binder.rows(array))
            else:
                bound.append(mx.contiguous(array))
        return bound

    def sums(self, config: Fields, inputs: Any) -> list[Summed]:
        """What kernels sum so that a call's inputs get their gradients."""
        return []

    def check_captured(self, arrays: Arrays) -> None:
        """Whether what it captures fits a call, used or not; raises `ArgumentError`."""

    def empty_lse(self, inputs: Any) -> mx.array | None:
        """The log-sum-exp of rows that see no key, broadcast to ``(B, H, Lq)``; None: -inf."""
        return None

    def sample(self, sampler: Sampler) -> dict[str, Any]:
        """Made-up inputs, by name."""
        return {
            each.name: sampler.layout[each.name] if each.sample is None else each.sample(sampler)
            for each in self.required(sampler.config)
        }

    def hooks(self, config: Fields, site: Site) -> Hooks:
        """What it puts into a kernel of a config that uses it."""
        return Hooks()
