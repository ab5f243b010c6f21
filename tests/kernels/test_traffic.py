"""What the kernels read and write, counted element by element in the interpreter over the lanes that are not masked.

Row tensors move exactly once each way, whatever has one element for each row too; a vector that all rows share is read
at most once by a program. `pytest -s` prints the bytes, vectors apart from rows.
"""

import functools

import pytest
import torch
from support.kernels import DEVICE
from support.traffic import Launch, counted

from onepeace_fast import RoutePlan
from onepeace_fast.config import TransformerConfig
from onepeace_fast.hardware.cases import INERT_ROWS, Rows, kernel_cases, random_tensors
from onepeace_fast.kernels.launch import Configuration
from onepeace_fast.layers.transformer import TransformerLayer
from tools.layer_traffic import LEAST

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="only the interpreter can count")
CPU = torch.device("cpu")
SIZES = ((40, 64), (43, 384), (8, 4100))  # rows, width: several programs, a last block that is not full, rows in parts
CASES = [
    pytest.param(size, i, marks=[] if size == SIZES[1] else [pytest.mark.slow])
    for size in SIZES
    for i in range(len(list(kernel_cases(*size, torch.float16, random_tensors(CPU), CPU))))
]


def case_at(size, index):
    return list(kernel_cases(*size, torch.float16, random_tensors(CPU), CPU))[index]


def name_of(value):
    return f"{value[0]}x{value[1]}" if isinstance(value, tuple) else f"case {value}"


def forward_and_backward(case) -> list[Launch]:
    with counted() as launches:
        leaves = {name: leaf.requires_grad_() for name, leaf in case.leaves.items()}
        outputs = case.call(**leaves)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(output) for output in outputs])
    return launches


def kind_of(tensor: torch.Tensor, batch: Rows, width: int) -> str:
    """ "rows", "column" with an element for each row, "partial" sums of each program, or "vector"."""
    by_row = tensor.dim() in (1, 2) and tensor.shape[0] in (batch.rows, len(batch.some))
    if by_row and tensor.dim() == 2 and tensor.shape[1] == width:
        return "rows"
    if tensor.dim() == 3:
        return "partial"
    return "column" if by_row and tensor.numel() == tensor.shape[0] else "vector"


def rows_read(case, batch: Rows, name: str, tensor: torch.Tensor) -> list[int]:
    """The rows that an operation has to read of a row tensor: with a row index all only of the residual stream."""
    if case.variant == "per modality" or case.operation == "gated_sub_ln":
        return list(range(batch.rows - INERT_ROWS))
    of_stream = name == "passed" or (name in ("x", "out") and "residual" in case.operation)
    if of_stream or not case.variant.startswith("row index"):
        return list(range(tensor.shape[0]))
    if tensor.shape[0] == len(batch.some):
        return list(range(batch.some_offsets[-1]))
    if case.operation.startswith("residual_"):  # the norm is of all rows, and so is its backward pass
        return list(range(batch.rows))
    return sorted(batch.some[: batch.some_offsets[-1]].tolist())


@pytest.mark.parametrize("size, index", CASES, ids=name_of)
def test_row_tensors_move_exactly_once_each_way_and_vectors_at_most_once_a_program(size, index):
    case, batch = case_at(size, index), Rows(size[0], CPU)
    launches = forward_and_backward(case)
    assert launches
    moved = {"rows": 0, "vector": 0}
    for launch in launches:
        assert launch.strays == 0, f"{launch.kernel} reads or writes outside its tensors"
        moved = check(launch, case, batch, size, moved)
    assert moved["rows"]
    print(f"\n{case.operation}, {case.variant}: {moved['rows']} bytes of rows, {moved['vector']} of vectors")


def check(launch: Launch, case, batch: Rows, size: tuple[int, int], moved: dict[str, int]) -> dict[str, int]:
    moved = dict(moved)
    for (way, name), elements in launch.elements().items():
        tensor, what = launch.tensors[name], f"{launch.kernel} {way} {name}"
        if not elements or launch.kernel == "row_places_kernel":
            continue
        kind = kind_of(tensor, batch, size[1])
        if kind == "rows":
            times = launch.times(way, name)
            expected = torch.zeros(tensor.shape, dtype=times.dtype)
            if way == "loads":
                expected[rows_read(case, batch, name, tensor)] = 1
            else:
                expected[:] = 1
            assert torch.equal(times, expected), f"{what}: {times.sum(1).tolist()} elements of the rows"
        elif kind == "column":
            assert launch.times(way, name).max() == 1, what
        elif kind == "vector" and name != "offsets" and tensor.numel() >= 1:
            by_program = getattr(launch, way)[name].sum(1).max()
            assert by_program <= max(tensor.numel(), size[1], size[0] if name == "drop_path" else 0), what
        group = "rows" if kind in ("rows", "column") else "vector"
        moved[group] += elements * tensor.element_size()
    return moved


def test_the_launches_of_a_whole_layer_touch_each_row_once():
    """So that ``tools.layer_traffic`` may count a launch by its tensors."""
    plan = RoutePlan.from_lengths({"text": [5, 4], "image": [10, 4]})
    layer = TransformerLayer(TransformerConfig(embed_dim=64, ffn_embed_dim=96, layers=1, attention_heads=2, audio=None))
    layer.packed_ffn = functools.partial(layer.packed_ffn, strategy="per_modality")  # which the tool counts
    x = torch.randn(plan.capacity, 64, requires_grad=True)
    with counted() as launches:
        layer(x, plan, ()).square().sum().backward()
    found = set()
    for launch in launches:
        for name, tensor in launch.tensors.items():
            if plan.capacity in tensor.shape:
                moved = launch.elements()["loads", name] + launch.elements()["stores", name]
                assert moved == tensor.numel(), f"{launch.kernel}: {moved} of the {tensor.numel()} elements of {name}"
                found.add(launch.kernel)
    assert found == {op.op for op in LEAST if not op.weight}


def test_the_count_sees_what_is_read_twice_and_what_is_left_out():
    from support import planted

    x, y = torch.arange(192.0).view(3, 64), torch.zeros(3, 64)
    with counted() as launches:
        Configuration(planted.copy_twice, {"x": x, "y": y}, {"ROWS": 3}, 4).launch((1,))
    (launch,) = launches
    assert launch.times("loads", "x").sum(1).tolist() == [4 * 63, 63, 63]
    assert launch.times("stores", "y").sum(1).tolist() == [63, 63, 63]
    assert launch.most_by_a_program("loads", "x") == 4 and launch.strays == 0
    assert torch.equal(y[:, :63], x[:, :63]) and not y[:, 63].any()


def test_the_count_sees_what_lies_outside_every_tensor():
    from support import planted

    memory = torch.zeros(4, 1024)
    with counted() as launches:
        Configuration(planted.copy, {"x": memory[0], "y": memory[2]}, {"START": 1}, 4).launch((1,))
    assert launches[0].strays == 1
