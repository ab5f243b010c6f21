"""UnIVAL's encoder: feature maps of images, videos and audio before a text."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from onepeace_fast.layers.plain import embedding_table
from onepeace_fast.models.unival.config import UnivalConfig
from onepeace_fast.models.unival.inputs import PADDING, Tokens, taken
from onepeace_fast.models.unival.layers import EncoderLayer
from onepeace_fast.models.unival.layout import Packed, Padded
from onepeace_fast.models.unival.networks import network
from onepeace_fast.models.unival.stack import Layout, Stack


class Encoded(NamedTuple):
    """What the decoder sees of the encoder."""

    x: Tensor  # packed [rows, dim], or padded [samples, length, dim]
    layout: Layout
    places: Tensor  # [places, dim], normalised positions
    through_networks: Collection[str] = ()  # the modalities whose maps they made


class Encoder(Stack):
    """Parameters under upstream's names, and its pass over packed or padded tokens."""

    def __init__(self, config: UnivalConfig) -> None:
        super().__init__(config, config.encoder_layers, config.max_source_positions)
        dim = config.embed_dim
        self.embed_tokens = nn.Embedding(config.vocab_size, dim, PADDING)
        self.type_embedding = nn.Embedding(2, dim)  # text, and anything that is seen or heard
        for name in config.modalities:
            self.add_module(f"{name}_proj", nn.Linear(config.feature_channels, dim))
            if config.networks:
                self.add_module(f"embed_{name}s", network(name, config))
            if name != "image":
                self.add_module(f"embed_{name}_positions", nn.Embedding(config.image_bucket_size**2 + 1, dim))
        self.patch_layernorm_embedding = nn.LayerNorm(dim)
        self.pos_q_linear, self.pos_k_linear = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))

    def forward(
        self, tokens: Mapping[str, Tokens], packed: bool, raw: Mapping[str, Tensor], patches: Mapping[str, Tensor]
    ) -> Encoded:
        """Tokens of every modality of a batch, packed or padded; those of ``raw`` are made by networks."""
        dtype = self.type_embedding.weight.dtype
        # A waveform's spectrogram is computed in float32 at least.
        cast = {name: x if name == "audio" else x.to(dtype) for name, x in raw.items()}
        made = {
            name: tokens[name]._replace(values=taken(self.get_submodule(f"embed_{name}s")(x), patches.get(name)))
            for name, x in cast.items()
        }
        tokens = {**tokens, **made}
        layout = (Packed if packed else Padded)(tokens, "source")
        x = layout.join([self.dropped(self._embedded(name, layout)) for name in tokens])
        places = self.places(layout)
        heads = self.config.attention_heads
        routes = layout.routes(self.pos_q_linear(places), self.pos_k_linear(places), heads, self.vectors(layout))
        noises = self.noises(layout, 2, self.config.encoder_drop_path_rate, x.device)
        for layer, route, noise in zip(self.layers, self.attending(routes), noises, strict=True):
            x = layer(x, route, noise)
        return Encoded(layout.norm(x, self.layer_norm), layout, places, raw)

    def _embedded(self, name: str, layout: Layout) -> Tensor:
        values, kinds = layout.values(name), embedding_table(self.type_embedding, 2)
        if name == "text":
            return layout.norm(self.embed_tokens(values) + kinds[0], self.layernorm_embedding)
        values = values.to(kinds.dtype)
        return layout.norm(self.get_submodule(f"{name}_proj")(values) + kinds[1], self.patch_layernorm_embedding)

    def unread(self, encoded: Encoded) -> list[nn.Parameter]:
        """The parameters that a batch without some modalities, or networks, does not read."""
        names, modules = self.config.modalities, list[nn.Module]()
        absent = [name for name in names if name not in encoded.layout.tokens]
        modules += [self.get_submodule(f"{name}_proj") for name in absent] + [self.position_table(n) for n in absent]
        if self.config.networks:
            modules += [self.get_submodule(f"embed_{name}s") for name in names if name not in encoded.through_networks]
        if len(absent) == len(names):
            modules += [self.image_pos_ln, self.patch_layernorm_embedding, self.image_rel_pos_table_list]
        return [parameter for module in modules for parameter in module.parameters()]
