"""Fitted coefficients of the chip model, as ``metalgen chips fit`` writes them."""

from __future__ import annotations

VALUES = {
    "matrix_wide": 1.421,
    "alu": 0.7248,
    "page": 3.053,
    "barrier": 16.35,
    "spill": 22.28,
    "spill_dynamic": 4.199,
    "in_step": 0.5231,
    "leak": 0.06993,
    "saturation": 0.6217,
    "stage_wait": 370.9,
    "parallel_issue": 0.7443,
}
