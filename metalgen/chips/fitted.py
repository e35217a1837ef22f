"""Fitted coefficients of the chip model, as ``metalgen chips fit`` writes them."""

from __future__ import annotations

VALUES = {
    "matrix_wide": 1.423,
    "alu": 0.7272,
    "page": 3.056,
    "barrier": 16.35,
    "spill": 22.26,
    "spill_dynamic": 4.199,
    "in_step": 0.5232,
    "leak": 0.06996,
    "saturation": 0.6183,
    "stage_wait": 369.9,
    "parallel_issue": 0.743,
}
