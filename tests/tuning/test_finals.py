"""Who wins a race: what beats the default beyond the noise, else the default."""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tuning_fakes import Clock, FakeGpu, FakeVerify

from metalgen.chips import get_chip
from metalgen.database.hit import Hit
from metalgen.database.lookup import lookup
from metalgen.database.records import write_records
from metalgen.database.store import Store
from metalgen.families import Schedule, default_schedule
from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig
from metalgen.source.hashes import template_hashes
from metalgen.tuning.progress import Outcome
from metalgen.tuning.runner import tune
from metalgen.tuning.timing.measure import Policy, Timing
from metalgen.tuning.timing.racing import Race

CHIP = get_chip("M3Max")
SMALL = Problem(AttentionConfig(head_dim=8), 2, 16, 16, family="forward")
DEFAULT = default_schedule(SMALL.config)
POLICY = Policy(warmup_seconds=0.01, repetitions=7, sample_seconds=1e-9, sets=1, cold_bytes=0)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "tuning.db") as opened:
        yield opened


def race_on(
    store: Store,
    seconds: Callable[[Schedule], float],
    noise: float = 0.0,
    seed: int = 0,
    policy: Policy = POLICY,
) -> Outcome:
    """A search of 12 on a GPU whose times are `seconds`, times noise of a log-normal kind."""
    draw = random.Random(seed)
    gpu = FakeGpu(Clock(), seconds=lambda s: seconds(s) * draw.lognormvariate(0.0, noise))
    report = tune(
        *([SMALL], CHIP, store),
        device=gpu,
        trials=12,
        policy=policy,
        clock=gpu.clock,
        verify=FakeVerify(),
        prune=False,
    )
    return report.outcomes[0]


def found(store: Store, shipped: Path | None = None) -> Hit:
    """What a look-up answers."""
    database = store.path if shipped is None else Path("no such database")
    hit = lookup(
        SMALL, CHIP, template_hashes(SMALL.family, "metal"), database=database, shipped=shipped
    )
    assert hit is not None
    return hit


def timing(*samples: float) -> Timing:
    return Timing(samples)


def test_the_noise_floor_is_how_far_the_defaults_two_entries_are_apart() -> None:
    again = timing(1.00, 1.01, 0.99), timing(1.04, 1.03, 1.05)
    race = Race({"d": timing(*again[0].samples, *again[1].samples)}, "d", again)
    assert race.noise == pytest.approx(0.04)
    assert Race({"a": timing(1.0)}).noise == 0.0


def test_a_lead_within_the_noise_floor_is_none_however_steady_it_is() -> None:
    again = timing(*[1.00] * 10), timing(*[1.04] * 10)
    default = timing(*again[0].samples, *again[1].samples)  # median 1.02
    timings = {"d": default, "near": timing(*[0.99] * 10), "far": timing(*[0.95] * 10)}
    race = Race(timings, "d", again)
    assert not race.beats_default("near")  # 0.99 against 1.02, less 4 %
    assert race.beats_default("far")
    assert race.reservation("far") == race.reservation("d") == ""
    assert race.reservation("near") == (
        "not faster than the default beyond the noise (4.00% in this race)"
    )


def test_a_lead_that_not_all_pairs_show_is_none_where_there_are_few_of_them() -> None:
    steady = timing(*[1.0] * 10)
    timings = {"d": timing(*[1.0] * 20), "shaky": timing(*[0.9] * 8, 1.1, 1.1)}
    race = Race(timings, "d", (steady, steady))
    assert timings["shaky"].median == 0.9
    assert not race.beats_default("shaky")
    assert not race.settled
    assert Race(timings | {"shaky": timing(*[0.9] * 10)}, "d", (steady, steady)).settled


def test_a_race_whose_best_leads_by_next_to_nothing_is_settled_for_the_default() -> None:
    steady = timing(*[1.0] * 10)
    timings = {"d": timing(*[1.0] * 20), "near": timing(*[0.9985] * 9, 1.2), "mlx": timing(0.1)}
    race = Race(timings, "d", (steady, steady))
    assert race.settled and not race.beats_default("near")


def test_without_the_default_the_quickest_wins_without_reservation() -> None:
    race = Race({"a": timing(2.0), "b": timing(1.0)})
    assert race.settled and race.beats_default("a")
    assert race.reservation("a") == race.reservation("b") == ""


@pytest.mark.parametrize("seed", range(12))
def test_where_all_are_equally_quick_the_default_wins(store: Store, seed: int) -> None:
    outcome = race_on(store, lambda s: 1e-3, noise=0.01, seed=seed)
    assert outcome.winner is not None
    assert outcome.winner.schedule == DEFAULT
    finals = store.measurements(SMALL, phase="final")
    assert len(finals) >= 5
    quicker = [m for m in finals if (m.seconds or 0.0) < (outcome.winner.seconds or 0.0)]
    for m in quicker:  # both figures are on record, and why the lesser one did not win
        assert m.default_seconds == outcome.winner.seconds
        assert m.detail.startswith("not faster than the default beyond the noise (")
    assert found(store).schedule == DEFAULT


def test_what_is_quicker_beyond_the_noise_wins(store: Store) -> None:
    assert DEFAULT.math_mode == "safe"
    outcome = race_on(store, lambda s: 0.95e-3 if s.math_mode == "fast" else 1e-3, noise=0.01)
    assert outcome.winner is not None
    assert outcome.winner.schedule.math_mode == "fast"
    assert outcome.winner.detail == ""
    assert outcome.winner.default_seconds == pytest.approx(1e-3, rel=0.02)
    assert found(store).schedule == outcome.winner.schedule


def test_rounds_are_added_until_the_lead_is_beyond_doubt(store: Store) -> None:
    def rounds(noise: float, name: str) -> int:
        with Store.open(store.path.with_name(name)) as other:
            race_on(other, lambda s: 1e-3 if s == DEFAULT else 0.99e-3, noise)
            rivals = [m for m in other.measurements(phase="final") if m.schedule != DEFAULT]
            return len(rivals[0].samples) // 2

    assert rounds(0.0005, "quiet.db") == POLICY.rounds
    assert POLICY.rounds < rounds(0.02, "loud.db") <= POLICY.most_rounds


def test_shipped_records_keep_the_reservation_and_the_default_wins_there_too(store: Store) -> None:
    race_on(store, lambda s: 1e-3, noise=0.01, seed=3)
    folder = store.path.parent
    write_records(folder / "m3max.jsonl", store.measurements(phase="final"))
    hit = found(store, folder)
    assert (hit.schedule, hit.place) == (DEFAULT, "shipped records, this chip")


def test_rows_by_a_warm_cache_answer_only_where_there_are_no_others_and_are_labelled(
    store: Store,
) -> None:
    warm = dataclasses.replace(POLICY, cache="warm")
    race_on(store, lambda s: 1e-4 if s == DEFAULT else 2e-4, policy=warm)
    hit = found(store)
    assert hit.place == "user database, this chip, measured with a warm cache"
    assert not hit.exact and not hit.beats_mlx
    folder = store.path.parent
    write_records(folder / "m3max.jsonl", store.measurements(phase="final"))
    shipped = found(store, folder)
    assert shipped.place == "shipped records, this chip, measured with a warm cache"
    assert not shipped.exact
    race_on(store, lambda s: 1e-3 if s == DEFAULT else 2e-3)
    hit = found(store)
    assert (hit.place, hit.exact) == ("user database, this chip", True)
    assert hit.seconds == pytest.approx(1e-3, rel=0.01)
    write_records(folder / "m3max.jsonl", store.measurements(phase="final"))
    assert found(store, folder).seconds == pytest.approx(1e-3, rel=0.01)
    policies = {json.loads(m.policy)["cache"] for m in store.measurements(phase="final")}
    assert policies == {"cold", "warm"}


def test_more_samples_narrow_the_interval_of_a_median() -> None:
    draw = random.Random(0)
    samples = [draw.gauss(1.0, 0.1) for _ in range(400)]
    few, many = Timing(tuple(samples[:20])).interval(), Timing(tuple(samples)).interval()
    assert few[0] < statistics.median(samples) < few[1]
    assert many[1] - many[0] < (few[1] - few[0]) / 2
    wide = Timing(tuple(samples)).interval(3.0)
    assert wide[0] < many[0] and many[1] < wide[1]
