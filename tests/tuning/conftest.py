"""Lets these tests import `tuning_fakes`, whatever pytest is started from."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
