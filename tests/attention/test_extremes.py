"""Scores, biases and caps at the ends of their ranges, by every family and for both languages.

The CUDA sources run on this CPU (`tests/cuda`). Expected is the definition in float64, of scores
that float32 holds exactly; where it is the mean of the values, that is said by hand, too.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from emulated_cuda import EmulatedCuda

from metalgen import attention, flex_attention
from metalgen.calls.verify import lse_fault, lse_tolerance, relative_error, tolerance_of, verify
from metalgen.devices.kernel import KernelDevice
from metalgen.devices.simulator import SimulatorDevice
from metalgen.families import default_schedule
from metalgen.problem.config import AttentionConfig
from metalgen.problem.inputs import NOTHING, Inputs
from metalgen.reference import attention_float64, config_features
from metalgen.testing.devices import normal

LOWEST = float(np.finfo(np.float32).min)
WIDTH, KEYS = 32, 139
slow = pytest.mark.slow
DTYPES = ("bfloat16", *(pytest.param(name, marks=slow) for name in ("float32", "float16")))
"""The arithmetic of scores is the same for all; the others are read and written differently."""
WAYS = {"forward": 35, "decode": 3}
"""Families, and queries that they get."""


@pytest.fixture(scope="module", params=["metal", "cuda"])
def gpu(request: pytest.FixtureRequest) -> KernelDevice:
    """What executes kernels: the Metal source, or the CUDA source, on this CPU."""
    device = SimulatorDevice() if request.param == "metal" else EmulatedCuda()
    if reason := device.unavailable():
        pytest.skip(reason)
    return device


def run(
    gpu: KernelDevice,
    family: str,
    config: AttentionConfig,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    inputs: Inputs = NOTHING,
    scale: float = 1.0,
) -> tuple[mx.array, mx.array]:
    """The default schedule's kernel: several passes, and in decode several splits."""
    schedule = default_schedule(config, gpu.limits, family)
    out, lse = gpu.build(config, schedule)(q, k, v, scale, inputs)
    assert lse is not None
    return out, lse


def assert_right(
    gpu: KernelDevice,
    family: str,
    config: AttentionConfig,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    inputs: Inputs = NOTHING,
    scale: float = 1.0,
) -> None:
    out, lse = run(gpu, family, config, q, k, v, inputs, scale)
    features = config_features(config) | {"inputs": inputs}
    expected, expected_lse = attention_float64(q, k, v, scale=scale, **features)
    assert relative_error(out, expected) < tolerance_of(config)
    assert not lse_fault(lse, expected_lse, lse_tolerance(config))


def config_of(dtype: str, **fields: Any) -> AttentionConfig:
    return AttentionConfig(WIDTH, dtype, return_lse=True, **fields)


def arrays(family: str, dtype: str) -> tuple[mx.array, mx.array, mx.array]:
    q = normal((1, 1, WAYS[family], WIDTH), dtype, 1)
    k, v = (normal((1, 1, KEYS, WIDTH), dtype, seed) for seed in (2, 3))
    return q, k, v


def of_one_score(
    family: str, dtype: str, x: float, y: float
) -> tuple[mx.array, mx.array, mx.array]:
    """Queries of x everywhere and keys of y: all scores are 32 x y."""
    q, k, v = arrays(family, dtype)
    return mx.full(q.shape, x, q.dtype), mx.full(k.shape, y, k.dtype), v


def mean_of(v: mx.array, queries: int) -> np.ndarray[Any, Any]:
    wide = np.array(v.astype(mx.float32), np.float64)
    return np.repeat(wide.mean(axis=2, keepdims=True), queries, axis=2)


@pytest.mark.parametrize("family", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("x", "y", "scale"),
    [
        (100, 100, 32**-0.5),  # 6e4
        (10007, 10007, 1.0),  # 3e9
        (10007, -10007, 1.0),
        (1, 1, 1e10),
        (-1, 1, 1e30),
    ],
)
def test_one_score_of_all_keys_gives_the_mean_of_the_values(
    gpu: KernelDevice, family: str, dtype: str, x: float, y: float, scale: float
) -> None:
    q, k, v = of_one_score(family, dtype, x, y)
    config = config_of(dtype)
    out, lse = run(gpu, family, config, q, k, v, scale=scale)
    assert relative_error(out, mean_of(v, WAYS[family])) < tolerance_of(config)
    score = WIDTH * float(q[0, 0, 0, 0].item()) * float(k[0, 0, 0, 0].item()) * scale
    np.testing.assert_allclose(np.array(lse), score + np.log(KEYS), rtol=1e-5)


@pytest.mark.parametrize("family", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "factor", [1448, pytest.param(2000, marks=slow), 4096, pytest.param(65504, marks=slow)]
)
@pytest.mark.parametrize("sign", [1, pytest.param(-1, marks=slow)])
def test_scores_apart_by_what_float32_tells_apart(
    gpu: KernelDevice, family: str, dtype: str, factor: int, sign: int
) -> None:
    """Around 4e6 to 3e8, on both sides of where rows change their arithmetic (2^23, 2^24), with
    maxima that rise from pass to pass and from split to split."""
    q, k, v = arrays(family, dtype)
    common = int(mx.array(factor, q.dtype).astype(mx.float32).item()) * 4096
    step = float(np.spacing(np.float32(common)))
    q, k = mx.zeros(q.shape), mx.zeros(k.shape)
    q[..., 0], q[..., 1] = 4096, 1
    k[..., 0] = sign * factor
    k[..., 1] = mx.array(np.arange(KEYS) * 37 % 64 * step)
    q, k = q.astype(v.dtype), k.astype(v.dtype)
    assert_right(gpu, family, config_of(dtype), q, k, v)
    k = mx.zeros(k.shape)
    k[..., 0] = sign * factor
    k[..., 1] = mx.array(np.arange(KEYS) // 8 * step)
    assert_right(gpu, family, config_of(dtype), q, k.astype(v.dtype), v)


@pytest.mark.parametrize("family", WAYS)
@pytest.mark.parametrize("scale", [1e3, pytest.param(1e10, marks=slow), 1e20])
def test_random_scores_of_any_size(gpu: KernelDevice, family: str, scale: float) -> None:
    """Each row has the value of its largest score: the others are far away."""
    q, k, v = arrays(family, "float32")
    # Scores of whole numbers, which no order of summation rounds.
    q, k = (mx.round(4 * x) for x in (q, k))
    assert_right(gpu, family, config_of("float32"), q, k, v, scale=scale)


@pytest.mark.parametrize("family", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("filler", [LOWEST, pytest.param(-3.4e38, marks=slow), -2e38, -65504.0])
def test_a_bias_near_the_lowest_float_for_all_keys_gives_the_mean_of_the_values(
    gpu: KernelDevice, family: str, dtype: str, filler: float
) -> None:
    q, k, v = of_one_score(family, dtype, 1, 1)
    config = config_of(dtype, bias=True)
    bias = mx.full((1, 1, 1, KEYS), filler)
    out, lse = run(gpu, family, config, q, k, v, Inputs(bias=bias))
    assert relative_error(out, mean_of(v, WAYS[family])) < tolerance_of(config)
    score = float(np.float64(np.float32(filler)))
    np.testing.assert_allclose(np.array(lse, np.float64), max(score + 36.93, LOWEST), rtol=1e-6)
    rows = mx.where(mx.arange(WAYS[family])[:, None] % 2 == 0, filler, 0.0)
    bias = mx.broadcast_to(rows, (1, 1, WAYS[family], KEYS))
    assert_right(gpu, family, config, q, k, v, Inputs(bias=bias))


@pytest.mark.parametrize("family", WAYS)
def test_minus_infinity_hides_a_key_and_the_lowest_float_does_not(
    gpu: KernelDevice, family: str
) -> None:
    """Rows: nothing seen; the lowest float among -inf, in some passes; two low ones apart."""
    q, k, v = arrays(family, "float32")
    j = mx.arange(KEYS)
    low = mx.where(j % 5 == 0, LOWEST, -mx.inf)
    apart = mx.where(j < KEYS // 2, LOWEST, -2.5e38)
    for rows in ([mx.full((KEYS,), -mx.inf), low], [mx.where(j > 100, low, -mx.inf), apart]):
        lines = mx.stack([rows[i % 2] for i in range(WAYS[family])])
        inputs = Inputs(bias=lines[None, None])
        for fields in ({}, {"causal": True}):
            assert_right(gpu, family, config_of("float32", bias=True, **fields), q, k, v, inputs)


@pytest.mark.parametrize("family", WAYS)
@pytest.mark.parametrize("sink", [0.0, -3.4e38, LOWEST, 1e9, -mx.inf])
def test_a_sink_weighs_what_a_key_of_its_score_would(
    gpu: KernelDevice, family: str, sink: float
) -> None:
    q, k, v = of_one_score(family, "float32", 1, 0)
    config = config_of("float32", bias=True, sinks=True)
    inputs = Inputs(bias=mx.full((1, 1, 1, KEYS), sink), sinks=mx.array([sink]))
    out, lse = run(gpu, family, config, q, k, v, inputs)
    weight = KEYS / (KEYS + 1) if sink > -mx.inf else 0.0
    expected = weight * mean_of(v, WAYS[family])
    np.testing.assert_allclose(np.array(out), expected, rtol=1e-5, atol=1e-6)
    expected_lse = np.float64(np.float32(sink)) + np.log(KEYS + 1)
    np.testing.assert_allclose(np.array(lse, np.float64), expected_lse, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("family", WAYS)
@pytest.mark.parametrize("score", [64.0 * 1024**2, 1e3])
def test_a_sink_next_to_large_scores(gpu: KernelDevice, family: str, score: float) -> None:
    q, k, v = of_one_score(family, "float32", 1, score / WIDTH)
    for sink in (3.0, 2 * score):
        config, inputs = config_of("float32", sinks=True), Inputs(sinks=mx.array([sink]))
        assert_right(gpu, family, config, q, k, v, inputs)


@pytest.mark.parametrize("family", WAYS)
@pytest.mark.parametrize("slope", [1e6, pytest.param(1e30, marks=slow), 2e36])
def test_steep_slopes_of_alibi_leave_the_nearest_key(
    gpu: KernelDevice, family: str, slope: float
) -> None:
    q, k, v = arrays(family, "float32")
    inputs = Inputs(alibi_slopes=mx.array([slope]))
    assert_right(gpu, family, config_of("float32", alibi=True), q, k, v, inputs)


@pytest.mark.parametrize("low", [LOWEST, -3e38, -1e9])
def test_a_score_function_may_return_any_finite_score(where: str, low: float) -> None:
    q, k, v = (normal((1, 1, n, WIDTH), seed=n) for n in (35, KEYS, KEYS))

    def padded(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return mx.where((q_idx % 2 == 0) | (kv_idx == 100), low, mx.where(kv_idx < 3, -mx.inf, 0.0))

    out = flex_attention(q, k, v, padded, device=where)
    values = np.array(v, np.float64)[0, 0]
    even, odd = values.mean(axis=0), np.delete(values, [0, 1, 2, 100], axis=0).mean(axis=0)
    expected = np.stack([odd if i % 2 else even for i in range(35)])
    assert relative_error(out, expected[None, None]) < 2e-6


@pytest.mark.parametrize("family", WAYS)
@pytest.mark.parametrize(
    ("dtype", "softcap", "return_lse"),
    [
        ("float16", 64.0, True),
        ("bfloat16", 65.0, True),
        ("bfloat16", 300.0, True),
        ("float16", 300.0, True),
        ("bfloat16", 1e5, False),
        ("float16", 1e5, False),
        ("bfloat16", 1e6, True),
        ("float32", 1e6, True),
    ],
)
def test_caps_of_any_width_pass_their_check(
    gpu: KernelDevice, family: str, dtype: str, softcap: float, return_lse: bool
) -> None:
    config = AttentionConfig(WIDTH, dtype, softcap=softcap, return_lse=return_lse)
    result = verify(gpu, config, default_schedule(config, gpu.limits, family))
    assert result.ok, result.detail


@pytest.mark.parametrize("family", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [20.0, 64.0, 1e5])
def test_a_cap_bounds_scores_of_any_size(
    gpu: KernelDevice, family: str, dtype: str, softcap: float
) -> None:
    for sign in (1, -1):
        q, k, v = of_one_score(family, dtype, 1000, sign * 1000)
        assert_right(gpu, family, config_of(dtype, softcap=softcap), q, k, v)


def test_scores_of_a_billion_in_a_call(where: str) -> None:
    """Scores of 8e8: `1 / sqrt(64)` times 64 products of 10007 and 10007."""
    q = k = mx.full((1, 1, 70, 64), 10007.0, mx.float16)
    v = normal((1, 1, 70, 64), "float16", 3)
    out = attention(q, k, v, device=where)
    assert relative_error(out, mean_of(v, 70)) < 1e-3


@pytest.mark.parametrize("filler", [LOWEST, -3.4e38, -1e9])
def test_padded_rows_give_the_mean_of_the_values_as_in_mlx(where: str, filler: float) -> None:
    q, k, v = (normal((1, 2, n, WIDTH), seed=n) for n in (35, KEYS, KEYS))
    bias = mx.where(mx.arange(35)[:, None] < 20, 0.0, filler)
    bias = mx.broadcast_to(bias, (35, KEYS))
    out = attention(q, k, v, mask=bias, device=where)
    own = mx.fast.scaled_dot_product_attention(q, k, v, scale=WIDTH**-0.5, mask=bias)
    assert relative_error(out, np.array(own, np.float64)) < 2e-6
    if filler < -1e30:  # so low that scores are lost in it
        assert relative_error(out[:, :, 20:], mean_of(v, 15)) < 2e-6
