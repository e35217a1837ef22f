"""What attention to compute: the problem, never how to run it."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from metalgen.arguments import check_integer
from metalgen.errors import ArgumentError
from metalgen.features import FIELDS, OTHERS, used
from metalgen.features.base import Field, OptionalInput
from metalgen.features.fields import DTYPES, Fields

MIN_HEAD_DIM, MAX_HEAD_DIM = 8, 576
MAX_HEADS_PER_KV = 1024


def _dtype(name: str, value: Any, config: Fields) -> str:
    text = value if isinstance(value, str) else str(value)
    text = text.removeprefix("mlx.core.")
    if text not in DTYPES:
        raise ArgumentError(name, f"one of {', '.join(DTYPES)}", value)
    return text


def _head_dim(name: str, value: Any, config: Fields) -> int:
    return check_integer(name, value, MIN_HEAD_DIM, MAX_HEAD_DIM)


def _value_head_dim(name: str, value: Any, config: Fields) -> int | None:
    width = None if value is None else _head_dim(name, value, config)
    return None if width == config.head_dim else width  # one problem, one spelling, one key


def _heads_per_kv(name: str, value: Any, config: Fields) -> int:
    return check_integer(name, value, 1, MAX_HEADS_PER_KV)


BASE = {
    field.name: field
    for field in (
        Field("dtype", _dtype, "float16", "q.dtype", counted=True),
        Field("head_dim", _head_dim, None, "q.shape, head_dim", counted=True),
        Field("value_head_dim", _value_head_dim, None, "v.shape, value_head_dim", counted=True),
        Field("heads_per_kv", _heads_per_kv, 1, counted=True),
    )
}
"""The fields that belong to no feature, by name."""


class AttentionConfig(Fields):
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
            None: no bound. (For a causal window of W keys that includes the query's own, set
            ``causal=True`` and ``window_left=W - 1``.)
        softcap: C > 0; a scaled score x becomes ``C * tanh(x / C)`` before the mask.
        score_mod, mask_mod: the graphs of score and mask functions, as text (see
            `metalgen.flex_attention`, which makes configs with them). A scaled score x becomes
            ``score_mod(x, b, h, i, j)``; key j is seen where ``mask_mod(b, h, i, j)``, too. They
            count queries and keys from 0, whatever the lengths.
        block_mask: calls come with a block mask, which lists the blocks that `mask_mod` leaves; or,
            where there is only an `array_mask`, the blocks of that are listed, and found from the
            array by a few MLX operations where calls bring no block mask.
        alibi: calls bring slopes ``(H,)``; a score has ``-slope * |i + kv_len - q_len - j|`` added.
        alibi_by_sequence: the slopes are those of each sequence, ``(N, H)``.
        bias: calls bring an array, broadcast to ``(B, H, Lq, Lk)``, that is added to the scores.
        array_mask: calls bring booleans, broadcast to ``(B, H, Lq, Lk)``: whether a key is seen.
        sinks: calls bring a logit for each query head, ``(H,)``: a key without a value.
        dropout: probability from 0 to below 1 that a weight is dropped; the others are divided by
            ``1 - dropout``. Calls bring the key of a Philox generator (see `metalgen.philox`).
        varlen: q, k and v are sequences one after the other, ``(1, H, T, D)``; calls bring the
            places where they start, ``cu_q`` and ``cu_k``.
        kv_lens: calls bring the number of keys of each batch entry, ``(B,)``; the rest of k and v
            is never read, and masks align with that length.
        kv_starts: calls bring the first valid key of each sequence, ``(N,)``; the keys before it
            are never read. Keys are counted from 0 nevertheless.
        q_offset: calls bring the number of each sequence's first query, ``(N,)``, in place of
            ``kv_len - q_len`` for masks and ALiBi, and of 0 for functions and dropout.
        seqused_q: calls bring the number of queries of each sequence, ``(N,)``; its other rows of
            q see no key, and masks align with that number.
        page_size: keys of a page, 8 to 65,536, a multiple of 8: k and v are pages ``(pages, Hkv,
            page_size, D)``, and calls bring a block table and the lengths, as in `kv_lens`.
        kv_bits, kv_group: k and v are quantized as by ``mx.quantize`` with 4 or 8 bits in groups
            of 32, 64 or 128; calls bring their scales and biases.
        value_bits, value_group: bits and group size of v, if they differ from k's. None: as k's.
        rope: rotary embedding of the queries in the kernel: ``"half"`` (columns c and c + D / 2
            rotate together) or ``"pairs"`` (2 c and 2 c + 1). Calls bring frequencies and offsets;
            keys must already be rotated (see `metalgen.append_kv`).
        rope_dims: number of columns that rotate; None: all.
        rope_fixed: all queries of a sequence rotate as its first one does.
        rope_tables: instead of frequencies, calls bring tables of cosines and sines, with a row for
            each position.
        deterministic: the bits of a row depend only on its own sequence and on whether there are
            more than 64 queries, not on the batch nor on what was tuned for it.
        tf32: float32 products of CUDA kernels may keep 11 bits of each factor; Metal has no such
            type, and computes in float32.
        max_work: the largest number of scores (queries times keys) that one dispatch computes,
            65,536 or more; a larger call is cut into several. None: no bound.
        return_lse: also return the log-sum-exp of the scaled scores (natural logarithm, float32,
            ``(B, H, L)``, -inf for a row that sees no key).

    What adds to a score comes in this order: scale, softcap or score function, ALiBi, bias; then
    all masks; then the sink.

    Raises:
        ArgumentError: a field of the wrong type or out of range.
    """

    if not TYPE_CHECKING:

        @functools.wraps(Fields.__init__)
        def __init__(self, *args, **fields):
            if OTHERS:
                given = dict(fields.get("others", ()))
                given |= {name: fields.pop(name) for name in OTHERS if name in fields}
                fields["others"] = tuple(given.items())
            Fields.__init__(self, *args, **fields)
            self._check()

    def _check(self) -> None:
        for name, field in BASE.items():
            self._keep(name, field.check(name, getattr(self, name), self))
        unknown = [name for name, _ in self.others if name not in OTHERS]
        if unknown:
            raise ArgumentError("config", f"a field among {', '.join(field_names())}", unknown[0])
        changed = []
        for name, field in FIELDS.items():
            given = getattr(self, name)
            if given is field.default and name not in OTHERS:
                continue  # as most are
            value = field.check(name, given, self)
            if name in OTHERS:
                self._keep_other(name, value)
            else:
                self._keep(name, value)
            if value != field.default:
                changed.append(name)
        self._keep("features", used(changed) if changed else ())
        for feature in self.features:
            feature.check(self)
            for name, expected in feature.excludes(self).items():
                if (value := getattr(self, name)) != FIELDS[name].default:
                    raise ArgumentError(name, expected, value)

    def _keep(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _keep_other(self, name: str, value: object) -> None:
        kept = dict(self.others) | {name: value}
        rest = {n: v for n, v in kept.items() if v != OTHERS[n].default}
        self._keep("others", tuple(sorted(rest.items())))

    def __getattr__(self, name: str) -> Any:
        """The value of a field that a feature from outside declares."""
        if name in OTHERS:
            return dict(self.others).get(name, OTHERS[name].default)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @functools.cached_property
    def inputs(self) -> tuple[OptionalInput, ...]:
        """What calls bring in addition to q, k, v and captured arrays, in the kernels' order."""
        return tuple(each for feature in self.features for each in feature.required(self))

    @functools.cached_property
    def input_names(self) -> frozenset[str]:
        """Names of `inputs`."""
        return frozenset(each.name for each in self.inputs)

    @property
    def one_head(self) -> bool:
        """Whether the rows of a threadgroup must be those of one head."""
        return any(feature.one_head for feature in self.features)

    @functools.cached_property
    def key(self) -> str:
        """Canonical JSON: sorted names, no spaces, fields at their default left out.

        A field added later has a default that means "as before", so no existing key changes.
        """
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    def __hash__(self) -> int:
        return hash(self.key)  # which is kept, as a hash of all fields is not

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_dict, (self.to_dict(),)

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, and ``head_dim`` and ``dtype`` always."""
        own = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name != "others"
            and (f.name in ("head_dim", "dtype") or getattr(self, f.name) != f.default)
        }
        return own | dict(self.others)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> AttentionConfig:
        """The config of a dictionary as `to_dict` writes it.

        Raises:
            ArgumentError: not a dictionary, an unknown or missing field, or a bad value.
        """
        if not isinstance(fields, dict):
            raise ArgumentError("config", "an object of fields", fields)
        known = field_names()
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
        heads = [(GROUPED, f"gqa{self.heads_per_kv}")] if self.heads_per_kv > 1 else []
        ranked = [(f.rank, word) for f in self.features for word in f.words(self)] + heads
        words: Iterable[str] = (word for _, word in sorted(ranked, key=lambda each: each[0]))
        return " ".join([width, self.dtype, *words])


def declared(name: str) -> Field:
    """What declares a field: a feature, or, where it belongs to none, `BASE`."""
    return BASE[name] if name in BASE else FIELDS[name]


GROUPED = 5
"""Rank of the word for grouped heads: before the log-sum-exp."""


def field_names() -> list[str]:
    """Names of all fields that a config has."""
    return [f.name for f in dataclasses.fields(Fields) if f.name != "others"] + [*OTHERS]
