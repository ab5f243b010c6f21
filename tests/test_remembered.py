"""What is remembered serves every later call, and nothing is that a mode of PyTorch has made."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from onepeace_fast import dense_bias
from onepeace_fast.models.unival import spectrogram
from onepeace_fast.remembered import remembered


def test_it_is_made_once_for_the_same_arguments():
    made = []

    @remembered
    def ones(count, device="cpu"):
        made.append(count)
        return torch.ones(count, device=device)

    assert ones(3) is ones(3) and ones(2).tolist() == [1, 1] and made == [3, 2]


@pytest.fixture
def nothing_kept():
    for one in (dense_bias._standing_pairs, dense_bias.full_segments, spectrogram._constants):
        one.__wrapped__.cache_clear()


def segments_of(x):
    return dense_bias.full_segments(x.shape[0], (5,), True, x.device).code


CALLS = {
    "vector": (lambda x: dense_bias.dense_vector(x, (5,)), (2, 5, 5)),
    "segments": (segments_of, (3, 5, 5)),
    "spectrogram": (lambda x: spectrogram.log_mel(x, 480, torch.float32), (1, 2000)),
}


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize("name", CALLS)
def test_a_call_on_fake_tensors_leaves_none_to_later_calls(name):
    call, shape = CALLS[name]
    with FakeTensorMode():
        call(torch.ones(shape, device="cpu"))
    assert not isinstance(call(torch.ones(shape)), FakeTensor)


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize("name", CALLS)
def test_a_call_in_inference_mode_leaves_no_tensor_of_it_to_later_calls(name):
    call, shape = CALLS[name]
    with torch.inference_mode():
        call(torch.ones(shape))
    x = torch.ones(shape, requires_grad=True)
    y = call(x)
    assert not y.is_inference()
    if y.is_floating_point():
        y.sum().backward()
        assert x.grad.isfinite().all()


def test_what_a_graph_captures_is_not_kept(monkeypatch):
    @remembered
    def zeros(count):
        return torch.zeros(count)

    with monkeypatch.context() as capture:
        for question in ("is_initialized", "is_current_stream_capturing"):
            capture.setattr(torch.cuda, question, lambda: True)
        captured = zeros(2)
    assert zeros(2) is not captured and zeros(2) is zeros(2)
