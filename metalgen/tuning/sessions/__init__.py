"""Tuning one problem after another: by a device's clock, alone or shared, or by the chip model."""
