"""Layers by flash-attn's names."""
