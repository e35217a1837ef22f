from __future__ import annotations

import pytest

from metalgen.plurals import counted


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (1000, "1000 rows")]
)
def test_a_noun_agrees_with_its_number(number: int, text: str) -> None:
    assert counted(number, "row") == text


def test_a_plural_may_be_of_another_form() -> None:
    assert (counted(1, "study", "studies"), counted(3, "study", "studies")) == (
        "1 study",
        "3 studies",
    )
