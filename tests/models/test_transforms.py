"""torch.func and torch.vmap over a whole model: the fused backend refuses them in one line, the reference obeys."""

import pytest
import torch
from models._small import BACKENDS, batch_of, image_batch, small_model, text_batch
from models.test_passes import vision_language
from torch.func import functional_call, grad, jacrev, jvp, vmap

IMAGE, TEXT = image_batch(2, 2), text_batch([3, 4])
TASK, INPUTS = vision_language()


def of_weights(model, transform):
    weights = dict(model.named_parameters())
    return transform(lambda w: functional_call(model, w, (TASK,), INPUTS)["loss"])(weights)


TRANSFORMS = {
    "grad of the weights": lambda model: of_weights(model, grad),
    "grad of an image": lambda model: grad(lambda x: model.embed(image=x)[0, 0])(IMAGE),
    "jacrev": lambda model: jacrev(lambda x: model.encode(image=x)["image"][0, 0])(IMAGE),
    "jvp": lambda model: jvp(lambda x: model.encode(image=x)["image"], (IMAGE,), (IMAGE,))[1],
    "vmap over images": lambda model: vmap(lambda x: model.embed(image=x))(torch.stack([IMAGE, IMAGE])),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_of_a_model_is_refused_in_one_line_and_runs_by_the_reference(transform):
    refused = r"^onepeace_fast::\w+: [^\n]*; OnePeacePretrain alone has a reference backend for it$"
    with pytest.raises(RuntimeError, match=refused):
        TRANSFORMS[transform](small_model("fused"))
    TRANSFORMS[transform](small_model("reference"))


def test_gradients_of_the_weights_by_torch_func_are_those_of_backward():
    model = small_model("reference")
    model(TASK, **INPUTS)["loss"].backward()
    for name, gradient in of_weights(model, grad).items():
        expected = model.get_parameter(name).grad
        torch.testing.assert_close(gradient, torch.zeros_like(gradient) if expected is None else expected)


@pytest.mark.parametrize("name", ["text", "masks", "audio_padding", "samples"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_whose_values_the_host_must_read_is_refused_in_one_line(backend, name):
    model = small_model(backend)
    calls = {
        "text": (lambda x: model.embed(text=x), TEXT),
        "masks": (lambda x: model.reconstruct(text=TEXT, masks={"text": x}), torch.ones(2, 5, dtype=torch.bool)),
        "samples": (lambda x: model.encode(image=IMAGE, samples={"image": x}), torch.arange(2)),
    }
    audio = batch_of(audio=[3, 4])
    calls["audio_padding"] = (lambda x: model.embed(audio=audio["audio"], audio_padding=x), audio["audio_padding"])
    function, value = calls[name]
    with pytest.raises(ValueError, match=r"^text, padding, [^\n]*: expected [^\n]*, got a batch by torch.vmap;"):
        vmap(function)(torch.stack([value, value]))
