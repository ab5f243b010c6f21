"""The host side of every GPU test and of the GPU benchmark, run where there is no GPU: `make rehearse`.

- ``two_devices``: tensors that say they are on ``cuda:0`` and hold their values on the CPU. An op that mixes devices
  raises, and so does a read by the host where none is allowed.
- ``cuda_calls``: what ``torch.cuda`` answers here.
- ``driver``: Triton's own compiler, ptxas and launcher over ``libcuda.c``, a driver that checks and executes nothing.
- ``emulation``: the three together, as a context.
- ``plugin``: pytest on that device. ``benchmark``: ``benchmarks/gpu.py`` on it.
- ``run``: which tests, how long, and the line that says what was found. ``versions``: the same in other environments.

What it cannot show is what kernels compute: an op's launches are prepared and checked, its values are its reference's.
"""
