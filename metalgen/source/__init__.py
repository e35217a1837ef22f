"""From a config and a schedule to the source of kernels, and digests of what was rendered."""
