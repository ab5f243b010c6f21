"""What routing costs: building a route plan of 1,000 to 10,000 tokens, against one layer's forward pass over them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.support import shapes
from benchmarks.support.encoder import EncoderCase
from benchmarks.support.report import Report
from benchmarks.support.shapes import Shape, Sizes
from benchmarks.support.timing import paired
from onepeace_fast.route_plan import RoutePlan

SIZES = Sizes(width=512, hidden=2048, heads=8)
GOAL = 0.02
BUILDERS = ("from_lengths", "from_masks", "from_modality_ids")
TITLE = f"Route plan against one layer's forward pass, width {SIZES.width}, text+image"


def shape_of(tokens: int) -> Shape:
    """Text and image samples of at least about this many tokens in all."""
    samples = math.ceil(tokens / (257 + 39.5))
    return Shape("text+image", {"text": shapes.text(samples), "image": shapes.image(samples)})


def builder(name: str, case: EncoderCase) -> Callable[[], RoutePlan]:
    """A call that builds the plan of a case in one of the three ways, from what a user would hold."""
    lengths, plan = case.shape.lengths, case.plan
    masks = {name: tokens.valid for name, tokens in case.tokens.items()}
    sample_major = torch.argsort(plan.sample, stable=True)
    modality, sample = plan.modality[sample_major], plan.sample[sample_major]
    return {
        "from_lengths": lambda: RoutePlan.from_lengths(lengths, first_is_cls=True),
        "from_masks": lambda: RoutePlan.from_masks(masks, first_is_cls=True),
        "from_modality_ids": lambda: RoutePlan.from_modality_ids(
            modality, plan.modalities, sample_ids=sample, sample_count=plan.sample_count
        ),
    }[name]


def layer_call(case: EncoderCase) -> Callable[[], torch.Tensor]:
    """A call that runs one layer forward over the case's packed tokens, without gradients."""
    x = case.plan.pack({name: tokens.x.detach() for name, tokens in case.tokens.items()})
    bias = [vector.detach() for vector in case.stack.bias({n: p.width for n, p in case.tokens.items()})[0]]
    layer = case.stack.fusion_model.layers[0]

    def call() -> torch.Tensor:
        with torch.no_grad():
            return layer(x, case.plan, bias)

    return call


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize(
    "tokens", [1000, pytest.param(3000, marks=pytest.mark.full), pytest.param(10000, marks=pytest.mark.full)]
)
def test_route_plan(tokens: int, name: str, benchmark: Any, report: Report, case_seconds: float) -> None:
    """One way to build a plan, with a timed layer before every round."""
    case = EncoderCase(shape_of(tokens), SIZES)
    plan, layer = paired(benchmark, builder(name, case), layer_call(case), seconds=case_seconds / 6, rounds=30, least=7)
    share = plan.median / layer.median
    verdict = "met" if share < GOAL else "missed"
    measured = {
        "builder": name,
        "real_tokens": case.shape.real_tokens,
        "samples": case.shape.samples,
        "plan": plan.record(),
        "layer_forward": layer.record(),
        "share": round(share, 5),
        "goal": GOAL,
        "verdict": verdict,
    }
    benchmark.extra_info.update(measured)
    shown = {
        "builder": name,
        "tokens": str(case.shape.real_tokens),
        "plan ms": f"{plan.median * 1e3:.2f}",
        "layer ms": f"{layer.median * 1e3:.1f}",
        "rounds": str(len(plan.seconds)),
        "share": f"{share:.2%}",
        "goal": f"{GOAL:.0%}",
        "": verdict,
    }
    report.add(TITLE, shown, measured, footer="Wall-clock medians, plan and layer in turn.")
