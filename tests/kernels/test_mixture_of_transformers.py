"""The recorded network of Mixture-of-Transformers by the kernels."""

from layers.test_mixture_of_transformers import *  # noqa: F403
