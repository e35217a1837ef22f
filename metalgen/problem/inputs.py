"""What a call brings in addition to q, k and v, as its config says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from metalgen.errors import ArgumentError, MissingArgument
from metalgen.features import FEATURES, INPUTS
from metalgen.features.arrays import Arrays, max_kv_len
from metalgen.problem.block_mask import BlockMask

if TYPE_CHECKING:
    from metalgen.problem.config import AttentionConfig

__all__ = ["NOTHING", "Inputs", "check_call", "check_inputs", "check_qkv", "max_kv_len"]


@dataclass(frozen=True, eq=False)
class Inputs:
    """Arrays of a call; those that its config does not ask for are None.

    N is the number of sequences: of q's batch entries, or of what `cu_q` cuts out. All int32 unless
    said otherwise. Contents may differ from call to call; a kernel reads nothing outside its
    arrays, whatever they contain.

    Args:
        score, mask: captured arrays of the config's score and mask functions.
        blocks: the block mask.
        cu_q, cu_k: ``(N + 1,)``, where each sequence starts in q, and in k and v, and the end of
            the last. Rows of q after the last are zeros.
        kv_lens: ``(N,)``, how many keys each sequence has.
        kv_starts: ``(N,)``, which of each sequence's keys is the first.
        seqused_q: ``(N,)``, how many queries each sequence has.
        q_offset: ``(N,)``, the number of each sequence's first query, among its keys.
        block_table: ``(N, pages)``: which page of k and v holds keys ``n * page_size`` and on; a
            number that is no page's (-1) stands for keys that are not seen.
        k_scales, k_biases, v_scales, v_biases: ``(..., D / group)``, of the config's type, the
            first axes as k's and v's.
        rope_freqs: ``(rope_dims / 2,)`` float32, radians a position.
        rope_cos, rope_sin: ``(positions, rope_dims / 2)`` float32, in place of `rope_freqs`. A
            position outside of them counts as the nearest one inside.
        rope_offset: ``(N,)``, the position of each sequence's first query.
        alibi_slopes: ``(H,)`` float32, or ``(N, H)``.
        bias: ``(B, H, Lq, Lk)`` or 1 for any, float32 or of the config's type.
        array_mask: the same in booleans.
        sinks: ``(H,)`` float32.
        dropout_key: ``(2,)`` uint32, such as ``mx.random.key(0)``.
        others: arrays of features from outside of metalgen, by name.
        options: what errors call the arrays, and q, k and v, where not by these names.
    """

    score: tuple[mx.array, ...] = ()
    mask: tuple[mx.array, ...] = ()
    blocks: BlockMask | None = None
    cu_q: mx.array | None = None
    cu_k: mx.array | None = None
    kv_lens: mx.array | None = None
    kv_starts: mx.array | None = None
    seqused_q: mx.array | None = None
    q_offset: mx.array | None = None
    block_table: mx.array | None = None
    k_scales: mx.array | None = None
    k_biases: mx.array | None = None
    v_scales: mx.array | None = None
    v_biases: mx.array | None = None
    rope_freqs: mx.array | None = None
    rope_cos: mx.array | None = None
    rope_sin: mx.array | None = None
    rope_offset: mx.array | None = None
    alibi_slopes: mx.array | None = None
    bias: mx.array | None = None
    array_mask: mx.array | None = None
    sinks: mx.array | None = None
    dropout_key: mx.array | None = None

    others: Mapping[str, mx.array] = field(default_factory=dict)
    options: Mapping[str, str] | None = field(default=None, repr=False)

    def get(self, name: str) -> mx.array | None:
        """An array that a feature declares, by its name."""
        found: mx.array | None = getattr(self, name) if name in _OWN else self.others.get(name)
        return found

    def __getitem__(self, name: str) -> mx.array:
        """The same, where the config requires it; raises `KeyError`."""
        if (found := self.get(name)) is None:
            raise KeyError(name)
        return found

    def spoken(self, name: str) -> str:
        """What errors call an array."""
        return name if self.options is None else self.options.get(name, name)

    @property
    def named(self) -> dict[str, mx.array]:
        """The arrays that features declare, by name."""
        found = {name: self.get(name) for name in INPUTS}
        return {name: array for name, array in found.items() if array is not None}

    @property
    def names(self) -> list[str]:
        """What `metalgen.reference.gradients_float64` calls the arrays, in the order of `arrays`;
        captured ones of masks likewise."""
        captured = [("score", len(self.score)), ("mask", len(self.mask))]
        found = [f"{name}[{n}]" for name, count in captured for n in range(count)]
        return [*found, *self.named]

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """All arrays: captured ones of the score, of the mask, then the named ones."""
        return (*self.score, *self.mask, *self.named.values())

    def replaced(self, arrays: tuple[mx.array, ...]) -> Inputs:
        """The same with other arrays, in the order of `arrays`."""
        if not arrays:
            return self
        score, mask = len(self.score), len(self.score) + len(self.mask)
        return self.having(
            dict(zip(self.named, arrays[mask:], strict=True)),
            score=tuple(arrays[:score]),
            mask=tuple(arrays[score:mask]),
        )

    def having(self, named: Mapping[str, mx.array], **fields: Any) -> Inputs:
        """The same with other arrays of these names, and other fields."""
        own: dict[str, Any] = {n: x for n, x in named.items() if n in _OWN}
        others = {n: x for n, x in named.items() if n not in _OWN}
        if others:
            fields["others"] = {**self.others, **others}
        return dataclasses.replace(self, **own, **fields)


_OWN = frozenset(each.name for each in dataclasses.fields(Inputs))
NOTHING = Inputs()


def needs_inputs(config: AttentionConfig) -> bool:
    """Whether calls of a config bring anything in addition to q, k and v."""
    return bool(config.inputs) or any(feature.captures for feature in config.features)


def check_call(
    config: AttentionConfig, q: mx.array, k: mx.array, v: mx.array, inputs: Inputs = NOTHING
) -> None:
    """Whether arrays fit a config and each other; looks at types and shapes only.

    Raises:
        ArgumentError: naming the first array that does not fit.
    """
    check_qkv(config, q, k, v, inputs)
    check_inputs(config, q, k, v, inputs)


def check_inputs(
    config: AttentionConfig, q: mx.array, k: mx.array, v: mx.array, inputs: Inputs
) -> None:
    """The same for what a call brings in addition to q, k and v."""
    if not isinstance(inputs, Inputs):
        raise ArgumentError("inputs", "a metalgen.problem.inputs.Inputs", type(inputs).__name__)
    arrays = Arrays(config, q, k, v, inputs)
    for feature in FEATURES.values():
        if feature.captures:
            feature.check_captured(arrays)
    found, required = {}, config.input_names
    for name in INPUTS:
        array = inputs.get(name)
        if array is None:
            if name in required:
                raise MissingArgument(inputs.spoken(name), "by the config")
        else:
            if name not in required:
                got = type(array).__name__
                raise ArgumentError(inputs.spoken(name), "None, as the config says", got)
            if not isinstance(array, mx.array):
                raise ArgumentError(inputs.spoken(name), "an mlx.core.array", type(array).__name__)
            found[name] = array
    for each in config.inputs:
        each.check(found[each.name], inputs.spoken(each.name), arrays)


def check_qkv(
    config: AttentionConfig, q: mx.array, k: mx.array, v: mx.array, inputs: Inputs = NOTHING
) -> None:
    """The same for q, k and v; raises `ArgumentError`."""

    def misshapen(name: str, expected: str, x: mx.array) -> ArgumentError:
        return ArgumentError(f"{inputs.spoken(name)}.shape", expected, x.shape)

    kv_dtype = config.dtype if config.kv_bits is None else "uint32"
    axes = "(B, H, L, D)" if config.page_size is None else "(pages, H, page_size, D)"
    for name, x, width, dtype, bits in (
        ("q", q, config.head_dim, config.dtype, None),
        ("k", k, config.head_dim, kv_dtype, config.kv_bits),
        ("v", v, config.v_dim, kv_dtype, config.v_bits),
    ):
        if not isinstance(x, mx.array):
            raise ArgumentError(inputs.spoken(name), "an mlx.core.array", type(x).__name__)
        shape = x.shape
        if len(shape) != 4:
            raise misshapen(name, f"4 axes {'(B, H, L, D)' if name == 'q' else axes}", x)
        columns = width if bits is None else width * bits // 32
        if shape[3] != columns:
            quantized = "" if bits is None else f", {bits} bits an element"
            raise misshapen(name, f"a last axis of {columns}{quantized}", x)
        if x.dtype != getattr(mx, dtype):
            raise ArgumentError(f"{inputs.spoken(name)}.dtype", dtype, str(x.dtype))
    if config.varlen:
        for name, x in (("q", q), ("k", k))[: 1 if config.page_size else 2]:
            if x.shape[0] != 1:
                raise misshapen(name, "a first axis of 1 with varlen", x)
    elif config.page_size is None and k.shape[0] != q.shape[0]:
        raise misshapen("k", f"a batch of {q.shape[0]}, as q has", k)
    if config.page_size is not None and k.shape[2] != config.page_size:
        raise misshapen("k", f"pages of {config.page_size} keys", k)
    if k.shape[1] * config.heads_per_kv != q.shape[1]:
        heads = f"{q.shape[1]} / {config.heads_per_kv} heads (q has {q.shape[1]}, heads_per_kv)"
        raise misshapen("k", heads, k)
    if v.shape[:3] != k.shape[:3]:
        raise misshapen("v", f"{k.shape[:3]} before the last axis, as k has", v)
