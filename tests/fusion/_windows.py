"""Small models with the names, arguments and outputs of transformers' attention of Swin and BEiT, for these tests."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from fusion._checks import Case
from torch import nn

WIDTH, HEADS = 32, 2


class Attention(nn.Module):
    """What both have: four projections, and a bias or mask that is added to the scores."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(output_attentions=False)
        self.head_dim, self.scaling, self.attention_dropout = WIDTH // HEADS, (WIDTH // HEADS) ** -0.5, 0.0
        self.is_causal = False
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def attend(self, x, added):
        parts = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        scores = q @ k.transpose(-1, -2) * self.scaling
        p = (scores if added is None else scores + added).softmax(-1)
        p = F.dropout(p, self.attention_dropout, self.training)
        return self.o_proj((p @ v).transpose(1, 2).flatten(2)), p


def distances(window):
    """The table's row of each pair of a window."""
    place = torch.cartesian_prod(*map(torch.arange, window))
    apart = place[:, None] - place[None] + torch.tensor(window) - 1
    return apart[..., 0] * (2 * window[1] - 1) + apart[..., 1]


class WindowBias(nn.Module):
    def __init__(self, window):
        super().__init__()
        self.window_size = window
        rows = (2 * window[0] - 1) * (2 * window[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, HEADS))

    def forward(self):
        return self.relative_position_bias_table[distances(self.window_size)].permute(2, 0, 1)[None]


class WindowAttention(Attention):
    def __init__(self, window):
        super().__init__()
        self.relative_position_bias = WindowBias(window)

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        added = self.relative_position_bias()
        if attention_mask is not None:
            added = added + attention_mask.repeat(len(hidden_states) // len(attention_mask), 1, 1)[:, None]
        return self.attend(hidden_states, added)


class WindowLayer(nn.Module):
    """Attention in windows of an image [batch, height * width, WIDTH], shifted or not."""

    def __init__(self, size, window, shift):
        super().__init__()
        self.size, self.window, self.shift = size, window, shift
        self.attention, self.norm = WindowAttention(window), nn.LayerNorm(WIDTH)

    def windows(self, x):
        (height, width), (a, b) = self.size, self.window
        x = x.view(-1, height // a, a, width // b, b, x.shape[-1]).transpose(2, 3)
        return x.reshape(-1, a * b, x.shape[-1])

    def mask(self):
        if not self.shift:
            return None
        regions = [
            (torch.arange(n) >= n - w).long() + (torch.arange(n) >= n - self.shift).long()
            for n, w in zip(self.size, self.window, strict=True)
        ]
        region = self.windows((3 * regions[0][:, None] + regions[1]).view(1, -1, 1))[..., 0]
        return (region[:, None] != region[:, :, None]) * -100.0

    def forward(self, x, **kwargs):
        (height, width), (a, b) = self.size, self.window
        rolled = self.norm(x).view(-1, height, width, WIDTH).roll((-self.shift, -self.shift), (1, 2))
        mask = self.mask()
        out, p = self.attention(self.windows(rolled), None if mask is None else mask.to(x), **kwargs)
        out = out.view(-1, height // a, width // b, a, b, WIDTH).transpose(2, 3).reshape(-1, height, width, WIDTH)
        return x + out.roll((self.shift, self.shift), (1, 2)).reshape(x.shape), p


class Windows(nn.Module):
    def __init__(self, size=(6, 9), window=(3, 3), shifts=(0, 1)):
        super().__init__()
        self.layers = nn.ModuleList([WindowLayer(size, window, shift) for shift in shifts])

    def forward(self, x, **kwargs):
        for layer in self.layers:
            x, _ = layer(x, **kwargs)
        return x


class ImageBias(nn.Module):
    """Of patches behind a CLS; BEiT resamples its table for other windows, this one takes its middle."""

    def __init__(self, window):
        super().__init__()
        self.window_size = window
        rows = (2 * window[0] - 1) * (2 * window[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows + 3, HEADS))

    def forward(self, window, interpolate_pos_encoding=False, dim_size=None):
        sides = [2 * side - 1 for side in self.window_size]
        table = self.relative_position_bias_table[:-3].view(*sides, HEADS)
        cut = [(side - (2 * own - 1)) // 2 for side, own in zip(sides, window, strict=True)]
        table = table[cut[0] : sides[0] - cut[0], cut[1] : sides[1] - cut[1]].reshape(-1, HEADS)
        bias = F.pad(table[distances(window)], (0, 0, 1, 0, 1, 0))
        of_cls = torch.zeros(bias.shape[:2], dtype=torch.long)
        of_cls[0], of_cls[:, 0], of_cls[0, 0] = 1, 2, 3
        rows = torch.cat([torch.zeros_like(table[:1]), self.relative_position_bias_table[-3:]])
        return (bias + rows[of_cls]).permute(2, 0, 1)[None]


class ImageAttention(Attention):
    def forward(self, hidden_states, attention_mask=None, **kwargs):
        return self.attend(hidden_states, attention_mask)


class ImageLayer(nn.Module):
    def __init__(self, window):
        super().__init__()
        self.patch_size = 4
        self.attention, self.layernorm_before = ImageAttention(), nn.LayerNorm(WIDTH)
        self.lambda_1, self.relative_position_bias = nn.Parameter(torch.ones(WIDTH)), ImageBias(window)

    def forward(self, hidden_states, attention_mask=None, interpolate_pos_encoding=False, resolution=None, **kwargs):
        window = (resolution[0] // self.patch_size, resolution[1] // self.patch_size)
        bias = self.relative_position_bias(window, interpolate_pos_encoding, dim_size=hidden_states.shape[1])
        added = bias if attention_mask is None else bias + attention_mask
        out, _ = self.attention(self.layernorm_before(hidden_states), attention_mask=added, **kwargs)
        return hidden_states + self.lambda_1 * out


class Images(nn.Module):
    def __init__(self, window=(3, 4), count=2):
        super().__init__()
        self.layers = nn.ModuleList([ImageLayer(window) for _ in range(count)])

    def forward(self, x, resolution=(12, 16), attention_mask=None, **kwargs):
        for layer in self.layers:
            x = layer(x, attention_mask=attention_mask, resolution=resolution, **kwargs)
        return x


def randomised(model):
    for name, parameter in model.named_parameters():
        if "norm" in name or "lambda" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            nn.init.normal_(parameter, std=0.5 if "relative" in name else 0.15)
        if name.endswith("k_proj.bias"):  # its gradient is zero but for rounding
            parameter.requires_grad_(False)
    return model.eval()


def model(kind, **settings):
    torch.manual_seed(0)
    return randomised({"swin": Windows, "beit": Images}[kind](**settings))


def tokens(seed, *shape):
    return {"x": torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed))}


CASES = {
    "swin": Case(lambda: model("swin"), lambda seed: tokens(seed, 2, 54), ("layers.0.attention", "layers.1.attention")),
    "beit": Case(lambda: model("beit"), lambda seed: tokens(seed, 3, 13), ("layers.0", "layers.1")),
}
