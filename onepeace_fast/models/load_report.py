"""What loading a file found that is not simply copied."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class LoadReport:
    """What was unknown, left out, fresh, copied or resampled; ``str`` shows it, a line for each kind.

    ``unknown`` are settings of the file that this library does not know, and did not follow. ``left_out`` are weights
    of parts that the model does not have. ``fresh`` are parameters that the file lacks and that start anew.
    ``resampled`` were made for another image size. ``copied`` are the tables of one that was copied to every layer.
    """

    source: str
    model: str = ""
    unknown: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    resampled: list[str] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = {
            "unknown settings, not followed": self.unknown,
            "left out": _by_part(self.left_out),
            "not in the file, fresh": _by_part(self.fresh),
            "resampled": self.resampled,
            "copied to every layer": self.copied,
        }
        lines = [f"  {kind}: {', '.join(items)}" for kind, items in kinds.items() if items]
        return "\n".join([f"{self.model} from {self.source}", *(lines or ["  every parameter as the file has it"])])


def _by_part(names: list[str]) -> list[str]:
    """The first words of parameters' names, with the number of parameters that each stands for."""
    counts: dict[str, int] = {}
    for name in names:
        part = name.partition(".")[0]
        counts[part] = counts.get(part, 0) + 1
    return [part if count == 1 else f"{part} ({count})" for part, count in counts.items()]
