"""Backward kernels on the simulator."""

from __future__ import annotations

from metalgen.testing.backward import BackwardConformance


class TestSimulator(BackwardConformance):
    name = "simulator"
