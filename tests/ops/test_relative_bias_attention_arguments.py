"""What ``relative_bias_attention`` refuses."""

import pytest
import torch
from support.contract import message_of, refused
from support.plans import naive_layout, whole_rows

from onepeace_fast import cuda_extension, relative_bias_attention
from onepeace_fast.ops import operation
from onepeace_fast.ops import segments as segments

LAYOUT = naive_layout(whole_rows({"text": [3, 2], "image": [4, 1]}))
ROWS, HEADS = LAYOUT.capacity, 2


def arguments(**changes) -> dict:
    values = {
        "qkv": torch.zeros(ROWS, 3, HEADS, 4),
        "bias": [torch.zeros(HEADS, 8), torch.zeros(HEADS, 10)],
        "code_offsets": [2, 3],
        "head_scale": torch.ones(HEADS),
        **LAYOUT.attention_arguments(),
    }
    return values | changes


def test_good_input_passes():
    assert relative_bias_attention(**arguments()).shape == (ROWS, HEADS, 4)


@pytest.mark.parametrize(
    "name, bad",
    [
        ("qkv", torch.zeros(ROWS, 3 * HEADS * 4)),
        ("qkv", torch.zeros(ROWS, 2, HEADS, 4)),
        ("qkv", torch.zeros(ROWS, 3, HEADS, 4, dtype=torch.int32)),
        ("cu_seqlens", LAYOUT.cu_seqlens.long()),
        ("cu_seqlens", LAYOUT.cu_seqlens[0]),
        ("cu_seqlens", LAYOUT.cu_seqlens.to("meta")),
        ("modality", torch.zeros(ROWS)),
        ("modality", torch.zeros(ROWS, dtype=torch.int64)),
        ("modality", torch.zeros(ROWS - 1, dtype=torch.int32)),
        ("modality", torch.zeros(ROWS, dtype=torch.int32, device="meta")),
        ("code", torch.zeros(ROWS, dtype=torch.int64)),
        ("code", torch.zeros(ROWS, 1, dtype=torch.int32)),
        ("code", torch.zeros(ROWS, dtype=torch.int32, device="meta")),
        ("is_cls", torch.zeros(ROWS, dtype=torch.int32)),
        ("is_cls", torch.zeros(ROWS + 1, dtype=torch.bool)),
        ("is_cls", torch.zeros(ROWS, dtype=torch.bool, device="meta")),
        ("bias", [torch.zeros(HEADS, 8)] * 3),
        ("bias[1]", [torch.zeros(HEADS, 8), torch.zeros(HEADS + 1, 8)]),
        ("bias[0]", [torch.zeros(HEADS, 3), torch.zeros(HEADS, 8)]),
        ("bias[0]", [torch.zeros(8), torch.zeros(HEADS, 8)]),
        ("bias[1]", [torch.zeros(HEADS, 8), torch.zeros(HEADS, 8, dtype=torch.int32)]),
        ("bias[1]", [torch.zeros(HEADS, 8), torch.zeros(HEADS, 8, device="meta")]),
        ("code_offsets", [2]),
        ("code_offsets", [2, 3, 4]),
        ("head_scale", torch.ones(HEADS + 1)),
        ("head_scale", torch.ones(HEADS, 1)),
        ("head_scale", torch.ones(HEADS, dtype=torch.int32)),
        ("head_scale", torch.ones(HEADS, device="meta")),
    ],
)
def test_wrong_arguments_are_refused(name, bad):
    refused(name, relative_bias_attention, **arguments(**{name.split("[")[0]: bad}))


@pytest.mark.parametrize("offsets", ([0, 3], [2, 1], [5, 3], [2, 5]), ids=str)
def test_codes_whose_difference_lies_outside_the_vector_are_refused(offsets):
    """Text codes 1 and 2 need offsets 1 to 3 in five entries, image codes 1 to 3 offsets 2 to 4 in seven."""
    with pytest.raises((ValueError, RuntimeError)) as caught:
        relative_bias_attention(**arguments(code_offsets=offsets))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bounds", ([[0, 3, 5], [5, 9, 11]], [[0, 3, 5], [5, 9, 8]], [[-1, 3, 5], [5, 9, 10]]), ids=str)
def test_segments_that_are_not_those_of_the_rows_are_refused(bounds):
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    refused("cu_seqlens", relative_bias_attention, **arguments(cu_seqlens=cu_seqlens))


@pytest.mark.parametrize("wrong", [0, 1, 5, -1])
@pytest.mark.parametrize("row", [0, ROWS - 1])
def test_a_modality_that_is_not_its_segment_s_is_refused(wrong, row):
    modality = arguments()["modality"].clone()
    right, modality[row] = modality[row].item(), wrong
    said = "modality: expected that of each row's segment, as a plan's modality and cu_seqlens are, got another"
    assert message_of(relative_bias_attention, **arguments(modality=modality)) == ("" if wrong == right else said)


@pytest.mark.parametrize("name", ("cu_seqlens", "modality", "code", "is_cls"))
def test_segments_of_a_plan_elsewhere_say_how_it_is_moved(name):
    elsewhere = arguments()[name].to("meta")
    said = f"{name}: expected a tensor on cpu, got one on meta; move it, or the plan that has it, with .to('cpu')"
    assert message_of(relative_bias_attention, **arguments(**{name: elsewhere})) == said


def test_max_length_is_that_of_the_longest_sample_or_more():
    given, longest = arguments(), LAYOUT.max_length
    expected = relative_bias_attention(**given)
    said = f"max_length: expected the longest sample's length, or 0, got {longest - 1} and a longer sample"
    assert message_of(relative_bias_attention, **given | {"max_length": longest - 1}) == said
    assert torch.equal(relative_bias_attention(**given | {"max_length": longest + 1}), expected)
    negative = "max_length: expected a length, or 0 where unknown, got -3"
    assert message_of(relative_bias_attention, **given | {"max_length": -3}) == negative


@pytest.mark.filterwarnings("ignore:.*takes the slower path:RuntimeWarning")
@pytest.mark.parametrize("wrong", ("code_offsets", "cu_seqlens", "modality"))
def test_values_on_a_device_are_checked_where_the_environment_asks_for_it(monkeypatch, wrong):
    monkeypatch.setattr(operation, "runs_kernel", lambda name, tensor, triton=True: True)  # as on a device
    monkeypatch.setattr(segments, "is_on_host", lambda x: False)
    monkeypatch.setattr(cuda_extension, "unavailable_reason", lambda: "none is there")
    bad = {"code_offsets": [2, 1], "cu_seqlens": torch.tensor([[0, 3, 5], [5, 9, 8]], dtype=torch.int32)}
    bad["modality"] = arguments()["modality"].clone().index_fill_(0, torch.tensor(9), 2)
    asked = []
    monkeypatch.setattr(segments, "require_values", lambda condition, message: asked.append((bool(condition), message)))
    relative_bias_attention(**arguments())
    assert not asked
    monkeypatch.setenv("ONEPEACE_FAST_CHECK", "1")
    relative_bias_attention(**arguments())
    assert asked and all(holds for holds, _ in asked)
    relative_bias_attention(**arguments(**{wrong: bad[wrong]}))
    (message,) = (message for holds, message in asked if not holds)
    assert message.startswith("code" if wrong == "code_offsets" else wrong)


@pytest.mark.parametrize("offsets", ([1, 2], [3, 4]), ids=str)
def test_codes_at_the_edge_of_the_vector_are_taken(offsets):
    relative_bias_attention(**arguments(code_offsets=offsets))
