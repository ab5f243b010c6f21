"""What ``onepeace-fast search EMBEDDINGS`` does: print the nearest items, and show them in a page."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from onepeace_fast.command_line import at_least, path, stop
from onepeace_fast.embedding.embed_command import PACKAGES, add_model_arguments, load
from onepeace_fast.info import TRAINING_INSTALL, format_table, missing

if TYPE_CHECKING:
    from onepeace_fast.embedding.search import Hit

MODALITIES = ("text", "image", "audio")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("embeddings", type=path, metavar="EMBEDDINGS", help="a file that `onepeace-fast embed` wrote")
    add_model_arguments(parser)
    parser.add_argument("--text", action="append", metavar="TEXT", help="what to look for; several things are added up")
    parser.add_argument("--image", action="append", metavar="FILE", help="likewise")
    parser.add_argument("--audio", action="append", metavar="FILE", help="likewise")
    parser.add_argument("--of", nargs="+", choices=MODALITIES, default=MODALITIES, help="what to find (default: all)")
    parser.add_argument("--top", type=at_least(1), default=10, help="items to show (default 10)")
    parser.add_argument("--index", type=path, metavar="FILE", help="of faiss, made where there is none; may miss items")
    parser.add_argument("--page", type=path, metavar="FILE", help="write an HTML page of pictures and players")
    parser.add_argument("--json", type=path, metavar="FILE", help="write the items there too")


def run(arguments: argparse.Namespace) -> int:
    """Search as the arguments say.

    Returns:
        0: done. 2: something is missing or does not fit, with a line on the standard error.
    """
    if absent := missing(PACKAGES):
        return stop(f"search needs {', '.join(absent)}; type: {TRAINING_INSTALL}")
    query = {name: found for name in MODALITIES if (found := getattr(arguments, name))}
    if not query:
        return stop("--text, --image, --audio: expected at least one, got none")
    outputs: dict[str, Path | None] = {name: getattr(arguments, name) for name in ("index", "page", "json")}
    for name, place in outputs.items():
        if place is not None and not place.parent.is_dir():
            return stop(f"--{name}: expected a file in a folder that exists, got {place}")
    try:
        hits = _search(arguments, query)
        if arguments.page is not None:
            from onepeace_fast.embedding.page import write_page

            write_page(arguments.page, query, hits)
        if arguments.json is not None:
            from onepeace_fast.embedding.store import COLUMNS, write_text

            record = [{"score": hit.score, **dict(zip(COLUMNS, hit.item, strict=False))} for hit in hits]
            write_text(arguments.json, json.dumps(record, indent=1) + "\n")
    except (ValueError, ImportError) as error:
        return stop(str(error))
    rows = [(f"{hit.score:.3f}", hit.item.modality, " ".join(hit.item.value.split())) for hit in hits]
    print(format_table([("cosine", "modality", "item"), *rows]))
    return 0


def _search(arguments: argparse.Namespace, query: dict[str, list[str]]) -> list[Hit]:
    from onepeace_fast.embedding.search import check_model, combine, nearest, nearest_by_index
    from onepeace_fast.embedding.store import reading

    with reading(arguments.embeddings):
        pass  # before the long work
    embedder = load(arguments)
    for name in query:
        embedder.check(name)
    check_model(arguments.embeddings, embedder)
    vector = combine(embedder.embed(text=query.get("text"), image=query.get("image"), audio=query.get("audio")))
    if arguments.index is None:
        return nearest(arguments.embeddings, vector, arguments.top, arguments.of)
    return nearest_by_index(arguments.embeddings, arguments.index, vector, arguments.top, arguments.of)
