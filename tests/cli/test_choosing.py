"""What `metalgen tune` tunes: a preset, or a shape of your own."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from metalgen import AttentionConfig
from metalgen.chips import get_chip
from metalgen.cli.app import run
from metalgen.database.lookup import lookup
from metalgen.database.store import Store
from metalgen.families.sizes import Problem
from metalgen.source.hashes import template_hashes
from metalgen.tuning.presets import preset, preset_names

TUNE = ["tune", "--chip", "M3Max"]


@pytest.fixture(autouse=True)
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user database of this test's own."""
    path = tmp_path / "tuning.db"
    monkeypatch.setenv("METALGEN_DB", str(path))
    return path


def problems(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str | None, list[Problem]]:
    """The preset and the problems of a dry run."""
    assert run([*TUNE, *words, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    return found["preset"], [
        Problem(AttentionConfig.from_dict(p["config"]), p["batch_heads"], p["q_len"], p["kv_len"])
        for p in found["problems"]
    ]


@pytest.mark.parametrize(
    ("words", "config", "sizes"),
    [
        ("--head-dim 80", AttentionConfig(80), (32, 1024, 1024)),
        ("--head-dim 64", AttentionConfig(64), (32, 1024, 1024)),
        ("--q-len 300", AttentionConfig(64), (32, 300, 300)),
        (
            "--causal --dtype bfloat16 --heads-per-kv 5 --heads 40 --batch 2 --q-len 1",
            AttentionConfig(64, "bfloat16", heads_per_kv=5, causal=True),
            (80, 1, 1),
        ),
        (
            "--with page_size=16 --with kv_bits=8 --lse --kv-len 4096 --q-len 4",
            AttentionConfig(64, return_lse=True, page_size=16, kv_bits=8),
            (32, 4, 4096),
        ),
        (
            "--value-head-dim 96 --window-left 127 --window-right 0 --softcap 30",
            AttentionConfig(64, "float16", 96, window_left=127, window_right=0, softcap=30.0),
            (32, 1024, 1024),
        ),
    ],
)
def test_any_option_that_describes_a_shape_makes_it_the_one_problem(
    capsys: pytest.CaptureFixture[str],
    words: str,
    config: AttentionConfig,
    sizes: tuple[int, int, int],
) -> None:
    assert problems(capsys, *words.split()) == (None, [Problem(config, *sizes)])


def test_without_such_an_option_a_preset_is_tuned(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metalgen.families.enumerate_valid", lambda *space: ())  # not counted here
    assert problems(capsys, "--trials", "9") == ("default", list(preset("default").problems))
    named = ("phi-4", list(preset("phi-4").problems))
    assert problems(capsys, "--preset", "phi-4") == named


@pytest.mark.parametrize(
    "words",
    [
        *("--head-dim 64", "--value-head-dim 64", "--dtype float16", "--heads-per-kv 1"),
        *("--causal", "--window-left 9", "--window-right 9", "--softcap 9", "--lse"),
        *("--with alibi", "--batch 1", "--heads 1", "--q-len 1024", "--kv-len 1024"),
    ],
)
def test_each_option_counts_as_a_shape_even_at_its_default(
    capsys: pytest.CaptureFixture[str], words: str
) -> None:
    assert run([*TUNE, "--preset", "default", *words.split()]) == 2
    expected = f"preset: expected none with a shape of your own ({words.split()[0]}), but got "
    assert capsys.readouterr().err == f"metalgen: {expected}'default'\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--preset qwen3 --with sinks --head-dim 80",
            "preset: expected none with a shape of your own (--head-dim, --with), but got 'qwen3'",
        ),
        ("--head-dim 1000", "head_dim: expected an integer from 8 to 576, but got 1000"),
        ("--heads 7 --heads-per-kv 2", "--heads: expected a multiple of --heads-per-kv 2"),
        (
            "--with sink",
            "--with: expected a field of AttentionConfig, such as sinks, but got 'sink'",
        ),
    ],
)
def test_a_shape_that_cannot_be_is_one_line_and_nothing_is_written(
    capsys: pytest.CaptureFixture[str], database: Path, words: str, message: str
) -> None:
    assert run([*TUNE, *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"metalgen: {message}")
    assert not database.exists()


def test_a_shape_of_ones_own_is_tuned_checked_and_found_again(
    capsys: pytest.CaptureFixture[str], database: Path
) -> None:
    words = "--head-dim 24 --causal --with sinks --heads 4 --q-len 40 --kv-len 50 --trials 3"
    assert run([*TUNE, *words.split()]) == 0
    printed = capsys.readouterr().out
    assert "\n1 problem modelled in " in printed
    assert "Note: the model ignores sinks=True for some of these problems." in printed
    wanted = Problem(AttentionConfig(24, causal=True, sinks=True), 4, 40, 50)
    with Store.open(database, read_only=True) as store:
        rows = store.measurements()
    assert {row.problem for row in rows} == {wanted}
    (winner,) = [row for row in rows if row.verified]
    hit = lookup(wanted, get_chip("M3Max"), template_hashes(wanted.family, "metal"))
    assert hit is not None and hit.schedule == winner.schedule


def test_the_command_to_go_on_with_describes_the_same_shape(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from metalgen.tuning.progress import Report

    tuned: list[Any] = []

    def interrupted(chosen: Any, *args: Any, **options: Any) -> Report:
        tuned.append(tuple(chosen))
        return Report("", "M3Max", "modelled", stopped="interrupted")

    monkeypatch.setattr("metalgen.tuning.runner.tune", interrupted)
    words = ["--head-dim", "96", "--causal", "--with", "sinks", "--with", "page_size=16"]
    assert run([*TUNE, *words]) == 130
    again = shlex.split(capsys.readouterr().err.rsplit("To continue: metalgen ", 1)[1])
    assert again == [*TUNE, *words]
    assert run(again) == 130
    config = AttentionConfig(96, causal=True, sinks=True, page_size=16)
    assert tuned == [(Problem(config, 32, 1024, 1024),)] * 2


def test_every_preset_is_in_the_documentation() -> None:
    written = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    assert [name for name in preset_names() if f"`{name}`" not in written] == []


def test_a_preset_that_is_none_is_refused_with_the_families_and_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run([*TUNE, "--preset", "qwen3-9b"]) == 2
    error = capsys.readouterr().err
    assert "a family (llama-3, qwen2.5, qwen3, " in error
    assert "; the nearest: qwen3-8b, " in error
