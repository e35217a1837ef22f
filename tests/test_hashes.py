"""The template hash of a family and kind covers what its kernels are rendered from, and no more."""

from __future__ import annotations

import ast
import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import pytest

import metalgen.imports
import metalgen.resources
from metalgen import features
from metalgen.families import default_schedule
from metalgen.features.base import Feature
from metalgen.imports import modules_behind
from metalgen.problem.config import AttentionConfig
from metalgen.resources import add_templates, remove_templates, templates_dir
from metalgen.schedules import Schedule, schedule_type, schedule_types
from metalgen.source import hashes, render
from metalgen.source.hashes import hashed_modules, hashed_templates, template_hash
from metalgen.source.templates import references
from tests.test_digests import Corpus

FORWARD = schedule_type("forward", "simdgroup")


def name_of(made: type[Schedule]) -> str:
    return f"{made.family}/{made.kind or made.language}"


def all_hashes() -> dict[str, str]:
    """The hashes as they are now, whatever was remembered."""
    for kept in (hashes._hash, metalgen.imports._read, metalgen.imports._path):
        kept.cache_clear()
    return hashes.named_hashes()


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """By family and kind, the templates that jinja loads for a tenth of the corpus."""
    names: set[str] = set()

    class Recording(jinja2.Environment):
        def get_template(self, name: Any, *rest: Any, **options: Any) -> jinja2.Template:
            names.add(name)
            return super().get_template(name, *rest, **options)

    made = Recording(
        loader=jinja2.FileSystemLoader(templates_dir()), trim_blocks=True, lstrip_blocks=True
    )
    corpus, found = Corpus.stored(), dict[str, set[str]]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(render, "_environment_of", lambda roots: made)
        for case in [case for case in corpus.cases if case.is_in_the_tenth][::2]:
            names.clear()
            for _ in corpus.kernels(case):
                pass
            kind = corpus.schedule(case).kind or case.language
            found.setdefault(f"{case.family}/{kind}", set()).update(names)
    return found


def test_every_template_that_is_loaded_is_in_the_hash(loaded: dict[str, set[str]]) -> None:
    """And every template of the kind that is in the hash is loaded by some kernel, and none of
    another kind is."""
    for made in schedule_types():
        if (name := name_of(made)) in loaded:
            covered = {*hashed_templates(made)}
            assert not loaded[name] - covered, name
            spare = {each.partition("/")[0] for each in covered - loaded[name]}
            assert not spare & {"kinds", "shared"}, name
    assert loaded.keys() >= {"forward/simdgroup", "decode/mma", "append/cuda"}


def test_references_are_those_that_jinja_finds() -> None:
    environment = jinja2.Environment()
    for path in templates_dir().rglob("*.jinja"):
        source = path.read_text()
        theirs = jinja2.meta.find_referenced_templates(environment.parse(source))
        ours = ["" if "*" in each else each for each in references(source, {})]
        assert sorted(ours) == sorted(each or "" for each in theirs), path


def test_an_edit_of_a_template_changes_the_hashes_that_cover_it_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "templates"
    shutil.copytree(templates_dir(), copy)
    monkeypatch.setattr(metalgen.resources, "templates_dir", lambda: copy)
    covers = {name_of(made): hashed_templates(made) for made in schedule_types()}
    before = all_hashes()
    assert len({*before.values()}) == len(before)
    for path in copy.rglob("*.jinja"):
        name = path.relative_to(copy).as_posix()
        path.write_text(path.read_text() + "\n")
        hashes._hash.cache_clear()
        after = hashes.named_hashes()
        changed = {each for each in before if after[each] != before[each]}
        assert changed == {each for each, names in covers.items() if name in names}, name
        before = after
    monkeypatch.undo()
    all_hashes()


def test_a_hash_covers_the_modules_of_its_own_family_and_kind() -> None:
    covered = {name_of(made): {*hashed_modules(made)} for made in schedule_types()}
    plain = covered["forward/simdgroup"]
    assert {"metalgen.families.forward", "metalgen.kinds.simdgroup_plan"} <= plain
    assert {"metalgen.schedules.schedule", "metalgen.features.sinks"} <= plain
    others = {"families.decode", "families.append", "families.backward", "kinds.mma"}
    assert not plain & {f"metalgen.{each}" for each in others}
    assert "metalgen.kinds.simdgroup_plan" not in covered["forward/mma"]
    assert "metalgen.kinds.mma_plan" in covered["forward/mma"]
    assert "metalgen.families.decode" in covered["decode/mma"]
    assert not {each for names in covered.values() for each in names if ".chips" in each}


def test_modules_are_found_as_python_imports_them() -> None:
    """Of what is passed on by a package, where it is defined."""
    found = modules_behind(["metalgen.chips.model"])
    for name in found:
        tree = ast.parse(Path(importlib.import_module(name).__file__ or "").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("metalgen."):
                for alias in node.names:
                    thing = getattr(importlib.import_module(node.module or ""), alias.name, None)
                    where = getattr(thing, "__module__", "")
                    if isinstance(thing, type) and where.startswith("metalgen."):
                        assert where in {*found, *metalgen.imports.UNINVOLVED}, (name, alias.name)


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A package from outside: a feature, whose macros are in a file and whose bound in a module."""
    package = tmp_path / "fadingly"
    (package / "templates/features").mkdir(parents=True)
    (package / "templates/features/fading.jinja").write_text(
        "{% macro state(head) %}-0.1f{% endmacro %}"
        "{% macro add(i, j, state, dense) %}{{ state }} * float({{ j }}){% endmacro %}"
    )
    (package / "__init__.py").write_text("from .feature import FADING\n")
    (package / "feature.py").write_text(
        "from metalgen.features.base import Feature, Field\n"
        "from metalgen.features.checks import integer\n"
        "from .bounds import MOST\n\n\n"
        "class Fading(Feature):\n"
        "    name = 'fading'\n"
        "    fields = (Field('fade', integer(1, MOST)),)\n\n\n"
        "FADING = Fading()\n"
    )
    (package / "bounds.py").write_text("MOST = 9\n")
    sys.path.insert(0, str(tmp_path))
    try:
        import fadingly  # type: ignore[import-not-found]

        add_templates(package / "templates")
        features.register(fadingly.FADING)
        yield package
    finally:
        sys.path.remove(str(tmp_path))
        features.unregister("fading")
        remove_templates(package / "templates")
        for name in [each for each in sys.modules if each.partition(".")[0] == "fadingly"]:
            del sys.modules[name]
        all_hashes()


def test_python_and_templates_from_outside_count(outside: Path) -> None:
    seen = [all_hashes()["forward/simdgroup"]]
    assert "fadingly.bounds" in hashed_modules(FORWARD)
    assert "features/fading.jinja" in hashed_templates(FORWARD)
    for edited in ("bounds.py", "feature.py", "templates/features/fading.jinja"):
        path = outside / edited
        path.write_text(path.read_text() + "\nANOTHER = 1\n")
        seen.append(all_hashes()["forward/simdgroup"])
    assert len({*seen}) == 4


def test_a_feature_that_is_registered_changes_the_hash_and_taking_it_away_restores_it() -> None:
    before = template_hash(default_schedule(AttentionConfig(64)))

    class Another(Feature):
        name = "another"

    features.register(Another())
    try:
        assert template_hash(FORWARD) != before
    finally:
        features.unregister("another")
    assert template_hash(FORWARD) == before
