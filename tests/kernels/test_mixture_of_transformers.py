"""The recorded network of Mixture-of-Transformers by the kernels: each way once, which plans are one there."""

import pytest
from layers.test_mixture_of_transformers import check, test_small_inputs_show_the_norm_s_eps  # noqa: F401


@pytest.mark.filterwarnings("ignore:RoutedFFN")
@pytest.mark.parametrize(
    "case, way",
    [("overlap", "tokens"), ("empty1", "parts"), pytest.param("partition", "packed", marks=pytest.mark.slow)],
)
def test_outputs_and_every_gradient_are_the_recorded_ones(case, way):
    check(case, way)
