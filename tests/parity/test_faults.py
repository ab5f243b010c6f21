"""Faults in what the tool runs are seen: it compares with small recordings that its own reference made."""

from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from parity import _synthetic as synthetic

from examples import torchscale_multiway as example
from onepeace_fast import RoutedFFN, RoutedNorm, RoutePlan, relative_bias_attention
from tools.parity import mixture_of_transformers, torchscale
from tools.parity.recording import Recording
from tools.parity.report import Report, projections


@cache
def recording():
    return synthetic.multiway()


def attention(**changed: Callable) -> Callable:
    """Attention with some of its arguments changed."""
    return lambda qkv, **given: relative_bias_attention(
        qkv, **given | {name: change(given) for name, change in changed.items()}
    )


def swapped(self, weights, load=example.MultiwayEncoder.load_torchscale):
    """Sub-LayerNorm behind the output projection."""
    load(self, weights)
    for layer in self.layers:
        layer.inner_attn_ln, layer.out_proj = layer.out_proj, layer.inner_attn_ln


FAULTS = {
    "scale": ("relative_bias_attention", attention(scale=lambda given: 1.0), "split output"),
    "eps": ("RoutedNorm", partial(RoutedNorm, eps=1e-6), "eps_probe output"),
    "eps of the FFN": ("RoutedFFN", partial(RoutedFFN, eps=1e-6), "eps_probe output"),
    "direction": ("relative_bias_attention", attention(code=lambda given: -given["code"]), "split output"),
    "codes": (
        "relative_bias_attention",
        attention(code=lambda given: given["code"] * (1 - given["modality"])),
        "split",
    ),
    "no bias": ("relative_bias_attention", attention(bias=lambda given: [], code_offsets=lambda given: []), "split"),
    "order": ("relative_bias_attention", attention(order=lambda given: None), "caption output"),
    "tanh": ("RoutedFFN", partial(RoutedFFN, activation="gelu_tanh"), "split output"),
    "split": ("COPIES", ("B", "A"), "split output"),
}


@pytest.mark.parametrize("buckets", (8, 0))
def test_the_encoder_over_packed_rows_is_that_over_padded_ones(buckets):
    for backend in ("reference", "fused"):
        report = torchscale.compare(synthetic.multiway(buckets), backend)
        assert not report.failures, "\n".join(report.failures)
        assert report.count == 5 + 1 + 1 + 84 + bool(buckets) + 2  # outputs, state, dinput, gradients, sums


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_encoder_is_seen(fault, monkeypatch):
    name, wrong, seen = FAULTS[fault]
    monkeypatch.setattr(example, name, wrong)
    failures = torchscale.compare(recording(), "fused").failures
    assert any(failure.startswith(seen) for failure in failures), failures
    if fault == "order":
        assert len(failures) == 1


def test_a_sub_layer_norm_behind_the_projection_is_seen(monkeypatch):
    monkeypatch.setattr(example.MultiwayEncoder, "load_torchscale", swapped)
    monkeypatch.setattr(torchscale.Packed, "gradient", lambda self, name: None)
    failures = torchscale.compare(recording(), "fused").failures
    assert any(failure.startswith("split output: off by") for failure in failures), failures


def test_the_network_of_routed_experts_is_that_of_all_experts_and_a_fault_is_seen(monkeypatch):
    small = synthetic.mixture()
    for backend in ("reference", "fused"):
        report = mixture_of_transformers.compare(small, backend)
        assert not report.failures, "\n".join(report.failures)
        assert report.count == 3 * (1 + 1 + 4 * synthetic.EXPERTS)
    route = RoutePlan.from_token_masks
    reversed_masks = lambda masks, **how: route(dict(reversed(masks.items())), **how)  # noqa: E731
    monkeypatch.setattr(RoutePlan, "from_token_masks", reversed_masks)
    assert mixture_of_transformers.compare(small, "fused").failures
    monkeypatch.setattr(RoutePlan, "from_token_masks", route)
    assert not mixture_of_transformers.compare(small, "fused").failures


def test_one_wrong_entry_of_a_gradient_shows_in_what_is_left_of_it():
    gradient = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    left = Recording({f"{kind}.grad.w": value for kind, value in projections(gradient).items()}, {})
    wrong = gradient.clone()
    wrong[7, 11] += 0.1
    for got, failures in ((gradient, 0), (wrong, 2), (gradient.t(), 2), (None, 2)):
        report = Report()
        report.check_gradient(left, "grad.w", got)
        assert (report.count, len(report.failures)) == (2, failures)
