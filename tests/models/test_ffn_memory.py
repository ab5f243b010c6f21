"""What a feed-forward branch keeps for its backward pass, beside plain PyTorch's."""

import torch
from support import naive
from support.contract import normal
from support.ffn_cases import ALL, leaves_of, op
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from onepeace_fast import layer_norm

COUNTS, WIDTH, HIDDEN = [40], 32, 128
MOST = 0.62  # of what plain PyTorch keeps


def saved_bytes(call, leaves: dict[str, Tensor]) -> int:
    """Of the unique storages that a forward pass keeps, its parameters excluded."""
    storages, saved = {}, []
    mine = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    parameters = {leaf.untyped_storage().data_ptr() for name, leaf in mine.items() if name != "x"}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and tensor.is_floating_point():
            storages[storage.data_ptr()] = storage.nbytes()
            saved.append(tensor)  # an address counts once only while its storage lives
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        call(**mine)
    return sum(storages.values())


def branch_leaves(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    leaves = leaves_of(COUNTS, WIDTH, HIDDEN)
    del leaves["z"]
    leaves |= {"x": leaves.pop("residual"), "weight": normal(WIDTH, seed=7), "bias": normal(WIDTH, seed=8)}
    return {name: leaf.to(dtype) for name, leaf in leaves.items()}


def branch(**settings):
    def call(x, weight, bias, **leaves):
        return op(COUNTS, ALL, **settings)(layer_norm(x, weight, bias), residual=x, **leaves)

    return call


def plain(x, weight, bias, gamma, **p):
    z = torch.nn.functional.layer_norm(x, (WIDTH,), weight, bias)
    norm = p["norm_weight_0"], p["norm_bias_0"]
    y = naive.feed_forward(z, p["w0_0"], p["w1_0"], p["w2_0"], p["b2_0"], norm, 1e-5)
    drop_path = x.new_tensor([1.25]).expand(x.shape[0])[:, None]
    return x + drop_path * (gamma * y)


def test_the_branch_keeps_little_of_what_plain_pytorch_keeps():
    leaves = branch_leaves()
    unfused = saved_bytes(plain, leaves)
    # x, u, v, n's input ... : at least what the formulas need is there, or nothing was counted.
    assert unfused > 4 * COUNTS[0] * (3 * WIDTH + 4 * HIDDEN)
    saved, recomputing = (saved_bytes(branch(recompute=recompute), leaves) for recompute in (False, True))
    assert saved <= MOST * unfused
    assert recomputing < saved - 2 * 4 * COUNTS[0] * HIDDEN + 1
