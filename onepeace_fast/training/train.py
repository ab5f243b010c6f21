"""The loop of a run: step after step, logs, checkpoints."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save_file

from onepeace_fast.models.upstream import CONFIG_FILE, WEIGHTS_FILE
from onepeace_fast.training import checkpoint
from onepeace_fast.training.checkpoint import TOKENIZER_FILE, TRAINING_FILE, NotWritten
from onepeace_fast.training.config import RunConfig
from onepeace_fast.training.distributed import Processes
from onepeace_fast.training.logs import Logs
from onepeace_fast.training.start import Started, read_entries, start


def train(config: RunConfig, processes: Processes) -> int:
    """Train to the configured step, from the newest checkpoint if there is one.

    Returns:
        0, or 1 where the last checkpoint could not be written.

    Raises:
        ValueError: bad input, one line.
        NotFinite: the loss or the gradient is infinite or not a number.
    """
    output, problem = config.path("output"), None
    entries = read_entries(config, processes)  # first, since a run that it refuses is to leave no folder behind
    with contextlib.ExitStack() as stack:
        processes.on_main(lambda: stack.enter_context(checkpoint.claimed(output)))
        run = start(config, processes, entries)
        trainer, logs = run.trainer, None
        if processes.is_main and trainer.step_number < config.total:
            for line in run.lines:
                print(line, flush=True)
            pairs = config.batch_size * config.accumulation * processes.count
            logs = stack.enter_context(Logs(output, trainer.step_number, config.total, config.log_every, pairs))
        while trainer.step_number < config.total:
            numbers = trainer.step(run.batches)
            step = trainer.step_number
            if logs is not None:
                logs.add(step, numbers)
            if step % config.checkpoint_every == 0 or step == config.total:
                problem = _save(config, processes, run)
                if problem and logs is not None and step < config.total:
                    again = min(step + config.checkpoint_every - step % config.checkpoint_every, config.total)
                    logs.say(
                        f"Step {step}: checkpoint not written ({problem}); training goes on and tries again at step "
                        f"{again}"
                    )
    if processes.is_main:
        if problem:
            print(
                f"Step {config.total}, the last: checkpoint not written ({problem}); {last_checkpoint(output)}",
                file=sys.stderr,
            )
        else:
            if logs is not None:
                print(logs.summary())
            print(f"Done: {checkpoint.folder_of(output, config.total)}")
    return 1 if problem else 0


def last_checkpoint(output: Path) -> str:
    """Where the same command would continue."""
    folders = checkpoint.all_in(output)
    if not folders:
        return "there is no checkpoint yet, so the same command starts from the beginning"
    return f"the last checkpoint is {folders[-1]}, and the same command continues from there"


def _save(config: RunConfig, processes: Processes, run: Started) -> str | None:
    """Write a checkpoint and remove old ones; returns why it could not be written."""
    trainer, output = run.trainer, config.path("output")
    weights, state = (
        trainer.weights(),
        trainer.state() | {"settings": run.settings, "trained": run.trained(trainer.step_number)},
    )
    writers = {
        CONFIG_FILE: cast(Any, trainer.model.config).save,
        WEIGHTS_FILE: lambda path: save_file({name: value.contiguous() for name, value in weights.items()}, path),
        TOKENIZER_FILE: lambda path: path.write_bytes(run.tokenizer),
        TRAINING_FILE: lambda path: checkpoint.save_state(state, path),
    }

    def write() -> str | None:
        try:
            checkpoint.write(output, trainer.step_number, writers)
        except NotWritten as error:
            return str(error)
        checkpoint.remove_old(output, config.keep)
        return None

    return processes.on_main(write)
