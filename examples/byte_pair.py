"""The byte-pair tokenizer of a GGUF file's metadata, for the SmolLM family.

GPT-2's byte-level scheme (every byte has a printable stand-in, so tokens are plain strings), with
digits taken one by one.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

CONTROL = 3
"""GGUF's type of tokens such as <|im_start|>, which are matched as they stand."""

# Digits are split off before this is applied, so that \w means letters and the underscore.
WORDS = re.compile(r"'(?:[stmd]|re|ve|ll)| ?[^\W_]+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")


def byte_alphabet() -> dict[int, str]:
    """A printable character for each byte: itself where it is one, else the next after 255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in alphabet:
            alphabet[byte] = chr(256 + len(alphabet) - len(printable))
    return alphabet


class Tokenizer:
    """Turns text into token numbers and back.

    Args:
        metadata: of a GGUF file, as ``mx.load(path, return_metadata=True)`` returns it.
    """

    def __init__(self, metadata: dict[str, Any]) -> None:
        self.tokens: list[str] = metadata["tokenizer.ggml.tokens"]
        self.numbers = {token: number for number, token in enumerate(self.tokens)}
        merges = (merge.split(" ") for merge in metadata["tokenizer.ggml.merges"])
        self.ranks = {(left, right): rank for rank, (left, right) in enumerate(merges)}
        self.character = byte_alphabet()
        self.byte = {character: byte for byte, character in self.character.items()}
        types = metadata["tokenizer.ggml.token_type"].tolist()
        self.control = {t for t, kind in zip(self.tokens, types, strict=True) if kind == CONTROL}
        self.boundary = re.compile("(" + "|".join(map(re.escape, sorted(self.control))) + ")")

    def encode(self, text: str) -> list[int]:
        """The token numbers of a text; control tokens in it are recognised."""
        numbers: list[int] = []
        for part in self.boundary.split(text):
            if part in self.control:
                numbers.append(self.numbers[part])
            else:
                for word in split_words(part):
                    stand_ins = [self.character[byte] for byte in word.encode()]
                    known = [c for c in stand_ins if c in self.numbers]  # some bytes have no token
                    numbers += [self.numbers[token] for token in self.merge(known)]
        return numbers

    def merge(self, parts: list[str]) -> list[str]:
        """Joins neighbours, the earliest learnt pair first, until no known pair is left."""
        while len(parts) > 1:
            best = min(pairwise(parts), key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                break
            joined, position = [], 0
            while position < len(parts):
                width = 2 if tuple(parts[position : position + 2]) == best else 1
                joined.append("".join(parts[position : position + width]))
                position += width
            parts = joined
        return parts

    def decode(self, numbers: Iterable[int]) -> str:
        """The text of token numbers; control tokens are left out."""
        tokens = [self.tokens[number] for number in numbers]
        characters = "".join(token for token in tokens if token not in self.control)
        return bytes(self.byte[c] for c in characters).decode(errors="replace")


def split_words(text: str) -> Iterator[str]:
    """The pieces within which pairs are merged: words with their leading space, single digits."""
    start = 0
    for position, character in enumerate(text):
        if unicodedata.category(character).startswith("N"):
            yield from WORDS.findall(text[start:position])
            yield character
            start = position + 1
    yield from WORDS.findall(text[start:])
