"""Attention for arrays: the config is read off them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import mlx.core as mx

from metalgen.calls.options import Keys, Options, SharedOptions
from metalgen.calls.request import call
from metalgen.calls.request import explain as _explain
from metalgen.errors import ArgumentError, MissingArgument
from metalgen.features.conversions import integers

if TYPE_CHECKING:
    from metalgen.problem.block_mask import BlockMask


@overload
def attention(
    q: mx.array,
    k: Keys,
    v: Keys,
    *,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    **options: Unpack[Options],
) -> mx.array: ...


@overload
def attention(
    q: mx.array,
    k: Keys,
    v: Keys,
    *,
    scale: float | None = None,
    return_lse: Literal[True],
    **options: Unpack[Options],
) -> tuple[mx.array, mx.array]: ...


@overload
def attention(
    q: mx.array,
    k: Keys,
    v: Keys,
    *,
    scale: float | None = None,
    return_lse: bool,
    **options: Unpack[Options],
) -> mx.array | tuple[mx.array, mx.array]: ...


def attention(
    q: mx.array,
    k: Keys,
    v: Keys,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    **options: Unpack[Options],
) -> mx.array | tuple[mx.array, mx.array]:
    """Scaled dot-product attention by the best known kernel, as `metalgen.get_kernel` finds it.

    Everything may be combined, unless said otherwise. Changes of a score come in this order: scale,
    softcap, ALiBi, bias; then all masks; then the sink. Below, N is the number of sequences: B, or
    what `cu_seqlens_q` cuts out. Integers of any width and floats of any type are taken where
    int32 and float32 are named. Contents are not looked at unless with `check`, for that would
    wait for the GPU; whatever they are, nothing outside of the arrays is read.

    Args:
        q: ``(B, H, Lq, D)``, k: ``(B, Hkv, Lk, D)``, v: ``(B, Hkv, Lk, Dv)``, heads before rows
            (arrays (B, L, H, D) whose shapes happen to fit give a different result). float32,
            float16 or bfloat16; Hkv divides H; any strides. Different types are promoted as in
            MLX. D and Dv outside of 8 to 576, and float64, go to MLX's function with the options
            that it has (masks, windows, sinks), and `explain` says so. For quantized keys and
            values, pass instead of k and v what ``mx.quantize`` returns with 4 or 8 bits and groups
            of 32, 64 or 128: packed words, scales and biases. Bits and groups of k and v may
            differ. For pages see `block_table`.
        scale: factor of the scores; None means ``1 / sqrt(D)``.
        causal: query i sees key j when ``j <= i + kv_len - q_len``.
        window_left, window_right: a sliding window: query i sees key j only when
            ``i + kv_len - q_len - window_left <= j <= i + kv_len - q_len + window_right``.
            (For a causal window of W keys that includes the query's own, pass ``causal=True`` and
            ``window_left=W - 1``.)
        softcap: C; a scaled score x becomes ``C * tanh(x / C)``.
        alibi_slopes: ``(H,)``, or ``(N, H)`` for each sequence; a score falls by
            ``slope * |i + kv_len - q_len - j|`` (`metalgen.alibi_slopes` gives the usual ones).
        bias: added to the scores; float32 or q's type; ``(B, H, Lq, Lk)``, or fewer axes, or 1 for
            any, by NumPy's rules of broadcasting.
        mask: as in ``mx.fast.scaled_dot_product_attention``: ``"causal"``, or an array of the same
            shapes, whose booleans say whether a key is seen and whose floats are a bias; or what
            `create_block_mask` returned. Tiles of a boolean array in which no key is seen are
            skipped with its block mask, and in calls of 4 million scores or more also without.
        sinks: ``(H,)``; a logit per head that takes part in the softmax and in the log-sum-exp,
            without a value (gpt-oss).
        dropout: probability that a weight is dropped; the others are divided by ``1 - dropout``.
        dropout_key: ``(2,)`` uint32, such as ``mx.random.key(0)``: one key drops the same weights
            on every device. None: drawn from MLX's own generator (``mx.random.seed``).
        cu_seqlens_q: ``(N + 1,)`` int32: packed sequences of several lengths, one after the other
            in q, k and v ``(1, H, T, D)``. Sequence n is rows ``cu_seqlens_q[n]`` up to
            ``cu_seqlens_q[n + 1]``; the first is 0; rows after the last are zeros. (flash-attn's
            layout ``(T, H, D)``: `metalgen.varlen_attention`.) Not with `bias`, array masks,
            `max_work`.
        cu_seqlens_k: likewise for k and v; None: as `cu_seqlens_q`.
        max_seqlen_q, max_seqlen_k: length of the longest sequence, if known; it only chooses among
            tuned kernels.
        kv_lens: ``(N,)`` int32, the number of keys of each sequence. The rest of k and v is never
            read, and masks align with that length. (For packed keys: `cu_seqlens_k` instead.)
        kv_starts: ``(N,)`` int32, the first valid key of each sequence, as in a batch padded on the
            left. The keys before it are never read, and tiles of them are skipped. Keys and
            queries are counted as without it. Also for pages and packed keys.
        q_offset: an integer, or ``(N,)`` int32. Query i has the number ``q_offset + i`` in its
            sequence, as in a block of a longer one: for causal masks, windows and ALiBi instead of
            ``i + kv_len - q_len``, for dropout and functions instead of i, and by default for
            `rope`. Any integer; a query before all keys sees none of them causally. Not with block
            masks of functions.
        seqused_q: ``(N,)`` int32, the number of queries of each sequence. Its other rows of q are
            never read, and give zeros; ``q_len`` above is that number.
        block_table: ``(N, M)`` int32: paged keys and values. k and v are pages ``(pages, Hkv,
            page_size, D)``, quantized or not, of 8 to 65,536 keys, a multiple of 8; key j of
            sequence n is row ``j % page_size`` of page ``block_table[n, j // page_size]``; a number
            that is no page's, such as -1, stands for keys that are not seen. With `kv_lens`.
        rope: `metalgen.Rope`; the kernel rotates the queries by their positions. The keys must
            already be rotated.
        deterministic: the bits of a row depend only on its own sequence and on whether there are
            more than 64 queries (packed: on `max_seqlen_q`, if given).
        tf32: float32 products of CUDA kernels may keep 11 bits of each factor.
        max_work: the largest number of scores (queries times keys of all heads) that one dispatch
            computes; a larger call is cut into several. It keeps a GPU responsive that also drives
            a display.
        value_head_dim: Dv. None: read off the shape of v; quantized values are assumed to be
            quantized like keys if their shapes allow it, and otherwise to have D columns. Pass it
            if that is wrong: 64 columns of 8 bits look like 128 columns of 4 bits in groups twice
            as large.
        check: also check contents: impossible lengths, tables, offsets and numbers are errors.
        return_lse: also return the log-sum-exp, ``(B, H, Lq)``, float32.
        device: ``"metal"``, ``"cuda"``, ``"simulator"``, ``"reference"``; None: this machine's
            GPU, or plain MLX operations if there is none.
        chip: chip whose tuning records to use; None means this machine's.
        stream: where to compute, as in MLX's functions; ``mx.cpu`` means plain MLX operations.

    Returns:
        ``(B, H, Lq, Dv)`` of the type of `q`, zeros in rows that see no key; with `return_lse` a
        pair. Differentiable in q, k, v, alibi_slopes, bias and sinks; `Kernel.backward` says how.

    Raises:
        ArgumentError: shapes, types, names or (with `check`) contents that cannot be used.
        DeviceError: the device is not available here.
    """
    return call("attention", q, k, v, scale, return_lse, options)


def explain(
    q: mx.array,
    k: Keys,
    v: Keys,
    *,
    return_lse: bool = False,
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    block_mask: BlockMask | None = None,
    **options: Unpack[Options],
) -> str:
    """What `attention` or `flex_attention` of the same arguments runs, and why; one step a line.

    `Kernel.explain` of the kernel that the call gets; and how types that differ are promoted, or
    why no kernel takes the call and MLX's own function computes it.

    Args:
        q, k, v, return_lse, options: as of `attention`. Nothing is computed, but a kernel that was
            never checked on this device is checked now.
        score_mod, mask_mod, block_mask: as of `flex_attention`.

    Raises:
        ArgumentError: what `attention` raises.
        FunctionError: what `flex_attention` raises.
        DeviceError: the device is not available here.
    """
    if score_mod is None and mask_mod is None and block_mask is None:
        return _explain("explain", q, k, v, return_lse, options)
    from metalgen.ops.flex_attention import functions_of

    functions = functions_of(score_mod, mask_mod, block_mask)
    return _explain("explain", q, k, v, return_lse, options, functions)


@overload
def varlen_attention(
    q: mx.array,
    k: Keys,
    v: Keys,
    cu_seqlens_q: mx.array,
    cu_seqlens_k: mx.array | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    **options: Unpack[SharedOptions],
) -> mx.array: ...


@overload
def varlen_attention(
    q: mx.array,
    k: Keys,
    v: Keys,
    cu_seqlens_q: mx.array,
    cu_seqlens_k: mx.array | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    scale: float | None = None,
    return_lse: Literal[True],
    **options: Unpack[SharedOptions],
) -> tuple[mx.array, mx.array]: ...


@overload
def varlen_attention(
    q: mx.array,
    k: Keys,
    v: Keys,
    cu_seqlens_q: mx.array,
    cu_seqlens_k: mx.array | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    scale: float | None = None,
    return_lse: bool,
    **options: Unpack[SharedOptions],
) -> mx.array | tuple[mx.array, mx.array]: ...


def varlen_attention(
    q: mx.array,
    k: Keys,
    v: Keys,
    cu_seqlens_q: mx.array,
    cu_seqlens_k: mx.array | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    **options: Unpack[SharedOptions],
) -> mx.array | tuple[mx.array, mx.array]:
    """Attention of packed sequences in the layout of ``flash_attn_varlen_func``: heads second.

    The same as `attention` with `cu_seqlens_q`, which takes heads first.

    Args:
        q: ``(Tq, H, D)``, k: ``(Tk, Hkv, D)``, v: ``(Tk, Hkv, Dv)``: the sequences, one after the
            other. With a block_table k and v are pages ``(pages, page_size, Hkv, D)``. Quantized
            keys and values are triples of such arrays.
        cu_seqlens_q, cu_seqlens_k: ``(N + 1,)``, where they start, and the end of the last. With a
            block_table the differences of `cu_seqlens_k` are the lengths, unless kv_lens says them.
        max_seqlen_q, max_seqlen_k: the longest sequence, where it is known: it chooses among tuned
            kernels, and nothing else.
        scale, options: as in `attention`.
        return_lse: also return the log-sum-exp, ``(H, Tq)``, float32.

    Returns:
        ``(Tq, H, Dv)`` of the type of `q`; with `return_lse` a pair.

    Raises:
        ArgumentError: shapes (said as `attention` takes them), types or names that cannot be used.
        DeviceError: the device is not available here.
    """
    paged = options.get("block_table") is not None
    if integers("cu_seqlens_q", cu_seqlens_q, 1) is None:
        raise MissingArgument("cu_seqlens_q", "(where each sequence starts, and the last one ends)")
    stops = integers("cu_seqlens_k", cu_seqlens_k, 1)
    if stops is not None and stops.shape != cu_seqlens_q.shape:
        expected = f"{cu_seqlens_q.shape}, as cu_seqlens_q has"
        raise ArgumentError("cu_seqlens_k.shape", expected, stops.shape)
    if paged and options.get("kv_lens") is None and stops is not None:
        options["kv_lens"], cu_seqlens_k = stops[1:] - stops[:-1], None
    result = call(
        "varlen_attention",
        _heads_first("q", q, paged=False),
        _all_heads_first("k", k, paged),
        _all_heads_first("v", v, paged),
        scale,
        return_lse,
        Options(
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            **options,
        ),
    )
    if isinstance(result, tuple):
        return result[0][0].swapaxes(0, 1), result[1][0]
    return result[0].swapaxes(0, 1)


def _all_heads_first(name: str, x: Keys, paged: bool) -> Keys:
    if isinstance(x, (tuple, list)):
        return [_heads_first(f"{name}[{n}]", part, paged) for n, part in enumerate(x)]
    return _heads_first(name, x, paged)


def _heads_first(name: str, x: mx.array, paged: bool) -> mx.array:
    if not isinstance(x, mx.array):
        raise ArgumentError(name, "an mlx.core.array", type(x).__name__)
    axes = "(pages, page_size, H, D)" if paged else "(T, H, D)"
    if x.ndim != (4 if paged else 3):
        raise ArgumentError(f"{name}.shape", f"{4 if paged else 3} axes {axes}", x.shape)
    return x.swapaxes(1, 2) if paged else x.swapaxes(0, 1)[None]
