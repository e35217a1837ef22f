"""Merging and exporting: joins by hand, the laws of a merge, and what a dry run leaves alone."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import random
from pathlib import Path

import pytest

from metalgen.database import exchange, merging
from metalgen.database.exchange import Summary, join
from metalgen.database.measurement import Measurement
from metalgen.database.rows import COLUMNS, FAULTS, Reader, Row, Tables, row_of_measurement
from metalgen.database.store import Store
from metalgen.testing.rows import FIRST, PROBLEM, SECOND, THIRD, modelled, row


def database(path: Path, rows: list[Measurement]) -> Path:
    """A database with these rows."""
    with Store.open(path) as store:
        run = store.begin_run("M3Max", 0)
        store.add_measurements(dataclasses.replace(m, run=run) for m in rows)
    return path


def records(path: Path, rows: list[Measurement]) -> Path:
    """A record file with these rows."""
    path.write_text("".join(m.to_line() + "\n" for m in rows))
    return path


def exported(path: Path) -> str:
    """The canonical export of a database."""
    with Store.open(path) as store:
        return "\n".join(exchange.export(store))


def merged(path: Path, sources: list[Path]) -> str:
    """The export of a new database into which sources were merged in this order."""
    with Store.open(path) as store:
        exchange.merge(store, sources)
        return "\n".join(exchange.export(store))


def some_rows(draw: random.Random, count: int) -> list[Measurement]:
    """Rows that meet often: few identities, many outcomes."""
    rows = {}
    for _ in range(count):
        samples = tuple(draw.choice((1e-3, 2e-3, 3e-3, 5e-3)) for _ in range(draw.randint(1, 4)))
        status = draw.choice(("ok", "ok", "ok", "wrong", "runtime"))
        m = row(
            draw.choice((FIRST, SECOND, THIRD)),
            Measurement.__dataclass_fields__["seconds"].default or sorted(samples)[0],
            samples=samples,
            problem=dataclasses.replace(PROBLEM, kv_len=draw.choice((1024, 2048))),
            status=status,
            verified=status == "ok" and draw.random() < 0.5,
            mlx_seconds=draw.choice((None, 1e-3, 2e-3)),
            detail="" if status == "ok" else draw.choice(("a", "b")),
            source_hash=draw.choice(("", "0" * 16, "f" * 16)),
            created=f"2026-11-{draw.randint(10, 21)}T08:00:00Z",
        )
        rows[exchange.identity(m)] = m
    return list(rows.values())


def test_two_rows_are_joined_by_pooling_their_samples() -> None:
    a = row(
        samples=(3e-3, 1e-3, 2e-3), seconds=2e-3, mlx_seconds=4e-3, default_seconds=9e-3,
        verified=True, error=1e-4,
    )  # fmt: skip
    b = row(
        samples=(2e-3, 2e-3, 8e-3), seconds=2e-3, mlx_seconds=5e-3, created="2026-11-22T08:00:00Z",
        mlx_version="0.99",
    )  # fmt: skip
    found = join(a, b)
    assert found.samples == (1e-3, 2e-3, 2e-3, 3e-3, 8e-3)
    assert found.seconds == 2e-3
    assert found.spread == pytest.approx(1e-3)
    assert (found.mlx_seconds, found.default_seconds) == (4e-3, 9e-3)
    assert (found.verified, found.error, found.status) == (True, 1e-4, "ok")
    assert (found.created, found.mlx_version) == ("2026-11-22T08:00:00Z", "0.99")


def test_a_source_hash_that_one_side_lacks_is_the_others() -> None:
    known, unknown = row(source_hash="5" * 16), row(created="2026-11-22T08:00:00Z")
    for found in (join(known, unknown), join(unknown, known)):
        assert (found.source_hash, found.created) == ("5" * 16, "2026-11-22T08:00:00Z")
    assert "source_hash" not in unknown.to_record()
    assert Measurement.from_line(known.to_line()) == known


def test_a_row_that_one_side_found_wrong_stays_wrong() -> None:
    good = row(verified=True)
    bad = row(status="wrong", detail="relative error 5e-01")
    for found in (join(good, bad), join(bad, good)):
        assert (found.status, found.verified) == ("wrong", False)
        assert found.detail == "relative error 5e-01"


def test_joins_are_commutative_associative_and_idempotent() -> None:
    draw = random.Random(7)
    for _ in range(300):
        rows = [exchange.canonical(m) for m in some_rows(draw, 40)]
        groups: dict[object, list[Measurement]] = {}
        for m in [*rows, *(exchange.canonical(m) for m in some_rows(draw, 40))]:
            groups.setdefault(exchange.identity(m), []).append(m)
        for same in groups.values():
            a, b = same[0], same[-1]
            c = dataclasses.replace(b, samples=(4e-3,), seconds=4e-3, mlx_seconds=None)
            assert join(a, b) == join(b, a)
            assert join(join(a, b), c) == join(a, join(b, c))
            assert join(join(a, b), b) == join(a, b)
            assert join(a, a) == a


def test_any_order_of_databases_and_records_gives_the_same_bytes(tmp_path: Path) -> None:
    draw = random.Random(3)
    sources = [
        database(tmp_path / "a.db", some_rows(draw, 12)),
        records(tmp_path / "b.jsonl", some_rows(draw, 12)),
        database(tmp_path / "c.db", some_rows(draw, 12)),
    ]
    results = {
        merged(tmp_path / f"{n}.db", list(order))
        for n, order in enumerate(itertools.permutations(sources))
    }
    assert len(results) == 1
    (result,) = results
    assert len(result.splitlines()) == 6
    twice = merged(tmp_path / "twice.db", [*sources, *sources])
    assert twice == result
    steps = tmp_path / "steps.jsonl"
    merged(tmp_path / "step.db", sources[1:])
    steps.write_text(exported(tmp_path / "step.db") + "\n")
    assert merged(tmp_path / "in-steps.db", [steps, sources[0]]) == result


def test_a_merge_tells_new_pooled_known_and_conflicting_rows(tmp_path: Path) -> None:
    target = database(tmp_path / "t.db", [row(FIRST, samples=(1e-3,)), row(SECOND, verified=True)])
    source = records(
        tmp_path / "s.jsonl",
        [row(FIRST, samples=(1e-3, 3e-3)), row(SECOND, verified=True), row(THIRD), modelled(FIRST)],
    )
    with Store.open(target) as store:
        before = store.measurements()
        plan = exchange.merge(store, [source], dry_run=True)
        assert store.measurements() == before
        done = exchange.merge(store, [source])
        again = exchange.merge(store, [source])
        rows = {(m.schedule, m.provenance): m for m in store.measurements()}
    assert plan == done == Summary(new=2, pooled=1, same=1)
    assert again == Summary(same=4)
    assert rows[FIRST, "measured"].samples == (1e-3, 3e-3)
    assert rows[FIRST, "measured"].seconds == 2e-3
    wrong = records(tmp_path / "w.jsonl", [row(SECOND, status="wrong", detail="no")])
    with Store.open(target) as store:
        assert exchange.merge(store, [wrong]) == Summary(pooled=1, conflicts=1)


def test_an_export_is_sorted_canonical_and_read_back_unchanged(tmp_path: Path) -> None:
    rows = some_rows(random.Random(1), 30)
    path = database(tmp_path / "t.db", rows)
    lines = exported(path).splitlines()
    assert lines == sorted(exchange.canonical(m).to_line() for m in rows)
    copy = records(tmp_path / "copy.jsonl", [Measurement.from_line(line) for line in lines])
    found = exchange.diff(path, copy, Summary())
    assert (found.only_first, found.only_second, found.changed) == ([], [], [])
    assert found.same == len(rows)


def test_a_comparison_names_what_is_only_on_one_side_and_what_differs(tmp_path: Path) -> None:
    a = records(tmp_path / "a.jsonl", [row(FIRST), row(SECOND, 2e-3)])
    b = records(tmp_path / "b.jsonl", [row(THIRD), row(SECOND, 3e-3)])
    found = exchange.diff(a, b, Summary())
    assert [m.schedule for m in found.only_first] == [FIRST]
    assert [m.schedule for m in found.only_second] == [THIRD]
    assert [(x.seconds, y.seconds) for x, y in found.changed] == [(2e-3, 3e-3)]
    assert found.same == 0


def test_batches_change_neither_the_outcome_of_a_merge_nor_its_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(11)
    sources = [records(tmp_path / f"{n}.jsonl", some_rows(draw, 12)) for n in range(6)]
    here = some_rows(draw, 4)
    outcomes = []
    for gathered, batch in ((1, 1), (20, 2), (merging.GATHERED, merging.BATCH)):
        monkeypatch.setattr(merging, "GATHERED", gathered)
        monkeypatch.setattr(merging, "BATCH", batch)
        path = database(tmp_path / f"{gathered}.db", here)
        with Store.open(path) as store:
            plan = exchange.merge(store, sources, dry_run=True)
            summary = exchange.merge(store, sources)
        assert plan == summary
        outcomes.append((exported(path), summary))
    assert outcomes[0] == outcomes[1] == outcomes[2]
    summary = outcomes[0][1]
    assert summary.new + summary.pooled + summary.same == 6
    assert summary.new == 6 - len(here)
    # What is in conflict follows from the sources alone.
    statuses: dict[object, set[bool]] = {exchange.identity(m): {m.status == "ok"} for m in here}
    for source in sources:
        for m in exchange.read(source, Summary()):
            statuses.setdefault(exchange.identity(m), set()).add(m.status == "ok")
    assert summary.conflicts == sum(len(seen) == 2 for seen in statuses.values()) > 0


BAD_VALUES = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        40,
        40.0,
        -1.0,
        0.0,
        0.5,
        float("nan"),
        float("inf"),
        10**400,
    ),
    *("", "ok", "wrong", "M3Max", "Z80", "../x", "{{ 7*7 }}", "\x1b[2J", "x" * 70_000, b"ok"),
    *("[]", "[ ]", "[true]", "[1]", "[1.0, -1.0]", "[NaN]", "[Infinity]", '["x"]', "[null]", "{}"),
    *("[" * 5000, "[1.0", "[[1.0]]", "1.0", "2026-11-21T08:00:00Z", "2026-11-21"),
)


@pytest.mark.parametrize("column", range(len(COLUMNS)), ids=COLUMNS)
def test_a_reader_that_has_seen_good_rows_accepts_nothing_that_a_new_one_refuses(
    column: int,
) -> None:
    """What was found good is not proved again, so every way past that must be as narrow."""
    good = [
        row(FIRST, samples=(1e-3, 2e-3), verified=True, spread=1e-4, error=1e-4),
        row(SECOND, samples=()),
        row(THIRD, None, status="wrong", detail="no"),
    ]
    tables = Tables({1: PROBLEM.key, 2: "{}"}, {n: m.schedule.key for n, m in enumerate(good)})
    rows = []
    for n, m in enumerate(good):
        found = row_of_measurement(m)
        texts = (1, n, *found.key[2:], *found[1:-1], str(list(found.samples)))
        rows.append(tuple(int(v) if type(v) is bool else v for v in texts))
    learned = Reader()
    assert [learned.row(values, tables) for values in rows] == [*map(row_of_measurement, good)]
    accepted = 0
    for values, bad in itertools.product(rows, BAD_VALUES):
        changed = (*values[:column], bad, *values[column + 1 :])
        outcomes: list[object] = []
        for reader in (Reader(), learned):
            try:
                # The tables too remember what was found good.
                fresh = Tables(tables.problems, tables.schedules)
                outcomes.append(reader.row(changed, fresh if reader is not learned else tables))
            except FAULTS as error:
                outcomes.append(type(error))
        if isinstance(outcomes[1], tuple):
            assert repr(outcomes[0]) == repr(outcomes[1]), (COLUMNS[column], bad)
            accepted += 1
        else:
            assert outcomes[0] == outcomes[1], (COLUMNS[column], bad)
    assert accepted < len(rows) * len(BAD_VALUES)


def test_a_reader_of_records_that_has_seen_good_ones_accepts_nothing_that_a_new_one_refuses() -> (
    None
):
    good = [
        row(FIRST, samples=(2e-3, 1e-3), verified=True, spread=1e-4, error=1e-4),
        row(SECOND),
        row(THIRD, None, status="wrong", detail="no"),
    ]
    records = [m.to_record() for m in good]
    names = {*records[0], *records[2], "extra", "run", "problem"}
    learned, accepted = Reader(), 0
    values = (*BAD_VALUES, [], {}, [1.0], [1], [-1.0], [float("nan")], [True], [[1.0]], {"a": []})
    for record, name, bad in itertools.product(records, sorted(names), values):
        for known in records:
            learned._record(dict(known))
        outcomes: list[object] = []
        for reader in (Reader(), learned):
            try:
                outcomes.append(reader._record(record | {name: copy.deepcopy(bad)}))
            except FAULTS as error:
                outcomes.append((type(error), str(error)))
        assert repr(outcomes[0]) == repr(outcomes[1]), (name, bad)
        accepted += isinstance(outcomes[0], Row)
    assert 0 < accepted < len(records) * len(names) * len(values)
    again = [learned._record(m.to_record()) for m in good]
    assert again == [*map(row_of_measurement, good)]
