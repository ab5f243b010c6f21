"""A fourth modality for the demo's model: handwriting as the path of a pen, a series of points instead of an image.

    onepeace-fast demo                        # trains text, images and sounds, and saves the model in report/model
    python examples/pen_strokes.py [FOLDER]   # FOLDER: that model's, report/model by default

Pen strokes are trained with captions alone, and then find images and sounds that they never met. Every output of the
modalities that were there before stays bit for bit the same. docs/new_modality.md explains each step.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from onepeace_fast import OnePeacePretrain
from onepeace_fast.checks import describe, require
from onepeace_fast.config import TransformerConfig
from onepeace_fast.layers.adapters import SeriesAdapter, init_truncated_normal, valid_from_padding
from onepeace_fast.models.losses import contrastive_loss

INK = 6  # of 16: a pixel at least this dark is a point of the path
FEATURES = 6
LONGEST = 64  # pixels of a digit


def pen_path(image: Tensor) -> Tensor:
    """The path of a pen over the dark pixels of an 8 x 8 image of 0 to 16: float32 [points, 6].

    The pen starts at the topmost dark pixel and always goes to the nearest one not yet visited. A point is its row and
    column (0 to 7), the step that led there, the ink, and whether the pen was lifted for the step.
    """
    places = (image >= INK).nonzero().tolist()
    place, points = places.pop(0), []
    last = place
    while True:
        step = (place[0] - last[0], place[1] - last[1])
        lifted = float(max(map(abs, step)) > 1)
        ink = float(image[place[0], place[1]]) / 16
        points.append([*place, *step, ink, lifted])
        if not places:
            return torch.tensor(points)
        last = place
        place = min(places, key=lambda p: ((p[0] - last[0]) ** 2 + (p[1] - last[1]) ** 2, p))
        places.remove(place)


def pad(paths: Sequence[Tensor]) -> dict[str, Tensor]:
    """Paths side by side, as the model takes them: "pen" [rows, points, 6] and "pen_padding" [rows, 1 + points]."""
    value = nn.utils.rnn.pad_sequence(list(paths), batch_first=True)
    lengths = torch.tensor([len(path) for path in paths])
    return {"pen": value, "pen_padding": torch.arange(value.shape[1] + 1) > lengths[:, None]}


class PenAdapter(SeriesAdapter):
    """A token for each point of a pen's path."""

    takes_padding = True

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config.embed_dim, config.attention_heads, config.bias_tables, bucket_size=32)
        width = config.embed_dim
        self.embed_rows, self.embed_columns = nn.Embedding(8, width), nn.Embedding(8, width)
        self.embed_steps = nn.Linear(FEATURES - 2, width)
        self.embed_positions = nn.Parameter(init_truncated_normal(torch.empty(1 + LONGEST, width)))

    def valid(self, name: str, value: Tensor, padding: Tensor | None) -> Tensor:
        fits = value.dim() == 3 and value.shape[1] <= LONGEST and value.shape[2] == FEATURES
        require(fits, f"{name}: expected [rows, points up to {LONGEST}, {FEATURES}], got {describe(value)}")
        return valid_from_padding(name, padding, value.shape[0], 1 + value.shape[1], value.device, tokens="points")

    def tokens(self, value: Tensor) -> Tensor:
        row, column = value[..., 0].long(), value[..., 1].long()
        points = self.embed_rows(row) + self.embed_columns(column) + self.embed_steps(value[..., 2:])
        return torch.cat([self.cls_embedding.expand(value.shape[0], -1, -1), points], dim=1)

    def position_table(self, width: int) -> Tensor:
        return self.embed_positions[:width]


def add_pen(model: OnePeacePretrain) -> None:
    """Give the model pens and freeze everything else."""
    model.add_modality("pen", PenAdapter(model.config.encoder), init_from="image")
    model.train_only("pen")


def train(
    model: OnePeacePretrain, paths: Sequence[Tensor], labels: Tensor, captions: Tensor, steps: int, seed: int
) -> list[float]:
    """Contrast pens with captions in groups of ten digits; returns the loss of every step.

    Args:
        model: after ``add_pen``.
        paths: of the training digits.
        labels: int64, which digit each path draws.
        captions: [digits, templates, embed_dim], the frozen text side.
        steps, seed: of the training.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps, cycle_momentum=False)
    rows_of = [(labels == digit).nonzero().squeeze(1) for digit in range(10)]
    losses = []
    model.train()
    for _ in tqdm(range(steps), desc="Training", unit="step", mininterval=1.0):
        rows = torch.stack([rows[torch.randperm(len(rows), generator=generator)[:4]] for rows in rows_of], 1).flatten()
        which = torch.randint(captions.shape[1], (len(rows),), generator=generator)
        pens = model.embed(**pad([paths[row] for row in rows]))
        texts = captions[labels[rows], which]
        scale = model.logit_scale_exp()
        groups = zip(pens.split(10), texts.split(10), strict=True)
        loss = torch.stack([contrastive_loss(a, b, scale)[0] for a, b in groups]).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 3.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def others(model: OnePeacePretrain, images: Tensor, captions: Tensor) -> list[Tensor]:
    """What the model makes of images and captions, alone and together."""
    pairs = model.encode(text=captions[:10], image=images[:10])
    return [model.embed(image=images), model.embed(text=captions), *pairs.values()]


@torch.no_grad()
def image_accuracy(model: OnePeacePretrain, paths: Sequence[Tensor], images: Tensor, labels: Tensor) -> float:
    """How many pens find, as the nearest image of somebody's other digits, one of their own digit."""
    similarity = model.embed(**pad(paths)) @ model.embed(image=images).t()
    similarity.fill_diagonal_(-2)  # the very image that the path was traced on
    return (labels[similarity.argmax(1)] == labels).float().mean().item()


def main(folder: Path, steps: int = 300, held_out: int = 200) -> dict[str, float]:
    """Add pens to the model in ``folder``, train, and print what they find; returns the figures."""
    from onepeace_fast.demo import data

    torch.set_num_threads(1)  # tensors this small gain nothing from more
    model = OnePeacePretrain.load(folder).eval()
    training, test = data.load()
    vocabulary = data.Vocabulary()
    sentences = [[data.caption(template, digit) for template in data.IMAGE_TEMPLATES] for digit in range(10)]
    with torch.no_grad():
        captions = torch.stack([model.embed(text=vocabulary.encode(texts)) for texts in sentences])
    images, labels = data.enlarge(test.images[:held_out]), test.labels[:held_out]
    test_paths = [pen_path(image) for image in test.images[:held_out]]
    texts = vocabulary.encode([data.caption(data.HELD_OUT_TEMPLATES[0], digit) for digit in range(10)])

    before = others(model, images, texts)
    torch.manual_seed(0)
    add_pen(model)
    untrained = image_accuracy(model.eval(), test_paths, images, labels)
    training_paths = [pen_path(image) for image in training.images]
    losses = train(model, training_paths, training.labels, captions, steps, seed=0)
    found = image_accuracy(model, test_paths, images, labels)
    same = all(torch.equal(a, b) for a, b in zip(before, others(model, images, texts), strict=True))
    print(
        f"{found:.1%} of {len(labels)} pens find an image of their digit; before training {untrained:.1%}, chance 10%."
    )
    print(f"Images, captions and pairs give {'the same bits as before' if same else 'OTHER NUMBERS THAN BEFORE'}.")
    return {"found": found, "untrained": untrained, "first": losses[0], "last": losses[-1], "same": same}


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "report/model"))
