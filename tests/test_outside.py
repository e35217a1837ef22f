"""A feature, a family and a matrix kind of another package, all the way from render to look-up."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import metalgen
from metalgen import families, features, kinds
from metalgen.calls.resolve import forget_kernels
from metalgen.calls.verify import verify
from metalgen.chips import get_chip
from metalgen.chips.model import predict
from metalgen.database.lookup import lookup
from metalgen.database.measurement import Measurement
from metalgen.database.store import Store
from metalgen.devices import get_device
from metalgen.errors import ArgumentError
from metalgen.families.attention import Attend
from metalgen.families.forward import Forward
from metalgen.families.sizes import Problem
from metalgen.features.base import Feature, Field, Hooks, Site
from metalgen.features.checks import integer
from metalgen.kinds.simdgroup import Simdgroup
from metalgen.problem.config import AttentionConfig
from metalgen.problem.samples import sample_call
from metalgen.resources import add_templates, remove_templates, templates_dir
from metalgen.schedules import Knob, Schedule
from metalgen.source.hashes import template_hash, template_hashes
from metalgen.source.render import render
from metalgen.testing.rows import row
from metalgen.testing.store_base import put
from metalgen.tuning.runner import tune
from metalgen.tuning.timing.measure import Policy

CHIP = get_chip("M3Max")
POLICY = Policy(
    warmup_seconds=0.01, repetitions=2, sample_seconds=1e-4, sets=1, cold_bytes=0, rounds=1
)


class Distance:
    """Half of a penalty per key of distance is added, for kernels add to half of a score."""

    @staticmethod
    def state(head: str) -> str:
        return "-0.05f * FADE"

    @staticmethod
    def add(i: str, j: str, state: str, dense: bool) -> str:
        return f"{state} * float({j})"


class Fading(Feature):
    """Scores fall by a tenth of `fade` per key from the first one on."""

    name = "fading"
    adds = True
    fields = (Field("fade", integer(1, 9)),)

    def hooks(self, config: Any, site: Site) -> Hooks:
        return Hooks(adds={"fading": Distance()}, constants={"FADE": config.fade})


class Brief(Forward):
    """Calls of up to 16 queries with `fade`, by one simdgroup or two."""

    name = "brief"
    deterministic_q_len = 16
    main = Attend("brief", "forward")

    def knobs(self, kind: kinds.Kind | None) -> tuple[Knob, ...]:
        few = {"simdgroups": (1, 2), "bk": (8, 16), "row_blocks": (1,), "load_width": (8,)}
        return tuple(
            dataclasses.replace(knob, tried=few.get(knob.name, knob.tried))
            for knob in super().knobs(kind)
        )

    def takes(self, config: AttentionConfig, q_len: int) -> bool:
        return q_len <= 16 and "fade" in dict(config.others)


class Wooden(Simdgroup):
    """Simdgroup matrices by another name, with header and tile library in another folder."""

    name = "wooden"
    templates = "wooden"


BRIEF, WOODEN = Brief(), Wooden()


@pytest.fixture(autouse=True)
def outside(tmp_path: Path) -> Iterator[None]:
    """The three of them, registered as another package would."""
    own, theirs = templates_dir() / "kinds/simdgroup", tmp_path / "templates/kinds/wooden"
    theirs.mkdir(parents=True)
    (theirs / "tile.jinja").write_text((own / "tile.jinja").read_text())
    (theirs / "header.jinja").write_text('// Wooden.\n{% include "kinds/simdgroup/header.jinja" %}')
    add_templates(tmp_path / "templates")
    features.register(Fading())
    kinds.register(WOODEN)
    families.register(BRIEF, kinds.SIMDGROUP, WOODEN)
    forget_kernels()
    try:
        yield
    finally:
        families.unregister("brief")
        kinds.unregister("wooden")
        features.unregister("fading")
        remove_templates(tmp_path / "templates")
        forget_kernels()


@pytest.fixture
def store(own_database: Path) -> Iterator[Store]:
    with Store.open(own_database) as opened:
        yield opened


def config() -> AttentionConfig:
    return AttentionConfig.from_dict({"head_dim": 16, "dtype": "float32", "fade": 3})


def problem() -> Problem:
    return Problem(config(), 2, 16, 32)


def wooden() -> Schedule:
    return families.default_schedule(config(), family="brief", kind="wooden")


def expected(q: Any, k: Any, v: Any, scale: float) -> Any:
    a, b, c = (np.array(x, np.float64) for x in (q, k, v))
    scores = scale * a @ b.swapaxes(2, 3) - 0.3 * np.arange(b.shape[2])
    weights = np.exp(scores - scores.max(axis=3, keepdims=True))
    return weights @ c / weights.sum(axis=3, keepdims=True)


def test_calls_choose_the_family_that_takes_them() -> None:
    assert problem().family == "brief"
    assert Problem(config(), 2, 17, 32).family == "decode"
    assert Problem(AttentionConfig(16), 2, 16, 32).family == "decode"
    assert Problem(config(), 2, 100, 32).family == "forward"
    with pytest.raises(ArgumentError, match="^family: expected one of .*brief, but got 'append'"):
        Problem(config(), 2, 16, 32, family="append")


def test_a_stored_schedule_names_the_kind_that_is_not_the_languages_first() -> None:
    default = families.default_schedule(config(), family="brief")
    assert (default.kind, wooden().kind) == ("simdgroup", "wooden")
    assert "kind" not in json.loads(default.key)
    assert json.loads(wooden().key)["kind"] == "wooden"
    for schedule in (default, wooden()):
        assert families.decode_schedule(json.loads(schedule.key), "brief", "metal") == schedule


def test_a_search_races_all_kinds() -> None:
    default, *found = families.enumerate_valid(config(), family="brief")
    fields = {
        kind: {tuple(getattr(s, name) for name in s.knobs) for s in found if s.kind == kind}
        for kind in ("simdgroup", "wooden")
    }
    assert default == families.default_schedule(config(), family="brief")
    assert fields["simdgroup"] == fields["wooden"] and len(fields["wooden"]) > 10
    assert {s.simdgroups for s in found} == {1, 2}


def test_the_kernel_has_the_text_of_all_three() -> None:
    source = render(config(), wooden())
    assert source.name.startswith("metalgen_brief_f32_d16_")
    assert source.header.startswith("// Wooden.")
    assert "constexpr int FADE = 3;" in source.source


def test_the_kernel_computes_what_the_feature_says(the_simulator: str) -> None:
    q, k, v, _ = sample_call(config(), kv_heads=2, q_len=11, kv_len=19)
    out, _ = get_device(the_simulator).build(config(), wooden())(q, k, v, 0.25)
    assert np.abs(np.array(out) - expected(q, k, v, 0.25)).max() < 1e-5


def test_a_check_finds_a_kernel_of_the_family_and_the_kind_right(the_simulator: str) -> None:
    """With another feature of attention: the reference knows none from outside."""
    plain = AttentionConfig(16, "float32", causal=True)
    schedule = families.default_schedule(plain, family="brief", kind="wooden")
    outcome = verify(get_device(the_simulator), plain, schedule)
    assert outcome.ok and outcome.error < 1e-6


def test_the_chip_model_counts_the_family() -> None:
    plain, brief = AttentionConfig(16), Problem(AttentionConfig(16), 2, 16, 32, family="brief")
    ours = families.default_schedule(plain, family="brief", kind="wooden")
    forward = families.default_schedule(plain, family="forward")
    same = dataclasses.replace(brief, family="forward")
    fields = {name: getattr(forward, name) for name in ours.knobs}
    assert predict(brief, dataclasses.replace(ours, **fields), CHIP) == predict(same, forward, CHIP)


def test_a_modelled_run_stores_rows_that_a_call_finds(store: Store, the_simulator: str) -> None:
    plain = AttentionConfig(16, "float32")
    brief = Problem(plain, 2, 16, 32, family="brief")
    report = tune([brief], CHIP, store, checker=get_device(the_simulator), trials=8)
    won = report.outcomes[0].winner
    assert won is not None and won.schedule.family == "brief"
    assert Measurement.from_record(won.to_record()).schedule == won.schedule
    hit = lookup(brief, CHIP, template_hashes(brief.family, "metal"), database=store.path)
    assert hit is not None and hit.schedule == won.schedule


def test_a_measured_run_stores_rows_that_a_call_finds(store: Store, the_simulator: str) -> None:
    class Timed(type(get_device(the_simulator))):  # type: ignore[misc]
        """The simulator, with a clock: its times are those of this CPU."""

        has_clock = True

    brief = Problem(AttentionConfig(16, "float32"), 2, 16, 32, family="brief")
    report = tune([brief], CHIP, store, device=Timed(), trials=6, policy=POLICY)
    won = report.outcomes[0].winner
    assert won is not None and won.schedule.family == "brief" and won.provenance == "measured"
    hit = lookup(brief, CHIP, template_hashes(brief.family, "metal"), database=store.path)
    assert hit is not None and hit.schedule == won.schedule


def test_a_call_runs_the_kernel_on_record(store: Store, the_simulator: str) -> None:
    """A row of the feature itself, of the kind that a key has to name."""
    schedule = wooden()
    sizes = {"batch": 1, "heads": 2, "q_len": 16, "kv_len": 32}
    put(store, row(schedule, 1e-4, problem=problem(), template_hash=template_hash(schedule)))
    for checked in (config(), dataclasses.replace(config(), return_lse=True)):  # as calls run it
        kernel_of_row = (checked, schedule, template_hash(schedule))
        store.record_check(*kernel_of_row, "simulator", "ok", error=1e-7, family="brief")
    kernel = metalgen.get_kernel(config(), **sizes, device=the_simulator, chip=CHIP.name)
    assert kernel.family == "brief" and kernel.schedule == schedule
    assert "wooden" in kernel.explain()
    q, k, v, _ = sample_call(config(), kv_heads=2, q_len=16, kv_len=32)
    assert np.abs(np.array(kernel(q, k, v)) - expected(q, k, v, 0.25)).max() < 1e-5
