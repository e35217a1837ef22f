"""What attention to compute: the problem, never how to run it."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from dataclasses import dataclass
from typing import Any

from metalgen.arguments import as_integer, as_number, check_integer
from metalgen.errors import ArgumentError

DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""The types of queries, keys, values and output, with their bytes an element."""

MIN_HEAD_DIM, MAX_HEAD_DIM = 8, 576
MAX_HEADS_PER_KV = 1024
MAX_WINDOW = 1 << 24
MIN_PAGE, MAX_PAGE = 8, 256
KV_BITS, KV_GROUPS = (4, 8), (32, 64, 128)
ROPES = ("half", "pairs")
MIN_WORK = 1 << 16


@dataclass(frozen=True)
class AttentionConfig:
    """One attention problem: ``softmax(scale * Q K^T + mask) V``, for each batch entry and head.

    Lengths, batch and the scale are not part of it: they may differ from call to call.

    Args:
        head_dim: width D of a query and key row, 8 to 576, a multiple of 8 or not.
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
        alibi: calls bring slopes ``(H,)``; a score has ``-slope * |i + kv_len - q_len - j|`` added.
        bias: calls bring an array, broadcast to ``(B, H, Lq, Lk)``, that is added to the scores.
        array_mask: calls bring booleans, broadcast to ``(B, H, Lq, Lk)``: whether a key is seen.
        sinks: calls bring a logit for each query head, ``(H,)``: a key without a value.
        dropout: probability from 0 to below 1 that a weight is dropped; the others are divided by
            ``1 - dropout``. Calls bring the key of a Philox generator (see `metalgen.philox`).
        varlen: q, k and v are sequences one after the other, ``(1, H, T, D)``; calls bring the
            places where they start, ``cu_q`` and ``cu_k``.
        kv_lens: calls bring how many keys of each batch entry there are, ``(B,)``; the rest of k
            and v is not looked at, and masks align to that length.
        page_size: keys of a page, 8 to 256, a multiple of 8: k and v are pages ``(pages, Hkv,
            page_size, D)``, and calls bring a block table and the lengths, as in `kv_lens`.
        kv_bits, kv_group: k and v are quantized as by ``mx.quantize`` with 4 or 8 bits in groups
            of 32, 64 or 128; calls bring their scales and biases.
        rope: rotary embedding of the queries in the kernel: ``"half"`` (columns c and c + D / 2
            turn together) or ``"pairs"`` (2 c and 2 c + 1). Calls bring frequencies and offsets;
            keys come turned already (see `metalgen.append_kv`).
        rope_dims: how many columns turn; None: all.
        deterministic: a row's bits depend on nothing but its own sequence, and on whether there
            are more than 64 queries: not on the batch, nor on what was tuned for it.
        tf32: float32 products of CUDA kernels may keep 11 bits of each factor; Metal has no such
            type, and computes in float32.
        max_work: most scores (queries times keys) that one dispatch computes, 65,536 or more; a
            call with more is cut into several. None: no bound.
        return_lse: also return the log-sum-exp of the scaled scores (natural logarithm, float32,
            ``(B, H, L)``, -inf for a row that sees no key).

    What adds to a score comes in this order: scale, softcap or score function, ALiBi, bias; then
    all masks; then the sink.

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
    alibi: bool = False
    bias: bool = False
    array_mask: bool = False
    sinks: bool = False
    dropout: float = 0.0
    varlen: bool = False
    kv_lens: bool = False
    page_size: int | None = None
    kv_bits: int | None = None
    kv_group: int = 64
    rope: str | None = None
    rope_dims: int | None = None
    deterministic: bool = False
    tf32: bool = False
    max_work: int | None = None

    def __post_init__(self) -> None:
        self._keep("dtype", _dtype_name(self.dtype))
        self._keep_integer("head_dim", MIN_HEAD_DIM, MAX_HEAD_DIM)
        if self.value_head_dim is not None:
            self._keep_integer("value_head_dim", MIN_HEAD_DIM, MAX_HEAD_DIM)
        if self.value_head_dim == self.head_dim:  # one problem, one spelling, one key
            self._keep("value_head_dim", None)
        self._keep_integer("heads_per_kv", 1, MAX_HEADS_PER_KV)
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ArgumentError(name, "True or False", getattr(self, name))
        for name in ("window_left", "window_right"):
            if getattr(self, name) is not None:
                self._keep_integer(name, 0, MAX_WINDOW)
        if self.softcap is not None:
            softcap = as_number(self.softcap)
            if softcap is None or not 1e-3 <= softcap <= 1e6:
                raise ArgumentError("softcap", "a number from 0.001 to 1000000", self.softcap)
            self._keep("softcap", softcap)
        if self.score_mod is not None or self.mask_mod is not None or self.block_mask:
            self._check_functions()
        self._check_keys()
        self._check_others()
        self._check_together()

    def _keep(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _keep_integer(self, name: str, low: int, high: int) -> None:
        self._keep(name, check_integer(name, getattr(self, name), low, high))

    def _check_keys(self) -> None:
        if self.page_size is not None:
            self._keep_integer("page_size", MIN_PAGE, MAX_PAGE)
            if self.page_size % 8:
                raise ArgumentError("page_size", "a multiple of 8 from 8 to 256", self.page_size)
            self._keep("kv_lens", False)  # said by the pages
        if self.kv_bits is None:
            self._keep("kv_group", 64)
            return
        self._keep("kv_bits", _one_of("kv_bits", self.kv_bits, (None, *KV_BITS)))
        self._keep("kv_group", _one_of("kv_group", self.kv_group, KV_GROUPS))
        for name, width in (("head_dim", self.head_dim), ("value_head_dim", self.v_dim)):
            if width % self.kv_group:
                expected = f"a multiple of kv_group={self.kv_group}, as mx.quantize has it"
                raise ArgumentError(name, expected, width)

    def _check_others(self) -> None:
        dropout = as_number(self.dropout)
        if dropout is None or not 0 <= dropout < 1:
            raise ArgumentError("dropout", "a number from 0 to below 1", self.dropout)
        self._keep("dropout", dropout)
        if self.rope is None:
            self._keep("rope_dims", None)
        else:
            self._keep("rope", _one_of("rope", self.rope, (None, *ROPES)))
            dims = as_integer(self.turned)
            if dims is None or not 2 <= dims <= self.head_dim or dims % 2:
                name = "head_dim" if self.rope_dims is None else "rope_dims"
                raise ArgumentError(name, f"an even number from 2 to {self.head_dim}", self.turned)
            self._keep("rope_dims", None if dims == self.head_dim else dims)
        if self.max_work is not None:
            self._keep_integer("max_work", MIN_WORK, 1 << 62)

    def _check_together(self) -> None:
        if self.tf32 and self.dtype != "float32":
            raise ArgumentError("tf32", f"False beside {self.dtype}", True)
        if not self.varlen:
            return
        excluded = {
            "bias": "a score_mod, which counts queries and keys of each sequence from 0",
            "array_mask": "a mask_mod, which counts queries and keys of each sequence from 0",
            "block_mask": "the mask_mod alone",
            "kv_lens": "cu_k, which says the lengths",
            "max_work": "fewer sequences a call",
        }
        for name, instead in excluded.items():
            if getattr(self, name):
                expected = f"its default beside varlen; use {instead}"
                raise ArgumentError(name, expected, getattr(self, name))

    def _check_functions(self) -> None:
        from metalgen.dsl.graph import MAX_ARRAYS, check_function

        arrays = 0
        for name in ("score_mod", "mask_mod"):
            text = getattr(self, name)
            if text is not None:
                graph = check_function(name, text)
                arrays += len(graph.arrays)
                self._keep(name, graph.text)
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
    def turned(self) -> int:
        """Columns of a query that a rotary embedding turns."""
        return self.head_dim if self.rope_dims is None else self.rope_dims

    @property
    def has_lengths(self) -> bool:
        """Whether calls bring the number of keys of each sequence as `kv_lens`."""
        return self.kv_lens or self.page_size is not None

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

    def __hash__(self) -> int:
        return hash(self.key)  # which is kept, as a hash of all fields is not

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
                near = difflib.get_close_matches(str(name), known, 3, 0.6)
                some = f"such as {', '.join(near)}" if near else f"among {', '.join(known)}"
                raise ArgumentError("config", f"a field {some}", name)
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
            ends = (("left", self.window_left), ("right", self.window_right))
            words += [f"window_{end}={keys}" for end, keys in ends if keys is not None]
        if self.softcap is not None:
            words.append(f"softcap{self.softcap:g}")
        for name in ("score_mod", "mask_mod"):
            if (text := getattr(self, name)) is not None:
                from metalgen.dsl.graph import parse

                words.append(f"{name}:{parse(text).digest}")
        if self.block_mask:
            words.append("blocks")
        words += [name for name in _NAMED if getattr(self, name)]
        if self.dropout:
            words.append(f"dropout{self.dropout:g}")
        if self.page_size is not None:
            words.append(f"pages{self.page_size}")
        if self.kv_bits is not None:
            words.append(f"kv{self.kv_bits}:{self.kv_group}")
        if self.rope is not None:
            words.append(f"rope:{self.rope}" + (f"{self.turned}" if self.rope_dims else ""))
        if self.max_work is not None:
            words.append(f"work{self.max_work}")
        if self.heads_per_kv > 1:
            words.append(f"gqa{self.heads_per_kv}")
        if self.return_lse:
            words.append("lse")
        return " ".join(words)


_NAMED = ("alibi", "bias", "array_mask", "sinks", "varlen", "kv_lens", "deterministic", "tf32")
_SWITCHES = ("causal", "return_lse", "block_mask", *_NAMED)


def _dtype_name(dtype: object) -> str:
    name = dtype if isinstance(dtype, str) else str(dtype)
    name = name.removeprefix("mlx.core.")
    if name not in DTYPES:
        raise ArgumentError("dtype", f"one of {', '.join(DTYPES)}", dtype)
    return name


def _one_of(name: str, value: object, choices: tuple[object, ...]) -> object:
    number = as_integer(value)
    found = value if number is None else number
    if not any(type(found) is type(choice) and found == choice for choice in choices):
        raise ArgumentError(name, f"one of {', '.join(map(str, choices))}", value)
    return found
