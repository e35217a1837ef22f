"""MLX's own Metal kernels, unmodified from the installed wheel, against float64 references.

rms_norm and layer_norm are not among the headers of the Linux wheel. Their tests run where the
environment variable MLX_SOURCE names a checkout of MLX, and are skipped elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from metalgen import simulator
from metalgen.simulator.api import mlx_include_dir
from metalgen.simulator.harness import Constant, Output, run_metal
from metalgen.testing.mlx_kernels import KERNELS, TYPES, groups, include, instantiate, run_attention

TOLERANCE = {mx.float32: 3e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}
"""Relative error, norm over norm."""

every_type = pytest.mark.parametrize("dtype", TYPES, ids=str)


def float64(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def normal(*shape: int, dtype: mx.Dtype, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def relative_error(got: mx.array, expected: np.ndarray) -> float:
    error = float64(got) - expected
    return float(np.linalg.norm(error) / np.linalg.norm(expected))


def softmax(scores: np.ndarray) -> np.ndarray:
    top = np.exp(scores - scores.max(-1, keepdims=True))
    return top / top.sum(-1, keepdims=True)


def attention_reference(q: mx.array, k: mx.array, v: mx.array, causal: bool = False) -> np.ndarray:
    repeats = q.shape[1] // k.shape[1]
    queries, keys, values = (float64(x) for x in (q, k, v))
    keys, values = (np.repeat(x, repeats, axis=1) for x in (keys, values))
    scores = queries @ keys.transpose(0, 1, 3, 2) / np.sqrt(q.shape[-1])
    if causal:
        rows, columns = scores.shape[-2:]
        hidden = np.arange(columns)[None] > np.arange(rows)[:, None] + columns - rows
        scores = np.where(hidden, -np.inf, scores)
    return softmax(scores) @ values


@every_type
@pytest.mark.parametrize(
    "dim, q_len, kv_len, kv_heads, causal",
    [(64, 64, 64, 2, False), (64, 40, 75, 1, True), (128, 33, 50, 2, True), (80, 32, 64, 1, False)],
)
def test_attention(
    dtype: mx.Dtype, dim: int, q_len: int, kv_len: int, kv_heads: int, causal: bool
) -> None:
    q = normal(1, 2, q_len, dim, dtype=dtype)
    k = normal(1, kv_heads, kv_len, dim, dtype=dtype, seed=1)
    v = normal(1, kv_heads, kv_len, dim, dtype=dtype, seed=2)
    out = run_attention(q, k, v, causal)
    assert relative_error(out, attention_reference(q, k, v, causal)) < TOLERANCE[dtype]


@every_type
@pytest.mark.parametrize("dim, kv_len, kv_heads", [(64, 70, 2), (128, 33, 1)])
def test_decode_attention(dtype: mx.Dtype, dim: int, kv_len: int, kv_heads: int) -> None:
    heads = 4
    q = normal(1, heads, 1, dim, dtype=dtype)
    k = normal(1, kv_heads, kv_len, dim, dtype=dtype, seed=1)
    v = normal(1, kv_heads, kv_len, dim, dtype=dtype, seed=2)
    source = include("sdpa_vector.h") + instantiate(
        "decode_test", "sdpa_vector", TYPES[dtype], dim, dim
    )
    outputs = run_metal(
        source,
        "decode_test",
        {
            0: q,
            1: k,
            2: v,
            3: Output(q.shape, dtype),
            4: Constant("i", heads // kv_heads),
            5: Constant("i", kv_len),
            6: Constant("q", kv_len * dim),
            7: Constant("q", dim),
            8: Constant("q", kv_len * dim),
            9: Constant("q", dim),
            10: Constant("f", dim**-0.5),
        },
        constants={**dict.fromkeys((20, 21, 22, 23, 24, 25), False), 26: 0},
        **groups((heads, 1, 1), (1024, 1, 1)),
    )
    assert relative_error(outputs[3], attention_reference(q, k, v)) < TOLERANCE[dtype]


@every_type
@pytest.mark.parametrize(
    "size, threads, looped", [(100, 32, False), (1000, 256, False), (5000, 1024, True)]
)
def test_softmax(dtype: mx.Dtype, size: int, threads: int, looped: bool) -> None:
    x = normal(3, size, dtype=dtype)
    function = "softmax_looped" if looped else "softmax_single_row"
    source = include("softmax.h") + instantiate("softmax_test", function, TYPES[dtype], "float")
    outputs = run_metal(
        source,
        "softmax_test",
        {0: x, 1: Output(x.shape, dtype), 2: Constant("i", size)},
        **groups((3, 1, 1), (threads, 1, 1)),
    )
    assert relative_error(outputs[1], softmax(float64(x))) < TOLERANCE[dtype]


def kernel_file(name: str) -> str:
    """Return the text of a .metal file of MLX, or skip the test where there is none."""
    folders = [mlx_include_dir()]
    if "MLX_SOURCE" in os.environ:
        folders.append(Path(os.environ["MLX_SOURCE"]))
    for folder in folders:
        path = folder / KERNELS / f"{name}.metal"
        if path.is_file():
            return path.read_text()
    pytest.skip(f"the installed mlx has no {name}.metal, and MLX_SOURCE names no checkout of MLX")


@every_type
@pytest.mark.parametrize("size, looped", [(500, False), (4500, True)])
def test_rms_norm(dtype: mx.Dtype, size: int, looped: bool) -> None:
    text = kernel_file("rms_norm")
    x, w = normal(3, size, dtype=dtype), normal(size, dtype=dtype, seed=1)
    suffix = {mx.float32: "float32", mx.float16: "float16", mx.bfloat16: "bfloat16"}[dtype]
    threads = 1024 if looped else 128
    outputs = run_metal(
        text,
        f"rms{'_looped' if looped else ''}{suffix}",
        {
            0: x,
            1: w,
            2: Output(x.shape, dtype),
            3: Constant("f", 1e-5),
            4: Constant("I", size),
            5: Constant("I", 1),
        },
        constants={20: True},
        **groups((3, 1, 1), (threads, 1, 1)),
    )
    values = float64(x)
    expected = values / np.sqrt((values**2).mean(-1, keepdims=True) + 1e-5) * float64(w)
    assert relative_error(outputs[2], expected) < TOLERANCE[dtype]


@every_type
@pytest.mark.parametrize("size, looped", [(500, False), (8500, True)])
def test_layer_norm(dtype: mx.Dtype, size: int, looped: bool) -> None:
    text = kernel_file("layer_norm")
    x = normal(3, size, dtype=dtype)
    w, b = normal(size, dtype=dtype, seed=1), normal(size, dtype=dtype, seed=2)
    suffix = {mx.float32: "float32", mx.float16: "float16", mx.bfloat16: "bfloat16"}[dtype]
    threads = 1024 if looped else 64
    outputs = run_metal(
        text,
        f"layer_norm{'_looped' if looped else ''}{suffix}",
        {
            0: x,
            1: w,
            2: b,
            3: Output(x.shape, dtype),
            4: Constant("f", 1e-5),
            5: Constant("I", size),
            6: Constant("I", 1),
            7: Constant("I", 1),
        },
        constants={20: True},
        **groups((3, 1, 1), (threads, 1, 1)),
    )
    values = float64(x)
    centred = values - values.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * float64(w)
    assert relative_error(outputs[3], expected + float64(b)) < TOLERANCE[dtype]


@every_type
@pytest.mark.parametrize("m, n, k, transposed", [(64, 64, 64, False), (50, 70, 45, True)])
def test_matrix_product(dtype: mx.Dtype, m: int, n: int, k: int, transposed: bool) -> None:
    a = normal(m, k, dtype=dtype)
    b = normal(n, k, dtype=dtype, seed=1) if transposed else normal(k, n, dtype=dtype, seed=1)
    bm = bn = 32
    bk = 16
    source = include("steel/gemm/gemm.h", "steel/gemm/kernels/steel_gemm_fused.h")
    source += instantiate(
        "gemm_test", "gemm", TYPES[dtype], bm, bn, bk, 2, 2, False, transposed, "float"
    )
    tiles_m, tiles_n = -(-m // bm), -(-n // bn)
    params = Constant(
        "8i 3q 3i",
        *(m, n, k, k, k if transposed else n, n, tiles_n, tiles_m),
        *(m * k, k * n, m * n),
        *(0, k // bk, 0),
    )
    outputs = run_metal(
        source,
        "gemm_test",
        {0: a, 1: b, 3: Output((m, n), dtype), 4: params},
        constants={
            10: False,
            100: False,
            110: False,
            200: m % bm == 0,
            201: n % bn == 0,
            202: k % bk == 0,
        },
        **groups((tiles_n, tiles_m, 1), (32, 2, 2)),
    )
    right = float64(b).T if transposed else float64(b)
    assert relative_error(outputs[3], float64(a) @ right) < TOLERANCE[dtype]


def quantized(n: int, k: int, bits: int, dtype: mx.Dtype) -> tuple[list[mx.array], np.ndarray]:
    parts = mx.quantize(normal(n, k, dtype=dtype, seed=1), group_size=64, bits=bits)
    whole = mx.dequantize(
        *(part.astype(mx.float32) if i else part for i, part in enumerate(parts)),
        group_size=64,
        bits=bits,
    )
    return list(parts), float64(whole)


NO_BATCH = {7: Constant("i", 0), 8: Constant("2i", 0, 0), 9: Constant("2q", 0, 0)}


@every_type
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_matrix_vector_product(dtype: mx.Dtype, bits: int) -> None:
    n, k = 24, 192
    parts, weights = quantized(n, k, bits, dtype)
    x = normal(2, k, dtype=dtype)
    source = include("steel/gemm/gemm.h", "quantized_utils.h", "quantized.h")
    source += instantiate("qmv_test", "affine_qmv", TYPES[dtype], 64, bits, False)
    strides = Constant("2q", 0, 0)
    outputs = run_metal(
        source,
        "qmv_test",
        {
            **dict(enumerate(parts)),
            3: x,
            4: Output((2, n), dtype),
            5: Constant("i", k),
            6: Constant("i", n),
            7: Constant("i", 0),
            8: Constant("2i", 0, 0),
            9: strides,
            10: Constant("i", 0),
            11: Constant("2i", 0, 0),
            12: strides,
            13: strides,
            14: strides,
        },
        **groups((2, n // 8, 1), (32, 2, 1)),
    )
    assert relative_error(outputs[4], float64(x) @ weights.T) < TOLERANCE[dtype]


@every_type
def test_quantized_matrix_product(dtype: mx.Dtype) -> None:
    m, n, k = 40, 64, 128
    parts, weights = quantized(n, k, 4, dtype)
    x = normal(m, k, dtype=dtype)
    source = include("steel/gemm/gemm.h", "quantized_utils.h", "quantized.h")
    source += instantiate("qmm_test", "affine_qmm_t", TYPES[dtype], 64, 4, True, False)
    strides = Constant("2q", 0, 0)
    outputs = run_metal(
        source,
        "qmm_test",
        {
            **dict(enumerate(parts)),
            3: x,
            4: Output((m, n), dtype),
            5: Constant("i", k),
            6: Constant("i", n),
            7: Constant("i", m),
            8: Constant("i", 0),
            9: Constant("2i", 0, 0),
            10: strides,
            11: Constant("i", 0),
            12: Constant("2i", 0, 0),
            13: strides,
            14: strides,
            15: strides,
        },
        **groups((n // 32, -(-m // 32), 1), (32, 2, 2)),
    )
    # The kernel multiplies in the input's type: the dequantized weight is rounded to it.
    assert relative_error(outputs[4], float64(x) @ weights.T) < 1.5 * TOLERANCE[dtype]


@every_type
@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("size", [100, 1000])
def test_scan(dtype: mx.Dtype, inclusive: bool, size: int) -> None:
    x = (mx.random.randint(0, 3, (2, size), key=mx.random.key(3))).astype(dtype)
    if dtype == mx.bfloat16:
        x = x * (mx.arange(size) % 13 == 0)  # sums stay below 256, which bfloat16 holds exactly
    source = include("binary_ops.h", "scan.h")
    source += instantiate(
        "scan_test",
        "contiguous_scan",
        TYPES[dtype],
        TYPES[dtype],
        f"CumSum<{TYPES[dtype]}>",
        4,
        inclusive,
        False,
    )
    threads = -(-size // 128) * 32
    outputs = run_metal(
        source,
        "scan_test",
        {0: x.astype(dtype), 1: Output(x.shape, dtype), 2: Constant("q", size)},
        grid=(threads, 2, 1),
        threadgroup=(threads, 1, 1),
    )
    total = float64(x).cumsum(-1)
    assert np.array_equal(float64(outputs[1]), total if inclusive else total - float64(x))


@every_type
@pytest.mark.parametrize("size", [50, 900])
@pytest.mark.parametrize("arguments", [False, True])
def test_sort(dtype: mx.Dtype, size: int, arguments: bool) -> None:
    x = normal(2, size, dtype=dtype)
    threads = 128
    out = mx.uint32 if arguments else dtype
    source = include("sort.h") + instantiate(
        "sort_test",
        "block_sort",
        TYPES[dtype],
        "uint" if arguments else TYPES[dtype],
        arguments,
        threads,
        8,
    )
    one, row = Constant("i", 1), Constant("i", size)
    outputs = run_metal(
        source,
        "sort_test",
        {0: x, 1: Output(x.shape, out), 2: row, 3: one, 4: one, 5: row, 6: row},
        **groups((1, 2, 1), (threads, 1, 1)),
    )
    values = float64(x)
    if arguments:
        order = np.array(outputs[1])
        assert np.array_equal(np.sort(order, -1), np.tile(np.arange(size), (2, 1)))
        assert np.array_equal(
            np.take_along_axis(values, order.astype(int), -1), np.sort(values, -1)
        )
    else:
        assert np.array_equal(float64(outputs[1]), np.sort(values, -1))


REDUCTIONS = {
    "Sum": lambda x: x.sum(-1),
    "Max": lambda x: x.max(-1),
    "Min": lambda x: x.min(-1),
    "Prod": lambda x: x.prod(-1),
}
REDUCE = (
    "atomic.h",
    "reduction/ops.h",
    "reduce_utils.h",
    "reduce.h",
)


@every_type
@pytest.mark.parametrize("operation", REDUCTIONS)
def test_reduce_rows(dtype: mx.Dtype, operation: str) -> None:
    x = normal(8, 70, dtype=dtype)
    x = x * 0.25 + 1
    inner = "float" if dtype == mx.float32 else TYPES[dtype]
    source = include(*REDUCE) + instantiate(
        "reduce_test", "row_reduce_simple", TYPES[dtype], inner, f"{operation}<{inner}>"
    )
    outputs = run_metal(
        source,
        "reduce_test",
        {0: x, 1: Output((8,), dtype), 2: Constant("q", 70), 3: Constant("q", 8)},
        **groups((1, 2, 1), (32, 1, 1)),
    )
    assert relative_error(outputs[1], REDUCTIONS[operation](float64(x))) < 4 * TOLERANCE[dtype]


@pytest.mark.parametrize("operation", ["Sum", "Max"])
def test_reduce_all(operation: str) -> None:
    x = normal(3000, dtype=mx.float32)
    source = include(*REDUCE) + instantiate(
        "reduce_test", "all_reduce", "float", "float", f"{operation}<float>"
    )
    outputs = run_metal(
        source,
        "reduce_test",
        {0: x, 1: Output((1,), mx.float32), 2: Constant("q", 3000), 3: Constant("q", 3000)},
        **groups((1, 1, 1), (256, 1, 1)),
    )
    expected = REDUCTIONS[operation](float64(x)[None])
    assert abs(outputs[1].item() - expected[0]) < 1e-4


@every_type
def test_gemv(dtype: mx.Dtype) -> None:
    rows, columns = 64, 200
    a, x = normal(rows, columns, dtype=dtype), normal(columns, dtype=dtype, seed=1)
    source = include("steel/utils.h", "gemv.h")
    source += instantiate("gemv_test", "gemv", TYPES[dtype], 1, 4, 1, 32, 4, 4, False, False)
    outputs = run_metal(
        source,
        "gemv_test",
        {
            0: a,
            1: x,
            3: Output((rows,), dtype),
            4: Constant("i", columns),
            5: Constant("i", rows),
            6: Constant("i", columns),
            9: Constant("i", 1),
            10: Constant("i", 1),
            11: Constant("q", 0),
            12: Constant("q", 0),
        },
        **groups((rows // 4, 1, 1), (32, 4, 1)),
    )
    assert relative_error(outputs[3], float64(a) @ float64(x)) < TOLERANCE[dtype]


HALF = mx.float16
VERDICTS: dict[str, tuple[Callable[[], None], set[str]]] = {
    "attention": (lambda: test_attention(HALF, 64, 40, 75, 1, True), set()),
    "attention, D=128": (lambda: test_attention(HALF, 128, 33, 50, 2, True), set()),
    "decode attention": (lambda: test_decode_attention(HALF, 64, 70, 2), set()),
    "softmax": (lambda: test_softmax(HALF, 1000, 256, False), set()),
    "looped softmax": (lambda: test_softmax(HALF, 5000, 1024, True), set()),
    "rms_norm": (lambda: test_rms_norm(HALF, 500, False), set()),
    "matrix product": (lambda: test_matrix_product(HALF, 50, 70, 45, True), set()),
    "quantized vector": (lambda: test_quantized_matrix_vector_product(HALF, 4), set()),
    "quantized matrix": (lambda: test_quantized_matrix_product(HALF), set()),
    "sort": (lambda: test_sort(HALF, 900, True), set()),
    "reduce rows": (lambda: test_reduce_rows(HALF, "Sum"), set()),
    "reduce all": (lambda: test_reduce_all("Max"), set()),
    # The first simdgroup scans 32 sums, of which only as many as there are simdgroups were written.
    "scan": (lambda: test_scan(HALF, True, 100), {"uninitialised read"}),
    # Its barrier stands inside a condition on the lane, and fences no memory.
    "gemv over several simdgroups": (lambda: test_gemv(HALF), {"divergent barrier", "race"}),
    # A thread with no element at all fills its array from a negative index.
    "layer_norm": (lambda: test_layer_norm(HALF, 500, False), {"undefined integer behaviour"}),
}


@pytest.mark.parametrize("title", VERDICTS)
def test_the_checker_s_verdict_on_mlx_s_kernels(title: str) -> None:
    launch, kinds = VERDICTS[title]
    with simulator.record(checked=True) as runs:
        launch()
    for run in runs:
        assert run.findings is not None
        assert set(run.findings.kinds()) == kinds, run.findings.report()
