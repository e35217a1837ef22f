"""What attention to compute: the problem, never how to run it."""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from typing import Any

from metalgen.errors import ArgumentError

DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""The types of queries, keys, values and output, with their bytes an element."""

MIN_HEAD_DIM, MAX_HEAD_DIM = 8, 256
MAX_HEADS_PER_KV = 1024
MAX_WINDOW = 1 << 24


@dataclass(frozen=True)
class AttentionConfig:
    """One attention problem: ``softmax(scale * Q K^T + mask) V``, for each batch entry and head.

    Lengths, batch and the scale are not part of it: they may differ from call to call.

    Args:
        head_dim: width D of a query and key row, 8 to 256, a multiple of 8 or not.
        dtype: ``"float16"``, ``"bfloat16"`` or ``"float32"`` (an ``mlx.core.Dtype`` is taken too);
            type of Q, K, V and O. Scores and sums are always accumulated in float32.
        value_head_dim: width of a value and output row; None means ``head_dim``.
        heads_per_kv: query heads that share one key/value head (1: MHA, H: MQA, between: GQA).
        causal: query i sees key j when ``j <= i + kv_len - q_len`` (aligned at the lower right).
        window_left, window_right: a sliding window; query i sees key j only when
            ``i + kv_len - q_len - window_left <= j <= i + kv_len - q_len + window_right``.
            None: no bound. (A window of W keys up to the own one is causal, window_left W - 1.)
        softcap: C > 0; a scaled score x becomes ``C * tanh(x / C)`` before the mask.
        score_mod, mask_mod: the graphs of score and mask functions, as text (see
            `metalgen.flex_attention`, which makes configs with them). A scaled score x becomes
            ``score_mod(x, b, h, i, j)``; key j is seen where ``mask_mod(b, h, i, j)``, too. They
            count queries and keys from 0, whatever the lengths.
        block_mask: calls come with a block mask, which lists the blocks that `mask_mod` leaves.
        return_lse: also return the log-sum-exp of the scaled scores (natural logarithm, float32,
            ``(B, H, L)``, -inf for a row that sees no key).

    Raises:
        ArgumentError: a field of the wrong type or out of range.
    """

    head_dim: int
    dtype: str = "float16"
    value_head_dim: int | None = None
    heads_per_kv: int = 1
    causal: bool = False
    return_lse: bool = False
    window_left: int | None = None
    window_right: int | None = None
    softcap: float | None = None
    score_mod: str | None = None
    mask_mod: str | None = None
    block_mask: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", _dtype_name(self.dtype))
        if self.value_head_dim == self.head_dim:  # one problem, one spelling, one key
            object.__setattr__(self, "value_head_dim", None)
        _check_int("head_dim", self.head_dim, MIN_HEAD_DIM, MAX_HEAD_DIM)
        if self.value_head_dim is not None:
            _check_int("value_head_dim", self.value_head_dim, MIN_HEAD_DIM, MAX_HEAD_DIM)
        _check_int("heads_per_kv", self.heads_per_kv, 1, MAX_HEADS_PER_KV)
        for name in ("window_left", "window_right"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 0, MAX_WINDOW)
        if self.softcap is not None:
            number = isinstance(self.softcap, (int, float)) and not isinstance(self.softcap, bool)
            if not number or not 1e-3 <= self.softcap <= 1e6:
                raise ArgumentError("softcap", "a number from 0.001 to 1000000", self.softcap)
            object.__setattr__(self, "softcap", float(self.softcap))
        if self.score_mod is not None or self.mask_mod is not None or self.block_mask:
            self._check_functions()
        for name in ("causal", "return_lse", "block_mask"):
            if not isinstance(getattr(self, name), bool):
                raise ArgumentError(name, "True or False", getattr(self, name))

    def _check_functions(self) -> None:
        from metalgen.dsl.graph import MAX_ARRAYS, check_function

        arrays = 0
        for name in ("score_mod", "mask_mod"):
            text = getattr(self, name)
            if text is not None:
                graph = check_function(name, text)
                arrays += len(graph.arrays)
                object.__setattr__(self, name, graph.text)
        if arrays > MAX_ARRAYS:
            expected = f"at most {MAX_ARRAYS} captured arrays of score_mod and mask_mod together"
            raise ArgumentError("mask_mod", expected, arrays)
        if self.score_mod is not None and self.softcap is not None:
            expected = "None beside a score_mod, where C * mx.tanh(score / C) says the same"
            raise ArgumentError("softcap", expected, self.softcap)
        if self.block_mask and self.mask_mod is None:
            raise ArgumentError("block_mask", "a mask_mod that it comes from", None)

    @property
    def v_dim(self) -> int:
        """Width of a value and output row."""
        return self.head_dim if self.value_head_dim is None else self.value_head_dim

    @property
    def itemsize(self) -> int:
        """Bytes of one element of Q, K, V and O."""
        return DTYPES[self.dtype]

    @functools.cached_property
    def key(self) -> str:
        """Canonical JSON: sorted names, no spaces, fields at their default left out.

        A field added later has a default that means "as before", so no existing key changes.
        """
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, and ``head_dim`` and ``dtype`` always."""
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name in ("head_dim", "dtype") or getattr(self, f.name) != f.default
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> AttentionConfig:
        """The config of a dictionary as `to_dict` writes it.

        Raises:
            ArgumentError: not a dictionary, an unknown or missing field, or a bad value.
        """
        if not isinstance(fields, dict):
            raise ArgumentError("config", "an object of fields", fields)
        known = [f.name for f in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise ArgumentError("config", f"fields among {', '.join(known)}", name)
        if "head_dim" not in fields:
            raise ArgumentError("config", "a field head_dim", sorted(fields))
        return cls(**fields)

    @classmethod
    def from_json(cls, text: str) -> AttentionConfig:
        """The config of a JSON text as `key` gives it; raises as `from_dict`."""
        try:
            fields = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise ArgumentError("config", "a JSON object", text) from error
        return cls.from_dict(fields)

    def __str__(self) -> str:
        """A short name, such as ``D64 float16 causal gqa3``."""
        width = f"D{self.head_dim}" + (f"/{self.v_dim}" if self.value_head_dim else "")
        words = [width, self.dtype]
        if self.causal:
            words.append("causal")
        if self.window_left is not None or self.window_right is not None:
            ends = ("" if x is None else str(x) for x in (self.window_left, self.window_right))
            words.append("window" + ":".join(ends))
        if self.softcap is not None:
            words.append(f"softcap{self.softcap:g}")
        for name in ("score_mod", "mask_mod"):
            if (text := getattr(self, name)) is not None:
                from metalgen.dsl.graph import parse

                words.append(f"{name}:{parse(text).digest}")
        if self.block_mask:
            words.append("blocks")
        if self.heads_per_kv > 1:
            words.append(f"gqa{self.heads_per_kv}")
        if self.return_lse:
            words.append("lse")
        return " ".join(words)


def _dtype_name(dtype: object) -> str:
    name = dtype if isinstance(dtype, str) else str(dtype)
    name = name.removeprefix("mlx.core.")
    if name not in DTYPES:
        raise ArgumentError("dtype", f"one of {', '.join(DTYPES)}", dtype)
    return name


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ArgumentError(name, f"an integer from {low} to {high}", value)
