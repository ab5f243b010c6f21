"""Orders, one bias for all and keys of other tokens: the kernels on a CPU under AddressSanitizer, against float64."""

import pytest
import torch
from support.attention_forms import FORMS, HEADS, ON_KERNELS, SEVERAL_TILES, Form, causal
from support.contract import normal, run
from support.host_shim import SHARED_LIMITS
from support.kernel_attention import HEAD_SIZES, walks

from onepeace_fast.tolerance import assert_within_rule

# Samples that no walk takes whole, and one of one tile beside.
LONG = ([[150, 0, 17, 33], [133, 90, 0, 40]], [[66, 35, 0, 290], [0, 40, 0, 70]])
KINDS = {name: FORMS[name] for name in ON_KERNELS} | {
    "one vector for all, runs": {"runs": True, "cls": True},
    "causal, CLS": {"order": causal, "cls": True, "vectors": 2},
    "causal, runs, CLS": {"order": causal, "runs": True, "cls": True},
}


def check_form(attend, form, dtype=torch.bfloat16, **options):
    """Both passes by the rule, each head apart; inert rows are zero."""
    leaves = {name: leaf.to(dtype) for name, leaf in form.leaves.items()}
    grad = normal(leaves["q"].shape[0], HEADS, leaves["v"].shape[2], seed=1000, dtype=dtype)
    (results,) = attend(form.qkv(leaves), grad, **form.arguments(leaves) | options)
    dqkv = results.qkv.unbind(1) if form.joint else results.qkv
    actual = dict(zip(leaves, [*dqkv, *results.bias, results.head_scale], strict=False)) | {"out": results.out}
    expected = []
    for wide in (dtype, torch.float64):
        outputs, gradients = run(form.plain, {name: leaf.to(wide) for name, leaf in leaves.items()}, [grad])
        expected.append({"out": outputs[0], **gradients})
    totals = [form.both(**{name: leaf.to(t) for name, leaf in leaves.items()})[1] for t in (torch.float, torch.double)]
    heads = [(slice(None), head) for head in range(HEADS)]
    for name, mine in actual.items():
        theirs = [torch.zeros_like(mine) if of[name] is None else of[name] for of in expected]
        per_head = [head if name.startswith(("vector", "head_scale")) else (slice(None), head) for head in range(HEADS)]
        assert_within_rule(name, mine, *theirs, per_head)
    blind = totals[1].isneginf()
    assert torch.equal(results.log_sum_exp.isneginf(), blind) and not results.out[blind].any()
    assert_within_rule(
        "log_sum_exp", results.log_sum_exp.masked_fill(blind, 0), *(x.masked_fill(blind, 0) for x in totals), heads
    )
    inert, key_inert = (int(side.cu_seqlens[-1, -1]) for side in (form.segments, form.keys))
    ends = zip(dqkv, (inert, key_inert, key_inert), strict=True)
    assert not any(rows[end:].any() for rows, end in [(results.out, inert), *ends])
    return results


@walks
@pytest.mark.parametrize("name", KINDS)
def test_values_and_gradients_follow_the_formula(attend, name, walk):
    form = Form(**KINDS[name] | {"sizes": (32, 32), "lengths": SEVERAL_TILES})
    check_form(attend, form, torch.float16, **{key: value for key, value in walk.items() if key != "max_length"})


@pytest.mark.parametrize("dim", HEAD_SIZES)
@pytest.mark.parametrize("limit", ["99 KiB", "227 KiB"])
@pytest.mark.parametrize("name", ["one vector for all, CLS", "causal, runs, CLS", "keys of others, later first"])
def test_samples_that_no_walk_takes_whole(attend, name, limit, dim):
    form = Form(**KINDS[name] | {"sizes": (dim, dim), "lengths": LONG})
    multiprocessors = {} if dim % 64 else {"multiprocessors": 132}  # where few blocks share a sample, and where many do
    check_form(attend, form, shared_limit=SHARED_LIMITS[limit], **multiprocessors)


@pytest.mark.parametrize("limit", ["99 KiB", "227 KiB"])
@pytest.mark.parametrize("order", [None, causal], ids=["all", "causal"])
def test_keys_of_128_beside_values_of_64(attend, order, limit):
    """Around the lengths that one thread block walks, in either shape."""
    counts = [[129, 130, 3, 0, 113, 114]]
    form = Form(order=order, runs=True, cls=True, head_scale=True, sizes=(128, 64), lengths=(counts, counts))
    check_form(attend, form, shared_limit=SHARED_LIMITS[limit])
    check_form(attend, form, torch.float16, shared_limit=SHARED_LIMITS[limit], multiprocessors=132)


def test_keys_that_no_query_sees_get_zeros(attend):
    """Without any row of queries, and keys that no walk takes whole."""
    form = Form(cross=True, sizes=(32, 32), lengths=([[0]], [[290]]))
    leaves = {name: leaf.bfloat16() for name, leaf in form.leaves.items()}
    q, k, v = form.qkv(leaves)
    given = form.arguments(leaves) | {name: getattr(form.segments, name)[:0] for name in ("modality", "code", "is_cls")}
    (results,) = attend((q[:0], k, v), q[:0], **given, bias_needs=[False])
    assert not any(gradient.any() for gradient in results.qkv)
