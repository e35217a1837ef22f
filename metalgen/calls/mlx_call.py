"""Calls of widths and types that have no kernel, and that MLX's own function computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from metalgen.arguments import check_integer
from metalgen.calls.arrays import Parts
from metalgen.calls.gradients import BACKWARDS
from metalgen.calls.kernel import check_scale
from metalgen.calls.options import Options
from metalgen.devices.mlx_attention import mlx_attention, seen_by
from metalgen.errors import ArgumentError
from metalgen.features.arrays import broadcasts
from metalgen.features.conversions import booleans, numbers, scores
from metalgen.features.fields import DTYPES
from metalgen.features.window import MAX_WINDOW
from metalgen.problem.config import MAX_HEAD_DIM, MIN_HEAD_DIM
from metalgen.problem.inputs import NOTHING, Inputs

_TAKEN = frozenset(
    {
        *("causal", "window_left", "window_right", "mask", "bias", "sinks"),
        *("device", "chip", "deterministic", "tf32", "max_work", "check", "stream"),
        "value_head_dim",
    }
)
"""Options that do not keep a call from MLX's function; of the last ones nothing depends."""


@dataclass(frozen=True)
class MlxCall:
    """A call by ``mx.fast.scaled_dot_product_attention``; is called as a `metalgen.Kernel` is.

    Args:
        head_dim: width of queries and keys.
        dtype: type of the arrays.
        reason: why no kernel of metalgen's computes it.
        causal, window_left, window_right: masks, as `metalgen.attention` has them.
    """

    head_dim: int
    dtype: str
    reason: str
    causal: bool = False
    window_left: int | None = None
    window_right: int | None = None

    def explain(self) -> str:
        """What runs, and why; one step a line."""
        head = f"D{self.head_dim} {self.dtype}: mx.fast.scaled_dot_product_attention"
        return "\n".join([head, f"  {self.reason}", f"  gradients: {BACKWARDS['mlx']}"])

    def __call__(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        *,
        scale: float | None = None,
        inputs: Inputs = NOTHING,
    ) -> mx.array:
        """Attention of arrays of one type, as `metalgen.attention` takes them."""
        if (k.shape[0], k.shape[3]) != (q.shape[0], q.shape[3]):
            expected = f"a batch of {q.shape[0]} and a last axis of {q.shape[3]}, as q has"
            raise ArgumentError("k.shape", expected, k.shape)
        if v.shape[:3] != k.shape[:3]:
            raise ArgumentError("v.shape", f"{k.shape[:3]} before the last axis, as k has", v.shape)
        whole = (*q.shape[:3], k.shape[2])
        for name, array in (("bias", inputs.bias), ("array_mask", inputs.array_mask)):
            if array is not None and (wanted := broadcasts(array, whole)) is not None:
                raise ArgumentError(f"{inputs.spoken(name)}.shape", wanted, array.shape)
        if inputs.sinks is not None and inputs.sinks.shape != (q.shape[1],):
            raise ArgumentError("sinks.shape", str((q.shape[1],)), inputs.sinks.shape)
        windows = self.window_left, self.window_right
        seen = seen_by(q.shape[2], k.shape[2], self.causal, windows, inputs.array_mask)
        if inputs.bias is not None:
            if seen is not None:
                expected = f"None with another mask, because {self.reason}"
                got = f"{inputs.bias.dtype} {inputs.bias.shape}"
                raise ArgumentError(inputs.spoken("bias"), expected, got)
            seen = inputs.bias
        return mlx_attention(q, k, v, check_scale(self.head_dim, scale), seen, inputs.sinks)


def mlx_call(
    q: mx.array, key: Parts, value: Parts, options: Options, names: Mapping[str, str]
) -> tuple[MlxCall, Inputs] | None:
    """The call for MLX's function, where no kernel takes its widths or type; else None.

    Options that MLX's function does not have leave the call to the kernels, which refuse it.
    `names`: what errors call the inputs.
    """
    widths = (q.shape[3], value[0].shape[3])
    dtype = str(q.dtype).removeprefix("mlx.core.")
    if all(MIN_HEAD_DIM <= width <= MAX_HEAD_DIM for width in widths):
        if dtype != "float64":
            return None
        reason = f"metalgen's kernels compute {', '.join(DTYPES)}, not float64"
    else:
        found = widths[0] if widths[0] == widths[1] else f"{widths[0]} and {widths[1]}"
        reason = (
            f"metalgen's kernels take widths from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, not {found}"
        )
    asked = {name for name, x in options.items() if not _is_default(x)}
    known = dtype in DTYPES or dtype == "float64"
    if len(key) > 1 or 0 in widths or not known or not asked <= _TAKEN:
        return None
    if options.get("device") == "simulator":
        return None
    windows = options.get("window_left"), options.get("window_right")
    left, right = (
        None if x is None else check_integer(name, x, 0, MAX_WINDOW)
        for name, x in zip(("window_left", "window_right"), windows, strict=True)
    )
    call = MlxCall(
        widths[0],
        dtype,
        reason,
        bool(options.get("causal", False)),
        left,
        right,
    )
    return call, Inputs(
        bias=scores(options.get("bias"), q.dtype),
        array_mask=booleans(options.get("mask")),
        sinks=numbers("sinks", options.get("sinks")),
        options=names,
    )


def _is_default(x: object) -> bool:
    return x is None or (isinstance(x, (bool, int, float)) and not x)
