"""`metalgen check`: what it prints, what its JSON holds, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from metalgen.cli.app import run

RACY = '''
import sys
import mlx.core as mx

print("arguments", sys.argv[1:])
kernel = mx.fast.metal_kernel(
    name="reverse",
    input_names=["x"],
    output_names=["out"],
    source="""
  threadgroup float tile[64];
  uint t = thread_position_in_threadgroup.x;
  tile[t] = x[t];
  BARRIER
  out[t] = tile[63 - t];
""",
)
if __name__ == "__main__":
    for _ in range(2):
        kernel(
            inputs=[mx.arange(64, dtype=mx.float32)],
            grid=(64, 1, 1),
            threadgroup=(64, 1, 1),
            output_shapes=[(64,)],
            output_dtypes=[mx.float32],
        )
'''
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


def script(folder: Path, text: str) -> str:
    path = folder / "script.py"
    path.write_text(text)
    return str(path)


def test_a_file_with_a_race_is_reported_with_its_source_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["check", script(tmp_path, RACY.replace("BARRIER", ""))]) == 1
    out = capsys.readouterr().out
    assert "FOUND" in out and "race" in out and "threadgroup tile" in out
    assert "| " in out and "  tile[t] = x[t];" in out and "out[t] = tile[63 - t];" in out


def test_a_race_is_reported_once_with_both_accesses_and_a_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["check", "--json", script(tmp_path, RACY.replace("BARRIER", ""))]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["exit_code"] == 1
    (subject,) = report["subjects"]
    (launch,) = subject["launches"]  # the second launch found the same
    races = [f for f in launch["findings"] if f["kind"] == "race"]
    assert len(races) == 1
    assert {races[0]["access"]["kind"], races[0]["other"]["kind"]} == {"read", "write"}
    assert races[0]["access"]["line"] != races[0]["other"]["line"]
    assert races[0]["count"] >= 64
    assert races[0]["memory"] == "threadgroup tile"


def test_a_clean_file_ends_with_zero_and_gets_its_own_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = script(tmp_path, RACY.replace("BARRIER", BARRIER))
    assert run(["check", path, "--", "--flag", "7"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("clean") and "2 launches, 0 findings" in printed.out
    assert printed.err == "arguments ['--flag', '7']\n"


@pytest.mark.parametrize(
    "text, words",
    [
        ("x = 1 / 0\n", "script.py:1: ZeroDivisionError"),
        ("import sys\nsys.exit(3)\n", "exit code 3"),
        ("print('no kernel')\n", "the program ran no kernel of mx.fast.metal_kernel"),
        (RACY.replace("BARRIER", "no_such_name;"), "no_such_name"),
    ],
)
def test_a_file_that_cannot_run_ends_with_two_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    assert run(["check", script(tmp_path, text)]) == 2
    printed = capsys.readouterr()
    assert words in printed.err and printed.out.startswith("ERROR")


def test_a_file_that_is_not_there_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "nowhere.py"]) == 2
    assert "expected a Python file, but 'nowhere.py' is none" in capsys.readouterr().err


def test_our_forward_kernel_is_clean_on_every_schedule_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--head-dim", "32", "--causal", "--bk", "8,16", "--buffers", "1,2"]
    assert run(["check", *arguments, "--row-blocks", "1"]) == 0
    lines = capsys.readouterr().out.strip().split("\n")
    assert len(lines) == 4 and all(line.startswith("clean") for line in lines)


def test_combinations_that_break_a_rule_are_left_out_and_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["check", "--head-dim", "32", "--bd", "32,64", "--row-blocks", "1"]) == 0
    out = capsys.readouterr().out
    assert (
        "1 combination against a rule of the schedule: left out" in out and out.count("clean") == 1
    )


def test_the_first_schedules_of_the_space_can_be_checked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["check", "--head-dim", "16", "--all", "--limit", "2", "--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert len(report["subjects"]) == 2
    for subject in report["subjects"]:
        assert subject["exit_code"] == 0 and len(subject["launches"]) == 1
        assert subject["launches"][0]["counters"]["multiply_accumulates"] > 0


def test_counters_are_printed_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--q-len", "32", "--heads", "1", "--head-dim", "32"]
    assert run(["check", *sizes, "--counters"]) == 0
    out = capsys.readouterr().out
    assert "Traffic by buffer" in out and "8x8x8 multiply-accumulates" in out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--bk", "17"], "--bk"),
        (["--bk", "x"], "--bk"),
        (["--head-dim", "3"], "head_dim"),
        (["--head-dim", "32", "--bd", "64"], "bd=64 is wider"),
    ],
)
def test_bad_options_end_with_two_and_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert run(["check", *arguments]) == 2
    assert words in capsys.readouterr().err
