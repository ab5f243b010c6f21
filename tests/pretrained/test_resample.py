"""Tables and positions for larger images: the geometric places of upstream's formula, and what the model then takes."""

import numpy
import pytest
import torch
import torch.nn.functional as F
from data._refused import refused
from models._encoder_only import classify, retrieval
from models._small import image_batch, small_config
from pretrained._files import checkpoint_of, write

from onepeace_fast import from_pretrained
from onepeace_fast.pretrained.resample import resample_positions, resample_table

pytest.importorskip("scipy")
TABLE = "encoder_wrapper.image_adapter.rel_pos_table_list.{}.weight"


def test_a_table_of_a_cubic_is_that_cubic_at_the_old_places_of_the_new_distances():
    """A bicubic spline reproduces a cubic exactly, so the places of its knots are all that is left to be seen."""
    old, new = 4, 5
    ratio = numpy.roots([1, 1, 1 - (new - 1)]).max()  # 1 + q + q^2 = 4
    reached = numpy.cumsum([ratio**step for step in range(old - 1)])
    knots = torch.from_numpy(numpy.concatenate([-reached[::-1], [0], reached]))

    def cubic(y, x):
        return 0.01 * y[:, None] ** 3 - 0.02 * x**2 * y[:, None] + 0.3 * x - 0.1

    expected = cubic(*(torch.arange(1.0 - new, new, dtype=torch.float64),) * 2).flatten()
    cls = torch.tensor([5.0, 6.0, 7.0], dtype=torch.float64)
    table = torch.cat([cubic(knots, knots).flatten(), cls])[:, None].repeat(1, 2)
    table[:, 1] *= 2
    actual = resample_table(table, new)
    assert actual.shape == ((2 * new - 1) ** 2 + 3, 2)
    # The ratio is found to 1e-6, and upstream's arithmetic is in float32.
    torch.testing.assert_close(actual[:-3, 0], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual[:, 1], 2 * actual[:, 0], rtol=1e-5, atol=1e-5)
    assert torch.equal(actual[-3:, 0], cls) and resample_table(table.bfloat16(), new).dtype == torch.bfloat16


def test_positions_are_resampled_bicubically_and_cls_is_kept():
    positions = torch.randn(10, 8)
    grid = positions[1:].view(3, 3, 8).permute(2, 0, 1)[None]
    expected = F.interpolate(grid, size=(5, 5), mode="bicubic")[0].permute(1, 2, 0).reshape(25, 8)
    actual = resample_positions(positions, 5)
    assert torch.equal(actual[0], positions[0])
    torch.testing.assert_close(actual[1:], expected)


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_model_for_larger_images_has_resampled_tables_and_takes_them(tmp_path, per_layer):
    values = checkpoint_of(retrieval("text", "image", bias_table_per_layer=per_layer))
    path = write(tmp_path / "a.pt", values)
    loaded = from_pretrained(path, image_size=96)
    tables = range(2 if per_layer else 1)
    own = loaded.to_upstream_state_dict()
    for layer in tables:
        name = TABLE.format(layer)
        assert torch.equal(own[name], resample_table(values["model"][name], 6))
    assert loaded.load_report.resampled == [f"{TABLE.format(layer)} from 4 x 4 to 6 x 6 patches" for layer in tables]
    others = {name for name in own if "image_adapter.rel_pos_table" not in name}
    assert all(torch.equal(own[name], values["model"][name]) for name in others)
    assert loaded.embed(image=image_batch(2, 6, dtype=torch.float32)).isfinite().all()
    loaded.save(tmp_path / "ours")
    again = from_pretrained(tmp_path / "ours")
    assert again.config == loaded.config and not again.load_report.resampled
    larger = from_pretrained(tmp_path / "ours", image_size=112)
    assert larger.config.encoder.image.bias_grid == 7


def test_a_smaller_size_keeps_the_table_which_covers_it(tmp_path):
    values = checkpoint_of(classify("image"))
    loaded = from_pretrained(write(tmp_path / "a.pt", values), image_size=32)
    assert not loaded.load_report.resampled
    assert loaded.config.encoder.image.bias_grid == 4


def test_one_resampled_table_is_copied_to_every_layer(tmp_path):
    values = checkpoint_of(retrieval("text", "image"), copies=True)
    loaded = from_pretrained(write(tmp_path / "a.pt", values), image_size=80)
    own = loaded.to_upstream_state_dict()
    assert torch.equal(own[TABLE.format(0)], own[TABLE.format(1)]) and len(own[TABLE.format(1)]) == 9**2 + 3


def test_an_image_size_that_is_none_and_a_bucket_of_another_size_are_refused(tmp_path):
    values = checkpoint_of(retrieval("image"))
    path = write(tmp_path / "a.pt", values)
    for size in (100, 0, -16, 96.0):
        refused(lambda size=size: from_pretrained(path, image_size=size), f"{path}: image_size: ", str(size))
    values["model"]["encoder_wrapper.image_adapter.rp_bucket"] += 1
    write(path, values)
    refused(lambda: from_pretrained(path, image_size=96), f"{path}: state_dict: ", "rp_bucket of 4 x 4 patches")


def test_the_small_model_s_table_is_for_four_patches():
    assert small_config().encoder.image.bias_grid == 4
