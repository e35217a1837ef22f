"""MLX's own signature, in MLX's place: what runs where, and that numbers stay what they were."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import metalgen
from metalgen import ArgumentError, DeviceError
from metalgen.calls import resolve
from metalgen.calls.verify import relative_error
from metalgen.families import default_schedule
from metalgen.ops.sdpa import attend
from metalgen.reference import attention_float64
from metalgen.testing.devices import normal

MLX = mx.fast.scaled_dot_product_attention
SCALE = 32**-0.5


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    resolve.forget_kernels()
    metalgen.reset_stats()
    yield
    metalgen.uninstall()
    resolve.forget_kernels()


def arrays(dtype: str = "float16", width: int = 32, q_len: int = 9) -> tuple[mx.array, ...]:
    q = normal((2, 4, q_len, width), dtype, 1)
    k, v = (normal((2, 2, 13, width), dtype, seed) for seed in (2, 3))
    return q, k, v


def float64(q: mx.array, k: mx.array, v: mx.array, **features: Any) -> Any:
    wide = [np.array(x.astype(mx.float32), np.float64) for x in (q, k, v)]
    return attention_float64(*wide, scale=SCALE, **features)[0]


SEEN = mx.array(np.arange(9)[:, None] + 4 >= np.arange(13)) & (mx.arange(13) != 2)


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({}, None),
        ({"mask": "causal"}, np.arange(9)[:, None] + 4 >= np.arange(13)),
        ({"mask": SEEN}, np.array(SEEN)),
        ({"mask": mx.where(SEEN, 0.0, -mx.inf).astype(mx.float16)}, np.array(SEEN)),
        ({"mask": mx.where(SEEN, 0.0, -mx.inf)}, np.array(SEEN)),  # which MLX refuses
    ],
    ids=["no mask", "causal", "booleans", "floats", "floats of a wider type"],
)
def test_ours_computes_what_float64_says(the_simulator: str, options: Any, seen: Any) -> None:
    q, k, v = arrays()
    out = attend(q, k, v, SCALE, **options, device=the_simulator)
    scores = np.array(q.astype(mx.float32), np.float64) * SCALE
    keys, values = (np.repeat(np.array(x.astype(mx.float32), np.float64), 2, 1) for x in (k, v))
    scores = scores @ keys.swapaxes(-1, -2)
    scores = np.where(True if seen is None else seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = weights / weights.sum(-1, keepdims=True) @ values
    assert relative_error(out, expected) < 1e-3
    assert metalgen.stats().metalgen == 1


def test_sinks_are_taken(the_simulator: str) -> None:
    q, k, v = arrays()
    sinks = mx.array([0.5, -1.0, 2.0, 0.0], mx.float16)
    out = attend(q, k, v, SCALE, sinks=sinks, device=the_simulator)
    expected = MLX(*(x.astype(mx.float32) for x in (q, k, v)), scale=SCALE, sinks=sinks)
    assert relative_error(out, np.array(expected, np.float64)) < 1e-3
    assert metalgen.stats().metalgen == 1


ONLY_MLX: dict[str, tuple[Any, dict[str, Any], str]] = {
    "mixed types": (
        lambda q, k, v: (q.astype(mx.float32), k, v),
        {},
        "q, k and v of several types: float32, float16",
    ),
    "narrow rows": (lambda q, k, v: (q[..., :4], k[..., :4], v), {}, "head dimensions (4, 32)"),
    "wide rows": (
        lambda *qkv: tuple(mx.tile(x, (1, 1, 1, 20)) for x in qkv),
        {},
        "head dimensions (640, 640), not from 8 to 576",
    ),
    "no batch": (lambda *qkv: tuple(x[:0] for x in qkv), {}, "only MLX's function can judge"),
}


@pytest.mark.parametrize("case", ONLY_MLX)
def test_what_ours_does_not_take_goes_to_mlx_which_is_said(case: str) -> None:
    change, options, reason = ONLY_MLX[case]
    q, k, v = change(*arrays())
    out = attend(q, k, v, SCALE, **options, device="simulator")
    expected = MLX(q, k, v, scale=SCALE, **options)
    assert out.dtype == expected.dtype
    assert mx.array_equal(out, expected)
    assert reason in metalgen.explain_sdpa(q, k, v, scale=SCALE, **options, device="simulator")
    found = metalgen.stats()
    assert (found.metalgen, found.mlx) == (0, 1)
    assert reason in next(iter(found.reasons))


def test_where_no_kernel_runs_mlx_computes_the_call_bit_for_bit() -> None:
    q, k, v = arrays()
    out = attend(q, k, v, SCALE, "causal", device="reference")
    assert mx.array_equal(out, MLX(q, k, v, scale=SCALE, mask="causal"))
    assert "no kernel runs on this device" in str(metalgen.stats())


@pytest.mark.parametrize(
    ("bad", "options"),
    [
        ({"mask": "lower"}, {}),
        ({"mask": mx.ones((3, 7), mx.bool_)}, {}),
        ({"sinks": mx.ones((3,), mx.float16)}, {}),
    ],
)
@pytest.mark.parametrize("device", ["reference", "simulator"])
def test_bad_calls_raise_what_mlx_raises(device: str, bad: Any, options: Any) -> None:
    with pytest.raises(ValueError) as theirs:
        mx.eval(MLX(*arrays(), scale=SCALE, **bad))
    with pytest.raises(ValueError) as ours:
        mx.eval(attend(*arrays(), SCALE, **bad, device=device))
    assert str(ours.value) == str(theirs.value)
    attend(*arrays(), SCALE, SEEN, device=device)  # a good call after it is computed as ever


def test_what_is_no_array_raises_what_mlx_raises() -> None:
    with pytest.raises(TypeError, match="incompatible function arguments"):
        attend([1.0], [1.0], [1.0], SCALE)  # type: ignore[arg-type]


def test_a_stream_may_be_named() -> None:
    q, k, v = arrays()
    stream = mx.new_stream(mx.cpu)
    for where in (stream, mx.cpu):
        out = metalgen.scaled_dot_product_attention(q, k, v, scale=SCALE, stream=where)
        assert mx.allclose(out, MLX(q, k, v, scale=SCALE))


def test_gradients_reach_through(the_simulator: str) -> None:
    q, k, v = arrays("float32")

    def loss(attention: Any) -> Any:
        return lambda q, k, v: (attention(q, k, v) ** 2).sum()

    ours = loss(lambda q, k, v: attend(q, k, v, SCALE, "causal", device=the_simulator))
    theirs = loss(lambda q, k, v: MLX(q, k, v, scale=SCALE, mask="causal"))
    for a, b in zip(*(mx.grad(f, (0, 1, 2))(q, k, v) for f in (ours, theirs)), strict=True):
        assert mx.allclose(a, b, atol=1e-4)


def test_a_lazy_kernel_may_stand_inside_of_vmap() -> None:
    config = metalgen.AttentionConfig(32, "float32", heads_per_kv=2)

    def run(q: mx.array, k: mx.array, v: mx.array, *_: Any) -> tuple[mx.array, None]:
        return mx.zeros_like(q), None  # a custom kernel: MLX cannot map it, and does not try

    kernel = metalgen.Kernel(
        config, "metal", "metalgen", "forward", default_schedule(config), (), run
    )
    many = [mx.stack([x, x * 0.5]) for x in arrays("float32")]
    a = mx.vmap(lambda *x: kernel(*x, scale=SCALE))(*many)
    assert mx.allclose(a, mx.vmap(lambda *x: MLX(*x, scale=SCALE))(*many), atol=1e-5)


def test_install_reaches_mlx_nn_and_uninstall_takes_it_back(the_simulator: str) -> None:
    layer, x = nn.MultiHeadAttention(64, 2), normal((1, 9, 64), "float32", 1)
    mask = layer.create_additive_causal_mask(9)
    expected = layer(x, x, x, mask)
    mx.eval(expected)
    metalgen.install(device=the_simulator)
    assert metalgen.is_installed()
    assert mx.allclose(layer(x, x, x, mask), expected, atol=1e-5)
    assert metalgen.stats().metalgen == 1
    assert metalgen.uninstall()
    assert not metalgen.uninstall()
    assert mx.fast.scaled_dot_product_attention is MLX
    layer(x, x, x, mask)
    assert metalgen.stats().metalgen == 1


def test_install_without_a_device_puts_the_public_function_there() -> None:
    with metalgen.install():
        assert mx.fast.scaled_dot_product_attention is metalgen.scaled_dot_product_attention
        q, k, v = arrays()
        metalgen.attention(q, k, v)  # no way round in circles
        mx.eval(mx.fast.scaled_dot_product_attention(q, k, v, scale=SCALE))
    assert not metalgen.is_installed()


def test_install_complains_before_it_changes_anything() -> None:
    with pytest.raises(ArgumentError, match="device: expected one of"):
        metalgen.install(device="gpu")
    with pytest.raises(ArgumentError, match="chip"):
        metalgen.install(chip="M99")
    assert not metalgen.is_installed()


def test_metalgen_device_names_the_device_of_calls_that_name_none(
    the_simulator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = arrays()
    monkeypatch.setenv("METALGEN_DEVICE", the_simulator)
    resolve.forget_kernels()
    metalgen.attention(q, k, v)
    metalgen.scaled_dot_product_attention(q, k, v, scale=SCALE)
    metalgen.attention(q, k, v, device="reference")
    found = metalgen.stats()
    assert (found.metalgen, found.mlx, found.plain, found.calls) == (2, 0, 1, 3)


@pytest.mark.parametrize("name", ["METALGEN_REFERENCE", "FLASH_ATTENTION_MLX_REF"])
def test_plain_mlx_can_be_forced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = arrays()
    monkeypatch.setenv(name, "1")
    monkeypatch.setenv("METALGEN_DEVICE", "simulator")
    resolve.forget_kernels()
    metalgen.attention(q, k, v, device="simulator")
    metalgen.scaled_dot_product_attention(q, k, v, scale=SCALE)
    found = metalgen.stats()
    assert (found.metalgen, found.mlx, found.plain) == (0, 1, 1)
    assert f"{name} forces them" in str(found)
    monkeypatch.setenv(name, "0")
    resolve.forget_kernels()
    metalgen.attention(q, k, v)
    assert metalgen.stats().metalgen == 1


def test_variables_that_mean_nothing_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METALGEN_DEVICE", "gpu")
    with pytest.raises(ArgumentError, match=r"METALGEN_DEVICE: expected one of .*'gpu'"):
        metalgen.attention(*arrays())
    monkeypatch.setenv("METALGEN_DEVICE", "metal")
    if not mx.metal.is_available():
        resolve.forget_kernels()
        with pytest.raises(DeviceError, match="device 'metal' is not available"):
            metalgen.attention(*arrays())
    monkeypatch.setenv("METALGEN_REFERENCE", "perhaps")
    resolve.forget_kernels()
    with pytest.raises(ArgumentError, match="METALGEN_REFERENCE: expected 1"):
        metalgen.attention(*arrays())


def test_importing_metalgen_imports_none_of_the_ways_in() -> None:
    code = (
        "import json, sys, metalgen\n"
        "print(json.dumps([m for m in sys.modules if m.split('.')[0] in ('metalgen', 'numpy')]))"
    )
    paths = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
        check=True,
    )
    assert set(json.loads(done.stdout)) == {"metalgen", "metalgen._version"}


# A float16 model with MLX's own additive mask, which MLX refuses.
def test_a_half_model_takes_mlx_s_float32_mask() -> None:
    layer, x = nn.MultiHeadAttention(64, 2), normal((1, 9, 64), "float16", 1)
    layer.set_dtype(mx.float16)
    mask = layer.create_additive_causal_mask(9)
    with pytest.raises(ValueError):
        mx.eval(layer(x, x, x, mask))
    with metalgen.install():
        out = layer(x, x, x, mask)
    assert mx.allclose(out, layer(x, x, x, "causal"), atol=2e-3)
