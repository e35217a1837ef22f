"""Which problems the presets hold."""

from __future__ import annotations

import pytest

from metalgen.errors import ArgumentError
from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig
from metalgen.tuning.presets import MODELS, preset, preset_names


def test_the_default_preset_is_what_current_models_call() -> None:
    chosen = preset("default")
    layers = {
        (p.config.head_dim, p.config.heads_per_kv, p.config.softcap, p.config.window_left)
        for p in chosen.problems
        if p.config.kv_bits is None
    }
    assert layers == {
        (64, 4, None, None),  # Llama 3.2 1B
        (128, 4, None, None),  # Llama 3 8B
        (256, 2, 50.0, None),  # Gemma 2 9B
        (256, 2, 50.0, 4095),
        (256, 2, None, None),  # Gemma 3 4B
        (256, 2, None, 1023),
        (64, 8, None, None),  # gpt-oss
        (64, 8, None, 127),
        (64, 3, None, None),  # SmolLM2
    }
    assert {(p.q_len, p.kv_len) for p in chosen.problems} == {(2048, 2048), (1, 4096)}
    assert {p.config.sinks for p in chosen.problems if p.config.heads_per_kv == 8} == {True}
    packed = [p for p in chosen.problems if p.config.kv_bits]
    assert len(packed) == 2 * 2 * 2 * 2  # two models, two types, 8 and 4 bits, prefill and decode
    assert {(p.q_len, p.config.kv_group) for p in packed} == {(2048, 64), (1, 64)}
    half = {p.config.head_dim for p in chosen.problems if p.config.dtype == "float16"}
    assert half == {64, 128}  # the Llamas and SmolLM2
    assert len(chosen.problems) == (9 + 3) * 2 + len(packed)


def test_a_model_is_tuned_in_prefill_and_decode_lengths() -> None:
    config = AttentionConfig(64, heads_per_kv=3, causal=True)
    half = [p for p in preset("smollm2-135m").problems if p.config.dtype == "float16"]
    assert half == [
        *(Problem(config, 9, n, n) for n in (512, 2048, 8192)),
        *(Problem(config, 9, 1, n) for n in (1024, 4096, 16384)),
    ]


def test_deepseek_is_expanded_in_prefill_and_absorbed_in_decode() -> None:
    problems = preset("deepseek").problems
    assert [p for p in problems if p.config.dtype == "bfloat16"] == [
        *(
            Problem(AttentionConfig(192, "bfloat16", 128, causal=True), 128, n, n)
            for n in (512, 2048, 8192)
        ),
        *(
            Problem(AttentionConfig(576, "bfloat16", 512, 128, causal=True), 128, 1, n)
            for n in (1024, 4096, 16384)
        ),
    ]
    assert {p.family for p in problems if p.q_len == 1} == {"decode"}


def test_the_layers_of_gpt_oss_have_sinks_and_each_second_one_a_window_of_128_keys() -> None:
    chosen = preset("gpt-oss")
    configs = {p.config for p in chosen.problems}
    assert configs == {
        AttentionConfig(64, dtype, heads_per_kv=8, causal=True, window_left=left, sinks=True)
        for dtype in ("float16", "bfloat16")
        for left in (None, 127)
    }
    assert {p.batch_heads for p in chosen.problems} == {64}
    assert len(chosen.problems) == 4 * 6
    assert not any(p.config.sinks for m in MODELS[:-3] for p in preset(m.name).problems)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("gemma-2-27b", {(128, None, 50.0), (128, 4095, 50.0)}),
        ("gemma-3-1b", {(256, None, None), (256, 511, None)}),
        ("gemma-3-27b", {(128, None, None), (128, 1023, None)}),
        ("mistral-7b-v0.1", {(128, 4095, None)}),
        ("mistral-7b-v0.3", {(128, None, None)}),
        ("phi-3-mini-4k", {(96, 2046, None)}),
    ],
)
def test_windows_and_softcaps_are_those_of_the_models(
    name: str, layers: set[tuple[int, int | None, float | None]]
) -> None:
    configs = {p.config for p in preset(name).problems}
    assert {(c.head_dim, c.window_left, c.softcap) for c in configs} == layers
    assert all(c.causal and c.window_right is None for c in configs)


def test_every_name_gives_problems_once_each_and_all_covers_every_model() -> None:
    everything = preset("all")
    for name in preset_names():
        problems = preset(name).problems
        assert problems and len(problems) == len({p.key for p in problems})
        if name != "default":  # which has lengths of its own
            assert set(problems) <= set(everything.problems)
    named = {label.split(" ")[0] for labels in everything.models.values() for label in labels}
    assert named == {m.name for m in MODELS}


def test_an_unknown_preset_gets_the_nearest_names() -> None:
    with pytest.raises(ArgumentError, match="the nearest: llama-3"):
        preset("lama-3")
