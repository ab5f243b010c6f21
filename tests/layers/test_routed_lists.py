"""The lists of the routed modules' parameters, after what puts one in anew, and with hooks."""

import warnings

import pytest
import torch
from layers._routed import modules, one_by_one, plan_of, tokens
from support.contract import message_of
from torch import nn
from torch.nn.utils import parametrize, prune

IDS = [0, 1, 2, 0, 1]
LISTS = {"linear": "weight", "LayerNorm": "weight", "GeGLU": "w0.weight"}


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrized(weights):
    parametrize.register_parametrization(weights, "0", Twice())


def removed(weights):
    parametrized(weights)
    parametrize.remove_parametrizations(weights, "0")


def pruned(weights):
    prune.l1_unstructured(weights, "0", 0.5)


def pruned_for_good(weights):
    pruned(weights)
    prune.remove(weights, "0")


def under_old_weight_norm(weights):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        nn.utils.weight_norm(weights, "0")


def no_longer_under_weight_norm(weights):
    under_old_weight_norm(weights)
    nn.utils.remove_weight_norm(weights, "0")


def on_lists(*changes):
    """Each change in each module but weight_norm of a vector, which it refuses."""
    pairs = [(name, change) for name in LISTS for change in changes]
    pairs = [(name, change) for name, change in pairs if name != "LayerNorm" or "weight_norm" not in change.__name__]
    return pytest.mark.parametrize(("name", "change"), pairs)


@on_lists(removed, pruned_for_good, no_longer_under_weight_norm)
def test_a_parameter_that_was_put_in_anew_serves_its_own_modality(name, change):
    module, x = modules()[name], tokens(len(IDS))
    change(module.get_submodule(LISTS[name]))
    out = module(x, plan_of(IDS))
    torch.testing.assert_close(out, one_by_one(module.experts(), x, IDS, out.shape[1]), rtol=1e-10, atol=1e-10)


def test_a_parametrization_is_obeyed():
    module, x = modules()["linear"], tokens(len(IDS))
    plain, of_text = module(x, plan_of(IDS)), torch.tensor(IDS) == 0
    parametrized(module.weight)
    bias = module.bias[0]
    expected = torch.where(of_text[:, None], 2 * (plain - bias) + bias, plain)
    torch.testing.assert_close(module(x, plan_of(IDS)), expected, rtol=1e-10, atol=1e-10)


@on_lists(pruned, under_old_weight_norm)
def test_hooks_of_a_list_which_nothing_calls_are_refused(name, change):
    module = modules()[name]
    change(module.get_submodule(LISTS[name]))
    assert message_of(module, tokens(len(IDS)), plan_of(IDS)) == (
        "weight, bias: expected experts' parameters without hooks, which a list never calls, got one with; make it "
        "permanent, as prune.remove does, or take torch.nn.utils.parametrizations"
    )
