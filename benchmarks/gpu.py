"""Measure this library on a GPU: python3 benchmarks/gpu.py --out DIR

Writes one JSON file with every time, ceiling, version and error, and prints a table. Needs torch and this library
alone. `--device cpu --quick` runs the same logic over tiny shapes. How things are timed: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.support import attention_goals as goals  # noqa: E402
from benchmarks.support import machine, shapes  # noqa: E402
from benchmarks.support import relative_bias_attention as attention  # noqa: E402
from benchmarks.support.ceilings import ceilings  # noqa: E402
from benchmarks.support.feed_forward import FeedForwardCase  # noqa: E402
from benchmarks.support.layer import MODEL_LAYERS, LayerCase  # noqa: E402
from benchmarks.support.pointwise import GOAL, PointwiseCase, operations  # noqa: E402
from benchmarks.support.report import number, table, write_json  # noqa: E402
from benchmarks.support.shapes import Shape, Sizes  # noqa: E402
from benchmarks.support.timing import clock_for, describe_error  # noqa: E402
from benchmarks.support.variants import HOW_FUSED_RUNS, MODES, Budget, Runner  # noqa: E402

FULL = Sizes(width=1536, hidden=6144, heads=24)
TINY = Sizes(width=64, hidden=128, heads=2)
OWN = ("products", "baseline", "fused")  # without these a run has failed
METHOD = {
    "time": "device time between CUDA events, wall clock on a CPU; variants in turn, round after round; medians",
    "launches": "the device sleeps before the first event while the host queues the work: launch gaps do not count,"
    " unless a variant waits for the device itself or host_median_ms is above 30",
    "forward": "the forward pass of training, which keeps what the backward pass needs",
    "backward": "round by round, forward and backward less forward alone, over the same inputs; their median",
    "inputs": "several sets in turn, together larger than the L2; normal random numbers, never zeros",
    "products": "torch.mm for every projection and FFN product of each modality's rows, torch.bmm for QK^T and PV with"
    " one batch for each length of a sample; backward: two products for each",
    "tax": "median of a variant / median of the bare products of the same run",
    "pointwise": "bytes are those of row tensors, each once each way, whatever a variant moves; the share is of the"
    " copy measured in this run; residual: stream in float32",
    "attention": "q, k, v in the layout that each variant reads best; a dense bias is given, but bias_built makes it"
    " from its tables on every call; its rows begin at multiples of 16 bytes; backward with the gradient of the bias"
    " (dense, vectors or tables) but where a name or note says frozen; all_layers runs a model's layers over one bias"
    " from its tables, autograd adding up each layer's gradient of it and taking the sum to the tables once, and its"
    " times are of one layer; bytes are those of q, k, v and output, and backward of these and their gradients; the"
    " share is of the copy measured in this run, the floor all of it",
    "time_per_pair": "of a query and a key, over that in the whole batch that a part is of: kept patches in order of"
    " position or all of them out of order, drawn at random for each sample",
    "bias": "built once for all layers and not in the layer's time; per_layer_ms is its share of one of"
    f" {MODEL_LAYERS} layers; summing the layers' gradients of the bias is in neither",
}


def full_shapes() -> list[Shape]:
    """The batches that the goals are stated for."""
    return [
        Shape("vision-language 32", {"text": shapes.text(32), "image": shapes.image(32)}),
        Shape("image 64", {"image": shapes.image(64)}),
        Shape("audio 16", {"audio": shapes.audio(16)}),
        Shape("audio-language 16", {"text": shapes.text(16), "audio": shapes.audio(16)}),
    ]


def tiny_shapes() -> list[Shape]:
    """The same kinds of batches, small enough for a test."""
    text, image, audio = shapes.text(3, 2, 6), shapes.image(3, grid=4), shapes.audio(3, 5, 20)
    return [
        Shape("vision-language tiny", {"text": text, "image": image}),
        Shape("image tiny", {"image": image}),
        Shape("audio tiny", {"audio": audio}),
        Shape("audio-language tiny", {"text": text, "audio": audio}),
    ]


def measure_shape(
    shape: Shape, sizes: Sizes, runner: Runner, device: torch.device, dtype: torch.dtype, sets: int
) -> dict[str, Any]:
    """Everything of one shape: the layer, the routed FFN, the bias."""
    result: dict[str, Any] = {
        "name": shape.name,
        "lengths": {name: list(lengths) for name, lengths in shape.lengths.items()},
        "real_tokens": shape.real_tokens,
        "padded_tokens": shape.padded_tokens,
    }
    torch.compiler.reset()  # every shape compiles anew, dynamic=False, and none runs into the limit of recompilations
    try:
        case = LayerCase(shape, sizes, device, dtype, sets)
        result["layer"] = with_tax(runner.measure(case.factories(), base="baseline"))
        result["bias"] = runner.measure(case.bias_factories())
        result["ffn"] = with_tax(runner.measure(FeedForwardCase(case).factories(), base="sliced"))
        result["forward_operations"] = case.products().operations
    except Exception as error:
        result["error"] = describe_error(error)
        runner.clock.recover()
    for record in result.get("bias", {}).values():
        if "forward_backward" in record:
            record["per_layer_ms"] = record["forward_backward"]["median_ms"] / MODEL_LAYERS
    return result


def measure_pointwise(
    shape: Shape, sizes: Sizes, runner: Runner, device: torch.device, dtype: torch.dtype, sets: int,
    copy_bytes_per_second: float | None,
) -> dict[str, Any]:  # fmt: skip
    """Every operation between the products alone, at one shape."""
    torch.compiler.reset()
    results: dict[str, Any] = {}
    case = PointwiseCase(shape, sizes, device, dtype, sets, stream=torch.float32)
    for name, make in operations(case).items():
        try:
            operation = make()
            records = runner.measure(operation.factories, base="eager")
            results[name] = operation.with_shares(records, copy_bytes_per_second)
        except Exception as error:
            results[name] = {"error": describe_error(error), "variants": {}}
            runner.clock.recover()
    return {"shape": shape.name, "rows": shape.real_tokens, "operations": results}


def measure_attention(
    shape: Shape, sizes: Sizes, runner: Runner, device: torch.device, dtype: torch.dtype, sets: int,
    copy_bytes_per_second: float | None, layers: int,
) -> dict[str, Any]:  # fmt: skip
    """Attention with its relative position bias alone, at one shape."""
    torch.compiler.reset()
    lengths = {name: list(lengths) for name, lengths in shape.lengths.items()}
    result: dict[str, Any] = {"name": shape.name, "lengths": lengths, "rows": shape.real_tokens, "variants": {}}
    try:
        operation = attention.AttentionCase(shape, sizes, device, dtype, sets, layers).operation()
        records = runner.measure(operation.factories, base="specification")
        result |= operation.with_shares(records, copy_bytes_per_second)
        result["ratios"] = goals.ratios(records, operation.bytes, copy_bytes_per_second)
        result["goals"] = goals.verdicts(result["ratios"], shape.name)
    except Exception as error:
        result["error"] = describe_error(error)
        runner.clock.recover()
    return result


def with_tax(records: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Add to every variant its time over that of the bare products, for each mode."""
    base = records["products"]
    for record in records.values():
        modes = [mode for mode in MODES if mode in record and mode in base]
        record["tax"] = {mode: round(record[mode]["median_ms"] / base[mode]["median_ms"], 4) for mode in modes}
    return records


def problems(result: dict[str, Any]) -> tuple[list[str], list[str]]:
    """One line for every error and for every variant that was left out."""
    errors, skipped = [], []
    parts = [("ceilings", result["ceilings"])]
    for name, operation in result["pointwise"]["operations"].items():
        parts.append((name, operation["variants"]))
        if "error" in operation:
            errors.append(f"{name}: {operation['error']}")
    for shape in result["attention"]:
        if "error" in shape:
            errors.append(f"attention {shape['name']}: {shape['error']}")
        parts.append((f"attention {shape['name']}", shape["variants"]))
    for shape in result["shapes"]:
        if "error" in shape:
            errors.append(f"{shape['name']}: {shape['error']}")
        parts += [(f"{shape['name']} {part}", shape.get(part, {})) for part in ("layer", "bias", "ffn")]
    for where, records in parts:
        for name, record in records.items():
            if "error" in record:
                errors.append(f"{where} {name}: {record['error']}")
            if "skipped" in record:
                skipped.append(f"{where} {name}: {record['skipped']}")
    return errors, skipped


def summary(result: dict[str, Any]) -> str:
    """The table of a run, compact enough for the end of a log."""
    rows = [("shape, part, variant", "forward ms", "fwd+bwd ms", "tax forward", "tax fwd+bwd", "runs")]
    for shape in result["shapes"]:
        for part in ("layer", "ffn", "bias"):
            for name, record in shape.get(part, {}).items():
                status = "error" if "error" in record else ("left out" if "skipped" in record else "-")
                times = [number(record[mode]["median_ms"], 3) if mode in record else status for mode in MODES]
                taxes = [number(record.get("tax", {}).get(mode), 3) for mode in MODES]
                runs = str(record["forward_backward"]["runs"]) if "forward_backward" in record else "-"
                rows.append((f"{shape['name']}, {part}, {name}", *times, *taxes, runs))
    copy, product = (result["ceilings"][name] for name in ("copy", "product"))
    lines = [table(rows), "", pointwise_summary(result["pointwise"]), "", goals.summary(result["attention"])]
    reasons = Counter(line.split(": ", 1)[1] for line in result["skipped"])
    lines += [f"{count} variants {reason}" for reason, count in reasons.items()]
    lines += [f"ERROR {line}" for line in result["errors"]]
    lines.append(
        f"{result['machine'].get('gpu', result['machine']['processor'])}, torch {torch.__version__}; measured ceilings:"
        f" copy {number(copy.get('GB_per_second'), 0)} GB/s, {product['side']}^3 {product['dtype']} product"
        f" {number(product.get('TFLOP_per_second'))} TFLOP/s; {result['seconds']:.0f} s"
    )
    return "\n".join(lines)


def pointwise_summary(pointwise: dict[str, Any]) -> str:
    """The table of the operations between the products."""
    heads = (f"{pointwise['rows']} rows: operation, variant", "forward ms", "of copy", "fwd+bwd ms", "of copy")
    rows = [heads]
    for name, operation in pointwise["operations"].items():
        for variant, record in operation["variants"].items():
            cells = []
            for mode in MODES:
                timed = record.get(mode, {})
                cells += [number(timed.get("median_ms"), 4), number(timed.get("share_of_copy"), 2)]
            rows.append((f"{name}, {variant}", *cells))
    return f"{table(rows)}\n(goal: {GOAL:.0%} of a copy's bandwidth)"


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure everything."""
    start = time.perf_counter()
    device = torch.device(arguments.device)
    quick, cuda = arguments.quick, device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    sizes, batches = (TINY, tiny_shapes()) if quick else (FULL, full_shapes())
    no_compile = "left out: --quick compiles nothing" if quick else None
    rounds, sets, layers = (3, 2, 3) if quick else (25, 4, MODEL_LAYERS)
    clock = clock_for(device)
    runner = Runner(clock, Budget(arguments.budget_seconds, no_compile), rounds, tolerance=0.05 if cuda else 1e-4)
    result: dict[str, Any] = {
        "date": machine.now(),
        "machine": machine.describe(device),
        "device": str(device),
        "dtype": str(dtype),
        "quick": quick,
        "sizes": vars(sizes),
        "method": METHOD,
        "fused": HOW_FUSED_RUNS,
        "input_sets": sets,
        "budget_seconds": arguments.budget_seconds,
    }
    side, copy_bytes = (128, 2**20) if quick else (8192, 2**30)
    result["ceilings"] = ceilings(device, dtype, clock, side=side, copy_bytes=copy_bytes, rounds=rounds)
    copy_rate = result["ceilings"]["copy"].get("GB_per_second")
    attention_shapes = attention.tiny_shapes() if quick else attention.full_shapes()
    sections = 1 + len(attention_shapes) + len(batches)
    runner.budget.section(left=sections)
    print(f"pointwise operations at {batches[0].name}: {batches[0].real_tokens} rows", flush=True)
    result["pointwise"] = measure_pointwise(
        batches[0], sizes, runner, device, dtype, sets, copy_rate and copy_rate * 1e9
    )
    result["attention"] = []
    for i, shape in enumerate(attention_shapes):
        runner.budget.section(left=sections - 1 - i)
        print(f"attention at {shape.name} tokens: {shape.real_tokens} rows", flush=True)
        bytes_per_second = copy_rate and copy_rate * 1e9
        result["attention"].append(
            measure_attention(shape, sizes, runner, device, dtype, sets, bytes_per_second, layers)
        )
        if cuda:
            torch.cuda.empty_cache()
    goals.add_times_per_pair(result["attention"], attention_shapes)
    result["shapes"] = []
    for i, shape in enumerate(batches):
        runner.budget.section(left=len(batches) - i)
        print(f"{shape.name}: {shape.real_tokens} real, {shape.padded_tokens} padded tokens", flush=True)
        result["shapes"].append(measure_shape(shape, sizes, runner, device, dtype, sets))
        if cuda:
            torch.cuda.empty_cache()
    if cuda:
        result["nvidia_smi_after"] = machine.nvidia_smi()
    result["errors"], result["skipped"] = problems(result)
    result["seconds"] = round(time.perf_counter() - start, 1)
    return result


def failed(result: dict[str, Any]) -> bool:
    """Tell whether the library or what it is compared with could not be measured; a failing peer does not count."""
    alone = [*result["pointwise"]["operations"].values(), *result["attention"]]
    if any("forward_backward" not in operation["variants"].get("fused", {}) for operation in alone):
        return True
    return any(
        "forward_backward" not in shape.get(part, {}).get(name, {})
        for shape in result["shapes"]
        for part, names in (("layer", OWN), ("ffn", ("products", "fused")))
        for name in names
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from a command line; returns 1 where the library or its baseline could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON file")
    parser.add_argument("--device", default="cuda", help="torch device (default: cuda)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few rounds, no torch.compile")
    parser.add_argument("--budget-seconds", type=float, default=420.0, help="time for the whole run (default: 420)")
    chosen = parser.parse_args(arguments)
    if chosen.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"gpu.py needs a CUDA device, and torch {torch.__version__} sees none", file=sys.stderr)
        return 2
    result = run(chosen)
    kind = "gpu-quick" if chosen.quick else "gpu"
    path = chosen.out / machine.file_name(kind, result["machine"], result["date"])
    write_json(path, result)
    print(f"\nWritten to {path}\n\n{summary(result)}", flush=True)
    return int(failed(result))


if __name__ == "__main__":
    sys.exit(main())
