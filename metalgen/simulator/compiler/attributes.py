"""Attribute lists, `[[name, name(argument)]]`: where they are, what they say, and their removal."""

from __future__ import annotations

from .tokens import Tokens

_SYNONYMS = {"dispatch_quadgroups_per_threadgroup": "quadgroups_per_threadgroup"}


def attribute_end(tokens: Tokens, at: int) -> int | None:
    """The last `]` of the attribute list `[[...]]` that starts at `at`, or None."""
    if tokens.word(at) == "[" and tokens.word(at + 1) == "[":
        end = tokens.close(at)
        if tokens.close(at + 1) == end - 1:
            return end
    return None


def attribute_list(tokens: Tokens, at: int, end: int) -> list[tuple[str, list[str]]]:
    """Name and argument (its tokens) of each attribute of the list at `at` to `end`."""
    inner = tokens.split(at + 2, end - 2)
    return [_attribute(tokens.words[a : b + 1]) for a, b in inner]


def _attribute(words: list[str]) -> tuple[str, list[str]]:
    name = words[0] if words else ""
    if len(words) > 2 and words[1] == "::":
        name, words = words[2], words[2:]
    argument = words[2:-1] if len(words) > 3 and words[1] == "(" else []
    return _SYNONYMS.get(name, name), argument


def remove_attributes(tokens: Tokens) -> None:
    """Removes every attribute list that is still in the text."""
    last = -1
    for at in tokens.positions("["):
        if at > last and (end := attribute_end(tokens, at)) is not None:
            if tokens.texts[tokens.code[at]] == "[":  # not removed before
                tokens.blank(at, end)
            last = end
