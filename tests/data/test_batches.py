"""Batches: the same step holds the same samples in any setting, and broken files are refused or replaced."""

import itertools
import logging
from dataclasses import replace

import pytest
import torch
from data._refused import refused
from models._small import assert_same_bits, small_config, small_model
from torch.utils.data import DataLoader

from onepeace_fast.config import AudioAdapterConfig
from onepeace_fast.data.batches import BatchSampler, BrokenFile, PairDataset, collate, generator_of
from onepeace_fast.data.manifest import Entry
from onepeace_fast.training.masks import audio_language_masks, vision_language_masks

numpy = pytest.importorskip("numpy")
soundfile = pytest.importorskip("soundfile")
pytest.importorskip("tokenizers")
pytest.importorskip("scipy")
Image = pytest.importorskip("PIL.Image")

from onepeace_fast.data.text import Tokenizer  # noqa: E402

CAPTIONS = [f"caption of number {place}, a {'very ' * place}short one" for place in range(10)]
SIDE = 16


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(CAPTIONS, 300)


@pytest.fixture
def images(tmp_path):
    """Ten pairs with images of noise."""
    noise = numpy.random.default_rng(0)
    entries = []
    for place, caption in enumerate(CAPTIONS):
        path = tmp_path / f"{place}.png"
        Image.fromarray(noise.integers(0, 256, (20, 28, 3), dtype="uint8")).save(path)
        entries.append(Entry(path, caption, place + 2))
    return entries


@pytest.fixture
def clips(tmp_path):
    """Three pairs with noise of 0.5, 1.5 and 15.25 seconds."""
    noise = numpy.random.default_rng(0)
    entries = []
    for place, seconds in enumerate((0.5, 1.5, 15.25)):
        path = tmp_path / f"{place}.wav"
        soundfile.write(path, noise.uniform(-0.9, 0.9, int(seconds * 16000)), 16000)
        entries.append(Entry(path, CAPTIONS[place], place + 2))
    return entries


def frames(samples):
    """One frame for every 320 samples, as the public model's extractor has it at the ends of its clips."""
    return samples // 320 - 1


def steps(sampler, count):
    return list(itertools.islice(sampler, count))


def test_an_epoch_takes_every_sample_once_but_for_the_ragged_rest():
    sampler = BatchSampler(11, 3, seed=1)
    assert sampler.steps_per_epoch == 3
    batches = steps(sampler, 7)
    assert [{epoch for epoch, _ in batch} for batch in batches] == [{0}] * 3 + [{1}] * 3 + [{2}]
    for epoch in (0, 1):
        indices = [index for batch in batches[3 * epoch : 3 * epoch + 3] for _, index in batch]
        assert len(set(indices)) == 9
        assert set(indices) < set(range(11))


def test_every_epoch_and_seed_has_an_order_of_its_own():
    orders = {
        tuple(index for batch in steps(BatchSampler(8, 2, seed, start_step=4 * epoch), 4) for _, index in batch)
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


def test_what_an_epoch_leaves_over_differs_from_epoch_to_epoch():
    sampler = BatchSampler(9, 4, seed=0)
    batches = steps(sampler, 40)
    left = [min(set(range(9)) - {i for batch in batches[2 * e : 2 * e + 2] for _, i in batch}) for e in range(20)]
    assert len(set(left)) > 4


@pytest.mark.parametrize("start", [0, 1, 3, 4, 5, 11])
def test_a_resumed_sampler_goes_on_exactly(start):
    assert steps(BatchSampler(13, 3, 7, start_step=start), 9) == steps(BatchSampler(13, 3, 7), start + 9)[start:]


def test_a_sampler_starts_anew_each_time_it_is_iterated():
    sampler = BatchSampler(5, 2, 7, start_step=3)
    assert steps(sampler, 4) == steps(sampler, 4)


def test_ranks_share_out_what_one_rank_would_take():
    whole = steps(BatchSampler(26, 12, 3), 5)
    ranks = [steps(BatchSampler(26, 4, 3, rank=rank, world_size=3), 5) for rank in range(3)]
    for step, batch in enumerate(whole):
        assert [sample for rank in ranks for sample in rank[step]] == batch


def test_sampling_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    steps(BatchSampler(9, 2, 3), 20)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"count": 7, "batch_size": 8}, ("batch_size: expected at most the 7 pairs", "got 8 on each of 1 ranks")),
        ({"count": 7, "batch_size": 4, "world_size": 2}, ("batch_size: ", "at most the 7 pairs", "got 4 on each of 2")),
        ({"count": 0, "batch_size": 1}, ("batch_size: expected at most the 0 pairs", "got 1")),
        ({"count": 7, "batch_size": 0}, ("batch_size: expected 1 or more, got int 0",)),
        ({"count": 7, "batch_size": 2.0}, ("batch_size: expected 1 or more, got float 2.0",)),
        ({"count": 7, "batch_size": 2, "start_step": -1}, ("start_step: expected 0 or more, got int -1",)),
        ({"count": 7, "batch_size": 2, "world_size": 0}, ("world_size: expected 1 or more, got int 0",)),
        ({"count": 7, "batch_size": 2, "world_size": 2, "rank": 2}, ("rank: expected 0 to 1, got 2",)),
    ],
)
def test_arguments_of_a_sampler_that_do_not_fit_are_refused(arguments, parts):
    refused(lambda: BatchSampler(seed=0, **arguments), *parts)


def test_as_many_samples_as_one_step_takes_are_enough():
    assert steps(BatchSampler(4, 2, 0, rank=1, world_size=2), 3)


def test_a_generator_depends_on_every_part_of_its_key():
    keys = [
        (0, "order", 1),
        (1, "order", 0),
        (1, "order", 1),
        (0, "augmentation", 1),
        (0, "order", 1, 0),
        (0, "order", 11),
        (0, "order"),
    ]
    draws = {torch.rand((), generator=generator_of(*key), dtype=torch.float64).item() for key in keys}
    assert len(draws) == len(keys)
    first, second = generator_of(0, "order", 1), generator_of(numpy.int64(0), "order", torch.tensor(1))
    assert torch.equal(first.get_state(), second.get_state())


def test_a_sample_is_a_function_of_seed_epoch_and_index(images, tokenizer):
    dataset = PairDataset(images, tokenizer, "image", side=SIDE, seed=5)
    again = PairDataset(images, tokenizer, "image", side=SIDE, seed=5)
    assert_same_bits(dataset[2, 3], again[2, 3])
    torch.rand(9)
    assert_same_bits(dataset[2, 3], again[2, 3])
    other = PairDataset(images, tokenizer, "image", side=SIDE, seed=6)
    crops = [dataset[2, 3]["image"], dataset[3, 3]["image"], other[2, 3]["image"]]
    assert all(not torch.equal(first, second) for first, second in itertools.combinations(crops, 2))


def test_held_out_samples_are_not_augmented(images, tokenizer):
    from onepeace_fast.data.image import prepare_image, read_image

    dataset = PairDataset(images, tokenizer, "image", side=SIDE, seed=None)
    for epoch in range(2):
        assert torch.equal(dataset[epoch, 4]["image"], prepare_image(read_image(images[4].path), SIDE))


def test_a_batch_of_images_holds_each_samples_own_caption(images, tokenizer):
    dataset = PairDataset(images, tokenizer, "image", side=SIDE, seed=0)
    batch = collate([dataset[0, 1], dataset[0, 7]])
    assert list(batch) == ["text", "word_starts", "image"]
    assert batch["image"].shape == (2, 3, SIDE, SIDE)
    for row, index in enumerate((1, 7)):
        ids, starts = tokenizer.encode(CAPTIONS[index])
        assert batch["text"][row].tolist() == ids + [1] * (batch["text"].shape[1] - len(ids))
        assert batch["word_starts"][row, : len(ids)].tolist() == starts
        assert torch.equal(batch["image"][row], dataset[0, index]["image"])


def test_a_batch_of_clips_says_which_frames_are_padding(clips, tokenizer):
    dataset = PairDataset(clips, tokenizer, "audio", side=None, seed=0)
    batch = collate([dataset[0, index] for index in range(3)], frames=frames)
    assert list(batch) == ["text", "word_starts", "audio", "audio_padding", "frames"]
    assert batch["audio"].shape == (3, 15 * 16000)
    assert batch["frames"] == [49, 74, 749]
    assert batch["audio_padding"].dtype == torch.bool
    assert (~batch["audio_padding"]).sum(1).tolist() == [50, 75, 750]
    assert batch["audio_padding"].shape == (3, 750)
    assert not batch["audio_padding"][:, 0].any()
    assert (batch["audio"][1, 24000:] == 0).all()
    assert batch["audio"][1, 23999] != 0


def test_the_models_losses_take_the_batches_as_they_are(images, clips, tokenizer):
    sizes = ((8, 10, 5), *[(8, 3, 2)] * 4, *[(8, 2, 2)] * 2)
    audio = AudioAdapterConfig(feature_layers=sizes, position_layers=2, position_width=10, position_groups=4)
    config = replace(small_config(audio=audio), vocab_size=tokenizer.vocab_size)
    model = small_model("fused", config, dtype=torch.float32)

    dataset = PairDataset(images, tokenizer, "image", side=48, seed=0)
    batch = collate([dataset[0, index] for index in range(3)])
    masks = vision_language_masks(batch["text"], batch.pop("word_starts"), 9, torch.Generator())
    assert model.vision_language_loss(**batch, masks=masks)["loss"].isfinite()

    dataset = PairDataset(clips[:2], tokenizer, "audio", side=None, seed=0)
    batch = collate([dataset[0, 0], dataset[0, 1]], frames=model.encoder_wrapper.adapters["audio"].frames)
    masks = audio_language_masks(batch["text"], batch.pop("word_starts"), batch.pop("frames"), torch.Generator())
    assert model.audio_language_loss(**batch, masks=masks)["loss"].isfinite()


def test_clips_without_a_function_for_frames_are_refused(clips, tokenizer):
    dataset = PairDataset(clips, tokenizer, "audio", side=None, seed=0)
    refused(lambda: collate([dataset[0, 0]]), "frames: expected a function", "AudioAdapter.frames, got None")


@pytest.mark.parametrize("broken", ["fatal", "skip"])
def test_workers_change_nothing(images, tokenizer, broken):
    dataset = PairDataset(images, tokenizer, "image", side=SIDE, seed=5, broken=broken)
    runs = []
    for workers in (0, 2):
        sampler = BatchSampler(len(dataset), 3, seed=1, start_step=2)
        loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers)
        runs.append(list(itertools.islice(loader, 4)))
    for first, second in zip(*runs, strict=True):
        assert_same_bits(first, second)


def test_a_broken_file_stops_with_one_line(images, tokenizer):
    images[3].path.write_bytes(b"no image")
    dataset = PairDataset(images, tokenizer, "image", side=SIDE, seed=5)
    dataset[0, 2]
    refused(lambda: dataset[0, 3], images[3].path, "got what does not decode as an image")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_file_stops_a_loader_with_the_same_line(images, tokenizer, workers):
    for entry in images:
        entry.path.write_bytes(b"no image")
    dataset = PairDataset(images, tokenizer, "image", side=SIDE, seed=5)
    loader = DataLoader(
        dataset, batch_sampler=BatchSampler(len(dataset), 2, seed=1), collate_fn=collate, num_workers=workers
    )
    with pytest.raises(
        BrokenFile, match=rf"^{images[0].path.parent}[^\n]*, got what does not decode as an image[^\n]*$"
    ):
        next(iter(loader))


@pytest.mark.slow
def test_a_broken_file_is_replaced_by_the_next_and_named_once(images, tokenizer, caplog):
    for place in (3, 4, 9):
        images[place].path.write_bytes(b"no image")
    dataset = PairDataset(images, tokenizer, "image", side=SIDE, seed=5, broken="skip")
    with caplog.at_level(logging.WARNING, logger="onepeace_fast"):
        for epoch in range(2):
            assert_same_bits(dataset[epoch, 3], dataset[epoch, 5])
            assert_same_bits(dataset[epoch, 9], dataset[epoch, 0])
    assert [message.partition(": ")[0] for message in caplog.messages] == [str(images[p].path) for p in (3, 4, 9)]
    assert all(message.endswith("the next pair takes its place") for message in caplog.messages)


def test_workers_name_a_broken_file_once_among_them(images, tokenizer, capfd):
    images[3].path.write_bytes(b"no image")
    dataset = PairDataset(images, tokenizer, "image", side=SIDE, seed=5, broken="skip")
    loader = DataLoader(dataset, batch_sampler=[[(0, 3)]] * 6, collate_fn=collate, num_workers=2)
    assert len(list(loader)) == 6
    assert dataset._reported.tolist() == [place == 3 for place in range(10)]


def test_a_clip_that_its_preparation_refuses_is_named_too(clips, tokenizer, monkeypatch):
    dataset = PairDataset(clips, tokenizer, "audio", side=None, seed=0)
    monkeypatch.setattr("onepeace_fast.data.batches.read_audio", lambda path: torch.zeros(9))
    refused(lambda: dataset[0, 1], f"{clips[1].path}: waveform: expected sound, got silence")


def test_nothing_but_broken_files_stops_with_one_line(images, tokenizer):
    for entry in images:
        entry.path.unlink()
    dataset = PairDataset(images, tokenizer, "image", side=SIDE, seed=5, broken="skip")
    refused(lambda: dataset[0, 3], images[3].path, "got 10 in a row")


def test_a_hundred_broken_files_in_a_row_stop_it(images, tokenizer, monkeypatch):
    entries = images * 30
    dataset = PairDataset(entries, tokenizer, "image", side=SIDE, seed=5, broken="skip")
    read = []
    monkeypatch.setattr(dataset, "_read", lambda epoch, place: read.append(place) or open_nothing())
    refused(lambda: dataset[0, 250], "", "fewer broken files, got 100 in a row")
    assert read == [place % 300 for place in range(250, 350)]


def open_nothing():
    raise ValueError("nothing")


def test_a_caption_that_does_not_fit_is_named_by_its_file_and_line(images, tokenizer):
    images[3] = images[3]._replace(caption=" ")
    with pytest.raises(ValueError, match=f"^{images[3].path}, line 5 of the manifest: caption: "):
        PairDataset(images, tokenizer, "image", side=SIDE, seed=0)


def test_captions_that_are_cut_are_counted(images, tokenizer, caplog):
    entries = [*images, Entry(images[0].path, "long " * 90, 12)]
    with caplog.at_level(logging.WARNING, logger="onepeace_fast"):
        dataset = PairDataset(entries, tokenizer, "image", side=SIDE, seed=0)
    assert dataset._captions.truncated == 1
    assert caplog.messages == ["captions: 1 of 11 have more than 70 tokens; each of these loses its end"]
    assert len(dataset[0, 10]["text"]) == 71


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"modality": "text", "side": None}, "modality: expected one of image, audio, got 'text'"),
        ({"side": None}, "side: expected a positive number of pixels for image, got None"),
        ({"side": 0}, "side: expected a positive number of pixels for image, got 0"),
        ({"modality": "audio"}, "side: expected None for audio, got 16"),
        ({"broken": "ignore"}, "broken: expected one of fatal, skip, got 'ignore'"),
        ({"entries": []}, "entries: expected at least one, got none"),
    ],
)
def test_arguments_of_a_dataset_that_do_not_fit_are_refused(images, tokenizer, changes, part):
    arguments = {"entries": images, "tokenizer": tokenizer, "modality": "image", "side": SIDE, "seed": 0} | changes
    refused(lambda: PairDataset(**arguments), part)


@pytest.mark.parametrize("key", [0, (0, 10), (0, -1), (0,), "01"])
def test_a_key_that_is_no_epoch_and_index_is_refused(images, tokenizer, key):
    dataset = PairDataset(images, tokenizer, "image", side=SIDE, seed=0)
    refused(lambda: dataset[key], "key: expected (epoch, index)")
