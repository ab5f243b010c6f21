"""What the demo measures of its own batches: tokens, time and memory of each backend."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("scipy")

from onepeace_fast.backend import resolve_backend
from onepeace_fast.demo import costs, experiment


@pytest.fixture
def parts(model, digits, spoken, vocabulary, monkeypatch):
    monkeypatch.setattr(costs, "COUNTED", 2)
    monkeypatch.setattr(costs, "ROUNDS", 1)
    monkeypatch.setattr(experiment, "GROUPS", 1)
    return costs.stages(model, digits[0], spoken[0], vocabulary, seed=0)


def test_tokens_are_counted_with_and_without_padding(model, parts):
    texts = [batch["text"] for batch in parts["image-text"].batches]
    text, image, audio = costs.count_tokens(model, parts)
    assert text.real == sum(int((ids != 1).sum()) + len(ids) for ids in texts) < text.padded
    assert text.padded == sum(ids.numel() + len(ids) for ids in texts)  # a CLS in each row
    assert (image.stage, image.modality, image.real) == ("image-text", "image", image.padded)
    assert (audio.stage, audio.modality, audio.real) == ("audio-text", "audio", audio.padded)


def test_each_backend_is_measured_on_what_its_stage_trains(model, parts, monkeypatch):
    def passes(call, device):
        call()
        seen.append((model.training, frozenset(gradients())))
        return 1000 + len(seen)

    def gradients():
        return (name for name, parameter in model.named_parameters() if parameter.grad is not None)

    seen, times = [], iter(range(100))
    model.train_only("audio")
    monkeypatch.setattr(costs, "BACKENDS", ("reference",))
    monkeypatch.setattr(costs, "ROUNDS", 2)
    monkeypatch.setattr(costs, "peak_bytes", passes)
    monkeypatch.setattr(costs, "_seconds", lambda call, device: next(times))
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    found = costs.measure(model, parts)
    assert found == [
        costs.Cost("image-text", "reference", 1, 1001), costs.Cost("image-text", "automatic", 2, 1002),
        costs.Cost("audio-text", "reference", 5, 1003), costs.Cost("audio-text", "automatic", 6, 1004),
    ]  # fmt: skip
    assert all(training for training, _ in seen)
    first, second = seen[0][1], seen[2][1]
    assert any("image_adapter" in name for name in first) and not any("audio_adapter" in name for name in first)
    assert second and all("audio" in name or name == "logit_scale" for name in second)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert not model.training and not list(gradients())


def test_where_the_environment_names_a_backend_none_is_called_automatic(parts, model, monkeypatch):
    monkeypatch.setenv("ONEPEACE_FAST_BACKEND", "reference")
    monkeypatch.setattr(costs, "peak_bytes", lambda call, device: 1)
    monkeypatch.setattr(costs, "_seconds", lambda call, device: 1.0)
    assert {cost.backend for cost in costs.measure(model, {"audio-text": parts["audio-text"]})} == {
        "reference",
        "fused",
    }


def test_a_backend_is_chosen_by_its_name_and_the_automatic_one_by_nobody(monkeypatch):
    monkeypatch.delenv("ONEPEACE_FAST_BACKEND", raising=False)
    device = torch.device("cpu")
    for name in ("reference", "fused"):
        with costs.chosen(name):
            assert resolve_backend(None, device) == name
    with costs.chosen(costs.AUTOMATIC):
        assert resolve_backend("reference", device) == "reference" and resolve_backend("fused", device) == "fused"


def test_the_peak_counts_what_is_alive_at_once():
    def call():
        for _ in range(3):
            torch.ones(250_000)
        kept = [torch.ones(250_000) for _ in range(2)]
        del kept

    assert 2_000_000 <= costs.peak_bytes(call, torch.device("cpu")) < 2_100_000


@pytest.mark.slow
def test_the_profiler_prints_nothing():
    code = "import torch; from onepeace_fast.demo import costs; "  # in a process of its own: it reads its level once
    code += "costs.peak_bytes(lambda: torch.ones(9), torch.device('cpu'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
