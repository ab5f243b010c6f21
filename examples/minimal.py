"""ONE-PEACE (arXiv 2305.11172) for text and images in one file, over the public operations, under upstream's names.

All real tokens of a batch stand in one matrix [rows, dim] without padding: every text token, then every patch. A token
attends to its whole sample, and each modality has a feed-forward network of its own. Not here: audio, denoising, images
of another size. `python examples/minimal.py` trains a small one on made-up captions and images, seconds on a CPU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onepeace_fast import RoutePlan, layer_norm, relative_bias_attention, residual_layer_norm, routed_ffn
from onepeace_fast import relative_position as relative
from onepeace_fast.drop_path import draw_drop_path
from onepeace_fast.models.losses import contrastive_loss

BUCKETS = 256  # of distances in a text: exact when near, logarithmic when far
Embedded = tuple[
    Tensor, Tensor, Tensor, Tensor, int
]  # tokens, which are real, bias vector, codes, entry of equal codes


class Text(nn.Module):
    def __init__(self, dim: int, heads: int, vocabulary: int) -> None:
        super().__init__()
        self.cls_embedding = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.embed_tokens, self.embed_positions = nn.Embedding(vocabulary, dim, 1), nn.Embedding(514, dim)
        self.rel_pos_table_list = nn.ModuleList([nn.Embedding(relative.series_table_rows(BUCKETS), heads)])

    def forward(self, text: Tensor) -> Embedded:  # [rows, length], 1 is padding
        x = torch.cat([self.cls_embedding.expand(len(text), -1, -1), self.embed_tokens(text)], dim=1)
        width, real = x.shape[1], F.pad(text != 1, (1, 0), value=True)
        table_rows = relative.series_vector_index(relative.series_index(BUCKETS), BUCKETS, width)
        bias, codes = self.rel_pos_table_list[0](table_rows.to(x.device)).t(), torch.arange(width, device=x.device)
        return x + self.embed_positions.weight[:width], real, bias, codes, width - 1


class ChannelNorm(nn.ModuleDict):
    def forward(self, x: Tensor) -> Tensor:  # [rows, channels, height, width], over the channels
        return self["layer_norm"](x.movedim(1, -1)).movedim(-1, 1)


class Image(nn.Module):
    def __init__(self, dim: int, heads: int, grid: int) -> None:
        super().__init__()
        self.grid, part = grid, dim // 4
        self.cls_embedding = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(grid**2 + 1, dim))
        self.rel_pos_table_list = nn.ModuleList([nn.Embedding(relative.grid_table_rows(grid), heads)])
        first, then, last = nn.Conv2d(3, part, 4, 4), nn.Conv2d(part, part, 2, 2), nn.Conv2d(part, dim, 2, 2)
        norms = [ChannelNorm({"layer_norm": nn.LayerNorm(part)}) for _ in range(2)]
        self.embed_images = nn.Sequential(first, norms[0], nn.GELU(), then, norms[1], nn.GELU(), last)

    def forward(self, image: Tensor) -> Embedded:  # [rows, 3, 16 * grid, 16 * grid]
        patches = self.embed_images(image).flatten(2).mT
        x = torch.cat([self.cls_embedding.expand(len(image), -1, -1), patches], dim=1)
        codes, same = relative.grid_codes(self.grid, self.grid, x.device), relative.grid_code_offset(self.grid)
        real, bias = x.new_ones(x.shape[:2], dtype=torch.bool), self.rel_pos_table_list[0].weight.t()
        return x + self.pos_embed, real, bias, codes, same


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.q_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.k_proj, self.ln, self.heads = nn.Linear(dim, dim, bias=False), nn.LayerNorm(dim), heads

    def forward(self, z: Tensor, plan: RoutePlan, bias: list[Tensor]) -> Tensor:
        qkv = torch.stack([self.q_proj(z), self.k_proj(z), self.v_proj(z)], dim=1).unflatten(2, (self.heads, -1))
        y = relative_bias_attention(
            qkv, cu_seqlens=plan.cu_seqlens, modality=plan.modality, code=plan.code, is_cls=plan.is_cls, bias=bias,
            code_offsets=plan.code_offsets, max_length=plan.max_length,
        )  # fmt: skip
        return self.out_proj(layer_norm(y.flatten(1), self.ln.weight, self.ln.bias))  # Sub-LayerNorm


class Layer(nn.Module):
    def __init__(self, dim: int, hidden: int, heads: int, layer_scale: float) -> None:
        super().__init__()
        self.self_attn, self.self_attn_layer_norm = Attention(dim, heads), nn.LayerNorm(dim)
        self.final_layer_norm = nn.LayerNorm(dim)
        for name in ("text_ffn", "image_ffn"):
            gate = nn.ModuleDict({part: nn.Linear(dim, hidden, bias=False) for part in ("wi_0", "wi_1")})
            sub_norm, out = nn.LayerNorm(hidden), nn.Linear(hidden, dim)
            self.add_module(name, nn.ModuleList([gate, nn.Identity(), sub_norm, out]))
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((dim,), layer_scale)) for _ in range(2))

    def forward(self, x: Tensor, plan: RoutePlan, bias: list[Tensor], drop_path: Tensor) -> Tensor:
        norm, then = self.self_attn_layer_norm, self.final_layer_norm
        y = self.self_attn(layer_norm(x, norm.weight, norm.bias), plan, bias)
        # x <- x + drop_path * gamma_1 * y,  z = LayerNorm(x)
        x, z = residual_layer_norm(
            x, y, self.gamma_1, then.weight, then.bias, drop_path=drop_path[0], sample=plan.sample
        )
        gates, _, norms, outs = zip(*(self.get_submodule(f"{name}_ffn") for name in plan.modalities), strict=True)
        # x <- x + drop_path * gamma_2 * W2 LayerNorm(gelu(W0 z) * W1 z), by the weights of each row's modality
        return routed_ffn(
            z, [g["wi_0"].weight for g in gates], [g["wi_1"].weight for g in gates], [o.weight for o in outs],
            [o.bias for o in outs], norm_weight=[n.weight for n in norms], norm_bias=[n.bias for n in norms],
            offsets=plan.offsets, residual=x, gamma=self.gamma_2, drop_path=drop_path[1], sample=plan.sample,
        )  # fmt: skip


class OnePeace(nn.Module):
    def __init__(
        self, dim: int = 1536, hidden: int = 6144, layers: int = 40, heads: int = 24, layer_scale: float = 1e-6,
        drop_path: float = 0.4, vocabulary: int = 50264, grid: int = 16,
    ) -> None:  # fmt: skip
        super().__init__()
        stack = nn.ModuleDict({f"{name}_layer_norm": nn.LayerNorm(dim) for name in ("text", "image")})
        stack["layers"] = nn.ModuleList(Layer(dim, hidden, heads, layer_scale) for _ in range(layers))
        adapters = {"text_adapter": Text(dim, heads, vocabulary), "image_adapter": Image(dim, heads, grid)}
        self.encoder_wrapper = nn.ModuleDict({**adapters, "fusion_model": stack})
        self.text_proj, self.image_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        self.rates = torch.linspace(0, drop_path, layers).tolist()

    def encode(self, **inputs: Tensor) -> dict[str, Tensor]:  # each modality's tokens [rows, length, dim], CLS first
        embedded = [self.encoder_wrapper[f"{name}_adapter"](x) for name, x in inputs.items()]
        tokens, real, bias, codes, same = (dict(zip(inputs, part, strict=True)) for part in zip(*embedded, strict=True))
        plan = RoutePlan.from_masks(real, first_is_cls=True, codes=codes, code_offsets=same)
        x, stack = plan.pack(tokens), self.encoder_wrapper["fusion_model"]
        keeps = draw_drop_path(
            self.rates if self.training else [0.0] * len(self.rates), plan.sample_count
        )  # [layers, 2, samples]
        for layer, keep in zip(stack["layers"], keeps, strict=True):
            x = layer(x, plan, list(bias.values()), keep)
        norms = [stack[f"{name}_layer_norm"] for name in plan.modalities]
        return plan.unpack(layer_norm(x, [n.weight for n in norms], [n.bias for n in norms], offsets=plan.offsets))

    def embed(self, **inputs: Tensor) -> Tensor:  # of one modality: its CLS, projected, of length 1
        ((name, tokens),) = self.encode(**inputs).items()
        return F.normalize(self.get_submodule(f"{name}_proj")(tokens[:, 0]), dim=1)


if __name__ == "__main__":
    torch.manual_seed(0)
    model = OnePeace(64, 128, layers=2, heads=2, layer_scale=0.1, drop_path=0.1, vocabulary=32, grid=2)
    optimizer, pictures = torch.optim.AdamW(model.parameters(), lr=3e-3), torch.randn(16, 3, 32, 32)
    for step in range(41):
        kind = torch.randperm(16)  # each kind once: its picture in noise, and a caption that names it
        image = pictures[kind] + 0.5 * torch.randn(16, 3, 32, 32)
        text = torch.stack([4 + kind, torch.randint(20, 32, (16,)), 1 + kind % 2], dim=1)  # 1 is padding
        loss, found, _ = contrastive_loss(model.embed(text=text), model.embed(image=image), model.logit_scale.exp())
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step}: loss {loss:.3f}, {found:.0f} of 16 captions find their image")
