"""``onepeace-fast warmup``: which kernels a model needs, that no batch adds one, and that the cache is filled."""

import dataclasses
import json
import multiprocessing

import pytest
import torch

from onepeace_fast import cli, kernels
from onepeace_fast.config import OnePeaceConfig, TransformerConfig
from onepeace_fast.drop_path import branches
from onepeace_fast.hardware import warmup
from onepeace_fast.kernels.launch import recording
from onepeace_fast.layers import Transformer
from onepeace_fast.ops.kernel_choice import force_kernels
from onepeace_fast.route_plan import RoutePlan

pytestmark = pytest.mark.skipif(
    kernels.INTERPRETED or kernels.unavailable_reason() is not None, reason="Triton compiles nothing here"
)
STACK = TransformerConfig(embed_dim=64, ffn_embed_dim=128, layers=1, attention_heads=2, drop_path_rate=0.3, audio=None)
CONFIG = OnePeaceConfig(encoder=STACK, decoder=dataclasses.replace(STACK, drop_path_rate=0.0))


def needed(config=CONFIG, **how):
    arguments = {"architecture": "sm_90", "dtype": torch.bfloat16, "autocast": True, "modalities": None, **how}
    return warmup.needed_kernels(config, **arguments)


def compiled_for(configuration):
    """The kernel and what Triton keys its compiled form by; tensors are where a batch has them."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel = configuration.kernel
    binder = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    _, specialization, options = binder(**configuration.keywords, debug=False)
    return f"{kernel.fn.__module__}.{kernel.fn.__name__} {specialization} {options}"


def layer_step(lengths, frozen=(), strategy="grouped"):
    """What one layer in bfloat16 asks of Triton for a batch, forward and backward; the frozen modality's FFN is."""
    model = Transformer(STACK).bfloat16().train()
    layer = model.layers[0]
    for modality in frozen:
        layer.ffn(modality).requires_grad_(False)
    plan = RoutePlan.from_lengths(lengths)
    keep = torch.ones(3, 2, plan.sample_count)
    keep[:, :, 0] = 0
    found = set()
    # Of three layers' branches, each lies elsewhere in the tensors of all.
    for branch in branches(plan.with_drop_path(keep)):
        with force_kernels(True), recording("sm_90", 132) as configurations:
            x = torch.zeros(plan.capacity, 64, dtype=torch.bfloat16, requires_grad=True)
            bias = [torch.zeros(2, 2 * offset + 4, dtype=torch.bfloat16) for offset in plan.code_offsets]
            original = layer.packed_ffn
            layer.packed_ffn = lambda *given, original=original, **more: original(*given, strategy=strategy, **more)
            layer(x, branch, bias).sum().backward()
            del layer.packed_ffn
        found |= {compiled_for(one) for one in configurations}
    return found


@pytest.mark.parametrize("strategy", ("grouped", "hybrid", "per_modality"))
def test_neither_another_batch_nor_a_frozen_modality_compiles_anything(strategy):
    first = layer_step({"text": [16, 16], "image": [16, 16]}, strategy=strategy)
    assert len(first) > 8
    for lengths in ({"text": [1, 1], "image": [0, 1]}, {"text": [3, 2, 30], "image": [17, 1, 300]}):
        assert layer_step(lengths, strategy=strategy) <= first
    if strategy != "per_modality":
        for frozen in (("text",), ("image",)):
            assert layer_step({"text": [16, 16], "image": [16, 16]}, frozen, strategy) <= first


def test_the_products_of_another_width_are_compiled_but_for_two_the_same():
    found = []
    for width, hidden in ((64, 128), (96, 256)):
        config = dataclasses.replace(STACK, embed_dim=width, ffn_embed_dim=hidden)
        kernels_of = needed(OnePeaceConfig(encoder=config, decoder=config))
        found.append({kernel for kernel in kernels_of if kernel.name.startswith(("grouped_gemm", "routed_ffn"))})
    assert {kernel.name for kernel in found[0] ^ found[1]} == {
        "routed_ffn_hidden_kernel",
        "routed_ffn_statistics_kernel",
    }


def test_the_kernels_of_all_strategies_are_listed_once_each():
    found = needed()
    names = {kernel.name for kernel in found}
    assert len(set(found)) == len(found)
    assert {"routed_ffn_hidden_kernel", "gated_sub_ln_forward_kernel", "residual_backward_kernel"} <= names
    assert "routed_ffn_norm_gradient_kernel" in names  # of "hybrid" alone
    assert len(needed(modalities=(2,))) < len(found)


@pytest.mark.slow
def test_a_kernel_that_was_compiled_is_found_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (kernel,) = [one for one in needed(modalities=(1,)) if one.name == "routed_ffn_fold_kernel"][:1]
    results = []
    for _ in range(2):  # processes of their own, as ``warmup`` has: this one's Triton keeps its driver
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results.append(pool.apply(warmup._compile, (90, kernel)))
    assert [result.cached for result in results] == [False, True]
    assert results[0].name == "routed_ffn_fold_kernel"


def test_the_command_prints_every_kernel_and_the_total(tmp_path, monkeypatch, capsys):
    CONFIG.save(tmp_path / "config.json")
    asked = []

    def pretended(config, *, progress, **how):
        asked.append((config, how))
        done = [
            warmup.Compiled("layer_norm_forward_kernel", 1.5, False),
            warmup.Compiled("residual_forward_kernel", 0.0, True),
        ]
        for number, one in enumerate(done, 1):
            progress(number, len(done), one)
        return done

    monkeypatch.setattr(warmup, "warmup", pretended)
    assert cli.main(["warmup", str(tmp_path), "--target", "sm_90", "--jobs", "3", "--dtype", "float16"]) == 0
    config, how = asked[0]
    assert config == CONFIG
    assert how == {"dtype": torch.float16, "target": "sm_90", "modalities": None, "jobs": 3}
    lines = capsys.readouterr().out.splitlines()
    assert "1 of 2" in lines[0] and "1.5 s  layer_norm_forward_kernel" in lines[0] and lines[1].endswith("(cached)")
    assert lines[2].startswith("2 kernels in") and lines[2].endswith("1 were in the cache")


def test_a_training_configuration_has_text_and_what_its_stage_pairs_it_with(tmp_path):
    pytest.importorskip("yaml")
    run = {"stage": "vision_language", "manifest": "m", "output": "o", "batch_size": 1, "steps": 1,
           "learning_rate": 1, "model": {"encoder": {"layers": 3}}}  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(run))
    config, modalities = warmup.read_configuration(str(path))
    assert config.encoder.layers == 3 and modalities == (2,)


@pytest.mark.parametrize(
    "arguments, line",
    (
        ([], "warmup: expected a CUDA GPU, got none; compile for one that is elsewhere by --target sm_90"),
        (["--target", "hopper"], "warmup: target: expected an architecture such as sm_90, got 'hopper'"),
    ),
)
def test_what_is_missing_is_one_line_and_code_2(tmp_path, monkeypatch, capsys, arguments, line):
    CONFIG.save(tmp_path / "config.json")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["warmup", str(tmp_path), *arguments]) == 2
    assert capsys.readouterr().err == f"{line}\n"


def test_a_file_that_is_not_there_is_one_line_and_code_2(tmp_path, capsys):
    assert cli.main(["warmup", str(tmp_path / "none.json"), "--target", "sm_90"]) == 2
    assert capsys.readouterr().err == f"warmup: {tmp_path / 'none.json'}: No such file or directory\n"
