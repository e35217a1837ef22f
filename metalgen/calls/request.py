"""From arrays and options to a config, its inputs and a kernel: what every operation shares."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import mlx.core as mx

from metalgen.arguments import as_integer
from metalgen.calls import recording
from metalgen.calls.arrays import layout_hint, main_arrays, types_of
from metalgen.calls.kernel import Kernel
from metalgen.calls.mlx_call import MlxCall, mlx_call
from metalgen.calls.options import KNOWN_OPTIONS, Keys, Options, unexpected
from metalgen.calls.resolve import get_kernel
from metalgen.devices import all_devices
from metalgen.errors import ArgumentError, MissingArgument
from metalgen.families import ORDINARY, get_attention
from metalgen.families.sizes import DECODE_QUERIES, MAX_BATCH_HEADS, MAX_LENGTH
from metalgen.features import FIELDS, INPUTS
from metalgen.features.array_mask import finds_tiles
from metalgen.features.conversions import brief, integers
from metalgen.problem.block_mask import BlockMask
from metalgen.problem.config import BASE, AttentionConfig
from metalgen.problem.inputs import NOTHING, Inputs, check_call, max_kv_len, needs_inputs
from metalgen.problem.rope import Rope

if TYPE_CHECKING:
    from metalgen.dsl.trace import Traced

OPTIONS = {each.name: each.option for each in INPUTS.values()}
"""What users call the inputs of a call: options, or parts of other arguments."""
FIELD_OPTIONS = {
    each.name: each.option for each in (*BASE.values(), *FIELDS.values()) if each.option
}
"""What users call the fields of a config."""


@dataclass(frozen=True)
class Functions:
    """What `metalgen.flex_attention` adds to a call."""

    score: Traced | None = None
    mask: Traced | None = None
    blocks: BlockMask | None = None


NO_FUNCTIONS = Functions()
MASKS = 'an mlx.core.array, a BlockMask, "causal", or None'

_ARRAYS = {each.option: each for each in INPUTS.values() if each.convert is not None}
"""Options that are arrays, and the inputs that they become."""
_SWITCHES = {option: name for name, option in FIELD_OPTIONS.items() if option in _ARRAYS}
"""Those whose presence a config says, and by which field."""
_FIELDS = frozenset(n for n, option in FIELD_OPTIONS.items() if n == option and n not in _ARRAYS)
"""Options that a config takes as they are."""
_BRINGING = frozenset((*_ARRAYS, "rope", "dropout"))
"""Options that may bring arrays to a kernel."""

_config_of = functools.lru_cache(maxsize=1024, typed=True)(AttentionConfig)


def call(
    operation: str,
    q: mx.array,
    k: Keys,
    v: Keys,
    scale: float | None,
    return_lse: bool,
    options: Options,
    functions: Functions = NO_FUNCTIONS,
) -> mx.array | tuple[mx.array, mx.array]:
    """The attention of `metalgen.attention`, whose docstring says what everything is.

    Raises:
        TypeError: an option that there is not.
        ArgumentError: naming what the user passed, as the user calls it.
    """
    if options.get("stream") is not None:
        with _on_stream(options):
            return call(operation, q, k, v, scale, return_lse, _anywhere(options), functions)
    try:
        prepared = prepare(operation, q, k, v, return_lse, options, functions)
        return prepared.kernel(*prepared.arrays, scale=scale, inputs=prepared.inputs)
    except ArgumentError as error:
        head, _, rest = error.argument.partition(".")
        if rest == "shape" and head != "q" and (hint := layout_hint(q, k, options)):
            error.args = (f"{error.args[0]}; {hint}",)
        raise


def explain(
    operation: str,
    q: mx.array,
    k: Keys,
    v: Keys,
    return_lse: bool,
    options: Options,
    functions: Functions = NO_FUNCTIONS,
) -> str:
    """What `call` would run, and why; one step a line."""
    if options.get("stream") is not None:
        with _on_stream(options):
            return explain(operation, q, k, v, return_lse, _anywhere(options), functions)
    prepared = prepare(operation, q, k, v, return_lse, options, functions)
    lines = [prepared.kernel.explain()]
    given = types_of(q, k, v)
    if len({*given.values()}) > 1:
        dtype = str(prepared.arrays[0].dtype).removeprefix("mlx.core.")
        types = ", ".join(f"{name} {of}" for name, of in given.items())
        lines.append(f"  types: {types}; all are computed in {dtype}, to which MLX promotes them")
    return "\n".join(lines)


class Request(NamedTuple):
    """A call whose arguments are understood: the kernel that computes it, and what that takes.

    Args:
        kernel: what computes it.
        arrays: q, k and v as the kernel takes them.
        inputs: the other arrays.
    """

    kernel: Kernel | MlxCall
    arrays: tuple[mx.array, mx.array, mx.array]
    inputs: Inputs


def prepare(
    operation: str,
    q: mx.array,
    k: Keys,
    v: Keys,
    return_lse: bool,
    options: Options,
    functions: Functions = NO_FUNCTIONS,
) -> Request:
    """From arrays and options to a kernel and its inputs; raises what `call` raises."""
    if not options.keys() <= KNOWN_OPTIONS:
        raise unexpected(operation, options)
    options, functions, names = _widened(options, functions)
    q, key, value, widths = main_arrays(q, k, v, options.get("value_head_dim"))
    if len(key) > 1:
        names = {**names, "k": "k[0]", "v": "v[0]"}
    arrays = (q, key[0], value[0])
    if functions is NO_FUNCTIONS and not return_lse:
        by_mlx = mlx_call(q, key, value, options, names)
        if by_mlx is not None:
            return Request(by_mlx[0], arrays, by_mlx[1])
    try:
        config = _config(q, key[0], widths, return_lse, options, functions)
    except ArgumentError as error:
        if type(error) is ArgumentError and error.argument in FIELD_OPTIONS:
            option = FIELD_OPTIONS[error.argument]
            raise ArgumentError(option, error.expected, error.got) from None
        raise
    inputs = _inputs(config, q, key, value, options, functions, names)
    sizes = _sizes(config, q, key[0], inputs, options)
    if recording.active is not None:
        rows = sizes["batch"] * sizes["heads"]
        recording.active.note(config, rows, sizes["q_len"], sizes["kv_len"])
    kernel = get_kernel(config, **sizes)
    if options.get("check", False):
        _check_contents(config, q, key[0], value[0], inputs, options.get("rope"))
    return Request(kernel, arrays, inputs)


def _on_stream(options: Options) -> AbstractContextManager[Any]:
    """The context of a call's stream; without a device of its own, it runs where the stream does.

    Raises:
        ArgumentError: no stream, or one of the CPU for a GPU's kernels.
    """
    stream, device = options["stream"], options.get("device")
    if not isinstance(stream, (mx.Stream, mx.Device, mx.DeviceType)):
        expected = "an mlx.core.Stream or mlx.core.Device, such as mx.cpu, or None"
        raise ArgumentError("stream", expected, brief(stream))
    kind = stream.device if isinstance(stream, mx.Stream) else stream
    if kind == mx.cpu and any(each.is_gpu for each in all_devices() if each.name == device):
        raise ArgumentError("stream", f"a stream of the GPU with device={device!r}", stream)
    return mx.stream(stream)


def _anywhere(options: Options) -> Options:
    left = options.copy()
    left["stream"] = None
    return left


def _widened(options: Options, functions: Functions) -> tuple[Options, Functions, dict[str, str]]:
    """The options and functions with masks said in one way, and the names that users know them by.

    What excludes each other is refused.
    """
    names = OPTIONS
    rope = options.get("rope")
    if rope is not None and not isinstance(rope, Rope):
        raise ArgumentError("rope", "a metalgen.Rope, or None", rope)
    options, functions = _with_block_mask(options, functions)
    mask = options.get("mask")
    cu_q, table = options.get("cu_seqlens_q"), options.get("block_table")
    if mask is not None:
        options = {**options}
        if isinstance(mask, str):
            if mask != "causal":
                raise ArgumentError("mask", MASKS, mask)
            options |= {"mask": None, "causal": True}
        elif isinstance(mask, mx.array) and mx.issubdtype(mask.dtype, mx.floating):
            if options.get("bias") is not None:
                expected = "booleans with a bias; write bias=bias + mask to add both"
                raise ArgumentError("mask", expected, str(mask.dtype))
            options |= {"mask": None, "bias": mask}
            names = names | {"bias": "mask"}
    if cu_q is None:
        for name in ("cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"):
            if options.get(name) is not None:
                raise ArgumentError(name, "None without cu_seqlens_q", options.get(name))
    else:
        counted = "counts the queries and keys of each sequence from 0"
        for name, given, instead in (
            ("bias", options.get("bias"), f"flex_attention's score_mod, which {counted}"),
            ("mask", options.get("mask"), f"flex_attention's mask_mod, which {counted}"),
            ("block_mask", functions.blocks, "mask_mod, and no block_mask"),
            ("kv_lens", options.get("kv_lens") if table is None else None, "cu_seqlens_k"),
            ("max_work", options.get("max_work"), "fewer sequences a call"),
        ):
            if given is not None:
                expected = f"None with cu_seqlens_q; use {instead}"
                raise ArgumentError(names.get(name, name), expected, brief(given))
        if table is not None and options.get("cu_seqlens_k") is not None:
            expected = "None with a block_table, where kv_lens says how many keys there are"
            given = options.get("cu_seqlens_k")
            raise ArgumentError("cu_seqlens_k", expected, brief(given))
    if table is not None and options.get("kv_lens") is None:
        raise MissingArgument("kv_lens", "with block_table: how many keys each sequence has")
    return options, functions, names


def _with_block_mask(options: Options, functions: Functions) -> tuple[Options, Functions]:
    """A block mask among the functions, wherever it was passed, and its array among the options."""
    mask, blocks = options.get("mask"), functions.blocks
    if isinstance(mask, BlockMask):
        if blocks is not None or functions.mask is not None:
            expected = "no block mask together with a mask_mod or a block_mask"
            raise ArgumentError("mask", expected, mask)
        functions = dataclasses.replace(functions, mask=mask.mask, blocks=mask)
        options = {**options, "mask": None}
        mask, blocks = None, mask
    if blocks is not None and blocks.mask is None:
        if mask is not None:
            expected = "None with the block mask of an array; combine both arrays with &"
            raise ArgumentError("mask", expected, brief(mask))
        options = {**options, "mask": blocks.array}
    return options, functions


def _config(
    q: mx.array,
    key: mx.array,
    widths: Mapping[str, Any],
    return_lse: bool,
    options: Options,
    functions: Functions,
) -> AttentionConfig:
    shape = q.shape
    fields: dict[str, Any] = {
        **widths,
        "heads_per_kv": shape[1] // key.shape[1],
        "return_lse": return_lse,
    }
    for name, given in options.items():
        if name in _FIELDS:
            fields[name] = given
        elif given is not None and name in _SWITCHES:
            fields[_SWITCHES[name]] = True
    slopes = options.get("alibi_slopes")
    fields["alibi_by_sequence"] = isinstance(slopes, mx.array) and slopes.ndim == 2
    if options.get("block_table") is not None:
        fields |= {"page_size": key.shape[2], "kv_lens": False}
    if (rope := options.get("rope")) is not None:
        fields |= {"rope": rope.style, "rope_dims": rope.dims, "rope_fixed": rope.one_position}
        fields["rope_tables"] = rope.tables is not None
    if functions is not NO_FUNCTIONS:
        fields["score_mod"] = None if functions.score is None else functions.score.graph.text
        fields["mask_mod"] = None if functions.mask is None else functions.mask.graph.text
        fields["block_mask"] = functions.blocks is not None
    if fields.get("array_mask") and not fields.get("mask_mod"):
        fields["block_mask"] = functions.blocks is not None or _finds_tiles(q, key, options)
    try:
        return _config_of(shape[3], str(q.dtype), **fields)
    except TypeError:  # what no dictionary takes, no config does, and it says so
        return AttentionConfig(shape[3], str(q.dtype), **fields)


def _finds_tiles(q: mx.array, key: mx.array, options: Options) -> bool:
    """Whether the tiles that an array of booleans leaves are found before the kernel runs."""
    batch, heads, q_len = q.shape[:3]
    if options.get("deterministic") or q_len <= DECODE_QUERIES:
        return False  # bits must not follow the size of the batch; decode reads no lists
    if options.get("block_table") is not None:
        return False  # with quantized pages Metal may have no buffer left for the list
    return finds_tiles(batch * heads, q_len, key.shape[2])


def _inputs(
    config: AttentionConfig,
    q: mx.array,
    key: tuple[mx.array, ...],
    value: tuple[mx.array, ...],
    options: Options,
    functions: Functions,
    names: Mapping[str, str],
) -> Inputs:
    """The other arrays of a call, in the types that kernels take."""
    if functions is NO_FUNCTIONS and config.kv_bits is None and _BRINGING.isdisjoint(options):
        return NOTHING  # soon said, for most calls
    if not needs_inputs(config) and options.get("dropout_key") is None:
        return NOTHING
    found: dict[str, Any] = {}
    required = config.input_names
    for option, each in _ARRAYS.items():
        given = options.get(option)
        if each.convert is not None and (given is not None or each.name in required):
            found[each.name] = each.convert(option, given, config)
    if config.varlen and config.page_size is None:
        cu_k = options.get("cu_seqlens_k")
        if cu_k is None and q.shape[2] != key[0].shape[2]:
            lengths = f"{q.shape[2]} and {key[0].shape[2]} rows"
            raise MissingArgument("cu_seqlens_k", f"where q and k differ in length ({lengths})")
        found["cu_k"] = found["cu_q"] if cu_k is None else integers("cu_seqlens_k", cu_k, 1)
    if config.kv_bits is not None:
        found |= {
            "k_scales": key[1],
            "k_biases": key[2],
            "v_scales": value[1],
            "v_biases": value[2],
        }
    offset = found.get("q_offset")
    if offset is not None and offset.ndim == 0:
        found["q_offset"] = mx.broadcast_to(offset, (_count(q, found),))
    rope = options.get("rope")
    if rope is not None:
        found |= rope.arrays(config.head_dim)
        found["rope_offset"] = _offsets(rope.offset, q, key[0], found)
    return Inputs(
        score=() if functions.score is None else functions.score.arrays,
        mask=() if functions.mask is None else functions.mask.arrays,
        blocks=functions.blocks,
        options=names,
        **found,
    )


def _count(q: mx.array, found: Mapping[str, Any]) -> int:
    """Number of sequences."""
    cu_q = found.get("cu_q")
    return int(q.shape[0]) if cu_q is None else max(1, cu_q.size - 1)


def _offsets(
    offset: int | mx.array | None, q: mx.array, key: mx.array, found: dict[str, Any]
) -> mx.array:
    """Positions of the sequences' first queries, ``(N,)``.

    By default their numbers, where these are given, or the end of their keys.
    """
    cu_q, cu_k, kv_lens = (found.get(name) for name in ("cu_q", "cu_k", "kv_lens"))
    count = _count(q, found)
    if offset is None and (own := found.get("q_offset")) is not None:
        return cast(mx.array, own)
    if isinstance(offset, mx.array):
        given = integers("rope.offset", offset, 0, 1)
        assert given is not None
        return given if given.ndim else mx.broadcast_to(given, (count,))
    if offset is not None:
        return mx.full((count,), offset, mx.int32)
    q_len = q.shape[2] if cu_q is None else cu_q[1:] - cu_q[:-1]
    if (used := found.get("seqused_q")) is not None and used.shape == (count,):
        q_len = mx.minimum(used, q_len)
    kv_len = key.shape[2] if cu_k is None else cu_k[1:] - cu_k[:-1]
    kv_len = kv_len if kv_lens is None else kv_lens
    lengths = [mx.array(x, mx.int32) for x in (kv_len, q_len)]
    if any(x.shape not in ((), (count,)) for x in lengths):
        return mx.zeros((count,), mx.int32)  # check_call says which of them does not fit
    return mx.broadcast_to(lengths[0] - lengths[1], (count,))


def _sizes(
    config: AttentionConfig, q: mx.array, key: mx.array, inputs: Inputs, options: Options
) -> dict[str, Any]:
    """What `get_kernel` chooses among tuned kernels by; a call may well be larger."""
    batch, heads, q_len = q.shape[:3]
    kv_len = max_kv_len(config, key, inputs)
    if inputs.cu_q is not None:
        batch = max(1, inputs.cu_q.size - 1)
        q_len = _longest("max_seqlen_q", options.get("max_seqlen_q")) or -(-q_len // batch)
        if config.deterministic and options.get("max_seqlen_q") is None:
            # One family, whatever else is packed beside a sequence.
            q_len = max(q_len, get_attention(ORDINARY).deterministic_q_len)
        if inputs.cu_k is not None:
            kv_len = -(-kv_len // batch)
        kv_len = _longest("max_seqlen_k", options.get("max_seqlen_k")) or kv_len
    return {
        "batch": max(1, min(batch, MAX_BATCH_HEADS // heads)),
        "heads": heads,
        "q_len": max(1, min(q_len, MAX_LENGTH)),
        "kv_len": max(1, min(kv_len, MAX_LENGTH)),
        "device": options.get("device"),
        "chip": options.get("chip"),
    }


def _longest(name: str, length: object) -> int | None:
    number = as_integer(length)
    if length is not None and (number is None or number < 0):
        raise ArgumentError(name, "a length, or None", brief(length))
    return number


def _check_contents(
    config: AttentionConfig,
    q: mx.array,
    key: mx.array,
    value: mx.array,
    inputs: Inputs,
    rope: Rope | None,
) -> None:
    from metalgen.contents import check_contents

    check_call(config, q, key, value, inputs)
    if rope is not None and rope.offset is None:
        # Ours; below 0 where there are more queries than keys, which is no mistake of the user's.
        inputs = dataclasses.replace(inputs, rope_offset=None)
    try:
        check_contents(config, q, key, inputs)
    except ValueError as error:
        if isinstance(error, ArgumentError) or "eval" not in str(error):
            raise
        expected = "False inside of mx.compile, where arrays have no contents yet"
        raise ArgumentError("check", expected, True) from None
