"""Batches of UnIVAL's tasks: equal shares, epochs of each task, the same samples in any setting, unfit maps."""

import itertools
from collections import Counter

import pytest
import torch
from data._refused import refused

pytest.importorskip("tokenizers")
numpy = pytest.importorskip("numpy")

from onepeace_fast.data.batches import BrokenFile  # noqa: E402
from onepeace_fast.data.task_batches import Part, TaskDataset, TaskSampler, collate_tasks  # noqa: E402
from onepeace_fast.data.task_files import Files  # noqa: E402
from onepeace_fast.data.tasks import Sample, Vocabulary  # noqa: E402
from onepeace_fast.data.text import Tokenizer  # noqa: E402

COUNTS = {"caption": 10, "vqa": 3, "video_caption": 4}
STAGES = [Part(("caption", "vqa"), 9), Part(("video_caption", "caption", "vqa"), 6)]


def sampled(batch_size=12, seed=0, **keys):
    return list(TaskSampler(COUNTS, STAGES, batch_size, seed, **keys))


def indices(batches, task):
    return [index for batch in batches for name, index in batch if name == task]


def test_every_batch_has_equally_many_of_each_of_its_stages_tasks():
    found = [Counter(task for task, _ in batch) for batch in sampled()]
    assert found == [{"caption": 6, "vqa": 6}] * 9 + [{"video_caption": 4, "caption": 4, "vqa": 4}] * 6


@pytest.mark.parametrize("task", COUNTS)
def test_a_task_comes_in_whole_epochs_of_its_own_orders_across_stages(task):
    own, count = indices(sampled(), task), COUNTS[task]
    epochs = [own[place : place + count] for place in range(0, len(own) - count + 1, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len(epochs) > 1 and len({tuple(epoch) for epoch in epochs}) > 1
    assert indices(sampled(seed=1), task) != own


def test_tasks_of_one_size_have_orders_of_their_own():
    found = list(TaskSampler({"caption": 20, "vqa": 20}, [Part(("caption", "vqa"), 1)], 40, 0))
    assert indices(found, "caption") != indices(found, "vqa")


@pytest.mark.parametrize("start", [1, 9, 11, 15])
def test_a_later_start_goes_on_as_it_would_have(start):
    assert sampled(start=start) == sampled()[start:]


def test_two_processes_take_together_what_one_takes():
    whole = sampled()
    halves = [sampled(batch_size=6, rank=rank, world_size=2) for rank in range(2)]
    for batch, *parts in zip(whole, *halves, strict=True):
        assert sorted(itertools.chain(*parts)) == sorted(batch)


def test_a_batch_that_cannot_be_shared_equally_is_refused():
    refused(lambda: sampled(batch_size=8), "batch_size: ", "multiple of 3", "video_caption, caption, vqa", "got 8")


@pytest.fixture
def maps(tmp_path):
    """Samples over maps, the second of which is no file of numpy."""
    numpy.save(tmp_path / "image.npy", numpy.arange(30, dtype="float16").reshape(5, 2, 3))
    numpy.save(tmp_path / "larger.npy", numpy.zeros((5, 3, 3), "float32"))
    numpy.save(tmp_path / "video.npy", numpy.ones((5, 2, 2, 2), "float64"))
    (tmp_path / "broken.npy").write_text("no map")
    return tmp_path


def dataset(maps, broken="fatal", longest=(64, 64)):
    tokenizer = Tokenizer.train(["what colour is it? a red box falls yes no"], 300)
    words = Vocabulary(tokenizer, tokenizer.vocab_size + 10, bins=10)
    samples = {
        "vqa": [Sample(maps / "image.npy", "what colour is it?", "red", 1), Sample(maps / "broken.npy", "a?", "no", 2)],
        "grounding": [Sample(maps / "larger.npy", "a box", "<bin_0> <bin_9>", 3)],
        "video_caption": [Sample(maps / "video.npy", "a box?", "a box falls", 4)],
    }
    return TaskDataset(samples, words, files=Files(5), longest=longest, broken=broken), words


def test_a_batch_has_begun_questions_ended_answers_and_the_maps_of_their_samples(maps):
    data, words = dataset(maps)
    batch = collate_tasks([data["video_caption", 0], data["vqa", 0], data["video_caption", 0]])
    asked, written = (words.tokens(text)[0] for text in ("what colour is it?", "red"))
    assert batch["source"][1].tolist() == [0, *asked, 2]
    target = batch["target"][1].tolist()
    assert target == [*written, 2] + [1] * (len(target) - len(written) - 1)
    assert batch["samples"] == {"video": [0, 2], "image": [1]}
    assert batch["tasks"] == ["video_caption", "vqa", "video_caption"]
    assert batch["image"].dtype == batch["video"].dtype == torch.float32
    assert torch.equal(batch["image"], torch.arange(30.0).view(1, 5, 2, 3))
    assert batch["video"].shape == (2, 5, 2, 2, 2)
    assert data["grounding", 0]["target"].tolist() == [*words.tokens("<bin_0> <bin_9>")[0], 2]
    assert len(data) == 4


def test_a_long_text_is_cut_to_the_positions_there_are(maps):
    data, words = dataset(maps, longest=(4, 3))
    found = data["vqa", 0]
    assert found["source"].tolist() == [0, *words.tokens("what colour is it?")[0][:2], 2]
    assert data["video_caption", 0]["target"].tolist() == [*words.tokens("a box falls")[0][:2], 2]


def test_a_broken_map_stops_or_the_next_sample_of_the_task_takes_its_place(maps):
    data, _ = dataset(maps)
    with pytest.raises(BrokenFile) as caught:
        data["vqa", 1]
    assert f"{maps / 'broken.npy'}: expected an array, a .npy file" in str(caught.value)
    skipping, _ = dataset(maps, broken="skip")
    assert skipping["vqa", 1]["path"] == maps / "image.npy"
    assert torch.equal(skipping["vqa", 1]["source"], skipping["vqa", 0]["source"])


def test_maps_that_do_not_fit_are_refused(maps):
    image = maps / "image.npy"
    refused(lambda: Files(4).read(image, "image"), image, "[4, height, width], got float16 [5, 2, 3]")
    refused(lambda: Files(5).read(image, "video"), image, "map of video", "frames")
    numpy.save(maps / "odd.npy", numpy.full((5, 1, 1), numpy.nan))
    refused(lambda: Files(5).read(maps / "odd.npy", "audio"), maps / "odd.npy", "finite")
    numpy.save(maps / "odd.npy", numpy.zeros((5, 1, 1), "int64"))
    refused(lambda: Files(5).read(maps / "odd.npy", "audio"), maps / "odd.npy", "floating point")
    data, _ = dataset(maps)
    line = refused(lambda: collate_tasks([data["vqa", 0], data["grounding", 0]]), maps / "larger.npy", "[5, 3, 3]")
    assert str(image) in line
