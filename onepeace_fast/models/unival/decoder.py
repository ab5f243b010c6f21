"""UnIVAL's decoder: each sample's text, or the codes of its image, behind what the encoder saw."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from onepeace_fast.models.unival.config import UnivalConfig
from onepeace_fast.models.unival.encoder import Encoded
from onepeace_fast.models.unival.inputs import Tokens
from onepeace_fast.models.unival.layers import DecoderLayer
from onepeace_fast.models.unival.stack import Layout, Stack


class Decoder(Stack):
    """Parameters under upstream's names, and its pass; the token table, the output's too, is the encoder's."""

    def __init__(self, config: UnivalConfig) -> None:
        super().__init__(config, config.decoder_layers, config.max_target_positions)
        dim = config.embed_dim
        self.code_layernorm_embedding = nn.LayerNorm(dim)
        self.self_pos_q_linear, self.self_pos_k_linear = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.cross_pos_q_linear, self.cross_pos_k_linear = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))

    def forward(
        self, tokens: Mapping[str, Tokens], table: nn.Module, encoded: Encoded, name: str
    ) -> tuple[Tensor, Layout]:
        """The normalised tokens behind the last layer, packed or padded as the encoder's are, and their layout.

        ``name`` is that of the tokens in an error.
        """
        layout = type(encoded.layout)(tokens, name, causal=True)
        norms = {"text": self.layernorm_embedding, "code": self.code_layernorm_embedding}
        x = layout.join([
            self.dropped(layout.norm(table(layout.values(name)), norms[name])) for name in tokens
        ])  # fmt: skip
        places, heads, none = self.places(layout), self.config.attention_heads, [()]
        own = layout.routes(self.self_pos_q_linear(places), self.self_pos_k_linear(places), heads, self.vectors(layout))
        (cross,) = layout.routes(
            self.cross_pos_q_linear(places), self.cross_pos_k_linear(encoded.places), heads, none,
            encoded.layout,  # type: ignore[arg-type]  # both are packed, or both padded
        )  # fmt: skip
        (cross,) = self.attending([cross])
        noises = self.noises(layout, 3, self.config.decoder_drop_path_rate, x.device)
        for layer, route, noise in zip(self.layers, self.attending(own), noises, strict=True):
            x = layer(x, encoded.x, route, cross, noise)
        return layout.norm(x, self.layer_norm), layout

    def unread(self, tokens: Mapping[str, Tokens]) -> list[nn.Parameter]:
        """The parameters that a batch without texts, or without codes, does not read."""
        modules: list[nn.Module] = []
        if "code" not in tokens:
            modules += [self.code_layernorm_embedding, self.embed_image_positions, self.image_pos_ln]
            modules.append(self.image_rel_pos_table_list)
        if "text" not in tokens:
            modules += [self.layernorm_embedding, self.embed_positions, self.pos_ln, self.token_rel_pos_table_list]
        return [parameter for module in modules for parameter in module.parameters()]
