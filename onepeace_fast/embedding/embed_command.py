"""What ``onepeace-fast embed MANIFEST`` does: embed every item of a manifest into a file, and go on after a kill."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from typing import TYPE_CHECKING

from onepeace_fast.command_line import at_least, path, stop
from onepeace_fast.info import TRAINING_INSTALL, missing
from onepeace_fast.progress import progress

if TYPE_CHECKING:
    from onepeace_fast.embedding.embedder import Embedder
    from onepeace_fast.embedding.store import Item, Parts

PACKAGES = {"pyarrow": "pyarrow", "tokenizers": "tokenizers", "pillow": "PIL", "soundfile": "soundfile"}
MODALITIES = {"caption": "text", "image": "image", "audio": "audio"}  # by the column of a manifest
DTYPES = ("float32", "bf16", "fp16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("manifest", type=path, metavar="MANIFEST", help="of image, audio or caption; TSV or Parquet")
    add_model_arguments(parser)
    parser.add_argument("--out", type=path, required=True, metavar="FILE", help="such as embeddings.parquet")
    parser.add_argument(
        "--columns", nargs="+", metavar="COLUMN", help="which to embed (default: all that manifest and model have)"
    )
    parser.add_argument("--broken", choices=("fatal", "skip"), default="fatal", help="about an item that is broken")
    parser.add_argument(
        "--part", type=at_least(1), default=1024, help="items of a part; a kill loses one (default 1024)"
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that say what embeds."""
    parser.add_argument("--model", required=True, help="a file or folder, or owner/name on the Hugging Face Hub")
    parser.add_argument("--tokenizer", type=path, help="tokenizer.json or a folder (default: beside the model)")
    parser.add_argument("--device", help="default: the GPU where there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="default: as in the file")


def run(arguments: argparse.Namespace) -> int:
    """Embed as the arguments say.

    Returns:
        0: done. 1: done, with items that were skipped. 2: something is missing or does not fit, with a line on the
        standard error.
    """
    if absent := missing(PACKAGES):
        return stop(f"embed needs {', '.join(absent)}; type: {TRAINING_INSTALL}")
    from onepeace_fast.embedding.store import Identity, Parts, check_free

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        check_free(arguments.out)
        items = _items(arguments)
        embedder = load(arguments)
        items = _known(items, embedder, arguments)
        parts = Parts(arguments.out, Identity.of(embedder))
        skipped = _embed(embedder, items, parts, arguments)
        if not parts.done:
            return stop(f"{arguments.manifest}: expected an item that can be embedded, got none among {len(items)}")
        count = parts.finish(items)
    except (ValueError, ImportError) as error:
        return stop(str(error))
    print(f"{arguments.out}: {count:,} embeddings" + (f"; {skipped:,} items skipped" if skipped else ""))
    return 1 if skipped else 0


def load(arguments: argparse.Namespace) -> Embedder:
    """The model that the arguments name."""
    from onepeace_fast.embedding.embedder import from_pretrained

    return from_pretrained(
        os.path.expanduser(arguments.model), device=arguments.device, dtype=arguments.dtype,
        tokenizer=arguments.tokenizer,
    )  # fmt: skip


def _items(arguments: argparse.Namespace) -> list[Item]:
    """Every different item of the manifest, with the first line that has it."""
    from onepeace_fast.data.manifest import CAPTION, columns_of, read_items
    from onepeace_fast.embedding.store import Item

    there = columns_of(arguments.manifest)
    chosen = list(dict.fromkeys(arguments.columns or there))
    if not chosen or not set(chosen) <= set(there):
        raise ValueError(
            f"{arguments.manifest}: expected {' and '.join(arguments.columns or MODALITIES)} among its columns, got "
            f"{', '.join(there) or 'none of them'}"
        )
    items: dict[tuple[str, str], Item] = {}
    for column in chosen:
        for row in read_items(arguments.manifest, column):
            value = row.cells[0] if column == CAPTION else os.path.abspath(row.cells[0])
            item = Item(MODALITIES[column], value, row.line)
            items.setdefault(item[:2], item)
    if not items:
        raise ValueError(f"{arguments.manifest}: expected items below the header, got none")
    return list(items.values())


def _known(items: list[Item], embedder: Embedder, arguments: argparse.Namespace) -> list[Item]:
    """The items of the model's modalities; a column that was asked for by name must be of one."""
    modalities = dict.fromkeys(item.modality for item in items)
    known = embedder.model.config.encoder.modalities
    left = [name for name in modalities if name not in known]
    if left and (arguments.columns or len(left) == len(modalities)):
        embedder.check(left[0])
    for name in left:
        print(f"{arguments.manifest}: {name} is left out, the model has none", file=sys.stderr)
    kept = [item for item in items if item.modality not in left]
    if "text" in modalities and "text" not in left and embedder.processor.tokenizer is None:
        raise ValueError(f"--tokenizer: expected one for captions, got none beside {arguments.model}")
    return kept


def _embed(embedder: Embedder, items: list[Item], parts: Parts, arguments: argparse.Namespace) -> int:
    """Embed what no part has yet; the number of items that were skipped."""
    todo = [item for item in items if (item.modality, item.value) not in parts.done]
    bar = progress("Embedding", "item", len(items), len(items) - len(todo))
    skipped = 0
    for modality in dict.fromkeys(item.modality for item in todo):
        own = [item for item in todo if item.modality == modality]
        for start in range(0, len(own), arguments.part):
            block, faults = own[start : start + arguments.part], dict[int, str]()

            def name(place: int, block: list[Item] = block) -> str:
                return f"{arguments.manifest}, line {block[place].line}"

            rows = embedder.embed_block(modality, [item.value for item in block], faults, bar, name)
            if kept := [place for place in range(len(block)) if place not in faults]:
                parts.add([block[place] for place in kept], rows[kept])
            if faults and arguments.broken == "fatal":
                raise ValueError(f"{next(iter(faults.values()))} ({len(faults)} such so far; --broken skip goes on)")
            for line in faults.values():
                bar.write(f"{line}; skipped")
            skipped += len(faults)
    bar.close()
    return skipped
