"""A cost model of the compiled Triton kernels: what machine code and public rates of a GPU say that they take.

Nothing here was measured on a GPU. ``onepeace_fast/estimate/constants.json`` has every rate with its source.
"""
