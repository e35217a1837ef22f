"""Reads the binary report that the runtime writes (``runtime/report.h``)."""

from __future__ import annotations
from metalgen.simulator import errors
from metalgen.simulator.counters import Counters
from metalgen.simulator.findings import Findings

def size(checked): return 1 << 20 if checked else 1 << 16
def fatal_error(data, code, compiled, segments): return None
def findings(reports, compiled, segments, sources): return Findings()
def counters(reports, compiled, segments): return Counters()
