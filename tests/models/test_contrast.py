"""The contrastive loss in blocks, against the plain one that holds all logits."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from onepeace_fast.models import losses
from onepeace_fast.models.losses import contrastive_loss
from onepeace_fast.tolerance import assert_within_rule

NAMES = ("loss", "hits of a", "hits of b", "gradient of a", "gradient of b", "gradient of the scale")


def plain_loss(a, b, scale):
    target, parts, hits = torch.arange(a.shape[0]), [], []
    for query, key in ((a, b), (b, a)):
        logits = scale * query @ key.detach().t()
        parts.append(F.cross_entropy(logits.to(torch.promote_types(torch.float32, logits.dtype)), target))
        hits.append((logits.argmax(1) == target).float().sum())
    return sum(parts) / 2, *hits


def pairs(rows, width=16, noise=0.3):
    generator = torch.Generator().manual_seed(rows)
    a, b = (torch.randn(rows, width, generator=generator, dtype=torch.float64) for _ in range(2))
    return F.normalize(a, dim=1), F.normalize(F.normalize(a, dim=1) + noise * b, dim=1)


def results(loss, a, b, dtype=torch.float64, scale=30.0):
    """What ``NAMES`` says; the scale has the model's dtype where the rows are in half precision."""
    a, b = (x.to(dtype, copy=True).requires_grad_() for x in (a, b))
    scale = torch.tensor(scale, dtype=torch.promote_types(torch.float32, dtype), requires_grad=True)
    values = loss(a, b, scale)
    (3 * values[0]).backward()
    assert [x.grad.dtype for x in (a, b, scale)] == [x.dtype for x in (a, b, scale)]
    return [*(value.detach() for value in values), a.grad, b.grad, scale.grad]


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("block", [1, 100, 1 << 22])
@pytest.mark.parametrize("rows", [1, 7, 50])
def test_value_hits_and_gradients_are_the_plain_losss_whatever_the_blocks(rows, block, monkeypatch):
    monkeypatch.setattr(losses, "BLOCK_LOGITS", block)
    expected = results(plain_loss, *pairs(rows))
    for name, mine, plain in zip(NAMES, results(contrastive_loss, *pairs(rows)), expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-14, msg=lambda line, name=name: f"{name}: {line}")
    assert rows == 1 or all(x.any() for x in expected)


@pytest.mark.parametrize("noise", [0.001, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_are_within_the_rule_also_where_every_row_is_sure_of_its_own(dtype, noise, monkeypatch):
    monkeypatch.setattr(losses, "BLOCK_LOGITS", 5000)
    rounded = [x.to(dtype).double() for x in pairs(200, noise=noise)]
    exact, plain = results(plain_loss, *rounded), results(plain_loss, *rounded, dtype)
    for name, mine, theirs, truth in zip(NAMES, results(contrastive_loss, *rounded, dtype), plain, exact, strict=True):
        assert_within_rule(name, mine, theirs, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_similarities_of_half_precision_are_not_rounded(dtype):
    rounded = [x.to(dtype) for x in pairs(100)]
    expected = results(plain_loss, *(x.float() for x in rounded), torch.float32)
    assert torch.equal(
        results(contrastive_loss, *rounded, dtype)[0], results(contrastive_loss, *rounded, torch.float32)[0]
    )
    with torch.autocast("cpu", dtype):
        found = results(contrastive_loss, *(x.float() for x in rounded), torch.float32)
    for mine, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("block", [8, 1 << 22])
def test_of_partners_that_are_equally_near_the_first_is_found(block, monkeypatch):
    monkeypatch.setattr(losses, "BLOCK_LOGITS", block)
    a = torch.eye(4, dtype=torch.float64)
    b = a[[0, 1, 1, 3]]
    _, hits_a, hits_b = contrastive_loss(a, b, torch.tensor(2.0))
    assert (hits_a.item(), hits_b.item()) == (3, 3)  # a's row 2 has similarity 0 with all, so finds the first


@pytest.mark.parametrize("frozen", ["a", "b", "scale", "ab"])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(frozen):
    a, b = (x.requires_grad_("ab"[i] not in frozen) for i, x in enumerate(pairs(9)))
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=frozen != "scale")
    contrastive_loss(a, b, scale)[0].backward()
    expected = results(plain_loss, *pairs(9), scale=5.0)[3:]
    for mine, plain in zip((a, b, scale), expected, strict=True):
        if mine.requires_grad:
            torch.testing.assert_close(3 * mine.grad, plain)
        else:
            assert mine.grad is None


def test_no_gradient_is_taken_where_none_is_asked_for():
    a, b = pairs(12)
    with Largest() as trained:
        contrastive_loss(a.requires_grad_(), b, torch.tensor(5.0))
    with torch.no_grad(), torch.profiler.profile() as profile:
        contrastive_loss(a, b, torch.tensor(5.0))
    assert trained.elements == 12 * 16
    assert not [event for event in profile.events() if event.name in ("aten::matmul", "aten::scatter_add_")]


@pytest.mark.slow
@pytest.mark.parametrize("block", [30, 1 << 22])
def test_compiled_as_one_graph_it_is_the_same(block, monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(losses, "BLOCK_LOGITS", block)
    compiled = torch.compile(contrastive_loss, fullgraph=True, backend="aot_eager")
    for mine, plain in zip(results(compiled, *pairs(9)), results(plain_loss, *pairs(9)), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("of", [0, 1])
def test_a_second_derivative_is_refused(of):
    (a, b), scale = (x.requires_grad_() for x in pairs(5)), torch.tensor(5.0, requires_grad=True)
    loss = contrastive_loss(a, b, scale)[0]
    gradient = torch.autograd.grad(loss, [a, scale], create_graph=True)[of]
    with pytest.raises(RuntimeError) as refusal:
        gradient.sum().backward()
    assert str(refusal.value).startswith("contrastive_loss: expected a first derivative, got a request for its second")


def test_a_function_transform_takes_its_gradient():
    a, b = pairs(5)
    found = torch.func.grad(lambda a: 3 * contrastive_loss(a, b, torch.tensor(5.0, dtype=a.dtype))[0])(a)
    torch.testing.assert_close(found, results(plain_loss, a, b, scale=5.0)[3])


def test_pairs_that_are_none_are_refused():
    with pytest.raises(ValueError) as refusal:
        contrastive_loss(torch.ones(3, 2), torch.ones(4, 2), torch.tensor(1.0))
    assert str(refusal.value) == "a, b: expected [rows, dim] of equal sizes, got [3, 2] and [4, 2]"


@pytest.mark.parametrize("rows", [20, 128])
def test_no_tensor_is_larger_than_a_block_of_logits(rows, monkeypatch):
    monkeypatch.setattr(losses, "BLOCK_LOGITS", 600)
    with Largest() as seen:
        results(contrastive_loss, *pairs(rows, width=3))
    assert seen.elements == {20: 400, 128: 4 * 128}[rows]


@pytest.mark.slow
def test_of_16384_pairs_no_tensor_has_more_than_a_sixteenth_of_all_logits():
    rows = 16384
    with Largest() as seen:
        found = results(contrastive_loss, *pairs(rows, width=64, noise=1.0), torch.float32)
    assert 64 * rows <= seen.elements <= rows**2 // 16
    expected = results(plain_loss, *pairs(rows, width=64, noise=1.0), torch.float32)
    for mine, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=0, atol=1e-5 * plain.abs().max().item())


def in_a_rank(rank, address, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    losses.BLOCK_LOGITS = 3000
    own = [x[rank * 64 : (rank + 1) * 64] for x in pairs(128)]
    with Largest() as seen:
        found = results(contrastive_loss, *own)
    torch.save((seen.elements, found), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_over_gloo_make_one_processs_loss_in_blocks(tmp_path):
    address = f"file://{tmp_path / 'meeting'}"
    torch.multiprocessing.spawn(in_a_rank, (address, tmp_path), nprocs=2)
    (largest, first), (_, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert largest <= 3000
    loss, hits_a, hits_b, *gradients = results(plain_loss, *pairs(128))
    torch.testing.assert_close((first[0] + second[0]) / 2, loss)
    assert (first[1] + second[1], first[2] + second[2]) == (hits_a, hits_b)
    for place in (3, 4):
        torch.testing.assert_close(torch.cat([first[place], second[place]]) / 2, gradients[place - 3])
    torch.testing.assert_close((first[5] + second[5]) / 2, gradients[2])
