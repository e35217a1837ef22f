"""``metalgen share``, ``db verify --contribution``, ``db update``: sound and hostile sources."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from metalgen import contribution
from metalgen.chips import get_chip
from metalgen.cli.app import run
from metalgen.contribution import ABOUT, PROOF, RECORDS, SUMMARY, Contribution
from metalgen.database.measurement import Measurement
from metalgen.database.store import Store
from metalgen.devices import get_device
from metalgen.families import default_schedule
from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig
from metalgen.source.hashes import template_hash
from metalgen.verification.outcomes import Outcome
from metalgen.verification.running import Report

CHIP = get_chip("M3Max")


def proof() -> dict[str, Any]:
    """The document of a verification without faults."""
    right = Outcome("types", "float16", "ok", 1e-4, 1e-3, "Lq=9 Lk=9", "", 0.1)
    return {"metalgen_verify": 1} | Report("metal", False, 1, [right]).to_dict()


def row(seconds: float = 1e-3, q_len: int = 1024, **fields: Any) -> Measurement:
    """A measured, verified final of M3Max."""
    config = AttentionConfig(64, causal=True)
    problem = Problem(config, 32, q_len, q_len)
    schedule = default_schedule(config, CHIP.limits)
    shared: dict[str, Any] = {
        "chip": "M3Max",
        "cores": CHIP.cores,
        "template_hash": template_hash(schedule),
        "device": "metal",
        "provenance": "measured",
        "policy": "{}",
        "seconds": seconds,
        "samples": (seconds,),
        "default_seconds": 2e-3,
        "mlx_seconds": 1.5e-3,
        "phase": "final",
        "verified": True,
        "os": "macOS 26.1",
        "mlx_version": "0.32.4",
        "metalgen_version": "0.1.0",
    }
    return Measurement(problem, schedule, **(shared | fields))


def keep(store: Store, *rows: Measurement) -> None:
    """Add rows to a database, as a run does."""
    run = store.begin_run("M3Max", 0)
    store.add_measurements([replace(m, run=run) for m in rows])
    store.end_run(run, "done")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METALGEN_DB", str(tmp_path / "tuning.db"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def made() -> Contribution:
    """A contribution of two problems."""
    with Store.open() as store:
        keep(store, row(), row(q_len=4096), row(phase="search", verified=False))
        return contribution.collect(store, CHIP, proof())


@pytest.fixture
def folder(made: Contribution) -> Path:
    """The same as a folder."""
    contribution.write(made, Path("mine"))
    return Path("mine")


def test_a_contribution_holds_measured_and_verified_finals_and_a_summary(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(contribution.FILES)
    lines = (folder / RECORDS).read_text().splitlines()
    assert len(lines) == 2 and lines == sorted(lines)
    assert {json.loads(line)["phase"] for line in lines} == {"final"}
    text = (folder / SUMMARY).read_text()
    assert "2 measured and verified finals of 2 problems" in text
    assert "| 1 | 2.00x | 1.50x |" in text
    assert contribution.read(folder)[1] == []


def test_there_must_be_something_to_contribute(made: Contribution) -> None:
    with Store.open() as store:
        with pytest.raises(contribution.ContributionError, match="no measured and verified final"):
            contribution.collect(store, get_chip("M4"), proof())
        with pytest.raises(contribution.ContributionError, match="verification found faults"):
            contribution.collect(store, CHIP, proof() | {"faults": 1})


def _edit(name: str, change: Any) -> Any:
    def edit(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return edit


def _records(change: Any) -> Any:
    """Change the rows, and everything else that follows from them."""

    def edit(folder: Path) -> None:
        import hashlib

        rows = [Measurement.from_line(x) for x in (folder / RECORDS).read_text().splitlines()]
        data = "".join(sorted(m.to_line() + "\n" for m in map(change, rows))).encode()
        (folder / RECORDS).write_bytes(data)
        _edit(ABOUT, lambda x: x | {"records_sha256": hashlib.sha256(data).hexdigest()})(folder)

    return edit


FAULTS: dict[str, tuple[Any, str]] = {
    "another file": (lambda f: (f / "run.py").write_text("1"), "expected a folder with about.json"),
    "a file less": (lambda f: (f / PROOF).unlink(), "expected a folder with about.json"),
    "a link": (
        lambda f: ((f / PROOF).unlink(), (f / PROOF).symlink_to("/etc/passwd")),
        "expected a folder with about.json",
    ),
    "no JSON": (lambda f: (f / ABOUT).write_text("{"), "about.json: "),
    "another format": (_edit(ABOUT, lambda x: x | {"metalgen_contribution": 2}), "format 1"),
    "marks of Markdown": (_edit(ABOUT, lambda x: x | {"os": "[x](y)"}), "expected os to be text"),
    "an unknown field": (_edit(ABOUT, lambda x: x | {"run": "x"}), "an unknown field run"),
    "another digest": (_edit(ABOUT, lambda x: x | {"records_sha256": "0"}), "is not that of"),
    "a changed time": (
        lambda f: (f / RECORDS).write_text((f / RECORDS).read_text().replace("0.001", "0.0001")),
        "is not that of records.jsonl",
    ),
    "another chip": (_records(lambda m: replace(m, chip="M4Max")), "of M4Max with"),
    "a prediction": (
        _records(lambda m: replace(m, provenance="modelled", verified=False)),
        "not a measured and verified final",
    ),
    "another device": (_records(lambda m: replace(m, device="cuda")), "measured on cuda"),
    "a bad row": (
        lambda f: (f / RECORDS).write_text((f / RECORDS).read_text() + "{}\n"),
        "records.jsonl, line 3",
    ),
    "a faulty proof": (_edit(PROOF, lambda x: x | {"faults": 3}), "not a complete verification"),
    "a proof that ended early": (_edit(PROOF, lambda x: x | {"total": 9}), "not a complete"),
    "a proof that hides a fault": (
        _edit(PROOF, lambda x: x | {"outcomes": [{"status": "wrong"}]}),
        "it counts no faults and lists some",
    ),
    "a proof of another device": (
        _edit(PROOF, lambda x: x | {"device": "simulator"}),
        "of another",
    ),
    "another summary": (lambda f: (f / SUMMARY).write_text("# Best ever"), "not the summary"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_wrong_with_a_contribution_is_named(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, words = FAULTS[name]
    change(folder)
    assert run(["db", "verify", "--contribution", str(folder)]) == 1
    assert words in capsys.readouterr().out
    assert run(["db", "update", str(folder)]) == 2
    assert "a sound contribution" in capsys.readouterr().err


def test_several_contributors_are_compared(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("METALGEN_DB", str(tmp_path / "other.db"))
    with Store.open() as store:
        keep(store, row(1.25e-3, policy='{"os":"macOS 27"}'))
        contribution.write(contribution.collect(store, CHIP, proof()), Path("theirs"))
    assert run(["db", "verify", "--contribution", "mine", "theirs"]) == 0
    printed = capsys.readouterr().out
    assert "mine: sound" in printed and "theirs: sound" in printed
    assert "1 schedule measured by several contributors" in printed
    assert "median of 2 1.125 ms, 25.0 % apart" in printed


def test_shared_records_are_taken_over(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("METALGEN_DB", str(tmp_path / "other.db"))
    assert run(["db", "update", "mine", "--dry-run"]) == 0
    assert run(["db", "update", "mine"]) == 0
    assert "2 new" in capsys.readouterr().out.splitlines()[-1]
    assert run(["db", "update", str(folder / RECORDS), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["same"] == 2


class _Handler(http.server.BaseHTTPRequestHandler):
    contents = b""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/m3max.jsonl" else 404)
        self.end_headers()
        if self.path == "/m3max.jsonl":
            self.wfile.write(self.contents)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    """A server of this machine's own."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


def test_records_come_from_a_url(
    folder: Path,
    server: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("METALGEN_DB", str(tmp_path / "other.db"))
    _Handler.contents = (folder / RECORDS).read_bytes() + b'{"chip": "../../etc"}\n'
    assert run(["db", "update", f"{server}/m3max.jsonl"]) == 1  # a bad row is named and left out
    printed = capsys.readouterr().out
    assert "2 new" in printed and "1 rejected" in printed
    assert run(["db", "update", f"{server}/none.jsonl"]) == 2
    assert "a URL that answers (Not Found)" in capsys.readouterr().err
    monkeypatch.setattr("metalgen.database.untrusted.MAX_RECORDS_BYTES", 100)
    assert run(["db", "update", f"{server}/m3max.jsonl"]) == 2
    assert "at most 100 bytes" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["file:///etc/passwd", "ftp://example.org/x", "https:///x"])
def test_other_urls_are_refused(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["db", "update", source]) == 2
    assert "a URL of https or http" in capsys.readouterr().err


def test_the_command_needs_a_gpu_and_makes_a_folder(
    made: Contribution, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["share"]) == 2
    assert "a machine whose GPU metalgen knows" in capsys.readouterr().err
    here = (CHIP, get_device("reference"))
    monkeypatch.setattr("metalgen.cli.tune.local_gpu", lambda: here)
    Path("proof.json").write_text(json.dumps(proof()))
    assert run(["share", "--verification", "proof.json"]) == 0
    assert contribution.read(Path("metalgen-M3Max"))[1] == []
    assert "2 rows of M3Max in metalgen-M3Max" in capsys.readouterr().out
    assert run(["share", "--verification", "proof.json"]) == 2
    assert "--output: expected a folder that does not exist" in capsys.readouterr().err
    assert run(["share", "-o", "x", "--verification", "missing.json"]) == 2
    assert "--verification: expected a file of `metalgen verify`" in capsys.readouterr().err
    assert not Path("x").exists()
