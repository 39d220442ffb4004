"""Benchmarks: one file each, every figure beside that of a peer measured in the same run. `python -m minids.bench NAME`."""
