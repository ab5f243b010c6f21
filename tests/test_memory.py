"""What a forward pass saves, counted to the byte, and a GPU's peak above what stood before."""

import torch

from onepeace_fast.memory import peak_bytes, saved_bytes


def test_saved_storages_count_once_and_parameters_do_not():
    x, w = torch.ones(1000, requires_grad=True), torch.ones(1000, requires_grad=True)
    assert saved_bytes(lambda: x * w, [w]) == 4000  # x alone
    assert saved_bytes(lambda: x * w, []) == 8000
    assert saved_bytes(lambda: (x * w).exp(), [w]) == 8000  # x, and what exp gives
    assert saved_bytes(lambda: x[:10] * x[10:20], []) == 4000  # two views of one storage
    assert saved_bytes(lambda: x + w, []) == 0
    with torch.no_grad():
        assert saved_bytes(lambda: x * w, []) == 0


def test_the_peak_of_a_gpu_is_above_what_stood_before(monkeypatch):
    log = []
    for name, value in (("synchronize", None), ("reset_peak_memory_stats", None), ("memory_allocated", 100)):
        monkeypatch.setattr(torch.cuda, name, lambda _, name=name, value=value: log.append(name) or value)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: log.append("max") or 350)
    assert peak_bytes(lambda: log.append("call"), torch.device("cuda")) == 250
    assert log == ["synchronize", "reset_peak_memory_stats", "memory_allocated", "call", "synchronize", "max"]
