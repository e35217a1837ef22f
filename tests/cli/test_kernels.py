"""`metalgen render` and `metalgen check` take the kernel that a call of these sizes gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from metalgen.cli.app import run
from metalgen.families import DECODE, decode_schedule, default_schedule
from metalgen.problem.config import AttentionConfig
from metalgen.source.render import render


@pytest.fixture(autouse=True)
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No user database."""
    monkeypatch.setenv("METALGEN_DB", str(tmp_path / "tuning.db"))


def document(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    """The JSON that a command prints."""
    assert run([*arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_few_queries_render_the_decode_kernel_and_the_one_that_joins_its_splits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = AttentionConfig(128, heads_per_kv=4)
    schedule = default_schedule(config, family="decode")
    sources = [render(config, schedule, step) for step in DECODE.steps(schedule)]
    options = "render --head-dim 128 --heads-per-kv 4 --q-len 1 --kv-len 4096".split()
    found = document(capsys, *options)
    assert (found["family"], found["source"]) == ("decode", sources[0].source)
    assert found["combine"]["source"] == sources[1].source
    assert decode_schedule(found["schedule"], "decode", "metal") == schedule
    assert run(options) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"// {config}, decode\n// schedule (default): {schedule}\n")
    assert printed.endswith(f"{sources[0].text}\n{sources[1].text}\n")


def test_one_split_has_nothing_to_join(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "render", "--q-len", "64", "--splits", "1")
    assert (found["family"], found["combine"]) == ("decode", None)
    assert document(capsys, "render", "--q-len", "65")["family"] == "forward"


def test_an_nvidia_chip_renders_cuda(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "render", "--head-dim", "128", "--chip", "H200")
    assert found["target"] == "cuda"
    assert "__device__" in found["header"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--bq 16", (16, 1, 2)),
        ("--bq 48", (48, 3, 2)),
        ("--bq 24", (24, 3, 1)),
        ("--bq 32 --row-blocks 1", (32, 4, 1)),
        ("--simdgroups 2", (32, 2, 2)),
    ],
)
def test_rows_and_simdgroups_follow_from_each_other(
    options: str, expected: tuple[int, int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = document(capsys, "render", *options.split())["schedule"]
    found = (schedule["bq"], schedule["simdgroups"], schedule.get("row_blocks", 1))
    assert found == expected


def test_shares_of_the_values_are_no_wider_than_they(capsys: pytest.CaptureFixture[str]) -> None:
    options = "render --head-dim 64 --value-head-dim 512 --value-parts 4 --k-source device".split()
    schedule = document(capsys, *options, "--v-source", "device")["schedule"]
    assert (schedule["bd"], schedule["value_parts"]) == (128, 4)


@pytest.mark.parametrize(
    ("options", "rows"),
    [("--key-simdgroups 1", 64), ("--key-simdgroups 4", 16), ("--simdgroups 2", 16)],
)
def test_rows_follow_from_the_warps_that_share_them(
    options: str, rows: int, capsys: pytest.CaptureFixture[str]
) -> None:
    given = f"render --head-dim 64 --q-len 1 --chip H200 {options}".split()
    assert document(capsys, *given)["schedule"]["bq"] == rows


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            "--q-len 1 --key-simdgroups 2",
            "decode schedules for simdgroup matrices have no",
        ),
        ("--chip H200 --q-len 1 --simdgroups 1", "a multiple of key_simdgroups=2, not 1"),
        (
            "--q-len 1 --simdgroups 2 --key-simdgroups 2",
            "decode schedules for simdgroup matrices have no",
        ),
        (
            "--chip H200 --key-simdgroups 2",
            "forward schedules for wgmma matrices have no such knob",
        ),
        ("--chip H200 --q-len 1 --key-simdgroups 3", "key_simdgroups: expected one of 1, 2, 4, 8"),
    ],
)
def test_simdgroups_that_cannot_share_keys_are_named(
    options: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"render --head-dim 64 {options}".split()) != 0
    assert words in capsys.readouterr().err


def test_few_queries_check_the_decode_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    options = "check --q-len 1 --kv-len 40 --heads 4 --heads-per-kv 2 --splits 1,2".split()
    subjects = document(capsys, *options)["subjects"]
    kernels = [[launch["kernel"] for launch in subject["launches"]] for subject in subjects]
    assert [len(names) for names in kernels] == [1, 2]
    assert all("metalgen_decode" in names[0] for names in kernels)
    assert "metalgen_combine" in kernels[1][1]


def test_numbers_at_given_sizes_are_compared_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = "check --q-len 70 --kv-len 40 --heads 1".split()
    (subject,) = document(capsys, *options)["subjects"]
    assert (subject["wrong"], subject["exit_code"]) == ("", 0)
    monkeypatch.setattr("metalgen.calls.verify.tolerance_of", lambda _: 1e-9)
    (subject,) = document(capsys, *options, code=1)["subjects"]
    assert subject["wrong"].startswith("Lq=70 Lk=40: relative error ")


def test_a_rule_that_every_combination_breaks_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "--splits", "2,4"]) == 2
    error = capsys.readouterr().err
    assert error == (
        "metalgen: splits: expected none, because forward schedules for simdgroup matrices have no "
        "such knob, but got 2\n"
    )


def test_a_limit_is_for_all_schedules(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "--limit", "3"]) == 2
    assert "--limit: expected with --all, but got 3 without it" in capsys.readouterr().err
    subjects = document(capsys, "check", "--all", "--limit", "2", "--head-dim", "16")["subjects"]
    assert [subject["exit_code"] for subject in subjects] == [0, 0]
