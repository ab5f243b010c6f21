"""What a launch takes on a GPU: the bound of each of its units, and a range of its time.

A product's program walks over tiles. A tile takes its K-steps at the pace that products of this tile reach, then its
epilogue, as long as one warp needs for it at least and as all warps of a scheduler one after another at most. A kernel
over rows takes what its units need at least, and what a program needs for its turns one after another at most. Neither
is faster than a copy of its bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod
from typing import Any, NamedTuple

from tools.kernel_model.compiled import SCHEDULERS, Code, Compiled, Part
from tools.kernel_model.constants import GPU, Constants, Span, constants
from tools.kernel_model.launches import Shape
from tools.products import Product, products

OF_KERNEL = {
    "routed_ffn_hidden": "u, v",
    "routed_ffn_output": "y",
    "routed_ffn_hidden_gradient": "dh",
    "grouped_gradients": "dz, dW",
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
    """How many tiles a program has in one of its loops over them, and how many K-steps in all of these."""

    tiles: int = 0
    steps: int = 0

    def __add__(self, other: Any) -> Work:
        """Both with those of another."""
        return Work(self.tiles + other.tiles, self.steps + other.steps)


def estimate(kernel: Compiled, gpu: GPU, shape: Shape) -> Estimate:
    """The estimate of a launch."""
    known = constants()
    if kernel.has_products:
        product = product_of(kernel.name, shape)
        flop, of_programs = product.flop, _walk(product, kernel)
        bounds, time = _product(kernel, gpu, known, product, of_programs)
        tiles = sum(work.tiles for program in of_programs for work in program)
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


def _walk(product: Product, kernel: Compiled) -> list[list[Work]]:
    """The work of each program in each loop over tiles; its tiles lie a launch's programs apart."""
    tile_rows, tile_columns, tile_inner = kernel.tile
    loops = product.loops or [0] * len(product.rows)
    if len(kernel.parts) != max(loops) + 1:
        raise ValueError(
            f"{kernel.name}: expected {max(loops) + 1} loops over tiles for {product.name}, got {len(kernel.parts)}; "
            "correct tools/products.py"
        )
    tiles = [
        (loop, ceil(inner / tile_inner))
        for loop, rows, columns, inner in zip(loops, product.rows, product.columns, product.inner, strict=True)
        for _tile in range(ceil(rows / tile_rows) * ceil(columns / tile_columns))
    ]
    found = []
    for program in range(kernel.programs):
        mine = tiles[program :: kernel.programs]
        steps = [[steps for loop, steps in mine if loop == part] for part in range(len(kernel.parts))]
        found.append([Work(len(some), sum(some)) for some in steps])
    return found


def _product(
    kernel: Compiled, gpu: GPU, known: Constants, product: Product, of_programs: list[list[Work]]
) -> tuple[dict[str, float], Span]:
    of_step = prod(kernel.tile) * product.weights / prod(known.step)
    steps = [_step(part, kernel, gpu, known, of_step) for part in kernel.parts]
    overheads = [_overhead(part, kernel, gpu, known) for part in kernel.parts]

    def chain(program: list[Work]) -> Span:
        parts = list(zip(program, steps, overheads, strict=True))
        return Span(*(sum(work.steps * step[end] + work.tiles * overhead[end] for work, step, overhead in parts)
                      for end in (0, 1)))  # fmt: skip

    longest = max(map(chain, of_programs), key=lambda span: span.high)
    # Programs of one multiprocessor share its units: p, p + multiprocessors, ...
    count = _multiprocessors(gpu)
    together = [
        [sum(works, Work()) for works in zip(*of_programs[first::count], strict=True)]
        for first in range(min(count, len(of_programs)))
    ]
    of_step_dense = of_step * prod(known.step) * 2 / (gpu.dense / count)
    bounds = {"tensor": max(sum(work.steps for work in group) for group in together) * of_step_dense}
    units = [(_units(part.main, kernel, gpu, known), _units(part.epilogue, kernel, gpu, known), part.main_loops)
             for part in kernel.parts]  # fmt: skip
    for unit in units[0][0]:
        clocks = (
            sum(work.steps * main[unit] / loops + work.tiles * epilogue[unit]
                for work, (main, epilogue, loops) in zip(group, units, strict=True))
            for group in together
        )  # fmt: skip
        bounds[unit] = max(clocks) / gpu.clock
    paces = (sum(work.steps * step.low for work, step in zip(group, steps, strict=True)) for group in together)
    least = max([*bounds.values(), *paces])
    return bounds, Span(max(longest.low, least), max(longest.high, least))


def _step(part: Part, kernel: Compiled, gpu: GPU, known: Constants, of_step: float) -> Span:
    """As long as tensor cores need, as its operands take through shared memory, or as its warps need."""
    of_shared = kernel.warps * part.main.shared_bytes / part.main_loops
    of_shared /= known.chips[gpu.architecture].shared_bytes * gpu.clock
    of_warps = part.main.clocks.low / part.main_loops / gpu.clock
    return Span(*(max(pace * of_step, of_shared, of_warps) for pace in gpu.step))


def _overhead(part: Part, kernel: Compiled, gpu: GPU, known: Constants) -> Span:
    """Time of a tile beside its K-steps: the first loads, and the epilogue."""
    latency = known.chips[gpu.architecture].latency
    alone = min(kernel.resident, ceil(kernel.programs / _multiprocessors(gpu))) == 1
    units = max(_units(part.epilogue, kernel, gpu, known).values())
    low = part.before.clocks.low + latency["l2"] + max(units, part.epilogue.clocks.low)
    high = part.before.clocks.high + latency["memory"] + part.epilogue.clocks.high
    if not alone:  # at most the other programs' epilogues fall into the same time
        high += (kernel.resident - 1) * kernel.warps / SCHEDULERS * part.epilogue.instructions
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
    (part,) = kernel.parts
    main, rest = _units(part.main, kernel, gpu, known), _units(part.before, kernel, gpu, known)
    bounds = {unit: of_one * (kernel.trips * main[unit] + rest[unit]) / gpu.clock for unit in main}
    low = kernel.trips * part.main.clocks.low + part.before.clocks.low
    high = kernel.trips * part.main.clocks.high + part.before.clocks.high
    others = (resident - 1) * kernel.warps / SCHEDULERS
    high += others * (kernel.trips * part.main.instructions + part.before.instructions)
    # At most nothing else is done while a program's rows come and go.
    high += kernel.traffic / kernel.programs / known.chips[gpu.architecture].cache_bytes
    least = max(bounds.values())
    return bounds, Span(max(least, waves * low / gpu.clock), max(least, waves * high / gpu.clock))
