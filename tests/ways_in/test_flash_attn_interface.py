"""The rest of flash-attn's interface: further names, padding, rotary tables, modules, bad calls."""

from __future__ import annotations

import random
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from flash_cases import Asked, attention, exact, mask_and_bias, rotated
from mlx.utils import tree_flatten

import metalgen
from metalgen import ArgumentError
from metalgen import flash_attn as fa
from metalgen.flash_attn import bert_padding
from metalgen.flash_attn.layers import rotary
from metalgen.flash_attn.modules.mha import MHA, FlashSelfAttention, InferenceParams
from metalgen.testing.devices import normal


def close(got: Any, wanted: Any, atol: float = 3e-5) -> None:
    np.testing.assert_allclose(np.array(got), wanted, rtol=0, atol=atol)


def qkv(q_len: int = 6, kv_len: int = 9, heads: int = 4, width: int = 32) -> list[mx.array]:
    shapes = (2, q_len, heads, width), (2, kv_len, 2, width), (2, kv_len, 2, width)
    return [normal(shape, "float32", n) for n, shape in enumerate(shapes)]


def by_definition(ask: Asked, q: Any, k: Any, v: Any) -> Any:
    found = []
    for b in range(len(q)):
        seen, bias = mask_and_bias(ask, b, q.shape[2], q.shape[1], k.shape[1])
        found.append(attention(q[b], k[b], v[b], seen, bias, ask.softcap)[0])
    return np.stack(found)


def test_arrays_of_numpy_are_taken() -> None:
    arrays = [exact(x).astype(np.float32) for x in qkv()]
    out = fa.flash_attn_func(*arrays, causal=True)
    assert isinstance(out, mx.array)
    close(out, by_definition(Asked(True), *arrays))
    with pytest.raises(ArgumentError, match="k_cache: expected an mlx.core.array, which can be"):
        fa.flash_attn_with_kvcache(*arrays, *(x[:, :1] for x in arrays[1:]), cache_seqlens=3)
    out, k, _ = fa.flash_attn_with_kvcache(
        *arrays, *(x[:, :1] for x in arrays[1:]), cache_seqlens=3, return_caches=True
    )
    close(k[:, 3], arrays[1][:, 0])


@pytest.mark.parametrize("width", [4, 7])
def test_narrow_rows_are_padded_as_flash_attn_does(device: str, width: int) -> None:
    q, k, v = qkv(width=width)
    out = fa.flash_attn_func(q, k, v, device=device)
    close(out, by_definition(Asked(), *(exact(x) for x in (q, k, v))))


def test_names_of_flash_attention_3_and_4_mean_the_same() -> None:
    q, k, v = qkv()
    plain = fa.flash_attn_func(q, k, v, causal=True)
    more = {"num_splits": 3, "pack_gqa": True, "sm_margin": 2, "attention_chunk": 0}
    out, lse = fa.flash_attn_func(q, k, v, causal=True, **more, q_descale=None, return_lse=True)
    assert mx.array_equal(out, plain)
    assert lse.shape == (2, 4, 6)
    close(fa.flash_attn_func(q, k, v, window_size=(None, 0)), np.array(plain))
    joined = mx.concatenate([k, k, v, v], axis=2)[:, :6]
    by_heads = fa.flash_attn_qkvpacked_func(
        mx.concatenate([q, joined[:, :, :2], joined[:, :, 4:6]], axis=2), num_heads_q=4
    )
    close(by_heads, by_definition(Asked(), *(exact(x) for x in (q, k[:, :6], v[:, :6]))))
    sinks = mx.array([0.5, 1.0, -1.0, 2.0])
    with_sinks = fa.flash_attn_func(q, k, v, learnable_sink=sinks)
    heads_first = [x.swapaxes(1, 2) for x in (q, k, v)]
    wanted = mx.fast.scaled_dot_product_attention(*heads_first, scale=32**-0.5, sinks=sinks)
    close(with_sinks, np.array(wanted.swapaxes(1, 2)))
    qv = normal((2, 6, 4, 32), "float32", 9)
    latent = exact(fa.flash_attn_func(q, k, v, qv=qv))
    wide = [np.concatenate([exact(x), exact(y)], -1) for x, y in ((q, qv), (k, v))]
    close(latent, by_definition(Asked(), *wide, exact(v)))


def test_parts_are_combined() -> None:
    q, k, v = qkv()
    parts = [fa.flash_attn_func(q, k[:, s], v[:, s], return_lse=True) for s in PARTS]
    outs, lses = (mx.stack(x) for x in zip(*parts, strict=True))
    out, lse = fa.flash_attn_combine(outs, lses.swapaxes(2, 3))
    whole, whole_lse = fa.flash_attn_func(q, k, v, return_lse=True)
    close(out, np.array(whole))
    close(lse.swapaxes(1, 2), np.array(whole_lse))


PARTS = (slice(0, 4), slice(4, 9), slice(9, 9))


def test_weights_are_negative_where_they_were_dropped(device: str) -> None:
    q, k, v = qkv()
    out, lse, weights = fa.flash_attn_func(q, k, v, 0.4, return_attn_probs=True, device=device)
    scores = np.einsum("bihd,bjhd->bhij", exact(q), np.repeat(exact(k), 2, 2)) * 32**-0.5
    whole = np.exp(scores - np.array(lse)[..., None])
    close(np.abs(np.array(weights)), whole)
    kept = np.where(np.array(weights) > 0, whole / 0.6, 0.0)
    close(out, np.einsum("bhij,bjhd->bihd", kept, np.repeat(exact(v), 2, 2)))
    share = (np.array(weights) > 0).mean()
    assert 0.4 < share < 0.8
    assert fa.flash_attn_func(q, k, v, return_attn_probs=True)[2].size == 0
    flat = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
    starts = mx.array([0, 6, 12]), mx.array([0, 9, 18])
    _, lse, some = fa.flash_attn_varlen_func(*flat, *starts, 6, 9, 0.4, return_attn_probs=True)
    assert lse.shape == (4, 12)
    close(np.abs(np.array(some)), whole)


def test_lengths_of_a_cache_may_be_numbers() -> None:
    q, k, v = qkv(1)
    one = fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=5)
    close(one, by_definition(Asked(), *(exact(x) for x in (q, k[:, :5], v[:, :5]))))
    assert mx.array_equal(one, fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=mx.array([5, 5])))
    whole = fa.flash_attn_with_kvcache(q, k, v)
    close(whole, by_definition(Asked(), *(exact(x) for x in (q, k, v))))


def test_a_compiled_step_returns_its_caches() -> None:
    q, k, v = qkv(1)

    @mx.compile
    def step(q: mx.array, k: mx.array, v: mx.array, new: mx.array, at: mx.array) -> Any:
        return fa.flash_attn_with_kvcache(q, k, v, new, new, cache_seqlens=at, return_caches=True)

    new = normal((2, 1, 2, 32), "float32", 5)
    out, keys, _ = step(q, k, v, new, mx.array([4, 2]))
    close(keys[0, 4], exact(new)[0, 0])
    close(keys[1, 2], exact(new)[1, 0])
    again = fa.flash_attn_with_kvcache(q, k, v, new, new, cache_seqlens=mx.array([4, 2]))
    close(out, np.array(again))
    close(k, np.array(keys))  # the call that is not compiled wrote into its own


def test_rows_without_a_place_are_dropped() -> None:
    q, k, v = qkv(2)
    before = exact(k)
    new = normal((2, 2, 2, 32), "float32", 5)
    fa.flash_attn_with_kvcache(q, k, v, new, new, cache_seqlens=mx.array([8, 3]))
    before[0, 8] = exact(new)[0, 0]
    before[1, 3:5] = exact(new)[1]
    close(k, before)


BAD: dict[str, tuple[Any, str]] = {
    "a list": (lambda q, k, v: fa.flash_attn_func([1.0], k, v), "q: expected an mlx.core.array"),
    "three axes": (lambda q, k, v: fa.flash_attn_func(q[0], k, v), r"q.shape: expected 4 axes \(B"),
    "heads": (
        lambda q, k, v: fa.flash_attn_func(q[:, :, :3], k, v),
        "k.shape: expected a number of heads that divides the 3 of q",
    ),
    "widths": (lambda q, k, v: fa.flash_attn_func(q[..., :8], k, v), "a last axis of 8"),
    "batches": (lambda q, k, v: fa.flash_attn_func(q[:1], k, v), "k.shape: expected a batch of 1"),
    "types": (lambda q, k, v: fa.flash_attn_func(q, k, v.astype(mx.float16)), "v.dtype"),
    "a window": (lambda *x: fa.flash_attn_func(*x, window_size=3), r"window_size: .*\(left, right"),
    "slopes": (
        lambda *x: fa.flash_attn_func(*x, alibi_slopes=mx.ones((3,))),
        r"alibi_slopes.shape: expected \(4,\) or \(2, 4\)",
    ),
    "softcap": (lambda *x: fa.flash_attn_func(*x, softcap=None), "softcap: expected a number"),
    "fp8": (lambda *x: fa.flash_attn_func(*x, q_descale=mx.ones(2)), "q_descale: expected None or"),
    "packed": (lambda q, k, v: fa.flash_attn_kvpacked_func(q, k[:, :, None]), r"\(B, L, 2, H, D\)"),
    "starts": (
        lambda q, k, v: fa.flash_attn_varlen_func(
            q[0], k[0], v[0], mx.array([0, 6]), mx.array([0])
        ),
        "cu_seqlens_k.shape",
    ),
    "no lengths": (
        lambda q, k, v: fa.flash_attn_with_kvcache(q, k, v, k, v),
        "cache_seqlens: expected rows that there are already",
    ),
    "no values": (
        lambda q, k, v: fa.flash_attn_with_kvcache(q, k, v, k, cache_seqlens=0),
        "v: expected new values",
    ),
    "no keys to rotate": (
        lambda q, k, v: fa.flash_attn_with_kvcache(
            q, k, v, rotary_cos=mx.ones((9, 8)), rotary_sin=mx.ones((9, 8)), cache_seqlens=2
        ),
        "k: expected new keys to rotate",
    ),
    "two tables": (
        lambda q, k, v: fa.flash_attn_with_kvcache(
            *(q, k, v),
            cache_seqlens=2,
            cache_batch_idx=mx.array([0, 1]),
            block_table=mx.array([[0], [1]]),
        ),
        "cache_batch_idx: expected None with a block_table",
    ),
    "another batch": (
        lambda q, k, v: fa.flash_attn_with_kvcache(q[:1], k, v),
        "k_cache.shape: expected a batch of 1",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_are_complained_about_in_the_caller_s_words(case: str) -> None:
    call, message = BAD[case]
    q, k, v = qkv()
    with pytest.raises(ArgumentError, match=message):
        call(q, k, v)


def test_an_unknown_name_comes_with_the_nearest() -> None:
    with pytest.raises(TypeError, match=r"'num_split'; did you mean 'num_splits'\?"):
        fa.flash_attn_func(*qkv(), num_split=1)


def test_a_padded_batch_becomes_packed_rows_and_back() -> None:
    x = normal((3, 5, 2, 4), "float32", 1)
    mask = mx.array([[1, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]])
    rows, indices, starts, longest, used = bert_padding.unpad_input(x, mask)
    assert indices.tolist() == [0, 1, 4, 10, 11, 12, 13]
    assert (starts.tolist(), longest, used.tolist()) == ([0, 3, 3, 7], 4, [3, 0, 4])
    close(rows, exact(x).reshape(15, 2, 4)[[0, 1, 4, 10, 11, 12, 13]])
    back = bert_padding.pad_input(rows, indices, 3, 5)
    close(back, exact(x) * np.array(mask)[..., None, None])
    unused = mx.array([[0, 0, 1, 0, 0]] + [[0] * 5] * 2)
    _, indices, starts, _, used = bert_padding.unpad_input(x, mask == 1, unused)
    assert (starts.tolist(), used.tolist()) == ([0, 4, 4, 8], [3, 0, 4])
    in_length = mx.array([[2, 1, 0, 0, 0], [5, 0, 0, 0, 0], [1, 1, 1, 0, 0]])
    rows, indices, starts, longest = bert_padding.unpad_input_for_concatenated_sequences(
        x, in_length
    )
    assert indices.tolist() == [0, 1, 2, 5, 6, 7, 8, 9, 10, 11, 12]
    assert (starts.tolist(), longest) == ([0, 2, 3, 8, 9, 10, 11], 5)
    grad = mx.grad(lambda x: (bert_padding.unpad_input(x, mask)[0] ** 2).sum())(x)
    close(grad, 2 * exact(x) * np.array(mask)[..., None, None])
    with pytest.raises(ArgumentError, match=r"attention_mask.shape: expected \(3, 5\)"):
        bert_padding.unpad_input(x, mask[:2])


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_tables_turn_rows_by_their_positions(interleaved: bool) -> None:
    draw = random.Random(1)
    x = normal((2, 5, 3, 32), "float32", 1)
    angle = np.array([[draw.random() * 6 for _ in range(8)] for _ in range(20)])
    cos, sin = (mx.array(np.float32(f(angle))) for f in (np.cos, np.sin))
    tables = exact(cos), exact(sin)
    out = rotary.apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=mx.array([3, 11]))
    wanted = [
        rotated(exact(x)[b], *tables, first + np.arange(5), interleaved, "float32")
        for b, first in enumerate((3, 11))
    ]
    close(out, np.stack(wanted))
    flat = rotary.apply_rotary_emb(
        *(x.reshape(10, 3, 32), cos, sin, interleaved),
        seqlen_offsets=mx.array([3, 11, 0]),
        cu_seqlens=mx.array([0, 5, 10, 10]),
    )
    close(flat.reshape(x.shape), np.stack(wanted))
    own = mx.array(x)
    assert rotary.apply_rotary_emb(own, cos, sin, interleaved, True) is own
    packed = mx.stack([x, x, x], axis=2)
    both = rotary.apply_rotary_emb_qkv_(packed, cos, sin, interleaved=interleaved)
    assert both is packed
    for n, rows in enumerate((own, own, x)):
        close(packed[:, :, n], np.array(rows))


def test_the_rotary_module_is_mlx_s_own_rope() -> None:
    x = normal((2, 6, 3, 3, 32), "float32", 1)
    module = rotary.RotaryEmbedding(16, base=500.0)
    out = module(x, seqlen_offset=4)
    for n in (0, 1):
        rows = x[:, :, n].swapaxes(1, 2)
        own = mx.fast.rope(rows, 16, traditional=False, base=500.0, scale=1.0, offset=4)
        close(out[:, :, n], np.array(own.swapaxes(1, 2)), 1e-5)
    assert mx.array_equal(out[:, :, 2], x[:, :, 2])
    assert not tree_flatten(module.parameters())
    q, kv = module(x[:, :, 0], x[:, :, 1:], 4)
    close(mx.concatenate([q[:, :, None], kv], axis=2), np.array(out))
    grown = rotary.RotaryEmbedding(16, scale_base=512.0)
    q, kv = grown(x[:, :, 0], x[:, :, 1:])
    scores = mx.einsum("bihd,bjhd->bhij", q, kv[:, :, 0])
    q, kv = grown(x[:, :, 0], x[:, :, 1:], 3, 9)  # only distances matter, with xPos too
    close(mx.einsum("bihd,bjhd->bhij", q, kv[:, :, 0]), np.array(scores), 2e-4)


def test_mha_has_flash_attn_s_weights_and_generates_what_it_computes_at_once() -> None:
    layer = MHA(
        64, 4, num_heads_kv=2, causal=True, layer_idx=0, rotary_emb_dim=8, window_size=(5, 0)
    )
    names = [name for name, _ in tree_flatten(layer.parameters())]
    assert sorted(names) == ["Wqkv.bias", "Wqkv.weight", "out_proj.bias", "out_proj.weight"]
    assert layer.Wqkv.weight.shape == (64 + 2 * 32, 64)
    x = normal((2, 9, 64), "float32", 1)
    whole = layer(x)
    params = InferenceParams(max_seqlen=16, max_batch_size=2)
    steps = []
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        params.seqlen_offset = start
        steps.append(layer(x[:, start:stop], inference_params=params))
    close(mx.concatenate(steps, axis=1), np.array(whole), 1e-4)


def test_mha_takes_padding_packed_rows_and_other_inputs() -> None:
    layer, x = MHA(64, 4), normal((2, 6, 64), "float32", 1)
    there = mx.array([[True] * 6, [True] * 4 + [False] * 2])
    padded = layer(x, key_padding_mask=there)
    rows, indices, starts, longest, _ = bert_padding.unpad_input(x, there)
    packed = bert_padding.pad_input(
        layer(rows, cu_seqlens=starts, max_seqlen=longest), indices, 2, 6
    )
    close(packed[0], np.array(padded)[0], 1e-5)
    close(packed[1, :4], np.array(padded)[1, :4], 1e-5)
    crossing = MHA(64, 4, cross_attn=True, return_residual=True)
    names = {name.split(".")[0] for name, _ in tree_flatten(crossing.parameters())}
    assert names == {"Wq", "Wkv", "out_proj"}
    out, residual = crossing(x, normal((2, 9, 64), "float32", 2), mixer_subset=slice(0, 1))
    assert (out.shape, residual.shape) == ((2, 1, 64), (2, 6, 64))
    checked = MHA(64, 4, checkpointing=True)
    checked.update(layer.parameters())
    close(checked(x), np.array(layer(x)), 1e-5)
    with pytest.raises(ArgumentError, match="num_heads_kv: expected a number that divides 4"):
        MHA(64, 4, 3)


def test_inner_attention_drops_weights_in_training_alone() -> None:
    inner = FlashSelfAttention(causal=True, attention_dropout=0.5)
    rows = normal((1, 8, 3, 2, 32), "float32", 1)
    assert not mx.array_equal(inner(rows), inner(rows))
    inner.eval()
    assert mx.array_equal(inner(rows), inner(rows))
    assert mx.array_equal(inner(rows), fa.flash_attn_qkvpacked_func(rows, causal=True))
    assert metalgen.stats().plain == 6
