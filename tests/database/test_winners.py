"""One row wins, by whatever it is asked for, and no check of another row changes that."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from metalgen.calls.resolve import forget_kernels, get_kernel
from metalgen.calls.verify import Verification
from metalgen.chips import get_chip
from metalgen.cli.app import run
from metalgen.database.lookup import lookup
from metalgen.database.measurement import Measurement
from metalgen.database.records import write_records
from metalgen.database.store import Store
from metalgen.database.winners import GRAIN, ordered, winner
from metalgen.devices import get_device
from metalgen.families import Schedule, decode_schedule
from metalgen.families.counts import forward_counts
from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig
from metalgen.report.results import results
from metalgen.report.sources import read_sources
from metalgen.source.hashes import template_hash, template_hashes
from metalgen.testing.rows import CHIP, FIRST, HASH, NEIGHBOURS, PROBLEM, SECOND, THIRD, row
from metalgen.testing.rows import modelled as predicted
from metalgen.tuning.runner import tune

GROUPED = AttentionConfig(head_dim=64, causal=True, heads_per_kv=3)
WIDE = AttentionConfig(head_dim=256, causal=True)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's database. Kernels pass their check without being executed."""
    place = tmp_path / "tuning.db"
    monkeypatch.setenv("METALGEN_DB", str(place))
    passed = Verification(True, 1e-4, 1e-3, "Lq=9", "")
    monkeypatch.setattr("metalgen.calls.verify.verify", lambda *_, **__: passed)
    return place


def tuned(
    path: Path, chip: str, *problems: Problem, wrong: Iterable[Schedule] = (), **arguments: Any
) -> list[Schedule | None]:
    """The winners that ``tune`` names for a chip that is not here; some kernels compute wrongly."""

    def verify(device: Any, config: Any, schedule: Schedule, **_: Any) -> Verification:
        good = schedule not in wrong
        return Verification(good, 1e-4 if good else 1.0, 1e-3, "Lq=9", "" if good else "off")

    with Store.open(path) as store:
        report = tune(
            *(problems, get_chip(chip), store),
            checker=get_device("simulator"),
            verify=verify,
            **arguments,
        )
    return [outcome.winner and outcome.winner.schedule for outcome in report.outcomes]


def named(problem: Problem, chip: str, path: Path, capsys: Any) -> dict[str, Schedule]:
    """What everything that names a winner answers for a problem on a chip, apart from ``tune``."""
    found: dict[str, Schedule] = {}
    hit = lookup(
        problem,
        get_chip(chip),
        template_hashes(problem.family, "metal"),
        shipped=path.parent / "none",
    )
    assert hit is not None and hit.exact
    found["look-up"] = hit.schedule
    with Store.open(path, read_only=True) as store:
        templates = template_hashes(problem.family, "metal")
        rows = store.measurements(problem, chip=chip)
        won = winner(m for m in rows if m.template_hash in templates)
    assert won is not None
    found["rule"] = won.schedule
    capsys.readouterr()
    assert run(["show", "--json", "--chip", chip]) == 0
    for each in json.loads(capsys.readouterr().out)["winners"]:
        sizes = {n: each[n] for n in ("family", "batch_heads", "q_len", "kv_len")}
        if Problem(AttentionConfig.from_dict(each["config"]), **sizes) == problem:
            found["show"] = decode_schedule(each["schedule"], problem.family)
    c, heads = problem.config, str(problem.heads)
    words = ["--head-dim", str(c.head_dim), "--heads-per-kv", str(c.heads_per_kv)]
    words += ["--causal", "--heads", heads, "--chip", chip, "--json"]
    words += ["--q-len", str(problem.q_len), "--kv-len", str(problem.kv_len)]
    assert run(["db", "show", *words]) == 0
    found["db show"] = decode_schedule(
        json.loads(capsys.readouterr().out)["rows"][0]["schedule"], problem.family
    )
    forget_kernels()
    assert run(["explain", "--device", "simulator", *words]) == 0
    document = json.loads(capsys.readouterr().out)
    found["explain"] = decode_schedule(document["hit"]["schedule"], problem.family)
    found["a call"] = decode_schedule(document["kernel"]["schedule"], problem.family)
    for result in results(read_sources([], chip)):
        if result.problem == problem and result.winner is not None:
            found["report"] = result.winner.schedule
    assert len(found) == 7
    return found


def agreed(problem: Problem, chip: str, path: Path, capsys: Any) -> Schedule:
    """The winner that all of them name."""
    found = named(problem, chip, path, capsys)
    assert len(set(found.values())) == 1, found
    return found["rule"]


def test_tuning_another_chip_changes_no_winner(path: Path, capsys: Any) -> None:
    """These commands once named two winners for M3Max: 256x64x64, and 128x32x64 afterwards."""
    here = Problem(GROUPED, 9, 4096, 4096)
    there = Problem(GROUPED, 9, 2048, 2048)
    (first,) = tuned(path, "M3Max", here)
    assert agreed(here, "M3Max", path, capsys) == first
    (second,) = tuned(path, "M5Max", there)
    assert agreed(there, "M5Max", path, capsys) == second
    assert agreed(here, "M3Max", path, capsys) == first
    assert tuned(path, "M3Max", here) == [first]


def test_a_problem_that_was_tuned_is_answered_with_its_own_row(path: Path, capsys: Any) -> None:
    """Other sizes of the same config that are tuned later check kernels that it has rows of."""
    sizes = [4096, 1024, 2048, 512]
    problems = [Problem(WIDE, 32, size, size) for size in sizes]
    found: dict[Problem, Schedule | None] = {}
    for problem in problems:
        (found[problem],) = tuned(path, "M1Max", problem)
        for each, schedule in found.items():
            assert agreed(each, "M1Max", path, capsys) == schedule


def test_a_pin_that_was_used_and_taken_away_leaves_the_winner_as_it_was(
    path: Path, capsys: Any
) -> None:
    problem = Problem(GROUPED, 9, 4096, 4096)
    (first,) = tuned(path, "M3Max", problem)
    with Store.open(path) as store:
        others = [m.schedule for m in store.measurements(problem) if m.schedule != first][:12]
        for schedule in others:
            store.pin(problem, schedule)
            forget_kernels()
            sizes = {"heads": 9, "q_len": 4096, "device": "simulator", "chip": "M3Max"}
            assert get_kernel(GROUPED, **sizes).schedule == schedule
            assert store.find_check(GROUPED, schedule, template_hash(schedule)) is not None
            assert store.unpin(problem)
    assert agreed(problem, "M3Max", path, capsys) == first


def test_fewer_trials_of_the_same_problem_name_the_same_winner_everywhere(
    path: Path, capsys: Any
) -> None:
    problem = Problem(GROUPED, 9, 1024, 1024)
    for trials in (20, None, 5, 60):
        (found,) = tuned(path, "M3Max", problem, trials=trials)
        with Store.open(path, read_only=True) as store:
            rows = store.measurements(problem, chip="M3Max")
        assert winner(rows) is not None
        hit = lookup(
            problem,
            get_chip("M3Max"),
            template_hashes(problem.family, "metal"),
            shipped=path.parent / "none",
        )
        assert hit is not None
        assert found == hit.schedule == winner(rows).schedule  # type: ignore[union-attr]


@pytest.mark.parametrize("seed", range(6))
def test_winners_stay_whatever_is_tuned_checked_and_pinned_afterwards(
    seed: int, path: Path, capsys: Any
) -> None:
    """Chips and sizes in any order, some kernels wrong; then checks of any kernel that pass."""
    draw = random.Random(seed)
    places = [
        (chip, Problem(AttentionConfig(head_dim=64, causal=True), 4, size, size))
        for chip in ("M1", "M3Max", "M5Max")
        for size in (128, 512, 2048)
    ]
    draw.shuffle(places)
    found: dict[tuple[str, Problem], Schedule | None] = {}
    wrong: set[Schedule] = set()
    for chip, problem in places[:5]:
        if draw.random() < 0.3 and found:
            with Store.open(path) as store:  # a kernel that no winner is
                rows = [m.schedule for m in store.measurements() if not m.verified]
            wrong.add(draw.choice(rows))
        (found[chip, problem],) = tuned(path, chip, problem, wrong=wrong, trials=40)
    with Store.open(path) as store:
        rows = store.measurements()
        for m in draw.sample(rows, len(rows) // 2):
            if store.find_check(m.problem.config, m.schedule, m.template_hash) is None:
                kernel = (m.problem.config, m.schedule, m.template_hash)
                store.record_check(*kernel, "simulator", "ok", family=m.problem.family)
    for (chip, problem), schedule in found.items():
        assert agreed(problem, chip, path, capsys) == schedule


def test_a_pruned_row_never_wins_however_quick_it_was_and_whatever_its_check_says(
    path: Path,
) -> None:
    """Its few samples are no time that counts; the kernel itself is right, so its check passes."""
    pruned = row(SECOND, 1e-5, status="pruned", detail="ended after 2 samples")
    with Store.open(path) as store:
        run = store.begin_run("M3Max", 0)
        store.add_measurements([row(FIRST, 1e-3, run=run), dataclasses.replace(pruned, run=run)])
        for schedule in (FIRST, SECOND):
            store.record_check(PROBLEM.config, schedule, HASH, "simulator", "ok")
        rows = store.measurements(PROBLEM)
    assert {m.schedule: m.verified for m in rows} == {FIRST: True, SECOND: False}
    won = winner(rows)
    assert won is not None and won.schedule == FIRST
    hit = lookup(PROBLEM, get_chip("M3Max"), {HASH}, shipped=path.parent / "none")
    assert hit is not None and hit.schedule == FIRST
    assert winner([dataclasses.replace(pruned, verified=True)]) is None


def order(m: Measurement, least: float) -> tuple[Any, ...]:
    """By the rule's words, for rows of one problem on one chip: by hand, for these tests."""
    p, seconds = m.problem, m.seconds or 0.0
    near = seconds <= 1.01 * least and seconds <= (m.default_seconds or seconds)
    sizes = {"batch_heads": p.batch_heads, "q_len": p.q_len, "kv_len": p.kv_len}
    read = forward_counts(p.config, m.schedule, **sizes).device_read
    return (not near, read if near else 0, seconds, m.schedule.key)


def test_predictions_that_the_model_cannot_tell_apart_are_ordered_by_the_bytes_they_read() -> None:
    assert GRAIN == 1.01
    times = {FIRST: 1.009e-3, SECOND: 1.0e-3, THIRD: 1.02e-3}
    rows = [predicted(schedule, t) for schedule, t in times.items()]
    assert order(rows[0], 1e-3)[1] < order(rows[1], 1e-3)[1]  # the first reads less
    assert [m.schedule for m in ordered(rows)] == [FIRST, SECOND, THIRD]
    slower = [dataclasses.replace(m, default_seconds=1.005e-3) for m in rows]
    assert [m.schedule for m in ordered(slower)] == [SECOND, FIRST, THIRD]
    failed = dataclasses.replace(rows[1], seconds=0.9e-3, status="wrong")
    best = [m.schedule for m in ordered([rows[0], failed, rows[2]])]
    assert best == [SECOND, FIRST, THIRD]  # of what failed the time still says what is near


def keep(path: Path, *rows: Measurement) -> None:
    """Put rows into a database."""
    with Store.open(path) as store:
        number = store.begin_run("M3Max", 0)
        store.add_measurements(dataclasses.replace(m, run=number) for m in rows)


def asked(path: Path, problem: Problem) -> Any:
    """What a look-up answers on M3Max."""
    shipped = path.parent / "shipped"
    return lookup(problem, CHIP, {HASH}, database=path, shipped=shipped, neighbours=NEIGHBOURS)


@pytest.mark.parametrize("where", ["user", "shipped"])
@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(("batch_heads", 1 << n) for n in (19, 20)),
        *((name, 1 << n) for name in ("q_len", "kv_len") for n in (20, 21, 24)),
    ],
)
def test_sizes_up_to_the_largest_are_neighbours(
    where: str, name: str, size: int, tmp_path: Path
) -> None:
    path = tmp_path / "t.db"
    far = dataclasses.replace(PROBLEM, **{name: size})
    known = row(problem=far, verified=True)
    if where == "user":
        keep(path, known)
    else:
        (tmp_path / "shipped").mkdir()
        write_records(tmp_path / "shipped" / "m3max.jsonl", [known])
    own, near = (asked(path, dataclasses.replace(PROBLEM, **{name: n})) for n in (size, size // 2))
    assert (own.schedule, own.exact, near.schedule, near.exact) == (FIRST, True, FIRST, False)
    assert "neighbouring bucket" in near.place


def test_of_a_thousand_other_sizes_none_hides_the_problem_or_its_neighbour(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    grid = [1 << n for n in range(11)]
    others = [Problem(PROBLEM.config, h, 128 * q, k) for h in grid for q in grid for k in grid]
    others = [p for p in others if p.kv_len < 1024]
    assert len(others) > 1000
    keep(path, *(row(SECOND, problem=p, verified=True, chip="M1", cores=8) for p in others))
    near = dataclasses.replace(PROBLEM, kv_len=1 << 14)
    keep(path, row(THIRD, problem=near, verified=True))
    hit = asked(path, PROBLEM)
    assert hit is not None and hit.schedule == THIRD  # others are nearer, and say nothing here
    keep(path, row(FIRST, problem=PROBLEM, verified=True))
    hit = asked(path, PROBLEM)
    assert hit is not None and hit.schedule == FIRST and hit.exact
