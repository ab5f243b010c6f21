"""What a layer moves outside its matrix products and its attention stays near the least that its formulas need."""

import pytest
import torch

from tools import layer_traffic as tool
from tools.layer_traffic import Moved, Traffic, layer_traffic, least_bytes, ratios

COUNTS, WIDTH, HIDDEN = (1264, 8224), 1536, 6144
# Of all ops, and of those that are not of the hidden width.
MOST = {torch.bfloat16: (1.06, 1.13), torch.float32: (1.05, 1.09)}


@pytest.mark.parametrize("stream", MOST, ids=str)
def test_a_layer_moves_little_more_than_its_formulas_need(stream):
    moved = layer_traffic(COUNTS, WIDTH, HIDDEN, stream)
    least = least_bytes(sum(COUNTS), WIDTH, HIDDEN, stream, torch.bfloat16)
    assert set(least) <= set(moved) and "matrix products" in moved
    of_all, without_hidden = ratios(moved, least).values()
    print(f"\n{of_all:.3f} and {without_hidden:.3f} times the least")
    assert of_all <= MOST[stream][0] and without_hidden <= MOST[stream][1]


def test_the_count_takes_what_is_read_and_written_and_no_view_or_product():
    x, vector = torch.ones(6, 4), torch.ones(4, 4, dtype=torch.float16)
    with Traffic([6]) as traffic:
        x + x.clone()
        x.view(4, 6).t().add_(1)
        x.copy_(vector[:1].expand(6, 4))
        torch.mm(x, x.t(), out=torch.empty(6, 6))
        vector.sum(0)
    of_x = x.numel() * 4
    assert traffic.moved == {
        "clone": Moved(1, 2 * of_x, 0), "add": Moved(1, 3 * of_x, 0), "add_": Moved(1, 2 * of_x, 0),
        "copy_": Moved(1, of_x + 4 * 2, 0), "matrix products": Moved(1, 2 * of_x + 6 * 6 * 4, 0),
        "sum": Moved(1, 0, 16 * 2 + 4 * 2),
    }  # fmt: skip
    left_out = traffic.leave_out(torch.Tensor.neg)
    with traffic:
        left_out(x)
    assert "neg" not in traffic.moved


def test_the_command_prints_the_ratios_and_writes_the_same_tables(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tool, "FILE", tmp_path / "layer_traffic.md")
    small = ["--rows", "40", "60", "--width", "128", "--hidden", "512"]
    tool.main(small)
    printed = capsys.readouterr().out
    assert not tool.FILE.exists() and printed.count(" times the least") == 4
    tool.main([*small, "--write"])
    written = tool.FILE.read_text()
    ratio_lines = [line for line in written.splitlines() if line.endswith(" times the least")]
    assert ratio_lines == [line for line in printed.splitlines() if line.endswith(" times the least")]
    assert written.count("| gated_sub_ln_backward_kernel |") == 2
