"""A hook on an embedding of UnIVAL or of MiCo's text encoder changes what the model reads of it."""

import pytest
import torch
from models._mico import text_encoder
from models._small import BACKENDS
from models._unival import SAMPLES, SOURCE, TARGET, maps, unival
from torch import nn

TIED = "encoder.embed_tokens"  # whose weight is the output's too, which no hook changes


def bert_s(model):
    return model(TARGET + 2).x  # without padding, which is 0


def unival_s(model):
    return model.logits(SOURCE, TARGET, samples=SAMPLES, **maps())


def beam_search_s(model):
    found = model.generate(SOURCE, beams=1, max_length=4, min_length=4, samples=SAMPLES, **maps())
    return torch.tensor([one.score for own in found for one in own], dtype=torch.float64)


CASES = {
    "mico": (text_encoder, bert_s, 3),
    "unival": (unival, unival_s, 12),
    "beam search": (unival, beam_search_s, 12),
}


def doubled(module, ids, out):
    return 2 * out


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_a_hook_on_an_embedding_is_as_good_as_other_weights(name, backend):
    make, run, count = CASES[name]
    model = make(backend)
    plain, read = run(model), []
    for place, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or place == TIED:
            continue
        module.weight.mul_(2)
        want = run(model)
        module.weight.div_(2)
        with module.register_forward_hook(doubled):
            found = run(model)
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-11, msg=lambda text: f"{place}: {text}")  # noqa: B023
        if not torch.equal(want, plain):
            read.append(place)
    assert len(read) == count, read


@torch.no_grad()
@pytest.mark.parametrize("run", [unival_s, beam_search_s])
def test_a_hook_on_the_tied_table_changes_what_is_read_of_it(run):
    found = []
    for backend in BACKENDS:
        model = unival(backend)
        plain = run(model)
        model.get_submodule(TIED).register_forward_hook(doubled)
        found.append(run(model))
        assert not torch.equal(found[-1], plain)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)
