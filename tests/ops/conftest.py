"""In Triton's interpreter these tests run kernels, in memory that is filled with NaN as in ``tests/kernels``."""

from support.kernels import INTERPRETED

if INTERPRETED:
    from support.kernels import poisoned_memory  # noqa: F401  a fixture of all tests here
