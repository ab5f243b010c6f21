"""A tiny model that learns handwritten digits with captions, in upstream's form: its embeddings search the digits."""

import json

import numpy
import pytest
import torch
import torch.nn.functional as F

for package in ("sklearn", "tokenizers", "PIL", "soundfile", "scipy", "pyarrow"):
    pytest.importorskip(package)

from pretrained._files import checkpoint_of, write  # noqa: E402

from onepeace_fast import OnePeaceRetrieval, RetrievalConfig  # noqa: E402
from onepeace_fast.cli import main  # noqa: E402
from onepeace_fast.config import ImageAdapterConfig, TextAdapterConfig, TransformerConfig  # noqa: E402
from onepeace_fast.data.processor import Processor  # noqa: E402
from onepeace_fast.data.text import Tokenizer  # noqa: E402

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
STEPS, HELD_OUT = 320, 200


def digits():
    """Pictures uint8 [n, 32, 32, 3] and labels [n], in an order of their own."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = numpy.random.default_rng(0).permutation(len(labels))
    shades = (255 - pixels.reshape(-1, 8, 8) * 15).clip(0, 255).astype("uint8").repeat(4, 1).repeat(4, 2)
    return numpy.stack([shades] * 3, -1)[order], labels[order]


def trained(tokenizer, pictures, labels):
    torch.manual_seed(0)
    encoder = TransformerConfig(
        embed_dim=48, ffn_embed_dim=96, layers=2, attention_heads=3, layer_scale=1.0, drop_path_rate=0.0,
        text=TextAdapterConfig(bucket_size=8), image=ImageAdapterConfig(position_grid=2, bias_grid=2), audio=None,
    )  # fmt: skip
    model = OnePeaceRetrieval(RetrievalConfig(encoder=encoder, vocab_size=tokenizer.vocab_size), backend="reference")
    processor = Processor(tokenizer, 32)
    images, texts = processor.process_image([*pictures]), processor.process_text(NAMES)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-4)
    for step in range(STEPS):
        rows = [place % len(images) for place in range(step * 80, step * 80 + 80)]
        scores = model.embed(image=images[rows]) @ model.embed(text=texts).t() * model.logit_scale_exp()
        loss = F.cross_entropy(scores, torch.from_numpy(labels[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.slow
def test_a_trained_models_embeddings_in_upstreams_form_search_the_digits(tmp_path):
    from PIL import Image

    pictures, labels = digits()
    tokenizer = Tokenizer.train(NAMES, 280)
    model = trained(tokenizer, pictures[HELD_OUT:], labels[HELD_OUT:])
    write(tmp_path / "public.pt", checkpoint_of(model))
    tokenizer.save(tmp_path / "tokenizer.json")
    for place, picture in enumerate(pictures[:HELD_OUT]):
        Image.fromarray(picture).save(tmp_path / f"{place}.png")
    (tmp_path / "all.tsv").write_text("image\n" + "".join(f"{place}.png\n" for place in range(HELD_OUT)))
    made, found = tmp_path / "all.parquet", tmp_path / "found.json"
    shared = ["--model", str(tmp_path / "public.pt")]
    assert main(["embed", str(tmp_path / "all.tsv"), *shared, "--out", str(made)]) == 0
    right = 0
    for digit, name in enumerate(NAMES):
        assert main(["search", str(made), *shared, "--text", name, "--top", "5", "--json", str(found)]) == 0
        # The line of a picture is its place and 2.
        right += sum(labels[one["line"] - 2] == digit for one in json.loads(found.read_text()))
    assert right >= 35, f"{right} of 50 are the digit asked for, 5 are by chance"
