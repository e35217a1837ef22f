"""The operations that a score or mask function may be made of, and what each one computes.

``EVALUATE`` holds them for whole arrays, in the namespace of NumPy or of MLX: what folds constants,
what the float64 reference and the plain MLX fallback compute. The printer spells them for kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Evaluate = Callable[..., Any]

BINARY = {
    "Add": "add",
    "Subtract": "subtract",
    "Multiply": "multiply",
    "Divide": "divide",
    "FloorDivide": "floor_divide",
    "Remainder": "remainder",
    "Maximum": "maximum",
    "Minimum": "minimum",
    "Power": "power",
    "LogAddExp": "logaddexp",
    "ArcTan2": "arctan2",
    "Equal": "equal",
    "NotEqual": "not_equal",
    "Greater": "greater",
    "GreaterEqual": "greater_equal",
    "Less": "less",
    "LessEqual": "less_equal",
    "LogicalAnd": "logical_and",
    "LogicalOr": "logical_or",
}
"""MLX's primitives of two arguments, and our names for them (those of MLX's functions)."""

BITWISE = ("bitwise_and", "bitwise_or", "bitwise_xor", "left_shift", "right_shift")
"""What `BitwiseBinary` computes, by its argument."""

UNARY = {
    "Abs": "abs",
    "Negative": "negative",
    "Square": "square",
    "Sign": "sign",
    "Exp": "exp",
    "Expm1": "expm1",
    "Log1p": "log1p",
    "Sigmoid": "sigmoid",
    "Erf": "erf",
    "Sin": "sin",
    "Cos": "cos",
    "Tan": "tan",
    "Sinh": "sinh",
    "Cosh": "cosh",
    "Tanh": "tanh",
    "ArcSin": "arcsin",
    "ArcCos": "arccos",
    "ArcTan": "arctan",
    "ArcSinh": "arcsinh",
    "ArcCosh": "arccosh",
    "ArcTanh": "arctanh",
    "Floor": "floor",
    "Ceil": "ceil",
    "Round": "round",
    "LogicalNot": "logical_not",
}
LOGS = ("log2", "log10", "log")
"""What `Log` computes, by its argument."""
SAME = ("StopGradient", "Copy", "Contiguous", "Depends")
"""Primitives that hand on their (first) argument."""

COMMUTATIVE = frozenset(
    "add multiply maximum minimum logaddexp equal not_equal logical_and logical_or bitwise_and "
    "bitwise_or bitwise_xor".split()
)
COMPARISONS = frozenset("equal not_equal greater greater_equal less less_equal".split())
LOGICAL = frozenset(("logical_and", "logical_or", "logical_not"))
OF_FLOATS = frozenset(
    (*UNARY.values(), *LOGS, "divide", "logaddexp", "arctan2", "sqrt", "rsqrt")
) - frozenset("abs negative square sign floor ceil round logical_not".split())
"""What MLX computes of floating-point numbers only: it converts integers before."""
ARITY = {
    **dict.fromkeys(BINARY.values(), 2),
    **dict.fromkeys(BITWISE, 2),
    **dict.fromkeys(UNARY.values(), 1),
    **dict.fromkeys(LOGS, 1),
    "sqrt": 1,
    "rsqrt": 1,
    "cast": 1,
    "select": 3,
}


def _named(name: str) -> Evaluate:
    return lambda xp, *arguments: getattr(xp, name)(*arguments)


def _erf(xp: Any, x: Any) -> Any:
    if hasattr(xp, "erf"):
        return xp.erf(x)
    import math

    return xp.vectorize(math.erf, otypes=[float])(x)


def _sign(xp: Any, x: Any) -> Any:
    """As MLX, whose sign of NaN is 0."""
    return xp.where(x > 0, 1, xp.where(x < 0, -1, 0)).astype(x.dtype)


def _guarded(operation: str) -> Evaluate:
    """Integer division, with 0 for a division by 0, which stops some machines."""

    def evaluate(xp: Any, x: Any, y: Any) -> Any:
        if "float" in str(x.dtype):
            return getattr(xp, operation)(x, y)
        some = xp.where(y == 0, xp.ones_like(y), y)
        return xp.where(y == 0, xp.zeros_like(x), getattr(xp, operation)(x, some))

    return evaluate


def _power(xp: Any, x: Any, y: Any) -> Any:
    """Of integers too: a negative exponent gives 0."""
    if "int" not in str(x.dtype):
        return xp.power(x, y)
    return xp.where(y < 0, xp.zeros_like(x), xp.power(x, xp.where(y < 0, xp.zeros_like(y), y)))


def _subtract(xp: Any, x: Any, y: Any) -> Any:
    """Of booleans too, as MLX has it and NumPy does not."""
    return xp.not_equal(x, y) if "bool" in str(x.dtype) else xp.subtract(x, y)


def _shift(operation: str) -> Evaluate:
    """By a number of bits modulo the width of the type, as kernels shift."""

    def evaluate(xp: Any, x: Any, y: Any) -> Any:
        bits = 8 * (x.dtype.itemsize if hasattr(x.dtype, "itemsize") else x.dtype.size)
        return getattr(xp, operation)(x, y & xp.array(bits - 1, dtype=y.dtype))

    return evaluate


EVALUATE: dict[str, Evaluate] = {
    **{name: _named(name) for name in (*BINARY.values(), *UNARY.values(), *LOGS, *BITWISE)},
    "sqrt": _named("sqrt"),
    "subtract": _subtract,
    "left_shift": _shift("left_shift"),
    "right_shift": _shift("right_shift"),
    "floor_divide": _guarded("floor_divide"),
    "remainder": _guarded("remainder"),
    "power": _power,
    "select": _named("where"),
    "rsqrt": lambda xp, x: 1 / xp.sqrt(x),
    "sigmoid": lambda xp, x: xp.where(
        x < 0, xp.exp(-xp.abs(x)) / (1 + xp.exp(-xp.abs(x))), 1 / (1 + xp.exp(-xp.abs(x)))
    ),
    "erf": _erf,
    "sign": _sign,
}
