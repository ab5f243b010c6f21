"""``residual``, alone and with a norm, by its kernels."""

from ops.test_residual import *  # noqa: F403
