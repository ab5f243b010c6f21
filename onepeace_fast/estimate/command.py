"""The command `onepeace-fast estimate`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from onepeace_fast.command_line import at_least, path, stop
from onepeace_fast.tables import table

RESULTS = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "results"
DEFAULT_TOKENS = {"text": (7, 72), "image": (257, 257), "audio": (150, 750)}
MOST_GPUS = 1024
MOST_SAMPLES = 2**16
VOCABULARY = 50265 + 4
_TOKENS = re.compile(r"([a-z][a-z0-9_]*)=(\d+)(?:-(\d+))?")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the estimate."""
    parser.add_argument(
        "--config", type=path, metavar="FILE", help="config.json of a saved model (default: the 4 B model)"
    )
    for name, text in (("width", "of a row"), ("hidden", "within the FFN"), ("layers", ""), ("heads", "of attention")):
        parser.add_argument(
            f"--{name}", type=at_least(1), metavar="N", help=f"{name} {text} in its place".replace("  ", " ")
        )
    parser.add_argument("--modalities", nargs="+", metavar="NAME", help="of the model, in the place of its own")
    parser.add_argument("--drop-path", type=float, metavar="P", help="DropPath's rate of the last layer")
    parser.add_argument(
        "--checkpoint-activations", action="store_true", help="compute each layer again when going back"
    )
    text = "tokens of each sample, as image=257 or text=7-72, evenly spread; repeat (default: text and image)"
    parser.add_argument("--tokens", nargs="+", type=_tokens, metavar="NAME=N", help=text)
    parser.add_argument("--samples", type=at_least(1), default=32, help="of each GPU (default 32)")
    text = f"how many GPUs, up to {MOST_GPUS} (default 1 8 64 1024)"
    parser.add_argument("--gpus", nargs="+", type=_gpus, default=[1, 8, 64, 1024], metavar="N", help=text)
    from onepeace_fast.estimate import constants

    names = list(constants.gpus())
    parser.add_argument("--gpu", nargs="+", choices=names, default=names, help="only these")
    text = "files of times to hold the estimate against (default: those of benchmarks/results in a checkout)"
    parser.add_argument("--measured", nargs="+", type=path, metavar="FILE", help=text)


def _gpus(text: str) -> int:
    count = at_least(1)(text)
    if count > MOST_GPUS:
        raise argparse.ArgumentTypeError(f"expected at most {MOST_GPUS}, got {count}")
    return count


def _tokens(text: str) -> tuple[str, int, int]:
    if (found := _TOKENS.fullmatch(text)) is None or int(found[2]) < 1 or int(found[3] or found[2]) < int(found[2]):
        raise argparse.ArgumentTypeError(f"expected a modality and its tokens, as image=257 or text=7-72, got {text!r}")
    return found[1], int(found[2]), int(found[3] or found[2])


def run(arguments: argparse.Namespace) -> int:
    """Print the estimate; returns 0, or 2 where something does not fit, which a line says."""
    from onepeace_fast.estimate import errors
    from onepeace_fast.report.results import Results, read

    try:
        model = _model(arguments)
        lengths = _lengths(arguments, model.encoder.modalities)
        given = arguments.measured or [*sorted(RESULTS.glob("*pu_*.json")), *sorted(RESULTS.glob("scale_*.json"))]
        scales = [one for one in given if one.name.startswith("scale_")]
        files = [read(one) for one in given if one not in scales]
        found = [error for one in scales for error in errors.of_scale(one.name, json.loads(one.read_text("utf-8")))]
    except (ValueError, KeyError) as error:
        return stop(str(error))
    for heading, rows in sections(arguments, model, lengths):
        print(f"\n{heading}\n{table(rows)}")
    found = [*errors.errors([file for file in files if isinstance(file, Results)]), *found]
    print(f"\nBeside what was measured: {len(found)} figures of {len(given)} files")
    if found:
        print(table(_error_rows(found)))
        middle = statistics.median(abs(error.relative) for error in found)
        print(f"The middle of the errors is {middle:.0%}, the largest {max(abs(e.relative) for e in found):.0%}.")
    if not any(error.unit == "ms" for error in found):
        print("None of them is a time on a GPU: no file has one. `make gpu` writes one; give it by --measured.")
    return 0


def _model(arguments: argparse.Namespace) -> Any:
    from onepeace_fast.config import MODALITIES, OnePeaceConfig, read_config

    model = OnePeaceConfig(vocab_size=VOCABULARY) if arguments.config is None else read_config(arguments.config)
    changes: dict[str, Any] = {
        field: value
        for field, value in (
            ("embed_dim", arguments.width), ("ffn_embed_dim", arguments.hidden), ("layers", arguments.layers),
            ("attention_heads", arguments.heads), ("drop_path_rate", arguments.drop_path),
        )
        if value is not None
    }  # fmt: skip
    if arguments.checkpoint_activations:
        changes["checkpoint_activations"] = True
    without: dict[str, Any] = {}
    if arguments.modalities:
        if unknown := sorted(set(arguments.modalities) - set(model.encoder.modalities)):
            raise ValueError(f"--modalities: expected some of {', '.join(model.encoder.modalities)}, got {unknown[0]}")
        without = {name: None for name in MODALITIES if name not in arguments.modalities}
    parts: dict[str, Any] = {"encoder": dataclasses.replace(model.encoder, **changes, **without)}
    if hasattr(model, "decoder"):
        parts["decoder"] = dataclasses.replace(model.decoder, **without)
    return dataclasses.replace(model, **parts)


def _lengths(arguments: argparse.Namespace, modalities: Sequence[str]) -> dict[str, list[int]]:
    wanted = {name: (low, high) for name, low, high in arguments.tokens or ()}
    if not wanted:
        wanted = {name: DEFAULT_TOKENS[name] for name in modalities if name in DEFAULT_TOKENS}
        if len(wanted) > 2:
            wanted.pop("audio")
    if unknown := sorted(set(wanted) - set(modalities)):
        raise ValueError(f"--tokens: expected a modality of the model ({', '.join(modalities)}), got {unknown[0]}")
    steps = max(arguments.samples - 1, 1)
    return {
        name: [low + round(place * (high - low) / steps) for place in range(arguments.samples)]
        for name, (low, high) in wanted.items()
    }


def sections(
    arguments: argparse.Namespace, model: Any, lengths: dict[str, list[int]]
) -> Iterator[tuple[str, list[Sequence[str]]]]:
    """The tables with their headings."""
    from onepeace_fast.estimate import constants, scale, speed
    from onepeace_fast.estimate.parameters import sizes_of
    from onepeace_fast.estimate.work import Batch, Work

    config, sizes = model.encoder, sizes_of(model)
    packed, padded = (Work(config, Batch(lengths), packed) for packed in (True, False))
    yield (
        "A step of one GPU: layers of the encoder, autocast to bfloat16; adapters and heads left out",
        [
            ("what", "packed (ours)", "padded (eager)"),
            ("parameters of the model", _number(sizes.parameters), _number(sizes.parameters)),
            ("samples", str(packed.batch.samples), str(padded.batch.samples)),
            ("tokens", f"{packed.rows:,}", f"{padded.rows:,}"),
            ("TFLOP forward", *(f"{work.forward().total / 1e12:.2f}" for work in (packed, padded))),
            ("TFLOP of the step as it runs", *(f"{work.step().total / 1e12:.2f}" for work in (packed, padded))),
            ("TFLOP that the step needs", *(f"{work.needed() / 1e12:.2f}" for work in (packed, padded))),
            ("GB kept for the backward pass", *(f"{work.saved_bytes() / 1e9:.2f}" for work in (packed, padded))),
        ],
    )
    rows: list[Sequence[str]] = [("GPU", "way", "ms", "samples/s", "MFU", "layer tax")]
    for name in arguments.gpu:
        for way in speed.WAYS:
            work = packed if way in speed.STRATEGIES else padded
            time = speed.step(work, name, way, sizes.parameters)
            rates = [packed.needed() / end / constants.gpus()[name].peak_TFLOPs / 1e12 for end in reversed(time)]
            rows.append((
                name, way, _range(time.times(1e3)), _range(_rate(packed.batch.samples, time)),
                _range(constants.Span(*rates), 2), _range(speed.layer(work, name, way).tax, 2),
            ))  # fmt: skip
    yield "A step of one GPU, were its memory large enough: a model, in ranges", rows
    for way, work in (("hybrid", packed), ("eager", padded)):
        rows = [("GPUs", "GB each", *(f"fits {name}, most samples" for name in arguments.gpu), "GB sent", *(
            f"{name} {what}" for name in arguments.gpu for what in ("ms", "samples/s")))]  # fmt: skip
        for count in arguments.gpus:
            peak = scale.memory(work, sizes, count).peak
            of_all = scale.sent(sizes, work.batch.samples, config.embed_dim, count)
            cells: list[str] = []
            for name in arguments.gpu:
                time = scale.seconds(work, name, way, sizes, count)
                cells += [_range(time.times(1e3)), _range(_rate(count * work.batch.samples, time))]
            fits = [_fits(model, lengths, way, peak, name, sizes, count) for name in arguments.gpu]
            rows.append((str(count), _range(peak.times(1e-9), 1), *fits, f"{of_all.total / 1e9:.2f}", *cells))
        yield f"On N GPUs by FSDP2, {way}: memory, most samples of a GPU, bytes sent by each, step", rows


def _fits(model: Any, lengths: dict[str, list[int]], way: str, peak: Any, gpu: str, sizes: Any, count: int) -> str:
    """Whether this batch fits, and how many such samples would, by the range's upper end."""
    from onepeace_fast.estimate import constants

    most = largest(model.encoder, lengths, way, gpu, sizes, count)
    room = constants.gpus()[gpu].memory_GB * 1e9
    answer = "yes" if peak.high <= room else ("no" if peak.low > room else "perhaps")
    return f"{answer}, {most}" if most else "no"


def largest(config: Any, lengths: dict[str, list[int]], way: str, gpu: str, sizes: Any, count: int) -> int:
    """The most samples of such lengths that surely fit on each of N GPUs; 0 where not even one does."""
    from onepeace_fast.estimate import constants, scale, speed
    from onepeace_fast.estimate.work import Batch, Work

    room = constants.gpus()[gpu].memory_GB * 1e9
    least, most = 0, MOST_SAMPLES

    def needs(samples: int) -> float:
        repeated = {name: [row[place % len(row)] for place in range(samples)] for name, row in lengths.items()}
        work = Work(config, Batch(repeated), way in speed.STRATEGIES)
        return scale.memory(work, sizes, count).peak.high

    while least < most:
        middle = (least + most + 1) // 2
        if needs(middle) <= room:
            least = middle
        else:
            most = middle - 1
    return least


def _rate(samples: int, time: Any) -> Any:
    from onepeace_fast.estimate.constants import Span

    return Span(samples / time.high, samples / time.low)


def _range(span: Any, digits: int = 0) -> str:
    low, high = (f"{end:,.{digits}f}" for end in span)
    return low if low == high else f"{low}-{high}"


def _number(value: int) -> str:
    return f"{value / 1e9:.3f} B" if value >= 1e9 else f"{value / 1e6:.1f} M"


def _error_rows(found: Sequence[Any]) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [("figure", "measured", "estimated", "error")]
    for error in found:
        digits = 2 if error.measured < 10 else 0
        unit = f" {error.unit}" if error.unit else ""
        cells = (f"{error.measured:,.{digits}f}{unit}", f"{_range(error.estimated, digits)}{unit}")
        rows.append((error.what, *cells, f"{error.relative:+.0%}"))
    return rows
