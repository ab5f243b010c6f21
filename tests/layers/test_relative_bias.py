"""Every bias of ``RelativeBias`` equals its model's formula, in value and in the table's gradient."""

import copy
import lzma
import pickle

import pytest
import torch
from layers import _formulas as formulas
from models._goldens import FOLDER
from safetensors.torch import load
from support import naive
from support.contract import message_of
from support.plans import Token
from torch import nn
from torch._dynamo.testing import CompileCounter

from onepeace_fast import RelativeBias, RoutePlan, relative_bias_attention
from onepeace_fast.relative_position import grid_codes

HEADS = 3


def token(position: int, cls: bool) -> Token:
    return Token(0, 0, position, position, 0, position if cls else position + 1, 0)


def one_peace_series(buckets, with_cls):
    row = naive.series_row(buckets)
    return lambda i, j: row(token(i, with_cls), token(j, with_cls))


def t5_row(*arguments):
    return lambda i, j: formulas.t5_bucket(i, j, *arguments)


CASES = {
    "t5": (lambda: RelativeBias.t5(HEADS), 150, t5_row(32, 128, True)),
    "t5 of few buckets": (lambda: RelativeBias.t5(HEADS, 7, 20), 40, t5_row(7, 20, True)),
    "t5 decoder": (
        lambda: RelativeBias.t5(HEADS, bidirectional=False), 140,
        t5_row(32, 128, False),
    ),
    "torchscale": (
        lambda: RelativeBias.torchscale(16, 60, HEADS), 70, t5_row(16, 60, True),
    ),
    "one_peace series": (lambda: RelativeBias.one_peace(HEADS, buckets=4), 60, one_peace_series(4, True)),
    "one_peace series without CLS": (
        lambda: RelativeBias.one_peace(HEADS, buckets=4, with_cls=False), 60, one_peace_series(4, False),
    ),
    "one_peace grid": (lambda: RelativeBias.one_peace(HEADS, grid=3), None, formulas.window_index((3, 3), True)),
    "swin": (lambda: RelativeBias.swin((3, 4), HEADS), None, formulas.window_index((3, 4))),
    "square swin": (lambda: RelativeBias.swin(3, HEADS), None, formulas.window_index((3, 3))),
    "beit": (lambda: RelativeBias.beit((2, 4), HEADS), None, formulas.window_index((2, 4), True)),
    "video_swin": (lambda: RelativeBias.video_swin((2, 3, 4), HEADS), None, formulas.window_index((2, 3, 4))),
}  # fmt: skip


def drawn(make) -> RelativeBias:
    """A bias in float64 whose table is random."""
    torch.manual_seed(0)
    bias = make().double()
    torch.nn.init.normal_(bias.table)
    return bias


@pytest.mark.parametrize("name", CASES)
def test_the_bias_of_every_pair_is_the_formula_s_and_so_is_the_table_s_gradient(name):
    make, length, rows = CASES[name]
    bias = drawn(make)
    index = rows if length is None else formulas.series_index(length, rows)
    got = bias.dense(length)
    want_table = bias.table.detach().clone().requires_grad_()
    want = want_table[index].permute(2, 0, 1)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    weight = torch.randn_like(want)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    torch.testing.assert_close(bias.table.grad, want_table.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_a_vector_has_the_entries_that_codes_find_and_its_gradient_is_an_embedding_s(name):
    make, length, _ = CASES[name]
    bias = drawn(make)
    vector, codes, offset = bias.vector(length), bias.codes(length), bias.code_offset(length)
    assert codes.dtype == torch.int32 and bias.is_cls(length).dtype == torch.bool
    real = codes[~bias.is_cls(length)].long()
    entries = real[:, None] - real + offset
    # From end to end, with CLS at position 0 of ONE-PEACE's series counted as a position.
    last = vector.shape[1] - 4
    cls_position = 1 if length is not None and bias.is_cls(length).any() else 0
    assert entries.min() == cls_position and entries.max() == last - cls_position
    assert vector.shape[0] == HEADS and vector.is_contiguous()
    if not bias.is_cls(length).any():
        assert not vector[:, -3:].any()
    nodes, todo = set(), [vector.grad_fn]
    while todo:
        node = todo.pop()
        nodes.add(type(node).__name__)
        todo += [following for following, _ in node.next_functions if following is not None]
    assert not {name for name in nodes if name.startswith("Index")}  # which a GPU sums in any order


@pytest.mark.parametrize("heads", [1, 2, 8, 12, 16])
def test_alibi_is_the_paper_s_linear_bias_without_parameters(heads):
    bias = RelativeBias.alibi(heads)
    torch.testing.assert_close(bias.dense(20).double(), formulas.alibi(heads, 20), rtol=1e-6, atol=0)
    assert bias.table is None and not list(bias.parameters()) and not bias.state_dict()
    assert bias.half().vector(5).dtype == torch.float32  # half precision has no exact 2049


def test_t5_s_buckets_are_computed_in_float32_as_public_code_s(monkeypatch):
    """In float64 some distances could fall into the next bucket."""
    seen, log = [], torch.log
    monkeypatch.setattr(torch, "log", lambda x: seen.append(x.dtype) or log(x))
    RelativeBias.t5(2)
    assert seen == [torch.float32]


NAMES = {
    "relative_attention_bias.weight": [(RelativeBias.t5(HEADS, 40), 40), (RelativeBias.torchscale(16, 64, HEADS), 16)],
    "relative_position_bias_table": [
        (RelativeBias.swin(7, HEADS), 169),
        (RelativeBias.beit((14, 7), HEADS), 27 * 13 + 3),
        (RelativeBias.video_swin((8, 7, 7), HEADS), 15 * 169),
    ],
    "rel_pos_table_list.0.weight": [
        (RelativeBias.one_peace(HEADS, buckets=256), 514),
        (RelativeBias.one_peace(HEADS, buckets=256, with_cls=False), 511),
        (RelativeBias.one_peace(HEADS, grid=16), 964),
    ],
}


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_has_the_public_name_and_shape_and_nothing_else(name):
    for bias, rows in NAMES[name]:
        assert {key: tuple(value.shape) for key, value in bias.state_dict().items()} == {name: (rows, HEADS)}
        assert bias.get_parameter(name) is bias.table


def test_tables_start_small_and_one_peace_s_at_zero():
    torch.manual_seed(0)
    for bias in (
        RelativeBias.t5(64),
        RelativeBias.swin(7, 8),
        RelativeBias.beit(7, 8),
        RelativeBias.video_swin((2, 7, 7), 8),
    ):
        assert 0.018 < bias.table.std() < 0.022
    assert not RelativeBias.one_peace(2, buckets=8).table.any() and not RelativeBias.one_peace(2, grid=2).table.any()


def recording(name: str) -> dict[str, torch.Tensor]:
    return load(lzma.decompress((FOLDER / f"{name}.safetensors.xz").read_bytes()))


def test_torchscale_s_bias_is_the_recorded_one():
    tensors = recording("torchscale_bias")
    bias = RelativeBias.torchscale(32, 128, 2)
    bias.load_state_dict({"relative_attention_bias.weight": tensors["param.relative_attention_bias.weight"]})
    assert torch.equal(bias.dense(144), tensors["mid.rel_pos_bias"])
    with torch.no_grad():
        bias.table.copy_(torch.arange(32.0)[:, None].expand(-1, 2))
    key_minus_query = tensors["buffer.rel_pos_range"]
    entries = bias.vector(201)[0, -key_minus_query + bias.code_offset(201)]
    assert torch.equal(entries.long(), tensors["buffer.rel_pos_bucket"])


@pytest.mark.parametrize("buckets, name", [(8, ""), (256, "_S256")])
def test_unival_s_buckets_are_the_recorded_ones(buckets, name):
    tensors = recording("unival_bias")
    bias = RelativeBias.one_peace(1, buckets=buckets, with_cls=False)
    with torch.no_grad():
        bias.table.copy_(torch.arange(2.0 * buckets - 1)[:, None])
    vector, offset = bias.vector(1024)[0].long(), bias.code_offset(1024)
    assert torch.equal(vector[offset : offset + 1024], tensors[f"buffer.token_rp_bucket{name}_col0"])
    assert torch.equal(vector[: offset + 1].flip(0), tensors[f"buffer.token_rp_bucket{name}_row0"])


def test_unival_s_image_buckets_are_the_recorded_ones():
    bias = RelativeBias.one_peace(1, grid=6)
    with torch.no_grad():
        bias.table.copy_(torch.arange(124.0)[:, None])
    assert torch.equal(bias.dense()[0].long(), recording("unival_bias")["buffer.image_rp_bucket"])


@pytest.mark.parametrize("cls", [True, False])
def test_a_smaller_window_shares_the_table_by_distance(cls):
    bias = drawn(lambda: (RelativeBias.beit if cls else RelativeBias.swin)((4, 5), HEADS))
    tokens = [(y, x) for y in range(2) for x in range(3)]
    index = formulas.window_index((4, 5), cls, tokens)
    assert torch.equal(bias.dense(window=(2, 3)), bias.table[index].permute(2, 0, 1))
    assert bias.is_cls(window=(2, 3)).tolist() == [cls] * cls + [False] * 6


def test_a_video_of_fewer_frames_has_the_first_tokens_codes():
    bias = RelativeBias.video_swin((3, 2, 4), HEADS)
    assert torch.equal(bias.codes(window=(2, 2, 4)), bias.codes(16))
    assert torch.equal(bias.dense(16), bias.dense()[:, :16, :16])


def test_a_grid_s_codes_are_those_of_the_image_adapter():
    assert torch.equal(RelativeBias.one_peace(2, grid=5).codes(window=(3, 3)), grid_codes(3, 5))


def test_a_bias_survives_meta_pickle_copies_and_the_process_s_defaults():
    torch.set_default_dtype(torch.float64)
    try:
        made = RelativeBias.t5(2), RelativeBias.one_peace(2, buckets=74), RelativeBias.alibi(2)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        empty = RelativeBias.t5(2), RelativeBias.one_peace(2, buckets=74), RelativeBias.alibi(2)
    for like, bias in zip(made, empty, strict=True):
        bias = pickle.loads(pickle.dumps(copy.deepcopy(bias.to_empty(device="cpu"))))
        bias.load_state_dict(like.float().state_dict())
        assert torch.equal(bias.vector(30), like.vector(30)) and not bias.vector(30).isnan().any()
    assert RelativeBias.beit(3, 2).to("meta").codes().device.type == "meta"


@pytest.mark.parametrize("make", [RelativeBias.t5, RelativeBias.alibi, lambda heads: RelativeBias.beit(4, heads)])
def test_one_graph_serves_all_lengths(make):
    bias = make(2)

    def everything(length):
        return bias.vector(length), bias.codes(length), bias.is_cls(length), bias.dense(length)

    counter = CompileCounter()
    compiled = torch.compile(everything, backend=counter, fullgraph=True, dynamic=True)
    for length in (9, 10, 13):
        assert all(map(torch.equal, compiled(length), everything(length)))
    assert counter.frame_count == 1


def bias_attention(bias: RelativeBias, qkv, lengths, longest, scale):
    """Packed samples of the given lengths, by the op."""
    plan = RoutePlan.from_lengths(
        {"x": lengths}, codes={"x": bias.codes(longest)}, first_is_cls=bool(bias.is_cls(longest).any())
    )
    out = relative_bias_attention(
        plan.pack(qkv.flatten(2)).unflatten(1, qkv.shape[2:]), cu_seqlens=plan.cu_seqlens, modality=plan.modality,
        code=plan.code, is_cls=plan.is_cls, bias=[bias.vector(longest)], code_offsets=[bias.code_offset(longest)],
        scale=scale,
    )  # fmt: skip
    return plan.unpack(out.flatten(1))["x"].unflatten(-1, out.shape[1:])


ATTENTION = {
    "t5": (lambda: RelativeBias.t5(HEADS, 8, 12), [20, 9], formulas.series_index(20, t5_row(8, 12, True)), 1.0),
    "beit": (lambda: RelativeBias.beit((3, 2), HEADS), [7, 7], formulas.window_index((3, 2), True), None),
    "swin": (lambda: RelativeBias.swin((3, 2), HEADS), [6, 6], formulas.window_index((3, 2)), None),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_with_codes_and_vector_is_attention_with_the_public_bias(name):
    make, lengths, index, scale = ATTENTION[name]
    bias, longest = drawn(make), max(lengths)
    qkv = torch.randn(len(lengths), longest, 3, HEADS, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(lengths), longest, HEADS, 8, dtype=torch.float64)
    got = bias_attention(bias, qkv, lengths, longest, scale)
    table = bias.table.detach().clone().requires_grad_()
    plain = qkv.detach().clone().requires_grad_()
    want = torch.zeros_like(weight)
    for sample, n in enumerate(lengths):
        q, k, v = plain[sample, :n].unbind(1)
        dense = table[index[:n, :n]].permute(2, 0, 1)
        want[sample, :n] = formulas.attention(q, k, v, dense, 8**-0.5 if scale is None else scale)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    torch.testing.assert_close(qkv.grad, plain.grad, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(bias.table.grad, table.grad, rtol=1e-11, atol=1e-12)


def test_a_table_of_one_s_own_is_shared():
    """Under its public name: by value, gradient and state dict, compiled or not."""
    own, table = nn.Embedding(32, 2), nn.Parameter(torch.randn(49, 2))
    images = nn.ModuleList([nn.Embedding(52, 2)])
    t5, swin, one_peace = RelativeBias.t5(2), RelativeBias.swin(4, 2), RelativeBias.one_peace(2, grid=4)
    t5.relative_attention_bias, swin.relative_position_bias_table = own, table
    one_peace.rel_pos_table_list = images
    for bias, shared in ((t5, own.weight), (swin, table), (one_peace, images[0].weight)):
        length = 9 if bias.is_series else None
        assert bias.table is shared and next(iter(bias.state_dict().values())).data_ptr() == shared.data_ptr()
        other = copy.deepcopy(bias)
        other.load_state_dict(bias.state_dict())
        assert torch.equal(other.vector(length), bias.vector(length))
        torch._dynamo.reset()
        torch.compile(bias.vector, fullgraph=True, backend="eager")(length).sum().backward()
        assert shared.grad.abs().sum() > 0
    t5.relative_attention_bias = nn.Embedding(40, 2)
    swin.relative_position_bias_table = nn.Parameter(torch.zeros(49, 3))
    for bias, length, sizes in ((t5, 9, [40, 2]), (swin, None, [49, 3])):
        said = f"table: expected [rows, heads], {[bias.rows, 2]}, got float32 {sizes} on cpu"
        assert message_of(bias.vector, length) == said


WRONG = {
    "heads: expected a positive number, got int 0": lambda: RelativeBias.swin(3, 0),
    "buckets: expected at least 4, got int 3": lambda: RelativeBias.t5(2, 3),
    "buckets: expected at least 2, got int 1": lambda: RelativeBias.t5(2, 1, bidirectional=False),
    "max_distance: expected more than 8, up to which buckets are exact, got int 8": lambda: RelativeBias.t5(2, 32, 8),
    "max_distance: expected more than 16, up to which buckets are exact, got int 16": lambda: RelativeBias.t5(
        2, 32, 16, bidirectional=False
    ),
    "window: expected 2 positive sides, got (3, 0)": lambda: RelativeBias.beit((3, 0), 2),
    "window: expected 3 positive sides, got (3, 3)": lambda: RelativeBias.video_swin((3, 3), 2),
    "one_peace: expected buckets or grid, got buckets 4, grid 4": lambda: RelativeBias.one_peace(2, buckets=4, grid=4),
    "one_peace: expected buckets or grid, got buckets None, grid None": lambda: RelativeBias.one_peace(2),
    "buckets: expected at least 2, got int 0": lambda: RelativeBias.one_peace(2, buckets=0),
    "grid: expected a positive number, got int 0": lambda: RelativeBias.one_peace(2, grid=0),
    "with_cls: expected True with a grid, got False; a grid without CLS is RelativeBias.swin": lambda: (
        RelativeBias.one_peace(2, grid=2, with_cls=False)
    ),
    "length: expected the tokens of the longest sample, got NoneType None": lambda: RelativeBias.t5(2).vector(),
    "length: expected the tokens of the longest sample, got int 0": lambda: RelativeBias.alibi(2).codes(0),
    "length: expected at most 1024, which the bias covers, got 1025": lambda: (
        RelativeBias.one_peace(2, buckets=4).vector(1025)
    ),
    "length: expected at most 10, the tokens that the bias covers, got int 11": lambda: (
        RelativeBias.beit(3, 2).vector(11)
    ),
    "length: expected at most 9, the tokens that the bias covers, got int 10": lambda: (
        RelativeBias.swin(3, 2).codes(10)
    ),
    "window: expected at most [3, 3], which the bias covers, got [2, 4]": lambda: (
        RelativeBias.swin(3, 2).codes(window=(2, 4))
    ),
    "window: expected length or window, got 4 and (2, 2)": lambda: RelativeBias.swin(3, 2).codes(4, window=(2, 2)),
    "window: expected none for the bias of a series, got (2, 2); pass length": lambda: (
        RelativeBias.t5(2).codes(4, window=(2, 2))
    ),
}  # fmt: skip


@pytest.mark.parametrize("line", WRONG)
def test_what_does_not_fit_is_refused_in_one_line(line):
    with pytest.raises(ValueError) as error:
        WRONG[line]()
    assert str(error.value) == line


def test_attention_refuses_codes_that_the_vector_does_not_cover():
    bias = RelativeBias.t5(2)
    qkv, codes = torch.randn(9, 3, 2, 8), bias.codes(9)
    nothing = torch.zeros_like(codes)
    with pytest.raises(ValueError, match=r"differ by at most 7, what bias\[0\] covers, got 8"):
        relative_bias_attention(
            qkv, cu_seqlens=torch.tensor([[0, 9]], dtype=torch.int32), modality=nothing, code=codes,
            is_cls=nothing.bool(), bias=[bias.vector(8)], code_offsets=[bias.code_offset(8)],
        )  # fmt: skip
