"""Merging the results of blocks of keys, and gradients from an outside log-sum-exp."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import metalgen
from metalgen import ArgumentError
from metalgen.problem.inputs import Inputs
from metalgen.reference import attention_float64, gradients_float64
from metalgen.testing.devices import normal

SCALE = 0.3


def arrays(kv_len: int = 40) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    q, dout = normal((2, 4, 21, 16), seed=1), normal((2, 4, 21, 24), seed=4)
    return q, normal((2, 2, kv_len, 16), seed=2), normal((2, 2, kv_len, 24), seed=3), dout


def blocks_of(k: mx.array, v: mx.array) -> list[tuple[mx.array, mx.array]]:
    return [(k[:, :, a:b], v[:, :, a:b]) for a, b in ((0, 7), (7, 32), (32, 40))]


def close(found: mx.array | None, exact: Any) -> None:
    assert found is not None
    np.testing.assert_allclose(np.array(found), exact, rtol=1e-4, atol=1e-5)


def test_merged_blocks_are_the_attention_over_all_keys() -> None:
    q, k, v, _ = arrays()
    parts = [
        metalgen.attention(q, *block, scale=SCALE, return_lse=True) for block in blocks_of(k, v)
    ]
    out, lse = metalgen.merge(*parts)
    exact, exact_lse = attention_float64(q, k, v, scale=SCALE)
    close(out, exact)
    close(lse, exact_lse)
    halves = metalgen.merge(metalgen.merge(*parts[:2]), parts[2])
    close(halves[0], exact)


def test_a_block_without_keys_changes_nothing_and_rows_without_any_are_zeros() -> None:
    out = mx.array([[1.0, 2.0], [0.0, 0.0]])[None, None]
    lse = mx.array([0.5, -mx.inf])[None, None]
    none = mx.zeros_like(out), mx.full(lse.shape, -mx.inf)
    found, found_lse = metalgen.merge((out, lse), none)
    assert np.array_equal(np.array(found), np.array(out))
    assert np.array_equal(np.array(found_lse), np.array(lse))
    slope = mx.grad(lambda lse: metalgen.merge((out, lse), none)[0].sum())(lse)
    assert np.isfinite(np.array(slope)).all()


@pytest.mark.parametrize("device", ["reference", "simulator"])
def test_gradients_of_blocks_add_up_to_those_of_the_whole(device: str) -> None:
    q, k, v, dout = arrays()
    dlse = normal((2, 4, 21), seed=5)
    out, lse = metalgen.attention(q, k, v, scale=SCALE, softcap=2.0, return_lse=True)
    options: dict[str, Any] = {"scale": SCALE, "softcap": 2.0, "device": device}
    found = [
        metalgen.attention_backward(q, *block, out, lse, dout, dlse=dlse, **options)
        for block in blocks_of(k, v)
    ]
    exact = gradients_float64(q, k, v, (dout, dlse), scale=SCALE, softcap=2.0)
    assert found[0].q is not None and found[1].q is not None and found[2].q is not None
    close(found[0].q + found[1].q + found[2].q, exact["q"])
    for name in "kv":
        parts = [getattr(each, name) for each in found]
        close(mx.concatenate(parts, axis=2), exact[name])
    given = gradients_float64(
        *(q, *blocks_of(k, v)[1], (dout, dlse)), scale=SCALE, softcap=2.0, given=(out, lse)
    )
    close(found[1].q, given["q"])


def test_only_what_is_wanted_is_given() -> None:
    q, k, v, dout = arrays()
    bias, slopes, sinks = normal((4, 1, 40)), metalgen.alibi_slopes(4), normal((4,), seed=7)
    options: dict[str, Any] = {"bias": bias, "alibi_slopes": slopes, "sinks": sinks}
    out, lse = metalgen.attention(q, k, v, scale=SCALE, return_lse=True, **options)
    found = metalgen.attention_backward(
        *(q, k, v, out, lse, dout), scale=SCALE, wanted=("bias", "sinks", "alibi_slopes"), **options
    )
    assert found.q is found.k is found.v is None
    inputs = Inputs(bias=bias[None], alibi_slopes=slopes, sinks=sinks)
    exact = gradients_float64(
        *(q, k, v, (dout, None)), scale=SCALE, inputs=inputs, bias=True, alibi=True, sinks=True
    )
    close(found.bias, exact["bias"])
    close(found.alibi_slopes, exact["alibi_slopes"])
    close(found.sinks, exact["sinks"])


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("dout", {"dout": mx.zeros((2, 4, 21, 16))}, "float32 (2, 4, 21, 24)"),
    ("dout", {"dout": mx.zeros((2, 4, 21, 24), mx.float16)}, "float32 (2, 4, 21, 24)"),
    ("dout", {"dout": None}, "mlx.core.array"),
    ("out", {"out": mx.zeros((2, 4, 20, 24))}, "(2, 4, 21, 24)"),
    ("lse", {"lse": mx.zeros((2, 4, 21, 1))}, "(2, 4, 21)"),
    ("dlse", {"dlse": mx.zeros((2, 4, 21), mx.float16)}, "float32"),
    ("wanted", {"wanted": ("q", "x")}, "names among q, k, v"),
    ("wanted", {"wanted": ("bias",)}, "no 'bias', which the call does not pass"),
    ("wanted", {"wanted": "q"}, "names among"),
]


@pytest.mark.parametrize(("argument", "changes", "words"), BAD)
def test_what_does_not_fit_is_named_when_the_call_is_made(
    argument: str, changes: dict[str, Any], words: str
) -> None:
    q, k, v, dout = arrays()
    given = {"out": dout, "lse": mx.zeros((2, 4, 21)), "dout": dout, **changes}
    with pytest.raises(ArgumentError) as caught:
        metalgen.attention_backward(q, k, v, **given)
    assert caught.value.argument == argument
    assert words in str(caught.value)


def test_pages_and_quantized_keys_have_no_gradients_and_queries_have() -> None:
    q, dout = normal((2, 4, 5, 64)), normal((2, 4, 5, 64), seed=1)
    rows = normal((6, 2, 16, 64), seed=2)
    paged = {"block_table": mx.array([[0, 2], [3, 1]]), "kv_lens": mx.array([20, 32])}
    quantized = mx.quantize(normal((2, 2, 32, 64), seed=3), group_size=32, bits=4)
    for keys, options, why in (
        (rows, paged, "pages are a cache"),
        (quantized, {}, "quantized keys and values have no gradients"),
    ):
        out, lse = metalgen.attention(q, keys, keys, return_lse=True, **options)
        given = (q, keys, keys, out, lse, dout)
        with pytest.raises(ArgumentError, match=why):
            metalgen.attention_backward(*given, **options)
        found = metalgen.attention_backward(*given, wanted=("q",), **options)
        assert found.q is not None and np.isfinite(np.array(found.q)).all()


@pytest.mark.parametrize(
    ("results", "words"),
    [
        ((), "one pair"),
        ((mx.zeros((1, 1, 2, 4)),), "an output and its log-sum-exp"),
        (((mx.zeros((1, 1, 2, 4)), mx.zeros((1, 1, 3))),), "float32 (1, 1, 2)"),
        (((mx.zeros((2, 4), mx.int32), mx.zeros((2,))),), "floats"),
        (
            ((mx.zeros((2, 4)), mx.zeros((2,))), (mx.zeros((3, 4)), mx.zeros((3,)))),
            "as the first has",
        ),
    ],
)
def test_results_that_cannot_be_merged_are_named(results: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=r"results") as caught:
        metalgen.merge(*results)
    assert words in str(caught.value)
