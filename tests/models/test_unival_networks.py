"""The networks of pixels, frames and waveforms: against their formulas, in the model, and in training."""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from data._refused import refused
from models._small import BACKENDS, randomise
from models._unival import SOURCE, TARGET, refusal, unival, unival_config
from models._unival_networks import audio_network, residual_network

from onepeace_fast.models.unival import Unival, UnivalConfig
from onepeace_fast.models.unival import networks as networks_module
from onepeace_fast.models.unival.networks import network, without_stripes
from onepeace_fast.models.unival.spectrogram import log_mel, mel_filters, to_hertz, to_mel
from onepeace_fast.models.unival.state import CONSTANTS, TABLE, TIED, constants, statistics
from onepeace_fast.pretrained.weights import Undrawn

SIZES = {
    "networks": True, "feature_channels": 512, "image_blocks": (1, 2, 1, 1), "video_blocks": (1, 1, 1, 1),
    "audio_hop": 320,
}  # fmt: skip
CONSTANT = constants(unival_config(**SIZES))
GENERATOR = torch.Generator().manual_seed(5)
RAW = {
    "image": torch.randn(2, 3, 65, 40, generator=GENERATOR, dtype=torch.float64),
    "video": torch.randn(1, 3, 17, 36, 33, generator=GENERATOR, dtype=torch.float64),
    "audio": torch.randn(1, 320 * 70 + 11, generator=GENERATOR, dtype=torch.float64),
}
RAW["audio"][:, :6000] = 0  # where power is nothing
SAMPLES = {"image": [2, 3], "video": [0], "audio": [1]}


def fill(module, seed=0):
    """Parameters and running statistics that hide nothing."""
    randomise(module, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in statistics(module).items():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand(buffer.shape, generator=generator, dtype=torch.float64) + 0.5 * ("var" in name))
    return module


def small_network(name):
    return fill(network(name, unival_config(**SIZES)).double()).eval()


def with_networks(backend="fused"):
    return fill(unival(backend, **SIZES))


@functools.cache
def shared():
    """A model that no test changes."""
    return with_networks()


@pytest.mark.parametrize("name", RAW)
def test_a_network_gives_the_values_and_gradients_of_its_formula(name):
    module, config = small_network(name), unival_config(**SIZES)
    formulas = {
        "image": lambda x, state: residual_network(x, state, config.image_blocks, 1),
        "video": lambda x, state: residual_network(x, state, config.video_blocks, 32),
        "audio": lambda x, state: audio_network(x, state, config.audio_hop),
    }
    found = []
    for call in (lambda x, state: module(x), formulas[name]):
        module.zero_grad()
        x = RAW[name].clone().requires_grad_()
        y = call(x, module.state_dict(keep_vars=True))
        (y * torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape)).sum().backward()
        grads = {key: parameter.grad for key, parameter in module.named_parameters() if parameter.requires_grad}
        found.append({"y": y.detach(), "x": x.grad, **grads})
    for key, value in found[1].items():
        largest = value.abs().max().item()
        torch.testing.assert_close(found[0][key], value, rtol=0, atol=1e-9 * largest, msg=lambda text: f"{key}: {text}")  # noqa: B023
        assert largest > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_model_is_given_raw_is_what_its_networks_make_of_it(backend):
    model = with_networks(backend)
    assert all(module.training is False for module in model.modules())
    made = {name: model.encoder.get_submodule(f"embed_{name}s")(x) for name, x in RAW.items()}
    order = {"image": torch.tensor([[5, 0, 3], [1, 2, 4]])}
    for patches in (None, order):
        given = {"samples": SAMPLES, "patches": patches}
        raw, mapped = (model.loss(SOURCE, TARGET, **given, **maps) for maps in (RAW, made))
        torch.testing.assert_close(raw, mapped, rtol=1e-12, atol=0)
        wrong = model.loss(SOURCE, TARGET, **given, **{**RAW, "video": -RAW["video"]})
        assert abs(wrong - raw) > 1e-6
    raw, mapped = (
        model.generate(SOURCE, beams=2, max_length=4, samples=SAMPLES, **maps) for maps in (RAW, made)
    )  # fmt: skip
    assert raw == mapped


def test_only_the_networks_that_a_batch_runs_get_gradients_other_than_zeros():
    model = with_networks()
    made = {"video": torch.randn(1, 512, 2, 2, 2, dtype=torch.float64)}
    samples = {name: SAMPLES[name] for name in ("image", "video")}
    model.loss(SOURCE, TARGET, samples=samples, image=RAW["image"], **made).backward()
    parts = {
        name: {
            parameter.grad is not None and bool(parameter.grad.any())
            for key, parameter in model.encoder.get_submodule(f"embed_{name}s").named_parameters()
            if not key.startswith("fc.")
        }
        for name in RAW
    }
    assert parts == {"image": {True}, "video": {False}, "audio": {False}}
    assert all(parameter.grad is not None for parameter in model.encoder.embed_audios.parameters())
    assert model.encoder.video_proj.weight.grad.any()
    classifier = model.encoder.embed_images.fc
    assert classifier.weight.grad is None and not classifier.weight.requires_grad


@pytest.mark.parametrize("name", RAW)
def test_the_places_of_a_map_are_known_before_its_network_runs(name):
    module, config = small_network(name), unival_config(**SIZES, image_bucket_size=6)
    from onepeace_fast.models.unival.inputs import split_raw

    sizes = {
        "image": [(3, 32, 33), (3, 64, 1), (3, 65, 97)], "video": [(3, 1, 32, 33), (3, 16, 65, 1), (3, 33, 31, 64)],
        "audio": [(9920,), (20_160,), (20_159,), (30_401,)],
    }  # fmt: skip
    for size in sizes[name]:
        x = torch.zeros(2, *size, dtype=torch.float64)
        maps, raw = split_raw(config, {name: x})
        assert raw[name] is x and maps[name].shape == module(x).shape, size


def test_networks_start_as_upstream_s():
    torch.manual_seed(0)
    image, video, audio = (network(name, unival_config(**SIZES)) for name in RAW)
    assert not any(block.bn3.weight.any() for block in (image.layer1[0], image.layer2[1], image.layer4[0]))
    assert image.bn1.weight.all() and video.layer1[0].bn3.weight.all()
    # Of the 16 channels that come out of 3 to a side: 2 / (9 * 16); of those of 3-D upstream counts 9 places too.
    assert image.layer1[0].conv2.weight.std().item() == pytest.approx((2 / 144) ** 0.5, rel=0.1)
    assert video.layer2[0].conv2.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.1)
    bound = (6 / (9 * 32 + 9 * 32)) ** 0.5
    assert 0.95 * bound < audio.conv_block2.conv2.weight.abs().max().item() <= bound


def test_a_spectrogram_is_rounded_once():
    x = RAW["audio"].float()
    expected = log_mel(x, 320, torch.float32)
    assert torch.equal(log_mel(x, 320, torch.bfloat16), expected.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(log_mel(x, 320, torch.float32), expected)


def test_mels_are_slaney_s():
    hertz = torch.tensor([60.0, 200.0, 1000.0, 6400.0], dtype=torch.float64)
    mels = torch.tensor([to_mel(one) for one in hertz.tolist()], dtype=torch.float64)
    torch.testing.assert_close(mels, torch.tensor([0.9, 3.0, 15.0, 42.0], dtype=torch.float64))
    torch.testing.assert_close(to_hertz(mels), hertz)
    width = 48_000 / 1024
    wide = mel_filters()[:, 40:]  # of many frequencies, so that the sum is close to the area
    torch.testing.assert_close(wide.sum(0) * width, torch.ones(24, dtype=torch.float64), rtol=0.02, atol=0)


@pytest.mark.slow
def test_mel_filters_are_those_of_transformers():
    audio_utils = pytest.importorskip("transformers.audio_utils")
    expected = audio_utils.mel_filter_bank(513, 64, 50.0, 14_000.0, 48_000, norm="slaney", mel_scale="slaney")
    torch.testing.assert_close(mel_filters(), torch.from_numpy(expected), rtol=1e-9, atol=1e-15)


@pytest.mark.slow
def test_the_image_network_is_torchvision_s():
    torchvision = pytest.importorskip("torchvision")
    other = fill(torchvision.models.resnet101().double()).eval()
    own = network("image", UnivalConfig(vocab_size=9, networks=True)).double().eval()
    assert [*own.state_dict()] == [*other.state_dict()]
    own.load_state_dict(other.state_dict())
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stem = [other.conv1, other.bn1, other.relu, other.maxpool]
    whole = torch.nn.Sequential(*stem, other.layer1, other.layer2, other.layer3, other.layer4)
    for module in (whole, own):
        module(x).square().mean().backward()
    torch.testing.assert_close(own(x), whole(x), rtol=1e-10, atol=1e-12)
    grads = dict(other.named_parameters())
    for name, parameter in own.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, grads[name].grad, rtol=1e-9, atol=1e-14)


def test_full_networks_have_upstream_s_names_and_sizes():
    with torch.device("meta"), Undrawn():
        encoder = Unival(UnivalConfig(vocab_size=9, networks=True)).encoder
    shapes = {name: list(value.shape) for name, value in encoder.state_dict().items()}
    expected = {
        "embed_images.conv1.weight": [64, 3, 7, 7], "embed_images.bn1.running_mean": [64],
        "embed_images.layer1.0.downsample.0.weight": [256, 64, 1, 1],
        "embed_images.layer3.22.conv2.weight": [256] * 2 + [3] * 2,
        "embed_images.layer4.2.bn3.num_batches_tracked": [], "embed_images.fc.weight": [1000, 2048],
        "embed_videos.conv1.weight": [64, 3, 7, 7, 7], "embed_videos.layer1.0.conv2.weight": [128, 4, 3, 3, 3],
        "embed_videos.layer4.2.conv3.weight": [2048, 1024, 1, 1, 1],
        "embed_videos.layer2.0.downsample.1.running_var": [512],
        "embed_audios.bn0.weight": [64], "embed_audios.conv_block1.conv1.weight": [64, 1, 3, 3],
        "embed_audios.conv_block6.bn2.bias": [2048],
    }  # fmt: skip
    assert {name: shapes.get(name) for name in expected} == expected
    # Those of upstream's modules, counted there: ResNet-101 with its classifier, 3-D ResNeXt-101, CNN14.
    counts = [sum(p.numel() for p in encoder.get_submodule(f"embed_{name}s").parameters()) for name in RAW]
    assert counts == [44_549_160, 47_521_216, 75_477_440]


def test_upstream_s_state_dict_carries_statistics_and_the_spectrogram_s_constants():
    model, other = shared(), unival("reference", **SIZES)
    state = model.to_upstream_state_dict()
    assert set(state) == {*model.state_dict(), *CONSTANTS, *TIED}
    assert state[CONSTANTS[0]].shape == state[CONSTANTS[1]].shape == (513, 1, 1024)
    assert state[CONSTANTS[2]].shape == (513, 64)
    other.load_upstream_state_dict(state)
    for name, value in other.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert set(model.to_upstream_state_dict(grads=True)) == {*dict(model.named_parameters()), *TIED}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"encoder.embed_images.bn1.running_mean": None}, "missing encoder.embed_images.bn1.running_mean"),
        ({"encoder.embed_audios.bn0.running_var": torch.ones(3)}, "bn0.running_var has the shape [3] instead of [64]"),
        ({CONSTANTS[1]: -CONSTANT[CONSTANTS[1]]}, "conv_imag.weight differs from the formula's"),
        ({CONSTANTS[2]: CONSTANT[CONSTANTS[2]][1:]}, "logmel_extractor.melW differs from the formula's"),
        ({"encoder.embed_images.fc.weight": None}, "missing: encoder.embed_images.fc.weight"),
    ],
)
def test_a_network_s_state_dict_that_does_not_fit_is_refused_and_changes_nothing(change, says):
    model = shared()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: torch.zeros_like(value) for name, value in model.to_upstream_state_dict().items()}
    state |= CONSTANT
    state = {name: value for name, value in {**state, **change}.items() if value is not None}
    line = refusal(lambda: model.load_upstream_state_dict(state))
    assert line.startswith("state_dict: expected ") and says in line and "\n" not in line
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_without_networks_takes_no_state_dict_with_them():
    state = shared().to_upstream_state_dict()
    line = refusal(lambda: unival(feature_channels=512).load_upstream_state_dict(state))
    assert "unexpected: encoder.embed_audios.bn0.bias" in line and TABLE not in line


REFUSALS = {
    "bytes": ({"image": torch.zeros(4, 3, 9, 9, dtype=torch.uint8)},
              "image: expected floating point [rows, 3, height, width], got uint8 [4, 3, 9, 9] on cpu"),
    "a short waveform": ({"audio": torch.zeros(4, 9919)}, "audio: expected at least 9920 samples, got 9919"),
    "an image larger than the grid": ({"image": torch.zeros(4, 3, 32, 129)},
                                      "image: expected a map of at most 4 x 4 positions, got one that takes 1 x 5"),
    "maps of other channels": ({"image": torch.zeros(4, 4, 9, 9)},
                               "image: expected floating point [rows, channels, height, width] of 512 channels"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_fit_is_refused_before_a_network_runs(name, monkeypatch):
    def work(*_):
        raise AssertionError("a network ran before the arguments were checked")

    monkeypatch.setattr(networks_module.ResidualNetwork, "forward", work)
    monkeypatch.setattr(networks_module.AudioNetwork, "forward", work)
    inputs, says = REFUSALS[name]
    refused(lambda: shared().loss(SOURCE, TARGET, **inputs), "", says)


def test_without_networks_pixels_are_refused():
    says = "image: expected floating point [rows, channels, height, width] of 5 channels, got float64"
    refused(lambda: unival().encode(SOURCE[:2], image=RAW["image"]), "", says)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"feature_channels": 500}, "feature_channels: expected a multiple of 512 with networks, got 500"),
        ({"image_blocks": (3, 4, 6)}, "image_blocks: expected 4 positive integers, one for a stage, got (3, 4, 6)"),
        (
            {"video_blocks": (3, 4, 6, 0)},
            "video_blocks: expected 4 positive integers, one for a stage, got (3, 4, 6, 0)",
        ),
        ({"networks": 1}, "networks: expected True or False, got 1"),
    ],
)
def test_networks_that_do_not_fit_are_refused(changed, says):
    refused(lambda: unival_config(**{**SIZES, **changed}), "", says)


def test_upstream_s_arguments_say_which_networks_there_are():
    from onepeace_fast.models.unival.config import _FIXED

    args = {
        **_FIXED, "image_encoder_name": "timm_resnet", "resnet_type": "resnet101", "hop_size": 200,
        "video_encoder_name": "all_resnext50", "audio_encoder_name": "pann_cnn14",
    }  # fmt: skip
    expected = UnivalConfig(vocab_size=9, networks=True, video_blocks=(3, 4, 6, 3), audio_hop=200)
    assert UnivalConfig.from_upstream(args, 9, networks=True) == expected
    others = {
        "image_encoder_name": ("resnet", "expected timm_resnet, got resnet"),
        "resnet_type": ("resnet18", "expected one of resnet50, resnet101, resnet152, got resnet18"),
        "video_encoder_name": ("resnext101", "expected one of all_resnext50, all_resnext101, all_resnext152, got"),
        "audio_encoder_name": ("pann_cnn6", "expected pann_cnn14, got pann_cnn6"),
    }
    for name, (value, says) in others.items():
        refused(lambda: UnivalConfig.from_upstream({**args, name: value}, 9, networks=True), "", f"{name}: {says}")  # noqa: B023


def test_in_training_norms_take_the_batch_and_remember_it():
    model = with_networks().train()
    x, mean = RAW["image"], model.encoder.embed_images.bn1.running_mean.clone()
    inputs = {"image": x, "samples": {"image": [2, 3]}}
    first = F.conv2d(x, model.encoder.embed_images.conv1.weight, stride=2, padding=3)
    model.loss(SOURCE, TARGET, **inputs)
    found = model.encoder.embed_images.bn1.running_mean
    torch.testing.assert_close(found, 0.9 * mean + 0.1 * first.mean((0, 2, 3)), rtol=1e-9, atol=1e-12)
    model.eval()
    assert torch.equal(model.loss(SOURCE, TARGET, **inputs), model.loss(SOURCE, TARGET, **inputs))
    assert torch.equal(model.encoder.embed_images.bn1.running_mean, found)


def test_stripes_are_of_all_widths_and_places_and_drawn_for_each_row():
    torch.manual_seed(0)
    rows, size, width = 4000, 20, 4
    for dim in (2, 3):
        shape = (rows, 1, size, 3) if dim == 2 else (rows, 1, 3, size)
        found = without_stripes(torch.ones(shape), dim, width).select(5 - dim, 0)[:, 0]
        hidden = found == 0
        assert set(found.unique().tolist()) == {0.0, 1.0}
        # A stripe of w of 20 places starts at one of the first 20 - w, and there are two.
        one = torch.zeros(size)
        for w in range(width):
            for start in range(size - w):
                one[start : start + w] += 1 / width / (size - w)
        share = 1 - (1 - one) ** 2
        error = 4.5 * (share * (1 - share) / rows).sqrt()
        assert ((hidden.float().mean(0) - share).abs() <= error).all()
        assert hidden.sum(1).max() == 2 * (width - 1)


def test_a_waveform_s_training_hides_stripes_and_drops_a_fifth_after_each_block(monkeypatch):
    module = small_network("audio").train()
    for name, part in module.named_modules():
        part.training = not name.rpartition(".")[2].startswith("bn")
    given, made = {}, {}
    for name in module.blocks:
        part = module.get_submodule(name)
        part.register_forward_pre_hook(lambda part, x, name=name: given.setdefault(name, []).append(x[0].detach()))
        part.register_forward_hook(lambda part, x, y, name=name: made.update({name: y.detach()}))
    torch.manual_seed(0)
    waveform = torch.randn(4, 320 * 200, dtype=torch.float64).requires_grad_()
    monkeypatch.setattr(networks_module, "STRIPES", 0)
    module(waveform)
    for before, name in itertools.pairwise(module.blocks):
        whole, (dropped,) = made[before], given[name]
        kept, count = dropped != 0, whole.count_nonzero().item()
        torch.testing.assert_close(dropped[kept], whole[kept] / 0.8, rtol=1e-12, atol=0)
        assert 1 - kept.sum().item() / count == pytest.approx(0.2, abs=5 * math.sqrt(0.16 / count)), name
    module.eval()
    module(waveform)
    assert torch.equal(given["conv_block2"][1], made["conv_block1"])
    assert torch.equal(*given["conv_block1"])
    monkeypatch.undo()
    module.train()
    module(waveform).sum().backward()
    hidden = given["conv_block1"][2] == 0
    assert hidden.all(3).any(2).all() and hidden.all(2).any(2).any() and not hidden.all()
    assert waveform.grad.isfinite().all() and waveform.grad.any()
