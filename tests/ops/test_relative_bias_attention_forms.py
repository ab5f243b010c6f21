"""``relative_bias_attention`` beyond one bias for each modality: orders, one bias for all, other keys, wide keys."""

import sys
import threading

import pytest
import torch
from support import contract
from support.attention_forms import (
    FORMS,
    HEADS,
    INERT,
    OFFSET,
    ON_KERNELS,
    QUERIES,
    SEVERAL_TILES,
    Form,
    causal,
    naive,
    of_each,
    segments,
)
from support.attention_ways import CHECKED, DTYPES_OF_WAYS, in_each
from support.contract import normal, refused
from support.kernels import poisoned_memory  # noqa: F401  a fixture of all tests here

from onepeace_fast import Segments, cuda_extension, relative_bias_attention
from onepeace_fast.ops.relative_bias_attention import _say_once


@in_each("dtype", {way: dtypes for way, dtypes in DTYPES_OF_WAYS.items() if way != "kernel"})
@pytest.mark.parametrize("name", FORMS)
def test_values_and_gradients_follow_the_formula(name, way, dtype):
    form = Form(**FORMS[name])
    contract.check_against_naive(form.call, form.plain, form.leaves, dtype)


@in_each("dtype", {"kernel": DTYPES_OF_WAYS["kernel"]})
@pytest.mark.parametrize("name", ON_KERNELS)
def test_the_kernels_follow_the_formula(name, way, dtype):
    form = Form(**FORMS[name] | {"lengths": SEVERAL_TILES, "sizes": (32, 32)})
    contract.check_against_naive(form.call, form.plain, form.leaves, dtype)


@pytest.mark.parametrize("way", ["kernel"], indirect=True)
@pytest.mark.parametrize("head_dim, value_dim", [(88, 88), (8, 8), (128, 64), (120, 40), (128, 72), (40, 24)])
def test_zeros_fill_heads_up_to_what_the_kernels_take(way, head_dim, value_dim):
    joint = head_dim == value_dim
    form = Form(vectors=2, cls=True, sizes=(head_dim, value_dim), joint=joint, head_scale=True)
    contract.check_against_naive(form.call, form.plain, form.leaves, torch.bfloat16)


@in_each("cross", {way: (False, True) for way in DTYPES_OF_WAYS})
def test_the_log_sum_exp_comes_too_and_has_no_gradient(way, cross):
    form = Form(vectors=2, cross=cross, sizes=(32, 32))
    leaves = {name: leaf.to(CHECKED[way]).requires_grad_() for name, leaf in form.leaves.items()}
    qkv = tuple(leaves[name] for name in "qkv")
    out, total = relative_bias_attention(qkv, **form.arguments(leaves), return_log_sum_exp=True)
    assert (
        out.requires_grad and not total.requires_grad and total.dtype == torch.promote_types(out.dtype, torch.float32)
    )
    exact = {name: leaf.double() for name, leaf in leaves.items()}
    bias = [exact["vector0"], exact["vector1"]]
    expected = naive(*(exact[name] for name in "qkv"), form.segments, form.keys, bias, [OFFSET] * 2)
    bound = 3e-2 if way == "kernel" else 1e-5
    torch.testing.assert_close(total.double(), expected[1], rtol=bound, atol=bound)
    torch.testing.assert_close(out.double(), expected[0].detach(), rtol=bound, atol=bound)
    torch.testing.assert_close(out, relative_bias_attention(qkv, **form.arguments(leaves)))


@pytest.mark.parametrize("way", ["reference", "padded"], indirect=True)
@pytest.mark.parametrize("name", ["prefix", "keys of others in order, CLS"])
def test_finite_differences_agree(name, way):
    form = Form(**FORMS[name] | {"sizes": (2, 2)})
    contract.check_gradcheck(form.call, form.leaves)


def test_compiled_and_registered_calls_give_what_eager_ones_give():
    for name in ("prefix", "keys of others", "wide keys"):
        form = Form(**FORMS[name])
        leaves = {key: leaf.float() for key, leaf in form.leaves.items()}
        eager = contract.run(form.call, leaves)
        compiled = contract.run(torch.compile(form.call, backend="aot_eager", fullgraph=True), leaves)
        contract.assert_same(compiled, eager, name)


def test_a_query_in_a_sample_without_keys_is_zero_where_there_is_no_key_at_all():
    form = Form(cross=True)
    empty = segments([[0] * 4, [0] * 4], 2)
    keys = Segments(*(x[:0] if isinstance(x, torch.Tensor) and x.dim() == 1 else x for x in empty))
    q, k, v = (form.leaves[name][: 0 if name in "kv" else None].requires_grad_() for name in "qkv")
    out, total = relative_bias_attention(
        (q, k, v), **form.arguments(form.leaves) | {"keys": keys}, return_log_sum_exp=True
    )
    assert not out.any() and total[:-INERT].isneginf().all()
    assert not torch.autograd.grad(out.sum(), q)[0].any()


def test_what_does_not_fit_is_one_line():
    form, other = Form(), Form(cross=True, order=causal)
    leaves, given = form.leaves, form.arguments(form.leaves)
    q, k, v = (leaves[name] for name in "qkv")
    attend = relative_bias_attention
    refused("k", attend, (q, k[1:], v[1:]), **given)
    refused("k", attend, (q, k[..., 1:], v), **given)
    refused("v", attend, (q, k, v[1:]), **given)
    refused("v", attend, (q, k, v.float()), **given)
    refused("q", attend, (q.flatten(1), k, v), **given)
    refused("qkv", attend, torch.stack([q, k, v], 1), **given | {"keys": form.segments})
    refused("order", attend, (q, k, v), **given | {"order": torch.zeros(3, dtype=torch.int32)})
    refused("order", attend, (q, k, v), **given | {"order": form.segments.code.long()})
    gap = of_each(QUERIES, lambda m, place, within: 2 * place)
    refused("order", attend, (q, k, v), **given | {"order": gap})
    refused("code", attend, (q, k, v), **given | {"code_offsets": [2]})
    refused("code_offsets", attend, (q, k, v), **given | {"code_offsets": [2, 2]})
    refused("bias", attend, (q, k, v), **given | {"bias": given["bias"] * 3, "code_offsets": [OFFSET] * 3})
    crossed = tuple(other.leaves[name] for name in "qkv")
    refused("order", attend, crossed, **other.arguments(other.leaves) | {"order": None})
    fewer = other.keys._replace(cu_seqlens=other.keys.cu_seqlens[:, 1:])
    refused("keys.cu_seqlens", attend, crossed, **other.arguments(other.leaves) | {"keys": fewer})
    short = other.keys._replace(code=other.keys.code[1:])
    refused("keys.code", attend, crossed, **other.arguments(other.leaves) | {"keys": short})


def test_what_the_op_cannot_know_of_queries_and_keys_is_one_line():
    form = Form(cross=True, vectors=2)
    given, (q, k, v) = form.arguments(form.leaves), (form.leaves[name] for name in "qkv")
    refused("keys", relative_bias_attention, (q, k, v), **given | {"keys": object()})
    refused(
        "keys",
        relative_bias_attention,
        (q, k, v),
        **given | {"keys": form.keys._replace(cu_seqlens=form.keys.cu_seqlens[:1])},
    )
    refused("qkv", relative_bias_attention, (q, k), **given)
    refused("qkv", relative_bias_attention, (q[:, :0], k[:, :0], v[:, :0]), **given)
    refused("scale", relative_bias_attention, (q, k, v), **given, scale=torch.ones(()))
    refused("code_offsets", relative_bias_attention, (q, k, v), **given | {"code_offsets": [-1, OFFSET]})
    refused("bias", relative_bias_attention, (q, k, v), **given | {"bias": [3, 3]})
    # One vector is for pairs with keys of any modality, whose codes it must cover.
    keys, single = form.keys._replace(code=form.keys.code + 20), {"bias": given["bias"][:1], "code_offsets": [OFFSET]}
    first = {"cu_seqlens": form.segments.cu_seqlens[:1]}
    refused("code", relative_bias_attention, (q, k, v), **given | single | first | {"keys": keys})


@pytest.mark.parametrize(
    "bounds", [[[0, 3, 5], [4, 9, 11]], [[0, 30, 5], [5, 9, 11]], [[0, 3, 5], [-2, 9, 11]]], ids=str
)
def test_segments_that_overlap_or_leave_the_rows_are_refused(bounds):
    one = torch.zeros(11, dtype=torch.int32)
    given = {"modality": one, "code": one, "is_cls": one.bool()}
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    refused("cu_seqlens", relative_bias_attention, torch.zeros(11, 3, 1, 4), cu_seqlens=cu_seqlens, **given)


def test_a_sample_without_keys_beside_samples_of_one_length():
    """Their rows are no slice, and a NaN in another sample's keys stays there."""
    form = Form(cross=True, vectors=0)
    lengths, of_keys = [[2, 2, 3]], [[4, 4, 0]]
    form.segments, form.keys = segments(lengths, 1), segments(of_keys, 2)
    q, k, v = normal(7 + INERT, HEADS, 8, seed=1), *(normal(8 + INERT, HEADS, 8, seed=2 + i) for i in range(2))
    contract.check_against_naive(form.call, form.plain, {"q": q, "k": k, "v": v}, torch.float64)
    k[0] = torch.nan
    leaves = {name: leaf.requires_grad_() for name, leaf in zip("qkv", (q, k, v), strict=True)}
    out = form.call(**leaves)
    (gradient,) = torch.autograd.grad(out[2:7].sum(), [q])
    assert not out[2:7].isnan().any() and not gradient[2:7].isnan().any()


def test_threads_that_share_a_plan_have_their_own_bias():
    """What a CPU keeps of a plan is one thread's whole or another's, never a part of each."""
    form = Form()
    leaves = [{**form.leaves, "vector0": form.leaves["vector0"] + i} for i in range(2)]
    want, wrong = [form.call(**mine) for mine in leaves], []

    def work(i):
        for _ in range(400):
            if not torch.equal(form.call(**leaves[i]), want[i]):
                wrong.append(i)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


@pytest.mark.parametrize("name", ["causal, joint", "keys of others in order, CLS", "one vector for all"])
def test_what_is_written_into_orders_and_keys_is_seen(name):
    form = Form(**FORMS[name])
    leaves = {key: leaf.clone() for key, leaf in form.leaves.items()}
    before = form.call(**leaves)
    with torch.no_grad():
        if form.segments.order is not None:
            form.segments.order.zero_()
            form.keys.order.zero_()
        else:
            form.segments.code[0] = (form.segments.code[0] + 1) % OFFSET
        if form.cross:
            form.keys.code[0] = (form.keys.code[0] + 1) % OFFSET
    after = form.call(**leaves)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, form.plain(**leaves), rtol=1e-11, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*takes the slower path:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_on_a_gpu_values_and_gradients_follow_the_formula(name, dtype):
    check_on_gpu(FORMS[name], dtype)


@pytest.mark.gpu
@pytest.mark.filterwarnings("error:.*takes the slower path:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES_OF_WAYS["kernel"], ids=str)
@pytest.mark.parametrize("sizes", [(32, 32), (64, 64), (96, 96), (128, 64), (128, 128)], ids=str)
@pytest.mark.parametrize("name", ON_KERNELS)
def test_on_a_gpu_the_kernels_follow_the_formula(name, sizes, dtype):
    _say_once.cache_clear()
    before = cuda_extension.launched()
    joint = FORMS[name].get("joint", False) and sizes[0] == sizes[1]
    check_on_gpu(FORMS[name] | {"lengths": SEVERAL_TILES, "sizes": sizes, "joint": joint}, dtype)
    assert cuda_extension.launched() - before == 2


def check_on_gpu(kind, dtype):
    form, on_host = Form(**kind), Form(**kind)
    form.segments, form.keys = (
        Segments(*(x.cuda() if isinstance(x, torch.Tensor) else x for x in side)) for side in (form.segments, form.keys)
    )

    def on_gpu(**leaves):
        return form.call(**{key: leaf.cuda() for key, leaf in leaves.items()}).cpu()

    contract.check_against_naive(on_gpu, on_host.plain, form.leaves, dtype)
