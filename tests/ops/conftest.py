"""In Triton's interpreter these tests run kernels, in memory that is filled with NaN as in ``tests/kernels``."""

from support.attention_ways import kernel, padded, slower_path, way  # noqa: F401  fixtures of attention's tests
from support.kernels import INTERPRETED

if INTERPRETED:
    from support.kernels import poisoned_memory  # noqa: F401  a fixture of all tests here
