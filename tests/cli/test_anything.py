"""Whatever is typed, a command ends with an exit code and at most one line of complaint."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from random import Random

import click
import pytest

from metalgen.cli.app import COMMANDS, metalgen, run
from metalgen.devices import Device
from metalgen.verification.running import Report

WORDS = (
    *(
        "",
        "x",
        "-1",
        "0",
        "nan",
        "inf",
        "1e99",
        "-0",
        "\N{COLLISION SYMBOL}",
        "a" * 500,
        "[]",
        "{}",
    ),
    *("null", '{"bq":1}', "1.5", "0x10", "1_000", "folder", "%s", "{0}", "--", "-h", "=", "a=b"),
    *("causal=1", "page_size=16", "dropout=2", "rope=half", "score_mod=x", "kv_bits=[4]", "\x01"),
    *("kv_bits=4", "softcap=1e400", "head_dim=64", "\N{ARABIC-INDIC DIGIT THREE}", "1,2", "M3Max"),
    *("journal:x", "postgresql://", "noise", "empty", "records.jsonl"),
)
"""Numbers that are none, names of files in the folder, and what looks like something else."""


def commands() -> list[tuple[list[str], click.Command]]:
    """Every command and subcommand with the words that call it; those that would compute, not."""
    context = metalgen.make_context("metalgen", ["doctor"])
    found: list[tuple[list[str], click.Command]] = []
    for name in COMMANDS:
        command = metalgen.get_command(context, name)
        if isinstance(command, click.Group):
            found += [([name, part], each) for part, each in command.commands.items()]
        elif command is not None and name != "check":
            found.append(([name, "--dry-run"] if name == "tune" else [name], command))
    return found


def typed(random: Random, command: click.Command) -> list[str]:
    """Some of a command's options and arguments, with any values."""
    words = []
    options = [p for p in command.params if isinstance(p, click.Option)]
    for option in random.choices(options, k=random.randint(0, 3)):
        words.append(random.choice(option.opts))
        if not option.is_flag:
            words.append(random.choice(WORDS))
    for parameter in command.params:
        if isinstance(parameter, click.Argument) and random.random() < 0.8:
            words.append(random.choice(WORDS))
    if random.random() < 0.05:
        words.insert(random.randint(0, len(words)), random.choice(WORDS))
    return words


@pytest.mark.parametrize(
    "count", [300, pytest.param(20_000, marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_whatever_is_typed_ends_in_order(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # every name of a file above is a relative one
    monkeypatch.setenv("METALGEN_DB", str(tmp_path / "tuning.db"))

    def verified(device: Device, **options: object) -> Report:
        return Report(device.name, False, 0)  # `verify` and `share` would run every kernel

    monkeypatch.setattr("metalgen.verification.running.verify_device", verified)
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    noise = Random(0).randbytes(5000)
    (tmp_path / "noise").write_bytes(noise)
    shipped = Path(__file__).parents[2] / "tuning_db" / "h200.jsonl"
    lines = shipped.read_text(encoding="utf-8").splitlines(keepends=True)[:20]
    (tmp_path / "records.jsonl").write_text("".join(lines), encoding="utf-8")
    random, listed = Random(count), commands()
    for _ in range(count):
        start, command = random.choice(listed)
        words = [*start, *typed(random, command)]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(words)
        assert code in (0, 1, 2), words
        if code == 2 and words[0] != "lm":  # whose programs are mlx-lm's, with its words
            assert err.getvalue().startswith("metalgen: "), (words, err.getvalue())
            assert err.getvalue().count("\n") == 1, (words, err.getvalue())
    assert (tmp_path / "noise").read_bytes() == noise
