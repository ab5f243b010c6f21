"""What cannot be loaded: one line that names the file, nothing run, nothing changed."""

import os
import pickle

import pytest
import torch
from data._refused import refused
from models._encoder_only import classify, retrieval
from pretrained._files import checkpoint_of, write, write_vision

from onepeace_fast import from_pretrained
from onepeace_fast.pretrained import pickles


class Code:
    """Unpickled as anything else is, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def dump(path, values):
    path.write_bytes(pickle.dumps(values))
    return path


TOKENS = "encoder_wrapper.text_adapter.embed_tokens.weight"
WRITERS = {
    "zip": write,
    "before the zip": lambda path, values: write(path, values, zipped=False),
    "pickle": dump,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_code_is_named_and_not_run(tmp_path, writer):
    made, path = tmp_path / "made", tmp_path / "a.pt"
    WRITERS[writer](path, checkpoint_of(retrieval("text"), task_state={"x": Code(made)}))
    line = refused(lambda: from_pretrained(path), f"{path}: ", "posix.mkdir", "not run")
    assert line == f"{path}: expected tensors, numbers, texts and containers of them, got posix.mkdir; it was not run"
    assert not made.exists()


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, writer, share):
    path = WRITERS[writer](tmp_path / "a.pt", checkpoint_of(retrieval("text")))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    refused(lambda: from_pretrained(path), f"{path}: expected a whole checkpoint, got one that cannot be read (")


def test_a_pickle_cannot_do_what_its_readers_functions_would():
    for name, arguments in {"a": (b"x", "zlib"), "b": ("x", "rot13")}.items():
        with pytest.raises(pickles.Refused) as caught:
            pickles._encode(*arguments)
        assert str(caught.value) == f"_codecs.encode to {arguments[1]}", name


@pytest.mark.parametrize(
    "change, parts",
    [
        (lambda values: values["model"].pop("text_proj.weight"), ("missing: text_proj.weight",)),
        (lambda values: values["model"].update(new=torch.zeros(2)), ("unexpected: new",)),
        (lambda values: values["model"].update({"text_proj.bias": torch.zeros(7)}), ("text_proj.bias [7]", "[48]")),
        (
            lambda values: values["model"]["encoder_wrapper.text_adapter.rp_bucket"].add_(1),
            ("text_adapter.rp_bucket differs",),
        ),
        (
            lambda values: values["model"].update(
                {"encoder_wrapper.text_adapter.embed_tokens.weight": torch.tensor(1.0)}
            ),
            ("vocab_size: ",),
        ),
        (lambda values: values.update(cfg=None), ("cfg: expected upstream's settings", "got none")),
        (lambda values: values["cfg"]["model"].update(_name="bart"), ("cfg.model._name", "'bart'")),
        (lambda values: values.update(model={"bert.a": torch.zeros(2)}), ("weights of ONE-PEACE", "got bert.a")),
        (lambda values: values.pop("model"), ("weights of ONE-PEACE", "no tensors under 'model'")),
    ],
)
def test_a_file_of_another_model_is_refused(tmp_path, change, parts):
    values = checkpoint_of(retrieval("text"))
    change(values)
    path = write(tmp_path / "a.pt", values)
    refused(lambda: from_pretrained(path), f"{path}: ", *parts)


@pytest.mark.parametrize("name, part", [("pos_embed", "missing"), ("rel_pos_table_list.0.weight", "missing")])
def test_an_image_adapter_without_a_part_is_refused(tmp_path, name, part):
    values = checkpoint_of(retrieval("image"))
    value = values["model"].pop(f"encoder_wrapper.image_adapter.{name}")
    path = write(tmp_path / "a.pt", values)
    refused(lambda: from_pretrained(path), f"{path}: state_dict: ", f"{part}: encoder_wrapper.image_adapter.{name}")
    for wrong in (torch.tensor(1.0), value[:-1], torch.zeros(0, 3)):
        values["model"][f"encoder_wrapper.image_adapter.{name}"] = wrong
        write(path, values)
        refused(lambda: from_pretrained(path), f"{path}: ")


def test_a_head_where_there_is_one_or_none_can_be_is_refused(tmp_path):
    head, model = {"classes": 3, "head_width": 8}, classify("text")
    path = write(tmp_path / "a.pt", checkpoint_of(model))
    model.save(tmp_path / "ours")
    for place in (path, tmp_path / "ours"):
        refused(lambda place=place: from_pretrained(place, head=head), f"{place}: head: expected none for a file with")
    write(path, checkpoint_of(retrieval("text")))
    for kind in ("retrieval", "encoder", None):
        refused(lambda kind=kind: from_pretrained(path, model_type=kind, head=head), f"{path}: head: expected none for")


def test_of_many_names_that_do_not_fit_a_few_are_shown(tmp_path):
    values = checkpoint_of(retrieval("text"))
    kept = {name: value for name, value in values["model"].items() if "fusion_model" not in name}
    path = write(tmp_path / "a.pt", {**values, "model": kept})
    line = refused(lambda: from_pretrained(path), f"{path}: ", "missing: encoder_wrapper.fusion_model.layers.0", "more")
    assert len(line) < 600


def test_a_vision_pickle_of_another_model_is_refused(tmp_path):
    path = write_vision(tmp_path / "a.pkl", retrieval("image"))
    values = torch.load(path, weights_only=False) if path.read_bytes()[:2] == b"PK" else pickle.loads(path.read_bytes())
    del values["model"]["image_adapter.pos_embed"]
    dump(path, values)
    refused(lambda: from_pretrained(path), f"{path}: weights: ", "vision encoder", "image_adapter.pos_embed")


def test_a_file_of_no_known_format_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    for content in (b"", b"hello", b"<html>404</html>"):
        path.write_bytes(content)
        refused(lambda: from_pretrained(path), f"{path}: expected a checkpoint by torch.save or pickle, got ")


def test_a_damaged_folder_is_refused(tmp_path):
    model = retrieval("text")
    model.save(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    refused(lambda: from_pretrained(tmp_path), tmp_path, "model.safetensors, which cannot be read")
    weights.unlink()
    refused(lambda: from_pretrained(tmp_path), tmp_path, "model.safetensors, which cannot be read")
    config.write_text('{"architectures": ["BertModel"]}')
    refused(lambda: from_pretrained(tmp_path), tmp_path, "unknown fields ['architectures']")
    config.unlink()
    refused(lambda: from_pretrained(tmp_path), tmp_path, "one .pt or .pkl file, got neither")


def test_nothing_there_is_said(tmp_path):
    path = tmp_path / "no.pt"
    refused(lambda: from_pretrained(path), f"{path}: expected a file, a folder or a Hub repository", "nothing there")


@pytest.mark.parametrize(
    "arguments, parts",
    [
        ({"dtype": "half"}, ("dtype: expected a floating point dtype", "'half'")),
        ({"dtype": torch.int8}, ("dtype: expected a floating point dtype", "torch.int8")),
        ({"model_type": "bert"}, ("model_type: expected one of pretrain, retrieval", "'bert'")),
        ({"model_type": "pretrain"}, ("model_type: expected a model without a decoder",)),
        ({"image_size": 64}, ("image_size: expected None for a model without images, got 64",)),
        ({"backend": "quick"}, ("backend: expected one of reference, fused",)),
        ({"revision": "main"}, ("revision: expected None for a path",)),
    ],
)
def test_arguments_that_do_not_fit_are_refused(tmp_path, arguments, parts):
    path = write(tmp_path / "a.pt", checkpoint_of(retrieval("text")))
    refused(lambda: from_pretrained(path, **arguments), "", *parts)


def test_a_moving_average_of_a_folder_is_refused(tmp_path):
    retrieval("text").save(tmp_path)
    refused(lambda: from_pretrained(tmp_path, ema=True), f"{tmp_path}: ema: expected False for a folder")
