"""Point clouds: a token for each group of neighbours, by a small PointNet (arXiv 1612.00593, as in 2111.14819)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from onepeace_fast.checks import describe, require, require_tensor
from onepeace_fast.config import TransformerConfig, is_number
from onepeace_fast.layers.adapters.adapter import (
    Adapter,
    Fault,
    accepted_floats,
    padded_batch,
    require_items,
    require_size,
    valid_from_padding,
)
from onepeace_fast.relative_position import CLS_ENTRIES, window_code_offset, window_codes, window_table_rows

AXES = 3


class PointAdapter(Adapter):
    """A token for each group of points; its position is that of the group's centre in space.

    A group is seen relative to its centre, in radii of the group, with the radius beside: by two layers, the maximum
    over its points, two more beside that maximum, and the maximum again. The centre goes through two layers as position
    embedding. The relative bias of two groups depends on how many cells of a cube apart their centres are.

    Args:
        config: the model's ``config.encoder``.
        features: numbers of a point behind its coordinates.
        groups: most groups of a cloud.
        members: points of a group.
        extent: coordinates reach from ``-extent`` to ``extent``, in the cloud's own unit.
        bias_grid: cells of the cube's side.
    """

    takes_padding = True

    def __init__(
        self, config: TransformerConfig, features: int = 0, groups: int = 64, members: int = 32, extent: float = 1.0,
        bias_grid: int = 8,
    ) -> None:  # fmt: skip
        require(is_number(extent) and extent > 0, f"extent: expected a positive number, got {describe(extent)}")
        require_size("features", features, least=0)
        for name, size in (("groups", groups), ("members", members), ("bias_grid", bias_grid)):
            require_size(name, size)
        grid = (bias_grid,) * AXES
        rows = window_table_rows(grid) + CLS_ENTRIES
        super().__init__(config.embed_dim, config.attention_heads, config.bias_tables, rows)
        self.grid = grid
        self.channels, self.groups, self.members, self.extent = AXES + features, groups, members, extent
        self.position_count = 1 + bias_grid**AXES
        width, hidden = config.embed_dim, max(1, config.embed_dim // 2)
        self.embed_points = _two_layers(self.channels + 1, hidden, hidden)
        self.embed_groups = _two_layers(2 * hidden, width, width)
        self.embed_positions = _two_layers(AXES, width, width)

    def batch(self, name: str, clouds: Sequence[Tensor]) -> dict[str, Tensor]:
        """Clouds as the model takes them: the modality ``name`` and its padding, on the clouds' device.

        Args:
            name: the modality's.
            clouds: floating point [points, 3 + features] each, of any number of points, in any order.

        Returns:
            {name: [rows, groups, members, 3 + features], a group's centre first, and bool [rows, 1 + groups]}.

        Raises:
            ValueError: a cloud that does not fit, by its place.
        """
        require_items(name, "clouds", clouds)
        grouped = []
        for place, cloud in enumerate(clouds):
            where, layout = f"{name}, clouds[{place}]", f"[points, {self.channels}]"
            require_tensor(where, cloud, (torch.float32, torch.float64), layout, 2)
            require(cloud.shape[1] == self.channels, f"{where}: expected {layout}, got {describe(cloud)}")
            finite = cloud.isfinite().all(1)
            require(
                bool(finite.all()), f"{where}: expected finite numbers, got others in {int((~finite).sum())} points"
            )
            farthest = float(cloud[:, :AXES].abs().max()) if len(cloud) else 0.0
            require(
                farthest <= self.extent,
                f"{where}: expected coordinates from -{self.extent} to {self.extent}, got {farthest:.4g}; centre and "
                "scale the cloud, or give extent",
            )
            grouped.append(group_points(cloud, self.groups, self.members))
        return padded_batch(name, grouped, [len(groups) for groups in grouped])

    def valid(self, name: str, value: Tensor, padding: Tensor | None) -> Tensor:
        layout = f"[rows, groups, {self.members}, {self.channels}]"
        require_tensor(name, value, accepted_floats(self.cls_embedding), layout, 4)
        rows, groups, *shape = value.shape
        fits = shape == [self.members, self.channels] and groups <= self.groups
        require(fits, f"{name}: expected {layout} with groups up to {self.groups}, got {describe(value)}")
        return valid_from_padding(name, padding, rows, 1 + groups, value.device, tokens="groups")

    def faults(self, name: str, value: Tensor, padding: Tensor | None) -> list[Fault]:
        outside = ~(value[..., :AXES].abs() <= self.extent)
        message = f"{name}: expected coordinates from -{self.extent} to {self.extent}"
        return [
            *super().faults(name, value, padding),
            (outside.sum(), lambda n: f"{message}, got {n} others; centre and scale the clouds, or give extent"),
        ]

    def tokens(self, value: Tensor) -> Tensor:
        """Embed [rows, groups, members, channels] to [rows, 1 + groups, embed_dim], positions included."""
        centre = value[:, :, :1, :AXES] / self.extent
        apart = value[..., :AXES] / self.extent - centre
        squares = apart.square().sum(-1, keepdim=True).amax(2, keepdim=True)
        radius = torch.where(squares > 0, squares, 1).sqrt()  # 1 where all points are one, which are 0 apart
        points = torch.cat([apart / radius, radius.expand(*apart.shape[:3], 1), value[..., AXES:]], dim=-1)
        points = self.embed_points(points)
        whole = points.amax(2, keepdim=True).expand_as(points)
        groups = self.embed_groups(torch.cat([whole, points], dim=-1)).amax(2) + self.embed_positions(centre[:, :, 0])
        return torch.cat([self.cls_embedding.to(groups.dtype).expand(len(value), -1, -1), groups], dim=1)

    def position_table(self, width: int) -> Tensor:
        # The tokens have theirs already, which depend on the cloud.
        return self.cls_embedding.new_zeros(width, self.cls_embedding.shape[-1])

    def position_ids(self, value: Tensor) -> Tensor:
        """The cell of each group's centre."""
        place = (value[:, :, 0, :AXES].double() / self.extent + 1) / 2 * self.grid[0]
        cell = place.long().clamp(0, self.grid[0] - 1)
        position = 1 + (cell[..., 0] * self.grid[0] + cell[..., 1]) * self.grid[0] + cell[..., 2]
        return torch.cat([position.new_zeros(len(value), 1), position], dim=1)

    def vector_index(self, width: int) -> Tensor:
        # Stride and offset of the codes are the table's own, so entries and table rows coincide.
        return torch.arange(window_table_rows(self.grid) + CLS_ENTRIES, device=self.cls_embedding.device)

    def codes(self, width: int) -> Tensor:
        codes = window_codes(self.grid, self.grid, self.cls_embedding.device)
        return torch.cat([codes.new_zeros(1), codes])  # CLS's is never used

    def code_offset(self, width: int) -> int:
        return window_code_offset(self.grid)


def _two_layers(before: int, hidden: int, behind: int) -> nn.Sequential:
    linears = nn.Linear(before, hidden), nn.Linear(hidden, behind)
    for linear in linears:
        # PyTorch's own biases and small weights would hide what groups differ in behind what they share.
        nn.init.kaiming_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
    return nn.Sequential(linears[0], nn.GELU(), linears[1])


def farthest_points(places: Tensor, count: int) -> list[int]:
    """Points far apart, of one or more: the one farthest from the mean, then always the one farthest from those chosen.

    ``places`` is [points, 3]. Of equals the first is chosen, a point's twin after all others, and each point once.
    """
    places = places.double()
    nearest = torch.full((len(places),), torch.inf, dtype=torch.float64, device=places.device)
    chosen = [int((places - places.mean(0)).square().sum(1).argmax())]
    while len(chosen) < min(count, len(places)):
        nearest = torch.minimum(nearest, (places - places[chosen[-1]]).square().sum(1))
        nearest[chosen[-1]] = -1
        chosen.append(int(nearest.argmax()))
    return chosen


def group_points(points: Tensor, groups: int, members: int) -> Tensor:
    """Each centre and the points nearest to it: [groups or all points, members, channels], the centre first.

    Where there are fewer points than members, the centre stands for the rest, which no maximum sees.
    """
    if not len(points):
        return points.new_zeros(0, members, points.shape[1])
    chosen = farthest_points(points[:, :AXES], groups)
    places = points[:, :AXES].double()
    distances = (places[chosen, None] - places).square().sum(-1)
    distances[range(len(chosen)), chosen] = -1  # before its twins
    nearest = distances.sort(dim=1, stable=True).indices[:, :members]
    missing = nearest[:, :1].expand(-1, members - nearest.shape[1])
    return points[torch.cat([nearest, missing], dim=1)]
