"""Every `metal_kernel` of the mlx-lm package, unmodified, against plain MLX operations.

Where the package has a plain-MLX twin of a kernel, that twin is the reference; its fused kernels
in `mlx_lm/kernels` have none, and are compared with the modules that they replace.

The package's own `__init__` needs transformers, so its modules are loaded one by one.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from metalgen import simulator
from metalgen.simulator.api import MetalKernel

SPEC = importlib.util.find_spec("mlx_lm")
if SPEC is None or SPEC.origin is None:
    pytest.skip(
        "mlx-lm is not installed (pip install --no-deps mlx-lm==0.32.2)", allow_module_level=True
    )
ROOT = Path(SPEC.origin).parent
Load = Callable[[str], Any]


@pytest.fixture(scope="module")
def load() -> Iterator[Load]:
    """Import a module of mlx-lm as it would be on a Mac, its kernels made by the simulator."""
    # Other tests' modules made their kernels elsewhere; they are back when these tests are over.
    before = {name: x for name, x in sys.modules.items() if name.split(".")[0] == "mlx_lm"}
    for name in before:
        del sys.modules[name]
    for name in ("mlx_lm", "mlx_lm.tuner"):
        package = types.ModuleType(name)
        package.__path__ = [str(ROOT.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    utils = types.ModuleType("mlx_lm.utils")
    utils.can_run_metal = lambda: mx.metal.is_available()  # type: ignore[attr-defined]
    sys.modules["mlx_lm.utils"] = utils
    try:
        with simulator.install():
            yield lambda name: importlib.import_module(f"mlx_lm.{name}")
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "mlx_lm"]:
            del sys.modules[name]
        sys.modules.update(before)


def normal(
    *shape: int, seed: int = 0, scale: float = 1.0, dtype: mx.Dtype = mx.float32
) -> mx.array:
    return (scale * mx.random.normal(shape, key=mx.random.key(seed))).astype(dtype)


def uniform(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.uniform(shape=shape, key=mx.random.key(seed))


def numpy(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def relative_error(got: mx.array, expected: mx.array | np.ndarray) -> float:
    reference = numpy(expected) if isinstance(expected, mx.array) else expected
    return float(np.linalg.norm(numpy(got) - reference) / np.linalg.norm(reference))


TOLERANCE = {mx.float32: 2e-6, mx.float16: 2e-3, mx.bfloat16: 1e-2}
every_type = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def test_all_kernels_of_the_package_are_tested_here(load: Load) -> None:
    files = {
        str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")
        for path in ROOT.rglob("*.py")
        if "mx.fast.metal_kernel(" in path.read_text()
    }
    assert files == set(MODULES)
    kernels = [
        value
        for name in MODULES
        for value in vars(load(name)).values()
        if isinstance(value, MetalKernel)
    ]
    assert len(kernels) == 23


MODULES = (
    "kernels.expert_routing",
    "kernels.norm_add_norm",
    "kernels.post_expert_norm_combine",
    "kernels.qk_norm",
    "kernels.qk_norm_rope",
    "kernels.rms_norm_sigmoid_gate",
    "models.bitlinear_layers",
    "models.deepseek_v41",
    "models.gated_delta",
    "models.kimi_k3",
    "models.rwkv7",
    "models.ssm",
    "tuner.losses",
)


# Gated delta rule: six kernels, one plain loop.


def delta_inputs(
    dtype: mx.Dtype, *, dim: int = 64, values: int = 8, vector: bool = False
) -> list[mx.array]:
    batch, length, key_heads, value_heads = 2, 5, 2, 4
    q = normal(batch, length, key_heads, dim, seed=1, scale=dim**-0.5, dtype=dtype)
    k = normal(batch, length, key_heads, dim, seed=2, scale=dim**-0.5, dtype=dtype)
    v = normal(batch, length, value_heads, values, seed=3, dtype=dtype)
    gate_shape = (batch, length, value_heads) + ((dim,) if vector else ())
    g = uniform(*gate_shape, seed=4)
    beta = uniform(batch, length, value_heads, seed=5).astype(dtype)
    state = normal(batch, value_heads, values, dim, seed=6)
    return [q, k, v, g, beta, state]


@every_type
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("vector", [False, True])
def test_gated_delta(load: Load, dtype: mx.Dtype, masked: bool, vector: bool) -> None:
    module = load("models.gated_delta")
    inputs = delta_inputs(dtype, vector=vector)
    mask = mx.array([[True, True, False, True, True], [False, True, True, True, False]])
    if masked:
        inputs.append(mask)
    got = module.gated_delta_kernel(*inputs)
    expected = module.gated_delta_ops(*inputs)
    seen = mask[..., None, None] if masked else mx.ones((1, 1, 1, 1))
    assert relative_error(got[0] * seen, expected[0] * seen) < TOLERANCE[dtype]
    assert relative_error(got[1], expected[1]) < TOLERANCE[dtype]


@every_type
def test_gated_delta_packed_equals_its_explicit_tree_bit_by_bit(
    load: Load, dtype: mx.Dtype
) -> None:
    module = load("models.gated_delta")
    inputs = delta_inputs(dtype, dim=128)
    with simulator.record() as runs:
        packed = module.gated_delta_kernel(*inputs)
        tree = module.gated_delta_kernel_xtree(*inputs)
    assert "packed" in runs[0].kernel and "packed" not in runs[1].kernel
    assert all(mx.array_equal(a, b).item() for a, b in zip(packed, tree, strict=True))
    expected = module.gated_delta_ops(*inputs)
    assert relative_error(packed[0], expected[0]) < TOLERANCE[dtype]
    assert relative_error(packed[1], expected[1]) < TOLERANCE[dtype]


@every_type
def test_ssm_step(load: Load, dtype: mx.Dtype) -> None:
    module = load("models.ssm")
    batch, heads, groups, dim, state = 2, 4, 2, 16, 64
    arguments = dict(
        A_log=mx.log(uniform(heads, seed=2) * 4 + 1).astype(dtype),
        B=normal(batch, 1, groups, state, seed=3, dtype=dtype),
        C=normal(batch, 1, groups, state, seed=4, dtype=dtype),
        D=normal(heads, seed=5, dtype=dtype),
        dt=normal(batch, 1, heads, seed=6, dtype=dtype),
        dt_bias=normal(heads, seed=7, dtype=dtype),
        state=normal(batch, heads, dim, state, seed=8, dtype=dtype),
        time_step_limit=(0.001, 100.0),
    )
    x = normal(batch, 1, heads, dim, seed=1, dtype=dtype)
    got = module.ssm_update_kernel(x, **arguments)
    wide = {
        name: value.astype(mx.float32) if isinstance(value, mx.array) else value
        for name, value in arguments.items()
    }
    expected = module.ssm_attn(x.astype(mx.float32), **wide)
    assert relative_error(got[0], expected[0]) < 4 * TOLERANCE[dtype]
    assert relative_error(got[1], expected[1]) < 4 * TOLERANCE[dtype]


@every_type
def test_rwkv7(load: Load, dtype: mx.Dtype) -> None:
    module = load("models.rwkv7")
    batch, length, heads, dim = 2, 4, 2, 64
    shape = (batch, length, heads, dim)
    r, k, v = (normal(*shape, seed=i, scale=0.3, dtype=dtype) for i in range(3))
    a, b = (normal(*shape, seed=i, scale=0.1, dtype=dtype) for i in (3, 4))
    w = uniform(*shape, seed=5).astype(dtype)
    state = normal(batch, heads, dim, dim, seed=6, scale=0.3, dtype=dtype)
    got, got_state = module.wkv7_kernel(r, w, k, v, a, b, state)
    wide = [x.astype(mx.float32) for x in (r, w, k, v, a, b)]
    current, rows = state.astype(mx.float32), []
    for t in range(length):
        y, current = module._wkv7_step_ops(*(x[:, t] for x in wide), current)
        rows.append(y.squeeze(-1))
    assert relative_error(got, mx.stack(rows, axis=1)) < TOLERANCE[dtype]
    assert relative_error(got_state, current) < TOLERANCE[dtype]


@every_type
def test_kimi_residual_mix(load: Load, dtype: mx.Dtype) -> None:
    module = load("models.kimi_k3")
    blocks = module.ResidualBlocks(eps=1e-5)
    for seed in range(3):
        blocks.append(normal(2, 3, 600, seed=seed, dtype=dtype))
    partial, w = normal(2, 3, 600, seed=7, dtype=dtype), normal(600, seed=8, scale=0.1)
    got = module._attn_res_mix(blocks, partial, w, 1e-5)
    expected = module._attn_res_mix(blocks, partial, w, 1e-5, use_kernel=False)
    assert relative_error(got, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("matrices, iterations", [(5, 1), (300, 4)])
def test_deepseek_sinkhorn(load: Load, matrices: int, iterations: int) -> None:
    module = load("models.deepseek_v41")
    comb = uniform(matrices, 4, 4, seed=1) + 0.1
    eps = mx.array([1e-6])
    got = module._sinkhorn(comb, iters=iterations, eps=eps)
    expected = numpy(comb)
    for step in range(2 * iterations - 1):
        axis = -1 if step % 2 else -2
        expected = expected / (expected.sum(axis, keepdims=True) + 1e-6)
    assert relative_error(got, expected) < 1e-6


@every_type
@pytest.mark.parametrize("inverted", [False, True])
def test_bitlinear(load: Load, dtype: mx.Dtype, inverted: bool) -> None:
    module = load("models.bitlinear_layers")
    rows, columns = 16, 128
    layer = module.BitLinear(columns, rows, bias=False, invert_weight_scales=inverted)
    trits = mx.random.randint(0, 3, (rows, columns), key=mx.random.key(1)).astype(mx.uint8)
    quarters = trits.reshape(4, rows // 4, columns)
    layer.weight = quarters[0] | (quarters[1] << 2) | (quarters[2] << 4) | (quarters[3] << 6)
    layer.weight_scale = mx.array([2.5]).astype(dtype)
    x = normal(2, 3, columns, dtype=dtype)
    scale = 1 / 2.5 if inverted else 2.5
    expected = numpy(x) @ (numpy(trits) - 1).T * scale
    assert relative_error(layer(x), expected) < TOLERANCE[dtype]


# Losses, and the race in them.


LOSSES = ("kl_div_loss", "js_div_loss")


def plain_loss(module: Any, name: str, q: mx.array, p: mx.array) -> mx.array:
    """Return what the package computes where it cannot run Metal."""
    kernels, module.can_run_metal = module.can_run_metal, lambda: False
    try:
        if name == "kl_div_loss":
            return module.kl_div_loss(q, p)
        # The plain path calls mx.log(2), which MLX refuses: the same formula, spelled out.
        log_p = p - mx.logsumexp(p, axis=-1, keepdims=True)
        log_q = q - mx.logsumexp(q, axis=-1, keepdims=True)
        log_m = mx.logaddexp(log_p, log_q) - float(np.log(2))
        kl_p = nn.losses.kl_div_loss(log_m, log_p, axis=-1, reduction="none")
        kl_q = nn.losses.kl_div_loss(log_m, log_q, axis=-1, reduction="none")
        return 0.5 * (kl_p + kl_q)
    finally:
        module.can_run_metal = kernels


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("vocabulary", [1000, 5000])
def test_losses(load: Load, name: str, vocabulary: int) -> None:
    module = load("tuner.losses")
    q, p = normal(3, vocabulary, seed=1), normal(3, vocabulary, seed=2)
    got = getattr(module, name)(q, p)
    assert relative_error(got, plain_loss(module, name, q, p)) < 2e-5


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_losses(load: Load, name: str) -> None:
    module = load("tuner.losses")
    q, p = normal(2, 1000, seed=1), normal(2, 1000, seed=2)
    got = mx.grad(lambda x: getattr(module, name)(x, p).sum())(q)
    expected = mx.grad(lambda x: plain_loss(module, name, x, p).sum())(q)
    assert relative_error(got, expected) < 2e-5


@pytest.mark.parametrize("name", LOSSES)
def test_the_checker_reports_the_race_on_shared_in_both_directions_of_each_loss(
    load: Load, name: str
) -> None:
    module = load("tuner.losses")
    q, p = normal(1, 1000, seed=1), normal(1, 1000, seed=2)
    with simulator.record(checked=True) as runs:
        mx.grad(lambda x: getattr(module, name)(x, p).sum())(q)
    forward, backward = runs
    for run in (forward, backward):
        assert run.findings is not None
        races = [f for f in run.findings if f.kind == "race"]
        # Sums are written where other simdgroups may still read maxima.
        overwritten = [
            f
            for f in races
            if f.access is not None
            and f.other is not None
            and (f.access.kind, f.other.kind) in {("write", "read"), ("read", "write")}
        ]
        assert overwritten, run.findings.report()
        assert {f.memory for f in races} == {"threadgroup shared"}
        lines = run.source.split("\n")
        for finding in overwritten:
            assert finding.line is not None and "shared[" in lines[finding.line - 1]
            assert finding.other is not None and finding.other.line is not None
            assert "shared[" in lines[finding.other.line - 1]
            assert finding.count >= 1
    # A place is reported once, however many threads race there.
    assert len({(f.line, f.other.line) for f in forward.findings if f.other}) == len(
        [f for f in forward.findings if f.other]
    )


def test_the_checker_reports_lanes_that_write_the_same_zero(load: Load) -> None:
    module = load("models.gated_delta")
    mask = mx.array([[True, True, False, True, True], [False, True, True, True, False]])
    for vector, findings in ((False, {"race"}), (True, {"race"})):
        with simulator.record(checked=True) as runs:
            module.gated_delta_kernel(*delta_inputs(mx.float32, vector=vector), mask)
            module.gated_delta_kernel(*delta_inputs(mx.float32, vector=vector))
        masked, plain = runs
        assert masked.findings is not None and plain.findings is not None
        assert set(masked.findings.kinds()) == findings
        assert {f.memory for f in masked.findings} == {"y"}
        assert {(f.access.kind, f.other.kind) for f in masked.findings} == {("write", "write")}
        lines = masked.source.split("\n")
        assert {lines[f.line - 1].strip() for f in masked.findings} == {
            "y[dv_idx] = static_cast<InT>(0);"
        }
        assert not len(plain.findings)


# Fused kernels of mlx_lm/kernels, against the modules that they replace.


@every_type
def test_qk_norm(load: Load, dtype: mx.Dtype) -> None:
    module = load("kernels.qk_norm")
    heads, kv_heads, dim, eps, scale = 4, 2, 48, 1e-5, 0.7
    qkvg = normal(2, 3, 2 * (heads + kv_heads) * dim, dtype=dtype)
    got = module.qk_norm(
        qkvg, n_heads=heads, n_kv_heads=kv_heads, head_dim=dim, eps=eps, query_scale=scale
    )
    q, k = mx.split(qkvg[..., : (heads + kv_heads) * dim], [heads * dim], axis=-1)
    for array, count, factor, mine in ((q, heads, scale, got[0]), (k, kv_heads, 1.0, got[1])):
        rows = numpy(array.reshape(2, 3, count, dim))
        expected = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + eps) * factor
        assert relative_error(mine, expected) < TOLERANCE[dtype]


@every_type
@pytest.mark.parametrize("offset", [7, [3, 11]])
def test_qk_norm_rope(load: Load, dtype: mx.Dtype, offset: Any) -> None:
    module = load("kernels.qk_norm_rope")
    plain = load("kernels.qk_norm")
    heads, kv_heads, dim = 4, 2, 64
    qkvg = normal(2, 3, 2 * (heads + kv_heads) * dim, dtype=dtype)
    arguments = dict(n_heads=heads, n_kv_heads=kv_heads, head_dim=dim, eps=1e-5, query_scale=0.5)
    offsets = mx.array(offset) if isinstance(offset, list) else offset
    got = module.qk_norm_rope(qkvg, **arguments, rope_base=10000.0, offset=offsets)
    for mine, normed in zip(got, plain.qk_norm(qkvg, **arguments), strict=True):
        expected = mx.fast.rope(
            normed.transpose(0, 2, 1, 3).astype(mx.float32),
            dim,
            traditional=True,
            base=10000.0,
            scale=1.0,
            offset=offsets,
        )
        assert relative_error(mine, expected.transpose(0, 2, 1, 3)) < 4 * TOLERANCE[dtype]


@every_type
@pytest.mark.parametrize("strided", [False, True])
def test_rms_norm_sigmoid_gate(load: Load, dtype: mx.Dtype, strided: bool) -> None:
    module = load("kernels.rms_norm_sigmoid_gate")
    x = normal(2, 3, 5, 48, dtype=dtype)
    if strided:
        x = normal(2, 5, 3, 48, dtype=dtype).transpose(0, 2, 1, 3)
    gate = normal(2, 5, 3 * 48 + 7, seed=1, dtype=dtype)[..., 7:]
    got = module.rms_norm_sigmoid_gate(x, gate, eps=1e-5)
    rows = numpy(x)
    normed = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-5)
    sigmoid = 1 / (1 + np.exp(-numpy(gate)))
    expected = normed.transpose(0, 2, 1, 3).reshape(2, 5, -1) * sigmoid
    assert relative_error(got, expected) < TOLERANCE[dtype]


@every_type
@pytest.mark.parametrize("dim", [100, 1024])
@pytest.mark.parametrize("scaled", [False, True])
def test_norm_add_norm(load: Load, dtype: mx.Dtype, dim: int, scaled: bool) -> None:
    module = load("kernels.norm_add_norm")
    branch, stream = normal(2, 3, dim, dtype=dtype), normal(2, 3, dim, seed=1)
    alpha, beta = uniform(dim, seed=2), uniform(dim, seed=3)
    weight = (uniform(dim, seed=4) + 0.5).astype(dtype) if scaled else None
    norm = nn.RMSNorm(dim, eps=1e-6)
    norm.weight = uniform(dim, seed=5) + 0.5
    arguments = dict(alpha=alpha, beta=beta, post_weight=weight, post_eps=1e-5)
    new_stream, normed = module.norm_add_norm(branch, stream, **arguments, next_norm=norm)

    def rms(x: np.ndarray, eps: float) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)

    scaled_branch = branch * weight if weight is not None else branch
    expected = numpy(alpha) * numpy(stream) + numpy(beta) * rms(numpy(scaled_branch), 1e-5)
    assert relative_error(new_stream, expected) < TOLERANCE[dtype]
    expected_norm = rms(expected, 1e-6) * numpy(norm.weight)
    assert relative_error(normed, expected_norm) < TOLERANCE[dtype]
    alone, nothing = module.norm_add_norm(branch, stream, **arguments, next_norm=None)
    assert nothing is None and mx.array_equal(alone, new_stream).item()
    again = module.pre_norm(new_stream, norm, dtype=dtype)
    assert mx.array_equal(again, normed).item()


@every_type
def test_post_expert_norm_combine(load: Load, dtype: mx.Dtype) -> None:
    module = load("kernels.post_expert_norm_combine")
    experts, dim = 3, 600
    outputs = normal(2, 4, experts, dim, dtype=dtype)
    weights, norm_weight = uniform(2, 4, experts, seed=1), uniform(dim, seed=2) + 0.5
    got = module.post_expert_norm_combine(outputs, weights, norm_weight=norm_weight, eps=1e-5)
    rows = numpy(outputs) * numpy(norm_weight)
    normed = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-5)
    expected = (normed * numpy(weights)[..., None]).sum(-2)
    assert relative_error(got, expected) < TOLERANCE[dtype]


def test_expert_routing(load: Load) -> None:
    module = load("kernels.expert_routing")
    experts, top = 70, 4
    logits, bias = normal(2, 5, experts), normal(experts, seed=1, scale=0.1)
    indices, weights = module.expert_routing(
        logits, bias, top_k=top, multiplier=1.5, score_eps=1e-20, route_scale=2.0
    )
    scores = 1 / (1 + np.exp(-numpy(logits) * 1.5))
    order = np.argsort(-(scores + numpy(bias)), axis=-1)[..., :top]
    assert np.array_equal(np.array(indices), order)
    chosen = np.take_along_axis(scores, order, -1)
    assert relative_error(weights, chosen / chosen.sum(-1, keepdims=True) * 2.0) < 1e-6
