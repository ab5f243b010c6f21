"""The fourth modality of examples/pen_strokes.py and the code of docs/new_modality.md run as they stand."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from onepeace_fast import OnePeaceConfig, OnePeacePretrain
from onepeace_fast.config import ImageAdapterConfig, TextAdapterConfig, TransformerConfig

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from onepeace_fast.demo import data

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def pen_strokes():
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("pen_strokes", ROOT / "examples" / "pen_strokes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a model of text and images as the demo's, with random weights."""
    image = ImageAdapterConfig(position_grid=2, bias_grid=2)
    encoder = TransformerConfig(
        embed_dim=32, ffn_embed_dim=32, layers=2, attention_heads=2, layer_scale=None, image=image, audio=None
    )
    decoder = TransformerConfig(
        embed_dim=16, ffn_embed_dim=16, layers=1, attention_heads=1, layer_scale=None,
        text=TextAdapterConfig(use_bias=False), image=None, audio=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = OnePeacePretrain(OnePeaceConfig(encoder=encoder, decoder=decoder, vocab_size=len(data.Vocabulary())))
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
    figures = pen_strokes.main(trained, steps=60, held_out=30)
    assert figures["same"] is True
    assert figures["last"] < 0.8 * figures["first"]
    assert "30 pens find an image" in capsys.readouterr().out


def test_pens_of_a_wrong_shape_are_refused_in_one_line(pen_strokes, trained):
    model = OnePeacePretrain.load(trained)
    pen_strokes.add_pen(model)
    with pytest.raises(ValueError, match=r"pen: got float32 \[2, 9, 5\] on cpu, takes \[rows, points up to 64, 6\]"):
        model.embed(pen=torch.zeros(2, 9, 5))


def test_the_page_on_new_modalities_runs_as_it_stands():
    page = (ROOT / "docs" / "new_modality.md").read_text(encoding="utf-8")
    names: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        exec(compile(block, "new_modality.md", "exec"), names)
    assert names["loss"].isfinite() and names["again"].config == names["model"].config
