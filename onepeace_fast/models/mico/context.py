"""MiCo's context: the encoder's tokens of all modalities, as the text encoder sees them, and the heads beside it.

    context = LN(W_m x + b_m) + frame_m + type_m

for the tokens x of modality m (arXiv 2406.09412, after VAST, arXiv 2305.18500; LN's epsilon is 1e-12). A video of n
frames takes the n rows of its table of frame embeddings by nearest interpolation. A sample has any of the modalities,
each once; all tokens of a batch are packed rows.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onepeace_fast.checks import require
from onepeace_fast.layers.norms import normalized
from onepeace_fast.layers.plain import is_plain
from onepeace_fast.models.mico import state
from onepeace_fast.models.mico.config import LETTERS, ContextConfig
from onepeace_fast.models.mico.layers import activated
from onepeace_fast.route_plan import RoutePlan

CONTEXT_EPS = 1e-12
INITIAL_TEMPERATURE = 0.07


class Tokens(NamedTuple):
    """The encoder's tokens of one modality, its rows in the order of their samples."""

    x: Tensor  # [frames, tokens, vision_dim], the frames of all rows; of a subtitle [tokens of all rows, width]
    counts: Sequence[int]  # frames of each row; of a subtitle its tokens
    samples: Sequence[int]  # of each row, ascending


class PackedContext(NamedTuple):
    """What texts see: packed rows, modality after modality, and in each sample after sample."""

    x: Tensor  # [rows, width]
    plan: RoutePlan


@functools.cache
def frame_rows(rows: int, count: int) -> tuple[int, ...]:
    """The row of a table of ``rows`` frames that each of ``count`` takes, by torch's nearest interpolation.

    Torch multiplies in float32, which a formula in exact numbers does not always equal.
    """
    step = numpy.float32(rows) / numpy.float32(count)
    return tuple(min(int(numpy.float32(frame) * step), rows - 1) for frame in range(count))


class ContrastHead(nn.Module):
    """A matrix under upstream's name."""

    def __init__(self, width: int, contra_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, contra_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, width] to [rows, contra_dim]."""
        return self.linear(x)


class MatchHead(nn.Module):
    """Whether a text belongs to what it sees: W2 LN(gelu(W1 x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(width, width), nn.Linear(width, 2)
        self.layernorm = nn.LayerNorm(width, CONTEXT_EPS)

    def forward(self, x: Tensor, packed: bool) -> Tensor:
        """[rows, width] to [rows, 2]: no, yes."""
        return self.linear2(activated(self.linear1(x), None, self.layernorm, "gelu", packed))


def pooled(x: Tensor, counts: Sequence[int]) -> Tensor:
    """The mean over each row's frames of their CLS: [frames, tokens, width] to [rows, width]."""
    if len({*counts}) == 1:
        return x[:, 0].unflatten(0, (-1, counts[0])).mean(1)
    return torch.stack([row.mean(0) for row in x[:, 0].split([*counts])])


class Context(nn.Module):
    """Projections, embeddings of frames and types, and the heads, under upstream's names.

    Args:
        config: sizes.
    """

    def __init__(self, config: ContextConfig) -> None:
        super().__init__()
        self.context_config = config
        for name in config.modalities:
            width = config.width if name == "subtitle" else config.vision_dim
            trans = nn.Sequential(nn.Linear(width, config.width), nn.LayerNorm(config.width, CONTEXT_EPS))
            self.add_module(f"hidden_trans_{name}_multimodal", trans)
            self.register_parameter(f"{name}_type_embeddings", _embeddings(1, config.width))
            if name in config.frames:
                self.register_parameter(f"{name}_frame_embedding", _embeddings(config.frames[name], config.width))
            self.add_module(f"contra_head_{LETTERS.get(name, name)}", ContrastHead(width, config.contra_dim))
        self.contra_head_t = ContrastHead(config.width, config.contra_dim)
        for name, parts in config.unions.items():
            joined = sum(config.width if part == "subtitle" else config.vision_dim for part in parts)
            self.add_module(f"contra_head_{name}", nn.Linear(joined, config.contra_dim))
        self.contra_temp = nn.Parameter(torch.tensor(INITIAL_TEMPERATURE))
        self.itm_head = MatchHead(config.width)

    def context(self, tokens: Mapping[str, Tokens], packed: bool, pool: bool = False) -> PackedContext:
        """What texts see of a batch.

        Args:
            tokens: {modality: the encoder's tokens}, any of the configuration's, in any order.
            packed: whether norms run the op on rows; else the modules.
            pool: whether each frame is first reduced to its CLS and the mean of its patches.

        Raises:
            ValueError: no modality, or one that the configuration has not.
        """
        config = self.context_config
        unknown = [name for name in tokens if name not in config.modalities]
        require(not unknown, lambda: f"context: expected some of {', '.join(config.modalities)}, got {unknown}")
        require(bool(tokens), "context: expected at least one modality, got none")
        parts, lengths, samples = [], {}, {}
        for name in (name for name in config.modalities if name in tokens):
            own = tokens[name]
            x = own.x
            if pool and name in config.frames:
                x = torch.cat([x[:, :1], x[:, 1:].mean(1, keepdim=True)], 1)
            parts.append(self._rows(name, x, own.counts, packed))
            lengths[name] = [count * (x.shape[1] if name in config.frames else 1) for count in own.counts]
            samples[name] = own.samples
        plan = RoutePlan.from_lengths(lengths, samples=samples, device=parts[0].device)
        return PackedContext(parts[0] if len(parts) == 1 else torch.cat(parts), plan)

    def _rows(self, name: str, x: Tensor, counts: Sequence[int], packed: bool) -> Tensor:
        """The context's rows of one modality."""
        trans = self.get_submodule(f"hidden_trans_{name}_multimodal")
        if packed and is_plain(trans, nn.Sequential):
            linear, norm = trans
            assert isinstance(norm, nn.LayerNorm)
            y = normalized(linear(x).flatten(0, -2), norm)
        else:  # wrapped, or with hooks of its own
            y = trans(x).flatten(0, -2)
        added = self.get_parameter(f"{name}_type_embeddings")[0]
        if name in self.context_config.frames:
            table = self.get_parameter(f"{name}_frame_embedding")[0]
            index = [row for count in counts for row in frame_rows(len(table), count)]
            # An embedding, since its gradient is summed in a fixed order on every device.
            frames = F.embedding(torch.tensor(index, device=y.device), table) + added
            added = frames[:, None].expand(-1, x.shape[1], -1).flatten(0, 1)
        return y + added

    def feature(self, name: str, pooled: Tensor) -> Tensor:
        """The normalised feature of a modality, or of "text": [rows, width] of its pooled tokens to [rows, contra_dim].

        Those of frames are pooled by ``pooled``; a subtitle's and a text's are its first token.
        """
        letter = "t" if name == "text" else LETTERS.get(name, name)
        return F.normalize(self.get_submodule(f"contra_head_{letter}")(pooled), dim=-1)

    def union_feature(self, pooled: Mapping[str, Tensor]) -> Tensor:
        """The normalised feature of samples with these modalities, each [rows, width], together: [rows, contra_dim].

        Upstream's head of just these where it has one; for any others the sum of what their own heads give.
        """
        found = {name for name, parts in self.context_config.unions.items() if {*parts} == {*pooled}}
        if found:
            name = found.pop()
            joined = torch.cat([pooled[part] for part in self.context_config.unions[name]], 1)
            return F.normalize(self.get_submodule(f"contra_head_{name}")(joined), dim=-1)
        heads = (self.get_submodule(f"contra_head_{LETTERS.get(name, name)}")(x) for name, x in pooled.items())
        return F.normalize(torch.stack([*heads]).sum(0), dim=-1)

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        """Those that one modality alone reads."""
        modules = (f"hidden_trans_{name}_multimodal", f"contra_head_{LETTERS.get(name, name)}")
        found = [parameter for module in modules for parameter in self.get_submodule(module).parameters()]
        found.append(self.get_parameter(f"{name}_type_embeddings"))
        return [*found, self.get_parameter(f"{name}_frame_embedding")] if name in self.context_config.frames else found

    def load_upstream_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load upstream's state dict; strict, and nothing is changed unless everything fits.

        Raises:
            ValueError: missing, unexpected or misshaped keys, all of them listed, or a buffer with other values.
        """
        state.load(self, state_dict)

    def to_upstream_state_dict(self, grads: bool = False) -> dict[str, Tensor | None]:
        """Parameters, or with ``grads`` their gradients (None where there is none), under upstream's names."""
        return state.state_dict(self, grads)


def _embeddings(rows: int, width: int) -> nn.Parameter:
    return nn.Parameter(nn.init.normal_(torch.empty(1, rows, width), std=0.02))
