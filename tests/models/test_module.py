"""The model as a module: initial values, hooks on its layers under both backends, calls by task."""

import pytest
import torch
from models._small import BACKENDS, batch_of, small_config, small_model
from torch import nn

from onepeace_fast import OnePeacePretrain


def test_every_linear_layer_starts_cut_at_two_hundredths_with_zero_bias():
    model = OnePeacePretrain(small_config())
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(linears) > 30
    for linear in linears:
        assert 0 < linear.weight.abs().max() <= 0.02
        assert linear.bias is None or not linear.bias.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_hooks_on_layers_fire_once_a_layer(backend):
    model, seen = small_model(backend), []
    for i, layer in enumerate(model.encoder_wrapper.fusion_model.layers):
        layer.register_forward_hook(lambda *_, i=i: seen.append(i))
    model.encode(**batch_of(text=[3, 2], image=(2, 2)))
    assert seen == [0, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_calling_the_model_calls_the_task(backend):
    model, batch = small_model(backend), batch_of(text=[3, 2])
    assert torch.equal(model("embed", **batch), model.embed(**batch))
    with pytest.raises(ValueError, match=r"^task: expected one of encode, embed.*, got 'save'"):
        model("save", directory="nowhere")


def test_distributed_data_parallel_wraps_the_model():
    model, batch = small_model("fused"), batch_of(text=[3, 2])
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        wrapped("embed", **batch).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    got = model.text_proj.weight.grad.clone()
    model.zero_grad()
    model.embed(**batch).sum().backward()
    torch.testing.assert_close(got, model.text_proj.weight.grad)
