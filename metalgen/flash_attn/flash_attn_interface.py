"""The functions of ``flash_attn.flash_attn_interface``: flash-attn 2.8's arguments and layouts.

Arrays may be NumPy's. `alibi_slopes`, `window_size` (-1 for no bound) and `softcap` (0.0 for none)
follow flash-attn. So do the masks, which are aligned at the lower right, and rows that see no key,
which are zeros. What only says how a CUDA kernel runs (`deterministic`, `num_splits`) is taken and
has no effect. FlashAttention-3's and -4's names are taken where they mean the same; `device` and
`chip` are metalgen's.
"""

from __future__ import annotations

import itertools
from typing import Any

import mlx.core as mx

from metalgen.arguments import as_integer
from metalgen.errors import ArgumentError
from metalgen.flash_attn.arguments import (
    Further,
    array,
    bounds,
    cap,
    check_heads,
    further,
    integers,
    slopes,
)
from metalgen.flash_attn.computing import Call
from metalgen.flash_attn.sequences import pages_of, split_unused, spread

Result = mx.array | tuple[mx.array, ...]

_DENSE = ("qv", "learnable_sink", "return_lse")
_VARLEN = (*_DENSE, "seqused_q", "seqused_k")


def flash_attn_func(
    q: Any,
    k: Any,
    v: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **more: Any,
) -> Result:
    """Attention of batches whose sequences are equally long.

    Args:
        q: ``(B, Lq, H, D)``, k: ``(B, Lk, Hk, D)``, v: ``(B, Lk, Hk, Dv)``; float16, bfloat16 or
            float32; Hk divides H.
        dropout_p: probability that a weight is dropped; each call drops others
            (``mx.random.seed`` repeats them).
        softmax_scale: factor of the scores; None means ``1 / sqrt(D)``.
        causal: query i sees key j when ``j <= i + Lk - Lq``.
        window_size: keys that a query sees to the left and to the right of its own; -1: all.
        softcap: C above 0: a scaled score x becomes ``C * tanh(x / C)``.
        alibi_slopes: ``(H,)`` or ``(B, H)``: a score falls by ``slope * |i + Lk - Lq - j|``.
        deterministic: no effect: results are always the same from call to call.
        return_attn_probs: return log-sum-exp and weights, too.
        more: `qv`, `learnable_sink`, `return_lse`, `num_splits`, `pack_gqa`, `sm_margin`, `device`,
            `chip` (`metalgen.flash_attn.arguments.Further`).

    Returns:
        ``(B, Lq, H, Dv)`` of the type of `q`. With `return_lse` a pair with the log-sum-exp,
        ``(B, H, Lq)`` float32, -inf in rows that see no key. With `return_attn_probs` three, the
        last being the weights ``(B, H, Lq, Lk)``, negative where they were dropped; empty without
        dropout, as flash-attn has it.

    Raises:
        ArgumentError: shapes, types or values that cannot be used.
    """
    own = further("flash_attn_func", more, *_DENSE)
    q, k, v = (array(name, x, 4, "(B, L, H, D)") for name, x in (("q", q), ("k", k), ("v", v)))
    q, k, scale = _with_qv(q, k, v, own.qv, softmax_scale)
    check_heads(q, k, v)
    if k.shape[0] != q.shape[0]:
        raise ArgumentError("k.shape", f"a batch of {q.shape[0]}, as q has", k.shape)
    call = Call(
        q.swapaxes(1, 2),
        k.swapaxes(1, 2),
        v.swapaxes(1, 2),
        options=_options(own, dropout_p, causal, window_size, softcap),
        scale=scale,
        slopes=slopes(alibi_slopes, q.shape[0], q.shape[2]),
    )
    out, lse = call.run()
    out = out.swapaxes(1, 2)
    if return_attn_probs:
        some = call.probabilities(k.shape[1]) if dropout_p else mx.zeros((0,), q.dtype)
        return out, lse, some
    return (out, lse) if own.return_lse else out


def flash_attn_kvpacked_func(
    q: Any,
    kv: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **more: Any,
) -> Result:
    """`flash_attn_func` of keys and values in one array, ``(B, Lk, 2, Hk, D)``."""
    keys, values = _unpacked("kv", kv, 5, 2)
    return flash_attn_func(
        *(q, keys, values, dropout_p, softmax_scale, causal, window_size, softcap),
        *(alibi_slopes, deterministic, return_attn_probs),
        **more,
    )


def flash_attn_qkvpacked_func(
    qkv: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **more: Any,
) -> Result:
    """`flash_attn_func` of all three in one array.

    Args:
        qkv: ``(B, L, 3, H, D)``; with FlashAttention-3's `num_heads_q` ``(B, L, H + 2 Hk, D)``.
    """
    num_heads_q = more.pop("num_heads_q", None)
    if num_heads_q is not None:
        q, k, v = _by_heads(array("qkv", qkv, 4, "(B, L, H + 2 Hk, D)"), num_heads_q)
    else:
        q, k, v = _unpacked("qkv", qkv, 5, 3)
    return flash_attn_func(
        *(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap),
        *(alibi_slopes, deterministic, return_attn_probs),
        **more,
    )


def flash_attn_varlen_func(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any = None,
    max_seqlen_k: Any = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Any = None,
    **more: Any,
) -> Result:
    """Attention of packed sequences of several lengths.

    Args:
        q: ``(Tq, H, D)``, k: ``(Tk, Hk, D)``, v: ``(Tk, Hk, Dv)``: the sequences, one after the
            other. With a `block_table` k and v are pages ``(pages, page_size, Hk, D)`` of any size.
        cu_seqlens_q, cu_seqlens_k: ``(N + 1,)``, where each starts, and the end of the last. With a
            `block_table` only the differences of `cu_seqlens_k` matter: the lengths.
        max_seqlen_q, max_seqlen_k: the longest sequence; choose among tuned kernels, nothing else.
        block_table: ``(N, M)``, the pages of each sequence, in order.
        more: as in `flash_attn_func`; also `seqused_q` and `seqused_k`, ``(N,)``, how many rows of
            each sequence are used (others of q give zeros), and `page_table` for `block_table`.
        dropout_p, softmax_scale, causal, window_size, softcap: as in `flash_attn_func`.
        alibi_slopes: ``(H,)`` or ``(N, H)``.
        deterministic, return_attn_probs: as in `flash_attn_func`.

    Returns:
        ``(Tq, H, Dv)``; with `return_lse` also the log-sum-exp, ``(H, Tq)``; with
        `return_attn_probs` also the weights, ``(N, H, longest q, longest k)``, zeros beyond each
        sequence's own, or empty without dropout.

    Raises:
        ArgumentError: shapes, types or values that cannot be used.
    """
    table = more.pop("page_table", None)
    block_table = table if block_table is None else block_table
    own = further("flash_attn_varlen_func", more, *_VARLEN)
    q = array("q", q, 3, "(T, H, D)")
    axes, layout = (3, "(T, H, D)") if block_table is None else (4, "(pages, page_size, H, D)")
    k, v = (array(name, x, axes, layout) for name, x in (("k", k), ("v", v)))
    q, k, scale = _with_qv(q, k, v, own.qv, softmax_scale)
    check_heads(q, k, v)
    cu_q, cu_k = (
        integers(name, x, 1)
        for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k))
    )
    if cu_k.shape != cu_q.shape or cu_q.size < 2:
        expected = f"{cu_q.shape}, as cu_seqlens_q has" if cu_q.size > 1 else "2 elements or more"
        raise ArgumentError("cu_seqlens_k.shape", expected, cu_k.shape)
    sequences = cu_q.size - 1
    packed = _Packed(own, cu_q, cu_k, block_table)
    call = packed.call(q, k, v, scale, slopes(alibi_slopes, sequences, q.shape[1]))
    call.options.update(_options(own, dropout_p, causal, window_size, softcap))
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if not isinstance(longest, mx.array) and longest is not None:
            call.options[name] = _length(name, longest)
    out, lse = call.run()
    out, lse = out[0].swapaxes(0, 1), lse[0]
    if return_attn_probs:
        some = mx.zeros((0,), q.dtype)
        if dropout_p:
            if block_table is not None:
                expected = "False with a block_table and dropout"
                raise ArgumentError("return_attn_probs", expected, True)
            some = _of_sequences(call.probabilities(k.shape[0])[0], cu_q, cu_k)
        return out, lse, some
    return (out, lse) if own.return_lse else out


def flash_attn_varlen_kvpacked_func(
    q: Any,
    kv: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any = None,
    max_seqlen_k: Any = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **more: Any,
) -> Result:
    """`flash_attn_varlen_func` of keys and values in one array, ``(Tk, 2, Hk, D)``."""
    keys, values = _unpacked("kv", kv, 4, 2)
    return flash_attn_varlen_func(
        *(q, keys, values, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p),
        *(softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic),
        return_attn_probs,
        **more,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Any,
    cu_seqlens: Any,
    max_seqlen: Any = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **more: Any,
) -> Result:
    """`flash_attn_varlen_func` of all three in one array, ``(T, 3, H, D)``."""
    q, k, v = _unpacked("qkv", qkv, 4, 3)
    return flash_attn_varlen_func(
        *(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale),
        *(causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs),
        **more,
    )


def flash_attn_combine(
    out_partial: Any, lse_partial: Any, out: None = None, out_dtype: mx.Dtype | None = None
) -> tuple[mx.array, mx.array]:
    """Attention over all keys, of attention over parts of them (FlashAttention-3).

    Args:
        out_partial: ``(parts, B, L, H, D)``, or without B; lse_partial: ``(parts, B, L, H)``.
        out: not supported: MLX has no outputs that the caller allocates.
        out_dtype: of the output; None: that of `out_partial`.

    Returns:
        ``(B, L, H, D)`` and the log-sum-exp ``(B, L, H)``.
    """
    if out is not None:
        raise ArgumentError("out", "None: the result is returned", type(out).__name__)
    parts, lses = array("out_partial", out_partial), array("lse_partial", lse_partial)
    if lses.shape != parts.shape[:-1]:
        raise ArgumentError("lse_partial.shape", str(parts.shape[:-1]), lses.shape)
    lse = mx.logsumexp(lses.astype(mx.float32), axis=0)
    shares = mx.where(lse == -mx.inf, 0.0, mx.exp(lses - mx.where(lse == -mx.inf, 0.0, lse)))
    whole = (parts.astype(mx.float32) * shares[..., None]).sum(axis=0)
    return whole.astype(out_dtype or parts.dtype), lse


class _Packed:
    """Packed sequences, as one call takes them."""

    def __init__(self, own: Further, cu_q: mx.array, cu_k: mx.array, table: Any) -> None:
        lengths = cu_k[1:] - cu_k[:-1]
        used_q, used_k = own.seqused_q, own.seqused_k
        for name, used in (("seqused_q", used_q), ("seqused_k", used_k)):
            if used is not None and used.size != cu_q.size - 1:
                raise ArgumentError(f"{name}.shape", f"({cu_q.size - 1},)", used.shape)
        self.queries = cu_q[1:] - cu_q[:-1] if used_q is None else used_q
        self.keys = lengths if used_k is None else mx.minimum(used_k, lengths)
        self.table = None if table is None else integers("block_table", table, 2)
        if self.table is not None and self.table.shape[0] != cu_q.size - 1:
            expected = f"({cu_q.size - 1}, pages of a sequence)"
            raise ArgumentError("block_table.shape", expected, self.table.shape)
        self.split = used_q is not None or (used_k is not None and self.table is None)
        self.cu_q: mx.array = cu_q
        self.cu_k: mx.array | None = None if self.table is not None else cu_k
        if self.split:
            self.cu_q, self.cu_k = split_unused(cu_q, self.cu_k, used_q, used_k)

    def call(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        scale: float | None,
        slopes: mx.array | None,
    ) -> Call:
        options: dict[str, Any] = {"cu_seqlens_q": self.cu_q}
        if self.table is not None:
            (k, table), (v, _) = pages_of(k, self.table), pages_of(v, self.table)
            options["block_table"] = self._of_parts(table, -1)
            options["kv_lens"] = self._of_parts(self.keys, 0)
        else:
            k, v = k[None], v[None]
            options["cu_seqlens_k"] = self.cu_k
        if slopes is not None and slopes.ndim == 2:
            slopes = self._of_parts(slopes, 0)
        return Call(
            q.swapaxes(0, 1)[None],
            k.swapaxes(1, 2),
            v.swapaxes(1, 2),
            options=options,
            scale=scale,
            slopes=slopes,
        )

    def _of_parts(self, x: mx.array, other: int) -> mx.array:
        return spread(x, other) if self.split else x


def _options(
    own: Further, dropout_p: float, causal: bool, window_size: Any, softcap: float
) -> dict[str, Any]:
    """Options of `metalgen.attention` that all calls have in common."""
    found: dict[str, Any] = {"device": own.device, "chip": own.chip, **bounds(causal, window_size)}
    if (capped := cap(softcap)) is not None:
        found["softcap"] = capped
    if dropout_p:
        found["dropout"] = dropout_p
        # One key for the output and the weights; another one in each call.
        found["dropout_key"] = mx.random.randint(0, 1 << 31, (2,)).astype(mx.uint32)
    if own.learnable_sink is not None:
        found["sinks"] = own.learnable_sink
    return found


def _with_qv(
    q: mx.array, k: mx.array, v: mx.array, qv: mx.array | None, scale: float | None
) -> tuple[mx.array, mx.array, float | None]:
    """Queries and keys with `qv` and the values behind them: the product is ``q k^T + qv v^T``."""
    if qv is None:
        return q, k, scale
    if qv.shape != (*q.shape[:-1], v.shape[-1]):
        raise ArgumentError("qv.shape", str((*q.shape[:-1], v.shape[-1])), qv.shape)
    return mx.concatenate([q, qv], axis=-1), mx.concatenate([k, v], axis=-1), scale


def _unpacked(name: str, x: Any, axes: int, parts: int) -> tuple[mx.array, ...]:
    """The parts of an array that has them along its third axis from behind."""
    layout = "(B, L, {}, H, D)" if axes == 5 else "(T, {}, H, D)"
    x = array(name, x, axes, layout.format(parts))
    if x.shape[-3] != parts:
        raise ArgumentError(f"{name}.shape", f"{layout.format(parts)}", x.shape)
    return tuple(x[..., n, :, :] for n in range(parts))


def _by_heads(qkv: mx.array, num_heads_q: Any) -> tuple[mx.array, ...]:
    """The parts of an array that has the heads of all three one after the other."""
    heads = as_integer(num_heads_q)
    rest = 0 if heads is None else qkv.shape[2] - heads
    if heads is None or heads < 1 or rest < 2 or rest % 2:
        expected = f"a number of query heads that leaves keys and values as many of {qkv.shape[2]}"
        raise ArgumentError("num_heads_q", expected, num_heads_q)
    middle = heads + rest // 2
    return qkv[:, :, :heads], qkv[:, :, heads:middle], qkv[:, :, middle:]


def _length(name: str, length: Any) -> int:
    number = as_integer(length)
    if number is None or number < 0:
        raise ArgumentError(name, "a length", length)
    return number


def _of_sequences(weights: mx.array, cu_q: mx.array, cu_k: mx.array) -> mx.array:
    """Weights ``(H, Tq, Tk)`` of packed sequences, each by itself; waits for the lengths."""
    starts: list[Any] = [x.tolist() for x in (cu_q, cu_k)]
    longest = [max(b - a for a, b in itertools.pairwise(x)) for x in starts]
    found = []
    for n in range(len(starts[0]) - 1):
        (q0, q1), (k0, k1) = (x[n : n + 2] for x in starts)
        own = weights[:, q0:q1, k0:k1]
        found.append(mx.pad(own, [(0, 0), (0, longest[0] - q1 + q0), (0, longest[1] - k1 + k0)]))
    return mx.stack(found)
