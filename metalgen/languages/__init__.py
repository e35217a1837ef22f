"""The languages that kernels are written in."""

from __future__ import annotations

from dataclasses import dataclass

from metalgen.errors import ArgumentError


@dataclass(frozen=True)
class Language:
    """What a language fixes for all kernels that are written in it.

    Args:
        name: as in ``templates/languages/``.
        label: as people write it.
        elements: its types of array elements, by MLX's names.
        byte_rows: whether kernels take rows (of Q, of keys) as bytes: MLX then copies an array
            whose last axis has gaps, and no other. Otherwise they read across gaps themselves.
        threadgroup_bytes, threads: the most that any chip allows a threadgroup.
        most_buffers: arrays, shapes and strides that a kernel may bind; None: any number.
    """

    name: str
    label: str
    elements: dict[str, str]
    byte_rows: bool
    threadgroup_bytes: int = 32768
    threads: int = 1024
    most_buffers: int | None = None


METAL = Language(
    "metal",
    "Metal",
    {"float16": "half", "bfloat16": "bfloat", "float32": "float"},
    byte_rows=True,
    most_buffers=31,  # Metal feature set tables: buffers per stage
)
CUDA = Language(
    "cuda",
    "CUDA",
    {"float16": "__half", "bfloat16": "__nv_bfloat16", "float32": "float"},
    byte_rows=False,
    threadgroup_bytes=232448,  # of compute capability 9.0
)
LANGUAGES: dict[str, Language] = {language.name: language for language in (METAL, CUDA)}
"""All languages by name."""


def register(language: Language) -> None:
    """Add a language; `unregister` takes it away again."""
    LANGUAGES[language.name] = language


def unregister(name: str) -> None:
    """Take a language away."""
    del LANGUAGES[name]


def get_language(name: str) -> Language:
    """The language of a name.

    Raises:
        ArgumentError: there is none.
    """
    try:
        return LANGUAGES[name]
    except KeyError:
        raise ArgumentError("language", f"one of {', '.join(LANGUAGES)}", name) from None
