"""What users call with arrays, one module an operation."""
