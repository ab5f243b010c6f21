"""Models whose parts are wrapped or sharded: names stay upstream's, files load into wrapped and plain ones alike."""

import pytest
import torch
from models._small import assert_same_bits, batch_of, small_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from training._batches import batch_number, configuration

from onepeace_fast import OnePeacePretrain
from onepeace_fast.layers.adapters import TextAdapter
from onepeace_fast.models.parameter_names import upstream_modules, upstream_names
from onepeace_fast.training.distributed import Processes
from onepeace_fast.training.pairs import PairTrainer


def sharded(module):
    return fully_shard(module, mesh=init_device_mesh("cpu", (1,)))


WRAPPERS = {
    "torch.compile": lambda module: torch.compile(module, backend="eager"),
    "checkpoint_wrapper": checkpoint_wrapper,
    "DistributedDataParallel": DistributedDataParallel,
    "FSDP1": lambda module: FullyShardedDataParallel(module, device_id=torch.device("cpu")),
    "FSDP1, original": lambda m: FullyShardedDataParallel(m, device_id=torch.device("cpu"), use_orig_params=True),
    "FSDP2": sharded,
    "torch.compile of checkpoint_wrapper": lambda module: torch.compile(checkpoint_wrapper(module), backend="eager"),
}
UNSHARDED = ["torch.compile", "checkpoint_wrapper", "torch.compile of checkpoint_wrapper"]


def wrapped_model(wrapper, seed=0):
    """A small model whose layers, text adapter and one projection are wrapped."""
    model, wrap = small_model("fused", dtype=torch.float32, seed=seed), WRAPPERS[wrapper]
    layers = model.encoder_wrapper.fusion_model.layers
    for place, layer in enumerate(layers):
        layers[place] = wrap(layer)
    if wrapper != "FSDP2":  # bias tables are read beside its forward
        model.encoder_wrapper.text_adapter = wrap(model.encoder_wrapper.text_adapter)
    model.image_proj = wrap(model.image_proj)
    return model


def values_of(model):
    """Its parameters under upstream's names, whole."""
    values = model.to_upstream_state_dict()
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in values.items()}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_is_saved_as_a_plain_one_and_takes_a_plain_one_s_values(group, wrapper, tmp_path):
    plain, model = small_model("fused", dtype=torch.float32), wrapped_model(wrapper)
    assert_same_bits(values_of(model), values_of(plain))
    model.save(tmp_path)
    assert_same_bits(values_of(OnePeacePretrain.load(tmp_path)), values_of(plain))
    other = small_model("fused", dtype=torch.float32, seed=1)
    model.load_upstream_state_dict(other.to_upstream_state_dict())
    assert_same_bits(values_of(model), values_of(other))
    if "torch.compile" in wrapper:  # takes seconds
        return
    text = batch_of(text=[3, 5])
    with torch.no_grad():
        torch.testing.assert_close(model.embed(**text), other.embed(**text), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_is_as_strict_as_a_plain_one(group, wrapper):
    model = wrapped_model(wrapper)
    before, name = values_of(model), "encoder_wrapper.fusion_model.layers.0.self_attn.q_proj.weight"
    values = {key: value + 1 for key, value in before.items() if key != name} | {"image_proj.bias": torch.zeros(7)}
    with pytest.raises(ValueError) as caught:
        model.load_upstream_state_dict(values | {"encoder_wrapper.text_adapter.rp_bucket": torch.zeros(2, 2)})
    assert f"missing: {name}" in str(caught.value)
    assert "image_proj.bias [7] instead of [48]" in str(caught.value)
    assert "encoder_wrapper.text_adapter.rp_bucket differs" in str(caught.value)
    assert_same_bits(values_of(model), before)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_s_own_state_dict_loads_into_plain_and_wrapped_ones(group, wrapper):
    state_dict, expected = wrapped_model(wrapper, seed=1).state_dict(), small_model("fused", seed=1).float()
    names = list(WRAPPERS)
    other = names[(names.index(wrapper) + 3) % len(names)]
    for model in (small_model("fused", dtype=torch.float32), wrapped_model(wrapper), wrapped_model(other)):
        model.load_upstream_state_dict(state_dict)
        assert_same_bits(values_of(model), values_of(expected))


def test_a_state_dict_with_wrappers_at_several_depths_loads_and_one_with_a_name_twice_does_not(group):
    expected, plain = small_model("fused", dtype=torch.float32, seed=1), small_model("fused", dtype=torch.float32)
    around = small_model("fused", dtype=torch.float32, seed=1)
    for adapter in ("text", "image"):
        name = f"{adapter}_adapter"
        around.encoder_wrapper.add_module(name, DistributedDataParallel(getattr(around.encoder_wrapper, name)))
    plain.load_upstream_state_dict(DistributedDataParallel(torch.compile(around)).state_dict())
    assert_same_bits(values_of(plain), values_of(expected))
    twice = {f"encoder_wrapper._orig_mod.{name}": value for name, value in plain.encoder_wrapper.state_dict().items()}
    thrice = {key.replace("._orig_mod", ".module"): value for key, value in twice.items()}
    for more in (twice, thrice, twice | thrice):
        with pytest.raises(ValueError, match=r"also there under the new name: encoder_wrapper\.(_orig_mod|module)"):
            plain.load_upstream_state_dict(plain.to_upstream_state_dict() | more)


@pytest.mark.parametrize("wrapper", UNSHARDED)
def test_gradients_of_a_wrapped_model_have_upstream_s_names(wrapper):
    model, plain = wrapped_model(wrapper), small_model("fused", dtype=torch.float32)
    for each in (model, plain):
        for parameter in each.parameters():
            parameter.grad = parameter.detach() + 1 if parameter.dim() > 1 else None
    gradients, expected = model.to_upstream_state_dict(grads=True), plain.to_upstream_state_dict(grads=True)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradients[name] is None if gradient is None else torch.equal(gradients[name], gradient), name


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_a_stack_whose_adapters_are_read_before_they_are_gathered_is_refused_in_one_line(group, stack):
    model = small_model("fused", dtype=torch.float32)
    sharded(model.get_submodule(f"{stack}_wrapper"))
    hidden = torch.tensor([[False, True, False, False]])
    with pytest.raises(ValueError, match=r"^text_adapter: expected whole parameters [^\n]*, got sharded ones;[^\n]*$"):
        model.reconstruct(**batch_of(text=[3]), masks={"text": hidden})


def test_gradients_that_fsdp_1_flattens_are_refused(group):
    with pytest.raises(ValueError, match=r"^grads: expected False, got True for a model in FSDP1"):
        wrapped_model("FSDP1").to_upstream_state_dict(grads=True)


def test_a_part_that_is_really_called_module_keeps_its_name():
    model = small_model("fused")
    adapter = TextAdapter(model.config.encoder.text, 48, 3, 1, 30)
    adapter.module = torch.nn.Linear(1, 1)
    model.add_modality("pen", adapter)
    assert "encoder_wrapper.pen_adapter.module.weight" in model.to_upstream_state_dict()


@pytest.mark.parametrize("wrapper", UNSHARDED)
def test_a_modality_is_added_inside_the_wrappers(wrapper):
    models = [small_model("fused", dtype=torch.float32), wrapped_model(wrapper)]
    for model in models:
        torch.manual_seed(0)
        model.add_modality("pen", TextAdapter(model.config.encoder.text, 48, 3, 1, 30), init_from="text")
        model.train_only("pen")
    assert_same_bits(*map(values_of, models))
    inner = upstream_modules(models[1])
    assert "pen_ffn" in dict(inner["encoder_wrapper.fusion_model.layers.1"].named_children())
    trained = [{n for n, p in upstream_names(model).items() if p.requires_grad} for model in models]
    assert trained[0] == trained[1]


@pytest.mark.parametrize(
    "wrapper", ["checkpoint_wrapper", pytest.param("torch.compile of checkpoint_wrapper", marks=pytest.mark.slow)]
)
def test_training_goes_on_from_a_wrapped_model_s_state_in_a_plain_one(wrapper):
    processes = Processes(0, 1, torch.device("cpu"))
    model = wrapped_model(wrapper)
    trainer = PairTrainer(model.train(), configuration("vision_language"), processes)
    trainer.step(iter([batch_number("vision_language", 0)]))
    weights, state = trainer.weights(), trainer.state()
    plain = small_model("fused", dtype=torch.float32, seed=5)
    assert weights.keys() == plain.state_dict().keys() and state["optimizer"].keys() <= weights.keys()
    plain.load_upstream_state_dict(weights)
    again = PairTrainer(plain, configuration("vision_language"), processes)
    again.load_state(state)
    numbers = [one.step(iter([batch_number("vision_language", 1)])) for one in (trainer, again)]
    assert numbers[0]["loss"] == pytest.approx(numbers[1]["loss"], rel=1e-5)
    for name, value in trainer.weights().items():
        torch.testing.assert_close(again.weights()[name], value, rtol=1e-4, atol=1e-4)


def test_data_parallel_leaves_no_trace_in_the_names():
    plain, model = (small_model("fused", dtype=torch.float32, seed=seed) for seed in (1, 2))
    model.text_proj = torch.nn.DataParallel(model.text_proj)
    assert set(model.to_upstream_state_dict()) == set(plain.to_upstream_state_dict())
    model.load_upstream_state_dict(plain.to_upstream_state_dict())
    assert torch.equal(model.text_proj.module.weight, plain.text_proj.weight)
