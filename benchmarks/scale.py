"""What a process sends and holds when 2, 4 and 8 share a training step: python -m benchmarks.scale [--results DIR]

Processes of gloo on one machine, each with the same work, run the contrastive loss alone and a step of the trainer over
a model that FSDP2 shards. Bytes are those that the kernel's TCP counted on each process's own sockets; beside them
stands what ``onepeace-fast estimate`` says. No time is taken: the processes share the cores. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from benchmarks.bench_memory import peak_of
from benchmarks.support import machine
from benchmarks.support.report import write_json
from onepeace_fast.config import ImageAdapterConfig, OnePeaceConfig, TextAdapterConfig, TransformerConfig
from onepeace_fast.estimate import scale
from onepeace_fast.estimate.parameters import sizes_of
from onepeace_fast.models.losses import contrastive_loss
from onepeace_fast.models.pretrain import OnePeacePretrain
from onepeace_fast.tables import table
from onepeace_fast.training.config import TrainingConfig
from onepeace_fast.training.distributed import Processes
from onepeace_fast.training.pairs import PairTrainer

COUNTS = (2, 4, 8)
ROWS, WIDTH = 512, 256  # of the contrast, on each process
PAIRS, GRID, LENGTH, VOCABULARY = 8, 4, 12, 1000
FORWARDS = 2  # the step encodes the pairs once more, for the teacher, without gradients
BYTES_SENT, BYTES_AGAIN = 200, 208  # places in Linux's struct tcp_info
SIZES = {"embed_dim": 256, "ffn_embed_dim": 1024, "layers": 4, "attention_heads": 4, "audio": None}
DECODER = {"embed_dim": 64, "ffn_embed_dim": 128, "layers": 1, "attention_heads": 2, "audio": None}


def configuration() -> OnePeaceConfig:
    """A narrow model of text and images."""
    image = {"position_grid": GRID, "bias_grid": GRID}
    encoder = TransformerConfig(**SIZES, text=TextAdapterConfig(bucket_size=16), image=ImageAdapterConfig(**image))
    unbiased = {"text": TextAdapterConfig(use_bias=False), "image": ImageAdapterConfig(**image, use_bias=False)}
    return OnePeaceConfig(
        encoder=encoder, decoder=TransformerConfig(**DECODER, layer_scale=None, **unbiased), vocab_size=VOCABULARY
    )


def bytes_sent() -> int:
    """What this process's TCP sockets have sent since they were opened; what was lost and sent again counts once."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as one:
                info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # closed meanwhile, or of another family
            continue
        if len(info) < BYTES_AGAIN + 8:
            raise RuntimeError("TCP_INFO: expected a Linux of 4.19 or newer, which counts the bytes sent")
        total += struct.unpack_from("Q", info, BYTES_SENT)[0] - struct.unpack_from("Q", info, BYTES_AGAIN)[0]
    return total


def sent_by(call: Callable[[], object]) -> int:
    """What this process sends for a call; the barriers around it send some hundred bytes more."""
    dist.barrier()
    before = bytes_sent()
    call()
    dist.barrier()
    return bytes_sent() - before


def batches(rank: int) -> Iterator[dict[str, Tensor]]:
    """The same sizes for every process, other numbers."""
    generator = torch.Generator().manual_seed(rank)
    for _ in itertools.count():
        text = torch.randint(4, VOCABULARY, (PAIRS, LENGTH), generator=generator)
        text[:, -1] = 2
        image = torch.randn(PAIRS, 3, 16 * GRID, 16 * GRID, generator=generator)
        yield {"text": text, "word_starts": text > 2, "image": image}


def contrast(rank: int) -> dict[str, Any]:
    """The contrastive loss alone, forward and backward."""
    generator = torch.Generator().manual_seed(rank)
    a, b = (torch.randn(ROWS, WIDTH, generator=generator).requires_grad_() for _ in range(2))
    scale_of = torch.tensor(14.0, requires_grad=True)

    def step() -> None:
        loss, *_ = contrastive_loss(a, b, scale_of)
        loss.backward()

    step()
    return {"sent_bytes": sent_by(step), "peak_bytes": peak_of(step)}


def training_step(processes: Processes) -> dict[str, Any]:
    """A step of the trainer, after one that allocates the optimizer's state."""
    torch.manual_seed(0)
    keys = {"manifest": "-", "output": "-", "batch_size": PAIRS, "steps": 10, "learning_rate": 1e-4}
    trainer = PairTrainer(
        OnePeacePretrain(configuration(), "fused"), TrainingConfig(stage="vision_language", **keys), processes
    )
    given = batches(processes.rank)
    trainer.step(given)
    found = {"sent_bytes": sent_by(lambda: trainer.step(given)), "peak_bytes": peak_of(lambda: trainer.step(given))}
    held = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    gradients = [parameter.grad for parameter in held if parameter.grad is not None]
    return found | {"state_bytes": sum(_local_bytes(tensor) for tensor in (*held, *gradients, *states))}


def _local_bytes(tensor: Tensor) -> int:
    local = getattr(tensor, "to_local", lambda: tensor)()
    return local.numel() * local.element_size()


def run(rank: int, count: int, folder: str) -> None:
    """What one process does; it leaves its figures in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{count}", rank=rank, world_size=count)
    found = {"contrast": contrast(rank), "step": training_step(Processes(rank, count, torch.device("cpu")))}
    torch.save(found, f"{folder}/{count}_{rank}")
    dist.barrier()
    dist.destroy_process_group()
    gc.collect()  # as in training/distributed.py


def described() -> dict[str, Any]:
    """What the estimate needs to know of the work."""
    return {
        "sizes": sizes_of(configuration())._asdict(),
        "contrast": {"samples": ROWS, "width": WIDTH},
        "step": {"samples": PAIRS, "width": SIZES["embed_dim"], "forwards": FORWARDS},
    }


def measure(counts: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each count, of the process that sends or holds most."""
    rows = []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.spawn(run, (count, folder), nprocs=count)
            found = [torch.load(f"{folder}/{count}_{rank}") for rank in range(count)]
        for what, estimates in scale.predicted(described(), count).items():
            most = {key: max(one[what][key] for one in found) for key in found[0][what]}
            rows.append({"what": what, "processes": count, **most, "predicted": estimates})
    return rows


def shown(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each figure: measured, predicted, and the prediction's error."""
    lines = [("what", "processes", "figure", "measured", "predicted", "error")]
    for row in rows:
        for name in ("sent_bytes", "state_bytes", "peak_bytes"):
            if name in row:
                estimate = row["predicted"].get(name)
                cells = ("-", "-")
                if estimate is not None:
                    ends = dict.fromkeys(f"{end:,.0f}" for end in estimate)
                    cells = ("-".join(ends), f"{sum(estimate) / 2 / row[name] - 1:+.1%}")
                lines.append((row["what"], str(row["processes"]), name, f"{row[name]:,}", *cells))
    return table(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and write the file where a folder is given."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, metavar="DIR", help="also write scale_PROCESSOR_DATE.json there")
    parser.add_argument("--processes", type=int, nargs="+", default=COUNTS, help="how many (default 2 4 8)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # as each process does
    rows = measure(options.processes)
    print(shown(rows))
    if options.results is not None:
        here = machine.describe(torch.device("cpu"))
        content = {"date": machine.now(), "machine": here, "backend": "gloo", **described(), "rows": rows}
        path = options.results / machine.file_name("scale", here, content["date"])
        write_json(path, content)
        print(f"Written to {path}")


if __name__ == "__main__":
    main()
