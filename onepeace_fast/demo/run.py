"""One run of the demo, what it prints, and what it leaves in its folder: the report and the trained model."""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from onepeace_fast.demo import comparison, costs, data, experiment, gains, report, seeds, speech
from onepeace_fast.demo.embedding_map import embedding_map
from onepeace_fast.demo.experiment import Steps
from onepeace_fast.demo.familiarity import Familiarity, calibrate
from onepeace_fast.demo.percent import percent
from onepeace_fast.demo.result import Result
from onepeace_fast.demo.training import timed
from onepeace_fast.info import format_table
from onepeace_fast.installation import program_command
from onepeace_fast.models.pretrain import OnePeacePretrain

MODEL = "model"


@dataclasses.dataclass(frozen=True)
class Options:
    """What of a run can be chosen: the seed, the steps, the denoising task, "cpu" or "cuda", and where to write."""

    seed: int
    steps: Steps
    denoise: bool
    device: str
    output: Path


def run(options: Options) -> int:
    """Train, measure, print and write the report; returns 0, or 1 where the two backends disagree."""
    result, model, familiarity = measure(options)
    model.save(options.output / MODEL)
    familiarity.save(options.output / MODEL)
    note_place(options.output)
    page = report.write(result, options.output)
    _print_result(result, page, options.output)
    return 0 if all(row.agree for row in result.comparisons) else 1


def run_seeds(options: Options, count: int) -> int:
    """The same run for each of several seeds: prints every figure and their spread, and keeps them as JSON."""
    results = []
    for seed in range(options.seed, options.seed + count):
        results.append(measure(dataclasses.replace(options, seed=seed))[0])
        path = _write_spread(results, options)
    _print_spread(results, path)
    return 0 if all(row.agree for result in results for row in result.comparisons) else 1


def record_file() -> Path:
    """Where the folder of the last run is noted, for ``--wav`` in another one."""
    return speech.cache_folder() / "last-demo.txt"


def note_place(output: Path) -> None:
    """Note the folder of this run."""
    path = record_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.fsencode(output.resolve()))
    except OSError as error:
        print(f"Where the model is cannot be noted for --wav in other folders: {error}")


def measure(options: Options) -> tuple[Result, OnePeacePretrain, Familiarity]:
    """Both stages and everything that the report shows; returns the trained model and its measure of sounds too."""
    seconds: dict[str, float] = {}
    with timed(seconds, "sounds"):
        spoken, spoken_held_out = speech.load(speech.plan())
    written, written_held_out = data.load()
    vocabulary = data.Vocabulary()
    model = experiment.build(len(vocabulary), options.seed, options.denoise).to(options.device)
    _print_setup(model, written, written_held_out, spoken, spoken_held_out, options)
    training = (vocabulary, options.seed, options.denoise)
    losses, steps = {}, options.steps
    with timed(seconds, "stage 1"):
        losses["image-text"] = experiment.train_image_text(model, written, steps.image_text, *training)
    images = experiment.image_embeddings(model, written_held_out.images)
    sounds_before = experiment.sound_embeddings(model, spoken_held_out.sounds)
    before = experiment.similarity(sounds_before, images)
    with timed(seconds, "stage 2"):
        losses["audio-text"] = experiment.train_audio_text(model, spoken, steps.audio_text, *training)
    with timed(seconds, "evaluation"):
        sounds = experiment.sound_embeddings(model, spoken_held_out.sounds)
        after = experiment.similarity(sounds, images)
        captions = experiment.image_text_accuracy(model, images, written_held_out.labels, vocabulary)
        vectors = experiment.bias_vectors(model, vocabulary)
        familiarity = calibrate(model, spoken, sounds)
        labels = written_held_out.labels.tolist()
        places = embedding_map(images.numpy(), labels, sounds_before.numpy(), sounds.numpy(), spoken_held_out.labels)
    with timed(seconds, "backends"):
        parts = costs.stages(model, written, spoken, vocabulary, options.seed)
        tokens, measured = costs.count_tokens(model, parts), costs.measure(model, parts)
        comparisons = [
            comparison.compare(model, device, comparison.pair_batches(written_held_out, spoken_held_out, vocabulary))
            for device in (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
        ]
    result = Result(
        seed=options.seed,
        device=_device_name(options.device),
        steps={"image-text": steps.image_text, "audio-text": steps.audio_text},
        seconds=seconds,
        losses=losses,
        images=written_held_out.images.numpy(),
        image_labels=labels,
        sounds=spoken_held_out.sounds,
        sound_labels=spoken_held_out.labels,
        sound_voices=[clip.voice for clip in spoken_held_out.clips],
        similarity=after,
        similarity_before=before,
        image_text_accuracy=captions,
        bias_vectors=vectors,
        comparisons=comparisons,
        costs=measured,
        tokens=tokens,
        map=places,
        parameters=_parameters(model),
    )
    return result, model, familiarity


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device


def _parameters(model: OnePeacePretrain) -> int:
    return sum(parameter.numel() for parameter in model.encoder_wrapper.parameters())


def _print_setup(
    model: OnePeacePretrain, written: data.Digits, written_held_out: data.Digits, spoken: speech.Speech,
    spoken_held_out: speech.Speech, options: Options,
) -> None:  # fmt: skip
    encoder, steps = model.config.encoder, options.steps
    held_out_voices = ", ".join(dict.fromkeys(clip.voice for clip in spoken_held_out.clips))
    example = data.caption(data.IMAGE_TEMPLATES[10], 3)
    rows = [
        ("Images", f"{len(written.labels):,} digits in real handwriting; {len(written_held_out.labels)} more held out"),
        ("Sounds", f"{len(spoken.sounds):,} digits in synthetic speech; {len(spoken_held_out.sounds)} more, held out,"),
        ("", f"by voices never trained with: {held_out_voices}"),
        ("Captions", f'from templates: "{example}"'),
        ("Model", f"{encoder.layers} layers of width {encoder.embed_dim}, {_parameters(model):,} parameters"),
        ("Stage 1", f"{steps.image_text} steps, images with captions"),
        ("Stage 2", f"{steps.audio_text} steps, sounds with captions; attention, text and images are frozen"),
        ("Task", "contrast and denoising" if options.denoise else "contrast"),
        ("Run", f"on {_device_name(options.device)}, seed {options.seed}, "
                f"{report.backend()} backend, one CPU thread"),
    ]  # fmt: skip
    print("A small ONE-PEACE learns handwritten digits and spoken digits by captions alone: no image is ever paired")
    print("with a sound. Then each sound looks for its image.\n")
    print(format_table(rows) + "\n", flush=True)


def _print_result(result: Result, page: Path, output: Path) -> None:
    rows = [
        ("right digit first, of what was held out", "before stage 2", "now"),
        ("sound finds image", percent(result.sound_to_image_before, 1), percent(result.sound_to_image, 1)),
        ("image finds sound", percent(result.image_to_sound_before, 1), percent(result.image_to_sound, 1)),
        ("a blind guess", "10.0%", "10.0%"),
    ]
    worst = min(result.accuracy_per_voice.items(), key=lambda item: item[1])
    print(f"\n{format_table(rows)}\n")
    named = statistics.mean(result.image_text_accuracy.values())
    print(f"  {percent(named, 1)} of the images find their caption, in words never trained with.")
    print(f"  The hardest voice is {worst[0]}: {percent(worst[1])}.")
    for sentence in report.agreement(result.comparisons):
        print(f"  {sentence}")
    print("\n  Time and memory of training batches, forward and backward, beside the reference:")
    measured = (*gains.speed(result.costs), *gains.memory(result.costs), gains.padding(result.tokens))
    for sentence in (*measured, *gains.why_slower(result.costs, experiment.WIDTH)):
        print(f"  {sentence}")
    print()
    print(f"  The work took {sum(result.seconds.values()):.0f} seconds.\n\nWhat to try next")
    where = "" if output == Path("report") else f" --output {output}"
    hints = [
        (str(page), "hear the sounds, see what they found: open it in a browser"),
        (program_command(f"demo{where} --wav mine.wav"), "the images for a digit that you say, in English"),
        (program_command("demo --seeds 5"), "how much of this is luck"),
    ]
    print(format_table(hints))


def _write_spread(results: Sequence[Result], options: Options) -> Path:
    figures = ("seed", "sound_to_image", "image_to_sound", "sound_to_image_before", "image_to_sound_before")
    runs = [
        {name: getattr(result, name) for name in figures}
        | {"image_text": statistics.mean(result.image_text_accuracy.values())}
        for result in results
    ]
    machine = {name: value for name, value in report.machine(results[0]) if name not in ("Seed", "Seconds")}
    return seeds.keep({"denoise": options.denoise, "machine": machine, "runs": runs}, options.output)


def _print_spread(results: Sequence[Result], path: Path) -> None:
    figures = [(result.sound_to_image, result.image_to_sound) for result in results]
    rows = [("seed", "sound finds image", "image finds sound")]
    for result, (forward, back) in zip(results, figures, strict=True):
        rows.append((str(result.seed), percent(forward, 1), percent(back, 1)))
    for name, summary in (("lowest", min), ("median", statistics.median), ("highest", max)):
        forward, back = (summary(values) for values in zip(*figures, strict=True))
        rows.append((name, percent(forward, 1), percent(back, 1)))
    print(f"\n{format_table(rows)}\n\nKept in {path}.")
