"""Benchmarks of layer calls: named sets of shapes, peers, timing, tables, files and plots."""
