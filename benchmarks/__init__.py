"""Benchmarks: timed with pytest-benchmark on a CPU, and by gpu.py on a GPU."""
