"""Hooks of all modules, and settings that all modules share: the fused path sees them too."""

import warnings

import pytest
import torch
from models._small import BACKENDS, assert_close, small_model
from models.test_changed_modules import CONFIG, check_obeyed, two_steps
from models.test_passes import vision_language
from torch import nn

from onepeace_fast.layers.adapters import Adapter


def doubled_at_parts(gradients):
    return tuple(None if gradient is None else 2 * gradient for gradient in gradients)


pytestmark = pytest.mark.filterwarnings("ignore")  # of parts that are not fused
WATCHED = (nn.Linear, nn.LayerNorm)
ON_EVERYTHING = {
    "forward_hook": lambda module, inputs, output: 0.5 * output if isinstance(module, WATCHED) else None,
    "forward_pre_hook": lambda module, inputs: (0.5 * inputs[0],) if isinstance(module, WATCHED) else None,
    "full_backward_hook": lambda module, into, out: doubled_at_parts(into) if isinstance(module, WATCHED) else None,
    "full_backward_pre_hook": lambda module, out: doubled_at_parts(out) if isinstance(module, WATCHED) else None,
}


@pytest.mark.parametrize("kind", ON_EVERYTHING)
def test_hooks_of_each_kind_of_all_modules_are_obeyed_by_both_backends(kind):
    handle = getattr(nn.modules.module, f"register_module_{kind}")(ON_EVERYTHING[kind])
    try:
        check_obeyed("", None)
    finally:
        handle.remove()


def test_an_epsilon_that_all_norms_share_is_obeyed_and_stays_fused():
    def change_all(owner, place, module):
        norms = [norm for norm in module.modules() if isinstance(norm, nn.LayerNorm)]
        assert len(norms) > 8
        for norm in norms:
            norm.eps = 0.3

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reference, fused = (two_steps(backend, "", change_all) for backend in BACKENDS)
    assert_close(fused, reference, 1e-9)


def test_hooks_of_all_modules_reach_the_adapters_of_a_step():
    def halve(module, inputs, output):
        return 0.5 * output if isinstance(module, Adapter) else None

    name, inputs = vision_language()

    def losses(backend):
        return {"loss": small_model(backend, CONFIG)(name, **inputs)["loss"].detach()}

    plain = losses("reference")
    handle = nn.modules.module.register_module_forward_hook(halve)
    try:
        reference, fused = map(losses, BACKENDS)
    finally:
        handle.remove()
    assert_close(fused, reference, 1e-9)
    assert not torch.allclose(reference["loss"], plain["loss"], rtol=1e-3)
