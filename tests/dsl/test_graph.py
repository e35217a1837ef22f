from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from metalgen import ArgumentError, AttentionConfig
from metalgen.dsl.graph import parse
from metalgen.dsl.trace import trace


def text(function: Any, argument: str = "score_mod") -> str:
    return trace(function, argument).graph.text


def test_a_graph_by_hand() -> None:
    bias = mx.zeros((4, 7))
    assert text(lambda s, b, h, i, j: s * 0.5 + bias[h, i - j]) == (
        "a0=float32[4,7];0=h:int32();1=q:int32();2=kv:int32();3=subtract:int32(1,2);"
        "4=load:float32(a0,0,3);5=score:float32();6=const:float32(0.5);"
        "7=multiply:float32(5,6);8=add:float32(4,7)"
    )


def test_the_same_computation_has_the_same_text() -> None:
    one, other = mx.zeros((9,)), mx.ones((9,))

    def named(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        position = query - key
        return mx.where(key <= query, score + other[position], score)

    assert text(named) == text(lambda s, b, h, i, j: mx.where(j <= i, one[i - j] + s, s))
    assert text(named) != text(lambda s, b, h, i, j: mx.where(j <= i, one[j - i] + s, s))
    longer = mx.zeros((10,))
    assert text(named) != text(lambda s, b, h, i, j: mx.where(j <= i, longer[i - j] + s, s))


def test_captured_values_are_not_part_of_a_config() -> None:
    def config(slope: mx.array) -> AttentionConfig:
        return AttentionConfig(64, score_mod=text(lambda s, b, h, i, j: s + slope * (j - i)))

    assert config(mx.array(0.5)) == config(mx.array(0.25))
    assert hash(config(mx.array(0.5))) == hash(config(mx.array(0.25)))
    assert config(mx.array(0.5)) != config(mx.array(0.5, mx.float16))
    assert AttentionConfig.from_json(config(mx.array(0.5)).key) == config(mx.array(2.0))


def test_plain_numbers_are_part_of_it() -> None:
    first, second = (text(lambda s, b, h, i, j, c=c: s / c) for c in (30.0, 50.0))
    assert first != second


def test_what_is_computed_twice_is_there_once() -> None:
    graph = trace(lambda s, b, h, i, j: mx.tanh(s * 2) * mx.tanh(2 * s) + mx.tanh(s * 2)).graph
    assert [node.op for node in graph.nodes].count("tanh") == 1
    assert [node.op for node in graph.nodes].count("multiply") == 2


def test_constants_are_folded() -> None:
    two, three = mx.array(2.0), mx.array(3.0)
    graph = trace(mx.grad(lambda s, b, h, i, j: s * (mx.exp(mx.zeros(())) + 4.0) * 1.0)).graph
    assert graph.text == "0=const:float32(5.0)"
    kept = trace(lambda s, b, h, i, j: s * (two + three)).graph  # captured, so they may change
    assert [node.op for node in kept.nodes].count("load") == 2


def test_what_changes_nothing_is_left_out() -> None:
    plain = text(lambda b, h, i, j: i >= j, "mask_mod")
    assert text(lambda b, h, i, j: ~~(i >= j) & True, "mask_mod") == plain
    assert text(lambda b, h, i, j: (i >= j) & (i >= j), "mask_mod") == plain
    assert text(lambda s, b, h, i, j: s.astype(mx.float32) * 1) == "0=score:float32()"


def test_values_of_another_type_are_cast_in_the_end() -> None:
    graph = trace(lambda s, b, h, i, j: i - j).graph
    assert (graph.dtype, graph.nodes[-1].op) == ("float32", "cast")


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "0=score:float32()()",
        "0=launch:float32()",
        "0=score:float64()",
        "1=score:float32()",
        "0=add:float32(0,0)",
        "0=q:int32();1=score:float32();2=add:float32(0,1)",
        "0=q:int32();1=tanh:int32(0,0)",
        "a0=float32[4];0=q:int32();1=load:float32(a1,0)",
        "a0=float32[4];0=q:int32();1=load:float32(a0,0,0)",
        "a0=float32[0];0=q:int32();1=load:float32(a0,0)",
        "0=const:float32(__import__)",
        "0=const:bool(1)",
        "0=q:int32();1=load:int32(a-1,0)",
        "0=load:int32()",
        "9" * 5000 + "=score:float32()",
        "a" + "9" * 5000 + "=float32[3];0=score:float32()",
        "a0=float32[" + "9" * 5000 + "];0=score:float32()",
        "0=const:int8(128)",
        "0=const:uint32(-1)",
        "0=q:int32();1=sin:int32(0)",
        "0=q:int32();1=divide:int32(0,0)",
        "0=q:int32();1=logical_not:bool(0)",
        "0=q:int32();1=less:bool(0,0);2=negative:bool(1)",
        "0=score:float32();1=left_shift:float32(0,0)",
        "0=score:float32();1=bitwise_xor:float32(0,0)",
    ],
)
def test_bad_texts_are_refused(bad: str) -> None:
    with pytest.raises(ArgumentError, match="the text of a graph"):
        parse(bad)
    with pytest.raises(ArgumentError, match="^score_mod: expected the text of a graph"):
        AttentionConfig(64, score_mod=bad)


def test_texts_that_are_no_score_or_no_mask() -> None:
    mask = text(lambda b, h, i, j: i >= j, "mask_mod")
    score = text(lambda s, b, h, i, j: s)
    with pytest.raises(ArgumentError, match="score_mod: expected a graph with a float32 result"):
        AttentionConfig(64, score_mod=mask)
    with pytest.raises(ArgumentError, match="mask_mod: expected a graph with a bool result"):
        AttentionConfig(64, mask_mod=score)
    with pytest.raises(ArgumentError, match="functions go to metalgen.flex_attention"):
        AttentionConfig(64, mask_mod=lambda b, h, i, j: i >= j)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="softcap: expected None with a score_mod"):
        AttentionConfig(64, score_mod=score, softcap=30.0)
    with pytest.raises(ArgumentError, match="block_mask: expected a mask_mod"):
        AttentionConfig(64, block_mask=True)


def test_configs_without_functions_keep_their_keys() -> None:
    assert AttentionConfig(64, causal=True).key == '{"causal":true,"dtype":"float16","head_dim":64}'
