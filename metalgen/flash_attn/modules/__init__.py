"""Modules by flash-attn's names."""
