"""What every routed op asks of the offsets and row counts that it is given."""

import pytest
import torch
from support.contract import message_of

from onepeace_fast import (
    gated_sub_ln,
    layer_norm,
    residual_layer_norm,
    residual_rms_norm,
    rms_norm,
    routed_ffn,
    routed_linear,
)
from onepeace_fast.ops import arguments
from onepeace_fast.structures import DropPath, Routing

ROWS, WIDTH = 12, 8
X, VECTORS = torch.ones(ROWS, WIDTH), [torch.ones(WIDTH)] * 2
MATRICES = [torch.ones(WIDTH, WIDTH)] * 2
OPS = {
    "layer_norm": lambda **given: layer_norm(X, VECTORS, **given),
    "rms_norm": lambda **given: rms_norm(X, VECTORS, **given),
    "gated_sub_ln": lambda **given: gated_sub_ln(X, **given),
    "routed_ffn": lambda **given: routed_ffn(X, MATRICES, None, MATRICES, **given),
    "routed_linear": lambda **given: routed_linear(X, MATRICES, **given),
}
WITHOUT_COUNTS = {
    "residual_layer_norm": lambda **given: residual_layer_norm(X, X, None, *VECTORS, **given)[1],
    "residual_rms_norm": lambda **given: residual_rms_norm(X, X, None, VECTORS[0], **given)[1],
}
each_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("op", (OPS | WITHOUT_COUNTS).values(), ids=OPS | WITHOUT_COUNTS)
@pytest.mark.parametrize("bounds", ((0, 5, 13), (0, 7, 5), (1, 5, 9), (-1, 5, 9)), ids=str)
def test_offsets_are_growing_row_numbers(op, bounds):
    said = f"offsets: expected row numbers from 0 to at most 12 that do not decrease, got {[*bounds]}"
    assert message_of(op, offsets=int32(*bounds)) == said
    for right in ((0, 5, 12), (0, 0, 0)):
        assert op(offsets=int32(*right)).shape == X.shape


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("w0", lambda w: routed_ffn(X, w, None, MATRICES, offsets=int32(0, 5, 9))),
        ("w1", lambda w: routed_ffn(X, MATRICES, w, MATRICES, offsets=int32(0, 5, 9))),
        ("w2", lambda w: routed_ffn(X, MATRICES, None, w, offsets=int32(0, 5, 9))),
        ("weight", lambda w: routed_linear(X, w, offsets=int32(0, 5, 9))),
        ("bias", lambda w: routed_linear(X, MATRICES, w, offsets=int32(0, 5, 9))),
        ("norm_weight", lambda w: gated_sub_ln(X, None, w, w, offsets=int32(0, 5, 9))),
    ],
)
def test_one_stacked_tensor_in_the_place_of_a_list_is_refused(name, call):
    said = f"{name}: expected a list of one tensor per modality, got float32 [2, 8, 8] on cpu"
    assert message_of(call, torch.stack(MATRICES)) == said


@each_op
def test_offsets_of_a_plan_elsewhere_say_how_it_is_moved(op):
    said = "offsets: expected a tensor on cpu, got one on meta; move it, or the plan that has it, with .to('cpu')"
    assert message_of(op, offsets=int32(0, 5, 9).to("meta")) == said


@each_op
@pytest.mark.parametrize("counts", ((4, 5), (5, 3), (9, 0), (0, 0)), ids=str)
def test_row_counts_are_those_of_the_offsets(op, counts):
    said = f"row_counts: expected those of offsets, [5, 4], got {[*counts]}"
    assert message_of(op, offsets=int32(0, 5, 9), row_counts=counts) == said
    assert torch.equal(op(offsets=int32(0, 5, 9), row_counts=(5, 4)), op(offsets=int32(0, 5, 9)))


@each_op
def test_a_negative_row_count_is_refused_wherever_the_offsets_are(op, monkeypatch):
    monkeypatch.setattr(arguments, "is_on_host", lambda x: False)
    said = "row_counts: expected one per modality, 2, in all at most 12 rows, got [-1, 10]"
    assert message_of(op, offsets=int32(0, 5, 9), row_counts=(-1, 10)) == said


@pytest.mark.parametrize("name", ("layer_norm", "rms_norm"))
def test_a_row_index_has_the_rows_that_offsets_end_in(name):
    index = int32(3, 1)
    said = "offsets: expected row numbers from 0 to at most 2 that do not decrease, got [0, 1, 3]"
    assert message_of(OPS[name], offsets=int32(0, 1, 3), row_index=index) == said


@pytest.fixture
def asserted(monkeypatch) -> list[tuple[bool, str]]:
    """What a device is asked, as the values are here: whether it holds, and the message."""
    asked = []
    monkeypatch.setattr(arguments, "is_on_host", lambda x: False)
    monkeypatch.setattr(
        arguments, "require_values", lambda condition, message: asked.append((bool(condition), message))
    )
    return asked


@each_op
def test_a_device_is_asked_where_the_environment_says_so(op, asserted, monkeypatch):
    op(offsets=int32(0, 5, 9), row_counts=(5, 4))
    assert not asserted
    monkeypatch.setenv("ONEPEACE_FAST_CHECK", "1")
    op(offsets=int32(0, 5, 9), row_counts=(5, 4))
    assert asserted and all(holds for holds, _ in asserted)


@pytest.mark.parametrize(("samples", "holds"), [((0, 1, 1), True), ((0, -1, 1), False), ((0, 1, 2), False)], ids=str)
def test_a_device_is_asked_for_factors_of_all_samples_where_the_environment_says_so(
    samples, holds, asserted, monkeypatch
):
    drop_path = DropPath(torch.ones(2), int32(*samples))
    arguments.check_sample(drop_path)
    assert not asserted
    monkeypatch.setenv("ONEPEACE_FAST_CHECK", "1")
    arguments.check_sample(drop_path)
    assert [held for held, _ in asserted] == [holds]


@pytest.mark.parametrize(
    ("bounds", "counts", "wrong"),
    [
        ((0, 5, 13), (), "offsets"), ((0, 7, 5), (), "offsets"), ((1, 5, 9), (), "offsets"),
        ((0, 5, 9), (4, 5), "row_counts"), ((0, 5, 9), (5, 3), "row_counts"),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_device_is_asked_does_not_hold_of_wrong_values(bounds, counts, wrong, asserted, monkeypatch):
    monkeypatch.setenv("ONEPEACE_FAST_CHECK", "1")
    arguments.check_offsets(Routing(int32(*bounds), counts), ROWS)
    assert {message.split(":")[0] for holds, message in asserted if not holds} == {wrong}
