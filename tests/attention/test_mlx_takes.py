"""What MLX's own function takes and no kernel does: mixed types, other widths, streams."""

from __future__ import annotations

import itertools
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import metalgen
from metalgen import ArgumentError
from metalgen.calls.verify import relative_error
from metalgen.reference import attention_float64
from metalgen.testing.devices import normal

FLOATS = ("float32", "float16", "bfloat16")
TOLERANCE = {"float32": 3e-6, "float16": 2e-3, "bfloat16": 2e-2}
"""Of MLX's own function on a CPU, too, which keeps scores of 16-bit queries in 16 bits."""
MIXED = [types for types in itertools.product(FLOATS, repeat=3) if len({*types}) > 1]


def arrays(types: tuple[str, str, str], width: int = 24) -> list[mx.array]:
    sizes = ((4, 9), (2, 13), (2, 13))
    return [
        normal((2, heads, rows, width), dtype, seed)
        for seed, ((heads, rows), dtype) in enumerate(zip(sizes, types, strict=True), 1)
    ]


@pytest.mark.parametrize("types", MIXED)
def test_mixed_types_are_promoted_as_mlx_promotes_them(
    types: tuple[str, str, str], where: str
) -> None:
    q, k, v = arrays(types)
    out = metalgen.attention(q, k, v, causal=True, device=where)
    of_mlx = mx.fast.scaled_dot_product_attention(q, k, v, scale=24**-0.5, mask="causal")
    assert out.dtype == of_mlx.dtype == mx.float32  # for every mixture of these three
    expected, _ = attention_float64(q, k, v, scale=24**-0.5, causal=True)
    assert relative_error(out, expected) < TOLERANCE["float32"]
    said = metalgen.explain(q, k, v, causal=True, device=where)
    names = f"q {types[0]}, k {types[1]}, v {types[2]}"
    assert f"types: {names}; all are computed in float32, to which MLX promotes them" in said


def test_mixed_types_go_with_every_feature(where: str) -> None:
    q, k, v = arrays(("float32", "bfloat16", "bfloat16"))
    options: dict[str, Any] = {"softcap": 5.0, "kv_lens": mx.array([13, 4])}
    out, lse = metalgen.attention(q, k, v, return_lse=True, device=where, **options)
    wide = [x.astype(mx.float32) for x in (q, k, v)]
    expected, expected_lse = metalgen.attention(
        *wide, return_lse=True, device="reference", **options
    )
    assert relative_error(out, np.array(expected, np.float64)) < 3e-6
    np.testing.assert_allclose(np.array(lse), np.array(expected_lse), rtol=1e-5, atol=1e-5)


def test_gradients_have_the_types_of_the_arrays() -> None:
    q, k, v = arrays(("float32", "bfloat16", "float16"))
    found = mx.grad(lambda *x: metalgen.attention(*x, device="reference").sum(), argnums=(0, 1, 2))(
        q, k, v
    )
    assert [x.dtype for x in found] == [mx.float32, mx.bfloat16, mx.float16]


def test_quantized_keys_of_another_type_than_the_queries(where: str) -> None:
    """As a quantized cache of mlx-lm hands them to a model whose queries are float32."""
    q, k, v = arrays(("float32", "float16", "float16"), 32)
    k8, v8 = (mx.quantize(x, group_size=32, bits=8) for x in (k, v))
    out = metalgen.attention(q, k8, v8, device=where)
    wide = [
        mx.dequantize(words, scales.astype(mx.float32), biases.astype(mx.float32), 32, 8)
        for words, scales, biases in (k8, v8)
    ]
    assert out.dtype == mx.float32
    assert relative_error(out, attention_float64(q, *wide, scale=32**-0.5)[0]) < 3e-6


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"mask": "causal"},
        {"causal": True, "window_left": 3},
        {"mask": mx.array(np.random.default_rng(1).random((9, 13)) < 0.4)},
        {"mask": normal((4, 9, 13), seed=8)},
        {"sinks": normal((4,), seed=9)},
    ],
)
@pytest.mark.parametrize(("width", "value_width"), [(4, 4), (640, 640), (64, 1)])
def test_widths_that_no_kernel_takes_go_to_mlx(
    width: int, value_width: int, options: dict[str, Any], dtype: str
) -> None:
    q, k, v = arrays((dtype,) * 3, width)
    v = v[..., :1] if value_width == 1 else v
    out = metalgen.attention(q, k, v, **options)
    known = dict(options)
    mask, inputs = known.pop("mask", None), {}
    if isinstance(mask, str):
        known["causal"] = True
    elif mask is not None:
        name = "array_mask" if mask.dtype == mx.bool_ else "bias"
        known[name], inputs[name] = True, mx.broadcast_to(mask, (2, 4, 9, 13))
    if "sinks" in known:
        inputs["sinks"], known["sinks"] = known["sinks"], True
    given = metalgen.problem.inputs.Inputs(**inputs)
    expected, _ = attention_float64(q, k, v, scale=width**-0.5, inputs=given, **known)
    assert out.shape == (2, 4, 9, value_width) and str(out.dtype) == f"mlx.core.{dtype}"
    assert relative_error(out, expected) < TOLERANCE[dtype]
    said = metalgen.explain(q, k, v, **options)
    assert f"D{width} {dtype}: mx.fast.scaled_dot_product_attention" in said
    assert "metalgen's kernels take widths from 8 to 576, not" in said
    assert "gradients: MLX's own" in said


def test_rows_without_a_key_are_zeros_by_mlx_too() -> None:
    q, k, v = arrays(("float32",) * 3, 4)
    hidden = mx.where(mx.arange(9)[:, None] == 2, -mx.inf, mx.zeros((9, 13)))
    for options in ({"mask": hidden}, {"mask": hidden == 0}, {"bias": hidden}):
        out = metalgen.attention(q, k, v, **options)
        assert mx.array_equal(out[:, :, 2], mx.zeros((2, 4, 4)))
        assert (out[:, :, 3] != 0).all()
        found = mx.grad(lambda v, kw=options: metalgen.attention(q, k, v, **kw).sum())(v)
        assert mx.isfinite(found).all()
    few = metalgen.attention(q, k[:, :, :5], v[:, :, :5], causal=True)  # 9 queries, 5 keys
    assert mx.array_equal(few[:, :, :4], mx.zeros((2, 4, 4, 4)))
    none = metalgen.attention(q, k[:, :, :0], v[:, :, :0])
    assert mx.array_equal(none, mx.zeros((2, 4, 9, 4)))


def test_float64_goes_to_mlx() -> None:
    with mx.stream(mx.cpu):
        q, k, v = (x.astype(mx.float64) for x in arrays(("float32",) * 3))
        out = metalgen.attention(q, k, v, causal=True)
        assert out.dtype == mx.float64
        expected, _ = attention_float64(q, k, v, scale=24**-0.5, causal=True)
        assert np.abs(np.array(out) - expected).max() < 1e-6  # MLX's scale is a float32
        assert "not float64" in metalgen.explain(q, k, v)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": mx.zeros((2, 2, 13, 5))}, "k.shape: expected a batch of 2 and a last axis of 4"),
        ({"v": mx.zeros((2, 2, 12, 4))}, "v.shape: expected .* before the last axis, as k has"),
        ({"mask": mx.zeros((13, 9))}, "mask.shape: expected 4 axes that broadcast"),
        ({"mask": mx.ones((13, 9), mx.bool_)}, "mask.shape: expected 4 axes that broadcast"),
        ({"sinks": mx.zeros((3,))}, r"sinks.shape: expected \(4,\)"),
        ({"scale": float("nan")}, "scale: expected a finite number"),
        ({"window_left": -1}, "window_left: expected an integer from 0"),
        ({"mask": mx.zeros((9, 13)), "causal": True}, "mask: expected None with another mask"),
        ({"device": "simulator"}, "head_dim: expected an integer from 8 to 576, but got 4"),
        ({"dropout": 0.5}, "head_dim: expected an integer from 8 to 576, but got 4"),
    ],
)
def test_a_bad_call_of_such_a_width_is_named(change: dict[str, Any], message: str) -> None:
    call = dict(zip("qkv", arrays(("float32",) * 3, 4), strict=True)) | change
    with pytest.raises(ArgumentError, match=message):
        metalgen.attention(call.pop("q"), call.pop("k"), call.pop("v"), **call)


@pytest.mark.parametrize("stream", [mx.cpu, mx.Device(mx.cpu), mx.default_stream(mx.cpu), None])
def test_a_stream_is_taken_as_mlx_takes_it(stream: Any) -> None:
    q, k, v = arrays(("float32",) * 3)
    expected, _ = attention_float64(q, k, v, scale=24**-0.5, causal=True)
    out = metalgen.attention(q, k, v, causal=True, stream=stream)
    assert relative_error(out, expected) < 3e-6
    blocks = metalgen.create_block_mask(lambda b, h, i, j: j <= i + 4, None, None, 9, 13)
    out = metalgen.flex_attention(q, k, v, block_mask=blocks, stream=stream)
    assert relative_error(out, expected) < 3e-6
    assert "plain MLX operations" in metalgen.explain(q, k, v, stream=mx.cpu)


def test_streams_that_are_none_are_named() -> None:
    q, k, v = arrays(("float32",) * 3)
    with pytest.raises(ArgumentError, match="stream: expected an mlx.core.Stream or"):
        metalgen.attention(q, k, v, stream="cpu")  # type: ignore[call-overload]
    with pytest.raises(ArgumentError, match="stream: expected a stream of the GPU with device='m"):
        metalgen.attention(q, k, v, stream=mx.cpu, device="metal")


def test_a_nan_in_a_hidden_value_reaches_the_row_as_in_mlx_but_not_from_behind_a_length(
    where: str,
) -> None:
    q, k, v = arrays(("float32",) * 3)
    v[:, :, 7] = float("nan")
    seen = mx.arange(13) != 7
    of_mlx = mx.fast.scaled_dot_product_attention(q, k, v, scale=24**-0.5, mask=seen)
    assert mx.isnan(of_mlx).all()
    assert mx.isnan(metalgen.attention(q, k, v, mask=seen, device=where)).all()
    short = metalgen.attention(q, k, v, kv_lens=mx.array([7, 7]), device=where)
    expected, _ = attention_float64(q, k[:, :, :7], v[:, :, :7], scale=24**-0.5)
    assert relative_error(short, expected) < 3e-6
