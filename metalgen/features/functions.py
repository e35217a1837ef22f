"""Score and mask functions of users, as graphs that `metalgen.dsl` traces."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx

from metalgen.errors import ArgumentError
from metalgen.features.arrays import Arrays, per_head, per_sequence
from metalgen.features.base import (
    HALF_UNIT,
    Binder,
    Feature,
    Field,
    Hooks,
    Site,
    SumBy,
    Summed,
    unused,
)
from metalgen.features.fields import Fields

if TYPE_CHECKING:
    from metalgen.dsl.graph import Graph
    from metalgen.features.sampler import Sampler

LN2 = math.log(2)


class Function(NamedTuple):
    """A printed function; ``role`` is ``"score"``, ``"mask"``, ``"slope"``, the derivative of the
    score function in the score or in what a node loads, or ``"place"``, which element that is."""

    role: str
    group: tuple[str, ...]
    row: tuple[str, ...]
    element: tuple[str, ...]
    result: str


def graphs(config: Fields) -> dict[str, Graph]:
    """The graphs of a config's score and mask functions, by role."""
    from metalgen.dsl.graph import parse

    texts = {"score": config.score_mod, "mask": config.mask_mod}
    return {role: parse(text) for role, text in texts.items() if text is not None}


def _graph(name: str, value: Any, config: Fields) -> str | None:
    if value is None:
        return None
    from metalgen.dsl.graph import check_function

    return check_function(name, value).text


class Functions(Feature):
    """``score_mod`` takes the place of a softcap; ``mask_mod`` is one more mask."""

    name = "functions"
    has_backward = True
    fields = (
        Field("score_mod", _graph, counted=True),
        Field("mask_mod", _graph, counted=True),
    )
    variables = unused(whole="")
    captures = True
    numbered = True

    def excludes(self, config: Fields) -> Mapping[str, str]:
        if config.score_mod is None:
            return {}
        return {"softcap": "None with a score_mod; write C * mx.tanh(score / C) there"}

    def check(self, config: Fields) -> None:
        from metalgen.dsl.graph import MAX_ARRAYS

        arrays = sum(len(graph.arrays) for graph in graphs(config).values())
        if arrays > MAX_ARRAYS:
            expected = f"at most {MAX_ARRAYS} captured arrays of score_mod and mask_mod together"
            raise ArgumentError("mask_mod", expected, arrays)

    def words(self, config: Fields) -> Iterable[str]:
        for role, graph in graphs(config).items():
            yield f"{role}_mod:{graph.digest}"

    def kernel_inputs(self, config: Fields) -> list[str]:
        from metalgen.dsl.printer import array_names

        return [n for role, graph in graphs(config).items() for n in array_names(graph, role)]

    def bind(self, config: Fields, inputs: Any, binder: Binder) -> list[mx.array]:
        return [mx.contiguous(array) for array in (*inputs.score, *inputs.mask)]

    def check_captured(self, arrays: Arrays) -> None:
        config, inputs = arrays.config, arrays.inputs
        if config.score_mod is config.mask_mod is None and inputs.score == inputs.mask == ():
            return
        expected = graphs(config)
        for role in ("score", "mask"):
            given = getattr(inputs, role)
            graph = expected.get(role)
            check_arrays(f"{role}_mod", given, graph)
            if graph is not None:
                _check_indexed(f"{role}_mod", graph.indexed, arrays)

    def sums(self, config: Fields, inputs: Any) -> list[Summed]:
        from metalgen.dsl.loads import float_loads, place_inputs

        graph = graphs(config).get("score")
        found: list[Summed] = []
        for load in () if graph is None else float_loads(graph):
            assert graph is not None
            of = place_inputs(graph, load)
            by: SumBy = "key" if "kv" in of else "query"
            if {"q", "kv"} <= of or "score" in of:
                by = "pair"
            found.append(Summed(f"score[{graph.nodes[load].array}]", by, node=load))
        return found

    def sample(self, sampler: Sampler) -> dict[str, Any]:
        return sampler.functions()

    def hooks(self, config: Fields, site: Site) -> Hooks:
        lines, variables = [], dict[str, Any]()
        if config.score_mod is not None:  # its scores are natural ones
            lines.append(f"const float score_scale = scale2 * {LN2:.9e}f;")
            variables |= {"natural": True, "unit": HALF_UNIT, "base_unit": "1.0f"}
        if config.mask_mod is not None:
            variables["whole"] = " && unmasked" if config.block_mask else " && false"
        return Hooks(functions=_printed(config, site), lines=lines, variables=variables)


def check_arrays(name: str, arrays: Any, graph: Graph | None) -> None:
    """Whether these are the arrays that a function captures; raises `ArgumentError`."""
    if not isinstance(arrays, tuple) or not all(isinstance(a, mx.array) for a in arrays):
        raise ArgumentError(name, "a tuple of captured arrays", type(arrays).__name__)
    expected = () if graph is None else graph.arrays
    found = [(str(a.dtype).removeprefix("mlx.core.").rstrip("_"), a.shape) for a in arrays]
    if found != [(a.dtype, a.shape) for a in expected]:
        wanted = ", ".join(f"{a.dtype}{list(a.shape)}" for a in expected) or "none"
        raise ArgumentError(name, f"these captured arrays: {wanted}", found)


def _check_indexed(name: str, indexed: dict[str, int], arrays: Arrays) -> None:
    """Whether captured arrays have an element for each sequence and head that indexes them.

    Where the index is computed, nothing is known of it, and one outside reads the nearest element.
    """
    for index, count, what in (
        ("b", per_sequence(arrays), "sequences"),
        ("h", per_head(arrays), "query heads"),
    ):
        fewest = indexed.get(index, count)
        if fewest < count:
            wanted = f"captured arrays with {count} elements, for {count} {what}, where {index} is"
            raise ArgumentError(name, f"{wanted} the index", fewest)


def _printed(config: Fields, site: Site) -> list[Function]:
    from metalgen.dsl.derivative import of_loads, slope
    from metalgen.dsl.printer import array_names, print_graph, print_place

    names = {"score": "score", "b": "batch", "h": "head", "q": "q_idx", "kv": "kv_idx"}
    if site.head_rows:
        names["h"] = "q_head"
    if config.varlen:
        names["b"] = "sequence"
    rows = ("h", "q") if site.head_rows else ("kv",) if site.keys_owned else ("q",)

    def printed(role: str, graph: Graph, arrays: Sequence[str]) -> Function:
        lines = print_graph(graph, site.language, role, names, rows, arrays)
        return Function(role, lines.group, lines.row, lines.element, lines.result)

    found = []
    for role, graph in graphs(config).items():
        own = array_names(graph, role)
        found.append(printed(role, graph, own))
        if role == "score" and site.backward:
            load = -1 if site.summed is None else site.summed.node
            derivative = slope(graph) if load < 0 else of_loads(graph)[load]
            found.append(printed("slope", derivative.graph, [own[n] for n in derivative.arrays]))
            if load >= 0:
                place = print_place(graph, load, site.language, "place", names, rows, own)
                found.append(Function("place", place.group, place.row, place.element, place.result))
    return found
