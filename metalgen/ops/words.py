"""The names that users know: of options, and in what they are told about them."""

from __future__ import annotations

import difflib
import re

from metalgen.errors import ArgumentError
from metalgen.ops.options import Options

KNOWN_OPTIONS = Options.__optional_keys__

USERS_NAMES = {
    "array_mask": "mask",
    "cu_k": "cu_seqlens_k",
    "cu_q": "cu_seqlens_q",
    "dtype": "q.dtype",
    "head_dim": "q.shape, head_dim",
    "k_biases": "k[2]",
    "k_scales": "k[1]",
    "page_size": "k.shape, keys of a page",
    "rope": "rope.style",
    "rope_dims": "rope.dims",
    "rope_freqs": "rope.freqs",
    "rope_offset": "rope.offset",
    "v_biases": "v[2]",
    "v_scales": "v[1]",
    "value_head_dim": "v.shape, value_head_dim",
}
"""What users call the fields of configs and inputs that have another name there."""


ELSEWHERE = {
    "attn_bias": "'bias'",
    "attn_mask": "'mask'",
    "block_mask": "metalgen.flex_attention, which takes 'block_mask'",
    "cache_seqlens": "'kv_lens'",
    "dropout_p": "'dropout'",
    "is_causal": "'causal'",
    "learnable_sink": "'sinks'",
    "logits_soft_cap": "'softcap'",
    "mask_mod": "metalgen.flex_attention, which takes 'mask_mod'",
    "page_table": "'block_table'",
    "return_attn_probs": "'return_lse'",
    "return_softmax_lse": "'return_lse'",
    "score_mod": "metalgen.flex_attention, which takes 'score_mod'",
    "sm_scale": "'scale'",
    "softmax_scale": "'scale'",
    "window_size": "'window_left' and 'window_right'",
}
"""What other libraries call an option, and what it is called here."""


class UsersWords:
    """Errors of configs and kernels, raised in here, leave it in the user's names."""

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if type(error) is not ArgumentError:
            return
        head = re.match(r"\w+", error.argument)
        if head and head[0] in self.names:
            error.argument = self.names[head[0]] + error.argument[head.end() :]
        error.expected = re.sub(
            r"\b(cu_[qk]|array_mask|[kv]_(scales|biases)|rope_(freqs|offset|dims))\b",
            lambda found: self.names[found[0]],
            error.expected,
        )
        error.args = (f"{error.argument}: expected {error.expected}, but got {error.got!r}",)


def unexpected(operation: str, options: Options) -> TypeError:
    """The error about the first option that there is not, with what was probably meant."""
    name = next(name for name in options if name not in KNOWN_OPTIONS)
    near = difflib.get_close_matches(name, [*KNOWN_OPTIONS, "scale", "return_lse"], 1, 0.5)
    instead = ELSEWHERE.get(name) or (repr(near[0]) if near else "")
    hint = f"; did you mean {instead}?" if instead else ""
    return TypeError(f"{operation}() got an unexpected keyword argument {name!r}{hint}")
