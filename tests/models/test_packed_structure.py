"""What the packed path never builds: padded rows, or anything [length, length] outside the attention op."""

from collections import Counter

import pytest
import torch
from models._small import batch_of, small_config, small_model, valid_tokens, weighted_sum
from torch.utils._python_dispatch import TorchDispatchMode

from onepeace_fast.config import ImageAdapterConfig
from onepeace_fast.models.inputs import read_batch
from onepeace_fast.models.reference import encode_padded

# All sizes differ from each other and from those of small_config (48, 80, 3, 16, 144): a size names a thing.
TEXT_LENGTHS = [12, 8, 6, 5]  # CLS not counted
ROWS, TEXT_WIDTH, IMAGE_LENGTH = 4, 13, 26
PADDED_LENGTH = TEXT_WIDTH + IMAGE_LENGTH  # 39
SAMPLE_LENGTHS = {length + 1 + IMAGE_LENGTH for length in TEXT_LENGTHS}
SEGMENT_LENGTHS = {length + 1 for length in TEXT_LENGTHS} | {IMAGE_LENGTH}
TOTAL = sum(TEXT_LENGTHS) + ROWS * (1 + IMAGE_LENGTH)  # 139
PADDED = {TEXT_WIDTH, PADDED_LENGTH, ROWS * TEXT_WIDTH, ROWS * PADDED_LENGTH, PADDED_LENGTH**2}
LAYERS = 3


class Recorder(TorchDispatchMode):
    """The name of every op that runs, and the shape of every tensor that goes in or comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.shapes: dict[tuple[int, ...], str] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls[func.name()] += 1
        for value in torch.utils._pytree.tree_leaves((args, kwargs, result)):
            if isinstance(value, torch.Tensor):
                self.shapes.setdefault(tuple(value.shape), func.name())
        return result

    def padded(self) -> list[str]:
        """Tensors with a padded token dimension, or two dimensions of tokens."""
        lengths = SAMPLE_LENGTHS | SEGMENT_LENGTHS | {TOTAL, PADDED_LENGTH}
        return [
            f"{name} {list(shape)}"
            for shape, name in self.shapes.items()
            if PADDED & set(shape) or sum(size in lengths for size in shape) > 1
        ]


def record(backend: str, backward: bool) -> Recorder:
    """Run the encoder's stack, adapters excluded, under the recorder."""
    model = small_model(backend, small_config(layers=LAYERS, image=ImageAdapterConfig(position_grid=3, bias_grid=6)))
    inputs = batch_of(text=TEXT_LENGTHS, image=(ROWS, 5))
    stack = model.encoder_wrapper
    batch, _ = read_batch(stack.adapters, inputs)
    tokens = stack.embed(batch)
    assert {name: part.x.shape[1] for name, part in tokens.items()} == {"text": TEXT_WIDTH, "image": IMAGE_LENGTH}
    recorder = Recorder()
    if backend == "reference":
        with recorder:
            outputs = encode_padded(stack.fusion_model, stack.adapters, tokens, None, None)
        if backward:
            loss = weighted_sum(outputs, valid_tokens(inputs))
            with recorder:
                loss.backward()
        return recorder
    plan = stack.plan(tokens)
    x = plan.pack({name: part.x for name, part in tokens.items()}).detach().requires_grad_()
    assert x.shape[0] == TOTAL
    with recorder:
        packed = stack.fusion_model(x, plan, stack.bias({name: padded.width for name, padded in tokens.items()}))
        if backward:
            packed.sum().backward()
    return recorder


def test_the_sizes_that_the_tests_look_for_are_distinct():
    model_sizes = {48, 80, 3, 16, 144, LAYERS, ROWS, ROWS + 1}
    assert not (PADDED | SAMPLE_LENGTHS | SEGMENT_LENGTHS | {TOTAL}) & model_sizes
    assert not PADDED & {TOTAL}
    vectors = {2 * TEXT_WIDTH - 1 + 3, (2 * 6 - 1) ** 2 + 3, 2 * 6 - 1 + 3}
    assert not vectors & (PADDED | SAMPLE_LENGTHS | SEGMENT_LENGTHS | {TOTAL})


def test_every_layer_calls_the_ops_of_its_branches():
    calls = record("fused", backward=True).calls
    for suffix in ("", "_backward"):
        got = {name: calls[f"onepeace_fast::{name}{suffix}"] for name in ("relative_bias_attention", "routed_ffn")}
        assert got == {"relative_bias_attention": LAYERS, "routed_ffn": LAYERS}
        assert calls[f"onepeace_fast::linear_residual{suffix}"] == LAYERS  # that of attention
        assert calls[f"onepeace_fast::layer_norm{suffix}"] == 2 * LAYERS + 1  # before and inside attention; final


def test_the_reference_calls_none_of_the_ops():
    calls = record("reference", backward=True).calls
    assert not [name for name in calls if name.startswith("onepeace_fast::")]
    assert calls["aten::bmm"] == 3 * 2 * LAYERS  # forward, and two gradients each


@pytest.mark.parametrize("backward", [False, True])
def test_packed_stack_holds_no_padding_and_no_square_of_lengths(backward):
    recorder = record("fused", backward)
    assert not recorder.padded()
    assert (TOTAL, 48) in recorder.shapes
    assert (TOTAL, 3, 16) in recorder.shapes


@pytest.mark.parametrize("backward", [False, True])
def test_the_same_look_finds_padding_and_squares_in_the_reference(backward):
    found = "\n".join(record("reference", backward).padded())
    assert f"[{ROWS}, 3, {PADDED_LENGTH}, {PADDED_LENGTH}]" in found
    assert f"[{PADDED_LENGTH}, {ROWS}, 48]" in found


@pytest.mark.parametrize("shape", [(3, IMAGE_LENGTH, IMAGE_LENGTH), (ROWS, TEXT_WIDTH, 48), (TOTAL, TOTAL), (35, 9)])
def test_the_look_sees_a_single_square_or_padded_tensor(shape):
    recorder = Recorder()
    with recorder:
        torch.zeros(TOTAL, 48)
    assert not recorder.padded()
    with recorder:
        torch.zeros(shape)
    assert recorder.padded()
