"""Classes that hold keys and values for the next call."""
