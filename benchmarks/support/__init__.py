"""What the benchmarks share: shapes, timing, the measured variants, reports."""
