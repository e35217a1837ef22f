"""What attention to compute: the config, the arrays of a call, and the size of the work."""
