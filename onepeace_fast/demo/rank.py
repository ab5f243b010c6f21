"""What the trained model makes of a visitor's sound: the nearest digits, unless the sound is like none."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np

from onepeace_fast.data.audio import read_audio
from onepeace_fast.demo import data, experiment, report
from onepeace_fast.demo.familiarity import FILE, Familiarity
from onepeace_fast.demo.percent import percent
from onepeace_fast.demo.run import MODEL, Options, record_file, run
from onepeace_fast.demo.waveform import WINDOW, loudest_second, trim
from onepeace_fast.info import format_table
from onepeace_fast.installation import program_command
from onepeace_fast.models.pretrain import OnePeacePretrain

NEAREST = 10
LOUD = 0.9 * 32767  # the peak of a visitor's sound on its page


def rank(wav: str, options: Options, anywhere: bool) -> int:
    """Rank the held-out images for a visitor's sound by the model of the last run, which is made where there is none.

    It is looked for in ``options.output``, and with ``anywhere`` also where the demo ran last.

    Raises:
        ValueError: a file that is not sound, or a model of another version, in one line.
    """
    heard = read_audio(wav).numpy()
    output, looked = find(options.output, anywhere)
    if output is None:
        print(f"There is no trained model in {' or '.join(map(str, looked))}: the demo runs first.\n", flush=True)
        output = options.output
        output.mkdir(parents=True, exist_ok=True)
        if code := run(options):
            return code
        print()
    options = dataclasses.replace(options, output=output)
    heard = trim(heard)
    start = loudest_second(heard)
    sound = heard[start : start + WINDOW]
    model, familiarity = _restore(output / MODEL)
    model = model.to(options.device)
    _, held_out = data.load()
    embedded = experiment.sound_embeddings(model, [sound])
    cosines = experiment.similarity(embedded, experiment.image_embeddings(model, held_out.images))[0]
    labels = held_out.labels.numpy()
    # A digit stands where its nearest image stands, so the first digit is that of the nearest image of all.
    scores = sorted(((float(cosines[labels == digit].max()), digit) for digit in range(10)), reverse=True)
    nearest = np.argsort(-cosines, kind="stable")[:NEAREST]
    unlike = warning(familiarity, float(familiarity.score(embedded)))
    page = report.write_ranking(
        wav,
        np.round(sound / np.abs(sound).max() * LOUD).astype(np.int16),
        [(digit, score) for score, digit in scores],
        [(held_out.images[i].numpy(), int(labels[i]), float(cosines[i])) for i in nearest],
        unlike,
        output,
    )
    rows = [("digit", "cosine of its nearest image")]
    rows += [(f"{digit} {data.NAMES[digit]}", f"{score:+.3f}") for score, digit in scores]
    seconds = f", its loudest second of {len(heard) / WINDOW:.1f}" if len(heard) > WINDOW else ""
    print(f"Heard in {wav}{seconds}:\n\n{format_table(rows)}\n")
    if unlike:
        print(f"{unlike}\n")
    print(f"The images, nearest first: {page}")
    return 0


def find(output: Path, anywhere: bool) -> tuple[Path | None, list[Path]]:
    """The folder of a run that has a trained model, or None, and the folders of models that were looked for."""
    places = [output]
    if anywhere and (record := record_file()).exists():
        places.append(Path(os.fsdecode(record.read_bytes())))
    found = next((place for place in places if (place / MODEL / "config.json").exists()), None)
    return found, [place / MODEL for place in dict.fromkeys(places)]


def warning(familiarity: Familiarity, score: float) -> str:
    """A line for a sound that is unlike any digit, with how often that is said; empty for another."""
    if score >= familiarity.threshold:
        return ""
    digits, noises = percent(familiarity.digits_below), percent(familiarity.noises_below)
    return (
        f"This sound is unlike any spoken digit ({score:.3f}, below {familiarity.threshold:.3f}). The same is said of "
        f"{digits} of the held-out digits, and of {noises} of noises, hums and tones."
    )


def _restore(folder: Path) -> tuple[OnePeacePretrain, Familiarity]:
    model = OnePeacePretrain.load(folder).eval()
    same = model.config.encoder == experiment.configuration(len(data.Vocabulary())).encoder
    if not same or not (folder / FILE).exists():
        raise ValueError(
            f"{folder}: expected a model of this version of the demo, got another; type: {program_command('demo')}"
        )
    return model, Familiarity.load(folder)
