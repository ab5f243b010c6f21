"""What only a GPU can show: the fused backend there agrees with the CPU, repeats bit for bit and never waits."""

import pytest
import torch
from models._small import batch_of, hide, small_config, small_model

from onepeace_fast.models.inputs import read_batch

pytestmark = pytest.mark.gpu

REPEATS = 50


def on_gpu(values):
    return {name: value.cuda() for name, value in values.items()}


def vision_batch():
    batch = batch_of(text=[9, 4, 1], image=(3, 2))
    masks = hide(batch)
    return batch, masks | {f"vl_{name}": mask for name, mask in masks.items()}


def audio_batch():
    batch = batch_of(text=[9, 4, 1], audio=[7, 12, 3])
    masks = hide(batch)
    return batch, {"audio": masks["audio"], "al_audio": masks["audio"], "al_text": masks["text"]}


BATCHES = pytest.mark.parametrize("make_batch", [vision_batch, audio_batch], ids=["vision language", "audio language"])


def loss_and_gradients(model, batch, masks):
    model.zero_grad(set_to_none=True)
    task = "audio_language_loss" if "audio" in batch else "vision_language_loss"
    loss = model(task, **batch, masks=masks)["loss"]
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


@BATCHES
def test_the_fused_backend_gives_the_cpus_loss_and_gradients(make_batch):
    model, (batch, masks) = small_model("fused"), make_batch()
    expected = {name: value.clone() for name, value in loss_and_gradients(model, batch, masks).items()}
    got = loss_and_gradients(model.cuda(), on_gpu(batch), on_gpu(masks))
    assert set(got) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name].cpu(), value, rtol=1e-8, atol=1e-10, msg=name)


@BATCHES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_repeats_bit_for_bit(dtype, make_batch):
    model = small_model("fused", small_config(), dtype=torch.float32).cuda()
    batch, masks = (on_gpu(values) for values in make_batch())
    batch = {name: value.float() if value.is_floating_point() else value for name, value in batch.items()}
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        first = {name: value.clone() for name, value in loss_and_gradients(model, batch, masks).items()}
        for _ in range(REPEATS - 1):
            again = loss_and_gradients(model, batch, masks)
            assert all(torch.equal(again[name], value) for name, value in first.items())


def test_nothing_waits_between_the_one_read_and_the_end_of_the_backward_pass():
    model = small_model("fused", dtype=torch.float32).cuda()
    stack = model.encoder_wrapper
    batch = on_gpu(batch_of(text=[9, 4, 1], image=(3, 2)))
    batch["image"] = batch["image"].float()
    read, _ = read_batch(stack.adapters, batch)
    for _ in range(2):  # the first round loads libraries, which may wait
        (encoded,) = stack([stack.embed(read)], read.samples)
        sum(output.square().mean() for output in encoded.tensors()).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        (encoded,) = stack([stack.embed(read)], read.samples)
        sum(output.square().mean() for output in encoded.tensors()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_stream_gives_the_same_bits():
    model = small_model("fused", dtype=torch.float32).cuda()
    batch = on_gpu(batch_of(text=[9, 4, 1], image=(3, 2)))
    batch["image"] = batch["image"].float()
    expected = model.encode(**batch)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        got = model.encode(**batch)
    torch.cuda.synchronize()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
