"""Tokens of a preprocessed C++ text, with the white space kept, so that edits keep every line."""

from __future__ import annotations

import re
from collections.abc import Iterator

_TOKEN = re.compile(
    r"""
    (?P<directive>(?m:^)[ \t]*\#[^\n]*)
  | (?P<space>\s+|//[^\n]*|/\*.*?\*/)
  | (?P<string>(?:u8|[uUL])?R?"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
  | (?P<name>[A-Za-z_]\w*)
  | (?P<number>\.?\d(?:[eEpP][+-]|[\w.])*)
  | (?P<punct>::|->\*|->|\+\+|--|&&|\|\||<<=|<=|==|!=|[-+*/%^&|]=|<<|\S)
    """,
    re.VERBOSE | re.DOTALL,
)

_LINE_MARKER = re.compile(r'[ \t]*#(?:line)? *(\d+) "([^"]*)"')
_OPEN = {"(": ")", "[": "]", "{": "}"}


class Tokens:
    """The tokens of `text`.

    `texts[i]` is what token i reads now; `code` lists the indices of all tokens but white space and
    directives, and every position below is a position in `code`. An edit changes `texts`, never
    the list, and keeps the new lines of what it removes.
    """

    def __init__(self, text: str) -> None:
        self.texts: list[str] = []
        self.code: list[int] = []
        self.kinds: list[str] = []
        for match in _TOKEN.finditer(text):
            kind = match.lastgroup or "punct"
            if kind not in ("space", "directive"):
                self.code.append(len(self.texts))
                self.kinds.append(kind)
            self.texts.append(match.group())
        self.words = [self.texts[i] for i in self.code]  # as read, whatever was edited since
        self._partner: dict[int, int] | None = None
        self._places: list[tuple[str, int]] | None = None

    def __len__(self) -> int:
        return len(self.code)

    def word(self, at: int) -> str:
        """The token at position `at` as it was read; "" outside the text."""
        return self.words[at] if 0 <= at < len(self.words) else ""

    def positions(self, *words: str) -> Iterator[int]:
        """Where the text reads one of `words`, in order; edits on the way are seen."""
        wanted = frozenset(words)
        return (at for at, word in enumerate(self.words) if word in wanted)

    def is_name(self, at: int) -> bool:
        return 0 <= at < len(self.kinds) and self.kinds[at] == "name"

    def set(self, at: int, text: str) -> None:
        self.texts[self.code[at]] = text

    def append(self, at: int, text: str) -> None:
        self.texts[self.code[at]] += text

    def prepend(self, at: int, text: str) -> None:
        self.texts[self.code[at]] = text + self.texts[self.code[at]]

    def blank(self, first: int, last: int) -> None:
        """Removes the tokens first..last (both included); their line breaks stay."""
        for i in range(self.code[first], self.code[last] + 1):
            text = self.texts[i]
            self.texts[i] = text if text.lstrip().startswith("#") else re.sub(r"[^\n]+", " ", text)

    def remove(self, first: int, last: int) -> None:
        """Removes the tokens first..last for good: they read `;` from now on."""
        self.close(first)
        self.blank(first, last)
        self.words[first : last + 1] = [";"] * (last + 1 - first)
        self.kinds[first : last + 1] = ["punct"] * (last + 1 - first)

    def source(self, first: int, last: int) -> str:
        """The words first..last (both included), joined by single spaces."""
        return " ".join(self.words[first : last + 1])

    def text(self) -> str:
        return "".join(self.texts)

    def place(self, at: int) -> tuple[str, int]:
        """File ("" before the first line marker) and line of the token at position `at`."""
        if self._places is None:
            self._places = []
            file, line, following = "", 1, 0
            for index, token in enumerate(self.texts):
                if "#" in token and (marker := _LINE_MARKER.match(token)):
                    line, file = int(marker[1]) - 1, marker[2]
                if following < len(self.code) and index == self.code[following]:
                    self._places.append((file, line))
                    following += 1
                elif "\n" in token:
                    line += token.count("\n")
        return self._places[at] if 0 <= at < len(self._places) else ("", 0)

    def close(self, at: int) -> int:
        """The position of the bracket that closes the one at `at`; the last token if none does."""
        if self._partner is None:
            self._partner = {}
            stack: list[tuple[str, int]] = []
            for i, word in enumerate(self.words):
                if word in _OPEN:
                    stack.append((_OPEN[word], i))
                elif stack and word == stack[-1][0]:
                    start = stack.pop()[1]
                    self._partner[start] = i
                    self._partner[i] = start
        return self._partner.get(at, len(self.words) - 1)

    def opening(self, at: int) -> int:
        """The position of the bracket that the one at `at` closes; 0 if none."""
        self.close(0)
        assert self._partner is not None
        return self._partner.get(at, 0)

    def close_angle(self, at: int) -> int | None:
        """The position of the `>` that closes the `<` at `at`, or None if it opens no list."""
        depth = 0
        i = at
        while i < len(self.words):
            word = self.words[i]
            if word == "<":
                depth += 1
            elif word == ">":
                depth -= 1
                if depth == 0:
                    return i
            elif word in _OPEN:
                i = self.close(i)
            elif word in (";", ")", "]", "}", "{"):
                return None
            i += 1
        return None

    def open_angle(self, at: int) -> int | None:
        """The position of the `<` that the `>` at `at` closes, or None if it closes no list."""
        depth = 0
        i = at
        while i >= 0:
            word = self.words[i]
            if word == ">":
                depth += 1
            elif word == "<":
                depth -= 1
                if depth == 0:
                    return i
            elif word in (")", "]"):
                i = self.opening(i)
            elif word in (";", "{", "}", "(", "["):
                return None
            i -= 1
        return None

    def statement_start(self, at: int) -> int:
        """The position after the `;`, `{` or `}` before `at`."""
        while at > 0 and self.words[at - 1] not in (";", "{", "}"):
            at -= 1
        return at

    def statement_end(self, at: int) -> int:
        """The position of the next `;` outside all brackets, from `at` on, or the last."""
        while at < len(self.words) - 1 and self.words[at] != ";":
            at = self.close(at) if self.words[at] in _OPEN else at
            at += 1
        return at

    def split(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """The parts of first..last (both included) between commas outside all brackets."""
        start = i = first
        while i <= last:
            word = self.words[i]
            if word in _OPEN:
                i = self.close(i)
            elif word == "<":
                i = self.close_angle(i) or i
            elif word == ",":
                yield start, i - 1
                start = i + 1
            i += 1
        if start <= last:
            yield start, last
