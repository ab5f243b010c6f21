"""A model with what prepares its inputs: lists in, embeddings out, also under upstream's names."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onepeace_fast import pretrained
from onepeace_fast.checks import describe, require
from onepeace_fast.data.audio import SAMPLE_RATE
from onepeace_fast.data.image import FITS
from onepeace_fast.data.processor import Processor, Sizes
from onepeace_fast.data.text import END, MAX_TOKENS, Tokenizer, pad_tokens
from onepeace_fast.embedding.batches import Batches, Name, Note, by_length, each, groups
from onepeace_fast.layers.adapters import PATCH, AudioAdapter
from onepeace_fast.models.base import EmbeddingModel, OnePeaceEncoder
from onepeace_fast.models.classify import OnePeaceClassify
from onepeace_fast.models.clips import embed_clips
from onepeace_fast.progress import Progress, progress

EMBEDDED = ("text", "image", "audio")
BROKEN = ("fatal", "skip")
TOKENIZER_FILES = ("tokenizer.json", "encoder.json")
LONG = 256  # items from which on a bar shows how far they are

_NOT_FINITE = "expected a finite embedding, got infinity or no number; load the model in bfloat16 or float32"
_log = logging.getLogger(__name__)


@dataclass
class Embeddings:
    """What ``Embedder.embed`` returns.

    ``text``, ``image`` and ``audio`` are float32 [items, dim] on the CPU, each row of length 1, or None where none were
    given. A broken item that was skipped has no row: ``places`` says which item of the list each row is of, and
    ``broken`` has a line for each skipped one, by its place.
    """

    text: Tensor | None = None
    image: Tensor | None = None
    audio: Tensor | None = None
    places: dict[str, list[int]] = field(default_factory=dict)
    broken: dict[str, dict[int, str]] = field(default_factory=dict)


class Embedder:
    """Embeds texts, images and sounds; ``process_*`` and ``extract_*`` are those of ONE-PEACE's public interface.

    Args:
        model: in evaluation mode, with projections, such as ``OnePeaceRetrieval``; of an ``OnePeaceClassify`` only
            ``extract_*`` can be used, which then return logits, as upstream's.
        tokenizer: a ``Tokenizer``, a ``tokenizer.json``, or a folder with one or with upstream's ``encoder.json``,
            ``vocab.bpe`` and ``dict.txt``; None where no texts are embedded.
        image_size: pixels of a side; None: as the model's tables of relative positions are made for.
        fit: "squash" as upstream, or "crop", the centre of each image.
        batches: how much goes through the model at once.

    Raises:
        ValueError: a model without projections, in training mode, or whose projections were not in its file.
    """

    def __init__(
        self,
        model: OnePeaceEncoder,
        tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
        *,
        image_size: int | None = None,
        fit: str = FITS[1],
        batches: Batches | None = None,
    ) -> None:
        require(
            isinstance(model, (EmbeddingModel, OnePeaceClassify)),
            lambda: f"model: expected one with projections or a classification head, got {type(model).__name__}",
        )
        require(not model.training, "model: expected it in evaluation mode, got training mode; call its eval()")
        fresh = model.load_report.fresh if model.load_report is not None else []
        drawn = [name for name in fresh if "_proj." in name] if isinstance(model, EmbeddingModel) else []
        require(
            not drawn,
            lambda: (
                f"model: expected a file with projections for embeddings, got one without {', '.join(drawn)}; "
                "a classifier is loaded by model_type='classify'"
            ),
        )
        encoder = model.config.encoder
        if image_size is None and encoder.image is not None:
            grid = encoder.image.bias_grid if encoder.image.use_bias else encoder.image.position_grid
            image_size = grid * PATCH
        adapter = model.encoder.adapter("audio") if encoder.audio is not None else None
        like = next(model.encoder.parameters())
        self.model = model
        self.batches = batches or Batches()
        self.processor = Processor(
            tokenizer if isinstance(tokenizer, Tokenizer) or tokenizer is None else read_tokenizer(tokenizer),
            image_size or PATCH,
            fit=fit,
            frames=adapter.frames if isinstance(adapter, AudioAdapter) else None,
            device=like.device,
            dtype=like.dtype,
        )

    def embed(
        self,
        *,
        text: Sequence[str] | None = None,
        image: Sequence[Any] | None = None,
        audio: Sequence[Any] | None = None,
        broken: str = "fatal",
    ) -> Embeddings:
        """Embed lists of items; rows come in the order given, and none depends on what is beside it.

        A text of more than 70 tokens loses its end, and a sound all behind 15 s, as in upstream; of texts a warning
        says so.

        Args:
            text: strings.
            image: paths, Pillow images or uint8 arrays [height, width, 3].
            audio: paths, or float32 arrays or tensors [samples] at 16 kHz.
            broken: about an item that cannot be used. "fatal": raise; "skip": log one line, do the rest.

        Raises:
            ValueError: nothing given, a modality that the model does not have, or a broken item; one line that names
                the file, or the place in the list of what is no file.
            ImportError: a package that reads the items is missing.
        """
        require(broken in BROKEN, lambda: f"broken: expected one of {', '.join(BROKEN)}, got {broken!r}")
        given = {name: items for name, items in zip(EMBEDDED, (text, image, audio), strict=True) if items is not None}
        require(bool(given), "text, image, audio: expected at least one list, got none")
        for name, items in given.items():
            self.check(name)
            require(
                isinstance(items, Sequence) and not isinstance(items, (str, bytes)),
                lambda name=name, items=items: f"{name}: expected a list, got {describe(items)}",
            )
        total, found = sum(map(len, given.values())), Embeddings()
        bar = progress("Embedding", "item", total) if total > LONG else None
        for name, items in given.items():
            faults: dict[int, str] = {}
            rows = self.embed_block(name, items, faults if broken == "skip" else None, bar)
            for line in faults.values():
                _log.warning("%s; skipped", line)
            found.places[name] = [place for place in range(len(items)) if place not in faults]
            found.broken[name] = faults
            setattr(found, name, rows[found.places[name]])
        if bar is not None:
            bar.close()
        return found

    def check(self, modality: str) -> None:
        """Raise ``ValueError`` where the model cannot embed a modality."""
        known = [name for name in EMBEDDED if name in self.model.config.encoder.modalities]
        require(
            isinstance(self.model, EmbeddingModel),
            lambda: f"model: expected one with projections, got {type(self.model).__name__}",
        )
        require(modality in known, lambda: f"{modality}: expected {' or '.join(known)} for this model, got {modality}")

    @torch.no_grad()
    def embed_block(
        self,
        modality: str,
        items: Sequence[Any],
        faults: dict[int, str] | None = None,
        bar: Progress | None = None,
        name: Callable[[int], str] | None = None,
    ) -> Tensor:
        """Embed items of one modality: float32 [items, dim] on the CPU.

        Args:
            modality: "text", "image" or "audio", which ``check`` has passed.
            items: as of ``embed``.
            faults: gets a line for each broken item by its place, whose row means nothing; None: raise instead.
            bar: is told of every item that was embedded.
            name: what a message calls the item at a place that is no file; None: such as "text[3]".
        """
        rows = torch.zeros(len(items), self.model.config.encoder.embed_dim, dtype=torch.float32, device="cpu")
        found: dict[int, str] = {}
        name = name or f"{modality}[{{}}]".format

        def note(place: int, line: str) -> None:
            if faults is None:
                raise ValueError(line)
            found[place] = line

        passes = {"text": self._texts, "image": self._images, "audio": self._sounds}[modality]
        for places, embedded in passes(items, note, name):
            embedded = F.normalize(embedded.float(), dim=1).cpu()
            for place, finite in zip(places, embedded.isfinite().all(1).tolist(), strict=True):
                if not finite:
                    is_file = modality != "text" and isinstance(items[place], (str, os.PathLike))
                    note(place, f"{os.fspath(items[place]) if is_file else name(place)}: {_NOT_FINITE}")
            rows[places] = embedded
            if bar is not None:
                bar.update(len(places))
        if faults is not None:
            faults.update(sorted(found.items()))
        return rows

    def _texts(self, items: Sequence[Any], note: Note, name: Name) -> Iterator[tuple[list[int], Tensor]]:
        tokenizer = self.processor.tokenizer
        if tokenizer is None:
            raise ValueError("tokenizer: expected one for texts, got None; give a folder with its files")
        ids: dict[int, list[int]] = {}
        cut: list[int] = []
        for place, item in enumerate(items):
            try:
                require(isinstance(item, str), lambda item=item: f"expected a str, got {describe(item)}")
                tokens, _ = tokenizer.tokens(item)
            except ValueError as error:
                note(place, f"{name(place)}: {str(error).removeprefix('caption: ')}")
                continue
            if len(tokens) > MAX_TOKENS:
                cut.append(place)
            ids[place] = [*tokens[:MAX_TOKENS], END]
        if cut:
            _log.warning(
                "text: %d of %d have more than %d tokens and lose their ends, the first is %s",
                len(cut), len(items), MAX_TOKENS, name(cut[0]),
            )  # fmt: skip
        for places in by_length({place: len(row) for place, row in ids.items()}, self.batches.tokens):
            batch, _ = pad_tokens([(ids[place], [False] * len(ids[place])) for place in places])
            yield places, self._embed(text=batch.to(self.processor.device))

    def _images(self, items: Sequence[Any], note: Note, name: Name) -> Iterator[tuple[list[int], Tensor]]:
        read = each("image", items, lambda item: self.processor.process_image([item]), note, name)
        for places, batch in groups(read, lambda _: 1.0, float(self.batches.images)):
            yield places, self._embed(image=torch.cat(batch))

    def _sounds(self, items: Sequence[Any], note: Note, name: Name) -> Iterator[tuple[list[int], Tensor]]:
        read = each("audio", items, lambda item: self.processor.clips([item])[0], note, name)
        for places, clips in groups(read, lambda clip: len(clip) / SAMPLE_RATE, self.batches.seconds):
            assert isinstance(self.model, EmbeddingModel)
            yield places, embed_clips(self.model, clips)

    def _embed(self, **inputs: Tensor) -> Tensor:
        assert isinstance(self.model, EmbeddingModel)
        return self.model.embed(**inputs)

    def process_text(self, text_list: Sequence[str]) -> Tensor:
        """Token ids for ``extract_text_features``, as ``Processor.process_text``."""
        return self.processor.process_text(text_list)

    def process_image(self, image_list: Sequence[Any], return_image_sizes: bool = False) -> Tensor | Sizes:
        """Pixels for ``extract_image_features``, as ``Processor.process_image``."""
        return self.processor.process_image(image_list, return_image_sizes)

    def process_audio(self, audio_list: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Samples and padding for ``extract_audio_features``, as ``Processor.process_audio``."""
        return self.processor.process_audio(audio_list)

    def process_image_text_pairs(
        self, image_text_list: Sequence[tuple[Any, str]], return_image_sizes: bool = False
    ) -> tuple[Tensor | Sizes, Tensor]:
        """Pixels and token ids for ``extract_vl_features``, as ``Processor.process_image_text_pairs``."""
        return self.processor.process_image_text_pairs(image_text_list, return_image_sizes)

    def extract_text_features(self, src_tokens: Tensor) -> Tensor:
        """Embeddings of token ids, or a classifier's logits; gradients flow, as in upstream."""
        return self._features(text=src_tokens)

    def extract_image_features(self, src_images: Tensor) -> Tensor:
        """Embeddings of pixels, or a classifier's logits."""
        return self._features(image=src_images)

    def extract_audio_features(self, src_audios: Tensor, audio_padding_masks: Tensor) -> Tensor:
        """Embeddings of padded sounds, or a classifier's logits; as in upstream they depend on the padding."""
        return self._features(audio=src_audios, audio_padding=audio_padding_masks)

    def extract_vl_features(self, src_images: Tensor, src_tokens: Tensor) -> Tensor:
        """A classifier's logits of images with texts; upstream's models for retrieval have none either.

        Raises:
            ValueError: a model for retrieval.
        """
        require(
            isinstance(self.model, OnePeaceClassify),
            lambda: f"model: expected a classifier, got {type(self.model).__name__}; add the two embeddings up",
        )
        return self._features(text=src_tokens, image=src_images)

    def _features(self, **inputs: Tensor) -> Tensor:
        if isinstance(self.model, OnePeaceClassify):
            return self.model.classify(**inputs)
        return self._embed(**inputs)


def from_pretrained(
    path_or_hub_id: str | Path,
    model_type: str | None = "retrieval",
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    *,
    tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    fit: str = FITS[1],
    batches: Batches | None = None,
    **loading: Any,
) -> Embedder:
    """An ``Embedder`` from a file, under the name and with the first arguments of ONE-PEACE's public interface.

    Args:
        path_or_hub_id, model_type, dtype, image_size: as of ``onepeace_fast.from_pretrained``. "retrieval" leaves a
            decoder out.
        device: None: the GPU where there is one, as upstream.
        tokenizer: as of ``Embedder``; None: the files beside the model's, where they are.
        fit, batches: as of ``Embedder``.
        loading: what else ``onepeace_fast.from_pretrained`` takes.

    Raises:
        ValueError, ImportError: as ``onepeace_fast.from_pretrained`` and ``Embedder``.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if tokenizer is None:
        path = Path(path_or_hub_id).expanduser()
        folder = path if path.is_dir() else path.parent
        there = path.exists() and any((folder / name).is_file() for name in TOKENIZER_FILES)
        tokenizer = folder if there else None
    elif not isinstance(tokenizer, Tokenizer):
        tokenizer = read_tokenizer(tokenizer)  # before the long work
    model = pretrained.from_pretrained(
        path_or_hub_id, model_type=model_type, device=device, dtype=dtype, image_size=image_size, **loading
    )
    return Embedder(model, tokenizer, image_size=image_size, fit=fit, batches=batches)


def read_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """A ``tokenizer.json``, or a folder with one or with upstream's three files.

    Raises:
        ValueError: neither there, or files that do not fit.
    """
    place = Path(path).expanduser()
    if not place.is_dir():
        return Tokenizer.load(place)
    own, public = (place / name for name in TOKENIZER_FILES)
    require(
        own.is_file() or public.is_file(),
        lambda: f"{place}: expected tokenizer.json, or encoder.json, vocab.bpe and dict.txt, got neither",
    )
    return Tokenizer.load(own) if own.is_file() else Tokenizer.from_gpt2(place)
