"""What only a GPU can show: the fused backend there agrees with the CPU, repeats bit for bit and never waits."""

import pytest
import torch
from models._small import assert_same_bits, batch_of, losses_with_gradients, small_model
from models.test_passes import TASKS
from test_no_wait_on_gpu import waits_refused

from onepeace_fast.models.inputs import read_batch

pytestmark = pytest.mark.gpu

REPEATS = 50


def on_gpu(values, dtype=torch.float64):
    """The same batch on the GPU, masks included, its images and waveforms in a dtype."""
    return {
        name: on_gpu(value)
        if isinstance(value, dict)
        else value.cuda().to(dtype if value.is_floating_point() else value.dtype)
        for name, value in values.items()
    }


@TASKS
def test_the_fused_backend_gives_the_cpus_losses_and_gradients(task):
    model, (name, inputs) = small_model("fused"), task()
    expected = losses_with_gradients(model, name, inputs)
    got = losses_with_gradients(model.cuda(), name, on_gpu(inputs))
    assert set(got) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(got[key].cpu(), value, rtol=1e-8, atol=1e-10, msg=key)


@TASKS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_repeats_bit_for_bit(dtype, task):
    model, (name, inputs) = small_model("fused", dtype=torch.float32).cuda(), task()
    inputs = on_gpu(inputs, torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        first = losses_with_gradients(model, name, inputs)
        for _ in range(REPEATS - 1):
            assert_same_bits(losses_with_gradients(model, name, inputs), first)


def test_nothing_waits_between_the_one_read_and_the_end_of_the_backward_pass():
    model = small_model("fused", dtype=torch.float32).cuda()
    stack = model.encoder_wrapper
    batch = on_gpu(batch_of(text=[9, 4, 1], image=(3, 2)), torch.float32)
    read, _ = read_batch(stack.adapters, batch)
    for _ in range(2):  # the first round loads libraries, which may wait
        (encoded,) = stack([stack.embed(read)], read.samples)
        sum(output.square().mean() for output in encoded.tensors()).backward()
    with waits_refused():
        (encoded,) = stack([stack.embed(read)], read.samples)
        sum(output.square().mean() for output in encoded.tensors()).backward()


def test_another_stream_gives_the_same_bits():
    model = small_model("fused", dtype=torch.float32).cuda()
    batch = on_gpu(batch_of(text=[9, 4, 1], image=(3, 2)), torch.float32)
    expected = model.encode(**batch)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        got = model.encode(**batch)
    torch.cuda.synchronize()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
