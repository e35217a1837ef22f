"""What is recorded of a program's calls, and what a model's config.json says it will call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import zoo

import metalgen
from metalgen.calls.recording import cost, read_recording
from metalgen.cli.app import run
from metalgen.errors import ArgumentError
from metalgen.families.sizes import Problem
from metalgen.mlx_lm import is_patched, patch
from metalgen.mlx_lm.tracing import problems_of


def test_calls_are_counted_with_their_sizes(tmp_path: Path) -> None:
    q, k = mx.zeros((1, 4, 100, 64)), mx.zeros((1, 2, 100, 64))
    file = tmp_path / "calls.json"
    with metalgen.record(file) as recording:
        for _ in range(3):
            metalgen.attention(q, k, k, causal=True)
        metalgen.attention(q[:, :, :1], k, k)
        metalgen.scaled_dot_product_attention(q, k, k, scale=0.125, mask="causal")
    metalgen.attention(q, k, k)  # after the end
    config = metalgen.AttentionConfig(64, "float32", heads_per_kv=2, causal=True)
    assert recording.calls == {
        Problem(config, 4, 128, 128): 4,
        Problem(metalgen.AttentionConfig(64, "float32", heads_per_kv=2), 4, 1, 128): 1,
    }
    again = read_recording(file)
    assert again.calls == recording.calls
    assert again.problems[0] == Problem(config, 4, 128, 128)


def test_the_costliest_come_first() -> None:
    config = metalgen.AttentionConfig(64, causal=True)
    prompt, step = Problem(config, 8, 1024, 1024), Problem(config, 8, 1, 1024)
    assert cost(prompt) == 2 * 8 * 1024 * 512 * 128
    assert cost(step) == 64 * 8 * 1024 * 128 * 2  # bytes of keys and values, not operations


def test_a_recording_is_written_also_after_an_error(tmp_path: Path) -> None:
    file = tmp_path / "calls.json"
    with pytest.raises(KeyError), metalgen.record(file):
        metalgen.attention(*(mx.zeros((1, 1, 8, 64)) for _ in range(3)))
        raise KeyError
    assert sum(read_recording(file).calls.values()) == 1
    with metalgen.record():
        pass  # and the next one may begin


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        "[]",
        '{"metalgen_recording": 2}',
        '{"metalgen_recording": 1, "calls": [{}]}',
        '{"metalgen_recording": 1, "calls": [{"config": {"head_dim": 64}, "batch_heads": 1, '
        '"q_len": 0, "kv_len": 1, "calls": 1}]}',
        '{"metalgen_recording": 1, "calls": [{"config": {"head_dim": 64}, "batch_heads": 1, '
        '"q_len": 1, "kv_len": 1, "calls": -1}]}',
    ],
)
def test_what_is_no_recording_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "calls.json"
    file.write_text(text)
    with pytest.raises(ArgumentError, match="recorded: expected"):
        read_recording(file)


def config_json(path: Path, name: str, **fields: Any) -> Path:
    config = zoo.COMMON | zoo.OTHERS[name] | {"model_type": name} | fields
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_models_calls_are_found_from_its_config(tmp_path: Path) -> None:
    folder = config_json(
        *(tmp_path / "gemma", "gemma3_text"), sliding_window=1024, torch_dtype="float16"
    )
    name, problems = problems_of(folder)
    assert name == "gemma" and not is_patched()
    found = {(p.config.window_left, p.q_len, p.kv_len) for p in problems}
    assert (1023, 2048, 4096) in found  # the second piece of a prompt, in a ring of 1,024
    assert (None, 2048, 8192) in found
    assert {(None, 1, 1024), (None, 1, 16384)} <= found
    assert {p.config.dtype for p in problems} == {"float16"}
    assert {p.config.heads_per_kv for p in problems} == {2}


def test_softcaps_sinks_and_latent_rows_are_found(tmp_path: Path) -> None:
    for name, field, value in (("gemma2", "softcap", 50.0), ("gpt_oss", "sinks", True)):
        _, problems = problems_of(config_json(tmp_path / name, name) / "config.json")
        assert {getattr(p.config, field) for p in problems} == {value}
    _, problems = problems_of(config_json(tmp_path / "latent", "deepseek_v3"))
    widths = {(p.config.head_dim, p.config.v_dim, p.q_len == 1) for p in problems}
    assert widths == {(64, 32, False), (96, 64, True)}


def test_a_patched_program_stays_patched(tmp_path: Path) -> None:
    patch(device="reference")
    problems_of(config_json(tmp_path / "llama", "llama"))
    assert is_patched()


def test_tune_takes_models_and_recordings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = config_json(tmp_path / "tiny", "llama")
    assert run(["tune", "--chip", "M3Max", "--model", str(folder), "--dry-run"]) == 0
    assert "  tiny" in capsys.readouterr().out
    file = tmp_path / "calls.json"
    for words, expected in (
        (["--model", str(tmp_path / "none")], "model: expected a model's folder"),
        (["--model", str(folder), "--causal"], "model: expected none with --causal"),
        (["--model", str(folder), "--recorded", str(file)], "recorded: expected none with --model"),
        (["--recorded", str(file)], "recorded: expected a file that metalgen.record"),
    ):
        assert run(["tune", "--chip", "M3Max", "--dry-run", *words]) == 2
        assert expected in capsys.readouterr().err
    strange = config_json(tmp_path / "strange", "llama", model_type="nobody_knows")
    assert run(["tune", "--chip", "M3Max", "--dry-run", "--model", str(strange)]) == 2
    assert "a model that this version of mlx-lm knows" in capsys.readouterr().err
