"""Graphs: a token for each node, with its edges in it; a relative bias by depth, which is what code form can say."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onepeace_fast.checks import describe, require, require_tensor
from onepeace_fast.config import TransformerConfig
from onepeace_fast.layers.adapters.adapter import (
    Adapter,
    Fault,
    accepted_floats,
    padded_batch,
    require_items,
    require_size,
    valid_from_padding,
)
from onepeace_fast.layers.parameters import init_truncated_normal
from onepeace_fast.relative_position import CLS_ENTRIES

MOST_DEPTHS = 100  # bfloat16 holds integers up to 256, and the last position is twice as far


class GraphAdapter(Adapter):
    """A token for each node of a graph; the relative bias of two nodes depends on how much deeper one is.

    A node's depth is its distance from node 0, whatever the edges' direction. The depths of two nodes differ by at most
    their distance. Nodes that node 0 does not reach are apart, with one bias to all others and one among each other.
    Its token is a projection of its features, the sum of its neighbours', and the number of edges of each type that
    leave and enter it; beside it stands the embedding of its depth.

    Args:
        config: the model's ``config.encoder``.
        features: numbers of a node; they train best with mean 0 and deviation 1.
        edge_types: how many there are.
        deepest: depth from which on nodes share it.
        longest: nodes of the largest graph.
    """

    takes_padding = True

    def __init__(
        self, config: TransformerConfig, features: int, edge_types: int = 1, deepest: int = 31, longest: int = 1023
    ) -> None:
        require_size("features", features, least=0)
        require_size("edge_types", edge_types)
        require_size("deepest", deepest, most=MOST_DEPTHS)
        require_size("longest", longest)
        rows = 2 * (deepest + 1) + 1 + CLS_ENTRIES
        super().__init__(config.embed_dim, config.attention_heads, config.bias_tables, rows)
        self.features, self.edge_types, self.deepest, self.longest = features, edge_types, deepest, longest
        # Positions 1 to deepest + 1, and one that is further from all of these than they are from each other.
        self.apart = 2 * deepest + 2
        self.position_count = 1 + self.apart
        self.channels = 1 + 2 * features + 2 * edge_types
        self.embed_nodes = nn.Linear(self.channels - 1, config.embed_dim)
        self.embed_positions = nn.Parameter(init_truncated_normal(torch.empty(deepest + 3, config.embed_dim)))

    def batch(self, name: str, graphs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Graphs as the model takes them: the modality ``name`` and its padding, on the CPU.

        Args:
            name: the modality's.
            graphs: the nodes, floating point [nodes, features], and the edges of each, int64 [edges, 2], source and
                target; with several types [edges, 3], the type behind. An edge that is there twice counts twice.

        Returns:
            {name: [rows, nodes, 1 + 2 * features + 2 * edge_types], and bool [rows, 1 + nodes]}.

        Raises:
            ValueError: a graph that does not fit, or an edge to a node that is none; by its place.
        """
        require_items(name, "graphs", graphs)
        found = []
        for place, graph in enumerate(graphs):
            where = f"{name}, graphs[{place}]"
            if not isinstance(graph, tuple) or len(graph) != 2:
                raise ValueError(f"{where}: expected a pair of nodes and edges, got {describe(graph)}")
            found.append(self._nodes(where, *graph))
        return padded_batch(name, found, [len(nodes) for nodes in found])

    def _nodes(self, where: str, nodes: Tensor, edges: Tensor) -> Tensor:
        """A graph's rows of the input, [nodes, channels]."""
        layout, columns = f"nodes [nodes, {self.features}]", 2 if self.edge_types == 1 else 3
        require_tensor(where, nodes, (torch.float32, torch.float64), layout, 2)
        require(nodes.shape[1] == self.features, f"{where}: expected {layout}, got {describe(nodes)}")
        require(len(nodes) <= self.longest, f"{where}: expected up to {self.longest} nodes, got {len(nodes)}")
        require(bool(nodes.isfinite().all()), f"{where}: expected finite features, got others")
        require_tensor(where, edges, (torch.int64,), f"edges [edges, {columns}]", 2)
        require(edges.shape[1] == columns, f"{where}: expected edges [edges, {columns}], got {describe(edges)}")
        nodes, count, ends = nodes.cpu(), len(nodes), edges[:, :2].tolist()
        for i, (source, target) in enumerate(ends):
            if not (0 <= source < count and 0 <= target < count):
                raise ValueError(f"{where}, edge {i}: expected nodes 0 to {count - 1}, got {source} to {target}")
        types = edges[:, 2].tolist() if columns == 3 else [0] * len(ends)
        if unknown := [(i, kind) for i, kind in enumerate(types) if not 0 <= kind < self.edge_types]:
            (i, kind), most = unknown[0], self.edge_types - 1
            raise ValueError(f"{where}, edge {i}: expected a type from 0 to {most}, got {kind}")
        around, leaving, entering = torch.zeros_like(nodes), *nodes.new_zeros(2, count, self.edge_types)
        for (source, target), kind in zip(ends, types, strict=True):
            around[source] += nodes[target]
            around[target] += nodes[source]
            leaving[source, kind] += 1
            entering[target, kind] += 1
        position = nodes.new_tensor([self._position(depth) for depth in depths(count, ends)])
        return torch.cat([position[:, None], nodes, around, leaving, entering], dim=1)

    def _position(self, depth: int | None) -> int:
        return self.apart if depth is None else 1 + min(depth, self.deepest)

    def valid(self, name: str, value: Tensor, padding: Tensor | None) -> Tensor:
        layout = f"[rows, nodes, {self.channels}]"
        require_tensor(name, value, accepted_floats(self.cls_embedding), layout, 3)
        rows, nodes, channels = value.shape
        fits = channels == self.channels and nodes <= self.longest
        require(fits, f"{name}: expected {layout} with nodes up to {self.longest}, got {describe(value)}")
        return valid_from_padding(name, padding, rows, 1 + nodes, value.device, tokens="nodes")

    def faults(self, name: str, value: Tensor, padding: Tensor | None) -> list[Fault]:
        position = value[..., 0]
        near = (position >= 1) & (position <= self.deepest + 1) & (position == position.floor())
        outside = ~(near | (position == self.apart))
        if padding is not None:
            outside = outside & ~padding[:, 1:]
        message = f"{name}: expected positions by depth in channel 0 as batch gives them, got"
        return [*super().faults(name, value, padding), (outside.sum(), lambda n: f"{message} {n} others")]

    def tokens(self, value: Tensor) -> Tensor:
        """Embed [rows, nodes, channels] to [rows, 1 + nodes, embed_dim], positions included."""
        nodes = self.embed_nodes(value[..., 1:])
        tokens = torch.cat([self.cls_embedding.to(nodes.dtype).expand(len(value), -1, -1), nodes], dim=1)
        # An embedding, since its gradient is summed in a fixed order on every device.
        place = self.position_ids(value).clamp(max=self.deepest + 2)
        return tokens + F.embedding(place, self.embed_positions).to(tokens.dtype)

    def position_table(self, width: int) -> Tensor:
        # The tokens have theirs already, which depend on the graph.
        return self.cls_embedding.new_zeros(width, self.cls_embedding.shape[-1])

    def position_ids(self, value: Tensor) -> Tensor:
        """That of each node's depth."""
        return F.pad(value[..., 0].long(), (1, 0))

    def vector_index(self, width: int) -> Tensor:
        most = self.deepest + 1
        distance = torch.arange(1 - width, width, device=self.cls_embedding.device).clamp(-most, most)
        cls = torch.arange(CLS_ENTRIES, device=distance.device) + 2 * most + 1
        return torch.cat([distance + most, cls])


def depths(count: int, edges: Sequence[Sequence[int]]) -> list[int | None]:
    """Edges from node 0 to each node on the shortest way, against their direction too; None where there is no way."""
    neighbours: list[list[int]] = [[] for _ in range(count)]
    for source, target in edges:
        neighbours[source].append(target)
        neighbours[target].append(source)
    found: list[int | None] = [None] * count
    waiting = deque([(0, 0)] if count else [])
    while waiting:
        node, depth = waiting.popleft()
        if found[node] is None:
            found[node] = depth
            waiting.extend((other, depth + 1) for other in neighbours[node])
    return found
