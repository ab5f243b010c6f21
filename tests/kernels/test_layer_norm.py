"""``layer_norm`` and ``rms_norm`` by their kernels."""

from ops.test_layer_norm import *  # noqa: F403
