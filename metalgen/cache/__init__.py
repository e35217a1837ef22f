"""Caches of keys and values: the kernel that appends to them, and classes that hold them."""
