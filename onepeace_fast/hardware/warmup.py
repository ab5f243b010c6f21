"""Compile every Triton kernel that a model's training step needs, by all cores, into Triton's cache.

The list of kernels is what the launchers of one layer ask for, recorded without a launch. Compiling needs no GPU: the
cache's key is the kernel, what it is specialised on, Triton's version and the GPU's architecture.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onepeace_fast import kernels
from onepeace_fast.config import OnePeaceConfig, TransformerConfig
from onepeace_fast.info import TRAINING_INSTALL, TRAINING_PACKAGES, missing
from onepeace_fast.kernels.launch import Configuration, recording
from onepeace_fast.kernels.tile_table import norm_is_folded
from onepeace_fast.layers import Transformer
from onepeace_fast.ops.kernel_choice import force_kernels
from onepeace_fast.ops.routed_ffn_arguments import chosen_strategy
from onepeace_fast.route_plan import RoutePlan

DTYPES = ("bfloat16", "float16", "float32")
LENGTHS = (7, 5)  # tokens of two samples: no kernel is compiled for a number of rows
MULTIPROCESSORS = 132  # nor for how many there are


class Kernel(NamedTuple):
    """A kernel and what Triton compiles it for: tensors as their dtypes, integers as ``_stand_in`` has them."""

    module: str
    name: str
    arguments: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[str, Any], ...]
    options: tuple[int | None, ...]


class Compiled(NamedTuple):
    """What compiling a kernel took, and whether it was in the cache."""

    name: str
    seconds: float
    cached: bool


def warmup(
    config: OnePeaceConfig,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    *,
    autocast: bool = True,
    target: str | None = None,
    modalities: Sequence[int] | None = None,
    jobs: int | None = None,
    progress: Callable[[int, int, Compiled], None] | None = None,
) -> list[Compiled]:
    """Compile what a training step of this model launches, forward and backward.

    Args:
        config: the model's.
        device: the GPU to compile for.
        dtype: of the matrix products.
        autocast: the parameters are float32 and autocast chooses ``dtype``, as in training; False: all is ``dtype``.
        target: an architecture such as "sm_90" instead of that of ``device``, which then need not be there.
        modalities: how many modalities a batch has; by default every number that the model can take.
        jobs: processes; by default one for each core.
        progress: called with the number done, the number of all, and the one just done.

    Raises:
        ValueError: a target that is none.
    """
    architecture = target or "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    if not architecture.removeprefix("sm_").isdigit():
        raise ValueError(f"target: expected an architecture such as sm_90, got {architecture!r}")
    return compile_all(needed_kernels(config, architecture, dtype, autocast, modalities), architecture, jobs, progress)


def compile_all(
    found: Sequence[Kernel],
    architecture: str,
    jobs: int | None = None,
    progress: Callable[[int, int, Compiled], None] | None = None,
) -> list[Compiled]:
    """Compile kernels in processes side by side; the arguments are those of ``warmup``."""
    done: list[Compiled] = []
    compile_one = functools.partial(_compile, int(architecture.removeprefix("sm_")))
    with multiprocessing.get_context("spawn").Pool(min(jobs or os.cpu_count() or 1, len(found))) as pool:
        for result in pool.imap_unordered(compile_one, found):
            done.append(result)
            if progress is not None:
                progress(len(done), len(found), result)
    return done


def needed_kernels(
    config: OnePeaceConfig, architecture: str, dtype: torch.dtype, autocast: bool, modalities: Sequence[int] | None
) -> list[Kernel]:
    """Each kernel once that the encoder and the decoder launch."""
    with force_kernels(True), recording(architecture, MULTIPROCESSORS) as configurations:
        for stack in (config.encoder, config.decoder):
            for count in modalities or range(1, len(stack.modalities) + 1):
                for strategy in _strategies(stack, dtype):
                    for kept in (True, False) if stack.drop_path_rate else (True,):
                        _step(stack, count, strategy, kept, dtype, autocast)
    return listed(configurations)


def listed(configurations: Sequence[Configuration]) -> list[Kernel]:
    """The kernel of each recorded launch, once."""
    return list(dict.fromkeys(map(_described, configurations)))


def _strategies(config: TransformerConfig, dtype: torch.dtype) -> Iterator[str]:
    """Those that the model may take: which one a batch takes depends on its rows."""
    z = torch.empty(1, config.embed_dim, dtype=dtype, device="meta")
    unfolded = config.ffn_layer_norm and not norm_is_folded(dtype)
    for strategy in ("per_modality", "hybrid", "grouped"):
        with contextlib.suppress(ValueError):
            yield chosen_strategy(strategy, z, config.ffn_embed_dim, 1, (1,), unfolded)


def _step(
    config: TransformerConfig, count: int, strategy: str, all_kept: bool, dtype: torch.dtype, autocast: bool
) -> None:
    """Forward and backward of a stack of one layer on the CPU, on memory that nobody has written."""
    with torch.device("meta"):
        model = Transformer(dataclasses.replace(config, layers=1, checkpoint_activations=False))
    model = model.to_empty(device="cpu").to(torch.float32 if autocast else dtype).train()
    layer: Any = model.layers[0]
    layer.packed_ffn = functools.partial(layer.packed_ffn, strategy=strategy)
    plan = RoutePlan.from_lengths(dict.fromkeys(config.modalities[:count], LENGTHS))
    if config.drop_path_rate:
        keep = torch.ones(1, 2, plan.sample_count, dtype=torch.float32, device="cpu")
        keep[:, :, 1:] = float(all_kept)
        plan = plan.with_drop_path(keep)
    stream = torch.float32 if autocast else dtype
    on_cpu: dict[str, Any] = {"dtype": stream, "device": "cpu"}
    x = torch.empty(plan.capacity, config.embed_dim, **on_cpu, requires_grad=True)
    sizes = [2 * offset + 4 for offset in plan.code_offsets] if config.use_bias else []
    bias = [torch.empty(config.attention_heads, n, **on_cpu, requires_grad=True) for n in sizes]
    with torch.autocast("cpu", dtype, enabled=autocast and dtype != torch.float32):
        out = model(x, plan, [bias] if bias else ())
    out.backward(torch.empty_like(out))


def _described(configuration: Configuration) -> Kernel:
    kernel = configuration.kernel
    ignored = set(kernel.do_not_specialize)

    def described(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(described(name, item) for item in value)
        if isinstance(value, Tensor):
            return value.dtype
        return _stand_in(value, name not in ignored) if isinstance(value, int) else value

    return Kernel(
        kernel.fn.__module__,
        kernel.fn.__name__,
        tuple((name, described(name, value)) for name, value in configuration.arguments.items()),
        tuple(configuration.constants.items()),
        (configuration.num_warps, configuration.max_registers, configuration.num_stages),
    )


def _stand_in(value: int, specialized: bool) -> int:
    """The same integer for all that Triton compiles alike: it tells 1, multiples of 16 and the width of the type."""
    wide = 0 if -(2**31) <= value < 2**31 else 2**32
    return wide + (0 if not specialized else value if value == 1 else 16 if value % 16 == 0 else 2)


def stand_in(capability: int) -> Any:
    """A driver by which Triton believes that a GPU of a compute capability, as 90, is there: it compiles, no more."""
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return capability  # kernels are kept by device: one for each target

        def get_current_stream(self, device: int) -> int:
            return 0

    return Driver()


def _compile(capability: int, kernel: Kernel) -> Compiled:
    """Compile a kernel in this process, for a GPU that need not be there."""
    from triton import knobs
    from triton.runtime.driver import driver

    def made(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(made(item) for item in value)
        return torch.empty(1, dtype=value, device="cpu") if isinstance(value, torch.dtype) else value

    cached = []
    knobs.compilation.listener = lambda *_, cache_hit, **__: cached.append(cache_hit)
    driver.set_active(stand_in(capability))
    start = time.perf_counter()
    function = getattr(importlib.import_module(kernel.module), kernel.name)
    arguments = {name: made(value) for name, value in kernel.arguments}
    configuration = Configuration(function, arguments, dict(kernel.constants), *kernel.options)
    function.warmup(grid=(1,), **configuration.keywords)
    return Compiled(kernel.name, time.perf_counter() - start, all(cached))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("configuration", metavar="CONFIG", help="what `onepeace-fast train` takes, or a model's folder")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes (default: one for each core)")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the matrix products (default: bfloat16)")
    parser.add_argument("--target", metavar="sm_NN", help="compile for this architecture; no GPU need be there")


def run(arguments: argparse.Namespace) -> int:
    """Compile, print a line for each kernel and a total; returns 0, or 2 where something is missing."""
    if kernels.INTERPRETED:
        return _stop("warmup: expected no TRITON_INTERPRET=1, got it: the interpreter compiles nothing; unset it")
    if (reason := kernels.unavailable_reason()) is not None:
        return _stop(f"warmup: {reason}")
    if arguments.target is None and not torch.cuda.is_available():
        return _stop("warmup: expected a CUDA GPU, got none; compile for one that is elsewhere by --target sm_90")

    def progress(done: int, of: int, one: Compiled) -> None:
        print(f"{done:3d} of {of}  {one.seconds:6.1f} s  {one.name}{'  (cached)' if one.cached else ''}", flush=True)

    start = time.perf_counter()
    try:
        config, modalities = read_configuration(arguments.configuration)
        found = warmup(
            config, dtype=getattr(torch, arguments.dtype), target=arguments.target, modalities=modalities,
            jobs=arguments.jobs, progress=progress,
        )  # fmt: skip
    except (ValueError, ImportError) as error:
        return _stop(f"warmup: {error}")
    except OSError as error:
        return _stop(f"warmup: {error.filename}: {error.strerror}")
    cached, taken = sum(one.cached for one in found), time.perf_counter() - start
    where = "all were in the cache" if cached == len(found) else f"{cached} were in the cache"
    print(f"{len(found)} kernels in {taken:.0f} s, {sum(one.seconds for one in found):.0f} s of processes; {where}")
    return 0


def read_configuration(path: str) -> tuple[OnePeaceConfig, Sequence[int] | None]:
    """The model of a training configuration or of a folder that ``save`` wrote, and the modalities of a batch.

    Raises:
        ValueError, OSError: a file that is missing or does not fit.
    """
    if Path(path).is_dir():
        return OnePeaceConfig.load(Path(path) / "config.json"), None
    if Path(path).suffix == ".json":
        return OnePeaceConfig.load(path), None
    if absent := missing(TRAINING_PACKAGES):
        raise ValueError(f"a training configuration needs {', '.join(absent)}; type: {TRAINING_INSTALL}")
    from onepeace_fast.training.config import TrainingConfig

    training = TrainingConfig.load(path)
    init = training.path("init")
    base = OnePeaceConfig() if init is None else OnePeaceConfig.load(init / "config.json")
    return training.model_config(base), (2,)  # text and what the stage pairs it with


def _stop(line: str) -> int:
    print(line, file=sys.stderr)
    return 2
