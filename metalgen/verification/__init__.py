"""Proof that an installation computes the right thing on a device: what `metalgen verify` runs."""
