"""Inputs of ``routed_ffn``, the op and the naive network on them: for its own tests and for those of its kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from onepeace_fast import routed_ffn
from support import contract, naive
from support.contract import normal
from support.kernels import HALF, PRODUCT_DTYPE, on_device, product_size
from support.plans import ragged_offsets

DROP_PATH = torch.tensor([1.25, 0.0, 1.25])
OPTIONS = ("bias", "norm", "residual", "gamma", "drop_path")
ALL = frozenset(OPTIONS)
NO_GATE = "no gate"
LISTS = ("w0", "w1", "w2", "b2", "norm_weight", "norm_bias")


def sample_of(counts: Sequence[int], inert: int = 0) -> Tensor:
    """Three samples in every modality, one after another."""
    parts = [torch.arange(count) * 3 // max(count, 1) for count in counts]
    return torch.cat([*parts, torch.zeros(inert)]).int()


def leaves_of(counts: Sequence[int], width: int, hidden: int, options: frozenset = ALL, inert: int = 0) -> dict:
    """z, the parameters of every modality, and what the options ask for."""
    rows = sum(counts) + inert
    leaves = {"z": normal(rows, width, seed=1)}
    for m in range(len(counts)):
        leaves |= {
            f"w0_{m}": normal(hidden, width, seed=10 + m) * width**-0.5 * 1.5,
            f"w1_{m}": normal(hidden, width, seed=20 + m) * width**-0.5 * 1.5,
            f"w2_{m}": normal(width, hidden, seed=30 + m) * hidden**-0.5,
        }
        if NO_GATE in options:
            del leaves[f"w1_{m}"]
        leaves |= {f"b2_{m}": normal(width, seed=40 + m)} if "bias" in options else {}
        if "norm" in options:
            leaves |= {f"norm_weight_{m}": 1 + 0.5 * normal(hidden, seed=50 + m)}
            leaves |= {f"norm_bias_{m}": 0.5 * normal(hidden, seed=60 + m)}
    leaves |= {"residual": 2 * normal(rows, width, seed=2)} if "residual" in options else {}
    return leaves | ({"gamma": 0.5 + normal(width, seed=3)} if "gamma" in options else {})


def lists_of(parameters: dict, groups: int) -> dict[str, list[Tensor]]:
    """The op's lists, one parameter per modality."""
    names = [name for name in LISTS if f"{name}_0" in parameters]
    return {name: [parameters.pop(f"{name}_{m}") for m in range(groups)] for name in names}


def op(
    counts: Sequence[int], options: frozenset = ALL, host: bool = True, inert: int = 0, eps: float = 1e-5,
    drop_path: Tensor = DROP_PATH, row_index: Tensor | None = None, **settings: object,
) -> Callable:  # fmt: skip
    """The op as ``call(**leaves)``; with ``row_index``, the samples are those of the residual's rows."""

    def call(z, residual=None, gamma=None, **parameters):
        lists = lists_of(parameters, len(counts))
        sample = sample_of(counts, inert) if row_index is None else sample_of([residual.shape[0]])
        tensors = {"drop_path": drop_path, "sample": sample} if "drop_path" in options else {}
        tensors |= {} if row_index is None else {"row_index": row_index}
        return routed_ffn(
            z, offsets=ragged_offsets(counts).to(z.device), row_counts=list(counts) if host else (), residual=residual,
            gamma=gamma, eps=eps, **{"w1": None, **lists}, **settings,
            **{name: value.to(z.device) for name, value in tensors.items()},
        )  # fmt: skip

    return call


def plain(
    counts: Sequence[int], options: frozenset = ALL, inert: int = 0, eps: float = 1e-5, drop_path: Tensor = DROP_PATH,
    row_index: Tensor | None = None, activation: str = "gelu",
) -> Callable:  # fmt: skip
    """The naive network as ``call(**leaves)``."""

    def call(z, residual=None, gamma=None, **parameters):
        lists = lists_of(parameters, len(counts))
        parts, start = [], 0
        for m, count in enumerate(counts):
            norm = (lists["norm_weight"][m], lists["norm_bias"][m]) if "norm_weight" in lists else None
            w0, w1, w2, b2 = (lists[name][m] if name in lists else None for name in LISTS[:4])
            parts.append(naive.feed_forward(z[start : start + count], w0, w1, w2, b2, norm, eps, activation))
            start += count
        y = torch.cat([*parts, torch.zeros_like(z[start:])])
        if residual is None:
            return y
        kept = drop_path.to(z.device) if "drop_path" in options else None
        if row_index is None:
            return naive.residual(residual, y, gamma, kept, sample_of(counts, inert))
        mine = row_index[:start].long()
        sample = sample_of([residual.shape[0]])[mine.cpu()]
        branch = naive.residual(residual[mine], y[:start], gamma, kept, sample)
        return residual.index_put((mine,), branch)

    return call


def slices_of(counts: Sequence[int]) -> dict[str, list[slice]]:
    """The rows of every modality."""
    bounds = ragged_offsets(counts).tolist()
    parts = [slice(a, b) for a, b in pairwise(bounds)]
    return dict.fromkeys(("out0", "z", "residual"), parts)


def check_nan_in_inert_rows(call: Callable[..., Tensor], counts: Sequence[int], leaves: dict[str, Tensor]) -> None:
    """Assert that NaN in the inert rows of z, residual and the output's gradient changes no bit of the other rows."""
    real, inert = sum(counts), len(leaves["z"]) - sum(counts)
    given = [normal(*leaves["z"].shape, seed=9).to(leaves["z"].device)]
    given[0][-inert:] = 0
    expected = contract.run(call, leaves, given)
    for tensor in (leaves["z"], leaves["residual"], given[0]):
        tensor[-inert:] = torch.nan
    actual = contract.run(call, leaves, given)
    assert torch.equal(actual[0][0][:-inert], expected[0][0][:-inert])
    for name, gradient in expected[1].items():
        rows = slice(0, real) if name in ("z", "residual") else slice(None)
        assert torch.equal(actual[1][name][rows], gradient[rows]), name
    assert not actual[1]["z"][-inert:].any()


def check_nan_in_one_modality(call: Callable[..., Tensor], counts: Sequence[int], leaves: dict[str, Tensor]) -> None:
    """Assert that NaN in the rows and a weight of modality 1 changes no bit of the others, nor of their parameters."""
    first, last = counts[0], counts[0] + counts[1]
    expected = contract.run(call, leaves)
    for name in ("z", "residual"):
        leaves[name][first:last] = torch.nan
    leaves["w0_1"][:] = torch.nan
    actual = contract.run(call, leaves)
    real = [*range(first), *range(last, sum(counts))]
    assert torch.equal(actual[0][0][real], expected[0][0][real])
    for name, gradient in expected[1].items():
        if name in ("z", "residual"):
            assert torch.equal(actual[1][name][real], gradient[real]), name
        elif not name.endswith("_1"):
            assert torch.equal(actual[1][name], gradient), name


def leaves_far_from_zero(ratio: float) -> tuple[frozenset, dict[str, Tensor]]:
    """Options and leaves of one modality of 60 rows, whose rows of h have a mean of ``ratio`` times their deviation."""
    options = frozenset({"bias", "norm"})
    leaves = leaves_of([60], *product_size(64, 256), options)
    leaves["z"][:, 0] = 1  # so that u = 1, and v has a mean of ratio times its deviation, about 1.5
    leaves["w0_0"] = 0.02 * leaves["w0_0"]
    leaves["w0_0"][:, 0] = 1
    leaves["w1_0"][:, 0] = 1.5 * ratio
    return options, leaves


def check_each_gradient_alone(**settings: object) -> None:
    """What is frozen leaves every other gradient's bits as they are."""
    counts = [5, 0, 7]
    leaves = on_device(leaves_of(counts, *product_size(16, 24), inert=1), PRODUCT_DTYPE)
    expected = contract.run(op(counts, inert=1, **settings), leaves)[1]
    for name in ("z", "w0_0", "w1_2", "w2_0", "w2_1", "b2_0", "norm_weight_2", "norm_bias_0", "gamma"):
        frozen = [other for other in leaves if other != name]
        actual = contract.run(op(counts, inert=1, **settings), leaves, frozen=frozen)[1]
        contract.assert_same_gradients(actual, {**dict.fromkeys(frozen), name: expected[name]}, f"{name} alone")


def check_norms_of_different_dtypes(**settings: object) -> None:
    """Each modality's norm has gradients in its own dtype, of the same bits but for that."""
    counts = [5, 0, 7]
    leaves = on_device(leaves_of(counts, *product_size(16, 24)), HALF)
    wide = {name: leaf.float() if name.endswith("_2") and "norm" in name else leaf for name, leaf in leaves.items()}
    expected = contract.run(op(counts, **settings), leaves)[1]
    actual = contract.run(op(counts, **settings), wide)[1]
    assert {actual[f"norm_{kind}_2"].dtype for kind in ("weight", "bias")} == {torch.float32}
    for name, gradient in expected.items():
        assert torch.equal(actual[name].to(HALF), gradient), name
