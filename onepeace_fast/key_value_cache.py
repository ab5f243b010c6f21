"""Keys and values of the tokens so far, for generation: new tokens attend to them, and to each other."""

from __future__ import annotations

import torch
from torch import Tensor

from onepeace_fast.attention_structures import Segments
from onepeace_fast.checks import checks_devices, describe, is_on_host, require, require_tensor, require_values
from onepeace_fast.ops.arguments import FLOATS
from onepeace_fast.ops.segments import UNSEEN


class KeyValueCache:
    """Keys and values of samples that grow at their own rates, for ``relative_bias_attention``::

        cache = KeyValueCache(samples=2, capacity=128, heads=4, head_dim=64)
        cache.append(k, v, new)  # new: the Segments of the new rows, with an order
        out = relative_bias_attention((q, cache.k, cache.v), **new._asdict(), keys=cache.segments, ...)

    Every segment has ``capacity`` places, of which no query sees the free ones; the kernels skip tiles of them. Nothing
    moves and no shape changes when rows are appended, so a CUDA graph may hold a step. Rows are no CLS: of a model with
    CLS tokens the cache takes the others.

    Args:
        samples: how many there are.
        capacity: tokens of a sample and modality at most; on a GPU more are lost, but for ``ONEPEACE_FAST_CHECK=1``.
        heads, head_dim: of the keys.
        value_dim: of the values; by default ``head_dim``.
        modalities: of the new rows, and of a bias for each.
        device, dtype: as of ``torch.zeros``.
    """

    def __init__(
        self, samples: int, capacity: int, heads: int, head_dim: int, *, value_dim: int | None = None,
        modalities: int = 1, device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        sizes = {"samples": samples, "capacity": capacity, "modalities": modalities}
        for name, size in sizes.items():
            require(size > 0, lambda name=name, size=size: f"{name}: expected at least 1, got {size}")
        segments = modalities * samples
        rows = segments * capacity + 1  # the last one is inert: what has no place goes there
        self.k = torch.zeros(rows, heads, head_dim, device=device, dtype=dtype)
        self.v = torch.zeros(rows, heads, head_dim if value_dim is None else value_dim, device=device, dtype=dtype)
        device, self._capacity = self.k.device, capacity
        self.lengths = torch.zeros(modalities, samples, dtype=torch.int32, device=device)
        bounds = torch.arange(segments + 1, dtype=torch.int32, device=device) * capacity
        self._segment = torch.arange(rows, device=device) // capacity
        self.segments = Segments(
            torch.stack([bounds[m * samples : (m + 1) * samples + 1] for m in range(modalities)]),
            (self._segment // samples).int(),
            torch.zeros(rows, dtype=torch.int32, device=device),
            torch.zeros(rows, dtype=torch.bool, device=device),
            modalities * capacity,
            torch.full((rows,), UNSEEN, dtype=torch.int32, device=device),
        )

    def append(self, k: Tensor, v: Tensor, new: Segments) -> None:
        """Store the keys and values of new rows behind those of their segments.

        Args:
            k, v: [rows, heads, head_dim] and [rows, heads, value_dim], cast to the cache's dtype.
            new: the segments of these rows, with an order that goes on from that of their samples' cached rows, so that
                they see all of these: a plan's ``causal_order()`` begins at 0, so add how many are cached. Codes are
                those that the vectors know.

        Raises:
            ValueError: a shape that does not fit, no order, and on a CPU an order that begins again, CLS, or a segment
                without so many free places.
        """
        for name, x, cached in (("k", k, self.k), ("v", v, self.v)):
            require_tensor(name, x, FLOATS, "[rows, heads, size]", 3)
            if x.shape[1:] != cached.shape[1:]:
                raise ValueError(f"{name}: expected the cache's [rows, *{list(cached.shape[1:])}], got {describe(x)}")
            if x.shape[0] != new.code.shape[0]:
                raise ValueError(f"{name}: expected the {new.code.shape[0]} rows of new.code, got {describe(x)}")
        bounds, code, order = new.cu_seqlens, new.code, new.order
        if order is None:
            raise ValueError("new.order: expected int32 [rows], got None; a plan's causal_order() has it")
        for name, of_rows in (("new.order", order), ("new.is_cls", new.is_cls)):
            if of_rows.shape != code.shape:
                raise ValueError(f"{name}: expected one of each of {code.shape[0]} rows, got {describe(of_rows)}")
        if bounds.shape != self.segments.cu_seqlens.shape:
            raise ValueError(f"new.cu_seqlens: expected {list(self.segments.cu_seqlens.shape)}, got {describe(bounds)}")
        rows = torch.arange(k.shape[0], device=bounds.device, dtype=torch.int32)
        starts = bounds[:, :-1].flatten()
        segment = torch.searchsorted(starts, rows, right=True) - 1
        before = self.lengths.flatten()
        place = before[segment] + rows - starts[segment]
        after = self.lengths + bounds.diff(dim=1)
        if is_on_host(bounds) or checks_devices():
            most = f"capacity: expected at most {self._capacity} tokens of a segment, got more"
            require_values((after <= self._capacity).all(), most)
            goes_on = (order >= self._last_orders()[segment % self.lengths.shape[1]]) | (rows >= bounds[-1, -1])
            again = "new.order: expected one that goes on from the cached rows' order, got a lower one; "
            require_values(goes_on.all(), again + "add what is cached to a plan's causal_order()")
            is_cls = new.is_cls & (rows < bounds[-1, -1])
            require_values(~is_cls.any(), "new.is_cls: expected none, got CLS; attend to CLS without a cache")
        has_place = (rows < bounds[-1, -1]) & (place < self._capacity)
        target = torch.where(has_place, segment * self._capacity + place, self.k.shape[0] - 1)
        kept = self.segments.order
        assert kept is not None
        for cached, value in ((self.k, k), (self.v, v), (self.segments.code, code), (kept, order)):
            cached.index_copy_(0, target, value.to(cached.dtype))
        self.k[-1:], self.v[-1:] = 0, 0
        self.lengths.copy_(after.clamp(max=self._capacity))
        self._fill_free_codes()

    def _last_orders(self) -> Tensor:
        """The largest order of each sample's rows so far, int32 [samples]."""
        order = self.segments.order
        assert order is not None
        order = order[:-1].view(*self.lengths.shape, self._capacity)
        return torch.where(order == UNSEEN, torch.iinfo(torch.int32).min, order).amax((0, 2))

    def _fill_free_codes(self) -> None:
        """Free places have the last token's code, so that the bias that they do not take exists."""
        lengths, code = self.lengths.flatten(), self.segments.code[:-1]
        first = torch.arange(lengths.shape[0], device=code.device) * self._capacity
        last = code[first + (lengths - 1).clamp(min=0)]
        of_rows = self._segment[:-1]
        is_free = torch.arange(code.shape[0], device=code.device) - of_rows * self._capacity >= lengths[of_rows]
        code.copy_(torch.where(is_free, last[of_rows], code))
