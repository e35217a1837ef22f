"""Lets these tests import `function_kernels`, whatever pytest is started from."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
