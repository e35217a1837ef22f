"""Numbers of NumPy, and of anything else with ``__index__``, are those of Python to every call."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import metalgen
from metalgen import ArgumentError, AttentionConfig, Schedule
from metalgen.arguments import as_integer, as_number, check_integer, check_positive
from metalgen.calls.kernel import check_scale
from metalgen.families import check_schedule, decode_schedule
from metalgen.families.append import append_schedule
from metalgen.families.sizes import Problem


class Seven:
    """Of no library that metalgen knows."""

    def __index__(self) -> int:
        return 7

    def __repr__(self) -> str:
        return "Seven()"


INTEGERS = [7, np.int8(7), np.uint64(7), np.array(7), Seven()]
NO_INTEGERS = [True, np.True_, 7.0, np.float32(7), "7", None, mx.array(7), np.array([7]), 7j]


@pytest.mark.parametrize("value", INTEGERS, ids=repr)
def test_an_integer_is_what_has_an_index(value: object) -> None:
    for found in (as_integer(value), check_integer("n", value, 7, 7), check_positive("n", value)):
        assert found == 7 and type(found) is int


@pytest.mark.parametrize("value", NO_INTEGERS, ids=repr)
def test_what_is_no_integer_is_refused_as_it_came(value: object) -> None:
    assert as_integer(value) is None
    with pytest.raises(ArgumentError) as caught:
        check_integer("n", value, 1, 9)
    assert str(caught.value) == f"n: expected an integer from 1 to 9, but got {value!r}"
    with pytest.raises(ArgumentError, match="^n: expected a positive integer, but got"):
        check_positive("n", value)


@pytest.mark.parametrize(("low", "high"), [(1, 6), (8, 9)])
def test_an_integer_out_of_range_is_refused(low: int, high: int) -> None:
    with pytest.raises(ArgumentError, match=f"an integer from {low} to {high}, but got"):
        check_integer("n", np.int64(7), low, high)
    with pytest.raises(ArgumentError, match="a positive integer, but got"):
        check_positive("n", np.int64(0))


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (2, 2.0),
        (0.5, 0.5),
        (np.float16(0.1), 0.0999755859375),
        (np.float64(0.1), 0.1),
        (np.int32(-3), -3.0),
        (Fraction(1, 4), 0.25),
        (Seven(), 7.0),
        (np.array(7), 7.0),
        (np.array(0.5, np.float16), 0.5),
        (np.longdouble(0.5), 0.5),
        (math.inf, math.inf),
        *((value, None) for value in (True, np.True_, "1", None, 1j, mx.array(1.0), 10**400)),
        (Decimal(1), None),
        (np.array([1.0]), None),
        *((np.array(value), None) for value in (True, "1", 1j, None)),
        (np.timedelta64(7, "s"), None),  # a signed integer, says NumPy
    ],
)
def test_a_number_is_what_is_real(value: object, number: float | None) -> None:
    found = as_number(value)
    assert found == number and type(found) in (float, type(None))


def test_a_config_of_numpy_numbers_is_that_of_pythons() -> None:
    numbers: dict[str, Any] = {
        "head_dim": 128,
        "value_head_dim": 64,
        "heads_per_kv": 4,
        "window_left": 9,
        "window_right": 0,
        "softcap": 30.0,
        "dropout": 0.5,
        "page_size": 16,
        "kv_bits": 4,
        "kv_group": 32,
        "rope": "half",
        "rope_dims": 32,
        "max_work": 1 << 20,
    }
    others = {
        name: np.int64(n) if type(n) is int else np.float32(n) if type(n) is float else n
        for name, n in numbers.items()
    }
    plain, other = AttentionConfig(**numbers), AttentionConfig(**others)
    assert (plain, plain.key, hash(plain)) == (other, other.key, hash(other))
    assert repr(plain) == repr(other)  # which shows types
    assert json.loads(other.key) == {"dtype": "float16", **numbers}
    assert AttentionConfig.from_dict(others) == plain
    # A field that says the same in another way is left out, whatever its type.
    assert AttentionConfig(np.int64(64), value_head_dim=np.int16(64)) == AttentionConfig(64)  # type: ignore[arg-type]
    assert AttentionConfig(64, rope="half", rope_dims=np.int64(64)).rope_dims is None  # type: ignore[arg-type]


def test_a_schedule_of_numpy_integers_is_that_of_pythons() -> None:
    fields = {"bq": 32, "bk": 16, "bd": 64, "simdgroups": 4, "buffers": 2, "load_width": 4}
    others: dict[str, Any] = {name: np.int32(n) for name, n in fields.items()}
    plain = Schedule(**fields)  # type: ignore[arg-type]
    for other in (Schedule(**others), decode_schedule(others, "forward", "metal")):
        assert (plain, plain.key, repr(plain)) == (other, other.key, repr(other))
        check_schedule(AttentionConfig(64), other)
    for value in (True, 4.0, "4"):
        with pytest.raises(ArgumentError, match="^simdgroups: expected an integer of 1, 2,"):
            decode_schedule(fields | {"simdgroups": value}, "forward", "metal")
    appending: Any = (np.int64(64), np.int64(4))
    assert repr(append_schedule(*appending)) == repr(append_schedule(64, 4))


def test_a_problem_and_a_kernel_of_numpy_sizes_are_those_of_pythons() -> None:
    config = AttentionConfig(64)
    sizes: Any = [np.int64(n) for n in (8, 100, 300)]
    problem = Problem(config, *sizes)
    assert (problem.key, repr(problem)) == (
        (same := Problem(config, 8, 100, 300)).key,
        repr(same),
    )
    plain = {"batch": 2, "heads": 4, "q_len": 100, "kv_len": 300}
    others: dict[str, Any] = {name: np.int64(n) for name, n in plain.items()}
    kernel = metalgen.get_kernel(config, **plain, device="reference")  # type: ignore[arg-type]
    assert metalgen.get_kernel(config, **others, device="reference") is kernel
    small: Any = {"batch": np.int8(16), "q_len": np.int8(100)}  # times 4 heads is 64; times 40, 128
    for heads in (40, np.int8(40), np.int16(300), 300):
        kernel = metalgen.get_kernel(config, **small, heads=heads, kv_len=300, device="reference")
        assert kernel is metalgen.get_kernel(
            config, batch=16, heads=int(heads), q_len=100, kv_len=300, device="reference"
        )
    for name, value in (("batch", None), ("heads", 0), ("q_len", 1.0), ("kv_len", np.True_)):
        with pytest.raises(ArgumentError, match=f"^{name}: expected"):
            metalgen.get_kernel(config, **(others | {name: value}), device="reference")
    assert check_scale(64, np.float32(0.25)) == 0.25  # type: ignore[arg-type]


def rope(number: Callable[[float], Any]) -> metalgen.Rope:
    return metalgen.Rope(
        dims=number(32), base=number(500.0), scale=number(0.5), offset=number(7), style="pairs"
    )


def attention(number: Callable[[float], Any]) -> list[mx.array]:
    q, k, v = (
        mx.random.normal((2, heads, 40, 64), key=mx.random.key(heads)) for heads in (4, 2, 2)
    )
    out = metalgen.attention(
        q,
        k,
        v,
        scale=number(0.125),
        softcap=number(2.0),
        window_left=number(9),
        window_right=number(3),
        max_work=number(1 << 16),
        rope=rope(number),
        alibi_slopes=metalgen.alibi_slopes(number(4)),
        device="reference",
    )
    packed = metalgen.attention(
        *(x[:1] for x in (q, k, v)),
        cu_seqlens_q=mx.array([0, 10, 40]),
        cu_seqlens_k=mx.array([0, 10, 40]),
        max_seqlen_q=number(30),
        max_seqlen_k=number(30),
        device="reference",
    )
    assert isinstance(out, mx.array) and isinstance(packed, mx.array)
    return [out, packed]


def caches(number: Callable[[float], Any]) -> list[mx.array]:
    k = mx.random.normal((1, 2, 12, 64), mx.float16, key=mx.random.key(0))
    dense = metalgen.KVCache(
        bits=number(8),
        group_size=number(32),
        step=number(16),
        rope=rope(number),
        device="reference",
    )
    dense.append(k, k)
    dense.trim(number(3))
    pages = metalgen.PagedKVCache(
        number(4),
        number(2),
        number(64),
        value_head_dim=number(64),
        page_size=number(8),
        device="reference",
    )
    names = [pages.add(), pages.add()]
    pages.append(names, k, k, counts=[number(5), number(7)])
    pages.trim(names[0], number(2))
    empty = mx.zeros((1, 2, 20, 64), mx.float16)
    placed = metalgen.append_kv((empty, empty), k, k, offset=number(4), device="reference")
    assert dense.length == 9 and pages.length(names[0]) == 3
    parts: list[Any] = [*dense.state[0], *pages.tables(names), pages.keys, placed[0]]
    return parts


def masks(number: Callable[[float], Any]) -> list[mx.array]:
    made = [
        metalgen.create_block_mask(
            lambda b, h, i, j: (j <= i) & (j >= h), None, number(3), number(50), number(70), size
        )
        for size in (number(16), (number(32), number(16)))
    ]
    return [x for mask in made for x in (mask.some, mask.every, mask.lists(16, 16))]


@pytest.mark.parametrize("of", [attention, caches, masks])
def test_a_call_with_numpy_numbers_is_that_with_pythons(
    of: Callable[[Callable[[float], Any]], list[mx.array]],
) -> None:
    def numpys(n: float) -> Any:
        return np.int32(n) if type(n) is int else np.float64(n)

    for plain, other in zip(of(lambda n: n), of(numpys), strict=True):
        assert plain.dtype == other.dtype and mx.array_equal(plain, other)
