"""What is put around the table of a ``RelativeBias``, or in it, is obeyed in value and gradient, or refused."""

import pytest
import torch
from support.contract import message_of
from torch import nn
from torch.nn.utils import parametrize, prune

from onepeace_fast import RelativeBias

HEADS, LENGTH = 2, 9
EMBEDDINGS = {
    "t5": (lambda: RelativeBias.t5(HEADS, 8, 20), "relative_attention_bias", LENGTH),
    "one_peace series": (lambda: RelativeBias.one_peace(HEADS, buckets=4), "rel_pos_table_list.0", LENGTH),
    "one_peace grid": (lambda: RelativeBias.one_peace(HEADS, grid=3), "rel_pos_table_list.0", None),
}


class Adapted(nn.Module):
    """A low-rank change beside an embedding, behind its ``weight``, as peft has it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(base.num_embeddings, 1, dtype=torch.float64))
        self.up = nn.Parameter(torch.randn(1, base.embedding_dim, dtype=torch.float64))

    @property
    def weight(self):
        return self.base.weight

    def forward(self, ids):
        return self.base(ids) + self.down[ids] @ self.up


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def drawn(make) -> RelativeBias:
    torch.manual_seed(0)
    bias = make().double()
    nn.init.normal_(bias.table)
    return bias


def with_table(make, table) -> RelativeBias:
    """A plain bias of the same kind with another table."""
    bias = make().double()
    bias.load_state_dict(dict.fromkeys(bias.state_dict(), table))
    return bias


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_an_adapter_around_an_embedding_is_obeyed_and_trains(name):
    make, place, length = EMBEDDINGS[name]
    bias = drawn(make)
    adapted = Adapted(bias.get_submodule(place))
    bias.set_submodule(place, adapted)
    out = bias.vector(length)
    changed = with_table(make, (adapted.base.weight + adapted.down @ adapted.up).detach())
    want = changed.vector(length)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (want * weight).sum().backward()
    gradient = changed.table.grad
    torch.testing.assert_close(adapted.up.grad, adapted.down.detach().T @ gradient, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(adapted.base.weight.grad, gradient, rtol=1e-10, atol=1e-10)


def hooked(embedding):
    embedding.register_forward_hook(lambda module, ids, out: 2 * out)


def parametrized(embedding):
    parametrize.register_parametrization(embedding, "weight", Twice())


@pytest.mark.parametrize("change", [hooked, parametrized])
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_hooks_and_parametrizations_of_an_embedding_are_obeyed(name, change):
    make, place, length = EMBEDDINGS[name]
    bias = drawn(make)
    want = 2 * bias.vector(length)
    change(bias.get_submodule(place))
    assert torch.equal(bias.vector(length), want)


def test_hooks_for_all_modules_are_obeyed():
    bias = drawn(EMBEDDINGS["t5"][0])
    want = 2 * bias.vector(LENGTH)
    everywhere = nn.modules.module.register_module_forward_hook(
        lambda module, ids, out: 2 * out if isinstance(module, nn.Embedding) else out
    )
    with everywhere:
        found = bias.vector(LENGTH)
    assert torch.equal(found, want)


def test_an_embedding_whose_settings_change_its_call_is_called():
    bias = drawn(EMBEDDINGS["t5"][0])
    other = nn.Embedding(8, HEADS, padding_idx=0, dtype=torch.float64)
    bias.relative_attention_bias = other
    bias.vector(LENGTH).sum().backward()
    assert not other.weight.grad[0].any() and other.weight.grad[1:].any()


def test_a_parametrized_table_is_obeyed_and_a_pruned_one_refused():
    bias = drawn(lambda: RelativeBias.swin(3, HEADS))
    want = 2 * bias.vector()
    parametrize.register_parametrization(bias, "relative_position_bias_table", Twice())
    assert torch.equal(bias.vector(), want)
    bias = drawn(lambda: RelativeBias.swin(3, HEADS))
    prune.l1_unstructured(bias, "relative_position_bias_table", 0.5)
    assert message_of(bias.vector) == (
        "bias: expected none with hooks, which nothing calls, got one with; make them permanent, as by prune.remove"
    )
    prune.remove(bias, "relative_position_bias_table")
    vector = bias.vector()
    assert vector.shape == (HEADS, 28) and (vector == 0).sum() == HEADS * 3 + HEADS * 25 // 2
