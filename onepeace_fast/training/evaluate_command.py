"""What ``onepeace-fast evaluate CHECKPOINT MANIFEST`` does: measure, print a table, keep it as JSON."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from onepeace_fast.command_line import at_least, path, stop
from onepeace_fast.info import TRAINING_INSTALL, TRAINING_PACKAGES, format_table, missing

if TYPE_CHECKING:
    from onepeace_fast.training.retrieval import Figures
    from onepeace_fast.training.unival_evaluation import TaskFigures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("checkpoint", type=path, metavar="CHECKPOINT", help="a folder such as output/step-00001000")
    parser.add_argument(
        "manifest", type=path, metavar="MANIFEST", help="held-out pairs, TSV or Parquet; of UnIVAL JSON lines"
    )
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
    from onepeace_fast.models.mico import MicoConfig
    from onepeace_fast.models.unival import UnivalConfig
    from onepeace_fast.training.evaluation import evaluate
    from onepeace_fast.training.unival_evaluation import evaluate_tasks, kind_of

    if arguments.json is not None and (arguments.json.is_dir() or not arguments.json.parent.is_dir()):
        return stop(f"--json: expected a file in a folder that exists, got {arguments.json}")
    record: dict[str, Any] = {"checkpoint": str(arguments.checkpoint), "manifest": str(arguments.manifest)}
    try:
        kind = kind_of(arguments.checkpoint)
        if kind == MicoConfig.kind:
            expected = f"{arguments.checkpoint}: expected a checkpoint of ONE-PEACE or UnIVAL"
            return stop(f"{expected}, got one of MiCo, which is not measured yet")
        if kind == UnivalConfig.kind:
            if arguments.columns is not None:
                return stop(f"--columns: expected none for UnIVAL's tasks, got {' and '.join(arguments.columns)}")
            tasks = evaluate_tasks(arguments.checkpoint, arguments.manifest, arguments.batch_size)
            table, record["tasks"] = _task_table(tasks), {name: _task_record(one) for name, one in tasks.items()}
        else:
            found = evaluate(arguments.checkpoint, arguments.manifest, arguments.columns, arguments.batch_size)
            table, record["directions"] = _table(found), {name: _record(figures) for name, figures in found.items()}
    except (ValueError, ImportError) as error:
        return stop(str(error))
    print(format_table(table))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def _task_table(found: dict[str, TaskFigures]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("task", "samples", "right", "by chance", "loss")]
    for name, one in found.items():
        chance = "" if one.choices is None else f"{1 / one.choices:.1%}"
        rows.append((name, str(one.samples), f"{one.right / one.samples:.1%}", chance, f"{one.loss:.4g}"))
    return rows


def _task_record(figures: TaskFigures) -> dict[str, Any]:
    chance = None if figures.choices is None else 1 / figures.choices
    right = figures.right / figures.samples
    return {"samples": figures.samples, "right": right, "chance": chance, "loss": figures.loss}


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
