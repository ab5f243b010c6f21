"""``gated_sub_ln`` by its kernels."""

from ops.test_gated_sub_ln import *  # noqa: F403
