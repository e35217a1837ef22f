"""``metalgen bench``: what it prints, writes and refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from metalgen.bench import running
from metalgen.bench.entries import Entry, attention_entries
from metalgen.bench.presets import PRESETS
from metalgen.cli.app import run

OWN = ("--device", "reference", "--quick", "--head-dim", "32", "--heads", "2", "--q-len", "16")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METALGEN_DB", str(tmp_path / "tuning.db"))
    monkeypatch.chdir(tmp_path)


def test_a_shape_of_ones_own_is_measured_and_kept_in_every_form(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["bench", *OWN, "--csv", "out.csv", "--plot", "out.png"]) == 0
    printed = capsys.readouterr().out
    assert "measured on device reference" in printed and "by hand" in printed
    rows = list(csv.DictReader(Path("out.csv").read_text().splitlines()))
    assert [row["entry"] for row in rows] == ["ours", "MLX fused", "by hand"]
    assert [row["status"] for row in rows] == ["absent", "ok", "ok"]
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")
    assert run(["bench", *OWN, "--csv", "out.csv", "--json"]) == 0  # an earlier table is replaced
    found = json.loads(capsys.readouterr().out)
    assert found["manner"] == "measured" and found["rows"][0]["work"]["q_len"] == 16
    assert found["rows"][0]["results"][1]["seconds"] > 0


@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_runs_on_a_cpu(
    preset: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its first and its last rows, small."""
    from metalgen.bench.work import Preset

    quick = Preset.quick

    def few(self: Preset) -> Preset:
        from dataclasses import replace

        works = quick(self).works
        return replace(self, works=(*works[:2], *works[-2:]))

    monkeypatch.setattr(Preset, "quick", few)
    assert run(["bench", preset, "--device", "reference", "--quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["preset"] == preset
    for row in found["rows"]:
        assert any(r["status"] == "ok" for r in row["results"])
        assert not [r for r in row["results"] if r["status"] in ("wrong", "failed")]


def test_without_a_gpu_times_are_modelled_and_said_to_be(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["bench", "--chip", "M3Max", "--causal"]) == 0
    printed = capsys.readouterr().out
    assert "MODELLED for M3Max" in printed and "ms modelled" in printed
    assert "not separable" not in printed
    assert run(["bench", "--device", "simulator", "--quick", "--causal"]) == 0
    printed = capsys.readouterr().out
    assert "SIMULATED" in printed and "8x8 products" in printed and " ms" not in printed


def test_a_wrong_entry_ends_with_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import replace

    def wrong(work: running.Work, setting: running.Setting) -> list[object]:
        entries = attention_entries(work, setting.device, None)
        return [
            replace(e, call=lambda *given, call=e.call: call(*given) * 1.1)
            if isinstance(e, Entry) and e.name == "by hand"
            else e
            for e in entries
        ]

    monkeypatch.setattr(running.run, "__defaults__", (running.run.__defaults__[0], wrong))  # type: ignore[index]
    assert run(["bench", *OWN]) == 1
    assert "WRONG  by hand in D32" in capsys.readouterr().out


def test_an_interruption_keeps_the_rows_that_are_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = running.measure
    done: list[str] = []

    def interrupted(work, entries, effort):  # type: ignore[no-untyped-def]
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(str(work))
        return measure(work, entries, effort)

    monkeypatch.setattr(running, "measure", interrupted)
    code = run(["bench", "features", "--device", "reference", "--quick", "--csv", "out.csv"])
    assert code == 130
    rows = list(csv.DictReader(Path("out.csv").read_text().splitlines()))
    assert len({row["label"] for row in rows}) == 2
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "PRESET: expected one of seeds, mlx"),
        ([], "chip: expected --chip NAME"),
        (["seeds", "--causal"], "PRESET: expected none with a shape of your own (--causal)"),
        (["mlx", "--kv-live-lengths", "64"], "PRESET: expected kv, with sizes of a cache"),
        (["kv", "--kv-live-lengths", "a"], "expected positive integers such as 64,256"),
        (["--against", "xformers"], "--against: expected one of mlx-mfa, torch, flex"),
        (["--device", "reference", "--chip", "M3Max"], "--chip: expected none when a device"),
        (["--device", "reference", "--plot", "x.gif"], "--plot: expected a file that ends in .png"),
        (["--chip", "M9"], "chip: expected one that `metalgen chips` lists"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert words in line
    assert not list(Path().iterdir())
