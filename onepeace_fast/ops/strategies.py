"""Which way an operation is computed on a GPU where it has several: as was measured on it, never tuned on first use."""

from __future__ import annotations

import torch

from onepeace_fast.kernels.measured import first_class, gpu_name, measured_file, measured_for

STRATEGIES = ("grouped", "hybrid", "per_modality", "reference")
UNMEASURED = "hybrid"  # by the model of the compiled kernels the fastest on H100 and H200, and level on A100


def measured_classes(operation: str, device: torch.device) -> tuple[tuple[int | None, int | None, str], ...]:
    """The classes of shapes of an operation that were measured on this GPU: (most columns, most rows, strategy).

    Raises:
        ValueError: the GPU's file is damaged, or names a strategy that there is not.
    """
    name = gpu_name(device)
    classes = measured.classes(operation) if (measured := measured_for(name)) is not None else ()
    if unknown := {strategy for _, _, strategy in classes} - set(STRATEGIES):
        raise ValueError(
            f"{measured_file(name)}: expected strategies of {', '.join(STRATEGIES)}, got {', '.join(sorted(unknown))}; "
            "delete the file and run `onepeace-fast selftest` again"
        )
    return classes


# What torch.compiler.assume_constant_result sets, without the seconds that an import of Dynamo takes: it does not
# trace the reading of a file.
measured_classes._dynamo_marked_constant = True  # type: ignore[attr-defined]


def strategy_for(operation: str, device: torch.device, rows: int, width: int) -> str:
    """The strategy that was fastest on such a GPU for so many rows of this width."""
    return first_class(measured_classes(operation, device), rows, width) or UNMEASURED
