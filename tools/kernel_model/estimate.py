"""What a launch takes on a GPU: the bound of each of its units, and a range of its time.

A product's program walks over tiles. A tile takes its K-steps at the pace that products of this tile reach, then its
epilogue, as long as one warp needs for it at least and as all warps of a scheduler one after another at most. A kernel
over rows takes what its units need at least, and what a program needs for its turns one after another at most. Neither
is faster than a copy of its bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod
from typing import NamedTuple

from tools.kernel_model.compiled import SCHEDULERS, Code, Compiled
from tools.kernel_model.constants import GPU, Constants, Span, constants
from tools.kernel_model.launches import Shape
from tools.products import Product, products

OF_KERNEL = {
    "routed_ffn_hidden": "u, v",
    "routed_ffn_output": "y",
    "routed_ffn_hidden_gradient": "dh",
    "routed_ffn_output_weight_gradient": "dW2",
    "grouped_gemm_weight_gradient": "dW0, dW1",
    "grouped_gemm_input_gradient": "dz",
}


@dataclass(frozen=True)
class Estimate:
    """A launch on a GPU, times in us: the bound of each unit, the whole, and the roofline's share of its middle."""

    name: str
    gpu: str
    flop: int
    traffic: int
    tiles: int
    waves: float
    bounds: dict[str, float]
    time: Span
    roofline: float

    @property
    def share(self) -> float:
        """Of the roofline: the larger of its FLOPs and its bytes at the best rates, over the estimate."""
        return self.roofline / self.time.middle


class Work(NamedTuple):
    """Of a program with products: how many tiles it has, and how many K-steps in all of them."""

    tiles: int
    steps: int


def estimate(kernel: Compiled, gpu: GPU, shape: Shape) -> Estimate:
    """The estimate of a launch."""
    known = constants()
    if kernel.has_products:
        product = product_of(kernel.name, shape)
        flop, of_programs = _walk(product, kernel)
        bounds, time = _product(kernel, gpu, known, product, of_programs)
        tiles = sum(work.tiles for work in of_programs)
    else:
        flop, tiles = 0, kernel.programs * kernel.trips
        bounds, time = _rows(kernel, gpu, known)
    bounds["memory"] = kernel.traffic / gpu.copy
    floor = max(bounds["memory"], flop / gpu.dense)
    at_once = _multiprocessors(gpu) * kernel.resident
    time = Span(max(time.low, floor) + known.launch, max(time.high, floor) + known.launch)
    waves = tiles / min(kernel.programs, at_once) if kernel.has_products else kernel.programs / at_once
    return Estimate(kernel.name, gpu.name, flop, kernel.traffic, tiles, waves, bounds, time, floor)


def product_of(name: str, shape: Shape) -> Product:
    """The product that a launch computes."""
    kernel = name.rpartition(": ")[2]
    wanted = OF_KERNEL.get(kernel)
    known = {product.name: product for product in products(shape.counts, shape.width, shape.hidden)}
    if wanted not in known:
        raise ValueError(f"{kernel}: expected a kernel of {', '.join(OF_KERNEL)}, got one whose product is not known")
    return known[wanted]


def _multiprocessors(gpu: GPU) -> int:
    from tools.cubin import CHIPS

    return CHIPS[gpu.architecture].multiprocessors


def _walk(product: Product, kernel: Compiled) -> tuple[int, list[Work]]:
    """FLOPs that the product needs, and the work of each program, whose tiles lie a launch's programs apart."""
    tile_rows, tile_columns, tile_inner = kernel.tile
    columns = ceil(product.columns / tile_columns)
    longest_first = sorted(
        ((ceil(inner / tile_inner), ceil(rows / tile_rows) * columns)
         for rows, inner in zip(product.rows, product.inner, strict=True)), reverse=True,
    )  # fmt: skip
    steps = [length for length, count in longest_first for _tile in range(count)]
    shares = [steps[program :: kernel.programs] for program in range(kernel.programs)]
    flop = sum(
        2 * rows * product.columns * inner * product.weights
        for rows, inner in zip(product.rows, product.inner, strict=True)
    )
    return flop, [Work(len(share), sum(share)) for share in shares]


def _product(
    kernel: Compiled, gpu: GPU, known: Constants, product: Product, of_programs: list[Work]
) -> tuple[dict[str, float], Span]:
    of_step = prod(kernel.tile) * product.weights / prod(known.step)
    alone = min(kernel.resident, ceil(kernel.programs / _multiprocessors(gpu))) == 1
    shared_clock = known.chips[gpu.architecture].shared_bytes * gpu.clock
    # A step takes as long as tensor cores need, as its operands take through shared memory, or as its warps need.
    of_shared = kernel.warps * kernel.main.shared_bytes / kernel.main_loops / shared_clock
    of_warps = kernel.main.clocks.low / kernel.main_loops / gpu.clock
    step = Span(*(max(pace * of_step, of_shared, of_warps) for pace in gpu.step))
    units = _units(kernel.main, kernel, gpu, known)
    epilogue_units = _units(kernel.epilogue, kernel, gpu, known)
    overhead = _overhead(kernel, gpu, known, alone)
    busiest = max(of_programs, key=lambda work: work.steps * step.high + work.tiles * overhead.high)
    chain = Span(
        busiest.steps * step.low + busiest.tiles * overhead.low,
        busiest.steps * step.high + busiest.tiles * overhead.high,
    )
    # Programs of one multiprocessor share its units: p, p + multiprocessors, ...
    count = _multiprocessors(gpu)
    together = [of_programs[first::count] for first in range(min(count, len(of_programs)))]
    steps = max(sum(work.steps for work in group) for group in together)
    tiles = max(sum(work.tiles for work in group) for group in together)
    bounds = {"tensor": steps * of_step * prod(known.step) * 2 / (gpu.dense / count)}
    for unit, clocks in units.items():
        bounds[unit] = (steps * clocks / kernel.main_loops + tiles * epilogue_units[unit]) / gpu.clock
    least = max([*bounds.values(), steps * step.low])
    return bounds, Span(max(chain.low, least), max(chain.high, least))


def _overhead(kernel: Compiled, gpu: GPU, known: Constants, alone: bool) -> Span:
    """Time of a tile beside its K-steps: the first loads, and the epilogue."""
    latency = known.chips[gpu.architecture].latency
    units = max(_units(kernel.epilogue, kernel, gpu, known).values())
    low = kernel.before.clocks.low + latency["l2"] + max(units, kernel.epilogue.clocks.low)
    high = kernel.before.clocks.high + latency["memory"] + kernel.epilogue.clocks.high
    if not alone:  # at most the other programs' epilogues fall into the same time
        high += (kernel.resident - 1) * kernel.warps / SCHEDULERS * kernel.epilogue.instructions
    least = known.tile_overhead if alone else 0.0
    return Span(max(low / gpu.clock, least), max(high / gpu.clock, least))


def _units(code: Code, kernel: Compiled, gpu: GPU, known: Constants) -> dict[str, float]:
    """Clocks that each unit of a multiprocessor needs for a program's code."""
    rates = known.chips[gpu.architecture].warps_per_clock
    amounts = {"issue": code.instructions, **{name: code.counts.get(name, 0) for name in rates if name != "issue"}}
    clocks = {name: kernel.warps * amount / rates[name] for name, amount in amounts.items()}
    shared = kernel.warps * code.shared_bytes / known.chips[gpu.architecture].shared_bytes
    return {**clocks, "shared": shared}


def _rows(kernel: Compiled, gpu: GPU, known: Constants) -> tuple[dict[str, float], Span]:
    count = _multiprocessors(gpu)
    of_one = ceil(kernel.programs / count)  # programs that a multiprocessor runs, some after others
    resident = min(kernel.resident, of_one)
    waves = ceil(of_one / resident)
    main, rest = _units(kernel.main, kernel, gpu, known), _units(kernel.before, kernel, gpu, known)
    bounds = {unit: of_one * (kernel.trips * main[unit] + rest[unit]) / gpu.clock for unit in main}
    low = kernel.trips * kernel.main.clocks.low + kernel.before.clocks.low
    high = kernel.trips * kernel.main.clocks.high + kernel.before.clocks.high
    others = (resident - 1) * kernel.warps / SCHEDULERS
    high += others * (kernel.trips * kernel.main.instructions + kernel.before.instructions)
    # At most nothing else is done while a program's rows come and go.
    high += kernel.traffic / kernel.programs / known.chips[gpu.architecture].cache_bytes
    least = max(bounds.values())
    return bounds, Span(max(least, waves * low / gpu.clock), max(least, waves * high / gpu.clock))
