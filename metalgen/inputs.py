"""What a call brings beside q, k and v: what its config says that it brings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from metalgen.block_mask import BlockMask
from metalgen.errors import ArgumentError, MissingArgument

if TYPE_CHECKING:
    from metalgen.config import AttentionConfig


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
        block_table: ``(N, pages)``: which page of k and v holds keys ``n * page_size`` and on; a
            number that is no page's (-1) stands for keys that are not seen.
        k_scales, k_biases, v_scales, v_biases: ``(..., D / kv_group)``, of the config's type, the
            first axes as k's and v's.
        rope_freqs: ``(rope_dims / 2,)`` float32, radians a position.
        rope_offset: ``(N,)``, the position of each sequence's first query.
        alibi_slopes: ``(H,)`` float32.
        bias: ``(B, H, Lq, Lk)`` or 1 for any, float32 or of the config's type.
        array_mask: the same in booleans.
        sinks: ``(H,)`` float32.
        dropout_key: ``(2,)`` uint32, such as ``mx.random.key(0)``.
    """

    score: tuple[mx.array, ...] = ()
    mask: tuple[mx.array, ...] = ()
    blocks: BlockMask | None = None
    cu_q: mx.array | None = None
    cu_k: mx.array | None = None
    kv_lens: mx.array | None = None
    block_table: mx.array | None = None
    k_scales: mx.array | None = None
    k_biases: mx.array | None = None
    v_scales: mx.array | None = None
    v_biases: mx.array | None = None
    rope_freqs: mx.array | None = None
    rope_offset: mx.array | None = None
    alibi_slopes: mx.array | None = None
    bias: mx.array | None = None
    array_mask: mx.array | None = None
    sinks: mx.array | None = None
    dropout_key: mx.array | None = None

    @property
    def named(self) -> dict[str, mx.array]:
        """The arrays that a config asks for by a switch, by name."""
        found = {name: getattr(self, name) for name in ASKED_FOR}
        return {name: array for name, array in found.items() if array is not None}

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """All arrays: captured ones of the score, of the mask, then the named ones."""
        return (*self.score, *self.mask, *self.named.values())

    def replaced(self, arrays: tuple[mx.array, ...]) -> Inputs:
        """The same with other arrays, in the order of `arrays`."""
        if not arrays:
            return self
        score, mask = len(self.score), len(self.score) + len(self.mask)
        named: dict[str, Any] = dict(zip(self.named, arrays[mask:], strict=True))
        captured: dict[str, Any] = {
            "score": tuple(arrays[:score]),
            "mask": tuple(arrays[score:mask]),
        }
        return dataclasses.replace(self, **captured, **named)


NOTHING = Inputs()

ASKED_FOR: dict[str, Callable[[AttentionConfig], bool]] = {
    "cu_q": lambda c: c.varlen,
    "cu_k": lambda c: c.varlen and c.page_size is None,
    "kv_lens": lambda c: c.has_lengths,
    "block_table": lambda c: c.page_size is not None,
    "k_scales": lambda c: c.kv_bits is not None,
    "k_biases": lambda c: c.kv_bits is not None,
    "v_scales": lambda c: c.kv_bits is not None,
    "v_biases": lambda c: c.kv_bits is not None,
    "rope_freqs": lambda c: c.rope is not None,
    "rope_offset": lambda c: c.rope is not None,
    "alibi_slopes": lambda c: c.alibi,
    "bias": lambda c: c.bias,
    "array_mask": lambda c: c.array_mask,
    "sinks": lambda c: c.sinks,
    "dropout_key": lambda c: c.dropout > 0,
}
"""When a config asks for an input; the order is that of a kernel's inputs."""


def asked_for(config: AttentionConfig) -> list[str]:
    """Names of the inputs that a config asks for by its switches, in the kernels' order."""
    return [name for name, asks in ASKED_FOR.items() if asks(config)]


def has_inputs(config: AttentionConfig) -> bool:
    """Whether calls of a config bring anything beside q, k and v."""
    functions = config.score_mod is not None or config.mask_mod is not None
    return functions or bool(asked_for(config))


def check_call(
    config: AttentionConfig, q: mx.array, k: mx.array, v: mx.array, inputs: Inputs = NOTHING
) -> None:
    """Whether arrays fit a config and each other; looks at types and shapes only.

    Raises:
        ArgumentError: naming the first array that does not fit.
    """
    check_main(config, q, k, v)
    check_inputs(config, q, k, v, inputs)


def check_inputs(
    config: AttentionConfig, q: mx.array, k: mx.array, v: mx.array, inputs: Inputs
) -> None:
    """The same for what a call brings beside q, k and v."""
    if not isinstance(inputs, Inputs):
        raise ArgumentError("inputs", "a metalgen.inputs.Inputs", type(inputs).__name__)
    _check_functions(config, inputs, q, k)
    entries = q.shape[0]
    for name, asks in ASKED_FOR.items():
        array = getattr(inputs, name)
        if asks(config) and array is None:
            raise MissingArgument(name, "by the config")
        if array is not None and not asks(config):
            raise ArgumentError(name, "None, as the config says", type(array).__name__)
        if array is not None and not isinstance(array, mx.array):
            raise ArgumentError(name, "an mlx.core.array", type(array).__name__)
    if inputs.cu_q is not None:
        _check_vector("cu_q", inputs.cu_q, None, mx.int32)
        entries = inputs.cu_q.size - 1
        if entries < 1:
            raise ArgumentError("cu_q.shape", "2 elements or more", inputs.cu_q.shape)
    if inputs.cu_k is not None:
        _check_vector("cu_k", inputs.cu_k, entries + 1, mx.int32)
    for name in ("kv_lens", "rope_offset"):
        if (array := getattr(inputs, name)) is not None:
            _check_vector(name, array, entries, mx.int32)
    if inputs.block_table is not None:
        _check_type("block_table", inputs.block_table, mx.int32)
        if inputs.block_table.ndim != 2 or inputs.block_table.shape[0] != entries:
            wanted = f"2 axes, ({entries}, pages of a sequence)"
            raise ArgumentError("block_table.shape", wanted, inputs.block_table.shape)
    if config.kv_bits is not None:
        for name in ("k_scales", "k_biases", "v_scales", "v_biases"):
            array, of = getattr(inputs, name), k if name[0] == "k" else v
            width = config.head_dim if name[0] == "k" else config.v_dim
            _check_type(name, array, getattr(mx, config.dtype))
            _check_shape(name, array, (*of.shape[:3], width // config.kv_group))
    if inputs.rope_freqs is not None:
        _check_vector("rope_freqs", inputs.rope_freqs, config.turned // 2, mx.float32)
    for name in ("alibi_slopes", "sinks"):
        if (array := getattr(inputs, name)) is not None:
            _check_vector(name, array, q.shape[1], mx.float32)
    if inputs.dropout_key is not None:
        _check_vector("dropout_key", inputs.dropout_key, 2, mx.uint32)
    whole = (q.shape[0], q.shape[1], q.shape[2], key_places(config, k, inputs))
    for name, dtypes in (
        ("bias", (mx.float32, getattr(mx, config.dtype))),
        ("array_mask", (mx.bool_,)),
    ):
        if (array := getattr(inputs, name)) is not None:
            _check_type(name, array, *dtypes)
            check_broadcast(name, array, whole)


def check_broadcast(name: str, array: mx.array, whole: tuple[int, ...]) -> None:
    """Raise `ArgumentError` unless an array of four axes broadcasts to all scores."""
    fits = [a in (1, b) for a, b in zip(array.shape, whole, strict=False)]
    if array.ndim != 4 or not all(fits):
        raise ArgumentError(f"{name}.shape", f"4 axes that broadcast to {whole}", array.shape)


def key_places(config: AttentionConfig, k: mx.array, inputs: Inputs) -> int:
    """How many keys a sequence has at most."""
    if config.page_size is None or inputs.block_table is None:
        return int(k.shape[2])
    return int(inputs.block_table.shape[1]) * config.page_size


def check_main(config: AttentionConfig, q: mx.array, k: mx.array, v: mx.array) -> None:
    """The same for q, k and v; raises `ArgumentError`."""
    packed = 1 if config.kv_bits is None else 32 // config.kv_bits
    kv_dtype = config.dtype if config.kv_bits is None else "uint32"
    axes = "(B, H, L, D)" if config.page_size is None else "(pages, H, page_size, D)"
    for name, x, width, dtype in (
        ("q", q, config.head_dim, config.dtype),
        ("k", k, config.head_dim // packed, kv_dtype),
        ("v", v, config.v_dim // packed, kv_dtype),
    ):
        if not isinstance(x, mx.array):
            raise ArgumentError(name, "an mlx.core.array", type(x).__name__)
        shape = x.shape
        if len(shape) != 4:
            named = "(B, H, L, D)" if name == "q" else axes
            raise ArgumentError(f"{name}.shape", f"4 axes {named}", x.shape)
        if shape[3] != width:
            quantized = f", {config.kv_bits} bits an element" if dtype == "uint32" else ""
            raise ArgumentError(f"{name}.shape", f"a last axis of {width}{quantized}", x.shape)
        if x.dtype != getattr(mx, dtype):
            raise ArgumentError(f"{name}.dtype", dtype, str(x.dtype))
    if config.varlen:
        for name, x in (("q", q), ("k", k))[: 1 if config.page_size else 2]:
            if x.shape[0] != 1:
                raise ArgumentError(f"{name}.shape", "a first axis of 1 beside varlen", x.shape)
    elif config.page_size is None and k.shape[0] != q.shape[0]:
        raise ArgumentError("k.shape", f"a batch of {q.shape[0]}, as q has", k.shape)
    if config.page_size is not None and k.shape[2] != config.page_size:
        raise ArgumentError("k.shape", f"pages of {config.page_size} keys", k.shape)
    if k.shape[1] * config.heads_per_kv != q.shape[1]:
        heads = f"{q.shape[1]} / {config.heads_per_kv} heads (q has {q.shape[1]}, heads_per_kv)"
        raise ArgumentError("k.shape", heads, k.shape)
    if v.shape[:3] != k.shape[:3]:
        raise ArgumentError("v.shape", f"{k.shape[:3]} before the last axis, as k has", v.shape)


def _check_functions(config: AttentionConfig, inputs: Inputs, q: mx.array, k: mx.array) -> None:
    from metalgen.dsl.graph import parse

    sequences = q.shape[0] if inputs.cu_q is None else inputs.cu_q.size - 1
    for name, text, arrays in (
        ("score_mod", config.score_mod, inputs.score),
        ("mask_mod", config.mask_mod, inputs.mask),
    ):
        if not isinstance(arrays, tuple) or not all(isinstance(a, mx.array) for a in arrays):
            raise ArgumentError(name, "a tuple of captured arrays", type(arrays).__name__)
        graph = None if text is None else parse(text)
        expected = () if graph is None else graph.arrays
        found = [(str(a.dtype).removeprefix("mlx.core.").rstrip("_"), a.shape) for a in arrays]
        if found != [(a.dtype, a.shape) for a in expected]:
            wanted = ", ".join(f"{a.dtype}{list(a.shape)}" for a in expected) or "none"
            raise ArgumentError(name, f"these captured arrays: {wanted}", found)
        if graph is not None:
            _check_indexed(name, graph.indexed, sequences, q.shape[1])
    blocks = inputs.blocks
    if config.block_mask != (blocks is not None) or not isinstance(blocks, BlockMask | None):
        expected_blocks = "a BlockMask" if config.block_mask else "None"
        raise ArgumentError("block_mask", f"{expected_blocks}, as the config says", blocks)
    if blocks is None:
        return
    batch, heads, q_len, _ = q.shape
    blocks.check(batch, heads, q_len, key_places(config, k, inputs))


def _check_indexed(name: str, indexed: dict[str, int], sequences: int, heads: int) -> None:
    """Whether captured arrays have an element for each sequence and head that indexes them.

    Where the index is computed, nothing is known of it, and one outside reads the nearest element.
    """
    for index, count, what in (("b", sequences, "sequences"), ("h", heads, "query heads")):
        fewest = indexed.get(index, count)
        if fewest < count:
            wanted = f"captured arrays with {count} elements, for {count} {what}, where {index} is"
            raise ArgumentError(name, f"{wanted} the index", fewest)


def _check_type(name: str, array: mx.array, *dtypes: mx.Dtype) -> None:
    if array.dtype not in dtypes:
        names = " or ".join(dict.fromkeys(str(d).removeprefix("mlx.core.") for d in dtypes))
        raise ArgumentError(f"{name}.dtype", names, str(array.dtype))


def _check_shape(name: str, array: mx.array, shape: tuple[int, ...]) -> None:
    if tuple(array.shape) != shape:
        raise ArgumentError(f"{name}.shape", str(shape), array.shape)


def _check_vector(name: str, array: mx.array, size: int | None, dtype: mx.Dtype) -> None:
    _check_type(name, array, dtype)
    if array.ndim != 1 or size not in (None, array.size):
        wanted = "1 axis" if size is None else f"({size},)"
        raise ArgumentError(f"{name}.shape", wanted, array.shape)
