"""--with: any field of a config on the command line."""

from __future__ import annotations

import json

import pytest

from metalgen import AttentionConfig
from metalgen.cli.app import run


@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        (["--with", "alibi"], {"alibi": True}),
        (["--with", "page_size=16", "--with", "kv_bits=4"], {"page_size": 16, "kv_bits": 4}),
        (["--with", "rope=half", "--with", "dropout=0.25"], {"rope": "half", "dropout": 0.25}),
    ],
)
def test_fields_reach_the_config(
    arguments: list[str], fields: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["explain", "--json", *arguments]) == 0
    config = AttentionConfig(64, **fields)  # type: ignore[arg-type]
    assert json.loads(capsys.readouterr().out)["problem"]["config"] == config.to_dict()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("page_sise=16", "--with: expected a field of AttentionConfig, such as page_size"),
        ("zzzz", "--with: expected a field of AttentionConfig, one of head_dim, dtype,"),
        ("page_size=12", "page_size: expected a multiple of 8"),
        ("kv_bits=four", "kv_bits: expected one of None, 4, 8, but got 'four'"),
        ("causal", "--with causal: expected once, or as --causal"),
        ("return_lse", "--with return_lse: expected once, or as --lse"),
    ],
)
def test_fields_that_cannot_be_are_named(
    text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["render", "--with", text]) == 2
    assert message in capsys.readouterr().err


def test_check_executes_a_kernel_with_all_that_its_config_asks_for() -> None:
    fields = ["--with", "varlen", "--with", "page_size=8", "--with", "sinks"]
    sizes = ["--heads", "2", "--q-len", "20", "--kv-len", "30"]
    assert run(["check", *fields, *sizes]) == 0
