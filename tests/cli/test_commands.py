"""What each command prints, in words and as JSON, and how bad input ends."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from metalgen.calls.verify import Verification
from metalgen.chips import get_chip
from metalgen.cli.app import COMMANDS, run
from metalgen.database.store import Store
from metalgen.errors import ArgumentError
from metalgen.families import Schedule, decode_schedule, default_schedule
from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig
from metalgen.source.hashes import named_hashes, template_hash
from metalgen.source.render import render
from metalgen.tuning.presets import preset
from metalgen.tuning.runner import tune

CONFIG = AttentionConfig(64, heads_per_kv=3, causal=True)


@pytest.fixture(autouse=True)
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user database of this test's own."""
    path = tmp_path / "tuning.db"
    monkeypatch.setenv("METALGEN_DB", str(path))
    return path


@pytest.fixture
def tuned(database: Path) -> Path:
    """A database with one problem tuned for M3Max by the chip model, its check taken as passed."""
    from metalgen.devices import get_device

    problem = next(p for p in preset("smollm2-135m").problems if p.config == CONFIG)
    with Store.open(database) as store:
        tune(
            [problem],
            get_chip("M3Max"),
            store,
            checker=get_device("reference"),
            verify=lambda *_, **__: Verification(True, 2e-4, 1e-3, "Lq=9 Lk=9"),
        )
    return database


def text(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """What a command prints on standard output."""
    assert run(arguments) == code
    return capsys.readouterr().out


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """The JSON that a command prints."""
    return json.loads(text(capsys, *arguments, "--json"))


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a command refuses its input with."""
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("metalgen: ")
    return line.removeprefix("metalgen: ")


def test_help_lists_every_command_and_imports_none(capsys: pytest.CaptureFixture[str]) -> None:
    listed = text(capsys, "--help")
    for name, words in COMMANDS.items():
        assert f"  {name} " in listed
        assert words.split()[0] in listed
    assert text(capsys) == listed
    script = (
        "import sys; from metalgen.cli.app import run; run(['--help']); "
        "print([n for n in ('rich', 'optuna', 'sqlite_utils', 'jinja2', 'numpy') "
        "if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    from metalgen import __version__

    assert text(capsys, "--version") == f"metalgen {__version__}\n"


def test_python_dash_m_runs_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "metalgen", "chips", "M3Maximum"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "metalgen: chip: expected one that `metalgen chips` lists; the nearest: M3Max, "
        f"{', '.join(get_nearest()[1:])}, but got 'M3Maximum'\n"
    )


def get_nearest() -> tuple[str, ...]:
    """The names that the chip table finds nearest to the misspelt one."""
    from metalgen.chips.chip import nearest_names

    return nearest_names("M3Maximum")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["frob"],
            "command: expected one of tune, lm, render, check, show, db, share, report, explain, "
            "chips, bench, verify, doctor",
        ),
        (["tune", "--xyzzy"], "No such option '--xyzzy'. (see metalgen tune --help)"),
        (["tune", "--chip", "M3Maxx"], "chip: expected one that `metalgen chips` lists; the near"),
        (["tune", "--chip", "M3Max", "--preset", "llama3"], "preset: expected default, all"),
        (["tune", "--chip", "M3Max", "--trials", "0"], "trials: expected a positive whole number"),
        (["tune", "--chip", "M3Max", "--budget", "-3"], "budget: expected seconds above 0"),
        (["tune", "--chip", "M3Max", "--seed", "-1"], "seed: expected a whole number from 0"),
        (["render", "--head-dim", "4"], "head_dim: expected an integer from 8 to 576, but got 4"),
        (["render", "--dtype", "int8"], "Invalid value for '--dtype': 'int8' is not one of"),
        (["render", "--bk", "33"], "invalid schedule (choices): bk: expected an integer of 8, 16"),
        (
            ["render", "--bq", "8", "--simdgroups", "4"],
            "invalid schedule (bq): bq must be 8 * row_blocks * simdgroups",
        ),
        (["render", "--head-dim", "256", "--bk", "256"], "invalid schedule (threadgroup memory)"),
        (["explain", "--q-len", "0"], "--q-len: expected a positive integer, but got 0"),
        (["explain", "--heads", "7", "--heads-per-kv", "2"], "--heads: expected a multiple of"),
        (["show", "--chip", "Z80"], "chip: expected one that `metalgen chips` lists"),
        (["chips", "M9"], "chip: expected one that `metalgen chips` lists"),
    ],
)
def test_bad_input_is_one_line_on_standard_error_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], database: Path
) -> None:
    assert complaint(capsys, *arguments).startswith(message)


def test_tune_needs_a_chip_where_the_machines_is_unknown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metalgen.chips.detect", lambda: None)
    assert complaint(capsys, "tune").startswith("chip: expected --chip NAME (such as M3Max")


def test_a_chip_without_a_model_that_is_not_here_is_refused_before_anything_is_written(
    capsys: pytest.CaptureFixture[str], database: Path
) -> None:
    line = complaint(capsys, "tune", "--chip", "H200")
    assert line == "chip: expected an Apple chip, or to be run on that GPU itself, but got 'H200'"
    assert not database.exists()


def on_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this machine look like one with an M1."""
    from metalgen.devices import all_devices

    metal = next(device for device in all_devices() if device.name == "metal")
    monkeypatch.setattr(type(metal), "unavailable", lambda self: None)
    monkeypatch.setattr("metalgen.devices.default_device", lambda: metal)
    monkeypatch.setattr("metalgen.chips.detect", lambda: get_chip("M1"))


def test_measuring_a_chip_that_is_not_here_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_mac(monkeypatch)
    line = complaint(capsys, "tune", "--chip", "M3Max", "--device", "metal")
    assert line == "device: expected simulator, for this machine's chip is M1, but got 'metal'"


def test_this_machines_chip_is_measured_and_another_is_modelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from metalgen.cli.tune import make_plan

    on_a_mac(monkeypatch)
    here, there = make_plan(None, None), make_plan("M3Max", None)
    assert (here.chip.name, here.device and here.device.name) == ("M1", "metal")
    assert "measured on this machine's GPU" in here.headline
    assert (there.chip.name, there.device) == ("M3Max", None)
    assert "times are MODELLED by the chip model, not measured" in there.headline
    asked = make_plan("M1", "simulator")
    assert asked.device is None
    assert "not measured as asked" in asked.headline


def foreign(path: Path) -> None:
    """Someone else's database."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")


def newer(path: Path) -> None:
    """A database of a later metalgen."""
    Store.open(path).close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 7")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (foreign, "not a metalgen database; it is left alone, set METALGEN_DB to another file"),
        (newer, "written by a later metalgen (schema 7, this one knows 3); update metalgen"),
        (lambda path: path.write_text("x" * 500), "not an SQLite database"),
        (lambda path: path.mkdir(), "is a folder, not a file"),
    ],
)
@pytest.mark.parametrize("command", [["tune", "--chip", "M3Max"], ["show"]])
def test_an_unusable_database_is_one_line_and_exit_code_2(
    make: Any,
    message: str,
    command: list[str],
    database: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make(database)
    assert run(command) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"metalgen: tuning database {database}: {message}")
    assert error.count("\n") == 1


def test_a_database_in_a_folder_that_cannot_be_made_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("METALGEN_DB", str(tmp_path / "file" / "tuning.db"))
    assert run(["tune", "--chip", "M3Max"]) == 2
    assert "its folder cannot be made" in capsys.readouterr().err


def test_a_locked_database_is_one_line_and_exit_code_2(
    database: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Store.open(database).close()
    monkeypatch.setattr(Store.open.__func__, "__kwdefaults__", {"read_only": False, "busy": 0.05})
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        assert run(["tune", "--chip", "M3Max"]) == 2
    assert "locked by another process" in capsys.readouterr().err


def test_render_prints_the_source_of_the_default_schedule(
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = render(CONFIG, default_schedule(CONFIG))
    printed = text(capsys, "render", "--causal", "--heads-per-kv", "3")
    assert printed == (
        f"// {CONFIG}, forward\n// schedule (default): {default_schedule(CONFIG)}\n{source.text}\n"
    )
    found = document(capsys, "render", "--causal", "--heads-per-kv", "3")
    assert found["config"] == CONFIG.to_dict()
    assert found["schedule"] == default_schedule(CONFIG).to_dict()
    assert (found["header"], found["source"]) == (source.header, source.source)
    assert found["template_hash"] == template_hash(default_schedule(CONFIG))


def test_features_of_a_config_are_options(capsys: pytest.CaptureFixture[str]) -> None:
    options = "--causal --window-left 127 --softcap 50 --lse --value-head-dim 32"
    found = document(capsys, "render", *options.split())
    assert found["config"] == {
        "head_dim": 64,
        "dtype": "float16",
        "value_head_dim": 32,
        "causal": True,
        "return_lse": True,
        "window_left": 127,
        "softcap": 50.0,
    }


def test_render_changes_the_fields_that_are_named_and_what_follows_from_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = "--simdgroups 8 --k-source device --v-source device --bk 16 --load-width 4"
    found = document(capsys, "render", *options.split())
    assert decode_schedule(found["schedule"], "forward", "metal") == Schedule(
        bq=128,
        bk=16,
        bd=64,
        simdgroups=8,
        row_blocks=2,
        k_source="device",
        v_source="device",
        load_width=4,
    )


def test_render_starts_from_the_best_schedule_of_a_chip(
    tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Store.open(tuned, read_only=True) as store:
        (winner,) = store.measurements(verified=True)
    shape = "--causal --heads-per-kv 3 --heads 9 --q-len 512".split()
    found = document(capsys, "render", *shape, "--chip", "M3Max")
    assert found["schedule"] == winner.schedule.to_dict()
    assert found["place"] == "user database, this chip, modelled"


def test_show_says_what_an_empty_database_needs(
    capsys: pytest.CaptureFixture[str], database: Path
) -> None:
    assert text(capsys, "show") == (
        f"{database}: no rows yet; `metalgen tune --chip M3Max` makes some.\n"
    )
    assert not database.exists()
    assert document(capsys, "show")["winners"] == []


def test_show_sets_winners_against_the_default(
    tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Store.open(tuned, read_only=True) as store:
        (winner,) = store.measurements(verified=True)
        count = len(store.measurements())
    printed = text(capsys, "show", "--chip", "m3max")
    first, header, line = printed.splitlines()
    assert first == f"{tuned}: {count} rows (1 modelled checked, {count - 1} modelled ok)"
    assert header.split() == "chip problem sizes best default gain MLX times schedule".split()
    assert line.startswith("M3Max  D64 float16 causal gqa3  BH=16 512x512  ")
    assert line.endswith(f"modelled  {winner.schedule}")
    found = document(capsys, "show")
    assert found["rows"] == count
    assert found["winners"] == [
        {
            "config": CONFIG.to_dict(),
            "family": "forward",
            "batch_heads": 16,
            "q_len": 512,
            "kv_len": 512,
            "chip": "M3Max",
            "schedule": winner.schedule.to_dict(),
            "provenance": "modelled",
            "seconds": winner.seconds,
            "default_seconds": winner.default_seconds,
            "mlx_seconds": None,
            "error": 2e-4,
            "created": winner.created,
        }
    ]
    assert document(capsys, "show", "--chip", "M1")["rows"] == 0


def test_rows_of_other_templates_are_counted_and_do_not_win(
    tuned: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metalgen.source.hashes.named_hashes", lambda: {"any": "f" * 16})
    printed = text(capsys, "show")
    count = document(capsys, "show")["rows_of_other_templates"]
    assert count > 1
    assert f"{count} rows from other template versions, ignored; `metalgen db refresh`" in printed
    assert "No row has passed its check, so none can be dispatched." in printed


def test_tune_counts_the_rows_of_other_templates_that_it_keeps(
    tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problem = next(p for p in preset("smollm2-135m").problems if p.config == CONFIG)
    with contextlib.closing(sqlite3.connect(tuned)) as database, database:
        database.execute(
            "UPDATE measurements SET template_hash = ? WHERE id = (SELECT min(id) FROM measurements"
            " WHERE source_hash <> '')",
            ["0" * 16],
        )
    sizes = {"heads": problem.heads, "q-len": problem.q_len, "kv-len": problem.kv_len}
    options = [f"--{name}={number}" for name, number in sizes.items()]
    shape = ["--head-dim=64", "--heads-per-kv=3", "--causal", *options]
    printed = text(capsys, "tune", "--chip", "M3Max", *shape)
    assert "\nCarried over 1 row from older templates (kernel source unchanged).\n" in printed


def test_explain_gives_the_path_of_the_look_up_and_what_a_call_gets(
    tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = "--causal --heads-per-kv 3 --heads 9 --q-len 512 --device reference".split()
    printed = text(capsys, "explain", *shape, "--chip", "M3Max")
    assert printed.splitlines()[:2] == [
        "Look-up of D64 float16 causal gqa3 BH=16 Lq=512 Lk=512 for chip M3Max (as asked):",
        "  no verified measured row: this chip, same chip with another core count, "
        "same generation, neighbouring buckets",
    ]
    assert "  found: user database, this chip, modelled, " in printed
    found = document(capsys, "explain", *shape)
    assert found["chip"] == "M3Max"  # the one tuned last
    assert found["hit"]["place"] == "user database, this chip"
    assert found["kernel"]["backend"] == "plain"
    other = document(capsys, "explain", *shape, "--chip", "M3Max-30")
    assert other["hit"]["place"] == "user database, same chip with another core count (M3Max)"
    assert other["hit"]["exact"] is False
    missed = document(capsys, "explain", *shape, "--chip", "M1")
    assert missed["hit"] is None
    assert missed["path"][-1] == "neighbouring buckets: no verified modelled row"


def test_doctor_tells_devices_versions_and_the_state_of_the_database(
    tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = document(capsys, "doctor")
    assert {"metal", "simulator", "reference"} <= set(found["devices"])
    assert found["devices"]["reference"] is None
    assert found["template_hashes"] == named_hashes()
    assert found["packages"]["mlx"]
    assert found["database"]["path"] == str(tuned)
    assert found["database"]["usable"] is True
    assert found["database"]["state"].startswith("sound: ")
    assert found["next"]
    printed = text(capsys, "doctor")
    assert f"database: {tuned}\n  sound: " in printed
    assert "db refresh" not in printed


def test_doctor_names_the_command_where_other_templates_made_rows(
    tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Store.open(tuned) as store, store.writing():
        store.db.execute("UPDATE measurements SET template_hash = ? WHERE id < 3", ["f" * 16])
    found = document(capsys, "doctor")
    assert found["database"]["rows_of_other_templates"] == 2
    assert found["next"][0].startswith("metalgen db refresh carries over rows of other templates")
    assert "2 of these rows were made by other templates, and are not used" in text(
        capsys, "doctor"
    )


@pytest.mark.parametrize("make", [foreign, newer, lambda path: path.write_text("x" * 500)])
def test_doctor_survives_a_database_that_nothing_else_can_use(
    make: Any, database: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(database)
    found = document(capsys, "doctor")
    assert found["database"]["usable"] is False
    assert found["database"]["state"].startswith("NOT USABLE: ")
    assert found["next"][0] == "move the database away, or set METALGEN_DB to another file"


def test_chips_lists_all_and_shows_one_with_its_sources(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = document(capsys, "chips")
    assert {c["name"]: c["cores"] for c in found["chips"]}["M3Max-30"] == 30
    assert document(capsys, "chips", "list") == found
    assert text(capsys, "chips", "list") == text(capsys, "chips")
    one = document(capsys, "chips", "m3 max")
    assert (one["name"], one["cores"], one["generation"]) == ("M3Max", 40, "M3")
    assert one["origins"]["dram_gbs"]["source"]
    printed = text(capsys, "chips", "M3Max")
    assert printed.startswith("M3Max: Apple M3 Max (40 GPU cores)\n")
    assert "estimated: " in printed


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], database: Path
) -> None:
    found = document(capsys, "tune", "--chip", "M3Max", "--preset", "deepseek", "--dry-run")
    assert (found["provenance"], found["preset"]) == ("modelled", "deepseek")
    prefill, decode = [512, 2048, 8192], [1024, 4096, 16384]
    assert [p["kv_len"] for p in found["problems"]] == prefill * 2 + decode * 2
    assert all(p["valid"] > 0 for p in found["problems"])
    assert "skipped" not in found
    printed = text(capsys, "tune", "--chip", "M3Max", "--preset", "deepseek", "--dry-run")
    assert f"Would tune 12 problems into {database}; nothing was written:" in printed
    lines = [line.split("  ") for line in printed.splitlines() if "D576/512 float16" in line]
    assert [(line[2].strip(), line[-1].strip()) for line in lines] == [
        (f"BH=128 1x{n}", "deepseek-v3 absorbed") for n in (1024, 4096, 16384)
    ]
    assert not database.exists()


def test_every_command_and_option_is_in_the_documentation() -> None:
    docs = Path(__file__).parents[2] / "docs" / "cli.md"
    if not docs.is_file():
        pytest.skip("docs/cli.md is not part of this installation")
    written = docs.read_text(encoding="utf-8")
    from metalgen.cli.app import metalgen

    context = metalgen.make_context("metalgen", ["doctor"])
    for name in COMMANDS:
        assert f"metalgen {name}" in written
        if importlib.util.find_spec(f"metalgen.cli.{name}") is None:
            continue
        command = metalgen.get_command(context, name)
        assert command is not None, name
        parts = command.commands.values() if isinstance(command, click.Group) else [command]
        for parameter in [p for part in parts for p in part.params]:
            for option in parameter.opts:
                if option.startswith("--"):
                    assert f"`{option}`" in written, f"{name} {option}"


def test_a_run_ends_with_what_it_changes_for_which_model() -> None:
    from dataclasses import replace

    from metalgen.cli.tune import changes
    from metalgen.database.measurement import Measurement
    from metalgen.tuning.presets import Preset
    from metalgen.tuning.progress import Outcome, Report

    prefill, decode = (Problem(CONFIG, 9, n, 1024) for n in (1024, 1))
    other = Problem(replace(CONFIG, head_dim=128), 9, 1024, 1024)
    labels = {prefill.key: ("a local", "b"), decode.key: ("a local",), other.key: ("c",)}
    chosen = Preset("some", (prefill, decode, other), labels)

    def outcome(problem: Problem, default: float) -> Outcome:
        schedule = default_schedule(problem.config, family=problem.family)
        row = Measurement(
            *(problem, schedule, "0" * 16, "M3Max", 40, "model", "modelled", "{}"), seconds=1e-3
        )
        return Outcome(problem, row, default, 1, 1, 1)

    outcomes = [outcome(prefill, 2e-3), outcome(decode, 1e-3), outcome(other, 1e-3)]
    report = Report("run", "M3Max", "modelled", outcomes)
    assert changes(chosen, report) == (
        "By model, over the default schedule (modelled): a prefill 2.00x and decode 1.00x; "
        "b prefill 2.00x; unchanged: c."
    )


def test_an_nvidia_machine_tunes_itself_without_being_told_its_chip(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from metalgen.cli.tune import make_plan
    from metalgen.devices import all_devices

    cuda = next(device for device in all_devices() if device.name == "cuda")
    monkeypatch.setattr(type(cuda), "unavailable", lambda self: None)
    monkeypatch.setattr("metalgen.devices.default_device", lambda: cuda)
    monkeypatch.setattr("metalgen.chips.detect", lambda: get_chip("H200"))
    plan = make_plan(None, None)
    assert (plan.chip.name, plan.device, plan.checker) == ("H200", cuda, cuda)
    assert plan.headline.endswith("measured on this machine's GPU.")
    monkeypatch.setattr("metalgen.chips.detect", lambda: None)
    with pytest.raises(ArgumentError, match="because this machine's GPU is not on record"):
        make_plan(None, None)
