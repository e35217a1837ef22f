"""Score and mask functions: MLX traces and differentiates them, this prints them for kernels."""
