"""Between any kind of plan and the end of the backward pass the host never waits for the GPU.

The same runs on an emulated GPU, without one: see ``tools/rehearsal``. ``tests/ops/test_synchronization.py`` shows it
for the ops' references on fake tensors.
"""

import contextlib

import pytest
import torch

from onepeace_fast import RoutedFFN, RoutedLinear, RoutedNorm, RoutePlan
from onepeace_fast.config import TransformerConfig
from onepeace_fast.layers.transformer import Transformer

pytestmark = pytest.mark.gpu

LENGTHS = {"text": [5, 7, 3], "image": [4, 10, 6]}
WIDTHS = {"text": 7, "image": 10}
WIDTH = 64


def from_lengths():
    return RoutePlan.from_lengths(LENGTHS, device="cuda")


def refillable():
    """Filled once more, as a captured graph's plan is."""
    plan = RoutePlan.from_lengths(LENGTHS, device="cuda", widths=WIDTHS, capacity=48)
    others = {"text": [1, 2, 3], "image": [3, 2, 1]}
    plan.copy_(RoutePlan.from_lengths(others, device="cuda", widths=WIDTHS, capacity=48))
    return plan


def from_masks(known=LENGTHS):
    masks = {
        name: (torch.arange(WIDTHS[name]) < torch.tensor(lengths)[:, None]).cuda() for name, lengths in LENGTHS.items()
    }
    return RoutePlan.from_masks(masks, lengths=known)


def from_masks_alone():
    return from_masks(None)  # which reads their lengths, once


def from_ids():
    ids = torch.tensor([0, 1, 1, 0, 0, 1], device="cuda")
    return RoutePlan.from_modality_ids(ids, ("text", "image"), sample_ids=ids.flip(0), sample_count=2)


def from_token_masks():
    ids = torch.tensor([0, 1, 1, 2, 0, 1], device="cuda")  # one token in no mask
    return RoutePlan.from_token_masks({"text": ids == 0, "image": ids == 1}, inert=True, last_wins=True)


def from_indices():
    return RoutePlan.from_indices({"text": [4, 0], "image": [1, 2, 5, 3]}, 6, device="cuda")


PLANS = (from_lengths, refillable, from_masks, from_masks_alone, from_ids, from_token_masks, from_indices)


@contextlib.contextmanager
def waits_refused():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def step(model, plan, x, bias):
    model(x, plan, [bias]).float().square().mean().backward()


@pytest.mark.parametrize("drop_path", (0.0, 0.4))
@pytest.mark.parametrize("make", PLANS, ids=lambda make: make.__name__)
def test_nothing_waits_between_the_plan_and_the_end_of_the_backward_pass(make, drop_path):
    config = TransformerConfig(
        embed_dim=WIDTH, ffn_embed_dim=96, layers=2, attention_heads=2, drop_path_rate=drop_path, head_scale=True
    )
    model = Transformer(config).cuda().to(torch.bfloat16)
    plan = make()
    if drop_path:
        keep = torch.ones(2, 2, plan.sample_count)
        keep[1, :, 0] = 0
        plan = plan.with_drop_path(keep)
    x = torch.randn(plan.capacity, WIDTH, device="cuda", dtype=torch.bfloat16)
    bias = [torch.randn(2, 2 * offset + 4, device="cuda", requires_grad=True) for offset in plan.code_offsets]
    step(model, plan, x, bias)  # the first round loads libraries and compiles, which may wait
    with waits_refused():
        step(model, plan, x, bias)


ROUTED = {
    "linear": lambda: RoutedLinear(2, WIDTH, WIDTH),
    "norm": lambda: RoutedNorm(2, WIDTH, "rms_norm"),
    "gate, norm behind": lambda: RoutedFFN(2, WIDTH, 96, activation="silu", output_norm="rms_norm"),
    "biases, Sub-LayerNorm": lambda: RoutedFFN(2, WIDTH, 96, gated=False, hidden_bias=True, sub_norm="layer_norm"),
}


@pytest.mark.parametrize("name", ROUTED)
@pytest.mark.parametrize("make", PLANS[4:], ids=lambda make: make.__name__)
def test_nothing_waits_in_a_routed_module_from_the_route_to_the_end_of_the_backward_pass(make, name):
    module = ROUTED[name]().cuda().to(torch.bfloat16)
    x = torch.randn(6, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    plan = make()
    for context in (contextlib.nullcontext, waits_refused):  # the first round loads libraries and compiles
        with context():
            for out in (module(x, plan), module(plan.pack(x), plan, packed=True)):
                out.float().square().mean().backward()
