"""``routed_linear`` by its kernel."""

from ops.test_routed_linear import *  # noqa: F403
