"""What commands print on a terminal, into a pipe, and where it cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from metalgen.cli.app import run
from metalgen.cli.options import echo_table

ROWS = [("name", "value", "source"), ("lanes", "128", "a table of microbenchmarks of M1 and M2")]


def on_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """Standard output as a terminal of so many columns."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))


def test_a_table_that_fits_has_one_line_a_row(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_terminal(monkeypatch, 80)
    echo_table(ROWS, "  ")
    assert capsys.readouterr().out.splitlines() == [
        "  name   value  source",
        "  lanes  128    a table of microbenchmarks of M1 and M2",
    ]


def test_on_a_narrow_terminal_the_last_column_stands_below(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_terminal(monkeypatch, 40)
    echo_table(ROWS, "  ")
    assert capsys.readouterr().out.splitlines() == [
        "  name   value",
        "      source",
        "  lanes  128",
        "      a table of microbenchmarks of M1",
        "      and M2",
    ]


def test_a_pipe_has_one_line_a_row_however_narrow_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    echo_table(ROWS)
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_group_without_a_command_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["db"]) == 0
    printed = capsys.readouterr().out
    assert run(["db", "--help"]) == 0
    assert capsys.readouterr().out == printed
    assert "  merge " in printed


@pytest.mark.parametrize("group", [["db"], ["chips", "--help"], ["--help"]])
def test_every_command_of_a_list_is_told_in_whole_words(
    group: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(group) == 0
    printed = capsys.readouterr().out.split("Commands:")[1]
    assert "..." not in printed
    assert max(map(len, printed.splitlines())) <= 80


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("options", [["render"], ["chips", "--json"], ["--help"]])
def test_a_full_disk_is_one_line_and_exit_code_2(options: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "metalgen", *options],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 2
    assert done.stderr == "metalgen: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("options", [["render"], ["check", "--q-len", "1", "--counters"]])
def test_a_pipe_that_nobody_reads_is_no_error(options: list[str], tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "metalgen", *options],
        stdout=write,
        stderr=subprocess.PIPE,
        env=os.environ | {"METALGEN_DB": str(tmp_path / "tuning.db")},
        text=True,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_mlx_without_a_back_end_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "core.py").write_text("raise ImportError('libmlx.so: no such file')")
    (tmp_path / "mlx" / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "-c", "import metalgen"],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: metalgen needs MLX with a back end (libmlx.so: no such file): pip install "
        "'metalgen[cpu]', or on a machine with an NVIDIA GPU 'metalgen[cuda13]'"
    )


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("metalgen tu", {"tune"}),
        ("metalgen tune --preset qwen3-2", {"qwen3-235b-a22b"}),
        ("metalgen explain --chip m3max", {"M3Max", "M3Max-30"}),
    ],
)
def test_a_shell_completes_commands_presets_and_chips(words: str, completed: set[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from metalgen.cli.app import run; run([])"],
        capture_output=True,
        env=os.environ
        | {
            "_METALGEN_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
        },
        text=True,
    )
    assert {line.removeprefix("plain,") for line in done.stdout.splitlines()} == completed


def test_a_compile_cache_that_cannot_be_made_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("METALGEN_CACHE", str(tmp_path / "file"))
    monkeypatch.setenv("METALGEN_DB", str(tmp_path / "tuning.db"))
    expected = (
        f"compile cache {tmp_path / 'file' / 'simulator'}: Not a directory; set METALGEN_CACHE to "
        "a folder that you may write"
    )
    assert run(["check", "--head-dim", "24", "--bk", "8"]) == 2
    assert capsys.readouterr().err == f"\n{expected}\n"
    assert run(["explain", "--head-dim", "24", "--q-len", "9", "--device", "simulator"]) == 0
    assert f"check on simulator: runtime now ({expected})" in capsys.readouterr().out


@pytest.mark.parametrize("stream", ["1", "2"])
@pytest.mark.parametrize(
    "words",
    ["chips M3Max", "db export", "tune --chip M3Max --trials 1 --head-dim 16 --device simulator"],
)
def test_a_closed_stream_is_no_error(words: str, stream: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} -m metalgen {words} {stream}>&-"],
        capture_output=True,
        env=os.environ | {"METALGEN_DB": str(tmp_path / "tuning.db")},
        text=True,
    )
    assert "Traceback" not in done.stderr
    missing = words == "db export"  # there is no database yet
    assert done.returncode == (2 if missing else 0), done.stderr
