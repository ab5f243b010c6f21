"""The demo at a reduced size: what it learns from, that it learns, and that it would tell where the backends differ."""

import re
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from onepeace_fast import cli, demo
from onepeace_fast.backend import use_backend
from onepeace_fast.models import OnePeacePretrain

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from onepeace_fast.demo import data, experiment


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run on one CPU thread, as the demo does."""
    with demo.one_thread():
        yield


@pytest.fixture(scope="module")
def digits() -> tuple[data.Digits, data.Digits]:
    """The digits to learn from and those held out."""
    return data.load()


@pytest.fixture(scope="module")
def vocabulary() -> data.Vocabulary:
    """The words of the training captions."""
    return data.Vocabulary()


@pytest.fixture
def model(vocabulary) -> OnePeacePretrain:
    """The untrained model, the same one every time."""
    torch.manual_seed(0)
    return experiment.build(len(vocabulary)).eval()


def test_held_out_digits_are_the_last_forms_of_the_file(digits):
    training, held_out = digits
    assert len(training.labels) + len(held_out.labels) == 1797
    # Every form begins by the digits in order, three times.
    assert held_out.labels[:30].tolist() == list(range(10)) * 3
    assert training.images.shape[1:] == held_out.images.shape[1:] == (3, data.SIDE, data.SIDE)
    assert abs(training.images.mean()) < 0.05 and 0.8 < training.images.std() < 1.2


def test_held_out_captions_are_not_among_those_to_learn_from():
    learned = {data.caption(template, digit) for template in data.TRAINING_TEMPLATES for digit in range(10)}
    held_out = {data.caption(template, digit) for template in data.HELD_OUT_TEMPLATES for digit in range(10)}
    assert len(held_out) == 10 * len(data.HELD_OUT_TEMPLATES) and not held_out & learned


def test_captions_end_by_the_end_token_and_are_padded_behind_it(vocabulary):
    tokens = vocabulary.encode(["three", "a handwritten giraffe"])
    three, handwritten = vocabulary.ids["three"], vocabulary.ids["handwritten"]
    assert tokens.tolist() == [
        [three, data.END, data.PADDING, data.PADDING],
        [vocabulary.ids["a"], handwritten, data.UNKNOWN, data.END],
    ]
    assert min(vocabulary.ids.values()) == data.SPECIALS and max(vocabulary.ids.values()) == len(vocabulary) - 1


def test_every_group_of_a_batch_holds_each_digit_once_with_its_own_caption(digits, vocabulary):
    training, _ = digits
    texts, images = data.draw_batch(training, 3, vocabulary, torch.Generator().manual_seed(5))
    word_of = {number: word for word, number in vocabulary.ids.items()}
    digit_of = {**{name: d for d, name in enumerate(data.NAMES)}, **{str(d): d for d in range(10)}}
    said = [[digit_of[w] for w in (word_of.get(t, "") for t in row) if w in digit_of] for row in texts.tolist()]
    shown = [training.labels[(training.images == image).flatten(1).all(1)].unique().tolist() for image in images]
    assert said == shown
    for group in range(3):
        assert Counter(digit for row in said[10 * group : 10 * group + 10] for digit in row) == Counter(range(10))


def test_contrast_is_that_of_each_group_alone(model, digits, vocabulary):
    text, image = data.draw_batch(digits[0], 2, vocabulary, torch.Generator().manual_seed(5))
    with torch.no_grad():
        whole = experiment.contrast(model, text, image)
        parts = [experiment.contrast(model, text[rows], image[rows]) for rows in (slice(10), slice(10, 20))]
    torch.testing.assert_close(whole, (parts[0] + parts[1]) / 2)


def test_a_short_training_lowers_the_loss_and_names_more_digits_than_chance(model, digits, vocabulary):
    torch.manual_seed(1)
    with use_backend("reference"):
        losses = experiment.train(model, digits[0], vocabulary, steps=60, seed=1)
        found = experiment.accuracies(model, digits[1], vocabulary)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert sum(found.values()) / len(found) > 0.25


def test_the_same_seed_gives_the_same_training(model, digits, vocabulary):
    start = {name: value.clone() for name, value in model.state_dict().items()}
    runs = []
    for seed in (1, 1, 2):
        model.load_state_dict(start)
        torch.manual_seed(seed)
        with use_backend("reference"):
            runs.append(experiment.train(model, digits[0], vocabulary, steps=3, seed=seed))
    assert runs[0] == runs[1] != runs[2]


def test_accuracy_counts_the_digits_whose_own_caption_is_the_nearest(digits, vocabulary):
    held_out = data.Digits(digits[1].images[:40], digits[1].labels[:40])

    class Oracle:
        """Embeds a caption as its row, and every image as its digit, the fives as sixes."""

        logit_scale = torch.zeros(())

        def embed(self, *, text=None, image=None):
            rows = torch.arange(10) if text is not None else held_out.labels + (held_out.labels == 5).long()
            return torch.eye(10)[rows]

    found = experiment.accuracies(Oracle(), held_out, vocabulary)
    wrong = (held_out.labels == 5).sum().item()
    assert set(found) == set(data.HELD_OUT_TEMPLATES)
    assert list(found.values()) == pytest.approx([1 - wrong / 40] * len(found))


def test_padded_and_real_tokens_are_counted_with_both_cls(vocabulary):
    patches = (data.SIDE // 16) ** 2
    batch = (vocabulary.encode(["three", "a handwritten three"]), torch.zeros(2, 3, data.SIDE, data.SIDE))
    assert experiment.token_counts([batch]) == (2 * (5 + 1 + patches), 3 + 5 + 2 * (1 + patches))


def test_comparison_finds_both_backends_equal_and_times_each(model, digits, vocabulary):
    batches = experiment.pair_batches(data.Digits(digits[1].images[:20], digits[1].labels[:20]), vocabulary)
    result = experiment.compare(model, batches, rounds=1)
    assert set(result.differences) == {"embeddings", "encoder outputs", "gradients"}
    for what, difference in result.differences.items():
        assert result.magnitudes[what] > 0 and difference <= demo.AGREEMENT * result.magnitudes[what], what
    assert min(result.seconds.values()) > 0


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("difference", "code"), [(0.0, 0), (1e-6, 0), (1e-2, 1), (float("nan"), 1)])
def test_demo_runs_to_its_end_and_fails_where_the_backends_disagree(monkeypatch, capsys, two_threads, difference, code):
    compare = experiment.compare

    def disturbed(model, batches):
        result = compare(model, batches[:1], rounds=1)
        changed = result.differences["gradients"] + difference * result.magnitudes["gradients"]
        return result._replace(differences={**result.differences, "gradients": changed})

    monkeypatch.setattr(experiment, "compare", disturbed)
    assert cli.main(["demo", "--steps", "2", "--device", "cpu"]) == code
    assert torch.get_num_threads() == 2
    output = capsys.readouterr().out
    assert ("THE BACKENDS DISAGREE" in output) == bool(code)
    assert "What to try next" in output and len(re.findall(r"cpu +(?:reference|fused) ", output)) == 2
    assert max(map(len, output.splitlines())) <= 120


def test_demo_on_a_gpu_that_is_not_there_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["demo", "--device", "cuda"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and "no CUDA device" in printed.err


def test_interrupting_the_demo_leaves_no_stack_trace(monkeypatch, capsys):
    def interrupted(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "train", interrupted)
    assert cli.main(["demo", "--device", "cpu"]) == 130
    assert capsys.readouterr().err == "\nStopped.\n"


@pytest.mark.slow
def test_whole_demo_names_held_out_digits(monkeypatch, capsys):
    assert cli.main(["demo"]) == 0
    (average,) = re.findall(r"average +([0-9.]+)%", capsys.readouterr().out)
    assert float(average) >= 85
