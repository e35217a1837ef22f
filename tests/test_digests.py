"""The kernels of a corpus are what they were, by the digests in ``tests/golden/digests.txt``.

A fixed tenth of the corpus always runs; ``pytest -m slow tests/test_digests.py`` renders it all.
After a change of kernels that is meant:

    python -m tests.test_digests           # the same cases, digests of what they render now
    python -m tests.test_digests --draw    # cases drawn anew, with new features, knobs and families

Comments and spacing do not count.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest

from metalgen.errors import InvalidSchedule
from metalgen.families import (
    Limits,
    Schedule,
    decode_schedule,
    default_schedule,
    get_family,
    is_valid,
    language_of,
)
from metalgen.families.append import ELEMENTS, THREADS, append_schedule, operands
from metalgen.families.backward import backward_config, backward_families, unsupported
from metalgen.languages import LANGUAGES
from metalgen.problem.config import AttentionConfig
from metalgen.source.digests import code_of
from metalgen.source.render import KernelSource, render
from metalgen.testing.cases import DTYPES, FEATURES, WHERE
from metalgen.testing.devices import DIMS, cuda_schedules, schedules_of
from metalgen.testing.fuzz import functions, made_up

CORPUS = Path(__file__).parent / "golden" / "digests.txt"
LIMITS = {"metal": Limits(), "cuda": Limits(232448, 1024, "cuda")}
ATTENTION = ("forward", "decode")
BACKWARD = ("backward_rows", "backward_keys")
RANDOM = 2000
"""Combinations of anything, drawn at random, in each language."""
RANDOM_APPENDS = 200
HEADER = """\
# Digests of the kernels of configs and schedules, written and read by tests/test_digests.py.
# Each line: language family | config | schedule | the digest of each step. A name without a value
# is true; @N stands for the text of a user's function.
"""


class Case(NamedTuple):
    """A call's kernels, by the fields of its config and schedule as they are stored."""

    language: str
    family: str
    config: str
    schedule: str

    @property
    def is_in_the_tenth(self) -> bool:
        """Whether it always runs: the same cases whatever others there are."""
        return zlib.crc32(" | ".join(self).encode()) % 10 == 0


class Corpus:
    """Cases with their digests, and the texts of functions that their configs name."""

    def __init__(self) -> None:
        self.cases: dict[Case, str] = {}
        self.functions: list[str] = []

    @classmethod
    def stored(cls) -> Corpus:
        """What the file holds."""
        found = cls()
        for line in CORPUS.read_text().splitlines():
            if line.startswith("@"):
                found.functions.append(line.partition(" ")[2])
            elif not line.startswith("#"):
                kernel, config, schedule, digests = line.split(" | ")
                found.cases[Case(*kernel.split(), config, schedule)] = digests
        return found

    @classmethod
    def drawn(cls) -> Corpus:
        """Cases drawn anew, which have no digests yet."""
        found = cls()
        for language, family, config, schedule in (
            *drawn_attention(),
            *drawn_appends(),
            *drawn_backward(),
        ):
            words = found.words(config.to_dict()), found.words(schedule)
            found.cases[Case(language, family, *words)] = ""
        return found

    def update(self) -> None:
        """Take the digests of what the cases render now."""
        for case in self.cases:
            self.cases[case] = self.digests(case)

    def write(self) -> None:
        """Put it into the file."""
        functions = [f"@{number} {text}\n" for number, text in enumerate(self.functions)]
        lines = [
            f"{case.language} {case.family} | {case.config} | {case.schedule} | {digests}\n"
            for case, digests in self.cases.items()
        ]
        CORPUS.write_text("".join([HEADER, *functions, *lines]))

    def words(self, fields: Mapping[str, Any]) -> str:
        """Fields in one line."""

        def word(name: str, value: Any) -> str:
            if value is True:
                return name
            if name.endswith("_mod"):
                if value not in self.functions:
                    self.functions.append(value)
                return f"{name}=@{self.functions.index(value)}"
            return f"{name}={value}"

        return " ".join(word(*field) for field in sorted(fields.items()))

    def fields(self, words: str) -> dict[str, Any]:
        """What `words` wrote."""

        def value(name: str, text: str) -> Any:
            if name.endswith("_mod"):
                return self.functions[int(text.removeprefix("@"))]
            try:
                return json.loads(text)
            except ValueError:
                return text

        pairs = (word.partition("=") for word in words.split())
        return {name: value(name, text) if equals else True for name, equals, text in pairs}

    def schedule(self, case: Case) -> Schedule:
        """The schedule of a case."""
        return decode_schedule(self.fields(case.schedule), case.family, case.language)

    def kernels(self, case: Case) -> Iterator[KernelSource]:
        """The kernels of a case, one for each step of its family."""
        config = AttentionConfig.from_dict(self.fields(case.config))
        schedule = self.schedule(case)
        for step in get_family(case.family).steps(schedule):
            yield render(config, schedule, step)

    def digests(self, case: Case) -> str:
        """12 hexadecimal digits for each kernel of a case."""
        return " ".join(digest(kernel) for kernel in self.kernels(case))

    def changed(self, cases: list[Case]) -> list[str]:
        """Cases of which the kernels are no longer those of the digests."""
        return [" | ".join(case) for case in cases if self.digests(case) != self.cases[case]]


def digest(kernel: KernelSource) -> str:
    """What changes when anything that a kernel compiles or launches does."""
    facts = (
        *(kernel.inputs, kernel.outputs, kernel.math_mode),
        *(kernel.threads, kernel.bq, kernel.shared_memory),
    )
    text = f"{facts}\0{code_of(kernel.header)}\0{code_of(kernel.source)}\0"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


Drawn = Iterator[tuple[str, str, AttentionConfig, dict[str, Any]]]
"""Language, family, config, and the fields of a schedule."""


def drawn_attention() -> Drawn:
    """Combinations of anything, and those of the suites that every device passes."""

    def case(config: AttentionConfig, schedule: Schedule) -> tuple[str, str, Any, Any]:
        return language_of(schedule), schedule.family, config, schedule.to_dict()

    for number in range(RANDOM):
        for limits in LIMITS.values():
            made = made_up(number, limits)
            yield case(made.config, made.schedule)
    for language, limits in LIMITS.items():
        paths = schedules_of if language == "metal" else cuda_schedules
        for dtype in DTYPES:
            for width, value_width in DIMS:
                config = AttentionConfig(width, dtype, value_head_dim=value_width, return_lse=True)
                for schedule in paths(config).values():
                    if is_valid(config, schedule, limits):
                        yield case(config, schedule)
                for family in ATTENTION:
                    yield case(config, default_schedule(config, limits, family))
            for fields in (*FEATURES.values(), *WHERE.values()):
                for width in (64, 72, 128):
                    if width % fields.get("kv_group", 1):
                        continue
                    config = AttentionConfig(
                        width, dtype, heads_per_kv=2, **{"return_lse": True, **fields}
                    )
                    for family in ATTENTION:
                        yield case(config, default_schedule(config, limits, family))


def drawn_backward() -> Drawn:
    """Backward kernels of each feature, function and width, by default schedules and others."""
    scores, masks = functions()
    mods = [{"score_mod": s, "mask_mod": m} for s, m in zip(scores, masks, strict=True)]
    blocks = {"mask_mod": masks[1], "block_mask": True}
    every: list[dict[str, Any]] = [{}, {"softcap": 20.0}, *FEATURES.values(), *mods, blocks]
    for number, fields in enumerate(every):
        for width in (64, 72, 128):
            if width % fields.get("kv_group", 1):
                continue
            config = AttentionConfig(width, DTYPES[number % 3], heads_per_kv=2, **fields)
            bare = backward_config(config)
            if unsupported(bare):
                continue
            families = [family.name for family in backward_families(bare)]
            for (language, limits), family in product(LIMITS.items(), families):
                try:
                    default = default_schedule(bare, limits, family)
                except InvalidSchedule:  # quantized rows on CUDA
                    continue
                changes = [{}, {"buffers": 3 - default.buffers}, {"apart": 1}]
                for change in changes if width == 64 else changes[:1]:
                    if change.keys() <= default.knobs.keys():
                        made = replace(default, **change)
                        if is_valid(bare, made, limits):
                            yield language, family, bare, made.to_dict()


def drawn_appends() -> Drawn:
    """Append kernels of any kind."""
    places: list[dict[str, Any]] = [
        {},
        {"kv_lens": True},
        {"page_size": 16},
        {"page_size": 56},
        {"page_size": 8, "varlen": True},
    ]
    for number in range(RANDOM_APPENDS):
        random = Random(number)
        bits, group = random.choice((None, None, 4, 8)), random.choice((32, 64, 128))
        dims = (8, 9, 20, 64, 72, 128, 576) if bits is None else (group, 2 * group, 4 * group)
        rope, width = random.choice((None, "half", "pairs")), random.choice(dims)
        config = AttentionConfig(
            width,
            random.choice(DTYPES),
            value_head_dim=random.choice(dims),
            kv_bits=bits,
            kv_group=group,
            rope=rope,
            rope_dims=None if rope is None else 2 * random.randint(1, width // 2),
            **random.choice(places),
        )
        chosen = random.choice(THREADS.choices), random.choice(ELEMENTS.choices)
        for language, limits in LIMITS.items():
            schedule = append_schedule(*chosen, language=language)
            if operands(config) and not is_valid(config, schedule, limits):
                schedule = append_schedule(language=language)
            if operands(config):
                yield language, "append", config, schedule.to_dict()


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus.stored()


def test_kernels_of_a_tenth_of_the_corpus_are_unchanged(corpus: Corpus) -> None:
    """`python -m tests.test_digests` writes the digests anew where a change is meant."""
    tenth = [case for case in corpus.cases if case.is_in_the_tenth]
    assert {(case.language, case.family) for case in tenth} == {
        (language, family) for language in LANGUAGES for family in (*ATTENTION, *BACKWARD, "append")
    }
    assert len(tenth) > 500
    assert corpus.changed(tenth) == []


@pytest.mark.slow
def test_kernels_of_the_whole_corpus_are_unchanged(corpus: Corpus) -> None:
    assert len(corpus.cases) > 5000
    assert corpus.changed([*corpus.cases]) == []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write tests/golden/digests.txt anew.")
    parser.add_argument("--draw", action="store_true", help="draw other cases, too")
    made = Corpus.drawn() if parser.parse_args().draw else Corpus.stored()
    made.update()
    made.write()
    print(f"{CORPUS}: {len(made.cases)} cases, {CORPUS.stat().st_size} bytes")
