"""Depth and normal maps: the image's code over other channels, what is unknown, and what is refused."""

import math

import pytest
import torch
import torch.nn.functional as F
from data._refused import refused
from models._added import CONFIG, check_others_keep_their_bits, check_packed_is_padded, check_rows_stand_alone, extended
from models._small import small_model

from onepeace_fast.layers.adapters import DepthAdapter, NormalAdapter

ADAPTERS = [DepthAdapter, NormalAdapter]


def maker(kind):
    return lambda config: kind(config, position_grid=3, bias_grid=4)


def maps(kind, rows, side, unknown=0.2):
    """Depth between 0.5 and 20 metres, or normals, some of them unknown."""
    generator = torch.Generator().manual_seed(0)
    if kind is DepthAdapter:
        value = 0.5 + 19.5 * torch.rand(rows, 1, side, side, generator=generator, dtype=torch.float64)
    else:
        value = F.normalize(torch.randn(rows, 3, side, side, generator=generator, dtype=torch.float64), dim=1)
    return value * (torch.rand(rows, 1, side, side, generator=generator) >= unknown)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_maps_leave_all_other_outputs_bitwise_alone(kind):
    check_others_keep_their_bits(maker(kind))


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize(("rows", "side"), [(3, 16), (1, 64), (3, 48)])
def test_maps_are_one_packed_and_padded_in_value_and_gradient(kind, rows, side):
    check_packed_is_padded(maker(kind), {"other": maps(kind, rows, side)})


@pytest.mark.parametrize("kind", ADAPTERS)
def test_maps_without_anything_known_are_finite_in_value_and_gradient(kind):
    model = extended(maker(kind))
    inputs = {"other": maps(kind, 2, 32, unknown=2.0)}
    embedded = model.embed(**inputs)
    embedded.sum().backward()
    gradients = [p.grad for p in model.encoder.adapter("other").parameters() if p.grad is not None]
    assert embedded.isfinite().all() and len(gradients) > 5 and all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_maps_embed_as_they_do_alone(kind):
    value = maps(kind, 3, 32)
    value[2] = value[0]
    check_rows_stand_alone(maker(kind), {"other": value}, [{"other": one} for one in value.split(1)])


def test_the_stem_sees_the_logarithm_of_metres_and_where_they_are_known():
    adapter = extended(maker(DepthAdapter)).encoder.adapter("other")
    value = maps(DepthAdapter, 2, 32)
    seen = [[[math.log(m) if m else 0 for m in one], [float(m > 0) for m in one]] for one in value.flatten(1).tolist()]
    expected = adapter.embed_images(torch.tensor(seen, dtype=torch.float64).view(2, 2, 32, 32))
    torch.testing.assert_close(adapter.tokens(value)[:, 1:], expected.flatten(2).transpose(1, 2))


def test_normals_embed_as_an_image_s_channels():
    model = small_model("fused")
    model.add_modality("other", NormalAdapter(model.config.encoder, position_grid=3, bias_grid=4))
    image, normals = model.encoder.adapter("image"), model.encoder.adapter("other")
    normals.load_state_dict(image.state_dict())
    value = maps(NormalAdapter, 2, 32)
    assert torch.equal(normals(value), image(value))


def test_numbers_that_are_no_depth_and_no_normal_are_counted():
    depth = torch.tensor([0.0, 1e-3, 1e4, -1.0, math.inf, math.nan]).view(1, 1, 1, 6)
    ((count, _),) = DepthAdapter(CONFIG).faults("other", depth, None)
    assert int(count) == 3
    normals = torch.tensor([[0.0, 0.0, 0.0], [0.6, 0.0, 0.8], [0.6, 0.0, 0.81], [1.0, 1.0, 0.0], [0.1, 0.0, 0.0]])
    normals = torch.cat([normals, torch.full((1, 3), math.nan)]).t().view(1, 3, 1, 6)
    ((count, _),) = NormalAdapter(CONFIG).faults("other", normals, None)
    assert int(count) == 3


def test_normals_in_half_precision_are_unit_vectors():
    normals = maps(NormalAdapter, 2, 64).bfloat16()
    ((count, _),) = NormalAdapter(CONFIG).faults("other", normals, None)
    assert int(count) == 0


@pytest.mark.parametrize(
    ("kind", "value", "part"),
    [
        (DepthAdapter, torch.ones(2, 3, 32, 32), "expected a square [rows, 1, side, side] with side a multiple of 16"),
        (NormalAdapter, torch.ones(2, 1, 32, 32), "expected a square [rows, 3, side, side] with side a multiple of 16"),
        (DepthAdapter, torch.ones(2, 1, 20, 20), "with side a multiple of 16, got float64 [2, 1, 20, 20]"),
        (DepthAdapter, torch.ones(2, 1, 80, 80), "expected a side of at most 64, got 80"),
        (DepthAdapter, torch.ones(2, 32, 32), "expected float64 [rows, 1, side, side], got float64 [2, 32, 32]"),
        (DepthAdapter, -torch.ones(1, 1, 16, 16), "metres, 0 where unknown, got 256 negative or not finite"),
        (NormalAdapter, torch.ones(1, 3, 16, 16), "expected unit vectors, zeros where unknown, got 256 others"),
    ],
)
def test_maps_that_do_not_fit_are_refused_in_one_line(kind, value, part):
    refused(lambda: extended(maker(kind)).embed(other=value.double()), "other: ", part)
