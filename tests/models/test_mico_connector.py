"""A causal language model of transformers behind MiCo's context: values, gradients, captions, refusals."""

import pytest
import torch
import torch.nn.functional as F
from models._mico import CONTEXT_WIDTH, alone, batch, mico, refusal
from models._small import BACKENDS, randomise

from onepeace_fast.models.mico import LanguageConnector

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow
WORDS, END = 17, 16
TEXT = torch.tensor([[5, 9, 7], [6, 2, 0], [8, 0, 0], [1, 2, 4]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])


def language_model(kind="gpt2", positions=64):
    torch.manual_seed(2)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=WORDS, n_embd=16, n_layer=2, n_head=2, n_positions=positions, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, bos_token_id=END, eos_token_id=END, pad_token_id=END,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config).double().eval()
    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=positions, bos_token_id=END, eos_token_id=END, pad_token_id=END,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double().eval()


def connector(kind="gpt2", backend="fused", positions=64):
    model = LanguageConnector(mico(backend), language_model(kind, positions))
    randomise(model.language_model)
    randomise(model.projector, 5)
    return model


def scores_of(model, sample, words):
    """The naive computation of one sample: a projected context and its words, without padding, all by hand."""
    context = mico("reference").contexts(**alone(sample)).x
    one, _, two = model.projector
    x = F.gelu(context @ one.weight.t() + one.bias) @ two.weight.t() + two.bias
    x = torch.cat([x, model.language_model.get_input_embeddings().weight[words]])[None]
    logits = model.language_model(inputs_embeds=x).logits[0]
    return logits[len(context) - 1 : -1].log_softmax(1)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loss_of_a_mixed_batch_is_that_of_its_samples_one_by_one(kind, backend):
    model, terms = connector(kind, backend), []
    for sample in range(4):
        words = TEXT[sample, MASK[sample] == 1]
        terms += scores_of(model, sample, words)[range(len(words)), words].neg()
    expected = torch.stack(terms).mean()
    for mask in (MASK, MASK == 1):
        torch.testing.assert_close(model.loss(TEXT, mask=mask, **batch()), expected, rtol=1e-9, atol=0)
    in_front = torch.tensor([[5, 9, 7], [0, 6, 2], [0, 0, 8], [1, 2, 4]])
    found = model.loss(in_front, mask=MASK.flip(1), **batch())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_a_language_model_that_scores_every_position_gives_the_same_loss(monkeypatch):
    model, seen = connector(), []
    expected = model.loss(TEXT, mask=MASK, **batch())
    own = model.language_model.forward

    def forward(**inputs):
        seen.append({*inputs})
        return own(**inputs)

    monkeypatch.setattr(model.language_model, "forward", forward)
    torch.testing.assert_close(model.loss(TEXT, mask=MASK, **batch()), expected, rtol=1e-12, atol=0)
    assert seen == [{"inputs_embeds", "attention_mask", "use_cache"}]


def test_context_tokens_are_scored_only_where_a_caption_may_begin():
    model, seen = connector(), []
    model.language_model.register_forward_hook(lambda module, args, output: seen.append(output.logits.shape[1]))
    model.loss(TEXT[:1], **alone(0))
    assert seen == [TEXT.shape[1] + 1]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_what_is_written_of_a_mixed_batch_is_what_is_written_of_each_sample(kind):
    model = connector(kind)
    with torch.no_grad():
        model.projector[2].weight.mul_(18)  # contexts that matter, beside the language model's own habits
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    found = model.generate(options=options, **batch())
    assert list(found.shape) == [4, 5]
    for sample in range(4):
        words = torch.tensor([], dtype=torch.int64)
        for _ in range(5):  # the naive search: the whole text again for each word
            scores = scores_of(model, sample, torch.cat([words, torch.tensor([0])]))
            words = torch.cat([words, scores[-1].argmax()[None]])
        assert found[sample].tolist() == words.tolist(), sample
    assert len({tuple(row) for row in found.tolist()}) > 1


@pytest.mark.parametrize("frozen", [(), ("language_model",), ("language_model", "mico")])
def test_only_what_trains_gets_gradients_and_all_of_that_does(frozen):
    model = connector()
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    model.loss(TEXT, mask=MASK, **batch()).backward()
    have = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
    lack = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is None}
    assert have == {"mico", "projector", "language_model"} - {*frozen} and lack == {*frozen}
    assert model.projector[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("frozen", [False, True])
def test_it_learns_captions_which_the_language_model_then_writes(frozen):
    torch.manual_seed(0)
    model = LanguageConnector(mico(), language_model())
    randomise(model.language_model)
    model.language_model.requires_grad_(not frozen)
    captions = torch.tensor([[5, 9, END], [6, 2, END], [8, END, END], [1, 2, END]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 1]])
    if frozen:  # a random model that stays so can be made to say a word
        captions, mask = captions[:, :1], mask[:, :1]
    before = [parameter.clone() for parameter in model.language_model.parameters()]
    optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], 0.01)
    for _ in range(50):
        loss = model.loss(captions, mask=mask, **batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    written = model.generate(options={"max_new_tokens": captions.shape[1], "do_sample": False}, **batch())
    assert written.tolist() == captions.tolist()
    same = [torch.equal(a, b) for a, b in zip(before, model.language_model.parameters(), strict=True)]
    assert all(same) if frozen else not any(same)


def test_tasks_are_called_by_name_and_the_prefix_is_in_the_language_model_s_dtype():
    model = connector()
    model.language_model.float()
    prefix = model("prefix", **batch())
    assert prefix.x.dtype == torch.float32 and list(prefix.x.shape) == [4, prefix.longest, 16]
    assert prefix.there.sum(1).aminmax() == (prefix.shortest, prefix.longest)
    assert model("loss", text=TEXT, mask=MASK, **batch()).isfinite()
    assert refusal(lambda: model("write")) == "task: expected one of prefix, loss, generate, got 'write'"


def test_what_does_not_fit_is_refused_in_one_line():
    model, given = connector(), batch()
    short = connector(positions=9)
    bare = transformers.GPT2Model(language_model().config)
    lines = {
        "language_model: expected a causal language model of transformers, got GPT2Model; take one of "
        "AutoModelForCausalLM": lambda: LanguageConnector(model.mico, bare),
        "language_model: expected a causal language model of transformers, got Linear; take one of "
        "AutoModelForCausalLM": lambda: LanguageConnector(model.mico, torch.nn.Linear(2, 2)),
        "text: expected a caption for each of 4 samples, got 3": lambda: model.loss(TEXT[:3], **given),
        "mask: expected the captions' [4, 3], got [4, 2]": lambda: model.loss(TEXT, mask=MASK[:, :2], **given),
        "mask: expected a token in each caption, got one without any": lambda: model.loss(TEXT, mask=0 * MASK, **given),
        f"text: expected ids from 0 to {WORDS - 1}, got others": lambda: model.loss(TEXT + WORDS, **given),
        "language_model: expected a causal language model of transformers, got type; take one of "
        "AutoModelForCausalLM": lambda: LanguageConnector(model.mico, transformers.GPT2LMHeadModel),
        "mico: expected a Mico, got NoneType": lambda: LanguageConnector(None, model.language_model),
        "options: expected a dict of them, got int 5": lambda: model.generate(options=5, **given),
        "options: expected those of a search, got inputs; the context makes it": lambda: model.generate(
            options={"inputs": TEXT}, **given
        ),
        "options: expected those of a search, got inputs_embeds; the context makes it": lambda: model.generate(
            options={"inputs_embeds": TEXT}, **given
        ),
        "text: expected context and caption in the language model's 9 positions, got 28; give fewer frames, fewer "
        "tokens, or a MicoConfig with pool=True": lambda: short.loss(TEXT, mask=MASK, **given),
        "text: expected context and caption in the language model's 9 positions, got 30; give fewer frames, fewer "
        "tokens, or a MicoConfig with pool=True": lambda: short.generate(options={"max_new_tokens": 5}, **given),
    }
    assert [refusal(call) for call in lines.values()] == [*lines]
    encoder_decoder = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    assert "got T5ForConditionalGeneration" in refusal(lambda: LanguageConnector(model.mico, encoder_decoder))
    assert model.projector[0].in_features == CONTEXT_WIDTH


@pytest.mark.parametrize(
    ("options", "own", "new"),
    [
        ({}, {}, 20),
        ({"max_new_tokens": 3}, {"max_new_tokens": 9}, 3),
        ({}, {"max_new_tokens": 9}, 9),
        ({"max_length": 28}, {}, 3),
        ({}, {"max_length": 29}, 4),
        ({"max_length": 80, "max_new_tokens": 5}, {}, 5),
        ({"generation_config": {"max_new_tokens": 7}}, {"max_length": 29}, 7),
        ({"generation_config": {"do_sample": False}}, {"max_length": 29}, 4),
    ],
    ids=str,
)
def test_what_it_writes_at_most_has_to_fit_wherever_transformers_takes_that_from(options, own, new):
    """Contexts of 25 tokens: as many tokens are written as transformers says, and refused where one has no position."""
    config = transformers.GenerationConfig
    options = {name: config(**value) if name == "generation_config" else value for name, value in options.items()}
    options |= {"eos_token_id": None}
    found = []
    for positions in (25 + new, 24 + new):
        model = connector(positions=positions)
        model.language_model.generation_config = config(pad_token_id=END, **own)
        try:
            found.append([*model.generate(options=options, **batch()).shape])
        except ValueError as error:
            found.append(str(error))
    assert found == [
        [4, new],
        f"text: expected context and caption in the language model's {24 + new} positions, got {25 + new}; give fewer "
        "frames, fewer tokens, or a MicoConfig with pool=True",
    ]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_length": 25}, "max_length of more than the context's 25 tokens, got 25; max_new_tokens counts those "
                             "behind it"),
        ({"max_new_tokens": 0}, "max_new_tokens of at least 1, got int 0"),
        ({"max_new_tokens": "4"}, "max_new_tokens of at least 1, got str '4'"),
    ],
)  # fmt: skip
def test_numbers_of_tokens_that_write_nothing_are_refused(options, says):
    assert refusal(lambda: connector().generate(options=options, **batch())) == f"options: expected {says}"
