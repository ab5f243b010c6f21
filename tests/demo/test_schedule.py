"""What the demos' loop does in every step, and which seed decides what."""

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
pytest.importorskip("scipy")

from onepeace_fast.demo import comparison, data, experiment, training
from onepeace_fast.training.optimizer import learning_rate


class Probe(torch.nn.Module):
    """A model of one weight, whose loss grows with it as steeply as is said."""

    def __init__(self, slope):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, 1))
        self.slope = slope
        self.modes = []

    def losses(self):
        self.modes.append(self.training)
        return self.slope * self.weight.sum(), torch.tensor(2.0)


@pytest.mark.parametrize(("slope", "norm"), [(1.0, 1.0), (50.0, 3.0)])
def test_a_step_sets_the_rate_clips_at_three_and_trains(monkeypatch, slope, norm):
    rates, norms, model = [], [], Probe(slope)

    def note(optimizer, *_):
        rates.append(optimizer.param_groups[0]["lr"])
        norms.append(model.weight.grad.norm().item())

    def adamw(*arguments):
        optimizer = make(*arguments)
        optimizer.register_step_pre_hook(note)
        return optimizer

    make = training.adamw
    monkeypatch.setattr(training, "adamw", adamw)
    assert experiment._train(model, model.losses, 20, "probe") == [2.0] * 20
    assert rates == [learning_rate(step, peak=training.PEAK, warm_up=2, total=20) for step in range(20)]
    assert norms == pytest.approx([norm] * 20, rel=1e-5)  # anew in every step
    assert model.modes == [True] * 20 and not model.training


def test_the_seed_decides_the_weights_that_a_model_starts_with():
    first, same, other = (experiment.build(30, seed).text_proj.weight for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert first.std().item() == pytest.approx(0.02 * 0.5396 * 12**0.5, rel=0.05)


@pytest.mark.parametrize("stage", ["image", "audio"])
def test_the_seed_decides_what_a_stage_learns_from(model, digits, vocabulary, stage, monkeypatch, request):
    class Drawn(Exception):
        """Stops the training where the first rows are drawn."""

    def note(*arguments):
        drawn.append(draw(*arguments))
        raise Drawn

    drawn, draw = [], experiment.draw_rows
    monkeypatch.setattr(experiment, "draw_rows", note)
    for seed in (1, 1, 2):
        with pytest.raises(Drawn):
            if stage == "image":
                experiment.train_image_text(model, digits[0], 1, vocabulary, seed)
            else:
                experiment.train_audio_text(model, request.getfixturevalue("spoken")[0], 1, vocabulary, seed)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_batches_reach_every_row_and_no_two_are_alike(digits):
    generator, labels = torch.Generator().manual_seed(0), digits[0].labels[:100]
    batches = [data.draw_rows(labels, 4, generator) for _ in range(60)]
    assert len({tuple(batch.tolist()) for batch in batches}) == 60
    assert torch.cat(batches).unique().numel() == 100
    assert all(batch.unique().numel() == 40 for batch in batches)


def test_images_are_moved_to_either_side(digits):
    image = digits[0].images[:1].repeat(300, 1, 1)
    moved = data.enlarge(image, torch.Generator().manual_seed(0))[:, 0] + 1
    column = torch.arange(data.SIDE, dtype=torch.float32)
    centre = (moved.sum(1) * column).sum(1) / moved.sum((1, 2))
    still = data.enlarge(image[:1])[:, 0] + 1
    middle = ((still.sum(1) * column).sum(1) / still.sum((1, 2))).item()
    assert centre.mean().item() == pytest.approx(middle, abs=0.4)
    assert centre.min() < middle - 1 and centre.max() > middle + 1


def test_a_fifth_of_the_words_beside_the_digit_is_left_out():
    digits, generator = torch.arange(10).repeat(50), torch.Generator().manual_seed(0)
    captions = data.draw_captions(["a b c d e f g h {name}"], digits, generator)
    left = sum(len(caption.split()) - 1 for caption in captions) / (8 * len(captions))
    assert left == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize("off", [0.9e-4, 1.1e-4])
def test_backends_disagree_from_a_ten_thousandth_of_the_largest_value_on(model, monkeypatch, off):
    values = torch.tensor([2.0, 1.0, -4.0], dtype=torch.float64)
    results = {"reference": values, "fused": values + torch.tensor([0.0, 4 * off, 0.0])}
    monkeypatch.setattr(comparison, "_results", lambda model, batches, backend: {"outputs": [results[backend]]})
    found = comparison.compare(model, "cpu", [])
    assert found.agree == (off < 1e-4)
    assert (found.largest_difference, found.largest_value) == pytest.approx((4 * off, 4.0))
