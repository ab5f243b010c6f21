"""A page of what a search found: pictures, players and texts, best first."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onepeace_fast.embedding.search import Hit
from onepeace_fast.embedding.store import write_text
from onepeace_fast.installation import optional


def write_page(path: Path, query: Mapping[str, Sequence[str]], hits: Sequence[Hit]) -> None:
    """Write the page in one step; it links to the files where they are.

    Args:
        path: of the page.
        query: {modality: texts or paths}, what was looked for.
        hits: best first.

    Raises:
        ValueError: the page cannot be written.
        ImportError: jinja2 is missing.
    """
    jinja: Any = optional("jinja2", "search")
    environment = jinja.Environment(
        loader=jinja.PackageLoader("onepeace_fast.embedding"), autoescape=True, undefined=jinja.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    asked = [_shown(modality, value) for modality, values in query.items() for value in values]
    found = [{**_shown(hit.item.modality, hit.item.value), "score": f"{hit.score:.3f}"} for hit in hits]
    text = environment.get_template("results.html").render(asked=asked, found=found)
    write_text(path, text)


def _shown(modality: str, value: str) -> dict[str, str]:
    if modality == "text":
        return {"modality": modality, "name": value, "address": ""}
    place = Path(os.path.abspath(os.path.expanduser(value)))
    return {"modality": modality, "name": place.name, "address": place.as_uri()}
