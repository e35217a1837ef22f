"""Conformance suites: a new device is tested by inheriting one. And MLX's kernels, to compare with.

The suites need pytest, which metalgen itself does not depend on.
"""
