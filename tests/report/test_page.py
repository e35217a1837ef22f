"""The page as a parser sees it: what it says, and that nothing in it can run or be fetched."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_samples import (
    DEFAULT,
    HOSTILE,
    OTHER,
    PROBLEM,
    THIRD,
    Page,
    database,
    final,
    modelled,
    records,
    row,
)

from metalgen.database.measurement import Measurement
from metalgen.errors import ArgumentError
from metalgen.report import charts
from metalgen.report.page import number, write_report
from metalgen.report.sources import read_sources
from metalgen.report.study import write_studies
from metalgen.tuning.search.space import enumerate_valid


def page_of(folder: Path, *paths: Path) -> Page:
    """The page about some files."""
    write_report(folder / "report.html", read_sources(paths))
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def searched() -> list[Measurement]:
    """25 measurements that become quicker, one failure, and a race of three finals."""
    rows = [row(DEFAULT, 2e-3), row(THIRD, None, status="runtime", detail="no")]
    rows += [row(dataclasses.replace(OTHER, bq=8 * n, simdgroups=n), 2e-3 - n * 5e-5)
             for n in range(1, 25)]  # fmt: skip
    race = {"default_seconds": 1.8e-3, "mlx_seconds": 1.5e-3}
    rows += [final(OTHER, 1.2e-3, **race), final(DEFAULT, 1.8e-3, **race)]
    return rows


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    notes = {PROBLEM.key: {"noise_floor": 0.0042, "drift": [0.001], "outliers": 2}}
    return database(tmp_path / "measured.db", searched(), notes)


def test_the_page_says_what_won_against_the_default_and_mlx(tmp_path: Path, measured: Path):
    text = page_of(tmp_path, measured).text("measured")
    assert "1.200 ms" in text and "1.800 ms" in text and "1.500 ms" in text
    assert "1.50× the default schedule's speed; the noise floor was 0.4 %" in text
    assert "1.25× the speed of MLX's own attention." in text and "ours is faster" in text
    assert str(OTHER) in text
    assert "final, checked" in text


def test_the_page_says_where_rows_come_from(tmp_path: Path, measured: Path):
    text = page_of(tmp_path, measured).text("measured")
    for fact in (
        *("M3Max, 40 GPU cores", "macOS 26.1", "0.32.4", "2026-11-21T08:00:00Z", "0.42 %"),
        *("+0.10 %", "policy: timer wall", "policy: repetitions 7", "samples of a final 3"),
        *("28: 26 of the search, 2 finals", "failed 1 runtime", PROBLEM.config.key),
    ):
        assert fact in text, fact


def test_the_course_of_a_search_is_drawn_and_told_in_numbers(tmp_path: Path, measured: Path):
    page = page_of(tmp_path, measured)
    text = page.text("measured")
    assert "26 measurements in the order in which they were taken." in text
    # after 1, 5, 15, 25, 26: of the n-th row the best is 2 ms - (n - 2) * 0.05 ms
    assert "after 1 5 15 25 26 best, ms 2.000 1.850 1.350 0.8500 0.8000" in text
    paths = [a for tag, a in page.elements if tag == "path"]
    [dots] = [a["d"] for a in paths if a["class"] == "dots" and len(a["d"] or "") > 100]
    assert dots.count("M") == 25
    assert [a["d"].count("M") for a in paths if a["class"] == "failed"] == [1, 1]  # and its legend


def test_predictions_stand_apart_from_measurements_in_words_and_in_looks(
    tmp_path: Path, measured: Path
):
    prediction = records(tmp_path / "m.jsonl", [modelled(OTHER, 0.123e-3, verified=True)])
    page = page_of(tmp_path, measured, prediction)
    assert "0.1230 ms" in page.text("modelled") and "0.1230" not in page.text("measured")
    assert "1.200 ms" not in page.text("modelled")
    assert "Predicted: 0.1230 ms" in page.text("modelled")
    assert "executed by nothing: the chip model" in page.text("modelled")
    assert "MLX's own attention is not in the model" in page.text("modelled")
    sections = [a["class"] for tag, a in page.elements if tag == "section"]
    assert sections == ["kind measured", "kind modelled"]
    assert "nobody measured them" in page.text("")
    alone = page_of(tmp_path, prediction)
    assert "no device's clock gave any of these times" in alone.text("")


def test_records_without_an_order_are_shown_as_a_random_draw(tmp_path: Path):
    rows = [row(DEFAULT, 2e-3), row(OTHER, 1e-3), row(THIRD, 4e-3)]
    text = page_of(tmp_path, records(tmp_path / "r.jsonl", rows)).text()
    assert "no search of metalgen's" in text
    assert "drawn 1 3 lucky 10 %, ms 1.000 1.000 median, ms 2.000 1.000" in text
    assert "search only, not checked" in text and "none is dispatched" in text


def test_finals_alone_make_a_page(tmp_path: Path):
    text = page_of(tmp_path, records(tmp_path / "r.jsonl", [final(OTHER, 1e-3)])).text()
    assert "These sources hold no rows of the search." in text
    assert "MLX's own attention took no part in this race." in text
    assert "noise floor not in these sources" in text


def test_rows_of_earlier_templates_are_marked(tmp_path: Path):
    rows = [final(OTHER, 1e-3, template_hash="0123456789abcdef")]
    text = page_of(tmp_path, records(tmp_path / "r.jsonl", rows)).text()
    assert "final, checked, earlier templates" in text
    assert "0123456789abcdef (not the present ones)" in text and "are not dispatched" in text


def test_a_problem_where_nothing_ran_is_on_the_page(tmp_path: Path):
    rows = [row(OTHER, None, status="compile", detail="no"), row(DEFAULT, None, status="runtime")]
    text = page_of(tmp_path, records(tmp_path / "r.jsonl", rows)).text()
    assert "No schedule has a time." in text and "nothing ran" in text
    assert "failed 1 compile, 1 runtime" in text


def test_a_hostile_record_comes_out_as_text_and_nothing_of_it_runs(tmp_path: Path):
    texts = dict.fromkeys(("os", "mlx_version", "metalgen_version", "detail"), HOSTILE)
    policy = json.dumps({HOSTILE: HOSTILE, "model": [HOSTILE]})
    rows = [
        *(final(OTHER, 1e-3, **texts, policy=policy), row(THIRD, 1e-3, **texts, policy=policy)),
        row(DEFAULT, None, status="runtime", **texts, policy=HOSTILE),
        modelled(OTHER, 1e-3, policy=HOSTILE, **texts),
    ]
    folder = tmp_path / "<b onclick=alert(3)>"
    folder.mkdir()
    path = records(folder / "r.jsonl", rows)
    bad = row().to_record() | {"family": "<script>alert(4)</script>"}
    path.write_text(path.read_text() + json.dumps(bad) + "\n")
    page = page_of(tmp_path, path)
    assert {tag for tag, _ in page.elements} & {"script", "img", "b", "iframe", "object"} == set()
    assert [name for _, a in page.elements for name in a if name.startswith("on")] == []
    assert page.text().count(HOSTILE) >= 8  # shown, as it is
    assert "{{7919*7907}}" in page.text() and "62615533" not in page.text()
    assert "<script>alert(4)</script>" in page.text()


def test_the_page_refers_to_nothing_outside_and_forbids_itself_to(tmp_path: Path, measured: Path):
    page = page_of(tmp_path, measured)
    html = (tmp_path / "report.html").read_text()
    links = [a[n] for _, a in page.elements for n in ("src", "href", "action", "data") if n in a]
    assert links and all(re.fullmatch("#result-[0-9]+", link or "") for link in links)
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids)) and {link[1:] for link in links if link} <= set(ids)
    assert "url(" not in html and "@import" not in html
    policies = [a["content"] for tag, a in page.elements if a.get("http-equiv")]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_pictures_have_names_and_tables_have_headers(tmp_path: Path, measured: Path):
    page = page_of(tmp_path, measured)
    for tag, a in page.elements:
        if tag == "svg":
            named = a.get("aria-label") or a.get("aria-labelledby")
            assert (a.get("role") == "img" and named) or a.get("aria-hidden") == "true", a
        if tag == "th":
            assert a.get("scope") in ("row", "col"), a
    assert page.elements[0] == ("html", {"lang": "en"})


def test_an_earlier_page_is_replaced_and_any_other_file_is_not(tmp_path: Path, measured: Path):
    page_of(tmp_path, measured)
    page_of(tmp_path, measured)
    other = tmp_path / "mine.txt"
    other.write_text("my thoughts")
    for path in (other, measured):
        before = path.read_bytes()
        with pytest.raises(ArgumentError, match="--output: expected a new file, or an earlier"):
            write_report(path, read_sources([measured]))
        assert path.read_bytes() == before


def test_a_page_that_cannot_be_finished_leaves_the_earlier_one(
    tmp_path: Path, measured: Path, monkeypatch: pytest.MonkeyPatch
):
    page_of(tmp_path, measured)
    before = (tmp_path / "report.html").read_bytes()
    files = sorted(p.name for p in tmp_path.iterdir())

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:100])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(ArgumentError, match="No space left on device"):
            write_report(tmp_path / "report.html", read_sources([measured]))
    assert (tmp_path / "report.html").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == files


def test_two_pages_of_the_same_rows_differ_in_their_date_alone(
    tmp_path: Path, measured: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("metalgen.report.page.now", lambda: "2026-11-21T08:00:00Z")
    for name in ("a.html", "b.html"):
        write_report(tmp_path / name, read_sources([measured]))
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "–"),
        (1.2345678, "1235"),
        (0.12345678, "123.5"),
        (0.012345678, "12.35"),
        (1.2e-3, "1.200"),
        (0.36161e-3, "0.3616"),
        (0.0511e-3, "0.05110"),
        (1.5e-9, "1.500e-06"),
    ],
)
def test_times_have_four_digits_that_count(seconds: float | None, text: str):
    assert number(seconds) == text


ROUND = [1e-12, 1e-9, 1e-3, 1e-3 * (1 + 1e-15), 2e-3, 1e8]
ABSURD = [5e-324, 9e-13, 1.01e8, 1.7e308]
TIMES = st.one_of(st.floats(1e-12, 1e8), st.sampled_from([*ROUND, *ROUND, *ABSURD]))
TEXTS = st.sampled_from(["", HOSTILE, "x" * 3000, "\N{GRINNING FACE}" * 9])
SCHEDULES = st.sampled_from([DEFAULT, OTHER, THIRD, *enumerate_valid(PROBLEM.config)[:40]])


@st.composite
def rows_of_any_kind(draw: st.DrawFn) -> Measurement:
    """A row as a record file may hold it, with times of every size and texts of every kind."""
    status = draw(st.sampled_from(["ok", "ok", "ok", "wrong", "timeout"]))
    ok = status == "ok"
    seconds = draw(TIMES.filter(bool)) if ok else None
    optional = st.one_of(st.none(), TIMES)
    return row(
        draw(SCHEDULES),
        seconds,
        status=status,
        verified=ok and draw(st.booleans()),
        phase=draw(st.sampled_from(["final", "search"])),
        provenance=draw(st.sampled_from(["measured", "modelled"])),
        samples=tuple(draw(st.lists(TIMES, max_size=4))),
        policy=draw(st.one_of(TEXTS, st.sampled_from(["[]", "{}", '{"a":{"b":[1]}}', "[" * 2000]))),
        created=draw(st.sampled_from(["0000-99-99T99:99:99Z", "2026-11-21T08:00:00Z"])),
        chip=draw(st.sampled_from(["M3Max", "M1", "Nobody"])),
        detail=draw(TEXTS),
        **{name: draw(optional) for name in ("spread", "default_seconds", "mlx_seconds", "error")},
    )


def absurd(m: Measurement) -> bool:
    """Whether a row has a time that no kernel takes."""
    known = [m.seconds, m.default_seconds, m.mlx_seconds, m.spread, *m.samples]
    return any(t and not 1e-12 <= t <= 1e8 for t in known)


@settings(max_examples=20, deadline=None, database=None)
@given(st.lists(rows_of_any_kind(), min_size=1, max_size=30), st.booleans())
def test_rows_of_any_kind_make_a_page_and_a_study(found: list[Measurement], ordered: bool):
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if ordered:
            source = database(folder / "d.db", found)
        else:
            source = records(folder / "r.jsonl", found)
        try:
            sources = read_sources([source])
        except ArgumentError:  # no row is about a chip that is known, with times that can be
            assert all(m.chip == "Nobody" or absurd(m) for m in found)
            return
        write_report(folder / "report.html", sources)
        page = Page((folder / "report.html").read_text(encoding="utf-8"))
        assert "script" not in {tag for tag, _ in page.elements}
        for _, attributes in page.elements:
            for name in ("d", "x", "y"):
                assert not re.search("nan|inf", attributes.get(name) or "")
        write_studies(folder / "s.log", sources)


def test_what_is_too_much_for_a_page_is_counted_not_drawn(tmp_path: Path):
    schedules = enumerate_valid(PROBLEM.config)[:3000]
    run = [row(s, 1e-3 + 1e-9 * n) for n, s in enumerate(schedules)]
    run += [final(s, 1e-3 + 1e-9 * n) for n, s in enumerate(schedules[:60])]
    page = page_of(tmp_path, database(tmp_path / "d.db", run))
    assert "20 slower finalists are not shown." in page.text()
    dots = [(a["d"] or "").count("M") for t, a in page.elements if a.get("class") == "dots"]
    assert 1000 <= max(dots) <= charts.MOST_MARKS
    many = [row(policy=f"p{n}") for n in range(450)]
    page = page_of(tmp_path, records(tmp_path / "r.jsonl", many))
    assert "Not shown: 50 more results" in page.text()
    assert sum(tag == "details" for tag, _ in page.elements) == 400


def test_a_file_whose_name_is_no_text_is_named_all_the_same(tmp_path: Path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xff.jsonl"))
    try:
        records(path, [row()])
    except OSError:
        pytest.skip("this file system takes no such name")
    assert "r?.jsonl" in page_of(tmp_path, path).text()


def test_results_that_would_look_the_same_say_when_they_were_made(tmp_path: Path):
    later = {"policy": '{"repetitions":9,"timer":"wall"}', "created": "2026-11-21T13:28:59Z"}
    other = dataclasses.replace(PROBLEM, q_len=2048)
    rows = [final(OTHER, 1e-3), final(OTHER, 2e-3, **later), final(OTHER, 1e-3, problem=other)]
    text = page_of(tmp_path, records(tmp_path / "a.jsonl", rows)).text("measured")
    assert len(re.findall(r"forward, M3Max, 2026-11-21 08:00\b", text)) == 1
    assert len(re.findall(r"forward, M3Max, 2026-11-21 13:28\b", text)) == 1
    assert len(re.findall(r"forward, M3Max(?!,)", text)) == 1
