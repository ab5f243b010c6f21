"""What ``onepeace-fast evaluate CHECKPOINT MANIFEST`` does: measure, print a table, keep it as JSON."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from onepeace_fast.command_line import at_least, path, stop
from onepeace_fast.info import TRAINING_INSTALL, TRAINING_PACKAGES, format_table, missing

if TYPE_CHECKING:
    from onepeace_fast.training.retrieval import Figures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("checkpoint", type=path, metavar="CHECKPOINT", help="a folder such as output/step-00001000")
    parser.add_argument("manifest", type=path, metavar="MANIFEST", help="held-out pairs, TSV or Parquet")
    parser.add_argument(
        "--columns", nargs=2, metavar="COLUMN", help="which two to pair where the manifest has image, audio and caption"
    )
    parser.add_argument("--batch-size", type=at_least(1), default=64, help="items embedded at once (default 64)")
    parser.add_argument("--json", type=path, metavar="FILE", help="write the figures there too")


def run(arguments: argparse.Namespace) -> int:
    """Measure as the arguments say.

    Returns:
        0: done. 2: something is missing or does not fit, with a line on the standard error.
    """
    if absent := missing(TRAINING_PACKAGES):
        return stop(f"evaluate needs {', '.join(absent)}; type: {TRAINING_INSTALL}")
    from onepeace_fast.training.evaluation import evaluate

    if arguments.json is not None and not arguments.json.parent.is_dir():
        return stop(f"--json: expected a file in a folder that exists, got {arguments.json}")
    try:
        found = evaluate(arguments.checkpoint, arguments.manifest, arguments.columns, arguments.batch_size)
    except (ValueError, ImportError) as error:
        return stop(str(error))
    print(format_table(_table(found)))
    if arguments.json is not None:
        record: dict[str, Any] = {"checkpoint": str(arguments.checkpoint), "manifest": str(arguments.manifest)}
        record["directions"] = {name: _record(figures) for name, figures in found.items()}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def _table(found: dict[str, Figures]) -> list[tuple[str, ...]]:
    ks = list(next(iter(found.values())).recall)
    rows = [("direction", "queries", "candidates", *(f"R@{k}" for k in ks), "median rank")]
    for name, figures in found.items():
        recall, chance = ([f"{values[k]:.1%}" for k in ks] for values in (figures.recall, figures.chance_recall))
        rows.append((name, str(figures.queries), str(figures.candidates), *recall, f"{figures.median_rank:g}"))
        rows.append(("  by chance", "", "", *chance, str(figures.chance_median_rank)))
    return rows


def _record(figures: Figures) -> dict[str, Any]:
    def direction(recall: dict[int, float], median_rank: float) -> dict[str, float]:
        return {f"recall_at_{k}": value for k, value in recall.items()} | {"median_rank": median_rank}

    record: dict[str, Any] = {"queries": figures.queries, "candidates": figures.candidates}
    record |= direction(figures.recall, figures.median_rank)
    return record | {"chance": direction(figures.chance_recall, figures.chance_median_rank)}
