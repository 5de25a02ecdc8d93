"""Compares fusedrnn with torch.nn: ``python -m benchmarks --help``."""
