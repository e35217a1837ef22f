"""Benchmarks of attention that mean something: what `metalgen bench` measures, and how."""
