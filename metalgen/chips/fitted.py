"""Fitted coefficients of the chip model, as ``metalgen chips fit`` writes them."""

from __future__ import annotations

VALUES = {
    "matrix": 16.79,
    "matrix_wide": 1.716,
    "alu": 0.7923,
    "page": 2.974,
    "barrier": 15.96,
    "spill": 4.498,
    "leak": 0.04157,
    "saturation": 0.6122,
    "stage_wait": 305.5,
    "parallel_issue": 0.6687,
}
