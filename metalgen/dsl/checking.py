"""Whether a score or mask function is one: its arguments, what it returns, what it looks at."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from metalgen.dsl.capture import filled, lift, names_used_by
from metalgen.dsl.errors import FunctionError

SIGNATURES = {
    "score_mod": ("score", "b", "h", "q", "kv"),
    "mask_mod": ("b", "h", "q", "kv"),
}
WRITTEN = {
    "score_mod": "score_mod(score, b, h, q_idx, kv_idx)",
    "mask_mod": "mask_mod(b, h, q_idx, kv_idx)",
}


def checked(
    function: Any, argument: str
) -> tuple[list[mx.array], Callable[[list[mx.array]], Callable[..., Any]]]:
    """The arrays that a function captures, and the function of them; see `metalgen.dsl.capture`.

    Raises:
        FunctionError: it is no function of the arguments.
    """
    if not callable(function):
        raise FunctionError(argument, f"a function {WRITTEN[argument]}", repr(function))
    try:
        inspect.signature(function).bind(*SIGNATURES[argument])
    except TypeError as error:
        raise FunctionError(
            argument, f"a function that can be called as {WRITTEN[argument]}", error
        ) from None
    except ValueError:
        pass  # one of MLX's own, such as mx.grad(f), which have no signature
    return lift(function)


def result_of(value: Any, argument: str) -> mx.array:
    """What a function returned, as one scalar; raises `FunctionError` for anything else."""
    what = "one scalar array" if argument == "score_mod" else "one scalar array of booleans"
    if isinstance(value, (bool, int, float)):
        return mx.array(value)
    if isinstance(value, (tuple, list, dict)):
        raise FunctionError(
            argument, what, f"a {type(value).__name__}", "return a single value, without a comma"
        )
    if value is None:
        raise FunctionError(argument, what, "None", "end the function with return")
    if not isinstance(value, mx.array):
        instead = "use the functions of mlx.core (mx.tanh, mx.where, ...)"
        raise FunctionError(argument, what, f"a {_kind(value)}", instead)
    if value.ndim:
        raise FunctionError(
            argument,
            what,
            f"an array of shape {value.shape}",
            "index captured arrays in every axis, as in bias[h, q_idx - kv_idx]",
        )
    return value


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def looked_at(function: Callable[..., Any], argument: str) -> FunctionError:
    """Which error it is that a function asks for the value of an array."""
    what = "a function that only computes with its arguments"
    scope = getattr(function, "__globals__", {})
    cells = getattr(function, "__closure__", None) or ()
    used = [scope[name] for name in names_used_by(function) if name in scope]
    used += [cell.cell_contents for cell in cells if filled(cell)]
    if any(isinstance(m, types.ModuleType) and m.__name__.startswith("numpy") for m in used):
        return FunctionError(
            argument,
            what,
            "one that gives them to NumPy (or asks for their values)",
            "use the functions of mlx.core: mx.tanh for np.tanh, mx.where for np.where",
        )
    return FunctionError(
        argument,
        what,
        "one that branches on a value or asks for it",
        "write mx.where(condition, a, b) for if and ?:, & | ~ for and, or, not, mx.minimum and "
        "mx.maximum for min and max, and no item(), int(), float() or bool()",
    )


def untraceable(
    error: Exception, function: Callable[..., Any], argument: str
) -> FunctionError | None:
    """What an error of MLX's says of a function that it traced; None: nothing that is known."""
    if isinstance(error, KeyError):
        if not any(isinstance(key, mx.array) for key in error.args):
            return None
        return FunctionError(
            argument,
            "arrays where something is looked up",
            "a dictionary",
            "put its values into an mx.array, and index that, as in table[h]",
        )
    said = str(error)
    if "eval" in said and "transformation" in said:
        return looked_at(function, argument)
    if "uncaptured inputs" in said:
        return FunctionError(
            argument,
            "captured arrays that are reached in one way each",
            "one that is also reached where it cannot be found (a property, a library)",
            "make it a global variable, a variable of the enclosing function or a default",
        )
    if match := re.search(r"Unable to get state for primitive (\w+)", said):
        return FunctionError(
            argument,
            "operations that MLX can export",
            f"MLX's {match[1]}",
            "write x ^ -1 for mx.bitwise_invert(x), ~x for booleans, and compute anything else "
            "before, capture the result, and index it",
        )
    return None
