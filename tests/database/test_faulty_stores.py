"""The suite of stores finds what is wrong with one: each of these is wrong in one way."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

FAULTS = Path(__file__).with_name("faulty_stores.py")


def test_every_faulty_store_fails_the_test_that_it_was_made_for(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, FAULTS],
        capture_output=True,
        text=True,
        cwd=FAULTS.parents[2],
        check=False,
    )
    assert done.returncode == 1, done.stdout
    text = FAULTS.read_text(encoding="utf-8")
    planted = re.findall(r'^@found_by\("\w+"\)\nclass (\w+)', text, re.MULTILINE)
    found: dict[str, list[str]] = {name: [] for name in planted}
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.attrib["classname"].rpartition(".Test")[2]
        found[name] += [failure.attrib["message"] for failure in case.iter("failure")]
        assert case.find("error") is None and case.find("skipped") is None
    assert len(found) > 50
    assert [name for name, reasons in found.items() if not reasons] == []
    # By what the suite asserts, not by a mistake in what was planted.
    expected = ("AssertionError", "assert ", "Failed: DID NOT RAISE")
    others = [r for reasons in found.values() for r in reasons if not r.startswith(expected)]
    assert others == []
