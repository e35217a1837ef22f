"""The compile cache keeps to its bound; what was used longest ago goes, and never what is in use."""

from __future__ import annotations

import errno
import os
import random
import tempfile
import threading
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from metalgen import simulator
from metalgen.errors import ArgumentError
from metalgen.simulator import sweeping
from metalgen.simulator.compiler import build, toolchain

HOUR, MIB = 3600.0, 1 << 20


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("METALGEN_CACHE", str(tmp_path))
    made = tmp_path / "simulator"
    made.mkdir()
    return made


def put(folder: Path, name: str, hours: float, size: int = MIB) -> None:
    """Files of an entry, last used some hours ago."""
    for suffix, each in ((".so", size - 4096), (".json", 4096)):
        path = folder / (name + suffix)
        path.write_bytes(b"x" * each)
        then = time.time() - hours * HOUR
        os.utime(path, (then, then))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {sweeping.LOCK, sweeping.ADDED}


def run(folder: Path, number: int) -> float:
    """Run a kernel of its own for a number."""
    kernel = simulator.metal_kernel(
        "k", ["x"], ["out"], f"out[0] = x[0] + {number} + thread_position_in_grid.x;"
    )
    (out,) = kernel(
        inputs=[mx.ones((8,))],
        output_shapes=[(1,)],
        output_dtypes=[mx.float32],
        grid=(1, 1, 1),
        threadgroup=(1, 1, 1),
    )
    return float(out.item())


def test_what_was_used_longest_ago_goes_until_three_quarters_are_left(folder: Path) -> None:
    ages = list(range(1, 9))
    random.Random(0).shuffle(ages)
    for hours in ages:
        put(folder, f"k{hours}", hours)
    assert sweeping.sweep(8 * MIB)
    assert names(folder) == {f"k{n}{suffix}" for n in range(1, 7) for suffix in (".so", ".json")}
    assert sweeping.sweep(8 * MIB)
    assert len(names(folder)) == 12


def test_an_entry_is_as_young_as_its_last_use(folder: Path) -> None:
    for hours in (1, 2, 3, 4):
        put(folder, f"k{hours}", hours)
    assert sweeping.use(folder / "k4.so")
    assert not sweeping.use(folder / "k5.so")
    assert sweeping.sweep(2 * MIB)
    assert names(folder) == {"k4.so", "k4.json"}


def test_what_was_used_in_the_last_minutes_stays_whatever_the_limit(folder: Path) -> None:
    for n in range(4):
        put(folder, f"k{n}", 0.1)
    assert sweeping.sweep(1)
    assert len(names(folder)) == 8


def test_headers_and_runtime_of_these_sources_stay_and_those_of_others_do_not(folder: Path) -> None:
    own = build._key("plain", toolchain.machine_flags())
    for name in (f"headers-plain-{own}.pch", f"runtime-plain-{own}.o", "headers-plain-0ff.pch"):
        (folder / name).write_bytes(b"x" * MIB)
        os.utime(folder / name, (0, 0))
    (folder / "runtime-plain-0ff.o").write_bytes(b"x" * MIB)  # another version at work
    assert sweeping.sweep(1)
    assert names(folder) == {
        *(f"headers-plain-{own}.pch", f"runtime-plain-{own}.o"),
        "runtime-plain-0ff.o",
    }


def test_folders_that_killed_processes_left_go_after_a_day(folder: Path) -> None:
    for name in ("compile-old", "lint-old", "compile-new"):
        (folder / name).mkdir()
        (folder / name / "unit.cl").write_text("x")
    for name in ("compile-old", "lint-old"):
        os.utime(folder / name, (0, 0))
    assert sweeping.sweep(1 << 40)
    assert names(folder) == {"compile-new"}


def test_nothing_is_swept_while_another_process_uses_or_sweeps(folder: Path) -> None:
    put(folder, "k", 9)
    with sweeping._lock(folder, exclusive=False):
        assert not sweeping.sweep(1)
    assert len(names(folder)) == 2
    assert sweeping.sweep(1)
    assert names(folder) == set()


def test_a_holder_of_the_lock_that_does_not_go_on_blocks_nobody(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "PATIENCE", 0.05)
    put(folder, "a", 1)
    with sweeping._lock(folder, exclusive=True) as held:  # as a process that was stopped keeps it
        assert held
        assert sweeping.use(folder / "a.so")
        assert not sweeping.use(folder / "b.so")


def test_compiling_sweeps_by_itself_and_a_kernel_that_was_removed_is_compiled_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METALGEN_CACHE_LIMIT", "1")
    put(folder, "old", 9, 2 * MIB)
    assert run(folder, 1) == 2.0
    assert not any(name.startswith("old") for name in names(folder))
    before = names(folder)
    for path in folder.glob("*.so"):
        then = time.time() - HOUR
        os.utime(path, (then, then))
        os.utime(path.with_suffix(".json"), (then, then))
    assert run(folder, 1) == 2.0  # found, and young again
    assert names(folder) == before
    kernel = simulator.metal_kernel("k", ["x"], ["out"], "out[thread_position_in_grid.x] = x[0];")
    call = {"output_shapes": [(8,)], "output_dtypes": [mx.float32]}
    call |= {"grid": (8, 1, 1), "threadgroup": (8, 1, 1)}
    one, two = mx.ones((8,)), 2 * mx.ones((8,))
    assert np.array_equal(np.array(kernel(inputs=[one], **call)[0]), np.ones(8))
    for path in folder.glob("*.so"):
        path.unlink()
    assert np.array_equal(np.array(kernel(inputs=[two], **call)[0]), 2 * np.ones(8))


def test_many_short_processes_keep_the_bound_together(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "LIMIT", 32)
    assert sweeping._count(1) == float("inf")  # a cache that was never swept
    assert sweeping._count(MIB) == MIB + 1024
    assert sweeping._count(MIB) == 2 * MIB + 1024 > sweeping.limit() * sweeping.SHARE
    assert sweeping.sweep(sweeping.limit())
    assert sweeping._count(MIB) == MIB


@pytest.mark.parametrize("text", ["0", "-1", "2.5", "much"])
def test_a_limit_that_is_no_number_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("METALGEN_CACHE_LIMIT", text)
    with pytest.raises(ArgumentError, match="METALGEN_CACHE_LIMIT: expected a whole number of MiB"):
        run(folder, 1)


def test_what_is_about_to_be_removed_is_not_handed_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(folder, "k", 9)
    removing, used = threading.Event(), threading.Event()
    remove = sweeping._remove

    def slowly(path: Path) -> None:
        removing.set()
        used.wait(0.3)
        remove(path)

    monkeypatch.setattr(sweeping, "_remove", slowly)
    sweeper = threading.Thread(target=sweeping.sweep, args=(1,))
    sweeper.start()
    assert removing.wait(10.0)
    found = sweeping.use(folder / "k.so")  # waits, and then there is none
    used.set()
    sweeper.join()
    assert not found
    assert names(folder) == set()


def test_a_folder_that_cannot_be_made_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("METALGEN_CACHE", str(tmp_path / "file"))
    with pytest.raises(simulator.CacheError, match="file/simulator: Not a directory; set METAL"):
        run(tmp_path, 1)


def test_a_folder_that_cannot_be_written_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(suffix: str, prefix: str, dir: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(dir / prefix))

    monkeypatch.setattr(tempfile, "mkdtemp", refused)
    with pytest.raises(simulator.CacheError, match="simulator: Permission denied; set METAL"):
        run(folder, 1)
