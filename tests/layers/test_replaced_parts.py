"""Modules that are put in the place of a routed module's or an attention's parts are called as they stand."""

import pytest
import torch
from layers._routed import DIM, FORMS, HIDDEN, NAMES, ffn, plan_of, tokens
from support.contract import message_of
from torch import nn

from onepeace_fast import RelativeBiasAttention, RoutedLinear, RoutedNorm, RoutePlan
from onepeace_fast.layers import plain

pytestmark = pytest.mark.filterwarnings("ignore:RoutedFFN")
IDS = [0, 1, 2, 0]
PARTS = ("w0", "w1", "w2", "sub_norm", "output_norm")
PLACES = [(form, part) for form in FORMS for part in PARTS if getattr(ffn(form), part) is not None]
TAKES_A_PLAN = (
    "{}: expected a module that is called with packed rows and a plan, (rows, plan, packed=True), as {} is, got a {} "
    "that is not"
)


class Adapted(nn.Module):
    """A routed module and a low-rank change of it, or a change by one number."""

    def __init__(self, base):
        super().__init__()
        rows, *columns = base.weight[0].shape
        self.base, self.shift = base, nn.Parameter(torch.ones(rows, dtype=torch.float64))
        self.down = nn.Linear(*columns, 2, bias=False).double() if columns else None
        self.up = nn.Linear(2, rows, bias=False).double()

    def forward(self, rows, plan, packed=False):
        out = self.base(rows, plan, packed=packed) + self.shift
        return out if self.down is None else out + self.up(self.down(rows))


@pytest.mark.parametrize("form, part", PLACES)
def test_an_adapter_around_a_part_is_called_and_trains(form, part):
    module, plan, x = ffn(form), plan_of(IDS), tokens(4)
    network = module.experts()
    adapted = Adapted(getattr(module, part))
    setattr(module, part, adapted)
    out = module(x, plan)

    class Expert(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            y = self.base(x) + adapted.shift
            return y if adapted.down is None else y + adapted.up(adapted.down(x))

    for expert in network:
        setattr(expert, part, Expert(getattr(expert, part)))
    torch.testing.assert_close(out, torch.cat([network[m](x[t : t + 1]) for t, m in enumerate(IDS)]))
    out.sum().backward()
    assert adapted.shift.grad.abs().sum() > 0
    assert (
        message_of(module.experts) == f"{part}: expected a RoutedLinear or RoutedNorm, got a Adapted; take it out first"
    )


@pytest.mark.parametrize("form, part", PLACES)
def test_a_part_that_takes_no_plan_is_refused_by_its_name(form, part):
    module = ffn(form)
    kind = type(getattr(module, part)).__name__
    setattr(module, part, nn.Linear(DIM, HIDDEN))
    assert message_of(module, tokens(4), plan_of(IDS)) == TAKES_A_PLAN.format(part, kind, "Linear")


def test_inert_tokens_are_zero_behind_an_adapter_and_the_plan_is_still_checked():
    module = ffn("GeGLU")
    module.w2 = Adapted(module.w2)
    masks = {name: torch.tensor([[m == i for i in (0, 1, 2, 5)]]) for m, name in enumerate(NAMES)}
    plan = RoutePlan.from_token_masks(masks, inert=True)
    out = module(plan.pack(tokens(4)), plan, packed=True)
    assert out[3].abs().sum() == 0 and out[:3].abs().min() > 0
    two = RoutePlan.from_modality_ids(torch.tensor([0, 1]), NAMES[:2])
    said = "plan: expected one of 3 modalities, one for each expert of this {}, got one of 2, ['text', 'image']"
    assert message_of(module, tokens(2), two) == said.format("RoutedFFN")
    for part in ("w0", "w1"):
        setattr(module, part, Adapted(getattr(module, part)))
    assert message_of(module, tokens(2), two) == said.format("RoutedLinear")


@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj", "out_proj", "norm"])
def test_an_attention_gives_the_plan_to_what_is_around_a_routed_module(part):
    torch.manual_seed(0)
    plan, x = plan_of(IDS), tokens(4)
    attention = RelativeBiasAttention(DIM, 2, norm=RoutedNorm(3, DIM)).double()
    routed = RoutedNorm(3, DIM) if part == "norm" else RoutedLinear(3, DIM, DIM)
    setattr(attention, part, routed.double())
    before = attention(x, plan)
    adapted = Adapted(routed)
    setattr(attention, part, adapted)
    out = attention(x, plan)
    assert not torch.allclose(out, before) or part == "k_proj"  # softmax takes no notice of what all keys have
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(attention, fullgraph=True, backend="eager")(x, plan), out)
    with torch.no_grad():
        for parameter in (adapted.shift, adapted.up.weight):
            parameter.zero_()
    torch.testing.assert_close(attention(x, plan), before)
    setattr(attention, part, nn.Sequential(routed))
    assert message_of(attention, x, plan) == TAKES_A_PLAN.format(part, "RoutedLinear", "Sequential")


def test_a_network_with_an_adapter_says_once_that_it_is_not_fused_and_compiles_in_one_graph():
    module, plan, x = ffn("GeGLU"), plan_of(IDS), tokens(4)
    module.w0 = Adapted(module.w0)
    plain._warn.cache_clear()
    with pytest.warns(RuntimeWarning, match="RoutedFFN: expected a plain RoutedLinear, to be fused, got Adapted"):
        out = module(x, plan)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="eager")(x, plan), out)
