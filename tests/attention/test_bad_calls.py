"""What is said of a call that cannot be: in the caller's own words, before anything runs."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import metalgen
from metalgen import ArgumentError, Rope, attention, create_block_mask, flex_attention
from metalgen import varlen_attention as packed_attention
from metalgen.testing.devices import normal

Q = normal((2, 4, 5, 32), "float16", 1)
K = normal((2, 2, 9, 32), "float16", 2)
COSINES = mx.ones((5, 4))
PACKED = normal((1, 4, 7, 32), "float16", 1), normal((1, 2, 7, 32), "float16", 2)
PAGES = normal((3, 2, 8, 32), "float16", 3)
CU = mx.array([0, 3, 7])
TABLE, LENGTHS = mx.array([[0, 1], [2, -1]]), mx.array([9, 4])


def quantized(x: mx.array, bits: int = 8, group: int = 32) -> tuple[mx.array, ...]:
    return tuple(mx.quantize(x, group_size=group, bits=bits))


K8, K4 = quantized(K), quantized(K, 4)

DENSE: dict[str, tuple[dict[str, Any], str]] = {
    "a list of lengths": (
        {"kv_lens": [9, 4]},
        r"kv_lens: expected an mlx.core.array of integers, as of mx.array\(...\), "
        r"but got \[9, 4\]",
    ),
    "lengths of NumPy": (
        {"kv_lens": np.ones(99, np.int32)},
        r"kv_lens: expected an mlx.core.array of integers.*, but got 'a numpy.ndarray'$",
    ),
    "lengths of floats": ({"kv_lens": mx.ones((2,))}, "kv_lens.dtype: expected int32, but got "),
    "lengths of too few": ({"kv_lens": mx.array([9])}, r"kv_lens.shape: expected \(2,\)"),
    "numbers of too few": ({"q_offset": mx.array([9])}, r"q_offset.shape: expected \(2,\)"),
    "numbers of floats": ({"q_offset": mx.ones((2,))}, "q_offset.dtype: expected int32, but got "),
    "an offset with a part": ({"q_offset": 1.5}, "q_offset: expected an integer, or an mlx.core"),
    "an offset too far": ({"q_offset": 1 << 31}, "q_offset: expected an integer from -1073741824"),
    "slopes of too few": (
        {"alibi_slopes": mx.ones((3, 4))},
        r"alibi_slopes.shape: expected \(2, 4",
    ),
    "slopes in cubes": (
        {"alibi_slopes": mx.ones((1, 2, 4))},
        r"alibi_slopes.shape: expected \(H,\)",
    ),
    "used of too few": ({"seqused_q": mx.array([9])}, r"seqused_q.shape: expected \(2,\)"),
    "used of floats": ({"seqused_q": mx.ones((2,))}, "seqused_q.dtype: expected int32, but got "),
    "starts of too few": ({"kv_starts": mx.array([9])}, r"kv_starts.shape: expected \(2,\)"),
    "starts of floats": ({"kv_starts": mx.ones((2,))}, "kv_starts.dtype: expected int32, but got "),
    "lengths in rows": ({"kv_lens": mx.array([[9, 4]])}, "kv_lens.shape: expected 1 axis, but"),
    "lengths for a rope": (
        {"kv_lens": mx.array([9, 4, 1]), "rope": Rope()},
        r"kv_lens.shape: expected \(2,\), but got \(3,\)",
    ),
    "slopes of another number": (
        {"alibi_slopes": mx.ones((3,))},
        r"alibi_slopes.shape: expected \(4,\)",
    ),
    "slopes of integers": ({"alibi_slopes": mx.arange(4)}, "alibi_slopes.dtype: expected float32"),
    "a sink for all": ({"sinks": 1.0}, "sinks: expected an mlx.core.array of numbers"),
    "sinks of another number": ({"sinks": mx.ones((2,))}, r"sinks.shape: expected \(4,\)"),
    "a mask of integers": (
        {"mask": mx.ones((5, 9), mx.int32)},
        r"mask.dtype: expected bool \(True: the key is seen\), or floats",
    ),
    "a mask of another shape": (
        {"mask": mx.ones((9, 5), mx.bool_)},
        r"mask.shape: expected 4 axes that broadcast to \(2, 4, 5, 9\), but got \(1, 1, 9, 5\)",
    ),
    "a mask of five axes": ({"mask": mx.ones((1,) * 5, mx.bool_)}, "mask.shape: expected 4 axes"),
    "an additive mask of another shape": (
        {"mask": mx.ones((9, 5))},
        "mask.shape: expected 4 axes that broadcast",
    ),
    "a mask by another name": (
        {"mask": "lower"},
        'mask: expected an mlx.core.array, a BlockMask, "causal", or',
    ),
    "a mask in lists": ({"mask": [[True]]}, "mask: expected an mlx.core.array of booleans"),
    "two biases": (
        {"mask": mx.ones((5, 9)), "bias": mx.ones((5, 9))},
        r"mask: expected booleans with a bias; write bias=bias \+ mask",
    ),
    "a bias of booleans": (
        {"bias": mx.ones((5, 9), mx.bool_)},
        r"bias.dtype: expected float32 or the type of q \(booleans go to mask\)",
    ),
    "all dropped": ({"dropout": 1.0}, "dropout: expected a number from 0 to below 1, but got 1.0"),
    "a seed for a key": (
        {"dropout": 0.5, "dropout_key": 7},
        r"dropout_key: expected an mlx.core.array, such as mx.random.key\(0\), or None, but got 7",
    ),
    "another kind of key": (
        {"dropout": 0.5, "dropout_key": mx.array([1, 2])},
        "dropout_key.dtype: expected uint32",
    ),
    "a dictionary for a rope": ({"rope": {"dims": 8}}, "rope: expected a metalgen.Rope, or None"),
    "too many columns turn": (
        {"rope": Rope(dims=64)},
        "rope.dims: expected an even number from 2 to 32, but got 64",
    ),
    "periods of another number": (
        {"rope": Rope(freqs=mx.ones((5,)))},
        r"rope.freqs.shape: expected \(16,\), but got \(5,\)",
    ),
    "offsets of another number": (
        {"rope": Rope(offset=mx.array([1, 2, 3]))},
        r"rope.offset.shape: expected \(2,\), but got \(3,\)",
    ),
    "offsets of floats": (
        {"rope": Rope(offset=mx.array([1.0, 2.0]))},
        "rope.offset.dtype: expected int32",
    ),
    "too little work": ({"max_work": 100}, "max_work: expected an integer from 65536"),
    "a word for a switch": ({"deterministic": "yes"}, "deterministic: expected True or False"),
    "keys without queries": (
        {"cu_seqlens_k": CU},
        "cu_seqlens_k: expected None without cu_seqlens_q",
    ),
    "a longest without sequences": (
        {"max_seqlen_k": 7},
        "max_seqlen_k: expected None without cu_seqlens_q, but got 7",
    ),
    "a window below 0": ({"window_left": -1}, "window_left: expected an integer from 0"),
}


@pytest.mark.parametrize("name", DENSE)
def test_an_option_that_does_not_fit_is_named(name: str) -> None:
    keywords, message = DENSE[name]
    with pytest.raises(ArgumentError, match=f"^{message}"):
        attention(Q, K, K, **keywords)


PACK: dict[str, tuple[dict[str, Any], str]] = {
    "starts in a list": ({"cu_seqlens_q": [0, 3, 7]}, "cu_seqlens_q: expected an mlx.core.array"),
    "starts of floats": ({"cu_seqlens_q": mx.ones((3,))}, "cu_seqlens_q.dtype: expected int32"),
    "no sequence": (
        {"cu_seqlens_q": mx.array([0])},
        "cu_seqlens_q.shape: expected 2 elements or more",
    ),
    "starts of too few keys": (
        {"cu_seqlens_q": CU, "cu_seqlens_k": mx.array([0, 7])},
        r"cu_seqlens_k.shape: expected \(3,\), but got \(2,\)",
    ),
    "a rope for too few keys": (
        {"cu_seqlens_q": CU, "cu_seqlens_k": mx.array([0, 7]), "rope": Rope()},
        r"cu_seqlens_k.shape: expected \(3,\), but got \(2,\)",
    ),
    "a bias": (
        {"cu_seqlens_q": CU, "bias": mx.ones((7, 7))},
        "bias: expected None with cu_seqlens_q; use flex_attention's score_mod, which counts",
    ),
    "a mask of floats": (
        {"cu_seqlens_q": CU, "mask": mx.ones((7, 7))},
        "mask: expected None with cu_seqlens_q; use flex_attention's score_mod, which counts",
    ),
    "a mask": (
        {"cu_seqlens_q": CU, "mask": mx.ones((7, 7), mx.bool_)},
        "mask: expected None with cu_seqlens_q; use flex_attention's mask_mod, which counts",
    ),
    "lengths": (
        {"cu_seqlens_q": CU, "kv_lens": LENGTHS},
        "kv_lens: expected None with cu_seqlens_q; use cu_seqlens_k",
    ),
    "a bound on the work": (
        {"cu_seqlens_q": CU, "max_work": 1 << 20},
        "max_work: expected None with cu_seqlens_q; use fewer sequences a call",
    ),
    "an odd longest": (
        {"cu_seqlens_q": CU, "max_seqlen_q": 3.5},
        "max_seqlen_q: expected a length, or None, but got 3.5",
    ),
}


@pytest.mark.parametrize("name", PACK)
def test_what_does_not_go_with_packed_sequences_says_what_to_write_instead(name: str) -> None:
    keywords, message = PACK[name]
    q, k = PACKED
    with pytest.raises(ArgumentError, match=f"^{message}"):
        attention(q, k, k, **keywords)


def test_packed_sequences_of_other_shapes() -> None:
    q, k = PACKED
    with pytest.raises(ArgumentError, match="^q.shape: expected a first axis of 1 with varlen"):
        attention(Q, K, K, cu_seqlens_q=CU, cu_seqlens_k=CU)
    with pytest.raises(
        ArgumentError,
        match="^cu_seqlens_k is required where q and k differ in length .7 and 6 rows.$",
    ):
        attention(q, k[:, :, :6], k[:, :, :6], cu_seqlens_q=CU)
    blocks = create_block_mask(lambda b, h, i, j: j <= i, None, None, 7, 7)
    with pytest.raises(ArgumentError, match="^block_mask: .* use mask_mod, and no block_mask"):
        flex_attention(q, k, k, block_mask=blocks, cu_seqlens_q=CU)
    rows = [x[0].swapaxes(0, 1) for x in (q, k, k)]
    with pytest.raises(ArgumentError, match=r"^q.shape: expected 3 axes \(T, H, D\), but got"):
        packed_attention(q, *rows[1:], CU)
    with pytest.raises(ArgumentError, match=r"^k.shape: expected 4 axes \(pages, page_size, H, D"):
        packed_attention(*rows, CU, block_table=TABLE, kv_lens=LENGTHS)
    with pytest.raises(ArgumentError, match="^cu_seqlens_q is required .where each"):
        packed_attention(*rows, None)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"^v\[0\]: expected an mlx.core.array"):
        packed_attention(rows[0], rows[1], [[1.0]], CU)  # type: ignore[list-item]


PAGED: dict[str, tuple[dict[str, Any], str]] = {
    "no lengths": (
        {"block_table": TABLE},
        "kv_lens is required with block_table: how many keys each sequence has$",
    ),
    "a table of one axis": (
        {"block_table": mx.array([0, 1])},
        "block_table.shape: expected 2 axes, but got ",
    ),
    "a table of floats": ({"block_table": mx.ones((2, 2))}, "block_table.dtype: expected int32"),
    "a table for too many": (
        {"block_table": mx.zeros((3, 2), mx.int32)},
        r"block_table.shape: expected 2 axes, \(2, pages of a sequence\), but got \(3, 2\)",
    ),
    "starts of keys": (
        {"block_table": TABLE, "cu_seqlens_q": CU, "cu_seqlens_k": CU},
        "cu_seqlens_k: expected None with a block_table, where kv_lens says",
    ),
}


@pytest.mark.parametrize("name", PAGED)
def test_pages_that_cannot_be_found(name: str) -> None:
    keywords, message = PAGED[name]
    if name != "no lengths":
        keywords = {"kv_lens": LENGTHS} | keywords
    q = PACKED[0] if "cu_seqlens_q" in keywords else Q
    with pytest.raises(ArgumentError, match=f"^{message}"):
        attention(q, PAGES, PAGES, **keywords)


@pytest.mark.parametrize(("size", "said"), [(4, "8 to 65536"), (12, "multiple of 8"), (257, "")])
def test_pages_of_a_size_that_there_is_not(size: int, said: str) -> None:
    pages = mx.zeros((3, 2, size, 32), mx.float16)
    message = f"^k.shape, keys of a page: expected .*{said}.*, but got {size}"
    with pytest.raises(ArgumentError, match=message):
        attention(Q, pages, pages, block_table=TABLE, kv_lens=LENGTHS)


QUANTIZED: dict[str, tuple[Any, Any, str]] = {
    "keys alone": (K8, K, "v: expected as k is: both the triples of mx.quantize, or both arrays"),
    "values alone": (K, K8, "k: expected as v is: both the triples"),
    "without biases": (
        K8[:2],
        K8,
        r"k: expected an mlx.core.array, or the three of 4 axes that mx.quantize\(k, group_s",
    ),
    "of words alone": ([1, 2, 3], K8, "k: expected an mlx.core.array, or the three"),
    "of 2 bits": (
        quantized(K, 2),
        quantized(K, 2),
        r"k\[0\].shape: expected a last axis of 4 \(4 bits\) or 8 \(8 bits\) for queries",
    ),
    "of values of 2 bits": (
        K8,
        quantized(K, 2),
        r"v\[0\].shape: expected a last axis of 4 \(4 bits\) or 8 \(8 bits\) for values",
    ),
    "of biases of another shape": (
        (*K8[:2], K8[2][:, :, :4]),
        K8,
        r"k\[2\].shape: expected \(2, 2, 9, 1\), but got \(2, 2, 4, 1\)",
    ),
    "of signed words": (
        (K8[0].view(mx.int32), *K8[1:]),
        K8,
        r"k\[0\].dtype: expected uint32, as of mx.quantize",
    ),
    "of another batch": (
        tuple(x[:1] for x in K8),
        tuple(x[:1] for x in K8),
        r"k\[0\].shape: expected a batch of 2, as q has",
    ),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_keys_and_values_that_do_not_fit(name: str) -> None:
    k, v, message = QUANTIZED[name]
    with pytest.raises(ArgumentError, match=f"^{message}"):
        attention(Q, k, v)


@pytest.mark.parametrize(
    ("v", "width", "message"),
    [
        (K, 16, "value_head_dim: expected 32, as v has, or None, but got 16"),
        (K8, 16, r"v\[0\].shape: expected .* for values of width 16"),
        (K8, 32.5, "value_head_dim: expected an integer"),
    ],
)
def test_widths_that_values_do_not_have(v: Any, width: Any, message: str) -> None:
    k = K8 if isinstance(v, tuple) else K
    with pytest.raises(ArgumentError, match=f"^{message}"):
        attention(Q, k, v, value_head_dim=width)


def test_groups_that_there_are_not() -> None:
    x = normal((2, 2, 9, 128), "float16")
    packed, scales, biases = quantized(x, 8, 32)
    bad = (packed, scales[..., :3], biases[..., :3])
    message = r"^k\[1\].shape: expected a last axis of 4 \(groups of 32\), 2 \(groups of 64\), 1 "
    with pytest.raises(ArgumentError, match=message):
        attention(x, bad, bad)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"dims": 7}, "rope.dims: expected an even number of columns, or None, but got 7"),
        ({"dims": 0}, "rope.dims"),
        ({"tables": COSINES}, "rope.tables: expected two arrays, of cosines and of sines, or None"),
        ({"tables": (COSINES, 1)}, r"rope.tables\[1\]: expected an mlx.core.array: 2 axes of"),
        (
            {"tables": (COSINES, COSINES[:2])},
            r"rope.tables\[1\].shape: expected \(5, 4\), as the table of cosines, but got \(2, 4\)",
        ),
        (
            {"tables": (COSINES, COSINES), "dims": 6},
            r"rope.tables\[0\]: expected 2 axes of floating-point numbers, \(positions, 3\), but",
        ),
        (
            {"tables": (COSINES.astype(mx.int32), COSINES)},
            r"rope.tables\[0\]: expected .*, but got .*int32 \(5, 4\)",
        ),
        (
            {"tables": (COSINES, COSINES), "base": 9.0},
            "rope.base: expected its default with rope.tables, which give the angles",
        ),
        (
            {"tables": (COSINES, COSINES), "freqs": mx.ones(4)},
            "rope.freqs: expected its default with rope.tables",
        ),
        ({"one_position": 1}, "rope.one_position: expected True or False, but got 1"),
        ({"style": "neox"}, "rope.style: expected one of half, pairs, but got 'neox'"),
        ({"base": 0}, "rope.base: expected a finite number above 0, but got 0"),
        ({"scale": float("nan")}, "rope.scale: expected a finite number above 0, but got nan"),
        (
            {"freqs": [1.0]},
            r"rope.freqs: expected an mlx.core.array of periods, or None, but got \[",
        ),
        ({"freqs": mx.arange(4)}, "rope.freqs: expected 1 axis of floating-point periods"),
        ({"offset": -1}, "rope.offset: expected a position from 0, .*, but got -1"),
        ({"offset": 1.5}, "rope.offset: expected a position from 0"),
    ],
)
def test_a_rope_that_cannot_turn(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{message}"):
        Rope(**keywords)


def test_a_name_that_there_is_not_comes_with_the_nearest() -> None:
    with pytest.raises(
        TypeError, match=r"^attention\(\) got an .* 'block_tables'; did you mean 'b"
    ):
        attention(Q, K, K, block_tables=TABLE)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"^flex_attention\(\) got an .*'xyz'$"):
        flex_attention(Q, K, K, xyz=1)  # type: ignore[call-overload]
    rows = [x[0].swapaxes(0, 1) for x in (*PACKED, PACKED[1])]
    with pytest.raises(TypeError, match=r"^varlen_attention\(\) got .*'alibi'; did you mean 'ali"):
        packed_attention(*rows, CU, alibi=1)  # type: ignore[call-arg]


def test_a_softcap_beside_a_function_says_how_to_write_it() -> None:
    message = r"^softcap: expected None with a score_mod; write C \* mx.tanh\(score / C\) there"
    with pytest.raises(ArgumentError, match=message):
        flex_attention(Q, K, K, lambda s, b, h, i, j: s, softcap=3.0)


def test_widths_and_types_are_said_of_the_queries() -> None:
    with pytest.raises(ArgumentError, match="^q.shape, head_dim: expected an integer from 8 to"):
        attention(Q[..., :4], K[..., :4], K, softcap=30.0)  # MLX has no softcap
    with pytest.raises(ArgumentError, match="^v.shape, value_head_dim: expected an integer"):
        attention(Q, K, K[..., :4], return_lse=True)  # nor log-sum-exps
    with pytest.raises(ArgumentError, match="^q.dtype: expected one of float32, float16"):
        attention(*(x.astype(mx.int32) for x in (Q, K, K)))


@pytest.mark.parametrize(
    ("name", "here"),
    [
        ("softmax_scale", "'scale'"),
        ("scales", "'scale'"),
        ("is_causal", "'causal'"),
        ("window_size", "'window_left' and 'window_right'"),
        ("score_mod", "metalgen.flex_attention, which takes 'score_mod'"),
    ],
)
def test_a_name_of_another_library_comes_with_ours(name: str, here: str) -> None:
    message = rf"^attention\(\) got an .*'{name}'; did you mean {here}\?$"
    with pytest.raises(TypeError, match=message):
        attention(Q, K, K, **{name: 1})


ROWS_FIRST = mx.zeros((2, 9, 8, 32)), mx.zeros((2, 12, 2, 32))  # (B, L, H, D)


@pytest.mark.parametrize(
    ("q", "k", "options"),
    [
        (*ROWS_FIRST, {}),  # 9 heads, and 12 key heads
        (ROWS_FIRST[0], ROWS_FIRST[0], {"sinks": mx.zeros((8,))}),
        (ROWS_FIRST[0], ROWS_FIRST[0], {"alibi_slopes": mx.zeros((8,))}),
        (ROWS_FIRST[0], ROWS_FIRST[0], {"bias": mx.zeros((2, 8, 9, 9))}),
        (ROWS_FIRST[0], ROWS_FIRST[0], {"mask": mx.ones((1, 8, 9, 9), mx.bool_)}),
    ],
)
def test_rows_before_heads_are_noticed_where_shapes_give_them_away(
    q: mx.array, k: mx.array, options: dict[str, Any]
) -> None:
    with pytest.raises(ArgumentError, match=r"for arrays \(B, L, H, D\), pass q.swapaxes\(1, 2\)"):
        attention(q, k, k, **options)
    for x in (q, k):
        assert x.shape[3] == 32
    attention(*(x.swapaxes(1, 2) for x in (q, k, k)), **options)


def test_a_mistake_that_has_nothing_to_do_with_the_axes_brings_no_hint_about_them() -> None:
    with pytest.raises(ArgumentError) as error:
        attention(Q, K, K, sinks=mx.zeros((3,)))
    assert "swapaxes" not in str(error.value)


def test_more_heads_than_any_model_has_are_warned_of() -> None:
    x = mx.zeros((1, 1024, 4, 8))
    with pytest.warns(UserWarning, match=r"has 1024 heads of 4 queries each: .*swapaxes") as found:
        attention(x, x, x)
    assert found[0].filename == __file__


HOSTILE: dict[str, tuple[tuple[mx.array, ...], dict[str, Any], str]] = {
    "sequences that do not start at 0": (
        (PACKED[0], PACKED[1], PACKED[1]),
        {"cu_seqlens_q": mx.array([1, 3, 7])},
        "cu_seqlens_q",
    ),
    "sequences that go back": (
        (PACKED[0], PACKED[1], PACKED[1]),
        {"cu_seqlens_q": CU, "cu_seqlens_k": mx.array([0, 8, 7])},
        "cu_seqlens_k",
    ),
    "more queries than there are": ((Q, K, K), {"seqused_q": mx.array([5, 6])}, "seqused_q"),
    "a start behind all keys": ((Q, K, K), {"kv_starts": mx.array([9, 10])}, "kv_starts"),
    "more keys than there are": ((Q, K, K), {"kv_lens": mx.array([9, 10])}, "kv_lens"),
    "a page that there is not": (
        (Q, PAGES, PAGES),
        {"kv_lens": LENGTHS, "block_table": mx.array([[0, 3], [1, -1]])},
        "block_table",
    ),
    "a rope that is no number": (
        (Q, K, K),
        {"rope": Rope(freqs=mx.full((16,), float("nan")))},
        "rope.freqs",
    ),
    "a bias that is no number": ((Q, K, K), {"mask": mx.full((5, 9), float("nan"))}, "mask"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_contents_are_looked_at_when_asked_for_and_only_then(name: str) -> None:
    arrays, keywords, named = HOSTILE[name]
    attention(*arrays, **keywords)
    with pytest.raises(ArgumentError) as caught:
        attention(*arrays, check=True, **keywords)
    assert caught.value.argument.split("[")[0] == named
    assert str(caught.value).startswith(f"{caught.value.argument}: expected ")


def test_more_queries_than_keys_are_no_mistake_of_a_rope() -> None:
    expected = attention(Q, K, K, rope=Rope(), causal=True, kv_lens=mx.array([9, 3]))
    out = attention(Q, K, K, rope=Rope(), causal=True, kv_lens=mx.array([9, 3]), check=True)
    assert mx.array_equal(out, expected)
    with pytest.raises(ArgumentError, match=r"^rope.offset\[1\]: expected .*, but got -2"):
        attention(Q, K, K, rope=Rope(offset=mx.array([4, -2])), check=True)


def test_contents_cannot_be_looked_at_while_mlx_compiles() -> None:
    lengths = mx.array([9, 4])
    assert attention(Q, K, K, kv_lens=lengths, check=True).shape == Q.shape

    def checked(lengths: mx.array) -> mx.array:
        return attention(Q, K, K, kv_lens=lengths, check=True)

    with pytest.raises(ArgumentError, match="^check: expected False inside of mx.compile"):
        mx.compile(checked)(lengths)


def test_errors_are_of_the_family() -> None:
    with pytest.raises(metalgen.MetalgenError) as caught:
        attention(Q, K, K, kv_lens=[1])  # type: ignore[call-overload]
    assert isinstance(caught.value, ValueError)
    assert caught.value.argument == "kv_lens"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("stops", "message"),
    [
        ([0, 9, 13], r"^cu_seqlens_k: expected an mlx.core.array of integers"),
        (mx.array([0.0, 9.0, 13.0]), r"^cu_seqlens_k.dtype: expected int32"),
        (mx.array([[0, 9, 13]]), r"^cu_seqlens_k.shape: expected 1 axis"),
        (mx.array([0, 13]), r"^cu_seqlens_k.shape: expected \(3,\), as cu_seqlens_q has, but got"),
    ],
)
@pytest.mark.parametrize("paged", [False, True])
def test_ends_of_packed_keys_are_named_where_they_say_lengths_of_pages(
    stops: Any, message: str, paged: bool
) -> None:
    q = PACKED[0][0].swapaxes(0, 1)
    kv = PAGES.swapaxes(1, 2) if paged else PACKED[1][0].swapaxes(0, 1)
    options: dict[str, Any] = {"block_table": TABLE} if paged else {}
    with pytest.raises(ArgumentError, match=message):
        packed_attention(q, kv, kv, CU, stops, **options)


@pytest.mark.parametrize(
    ("good", "bad", "name"),
    [
        ({"causal": True}, {"causal": 1}, "causal"),
        ({"causal": True}, {"causal": 1.0}, "causal"),
        ({"causal": False}, {"causal": [False]}, "causal"),
        ({"window_left": 1}, {"window_left": True}, "window_left"),
        ({"softcap": 1}, {"softcap": True}, "softcap"),
        ({"softcap": 30.0}, {"softcap": [30.0]}, "softcap"),
        ({"return_lse": True}, {"return_lse": 1}, "return_lse"),
        ({"max_work": 1 << 20}, {"max_work": float(1 << 20)}, "max_work"),
    ],
)
def test_what_equals_a_known_option_and_is_of_another_type_is_refused_as_before(
    good: dict[str, Any], bad: dict[str, Any], name: str
) -> None:
    """Configs of calls are kept, by options that may be equal and still be different."""
    for _ in range(2):
        attention(Q, K, K, **good)
        with pytest.raises(ArgumentError) as caught:
            attention(Q, K, K, **bad)
        assert caught.value.argument == name
    attention(Q, K, K, **good)
