"""Random legal Metal with its values: a grammar that writes a program and computes it at once.

Each expression is made as its text and, with NumPy, its value in every thread: C's promotions,
wrapping unsigned arithmetic, conversions, vectors, swizzles, lists in braces, and calls of template
functions. Values of signed and floating-point types are kept so small that nothing overflows and
every floating-point result is exact, whatever is contracted.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

THREADS = 64
SCALARS: dict[str, Any] = {
    "char": np.int8,
    "uchar": np.uint8,
    "short": np.int16,
    "ushort": np.uint16,
    "int": np.int32,
    "uint": np.uint32,
    "long": np.int64,
    "ulong": np.uint64,
    "float": np.float32,
    "half": np.float16,
}
UNSIGNED = ("uchar", "ushort", "uint", "ulong")
FLOATING = ("float", "half")
LIMIT = {"char": 60, "short": 200, "int": 1 << 14, "long": 1 << 20, "float": 1024, "half": 64}
HEAD = """#include <metal_stdlib>
using namespace metal;
template <typename T> inline T twice(T v) { return v + v; }
template <typename T, int N> inline T sum(vec<T, N> v) {
  T s = v[0];
  for (int i = 1; i < N; ++i) s += v[i];
  return s;
}
struct pair { float2 a; int b; thread float& at(int i) { b = i; return x[i]; } float x[2]; };
"""
Array = Any


@dataclass
class Value:
    """An expression: its text, its type's name, and its value in each thread (and element)."""

    text: str
    kind: str
    value: Array
    width: int = 1

    @property
    def type(self) -> str:
        return self.kind if self.width == 1 else f"{self.kind}{self.width}"


@dataclass
class Program:
    """Writes statements that declare and change variables; `x` is the input, one a thread."""

    seed: int
    inputs: Array  # of int32, from 0 to 255
    lines: list[str] = field(default_factory=list)
    variables: list[Value] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    # Expressions.

    def fits(self, value: Value) -> bool:
        limit = LIMIT.get(value.kind)
        return limit is None or bool(np.all(np.abs(value.value.astype(np.float64)) <= limit))

    def leaf(self, kind: str, width: int) -> Value:
        known = [v for v in self.variables if (v.kind, v.width) == (kind, width)]
        if known and self.random.random() < 0.7:
            return self.random.choice(known)
        dtype = SCALARS[kind]
        if width == 1:
            if self.random.random() < 0.4:
                mask = self.random.choice((1, 3, 7, 15, 31))
                value = (self.inputs & mask).astype(dtype)
                return Value(f"{kind}(x & {mask})", kind, value)
            number = self.random.randrange(0, 12)
            if kind in FLOATING:
                text = f"{number}.5{'h' if kind == 'half' else ''}"
                return Value(f"{kind}({text})", kind, np.full(THREADS, number + 0.5, dtype))
            return Value(f"{kind}({number})", kind, np.full(THREADS, number, dtype))
        parts = [self.leaf(kind, 1) for _ in range(width)]
        text = ", ".join(p.text for p in parts)
        value = np.stack([p.value for p in parts], axis=1)
        return Value(f"{kind}{width}({text})", kind, value, width)

    def expression(self, kind: str, width: int, depth: int = 3) -> Value:
        """An expression of a type, whose values are within the limits of the type."""
        if depth == 0:
            return self.leaf(kind, width)
        rules = [self.binary, self.binary, self.conversion, self.choice, self.function]
        if width > 1:
            rules += [self.swizzle, self.scalar_operand]
        elif kind in ("int", "uint", "float"):
            rules.append(self.reduction)
        with np.errstate(all="ignore"):
            made = self.random.choice(rules)(kind, width, depth - 1)
        return made if self.fits(made) else self.leaf(kind, width)

    def binary(self, kind: str, width: int, depth: int) -> Value:
        a, b = self.expression(kind, width, depth), self.expression(kind, width, depth)
        operations = ["+", "-", "*"] + ([] if kind in FLOATING else ["&", "|", "^"])
        sign = self.random.choice(operations)
        wide = SCALARS[kind]
        if width == 1 and kind in ("char", "uchar", "short", "ushort"):
            wide = np.int32  # they promote
            whole = OPERATIONS[sign](a.value.astype(np.int64), b.value.astype(np.int64))
            if bool(np.any(np.abs(whole) >= 1 << 31)):  # 65535 * 65535, which no language defines
                return self.leaf(kind, width)
        value = OPERATIONS[sign](a.value.astype(wide), b.value.astype(wide))
        text = f"({a.text} {sign} {b.text})"
        if wide is np.int32 and kind != "int":
            text = f"{kind}{text}"
        return Value(text, kind, value.astype(SCALARS[kind]), width)

    def conversion(self, kind: str, width: int, depth: int) -> Value:
        source = self.random.choice([k for k in SCALARS if k != kind])
        a = self.expression(source, width, depth)
        if kind in UNSIGNED and source in FLOATING and bool(np.any(a.value < 0)):
            return self.leaf(kind, width)  # which no language defines
        value = a.value.astype(SCALARS[kind])
        if kind in ("char", "uchar") and bool(np.any(np.abs(a.value.astype(np.float64)) > 127)):
            return self.leaf(kind, width)
        name = kind if width == 1 else f"{kind}{width}"
        cast = f"{name}({a.text})" if self.random.random() < 0.5 else f"({name})({a.text})"
        return Value(cast, kind, value, width)

    def choice(self, kind: str, width: int, depth: int) -> Value:
        left, right = self.expression("int", 1, depth), self.expression("int", 1, depth)
        a, b = self.expression(kind, width, depth), self.expression(kind, width, depth)
        sign = self.random.choice(("<", "<=", "==", "!="))
        taken = COMPARISONS[sign](left.value, right.value)
        if width > 1:
            taken = taken[:, None]
        value = np.where(taken, a.value, b.value)
        return Value(f"({left.text} {sign} {right.text} ? {a.text} : {b.text})", kind, value, width)

    def function(self, kind: str, width: int, depth: int) -> Value:
        a, b = self.expression(kind, width, depth), self.expression(kind, width, depth)
        if self.random.random() < 0.3 and (width > 1 or kind in ("int", "uint", "float", "half")):
            return Value(f"twice({a.text})", kind, (a.value + a.value).astype(a.value.dtype), width)
        name = self.random.choice(("min", "max"))
        value = getattr(np, f"{name}imum")(a.value, b.value)
        return Value(f"{name}({a.text}, {b.text})", kind, value, width)

    def swizzle(self, kind: str, width: int, depth: int) -> Value:
        source = self.random.choice((2, 3, 4))
        a = self.expression(kind, source, depth)
        places = [self.random.randrange(source) for _ in range(width)]
        text = f"({a.text})." + "".join("xyzw"[p] for p in places)
        return Value(text, kind, a.value[:, places], width)

    def scalar_operand(self, kind: str, width: int, depth: int) -> Value:
        a, b = self.expression(kind, width, depth), self.expression(kind, 1, depth)
        sign = self.random.choice(("+", "-", "*"))
        value = OPERATIONS[sign](a.value, b.value[:, None]).astype(a.value.dtype)
        return Value(f"({a.text} {sign} {b.text})", kind, value, width)

    def reduction(self, kind: str, width: int, depth: int) -> Value:
        a = self.expression(kind, self.random.choice((2, 3, 4)), depth)
        value = a.value.sum(axis=1, dtype=a.value.dtype)
        return Value(f"sum({a.text})", kind, value)

    # Statements.

    def declare(self) -> None:
        kind = self.random.choice(list(SCALARS))
        width = self.random.choice((1, 1, 2, 3, 4))
        made = self.expression(kind, width)
        name = f"v{len(self.variables)}"
        form = self.random.choice((f"{made.type} {name} = {made.text};", "")) or (
            f"{made.type} {name}; {{ {name} = {made.text}; }}"
        )
        self.lines.append(form)
        self.variables.append(Value(name, kind, made.value.copy(), width))

    def braces(self) -> None:
        kind, width = (
            self.random.choice(("int", "float", "half", "uint")),
            self.random.choice((2, 3, 4)),
        )
        given = [self.expression(kind, 1, 1) for _ in range(self.random.randrange(1, width + 1))]
        name = f"v{len(self.variables)}"
        text = ", ".join(g.text for g in given)
        value = np.zeros((THREADS, width), SCALARS[kind])
        for place, g in enumerate(given):
            value[:, place] = g.value
        self.lines.append(f"{kind}{width} {name} = {{{text}}};")
        self.variables.append(Value(name, kind, value, width))

    def change(self) -> None:
        if not self.variables:
            return
        target = self.random.choice(self.variables)
        made = self.expression(target.kind, target.width, 2)
        turns = self.random.randrange(1, 4)
        value = target.value
        for _ in range(turns):
            value = (value + made.value).astype(value.dtype)
        if made.text.find(target.text) >= 0 or not self.fits(Value("", target.kind, value)):
            return
        loop = f"for (int j = 0; j < {turns}; ++j) "
        self.lines.append(f"{loop}{target.text} += {made.text};")
        target.value = value

    def write(self, statements: int) -> None:
        """Make so many statements."""
        for _ in range(statements):
            self.random.choice((self.declare, self.declare, self.braces, self.change))()


OPERATIONS: dict[str, Callable[[Array, Array], Array]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "&": lambda a, b: a & b,
    "|": lambda a, b: a | b,
    "^": lambda a, b: a ^ b,
}
COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
}


def kernel(programs: list[Program]) -> tuple[str, Array]:
    """A kernel `k` that runs the programs, and what each thread must write, a float a variable."""
    count = sum(v.width for p in programs for v in p.variables)
    body, expected, at = [], [], 0
    for program in programs:
        body.append("  {")
        body += [f"    {line}" for line in program.lines]
        for v in program.variables:
            for place in range(v.width):
                element = v.text if v.width == 1 else f"{v.text}[{place}]"
                body.append(f"    y[i * {count} + {at}] = float({element});")
                column = v.value if v.width == 1 else v.value[:, place]
                expected.append(column.astype(np.float32))
                at += 1
        body.append("  }")
    text = (
        HEAD + "kernel void k(device const int* in [[buffer(0)]], device float* y [[buffer(1)]], "
        "uint i [[thread_position_in_grid]]) {\n  const int x = in[i];\n"
        + "\n".join(body)
        + "\n}\n"
    )
    return text, np.stack(expected, axis=1)
