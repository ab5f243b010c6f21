"""The configuration of a MiCo run."""

from __future__ import annotations

from dataclasses import dataclass

from onepeace_fast.checks import require
from onepeace_fast.training.config import SteppedConfig, key, one_of


@dataclass(frozen=True, kw_only=True)
class MicoTrainingConfig(SteppedConfig):
    """A pretraining run of MiCo."""

    family: str = key(one_of(["mico"]), "mico", changes_result=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.batch_size > 1,
            f"batch_size: expected at least 2, since a caption is matched with another's sample, got {self.batch_size}",
        )
        require(
            self.tokenizer is not None or self.init is not None,
            "tokenizer: expected BERT's tokenizer.json, or init with one, got none",
        )
