"""The languages that kernels are written in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from metalgen.errors import ArgumentError


@dataclass(frozen=True)
class Language:
    """What a language fixes for all kernels that are written in it.

    Args:
        name: as in ``templates/languages/``.
        label: as people write it.
        types: its names of MLX's types.
        byte_rows: whether kernels take rows (of Q, of keys) as bytes: MLX then copies an array
            whose last axis has gaps, and no other. Otherwise they read across gaps themselves.
        float_of_bits: its function from 32 bits to the float that they represent.
        scalar: how the value of an array without axes is written, around its name: MLX hands it
            over by reference or by address.
        function: how a function of floats is called by its C name.
        threadgroup_bytes, threads: the most that any chip allows a threadgroup.
        most_buffers: arrays, shapes and strides that a kernel may bind; None: any number.
        tf32: whether products of float32 may keep 11 bits of each factor.
        instructions: those that only some of its chips have (`metalgen.schedules.Limits`).
    """

    name: str
    label: str
    types: Mapping[str, str]
    byte_rows: bool
    float_of_bits: str
    scalar: str
    function: Callable[[str], str]
    threadgroup_bytes: int = 32768
    threads: int = 1024
    most_buffers: int | None = None
    tf32: bool = False
    instructions: tuple[str, ...] = ()


_PRECISE = frozenset("tanh cosh sinh pow atan2 sin cos tan asinh acosh atanh".split())
"""Metal's functions whose fast forms go wrong for large arguments, and not only in their last
bits."""


def _metal_function(name: str) -> str:
    return f"precise::{name}" if name in _PRECISE else name


def _cuda_function(name: str) -> str:
    if name == "tanh":
        return "mg_tanh"  # by the type of the arrays
    return name if name == "fabs" else f"{name}f"


METAL = Language(
    "metal",
    "Metal",
    {
        "bool": "bool",
        "int8": "char",
        "uint8": "uchar",
        "int16": "short",
        "uint16": "ushort",
        "int32": "int",
        "uint32": "uint",
        "int64": "long",
        "uint64": "ulong",
        "float16": "half",
        "bfloat16": "bfloat",
        "float32": "float",
    },
    byte_rows=True,
    float_of_bits="as_type<float>",
    scalar="{}",
    function=_metal_function,
    most_buffers=31,  # Metal feature set tables: buffers per stage
)
CUDA = Language(
    "cuda",
    "CUDA",
    {
        "bool": "bool",
        "int8": "signed char",
        "uint8": "unsigned char",
        "int16": "short",
        "uint16": "unsigned short",
        "int32": "int",
        "uint32": "unsigned int",
        "int64": "long long",
        "uint64": "unsigned long long",
        "float16": "__half",
        "bfloat16": "__nv_bfloat16",
        "float32": "float",
    },
    byte_rows=False,
    float_of_bits="__uint_as_float",
    scalar="*{}",
    function=_cuda_function,
    threadgroup_bytes=232448,  # of compute capability 9.0
    tf32=True,
    instructions=("wgmma",),
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
