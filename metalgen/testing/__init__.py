"""Conformance suites: a device or a store is tested by inheriting one. And MLX's kernels.

The suites need pytest, which metalgen itself does not depend on.
"""

from __future__ import annotations

import sys

_SUITES = (
    "backward",
    "base",
    "devices",
    "features",
    "functions",
    "store_base",
    "store_keeping",
    "stores",
)

if "pytest" in sys.modules:  # whose failures then show what was compared, as those of tests do
    sys.modules["pytest"].register_assert_rewrite(*(f"{__name__}.{name}" for name in _SUITES))
