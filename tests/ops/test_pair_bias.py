"""What the attention of a CPU keeps from one call to the next changes no bit, and is let go with its plan."""

import gc

import pytest
import torch

from onepeace_fast import relative_bias_attention
from onepeace_fast.ops import pair_bias, segments

LENGTHS, HEADS, DIM = (5, 3, 5, 4), 2, 4
ROWS = sum(LENGTHS)


def arguments(seed=0):
    """Texts, two of one length, with codes of their own."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.tensor([0, *LENGTHS]).cumsum(0)[None].int()
    return {
        "cu_seqlens": starts,
        "modality": torch.zeros(ROWS, dtype=torch.int32),
        "code": torch.randint(0, 6, (ROWS,), generator=generator, dtype=torch.int32),
        "is_cls": torch.zeros(ROWS, dtype=torch.bool),
        "bias": [torch.randn(HEADS, 15, generator=generator)],
        "code_offsets": [6],
    }


def run(given):
    """The output and the gradients of everything."""
    qkv = torch.randn(ROWS, 3, HEADS, DIM, generator=torch.Generator().manual_seed(1)).requires_grad_()
    bias = [vector.requires_grad_() for vector in given["bias"]]
    out = relative_bias_attention(qkv, **{**given, "bias": bias})
    return out, *torch.autograd.grad(out.square().sum(), [qkv, *bias])


def copied(given):
    """The same values in tensors that nobody has seen."""
    return {**given, **{name: value.clone() for name, value in given.items() if isinstance(value, torch.Tensor)},
            "bias": [vector.detach().clone() for vector in given["bias"]]}  # fmt: skip


def write(given, name):
    """Change one tensor in place, so that the result changes."""
    with torch.no_grad():
        if name == "bias":
            given["bias"][0][1, 6] += 1
        elif name == "cu_seqlens":
            given[name][0, 1:4] = torch.tensor([3, 8, 13], dtype=torch.int32)
        elif name == "is_cls":
            given[name][[0, 5, 8]] = True
        else:
            given[name][2] = given[name][1] + (1 if name == "code" and given[name][1] < 5 else -1)


@pytest.mark.parametrize("name", ["cu_seqlens", "code", "is_cls", "bias"])
def test_what_is_written_into_a_tensor_of_the_plan_or_a_vector_is_seen(name):
    given = arguments()
    before = run(given)
    write(given, name)
    after = run(given)
    assert not torch.equal(before[0], after[0])
    for got, want in zip(after, run(copied(given)), strict=True):
        assert torch.equal(got, want)


def test_an_output_does_not_depend_on_what_is_kept(monkeypatch):
    given = arguments()
    kept = run(given)
    monkeypatch.setattr(pair_bias, "PAIRS_KEPT", 0)
    for got, want in zip(run(copied(given)), kept, strict=True):
        assert torch.equal(got, want)


def test_samples_that_are_alike_give_what_each_gives_alone(monkeypatch):
    given = arguments()
    given["code"] = torch.cat([torch.arange(length, dtype=torch.int32) for length in LENGTHS])
    together = run(given)
    with monkeypatch.context() as patch:
        patch.setattr(pair_bias, "_are_alike", lambda *_: False)
        torch.testing.assert_close(run(copied(given)), together)
    given["code"][1] = 5  # now the first differs from the others
    apart = run(given)
    assert torch.equal(together[0][LENGTHS[0] :], apart[0][LENGTHS[0] :])
    assert not torch.equal(together[0][: LENGTHS[0]], apart[0][: LENGTHS[0]])


def test_groups_padded_to_whole_vectors_give_what_others_do(monkeypatch):
    given = arguments()
    apart = run(given)
    monkeypatch.setattr(segments, "PAIRS_OF_A_GROUP", 56)  # two groups: of lengths 3 and 4, and of 5 twice
    monkeypatch.setattr(segments, "VECTOR", 7)
    groups = [pairs.queries.length for pairs in segments.sample_pairs(pair_bias.Segments(*list(given.values())[:4], 0))]
    assert groups == [7, 7]
    torch.testing.assert_close(run(copied(given)), apart)


def test_without_tokens_an_inert_row_leaves_gradients_zero_off_the_host_too(padded):
    given = arguments()
    given["cu_seqlens"].zero_()
    qkv, bias = torch.full((ROWS, 3, HEADS, DIM), torch.nan).requires_grad_(), given["bias"][0].requires_grad_()
    out = relative_bias_attention(qkv, **given, max_length=4)
    for gradient in torch.autograd.grad(out, [qkv, bias], torch.full_like(out, torch.nan)):
        assert not gradient.any()


def test_nothing_is_kept_when_its_plan_is_gone():
    given = arguments()
    run(given)
    assert given["cu_seqlens"] in pair_bias._WALKS
    count = len(pair_bias._WALKS)
    del given
    gc.collect()
    assert len(pair_bias._WALKS) < count


def test_a_plan_that_fits_no_longer_is_refused_as_if_it_were_new():
    given = arguments()
    run(given)
    given["code"][0] = 40
    with pytest.raises(ValueError, match="code: expected codes of modality 0"):
        run(given)
    given = arguments()
    run(given)
    given["cu_seqlens"][0, -1] = ROWS + 1
    with pytest.raises(ValueError, match="cu_seqlens: expected growing bounds"):
        run(given)
