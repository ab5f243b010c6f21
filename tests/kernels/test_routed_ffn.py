"""``routed_ffn`` by its kernels: each strategy of them."""

from ops.test_routed_ffn import *  # noqa: F403
