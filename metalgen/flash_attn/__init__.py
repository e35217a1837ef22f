"""flash-attn's interface, computed by metalgen: ``import metalgen.flash_attn as flash_attn``.

The same functions, arguments, layouts and conventions as flash-attn 2.8; docs/flash-attn.md says
what differs.
"""

from metalgen.flash_attn.flash_attn_interface import (
    flash_attn_combine,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from metalgen.flash_attn.kvcache import flash_attn_with_kvcache
from metalgen.flash_attn.paged import update_paged_kv_cache, validate_paged_kv_params
from metalgen.flash_attn.requirements import check_mlx_requirements

__all__ = [
    "check_mlx_requirements",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "update_paged_kv_cache",
    "validate_paged_kv_params",
]
