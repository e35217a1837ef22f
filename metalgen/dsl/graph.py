"""Typed expression graphs: the canonical form of a score or mask function.

A graph is what a config holds, as text. Two functions that compute the same by the same operations
have the same text, whatever they are called and whatever their captured arrays contain.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from metalgen.dsl.operations import (
    ARITY,
    BITWISE,
    COMMUTATIVE,
    COMPARISONS,
    EVALUATE,
    LOGICAL,
    OF_FLOATS,
)
from metalgen.errors import ArgumentError

DTYPES = {
    "bool": 1,
    **{f"{sign}int{bits}": bits // 8 for sign in ("", "u") for bits in (8, 16, 32, 64)},
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
}
"""Types of values and of captured arrays, with their bytes."""
FLOATS = ("float16", "bfloat16", "float32")

INPUTS = {"score": "float32", "b": "int32", "h": "int32", "q": "int32", "kv": "int32"}
"""Scaled score, batch entry, query head, query index, key index; a mask has all but the first."""

NOT_OF = {"negative": ("bool",), **dict.fromkeys(BITWISE, FLOATS)}
"""Types that an operation of any other type has no meaning for."""

MAX_ARRAYS = 16
"""Captured arrays of a config: Metal binds 31 buffers, of which Q, K, V and the rest take 15."""
MAX_NODES = 1000
MAX_ARRAY_ELEMENTS = (1 << 31) - 1


@dataclass(frozen=True)
class Captured:
    """Type and shape of a captured array; its contents may change from call to call."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Node:
    """One value: an input, a constant, a load from a captured array, or an operation.

    Args:
        op: a name of `INPUTS`, ``"const"``, ``"load"`` or a name of `operations.ARITY`.
        dtype: type of the value.
        args: numbers of the nodes that it is computed from; of a load its index of each axis.
        value: of a constant.
        array: number of the array that is loaded from.
    """

    op: str
    dtype: str
    args: tuple[int, ...] = ()
    value: bool | int | float | None = None
    array: int | None = None


@dataclass(frozen=True)
class Graph:
    """A function of scalars: nodes in an order that computes each before it is used.

    The last node is the result. Loads count a negative index from the end, once, as MLX does; one
    that still lies outside reads the nearest element (MLX leaves that undefined).
    """

    arrays: tuple[Captured, ...]
    nodes: tuple[Node, ...]

    @functools.cached_property
    def text(self) -> str:
        """Canonical text, from which `parse` makes the graph again."""
        parts = [f"a{n}={a.dtype}{list(a.shape)}" for n, a in enumerate(self.arrays)]
        for n, node in enumerate(self.nodes):
            if node.op == "const":
                right = repr(node.value)
            else:
                source = f"a{node.array}" if node.op == "load" else ""
                right = ",".join([*([source] if source else []), *map(str, node.args)])
            parts.append(f"{n}={node.op}:{node.dtype}({right})")
        return ";".join(parts).replace(" ", "")

    @functools.cached_property
    def inputs(self) -> frozenset[str]:
        """Which of the inputs the result depends on."""
        return frozenset(node.op for node in self.nodes if node.op in INPUTS)

    @functools.cached_property
    def indexed(self) -> dict[str, int]:
        """Inputs that index captured arrays by themselves, with the fewest elements they index."""
        fewest: dict[str, int] = {}
        for node in self.nodes:
            if node.op != "load":
                continue
            for n, extent in zip(node.args, self.arrays[cast(int, node.array)].shape, strict=True):
                while self.nodes[n].op == "cast":
                    n = self.nodes[n].args[0]
                if (name := self.nodes[n].op) in INPUTS:
                    fewest[name] = min(extent, fewest.get(name, extent))
        return fewest

    @property
    def dtype(self) -> str:
        """Type of the result."""
        return self.nodes[-1].dtype

    @functools.cached_property
    def digest(self) -> str:
        """Eight hexadecimal digits for names."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:8]

    def __str__(self) -> str:
        return self.text

    def evaluate(self, xp: Any, inputs: dict[str, Any], arrays: Sequence[Any]) -> Any:
        """The function for arrays of inputs that broadcast together.

        Args:
            xp: `mlx.core` (types as the graph says; lazy, differentiable) or `numpy` (all floating
                point in float64, what kernels are checked against).
            inputs: arrays by the names of `INPUTS`.
            arrays: the captured arrays.
        """
        values: list[Any] = []
        for node in self.nodes:
            arguments = [values[n] for n in node.args]
            if node.op in INPUTS:
                value = inputs[node.op]
            elif node.op == "const":
                value = xp.array(node.value, dtype=_type(xp, node.dtype))
            elif node.op == "load":
                value = _load(xp, arrays[cast(int, node.array)], arguments)
            elif node.op == "cast":
                value = arguments[0].astype(_type(xp, node.dtype))
            else:
                value = EVALUATE[node.op](xp, *arguments)
                if value.dtype != _type(xp, node.dtype):
                    value = value.astype(_type(xp, node.dtype))
            values.append(value)
        return values[-1]


def _type(xp: Any, dtype: str) -> Any:
    if xp.__name__ == "numpy":
        return xp.float64 if dtype in FLOATS else getattr(xp, "bool_" if dtype == "bool" else dtype)
    return getattr(xp, "bool_" if dtype == "bool" else dtype)


def load_place(xp: Any, shape: Sequence[int], indices: list[Any]) -> Any:
    """The number of the element of an array of a shape that indices load, counted row by row."""
    place: Any = 0
    for size, index in zip(shape, indices, strict=True):
        index = index.astype(xp.int64)
        index = xp.clip(xp.where(index < 0, index + size, index), 0, size - 1)
        place = place * size + index
    return place


def _load(xp: Any, array: Any, indices: list[Any]) -> Any:
    place = load_place(xp, array.shape, indices)
    flat = array.reshape(-1)
    if xp.__name__ == "numpy" and "float" in str(array.dtype):
        flat = flat.astype(xp.float64)
    return flat[place] if indices else flat[0]


class Builder:
    """Collects nodes: each is there once, constants are folded, unneeded ones are left out."""

    def __init__(self) -> None:
        self.arrays: list[Captured] = []
        self.nodes: list[Node] = []
        self._known: dict[Node, int] = {}
        self._digests: list[bytes] = []

    def add(self, node: Node) -> int:
        """The number of a node, or of one that computes the same."""
        node = self._folded(node)
        same = self._simpler(node)
        if same is not None:
            return same
        if node.op in COMMUTATIVE:
            ordered = sorted(node.args, key=lambda n: self._digests[n])
            node = Node(node.op, node.dtype, tuple(ordered))
        # repr keeps 0.0 from -0.0, and True from 1, which compare as equal.
        key = Node(node.op, node.dtype, node.args, cast(Any, repr(node.value)), node.array)
        if key not in self._known:
            self._known[key] = len(self.nodes)
            self.nodes.append(node)
            self._digests.append(self._digest(node))
        return self._known[key]

    def constant(self, value: bool | int | float, dtype: str) -> int:
        return self.add(Node("const", dtype, value=value))

    def graph(self, result: int) -> tuple[Graph, list[int]]:
        """The graph of a result, and which of the arrays, in the graph's order, it needs."""
        order: dict[int, int] = {}
        arrays: dict[int, int] = {}
        nodes: list[Node] = []

        stack = [(result, False)]
        while stack:
            n, ready = stack.pop()
            node = self.nodes[n]
            if n in order:
                continue
            if not ready:
                stack.append((n, True))
                stack.extend((arg, False) for arg in reversed(node.args))
                continue
            if node.array is not None:
                arrays.setdefault(node.array, len(arrays))
            order[n] = len(nodes)
            nodes.append(
                Node(
                    node.op,
                    node.dtype,
                    tuple(order[arg] for arg in node.args),
                    node.value,
                    None if node.array is None else arrays[node.array],
                )
            )
        kept = tuple(self.arrays[n] for n in arrays)
        return Graph(kept, tuple(nodes)), list(arrays)

    def _digest(self, node: Node) -> bytes:
        array = None if node.array is None else self.arrays[node.array]
        text = f"{node.op} {node.dtype} {node.value!r} {array}".encode()
        parts = [text, *(self._digests[n] for n in node.args)]
        return hashlib.sha256(b"".join(parts)).digest()

    def _folded(self, node: Node) -> Node:
        arguments = [self.nodes[n] for n in node.args]
        if node.op not in ARITY or any(each.op != "const" for each in arguments):
            return node
        import mlx.core as mx

        # By MLX itself, whose rounding is the one that users know; scalars on the CPU.
        with mx.stream(mx.cpu):
            values = [mx.array(cast(Any, each.value), _type(mx, each.dtype)) for each in arguments]
            if node.op == "cast":
                value = values[0].astype(_type(mx, node.dtype))
            else:
                value = EVALUATE[node.op](mx, *values).astype(_type(mx, node.dtype))
            return Node("const", node.dtype, value=cast(Any, value.item()))

    def _simpler(self, node: Node) -> int | None:
        """The number of a node that has the very same value, for any argument."""
        arguments = [self.nodes[n] for n in node.args]
        values = [each.value if each.op == "const" else None for each in arguments]
        if node.op == "cast" and arguments[0].dtype == node.dtype:
            return node.args[0]
        if node.op == "select" and values[0] is not None:
            return node.args[1] if values[0] else node.args[2]
        if node.op == "select" and node.args[1] == node.args[2]:
            return node.args[1]
        if node.op in ("multiply", "divide") and values[1] == 1:
            return node.args[0]
        if node.op == "multiply" and values[0] == 1:
            return node.args[1]
        if node.op == "logical_not" and arguments[0].op == "logical_not":
            return arguments[0].args[0]
        if node.op in ("logical_and", "logical_or", "bitwise_and", "bitwise_or"):
            if node.args[0] == node.args[1]:
                return node.args[0]
            if node.dtype == "bool":
                for mine, other in ((0, 1), (1, 0)):
                    if values[mine] is not None:
                        neutral = bool(values[mine]) == node.op.endswith("and")
                        return node.args[other] if neutral else node.args[mine]
        return None


_ARRAY = re.compile(r"a(\d{1,9})=(\w+)\[((?:\d{1,10}(?:,\d{1,10})*)?)\]")
_NODE = re.compile(r"(\d{1,9})=(\w+):(\w+)\(([^()]*)\)")


@functools.lru_cache(maxsize=1024)
def parse(text: str) -> Graph:
    """The graph of a text as `Graph.text` writes it; nothing in it is executed.

    Raises:
        ArgumentError: the text is no such thing, with the first part that is wrong.
    """

    def require(holds: bool, part: object) -> None:
        if not holds:
            raise ArgumentError("function", "the text of a graph as metalgen writes it", part)

    require(isinstance(text, str) and len(text) <= 60 * MAX_NODES, str(text)[:80])
    arrays: list[Captured] = []
    nodes: list[Node] = []
    for part in text.split(";"):
        if match := _ARRAY.fullmatch(part):
            number, dtype, shape = match.groups()
            require(not nodes and int(number) == len(arrays) and dtype in DTYPES, part)
            captured = Captured(dtype, tuple(int(n) for n in shape.split(",") if n))
            require(0 < math.prod(captured.shape) <= MAX_ARRAY_ELEMENTS, part)
            arrays.append(captured)
            continue
        match = _NODE.fullmatch(part)
        require(match is not None, part)
        number, op, dtype, inside = cast(re.Match[str], match).groups()
        require(int(number) == len(nodes) and dtype in DTYPES, part)
        try:
            node = _node(op, dtype, inside)
        except (KeyError, ValueError):
            node = None
        require(node is not None, part)
        node = cast(Node, node)
        require(all(0 <= n < len(nodes) for n in node.args), part)
        require(_typed(node, arrays, nodes), part)
        nodes.append(node)
    require(0 < len(nodes) <= MAX_NODES and len(arrays) <= MAX_ARRAYS, text[:80])
    return Graph(tuple(arrays), tuple(nodes))


def check_function(name: str, text: object) -> Graph:
    """The graph of a config's ``score_mod`` or ``mask_mod``, given as text.

    Raises:
        ArgumentError: it is not text, not a graph, or not of the inputs and result of its kind.
    """
    if not isinstance(text, str):
        expected = f"None or the text of a graph; functions go to metalgen.flex_attention({name}=)"
        raise ArgumentError(name, expected, text)
    try:
        graph = parse(text)
    except ArgumentError as error:
        raise ArgumentError(name, error.expected, error.got) from None
    if name == "score_mod" and graph.dtype != "float32":
        raise ArgumentError(name, "a graph with a float32 result", graph.dtype)
    if name == "mask_mod" and (graph.dtype != "bool" or "score" in graph.inputs):
        raise ArgumentError(name, "a graph with a bool result, which reads no score", text[:80])
    return graph


def _node(op: str, dtype: str, inside: str) -> Node:
    if op == "const":
        if dtype == "bool":
            return Node(op, dtype, value={"True": True, "False": False}[inside])
        return Node(op, dtype, value=float(inside) if dtype in FLOATS else int(inside))
    words = [word for word in inside.split(",") if word]
    array = None
    if op == "load":
        first, *words = words or [""]
        array = int(first.removeprefix("a"))
    return Node(op, dtype, tuple(map(int, words)), array=array)


def _typed(node: Node, arrays: list[Captured], nodes: list[Node]) -> bool:
    """Whether the types and numbers of arguments are what an operation takes."""
    types = [nodes[n].dtype for n in node.args]
    if node.op in INPUTS:
        return not types and node.dtype == INPUTS[node.op]
    if node.op == "const":
        return node.dtype in FLOATS or _in_range(int(node.value or 0), node.dtype)
    if node.op == "load":
        number = cast(int, node.array)
        return (
            0 <= number < len(arrays)
            and len(types) == len(arrays[number].shape)
            and node.dtype == arrays[number].dtype
            and all("int" in each for each in types)
        )
    if node.op not in ARITY or len(types) != ARITY[node.op]:
        return False
    if node.op == "cast":
        return True
    if node.op == "select":
        return types[0] == "bool" and types[1] == types[2] == node.dtype
    if len(set(types)) > 1:
        return False
    if node.op in LOGICAL:
        return node.dtype == types[0] == "bool"
    if node.op in COMPARISONS:
        return node.dtype == "bool"
    if types[0] != node.dtype:
        return False
    if node.op in OF_FLOATS:
        return node.dtype in FLOATS
    return node.dtype not in NOT_OF.get(node.op, ())


def _in_range(value: int, dtype: str) -> bool:
    bits = 8 * DTYPES[dtype]
    low, high = (0, 1 << bits) if dtype[0] in "bu" else (-1 << (bits - 1), 1 << (bits - 1))
    return low <= value < high
