"""What tuning records of a kernel's source, and what it keeps when templates were edited."""

from __future__ import annotations

from pathlib import Path

import pytest
from tuning_fakes import Clock, FakeGpu, FakeVerify

import metalgen
from metalgen.calls import resolve
from metalgen.chips import get_chip
from metalgen.database.store import Store
from metalgen.devices import get_device
from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig
from metalgen.source.digests import source_hash
from metalgen.source.hashes import template_hash
from metalgen.tuning.runner import tune
from metalgen.tuning.timing.measure import Policy

CHIP = get_chip("M3Max")
SMALL = Problem(AttentionConfig(head_dim=8), 2, 16, 16, family="forward")
DECODE = Problem(AttentionConfig(head_dim=8), 2, 1, 4096, family="decode")
POLICY = Policy(
    warmup_seconds=0.01, repetitions=3, sample_seconds=1e-3, sets=1, cold_bytes=0, rounds=2
)


def sources(store: Store, table: str) -> list[tuple[str, ...]]:
    """Provenance, schedule and source hash of every row; schedule and hash of every check."""
    if table == "checks":
        return store.db.execute("SELECT schedule, source_hash FROM checks").fetchall()
    rows = [(m.provenance, m.schedule.key, m.source_hash) for m in store.measurements()]
    return sorted(rows)


@pytest.mark.parametrize("problem", [SMALL, DECODE], ids=["forward", "decode"])
def test_measured_and_modelled_rows_and_checks_know_their_source(
    tmp_path: Path, problem: Problem
) -> None:
    gpu = FakeGpu(Clock())
    with Store.open(tmp_path / "t.db") as store:
        tune(
            *([problem], CHIP, store),
            device=gpu, trials=10, policy=POLICY, clock=gpu.clock, verify=FakeVerify(),
        )  # fmt: skip
        tune([problem], CHIP, store, checker=get_device("reference"), verify=FakeVerify())
        rows = store.measurements()
        expected = {m.schedule.key: source_hash(problem.config, m.schedule) for m in rows}
        assert {m.provenance for m in rows} == {"measured", "modelled"}
        assert {m.phase for m in rows} == {"search", "final"}
        assert all(source == expected[key] for _, key, source in sources(store, "measurements"))
        checks = sources(store, "checks")
        assert checks and all(source == expected[key] for key, source in checks)


def test_a_run_after_an_edit_goes_on_where_kernels_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store.open(tmp_path / "t.db") as store:

        def run() -> tuple[int, int, int]:
            gpu, verify = FakeGpu(Clock()), FakeVerify()
            report = tune(
                *([SMALL], CHIP, store),
                device=gpu, trials=10, policy=POLICY, clock=gpu.clock, verify=verify,
            )  # fmt: skip
            assert report.outcomes[0].winner is not None
            return report.kept, report.outcomes[0].new, len(verify.asked)

        kept, new, checked = run()
        assert (kept, new) == (0, 10) and checked > 0
        count = len(store.measurements())
        with store.writing():  # other templates made all of it
            for table in ("measurements", "checks"):
                store.db.execute(f"UPDATE {table} SET template_hash = ?", ["f" * 16])
        assert run() == (count, 0, 0)
        with store.writing():  # and now another kernel each
            for table in ("measurements", "checks"):
                store.db.execute(
                    f"UPDATE {table} SET template_hash = ?, source_hash = ?", ["f" * 16, "0" * 16]
                )
        kept, new, checked = run()
        assert (kept, new) == (0, 10) and checked > 0


def test_the_check_of_a_first_call_knows_its_source(own_database: Path) -> None:
    config = AttentionConfig(40, causal=True, return_lse=True)
    resolve.forget_kernels()
    kernel = metalgen.get_kernel(config, device="simulator")
    with Store.open(own_database) as store:
        (check,) = sources(store, "checks")
        assert store.find_check(config, kernel.schedule, template_hash(kernel.schedule)) is not None
    assert check == (kernel.schedule.key, source_hash(config, kernel.schedule))
