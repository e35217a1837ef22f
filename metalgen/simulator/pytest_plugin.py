"""A pytest plugin: runs the Metal kernels of a test suite under the simulator's checker.

    pytest --metal-check            # or, in the configuration: metal_check = true

Every kernel that a test launches through ``mx.fast.metal_kernel`` is executed here and checked; a
test fails on a finding. Kernels may be made as modules are imported: the stand-in for
``mx.fast.metal_kernel`` is in place before the first conftest.py is. A test marked
``@pytest.mark.metal_check`` also fails when it launches nothing. ``--metal-seed N`` shuffles the
order of threads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from metalgen.simulator.launch import Recorder

MARK = "metal_check"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("metal", "Metal kernels on the simulator (metalgen)")
    group.addoption(
        "--metal-check", action="store_true", help="Execute and check every Metal kernel."
    )
    group.addoption(
        "--metal-seed",
        type=int,
        default=0,
        help="A seed other than 0 shuffles the order of threads.",
    )
    parser.addini("metal_check", "Execute and check every Metal kernel.", "bool", default=False)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    options = early_config.known_args_namespace
    if getattr(options, "metal_check", False) or early_config.getini("metal_check"):
        _enable(early_config, int(getattr(options, "metal_seed", 0)))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", f"{MARK}: with --metal-check, fail when the test launches no Metal kernel"
    )
    if config.getoption("metal_check") or config.getini("metal_check"):
        _enable(config, config.getoption("metal_seed"))


def _enable(config: pytest.Config, seed: int) -> None:
    if config.pluginmanager.has_plugin("metal-checker"):
        return
    from metalgen.simulator.installing import install

    checker = Checker(seed)
    checker.stack.enter_context(install())
    config.pluginmanager.register(checker, "metal-checker")


class Checker:
    """Holds what is in place while tests run, and counts what they launched."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.stack = contextlib.ExitStack()
        self.launches = self.findings = 0

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        with self._recorded() as runs:
            outcome = yield
        self._judge(outcome, runs)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        with self._recorded() as runs:
            outcome = yield
        must = item.get_closest_marker(MARK) is not None
        self._judge(outcome, runs, must)

    @contextlib.contextmanager
    def _recorded(self) -> Iterator[Recorder]:
        from metalgen.simulator.launch import record

        with record(checked=True, seed=self.seed) as runs:
            yield runs

    def _judge(self, outcome: Any, runs: Recorder, must: bool = False) -> None:
        found = [launch for launch in runs if launch.findings]
        self.launches += len(runs)
        self.findings += sum(len(launch.findings or ()) for launch in found)
        if outcome.excinfo is not None:
            return
        if found:
            text = "\n".join(
                f"kernel {launch.kernel}, grid {launch.grid}, threadgroup {launch.threadgroup}:\n"
                f"{launch.findings.report() if launch.findings else ''}"
                for launch in found
            )
            outcome.force_exception(pytest.fail.Exception(text, pytrace=False))
        elif must and not len(runs):
            outcome.force_exception(
                pytest.fail.Exception("the test launched no Metal kernel", pytrace=False)
            )

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.launches:
            terminalreporter.write_line(
                f"metal: {self.launches} launches checked, {self.findings} findings"
            )

    def pytest_unconfigure(self) -> None:
        self.stack.close()
