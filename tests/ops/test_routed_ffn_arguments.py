"""What ``routed_ffn`` refuses."""

import pytest
import torch
from support.contract import refused
from support.plans import ragged_offsets

from onepeace_fast import routed_ffn
from onepeace_fast.ops.kernel_choice import force_kernels

WIDTH, HIDDEN = 8, 12


def arguments(**changes) -> dict:
    values = {
        "z": torch.zeros(4, WIDTH),
        "w0": [torch.zeros(HIDDEN, WIDTH)] * 2,
        "w1": [torch.zeros(HIDDEN, WIDTH)] * 2,
        "w2": [torch.zeros(WIDTH, HIDDEN)] * 2,
        "b2": [torch.zeros(WIDTH)] * 2,
        "norm_weight": [torch.zeros(HIDDEN)] * 2,
        "norm_bias": [torch.zeros(HIDDEN)] * 2,
        "offsets": ragged_offsets([1, 3]),
        "row_counts": [1, 3],
        "residual": torch.zeros(4, WIDTH),
        "gamma": torch.zeros(WIDTH),
        "drop_path": torch.ones(3),
        "sample": torch.zeros(4, dtype=torch.int32),
    }
    return values | changes


def test_good_input_passes():
    assert routed_ffn(**arguments()).shape == (4, WIDTH)


LISTS = {
    "w0": (HIDDEN, WIDTH), "w1": (HIDDEN, WIDTH), "w2": (WIDTH, HIDDEN), "b2": (WIDTH,),
    "norm_weight": (HIDDEN,), "norm_bias": (HIDDEN,),
}  # fmt: skip


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_the_wrong_length_shape_or_device_are_refused(name):
    good = torch.zeros(LISTS[name])
    for bad in ([good], [good] * 3, [good, good[:-1]], [good, good[None]], [good, good.to("meta")]):
        refused(name, routed_ffn, **arguments(**{name: bad}))


@pytest.mark.parametrize("name", LISTS)
def test_parameters_of_an_integer_dtype_are_refused(name):
    good = torch.zeros(LISTS[name])
    refused(name, routed_ffn, **arguments(**{name: [good, good.int()]}))


@pytest.mark.parametrize("name", ("w0", "w1", "w2", "b2"))
def test_without_autocast_a_product_of_two_dtypes_is_refused(name):
    good = torch.zeros(LISTS[name])
    refused(name, routed_ffn, **arguments(**{name: [good, good.double()]}))


@pytest.mark.parametrize("name", ("w0", "w1", "w2"))
def test_products_without_weights_are_refused(name):
    refused(name, routed_ffn, **arguments(**{name: []}))


def test_wrong_tensors_are_refused():
    z, sample = torch.zeros(4, WIDTH), torch.zeros(4, dtype=torch.int32)
    for bad in (z[0], z[None], z.int()):
        refused("z", routed_ffn, **arguments(z=bad))
    for bad in (ragged_offsets([1, 3]).long(), ragged_offsets([1, 3])[None]):
        refused("offsets", routed_ffn, **arguments(offsets=bad))
    for bad in (z[:3], z[:, :7], z.int(), z.to("meta")):
        refused("residual", routed_ffn, **arguments(residual=bad))
    for bad in (torch.zeros(WIDTH - 1), torch.zeros(WIDTH).int(), torch.zeros(WIDTH, device="meta")):
        refused("gamma", routed_ffn, **arguments(gamma=bad))
    for bad in (torch.ones(3, 1), torch.ones(3).half(), torch.ones(3, device="meta"), None):
        refused("drop_path", routed_ffn, **arguments(drop_path=bad))
    for bad in (sample[:3], sample.bool(), sample.to("meta")):
        refused("sample", routed_ffn, **arguments(sample=bad))


def test_scaling_without_a_residual_is_refused():
    refused("residual", routed_ffn, **arguments(residual=None))
    refused("residual", routed_ffn, **arguments(residual=None, drop_path=None, sample=None))
    refused("residual", routed_ffn, **arguments(residual=None, gamma=None))


def test_one_half_of_the_norm_is_refused():
    refused("norm_weight", routed_ffn, **arguments(norm_bias=None))
    refused("norm_weight", routed_ffn, **arguments(norm_weight=None))


def test_offsets_elsewhere_are_refused():
    refused("offsets", routed_ffn, **arguments(offsets=ragged_offsets([1, 3]).to("meta")))


def test_counts_that_do_not_fit_are_refused():
    for bad in ([4], [1, 2, 1], [1, 4]):
        refused("row_counts", routed_ffn, **arguments(row_counts=bad))


def test_offsets_that_decrease_or_do_not_begin_at_zero_are_refused():
    for bad in ([0, 3, 1], [1, 2, 4], [-1, 1, 4]):
        refused("offsets", routed_ffn, **arguments(offsets=torch.tensor(bad, dtype=torch.int32), row_counts=()))


def test_an_unknown_activation_or_strategy_is_refused():
    refused("activation", routed_ffn, **arguments(activation="elu"))
    refused("strategy", routed_ffn, **arguments(strategy="fastest"))
    refused("eps", routed_ffn, **arguments(eps=0.0))


@pytest.mark.parametrize("strategy", ("grouped", "per_modality"))
def test_a_strategy_of_kernels_is_refused_on_a_cpu(strategy):
    refused("strategy", routed_ffn, **arguments(strategy=strategy))


def test_what_tiles_cannot_take_is_refused_before_a_launch():
    def narrow(width: int, hidden: int, dtype: torch.dtype, groups: int = 2) -> dict:
        lists = {name: [torch.zeros([width if n == WIDTH else hidden for n in shape], dtype=dtype)] * groups
                 for name, shape in LISTS.items()}  # fmt: skip
        rows = {"z": torch.zeros(4, width, dtype=dtype), "residual": torch.zeros(4, width), "gamma": torch.zeros(width)}
        return arguments(**lists, **rows, offsets=ragged_offsets([4] + [0] * (groups - 1)), row_counts=())

    with force_kernels(True):
        for name, bad in (
            ("z", narrow(12, 16, torch.float16)),
            ("w0", narrow(16, 12, torch.float16)),
            ("z", narrow(6, 8, torch.float32)),
            ("z", narrow(16, 16, torch.float64)),
            ("offsets", narrow(16, 16, torch.float16, groups=65)),
        ):
            refused(name, routed_ffn, strategy="grouped", **bad)


def test_a_row_index_has_to_fit():
    index = torch.tensor([5, 0, 2, 3], dtype=torch.int32)
    stream = {"residual": torch.zeros(6, WIDTH), "sample": torch.zeros(6, dtype=torch.int32)}
    assert routed_ffn(**arguments(row_index=index, **stream)).shape == (6, WIDTH)
    for bad in (index[:3], index.long(), index.to("meta"), index + 1, index - 1, index.clamp(max=3)):
        refused("row_index", routed_ffn, **arguments(row_index=bad, **stream))
    refused("sample", routed_ffn, **arguments(row_index=index, **{**stream, "sample": stream["sample"][:4]}))
    refused(
        "residual", routed_ffn, **arguments(row_index=index, residual=None, gamma=None, drop_path=None, sample=None)
    )
