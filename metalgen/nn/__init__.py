"""Attention layers for MLX's models, and the exchange of those that a model has."""

from metalgen.nn.benchmark import FlashAttentionBenchmark
from metalgen.nn.flash import MLXFlashAttention, OptimizedMLXMultiHeadAttention
from metalgen.nn.multi_head import MultiHeadAttention
from metalgen.nn.optimizing import Optimized, optimize

__all__ = [
    "FlashAttentionBenchmark",
    "MLXFlashAttention",
    "MultiHeadAttention",
    "Optimized",
    "OptimizedMLXMultiHeadAttention",
    "optimize",
]
