"""The kernel that makes rows of a cache: its source, its check, and its launches."""
