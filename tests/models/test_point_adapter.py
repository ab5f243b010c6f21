"""Point clouds: groups that depend on nothing but the cloud, a bias by cells, and what is refused."""

import math

import pytest
import torch
from data._refused import refused, taken
from models._added import CONFIG, check_others_keep_their_bits, check_packed_is_padded, check_rows_stand_alone, extended
from models._small import BACKENDS, assert_close, at_tokens, batch_of, valid_tokens

from onepeace_fast.layers.adapters import PointAdapter
from onepeace_fast.layers.adapters.points import farthest_points, group_points
from onepeace_fast.relative_position import window_table_rows


def make(config):
    return PointAdapter(config, features=1, groups=5, members=3, extent=2.0, bias_grid=3)


def clouds(counts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [4 * torch.rand(count, 4, generator=generator, dtype=torch.float64) - 2 for count in counts]


def batch(counts):
    return make(CONFIG).batch("other", clouds(counts))


def test_clouds_leave_all_other_outputs_bitwise_alone():
    check_others_keep_their_bits(make)


@pytest.mark.parametrize("counts", [[40, 4, 9], [2, 2], [5, 5, 5], [0, 6, 3]], ids=str)
def test_clouds_are_one_packed_and_padded_in_value_and_gradient(counts):
    check_packed_is_padded(make, batch(counts))


def test_clouds_that_are_all_empty_are_their_cls():
    inputs = batch([0, 0])
    assert inputs["other"].shape == (2, 0, 3, 4) and inputs["other_padding"].shape == (2, 1)
    assert extended(make).encode(**inputs)["other"].shape == (2, 1, 48)


@pytest.mark.parametrize("counts", [[1, 1], [0, 1]], ids=str)
def test_a_cloud_of_one_point_is_finite_in_value_and_gradient(counts):
    model = extended(make)
    embedded = model.embed(**batch(counts))
    embedded.sum().backward()
    assert embedded.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.encoder.adapter("other").parameters() if p.grad is not None)


def test_clouds_embed_as_they_do_alone_and_in_any_order_of_points():
    counts = [40, 4, 9]
    shuffled = [cloud[torch.randperm(len(cloud))] for cloud in clouds(counts)]
    check_rows_stand_alone(make, batch(counts), [make(CONFIG).batch("other", [cloud]) for cloud in shuffled])


def test_centres_are_the_farthest_from_those_chosen_before():
    (cloud,) = clouds([30])
    places = cloud[:, :3]
    chosen = farthest_points(places, 8)
    assert chosen[0] == int((places - places.mean(0)).norm(dim=1).argmax())
    for k in range(1, 8):
        nearest = [min(float((p - places[c]).norm()) for c in chosen[:k]) for p in places]
        assert nearest[chosen[k]] == max(nearest)


def test_twins_are_chosen_last_and_no_point_twice():
    twins = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 0, 0], [0, 2, 0], [1, 0, 0], [0, 0, 0]])
    chosen = farthest_points(twins, 10)
    assert sorted(chosen) == [*range(6)]
    assert {tuple(place) for place in twins[chosen[:3]].tolist()} == {(0, 0, 0), (1, 0, 0), (0, 2, 0)}
    same = torch.ones(4, 3)
    assert farthest_points(same, 4) == [0, 1, 2, 3]


def test_a_group_is_its_centre_and_the_points_nearest_to_it():
    (cloud,) = clouds([30])
    groups = group_points(cloud, 6, 4)
    for centre, group in zip(farthest_points(cloud[:, :3], 6), groups, strict=True):
        order = sorted(range(30), key=lambda i: float((cloud[i, :3] - cloud[centre, :3]).norm()))
        assert order[0] == centre and torch.equal(group, cloud[order[:4]])


def test_few_points_are_filled_with_the_centre_which_leads_before_its_twins():
    cloud = torch.tensor([[1.0, 0, 0, 7], [1, 0, 0, 8], [0, 0, 0, 9]])
    groups = group_points(cloud, 3, 5)
    assert groups.shape == (3, 5, 4)
    for group in groups:
        assert torch.equal(group[3:], group[:1].expand(2, -1)) and sorted(group[:3, 3].tolist()) == [7, 8, 9]
    assert sorted(groups[:, 0, 3].tolist()) == [7, 8, 9]


def test_groups_of_filled_up_points_embed_as_without():
    adapter = extended(make).encoder.adapter("other")
    value = group_points(clouds([2])[0], 2, 3)[None]
    filled = torch.cat([value[:, :, :2], value[:, :, 1:2]], dim=2)  # another member twice
    torch.testing.assert_close(adapter(value), adapter(filled))


def test_a_token_is_two_maxima_over_points_seen_from_their_centre_beside_its_place():
    adapter = extended(make).encoder.adapter("other")
    value = batch([9])["other"]
    found = adapter(value)[0]
    for group, token in zip(value[0], found[1:], strict=True):
        centre = group[0, :3] / 2
        radius = max((p[:3] / 2 - centre).norm() for p in group)
        seen = [torch.cat([(p[:3] / 2 - centre) / radius, radius[None], p[3:]]) for p in group]
        points = [adapter.embed_points(one) for one in seen]
        whole = torch.stack(points).max(0).values
        behind = [adapter.embed_groups(torch.cat([whole, point])) for point in points]
        expected = torch.stack(behind).max(0).values + adapter.embed_positions(centre)
        torch.testing.assert_close(token, expected)
    torch.testing.assert_close(found[0], adapter.cls_embedding[0, 0])


def test_two_groups_have_the_bias_of_the_cells_between_their_centres():
    model, value = extended(make), torch.zeros(1, 5, 3, 4, dtype=torch.float64)
    centres = [[-2.0, -2, -2], [2, 2, 2], [0, 0, 0], [-2, 1.9, 0], [-0.6, 0.6, 0.7]]
    cells = [[0, 0, 0], [2, 2, 2], [1, 1, 1], [0, 2, 1], [1, 1, 2]]
    value[0, :, :, :3] = torch.tensor(centres, dtype=torch.float64)[:, None]
    adapter = model.encoder.adapter("other")
    (ids,), index = adapter.position_ids(value), adapter.dense_table_index(adapter.position_count)
    assert ids[0] == 0 and adapter.position_count == 28
    for i, query in enumerate(cells):
        for j, key in enumerate(cells):
            x, y, z = (q - k + 2 for q, k in zip(query, key, strict=True))
            assert index[ids[1 + i], ids[1 + j]] == (x * 5 + y) * 5 + z
    assert window_table_rows(adapter.grid) == 125
    assert (index[0, 1:] == 125).all() and (index[1:, 0] == 126).all() and index[0, 0] == 127


def test_samples_without_a_cloud_are_one_packed_and_padded():
    inputs = {**batch_of(text=[7, 2, 5, 1]), **batch([40, 4, 0])}
    samples = {"text": [0, 1, 2, 3], "other": [3, 1, 2]}
    results = [extended(make, backend).encode(**inputs, samples=samples) for backend in BACKENDS]
    valid = valid_tokens(inputs) | {"other": ~inputs["other_padding"]}
    assert_close(*(at_tokens(outputs, valid) for outputs in results[::-1]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_clouds_of_unlike_cells_differ_by_their_bias(backend):
    """Without positions of their own, groups elsewhere in the cube differ by the bias alone; in the same cells not."""
    model = extended(make, backend)
    with torch.no_grad():
        for parameter in model.encoder.adapter("other").embed_positions.parameters():
            parameter.zero_()
    (cloud,) = clouds([12])
    cloud[:, :3] *= 0.1
    near, apart, moved = (group_points(cloud, 2, 3)[None].clone() for _ in range(3))
    apart[0, 0, :, 0] += 1.5
    moved[0, :, :, 0] += 1.3
    near, apart, moved = (model.embed(other=value) for value in (near, apart, moved))
    torch.testing.assert_close(moved, near, rtol=1e-9, atol=1e-9)
    assert (apart - near).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("given", "start", "part"),
    [
        ([], "other: expected at least one of clouds", "got none"),
        ([torch.zeros(4, 4), torch.zeros(4, 3)], "other, clouds[1]: expected [points, 4]", "float32 [4, 3]"),
        ([torch.zeros(4)], "other, clouds[0]: expected float32 or float64 [points, 4]", "float32 [4]"),
        ([torch.tensor([[0, 0, 0, math.nan]])], "other, clouds[0]: expected finite numbers", "others in 1 points"),
        (
            [torch.tensor([[0, 0, 2.5, 9]])],
            "other, clouds[0]: expected coordinates from -2.0 to 2.0",
            "got 2.5; centre",
        ),
    ],
)
def test_clouds_that_do_not_fit_are_refused_by_their_place(given, start, part):
    refused(lambda: make(CONFIG).batch("other", given), start, part)


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (torch.zeros(1, 6, 3, 4), "with groups up to 5, got float64 [1, 6, 3, 4]"),
        (torch.zeros(1, 5, 2, 4), "expected [rows, groups, 3, 4]"),
        (torch.zeros(1, 5, 4), "expected float64 [rows, groups, 3, 4], got float64 [1, 5, 4]"),
        (torch.full((1, 1, 3, 4), 3.0), "expected coordinates from -2.0 to 2.0, got 9 others; centre and scale"),
        (torch.full((1, 1, 3, 4), math.nan), "expected coordinates from -2.0 to 2.0, got 9 others"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_in_one_line(value, part):
    refused(lambda: extended(make).embed(other=value.double()), "other: ", part)


def test_the_most_groups_and_the_edge_of_the_cube_are_taken():
    with taken():
        edge = torch.full((1, 5, 3, 4), 2.0, dtype=torch.float64)
        assert extended(make).encode(other=edge)["other"].shape == (1, 6, 48)


def test_padding_at_cls_is_refused_in_one_line():
    inputs = batch([9, 4])
    inputs["other_padding"][1, 0] = True
    refused(lambda: extended(make).embed(**inputs), "other_padding: expected False at CLS")


@pytest.mark.parametrize(
    ("changed", "start"),
    [
        ({"extent": 0.0}, "extent: "),
        ({"groups": 0}, "groups: "),
        ({"members": 0}, "members: "),
        ({"bias_grid": 0}, "bias"),
        ({"features": -1}, "features: expected an integer of at least 0, got int -1"),
        ({"features": 0.5}, "features: expected an integer of at least 0, got float 0.5"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_one_line(changed, start):
    refused(lambda: PointAdapter(CONFIG, **changed), start)
