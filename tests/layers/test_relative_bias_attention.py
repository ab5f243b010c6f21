"""``RelativeBiasAttention`` against plain PyTorch, sample by sample: biases, orders, keys of others, wide keys."""

import pytest
import torch
from support import contract
from support.contract import message_of, normal, refused
from torch import nn

from onepeace_fast import RelativeBias, RelativeBiasAttention, RoutedLinear, RoutedNorm, RoutePlan

DIM, HEADS = 12, 2
TEXT, IMAGE = [5, 0, 3], [4, 2, 4]


def drawn(module):
    """Every parameter away from where it starts."""
    for place, parameter in enumerate(module.parameters()):
        parameter.data = normal(*parameter.shape, seed=place) + (parameter.dim() == 1)
    return module.double()


def plan_of(**lengths):
    return RoutePlan.from_lengths(lengths, widths={name: max(row) for name, row in lengths.items()})


def rows_of(plan, sample):
    """Rows of a sample, the modalities one after another."""
    bounds = plan.cu_seqlens[:, sample : sample + 2].tolist()
    return [row for start, stop in bounds for row in range(start, stop)]


def naive(module, x, plan, keys=None, key_plan=None, bias=None, order=None):
    """Dense attention of each sample; ``bias(i, j)`` and ``order(i)`` of rows."""
    keys, key_plan = (x, plan) if keys is None else (keys, key_plan)
    project = {name: each(getattr(module, name), side, of) for name, side, of in
               (("q_proj", x, plan), ("k_proj", keys, key_plan), ("v_proj", keys, key_plan))}  # fmt: skip
    q, k, v = (project[name].unflatten(1, (HEADS, -1)) for name in project)
    out = torch.zeros(x.shape[0], HEADS, v.shape[2], dtype=x.dtype)
    for sample in range(plan.sample_count):
        seen = rows_of(key_plan, sample)
        for i in rows_of(plan, sample):
            visible = [j for j in seen if order is None or order(j) <= order(i)]
            score = torch.einsum("hd,jhd->hj", q[i], k[visible]) * (module.scale or q.shape[2] ** -0.5)
            if bias is not None:
                score = score + torch.stack([bias(i, j) for j in visible], 1)
            weights = score.softmax(1) * (1 if module.head_scale is None else module.head_scale[:, None])
            out[i] = torch.einsum("hj,jhd->hd", weights, v[visible])
    joined = out.flatten(1)
    return each(module.out_proj, joined if module.norm is None else each(module.norm, joined, plan), plan)


def each(module, rows, plan):
    """A module, or the expert of each row's modality."""
    if not isinstance(module, RoutedLinear | RoutedNorm):
        return module(rows)
    experts = module.experts()
    return torch.stack([experts[m](row) for m, row in zip(plan.modality.tolist(), rows, strict=True)])


def check(module, call, expected, **leaves):
    """Output, gradients of the leaves and of every parameter."""
    names = [name for name, _ in module.named_parameters()]
    results = []
    for function in (call, expected):
        given = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
        out = function(**given)
        wanted = [*given.values(), *module.parameters()]
        gradients = torch.autograd.grad(out, wanted, normal(*out.shape, seed=50), allow_unused=True)
        results.append(
            [out, *(torch.zeros_like(w) if g is None else g for g, w in zip(gradients, wanted, strict=True))]
        )
    for name, got, want in zip(["out", *leaves, *names], *results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def test_t5_s_encoder_and_decoder():
    """Unscaled scores, a bias by the place, a causal decoder without a bias from key to query, keys of others."""
    plan, target = plan_of(text=[5, 2, 3]), plan_of(text=[3, 4, 1])
    x, y = normal(plan.capacity, DIM, seed=1), normal(target.capacity, DIM, seed=2)
    bias = RelativeBias.t5(HEADS, buckets=8, max_distance=6)
    encoder = drawn(RelativeBiasAttention(DIM, HEADS, bias, scale=1.0, projection_bias=False))
    dense = encoder.bias.dense
    place = plan.position.tolist()
    check(
        encoder, lambda x: encoder(x, plan),
        lambda x: naive(encoder, x, plan, bias=lambda i, j: dense(5)[:, place[i], place[j]]), x=x,
    )  # fmt: skip
    causal = drawn(RelativeBiasAttention(DIM, HEADS, causal=True, scale=1.0))
    here = target.position.tolist()
    check(causal, lambda y: causal(y, target), lambda y: naive(causal, y, target, order=here.__getitem__), y=y)
    cross = drawn(RelativeBiasAttention(DIM, HEADS, scale=1.0))
    check(cross, lambda y, x: cross(y, target, x, plan), lambda y, x: naive(cross, y, target, x, plan), y=y, x=x)


def test_torchscale_s_multiway_attention():
    """Weights of each modality, one bias through both by the place in the sample, a caption behind an image."""
    plan = plan_of(image=IMAGE, text=TEXT)
    module = RelativeBiasAttention(
        DIM, HEADS, RelativeBias.torchscale(8, 6, HEADS), prefix=["image"], norm=RoutedNorm(2, DIM)
    )
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        setattr(module, name, RoutedLinear(2, DIM, DIM))
    drawn(module)
    dense, place = module.bias.dense, plan.order.tolist()
    image = (plan.modality == 0).tolist()
    check(
        module, lambda x: module(x, plan),
        lambda x: naive(
            module, x, plan, bias=lambda i, j: dense(9)[:, place[i], place[j]],
            order=lambda i: -1 if image[i] else place[i],
        ),
        x=normal(plan.capacity, DIM, seed=1),
    )  # fmt: skip


def test_a_bias_for_each_modality_and_wide_keys():
    image = RelativeBias.swin((2, 2), HEADS)
    lengths = {"text": TEXT, "image": [4, 4, 0]}
    plan = RoutePlan.from_lengths(lengths, codes={"image": image.codes()}, code_offsets={"image": image.code_offset()})
    biases = {"text": RelativeBias.t5(HEADS, buckets=8, max_distance=6), "image": image}
    module = drawn(RelativeBiasAttention(DIM, HEADS, biases, head_dim=8, value_dim=4, head_scale=True))
    dense = [biases["text"].dense(5), image.dense()]
    m, place = plan.modality.tolist(), plan.position.tolist()

    def bias(i, j):
        both = dense[m[i]][:, place[i], place[j]] if m[i] == m[j] else torch.zeros(HEADS)
        return both.double()

    def expected(x):
        dense[:] = [module.bias["text"].dense(5), module.bias["image"].dense()]
        return naive(module, x, plan, bias=bias)

    check(module, lambda x: module(x, plan), expected, x=normal(plan.capacity, DIM, seed=1))


def test_interleaved_tokens_go_by_their_positions():
    ids = torch.tensor([0, 1, 1, 0, 1, 0, 0])
    samples, positions = torch.tensor([0, 0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 2, 3, 0, 1, 2])
    plan = RoutePlan.from_modality_ids(
        ids, ["a", "b"], sample_ids=samples, sample_count=2, positions=positions, max_position=3
    )
    module = drawn(RelativeBiasAttention(DIM, HEADS, RelativeBias.t5(HEADS, buckets=8, max_distance=6), causal=True))
    place = plan.position.tolist()
    check(
        module, lambda x: module(x, plan),
        lambda x: naive(
            module, x, plan, bias=lambda i, j: module.bias.dense(4)[:, place[i], place[j]], order=place.__getitem__
        ),
        x=normal(7, DIM, seed=1),
    )  # fmt: skip


def test_the_orders_of_a_plan_count_cls_first():
    """Packed rows have CLS last, sequences have it first."""
    lengths = {"image": [3, 1], "text": [2, 3]}
    plan = RoutePlan.from_lengths(lengths, first_is_cls=True, capacity=11)
    assert plan.position.tolist() == [1, 2, 0, 0, 1, 0, 1, 2, 0, 0, 0]
    assert plan.causal_order().tolist() == [1, 2, 0, 0, 4, 3, 2, 3, 1, 0, 0]
    assert plan.prefix_order(["image"]).tolist() == [0, 0, 0, 0, 2, 1, 2, 3, 1, 0, 0]
    assert plan.prefix_order(["text"]).tolist() == [2, 3, 1, 1, 0, 0, 0, 0, 0, 0, 0]


def test_orders_of_interleaved_tokens_go_by_their_positions():
    """Whatever the modality, without gaps, equal positions alike; one modality as well as two."""
    ids, samples = torch.tensor([0, 1, 2, 1, 2, 0]), torch.tensor([0, 0, 0, 0, 0, 1])
    positions = torch.tensor([0, 9, 4, 9, 12, 7])
    keywords = {"sample_ids": samples, "sample_count": 2, "positions": positions, "max_position": 12}
    plan = RoutePlan.from_modality_ids(ids, ["image", "text", "audio"], **keywords)
    orders = {}
    for name, order in (("causal", plan.causal_order()), ("prefix", plan.prefix_order(["image"]))):
        orders[name] = torch.empty_like(order).scatter_(0, plan.source, order).tolist()
    assert orders == {"causal": [0, 2, 1, 2, 3, 0], "prefix": [0, 2, 1, 2, 3, 0]}
    one = RoutePlan.from_modality_ids(torch.zeros_like(ids), ["all"], **keywords)
    assert torch.empty(6).scatter_(0, one.source, one.causal_order().float()).tolist() == orders["causal"]
    masks = {"text": torch.tensor([[True, False, True]]), "image": torch.zeros(1, 3, dtype=torch.bool)}
    inert = RoutePlan.from_token_masks(masks, inert=True)
    module = drawn(RelativeBiasAttention(DIM, HEADS, causal=True))
    assert module(inert.pack(normal(3, DIM, seed=1)), inert).shape == (3, DIM)


@pytest.mark.parametrize("kind", ["capacity", "token masks", "counts"])
def test_inert_rows_are_zero_and_no_gradient_passes_them(kind):
    text = torch.tensor([[True, False, True], [False, True, True]])
    plan = {
        "capacity": lambda: RoutePlan.from_masks({"text": text}, capacity=7),
        "token masks": lambda: RoutePlan.from_token_masks({"text": text}, inert=True),
        "counts": lambda: RoutePlan.from_masks({"text": text}),
    }[kind]()
    module = drawn(RelativeBiasAttention(DIM, HEADS, norm=nn.LayerNorm(DIM)))
    out = module(normal(plan.capacity, DIM, seed=1), plan)
    assert out[4:].abs().sum() == 0 and out[:4].abs().min() > 0
    out.sum().backward()
    assert module.out_proj.bias.grad.tolist() == [4.0] * DIM
    assert (out.grad_fn.name() == "AddmmBackward0") == (kind == "counts"), "nothing to do where there are none"


def test_a_decoder_of_texts_sees_keys_of_several_modalities():
    """One bias for all: keys by their places in the sample, queries by theirs."""
    plan, others = plan_of(text=[3, 1]), plan_of(image=[4, 0], text=[2, 3])
    module = drawn(RelativeBiasAttention(DIM, HEADS, RelativeBias.t5(HEADS, buckets=8, max_distance=6)))
    here, there = plan.position.tolist(), others.order.tolist()
    check(
        module, lambda x, y: module(x, plan, y, others),
        lambda x, y: naive(
            module, x, plan, y, others, bias=lambda i, j: module.bias.dense(7)[:, here[i], there[j]]
        ),
        x=normal(plan.capacity, DIM, seed=1), y=normal(others.capacity, DIM, seed=2),
    )  # fmt: skip


@pytest.mark.parametrize("causal", [False, True])
def test_without_tokens_there_is_a_result_without_tokens(causal):
    module = RelativeBiasAttention(
        DIM, HEADS, {"a": RelativeBias.t5(HEADS), "b": RelativeBias.t5(HEADS)}, causal=causal
    )
    for lengths in ({"a": [3, 2], "b": [0, 0]}, {"a": [0], "b": [0]}, {"a": [], "b": []}):
        plan = RoutePlan.from_lengths(lengths)
        assert module(torch.zeros(plan.capacity, DIM), plan).shape == (sum(lengths["a"]), DIM)


def test_what_does_not_fit_is_one_line():
    plan, other = plan_of(text=[3, 2]), plan_of(image=[4, 4])
    x = torch.zeros(5, DIM)
    module = RelativeBiasAttention(DIM, HEADS, {"text": RelativeBias.t5(HEADS)})
    refused("x", module, x[1:], plan)
    refused("key_plan", module, x, plan, x)
    refused("bias", module, torch.zeros(8, DIM), other)
    windows = RelativeBiasAttention(DIM, HEADS, {"image": RelativeBias.swin((2, 2), HEADS)})
    refused("plan", windows, torch.zeros(8, DIM), other)
    unknown = RelativeBiasAttention(DIM, HEADS, prefix=["text", "sound"])
    assert message_of(unknown, x, plan) == "prefix: expected some of ['text'], got ['sound']"
    said = "prefix: expected a list of names, got 'text'; give ['text']"
    assert message_of(RelativeBiasAttention, DIM, HEADS, prefix="text") == said
    refused("heads", RelativeBiasAttention, DIM, 5)
    assert message_of(RelativeBiasAttention, DIM, HEADS, causal=True, prefix=["text"]) == (
        "prefix: expected none beside causal, got text; prefix alone is causal behind it, leave causal out"
    )
    refused("bias", RelativeBiasAttention, DIM, HEADS, RelativeBias.t5(4))
    refused("scale", RelativeBiasAttention, DIM, HEADS, scale=torch.ones(()))
    refused("value_dim", RelativeBiasAttention, DIM, HEADS, value_dim=0)
    shared = RelativeBiasAttention(DIM, HEADS, RelativeBias.swin((2, 2), HEADS))
    refused("bias", shared, torch.zeros(8, DIM), plan_of(image=[2, 2], text=[2, 2]))
    refused("key_plan", module, x, plan, torch.zeros(8, DIM), other)


@pytest.mark.parametrize("kind", [nn.Linear, RoutedLinear])
def test_tokens_of_another_dtype_width_or_device_are_one_line(kind):
    plan, keys = plan_of(text=[3, 2]), plan_of(text=[1, 1])
    module = RelativeBiasAttention(DIM, HEADS)
    if kind is RoutedLinear:
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(module, name, RoutedLinear(1, DIM, DIM))
    x, y = torch.zeros(5, DIM), torch.zeros(2, DIM)
    wrong = {
        "float64": x.double(), "float16": x.half(), "int64": x.long(), "width": x[:, 1:], "meta": x.to("meta"),
    }  # fmt: skip
    if kind is nn.Linear:
        for name, given in wrong.items():
            shown = f"{name if '6' in name else 'float32'} {list(given.shape)} on cpu"
            said = f"expected float32 [rows, {DIM}], as the weight of q_proj is, got {shown}"
            said = "expected a tensor on cpu, got one on meta; move it with .to('cpu')" if name == "meta" else said
            assert message_of(module, given, plan) == f"x: {said}"
        assert message_of(module, x, plan, y.double(), keys) == (
            f"keys: expected float32 [rows, {DIM}], as the weight of k_proj is, got float64 [2, {DIM}] on cpu"
        )
    else:
        for given in wrong.values():
            refused("", module, given, plan)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x, plan).dtype == module(x.half(), plan).dtype == torch.bfloat16
        refused("", module, x.double(), plan)


def test_a_bias_with_cls_needs_plans_with_cls_and_one_without_needs_plans_without():
    with_cls, without = (
        RelativeBias.one_peace(HEADS, buckets=16),
        RelativeBias.one_peace(HEADS, buckets=16, with_cls=False),
    )
    plan, behind_cls = (RoutePlan.from_lengths({"text": [3, 2]}, first_is_cls=cls) for cls in (False, True))
    ids, x = torch.zeros(5, dtype=torch.int64), torch.zeros(5, DIM)
    bare = RoutePlan.from_modality_ids(ids, ["text"])
    wanted = "expected one with CLS, as the bias is, got one without; give first_is_cls=True, or is_cls"
    unwanted = "expected one without CLS, as the bias of 'text' is, got one with; leave first_is_cls out"
    one, several = RelativeBiasAttention(DIM, HEADS, with_cls), RelativeBiasAttention(DIM, HEADS, {"text": without})
    for module, fits, others, said in (
        (one, behind_cls, (plan, bare), wanted),
        (several, plan, (behind_cls,), unwanted),
    ):
        assert module(x, fits).shape == module(x, fits, x, fits).shape == (5, DIM)
        for other in others:
            assert message_of(module, x, other) == f"plan: {said}"
            assert message_of(module, x, fits, x, other) == f"key_plan: {said}"
    told = RoutePlan.from_modality_ids(ids, ["text"], is_cls=ids == 1)
    assert told.has_cls is None and one(x, told).shape == several(x, told).shape == (5, DIM)
    for bias in (RelativeBias.t5(HEADS), RelativeBias.alibi(HEADS), RelativeBias.swin((1, 3), HEADS)):
        assert message_of(RelativeBiasAttention(DIM, HEADS, bias), x, behind_cls).startswith(
            "plan: expected one without"
        )
    assert message_of(RelativeBiasAttention(DIM, HEADS, RelativeBias.beit((1, 2), HEADS)), x, plan) == f"plan: {wanted}"
    assert RelativeBiasAttention(DIM, HEADS)(x, behind_cls).shape == (5, DIM)


@pytest.mark.parametrize("whole", [True, False])
def test_a_state_dict_has_the_public_names_and_compiles(whole):
    module = RelativeBiasAttention(DIM, HEADS, RelativeBias.t5(HEADS), norm=nn.LayerNorm(DIM))
    assert "bias.relative_attention_bias.weight" in module.state_dict()
    plan, x = plan_of(text=[3, 2]), normal(5, DIM, seed=1).float()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=whole)
    contract.assert_same(
        contract.run(lambda x: compiled(x, plan), {"x": x}),
        contract.run(lambda x: module(x, plan), {"x": x}),
        "compiled",
    )
