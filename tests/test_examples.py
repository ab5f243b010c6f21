"""The examples run as they stand; the minimal model is the library's."""

import importlib.util
import re
import runpy
from pathlib import Path
from types import ModuleType

import pytest
import torch

from onepeace_fast import OnePeaceConfig, OnePeacePretrain
from onepeace_fast.config import ImageAdapterConfig, TextAdapterConfig, TransformerConfig

ROOT = Path(__file__).resolve().parent.parent


def example(name: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def of_text_and_images(vocab_size: int, **settings: float | None) -> OnePeaceConfig:
    """The configuration of a small model of text and of images 32 pixels wide."""
    encoder = TransformerConfig(
        embed_dim=32, ffn_embed_dim=32, layers=2, attention_heads=2, audio=None,
        image=ImageAdapterConfig(position_grid=2, bias_grid=2), **settings,
    )  # fmt: skip
    decoder = TransformerConfig(
        embed_dim=16, ffn_embed_dim=16, layers=1, attention_heads=1, layer_scale=None,
        text=TextAdapterConfig(use_bias=False), image=None, audio=None,
    )  # fmt: skip
    return OnePeaceConfig(encoder=encoder, decoder=decoder, vocab_size=vocab_size)


def test_the_minimal_model_is_the_library_s_in_value_and_every_gradient():
    torch.manual_seed(0)
    library = OnePeacePretrain(of_text_and_images(40, drop_path_rate=0.5))
    with torch.no_grad():
        for parameter in library.parameters():
            parameter += 0.3 * torch.randn_like(parameter)  # no table of zeros, no LayerScale that hides a branch
        library.logit_scale.fill_(1.0)
    weights = library.to_upstream_state_dict()
    names = [name for name in weights if not re.search("decoder|_mask_", name)]  # the denoising task has these
    minimal = example("minimal").OnePeace(32, 32, layers=2, heads=2, drop_path=0.5, vocabulary=40, grid=2)
    minimal.load_state_dict({name: weights[name] for name in names})
    text = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 1, 1, 1], [12, 13, 14, 1, 1], [15, 16, 17, 18, 1]])  # 1 is padding
    image = torch.randn(4, 3, 32, 32)
    real = torch.nn.functional.pad(text != 1, (1, 0), value=True)

    def outputs(model: torch.nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(1)  # the same samples are dropped
        pair = model.encode(text=text, image=image)
        return [pair["text"][real], pair["image"], model.embed(text=text), model.embed(image=image)]

    expected, actual = outputs(library), outputs(minimal)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    directions = [torch.randn_like(value) for value in expected]
    for model, values in ((library, expected), (minimal, actual)):
        scale = model.logit_scale.exp()
        (scale * sum((value * way).sum() for value, way in zip(values, directions, strict=True))).backward()
    gradients = library.to_upstream_state_dict(grads=True)
    for name, parameter in minimal.named_parameters():
        largest = gradients[name].abs().max()
        assert largest > 0, name
        torch.testing.assert_close(
            parameter.grad, gradients[name], rtol=1e-4, atol=1e-5 * float(largest), msg=f"{name}: {{}}".format
        )


def test_the_minimal_example_learns(capsys):
    runpy.run_path(str(ROOT / "examples" / "minimal.py"), run_name="__main__")
    losses = [float(loss) for loss in re.findall(r"loss (\S+),", capsys.readouterr().out)]
    assert losses[-1] < 0.3 * losses[0]


def test_the_multiway_example_runs(capsys):
    runpy.run_path(str(ROOT / "examples" / "torchscale_multiway.py"), run_name="__main__")
    assert capsys.readouterr().out == "[2, 20, 64], gradient of the bias table [32, 4]\n"


OTHER_MODALITIES = example("other_modalities")


@pytest.mark.parametrize("name", OTHER_MODALITIES.TASKS)
def test_other_modalities_find_the_captions_of_samples_that_they_never_saw(name):
    found = OTHER_MODALITIES.learn(name)
    assert found["last"] < 0.3 * found["first"]
    assert found["right"] > 0.85 and found["chance"] <= 0.5


def test_the_example_of_other_modalities_prints_a_line_each_and_refuses_a_name_that_is_none(capsys):
    OTHER_MODALITIES.main(["signal"])
    line = r"signal: loss \d\.\d\d to \d\.\d\d; \d+% of samples held out find their caption, by chance 33%\n"
    assert re.fullmatch(line, capsys.readouterr().out)
    with pytest.raises(SystemExit, match=r"NAME: expected some of signal.*, got smell"):
        OTHER_MODALITIES.main(["smell"])


@pytest.fixture(scope="module")
def pen_strokes():
    """The example as a module."""
    pytest.importorskip("sklearn")
    pytest.importorskip("tqdm")
    return example("pen_strokes")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a model of text and images as the demo's, with random weights."""
    data = pytest.importorskip("onepeace_fast.demo.data")
    torch.manual_seed(0)
    model = OnePeacePretrain(of_text_and_images(len(data.Vocabulary()), layer_scale=None))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight *= (1536 / 32) ** 0.5
    folder = tmp_path_factory.mktemp("model")
    model.save(folder)
    return folder


def test_a_pen_visits_every_dark_pixel_once_and_begins_at_the_top(pen_strokes):
    image = torch.zeros(8, 8)
    image[1, 6] = image[2, 6] = image[3, 6] = 16
    image[6, 0] = 8
    path = pen_strokes.pen_path(image)
    assert path[:, :2].tolist() == [[1, 6], [2, 6], [3, 6], [6, 0]]
    assert path[:, 2:4].tolist() == [[0, 0], [1, 0], [1, 0], [3, -6]]
    assert path[:, 4].tolist() == [1, 1, 1, 0.5]
    assert path[:, 5].tolist() == [0, 0, 0, 1]


def test_pens_train_beside_images_and_captions_that_stay_bitwise_the_same(pen_strokes, trained, capsys):
    figures = pen_strokes.main(trained, steps=10, held_out=30)
    assert figures["same"] is True
    assert "30 pens find an image" in capsys.readouterr().out


def test_pens_learn_their_captions(pen_strokes, trained):
    model = OnePeacePretrain.load(trained)
    torch.manual_seed(0)
    pen_strokes.add_pen(model)
    captions = torch.linalg.qr(torch.randn(32, 32))[0][:10, None]  # as unlike as they can be
    labels = torch.arange(10).repeat_interleave(4)
    starts = [torch.tensor([digit % 5, 4 * (digit // 5)]) for digit in labels.tolist()]  # a corner for each digit
    steps = torch.tensor([[0, 0], [1, 0], [1, 1]])
    paths = [torch.cat([start + steps.cumsum(0), steps, torch.ones(3, 1), torch.zeros(3, 1)], 1) for start in starts]
    losses = pen_strokes.train(model, paths, labels, captions, steps=40, seed=0)
    assert losses[0] > 2 and losses[-1] < 0.5  # by chance ln 10 = 2.3
    with torch.no_grad():
        found = (model.embed(**pen_strokes.pad(paths)) @ captions[:, 0].t()).argmax(1)
    assert torch.equal(found, labels)


def test_pens_of_a_wrong_shape_are_refused_in_one_line(pen_strokes, trained):
    model = OnePeacePretrain.load(trained)
    pen_strokes.add_pen(model)
    with pytest.raises(ValueError, match=r"pen: expected \[rows, points up to 64, 6\], got float32 \[2, 9, 5\] on cpu"):
        model.embed(pen=torch.zeros(2, 9, 5))
