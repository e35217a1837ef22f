"""One rule of the Metal language or library each: the simulator against NumPy.

`<rule>.metal` is the body of a kernel with inputs `a`, `b` and `numbers` (four, in constant memory)
and the output `out`; its first line states the rule, and what stands before a line `// body` goes
before the kernel. RULES gives the inputs and the expected output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest

from metalgen import simulator

HERE = Path(__file__).parent
BFLOAT = ml_dtypes.bfloat16
f32 = np.float32
Array = Any  # an array of NumPy, or a scalar to be broadcast

A = np.linspace(-4, 4, 64, dtype=f32)
B = np.linspace(3, -2.5, 64, dtype=f32)
POSITIVE = np.linspace(0.1, 1.4, 64, dtype=f32)
INTS = (np.arange(64, dtype=np.int64) * 2654435761 % 4294967296 - 2147483648).astype(np.int32)
OTHERS = np.roll(INTS, 13)
MATRIX = (np.arange(64, dtype=f32) * 37 % 23 - 11) / 8
OTHER_MATRIX = (np.arange(64, dtype=f32) * 29 % 19 - 9) / 8
LANES = np.arange(64)


@dataclass(frozen=True)
class Rule:
    """`per`: elements of the output a thread; `tolerance` is relative to float32's epsilon."""

    expected: Callable[[Array, Array], Array]
    a: Array = field(default_factory=lambda: A)
    b: Array = field(default_factory=lambda: B)
    per: int = 1
    dtype: Any = f32
    tolerance: float = 0.0
    threads: int = 64
    size: int = 0
    initial: float | None = None


def rows(*columns: Array) -> Array:
    return np.stack(np.broadcast_arrays(*columns), axis=-1).reshape(-1)


def lane_blocks(a: Array) -> Array:
    return a.reshape(-1, 32)


def shifted(a: Array, step: int) -> Array:
    """simd_shuffle_up by step (down when negative): lanes without a source keep their own."""
    out = lane_blocks(a).copy()
    source = lane_blocks(a)
    if step > 0:
        out[:, step:] = source[:, :-step]
    else:
        out[:, :step] = source[:, -step:]
    return out.reshape(-1)


def per_group(a: Array, function: Callable[[Array], Any], width: int = 32) -> Array:
    groups = a.reshape(-1, width)
    return np.repeat(np.array([function(g) for g in groups]), width)


def matrix_positions() -> tuple[Array, Array]:
    lane = np.arange(32)
    q = lane // 4
    return (q & 4) + lane // 2 % 4, (q & 2) * 2 + lane % 2 * 2


def from_lanes(values: Array) -> Array:
    """The 8x8 matrix whose lane l holds values[2 l] and values[2 l + 1]."""
    row, column = matrix_positions()
    out = np.zeros((8, 8))
    out[row, column] = values[0::2]
    out[row, column + 1] = values[1::2]
    return out


def lane_map(a: Array, b: Array) -> Array:
    row, column = matrix_positions()
    m = a.reshape(8, 8)
    return rows(m[row, column], m[row, column + 1])


def half_operations(a: Array, b: Array) -> Array:
    x, y = a.astype(np.float16), b.astype(np.float16)
    return (x * y + x) / np.float16(3)


def bfloat_operations(a: Array, b: Array) -> Array:
    x, y = a.astype(BFLOAT), b.astype(BFLOAT)
    return (x * y + x).astype(f32)


def bits(a: Array) -> Array:
    return a.astype(f32).view(np.uint32)


def truncated_division(a: Array, b: Array) -> Array:
    quotient = np.trunc(a / b).astype(np.int64)
    return rows(quotient, a - quotient * b)


def sign_field(a: Array) -> Array:
    raw = (a.astype(np.int64) >> 4) & 255
    return np.where(raw >= 128, raw - 256, raw)


def saturated(x: Array) -> Array:
    return np.clip(x, -(2**31), 2**31 - 1)


def low_32(a: Array) -> Array:
    return (a.astype(np.int64) & 0xFFFFFFFF).astype(np.uint32)


def cross_and_more(a: Array, b: Array) -> Array:
    v = np.stack([a, b, np.ones_like(a)], -1).astype(np.float64)
    w = np.stack([np.full_like(a, 2), a, -np.ones_like(a)], -1).astype(np.float64)
    length = np.linalg.norm(v, axis=-1)
    c = np.cross(v, w)
    return rows((v * w).sum(-1), c[:, 0], c[:, 1], c[:, 2], length + 1 / length)


def reversed_bits(a: Array) -> Array:
    return np.array([int(f"{int(x):032b}"[::-1], 2) for x in low_32(a)])


def rotated(a: Array, n: int) -> Array:
    x = low_32(a).astype(np.uint64)
    return (((x << np.uint64(n)) | (x >> np.uint64(32 - n))) & np.uint64(0xFFFFFFFF)).astype(
        np.int64
    )


def counts(a: Array, b: Array) -> Array:
    x = [int(v) for v in low_32(a)]
    clz = [32 - v.bit_length() for v in x]
    ctz = [32 if v == 0 else (v & -v).bit_length() - 1 for v in x]
    clz16 = [16 - (v & 0xFFFF).bit_length() + 8 for v in x]
    return rows(*(np.array(c) for c in ([v.bit_count() for v in x], clz, ctz, clz16)))


def frexp_parts(a: Array, b: Array) -> Array:
    fraction, exponent = np.frexp(a)
    return rows(fraction, exponent.astype(f32), a * 2)


def chained(start: int, n: int) -> int:
    value = start
    for _ in range(n):
        value = (value * 3 + 1) % 2**32
    return value


SMALL = np.arange(64, dtype=np.int32) % 40 - 20
DIVISORS = np.where(np.arange(64) % 7 < 3, -3, np.arange(64) % 7).astype(np.int32)
BITS = np.concatenate([[0, 1, -1, 2**30], INTS[4:]]).astype(np.int32)

RULES: dict[str, Rule] = {
    "vector_constructor_concatenates": Rule(
        lambda a, b: rows(a, b, f32(3), f32(4), b, f32(3), a), per=7
    ),
    "vector_constructor_fills": Rule(lambda a, b: a * 4 + 14, tolerance=4),
    "vector_constructor_converts": Rule(
        lambda a, b: rows(np.trunc(a), np.trunc(-a), np.trunc(a + f32(0.5)), f32(2)),
        per=4,
        dtype=np.int32,
    ),
    "vector_c_cast_converts": Rule(
        lambda a, b: rows(
            *(np.trunc(x) + np.trunc(x * x) + 1 for x in (a, -a, a + f32(0.5), f32(2.75)))
        ),
        per=4,
        dtype=np.int32,
    ),
    "vector_static_cast_converts": Rule(
        lambda a, b: rows(a, f32(0.1), f32(1) / f32(3), f32(2)).astype(np.float16), per=4
    ),
    "vector_alias_converts": Rule(
        lambda a, b: rows(
            np.trunc(a) + (np.trunc(a).astype(int) & 255),
            np.trunc(-a) + 1,
            np.trunc(a * 2) + 2,
            9 + 3,
        ),
        per=4,
        dtype=np.int32,
    ),
    "as_type_reinterprets": Rule(
        lambda a, b: (
            bits(a) ^ (a.astype(np.float16).view(np.uint16).astype(np.uint32) | 0x3C000000)
        ),
        dtype=np.uint32,
    ),
    "swizzle_reads": Rule(
        lambda a, b: rows(
            a + 3 + a + a, a + 2 + a + a + 1, a + 1 + a + 1 + a + 2, a + a + 1 + a + 3
        ),
        per=4,
        tolerance=8,
    ),
    "swizzle_writes": Rule(lambda a, b: rows(a, f32(-1), b, f32(5)), per=4),
    "vector_operators_are_elementwise": Rule(
        lambda a, b: rows(*(1 / np.float64(x) * 3 - x for x in (a, b, f32(2)))), per=3, tolerance=16
    ),
    "any_and_all_of_a_comparison": Rule(
        lambda a, b: ((a > 2) | (b > 2)) + 2 * ((a > -2) & (b > -2)) + 4 * (a > 0) + 8,
        dtype=np.int32,
    ),
    "select_takes_its_second_where_true": Rule(
        lambda a, b: rows(np.where(a < 0, b, a) + (a > b), np.where(b < 0, b, a)),
        per=2,
        tolerance=2,
    ),
    "half_rounds_every_operation": Rule(half_operations),
    "bfloat_rounds_every_operation": Rule(bfloat_operations),
    "half_and_bfloat_convert_explicitly": Rule(
        lambda a, b: 3 * a.astype(np.float16).astype(BFLOAT).astype(f32)
    ),
    "literals_of_half_and_bfloat": Rule(
        lambda a, b: f32(1) + f32(np.float16(0.1)) + f32(BFLOAT(0.1)) + 0 * a, tolerance=2
    ),
    "unsuffixed_literals_are_float": Rule(lambda a, b: f32(0.1) + a),
    "integer_division_truncates": Rule(
        truncated_division, a=SMALL, b=DIVISORS, per=2, dtype=np.int32
    ),
    "right_shift_keeps_the_sign": Rule(
        lambda a, b: (a >> 3) + (low_32(a) >> 29), a=INTS, dtype=np.int32
    ),
    "unsigned_arithmetic_wraps": Rule(
        lambda a, b: (a.astype(np.int64) - 7) % 2**32 * 3000000019 % 2**32,
        a=np.arange(64, dtype=np.uint32),
        dtype=np.uint32,
    ),
    "small_integers_promote": Rule(
        lambda a, b: a * a + (3 * a) ** 2 - (a + 200) % 256,
        a=np.arange(190, 254, dtype=np.int32),
        dtype=np.int32,
    ),
    "float_to_integer_truncates": Rule(
        lambda a, b: np.trunc(a) + 1000 * np.trunc(b), dtype=np.int32
    ),
    "clamp_mix_saturate": Rule(
        lambda a, b: rows(np.clip(a, -1, 1), a + (b - a) * f32(0.25), np.clip(a, 0, 1), np.sign(a)),
        per=4,
        tolerance=4,
    ),
    "step_and_smoothstep": Rule(
        lambda a, b: rows(
            a >= 0.5, (t := np.clip((np.float64(a) + 1) / 3, 0, 1)) ** 2 * (3 - 2 * t)
        ),
        per=2,
        tolerance=16,
    ),
    "fma_rounds_once": Rule(lambda a, b: np.float64(a) * np.float64(b) - 1),
    "max_and_min_ignore_nan": Rule(
        lambda a, b: rows(
            a + a,
            np.maximum(np.maximum(a, b), 0)
            - np.minimum(np.minimum(a, b), 0)
            + np.median([a, b, 0 * a], axis=0),
        ),
        per=2,
        tolerance=4,
    ),
    "rint_and_round": Rule(
        lambda a, b: rows(
            np.rint(x := a / 2), np.trunc(x + np.copysign(0.5, x)), np.trunc(x), x - np.floor(x)
        ),
        a=np.arange(-32, 32, dtype=f32),
        per=4,
    ),
    "fmod_and_copysign": Rule(lambda a, b: rows(np.fmod(a, f32(1.5)), np.copysign(a, b)), per=2),
    "frexp_and_ldexp": Rule(frexp_parts, per=3),
    "exponentials_at_infinity": Rule(
        lambda a, b: np.exp2(np.float64(a)) + np.exp(np.float64(b)) + 2, tolerance=16
    ),
    "tests_of_floating_point": Rule(lambda a, b: 0 * a + 1 + 2 + 4 + 8, dtype=np.int32),
    "bit_counts": Rule(counts, a=BITS, per=4, dtype=np.int32),
    "reverse_bits_and_rotate": Rule(
        lambda a, b: rows(reversed_bits(a), rotated(a, 5)),
        a=BITS.view(np.uint32),
        per=2,
        dtype=np.uint32,
    ),
    "mulhi_is_the_upper_half": Rule(
        lambda a, b: rows(
            (a.astype(np.int64) * b.astype(np.int64)) >> 32,
            ((low_32(a).astype(np.uint64) * low_32(b).astype(np.uint64)) >> np.uint64(32))
            .astype(np.uint32)
            .view(np.int32),
        ),
        a=INTS,
        b=OTHERS,
        per=2,
        dtype=np.int32,
    ),
    "saturating_arithmetic": Rule(
        lambda a, b: rows(
            saturated(a.astype(np.int64) + b),
            saturated(a.astype(np.int64) - b),
            np.abs(a.astype(np.int64) - b).astype(np.uint32).view(np.int32),
            (a.astype(np.int64) + b) >> 1,
        ),
        a=INTS,
        b=OTHERS,
        per=4,
        dtype=np.int32,
    ),
    "bit_fields": Rule(
        lambda a, b: rows(
            sign_field(a),
            (a.astype(np.int64) >> 4) & 255,
            ((low_32(a) & np.uint32(0xFFFF00FF)) | np.uint32(0x5A00)).view(np.int32),
        ),
        a=INTS,
        per=3,
        dtype=np.int32,
    ),
    "geometry": Rule(cross_and_more, per=5, tolerance=32),
    "matrices_are_columns": Rule(
        lambda a, b: rows(a + a + 3 * b, b + 2 * a + 4 * b, f32(7)), per=3, tolerance=16
    ),
    "packed_vectors_have_no_padding": Rule(
        lambda a, b: a[0:192:3] + 10 * a[1:192:3] + 100 * a[2:192:3],
        a=np.arange(192, dtype=f32) % 9,
    ),
    "packed_vectors_are_written": Rule(lambda a, b: rows(2 * a, b, f32(7)), per=3),
    "pack_and_unpack": Rule(
        lambda a, b: rows(
            (q := np.rint(np.clip(np.float64(b), 0, 1) * 255)) + 128 * 256 + 255 * 65536,
            (np.rint(np.clip(np.float64(a), 0, 1) * 255) + q) / 255,
        ),
        a=POSITIVE,
        b=POSITIVE[::-1].copy(),
        per=2,
        tolerance=8,
    ),
    "simd_shuffle_xor_reads_the_partner": Rule(
        lambda a, b: a[LANES ^ 1] + 2 * a[LANES ^ 8], tolerance=4
    ),
    "simd_shuffle_up_keeps_the_first": Rule(
        lambda a, b: rows(shifted(a, 3), shifted(a, -3)), per=2
    ),
    "simd_shuffle_and_fill_up": Rule(
        lambda a, b: np.concatenate(
            [
                np.concatenate([y[-2:], x[:-2]])
                for x, y in zip(lane_blocks(a), lane_blocks(b), strict=True)
            ]
        )
    ),
    "simd_shuffle_rotates": Rule(
        lambda a, b: (np.roll(lane_blocks(a), -5, 1) - np.roll(lane_blocks(a), 1, 1)).reshape(-1)
    ),
    "simd_broadcast_reads_one_lane": Rule(
        lambda a, b: (x := lane_blocks(a), (x[:, 5:6] + x[:, ::-1] + x[:, :1]).reshape(-1))[1],
        tolerance=4,
    ),
    "simd_sum_of_the_active_lanes": Rule(
        lambda a, b: (
            np.where(LANES % 32 < 7, per_group(a, lambda g: np.float64(g[:7]).sum()), 0)
            + per_group(a, np.max)
        ),
        tolerance=32,
    ),
    "simd_reductions_of_integers": Rule(
        lambda a, b: per_group(
            a,
            lambda g: (
                (int(np.bitwise_and.reduce(g | 1)) << 20)
                + (int(np.bitwise_or.reduce(g)) << 8)
                + int(np.bitwise_xor.reduce(g))
                + int(g.min()) * 8
            ),
        ),
        a=np.arange(64, dtype=np.int32) % 50 + 3,
        dtype=np.int32,
    ),
    "simd_prefix_sums": Rule(
        lambda a, b: rows(
            (np.cumsum(lane_blocks(a), 1) - lane_blocks(a)).reshape(-1),
            np.cumsum(lane_blocks(a), 1).reshape(-1),
        ),
        a=np.arange(64, dtype=f32) % 11,
        per=2,
    ),
    "simd_ballot_votes": Rule(
        lambda a, b: per_group(
            a, lambda g: (sum(1 << k for k in range(32) if g[k] > 0) + 2) % 2**32
        ),
        dtype=np.uint32,
    ),
    "quad_functions": Rule(
        lambda a, b: per_group(a, np.sum, 4) + 100 * a[LANES ^ 2] + 10000 * a[LANES // 4 * 4 + 1],
        a=np.arange(64, dtype=f32) % 7,
        tolerance=4,
    ),
    "simd_shuffle_of_vectors": Rule(
        lambda a, b: 3 * a[LANES ^ 4] + 32 + a[LANES ^ 2], a=np.arange(64, dtype=f32)
    ),
    "simdgroup_matrix_lane_map": Rule(lane_map, a=MATRIX, threads=32, per=2),
    "simdgroup_matrix_product": Rule(
        lambda a, b: (np.float64(a).reshape(8, 8) @ np.float64(b).reshape(8, 8) + 2).reshape(-1),
        a=MATRIX,
        b=OTHER_MATRIX,
        threads=32,
        per=2,
        tolerance=16,
    ),
    "simdgroup_matrix_mixed_product": Rule(
        lambda a, b: (from_lanes(a) @ from_lanes(b)).reshape(-1),
        a=MATRIX,
        b=OTHER_MATRIX,
        threads=32,
        per=2,
        tolerance=16,
    ),
    "simdgroup_load_transposed": Rule(
        lambda a, b: a.reshape(8, 16)[:, 8:].T.reshape(-1),
        a=np.arange(128, dtype=f32),
        threads=32,
        per=2,
    ),
    "simdgroup_matrix_diagonal": Rule(lambda a, b: np.eye(8).reshape(-1) * 3, threads=32, per=2),
    "threadgroup_memory_is_shared": Rule(
        lambda a, b: (x := a.reshape(2, 64), (x[:, ::-1] + np.array([[0], [1000]])).reshape(-1))[1],
        a=np.arange(128, dtype=f32),
        threads=128,
    ),
    "threadgroup_memory_takes_structures": Rule(
        lambda a, b: a.reshape(64, 4)[::-1].reshape(-1), a=np.arange(256, dtype=f32), per=4
    ),
    "atomics_lose_nothing": Rule(
        lambda a, b: np.array([a.sum(), a.max(), np.bitwise_or.reduce(1 << (a & 7))]),
        a=np.arange(64, dtype=np.int32) % 5,
        dtype=np.int32,
        size=3,
        initial=0,
    ),
    "atomic_float_addition": Rule(
        lambda a, b: np.array([a.sum()]), a=np.arange(64, dtype=f32), size=1, initial=0
    ),
    "compare_and_exchange": Rule(
        lambda a, b: np.array([chained(0, 64)]), dtype=np.uint32, size=1, initial=0
    ),
    "casts_through_template_parameters_convert": Rule(
        lambda a, b: rows(*(101 * np.trunc(x) + np.trunc(a) for x in (a, -a, f32(2.5), b))),
        per=4,
        dtype=np.int32,
    ),
    "structures_copy_out_of_constant_memory": Rule(
        lambda a, b: np.tile([121, 143], 32) + a, tolerance=4
    ),
    "numeric_limits": Rule(
        lambda a, b: 0 * a + f32(65504 + 2147483647.0 + 2.0**-7 + 1 + 255), tolerance=2
    ),
    "names_reserved_elsewhere": Rule(lambda a, b: a + b + b),
    "references_name_their_space": Rule(lambda a, b: (a + 1) * 2, tolerance=2),
    "arrays_in_thread_memory": Rule(
        lambda a, b: np.array(
            [sum(np.float64(x) ** 2 * k * ((k + i) % 8) for k in range(8)) for i, x in enumerate(a)]
        ),
        tolerance=16,
    ),
}


def evaluate(name: str, rule: Rule) -> tuple[Array, simulator.Findings]:
    """The rule's output, and what the checker found."""
    declarations, _, body = (HERE / f"{name}.metal").read_text().rpartition("// body\n")
    kernel = simulator.metal_kernel(
        name=name,
        input_names=["a", "b", "numbers"],
        output_names=["out"],
        header=f"#include <metal_simdgroup_matrix>\n{declarations}",
        source=body,
    )
    size = rule.size or rule.threads * rule.per
    dtype = {f32: mx.float32, np.int32: mx.int32, np.uint32: mx.uint32}[rule.dtype]
    with simulator.record(checked=True) as runs:
        (out,) = kernel(
            inputs=[mx.array(rule.a), mx.array(rule.b), mx.array([1.0, 2.0, 3.0, 4.0])],
            output_shapes=[(size,)],
            output_dtypes=[dtype],
            grid=(rule.threads, 1, 1),
            threadgroup=(min(64, rule.threads), 1, 1),
            init_value=rule.initial,
        )
    findings = runs[0].findings
    assert findings is not None
    return np.array(out), findings


@pytest.mark.parametrize("name", RULES)
def test_the_rule_holds(name: str) -> None:
    rule = RULES[name]
    got, findings = evaluate(name, rule)
    expected = np.asarray(rule.expected(rule.a, rule.b))
    assert got.shape == expected.shape
    if rule.dtype is f32:
        want = np.float64(expected.astype(f32))
        bound = rule.tolerance * np.finfo(f32).eps * np.maximum(1, np.abs(want))
        assert np.all(np.abs(got - want) <= bound), (got, want)
    else:
        assert np.array_equal(got.astype(np.int64), expected.astype(np.int64)), (got, expected)
    assert len(findings) == 0, findings


def test_every_snippet_states_its_rule_and_is_run() -> None:
    files = {path.stem: path.read_text() for path in HERE.glob("*.metal")}
    assert set(files) == set(RULES)
    assert all(text.startswith("// ") and text.isascii() for text in files.values())
