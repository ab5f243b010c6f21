"""The arithmetic of matrix products that `make kernels` prints, against figures worked out by hand."""

from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def tiles():
    from onepeace_fast.kernels.tile_table import TileParameters, use_tiles

    tile = TileParameters(128, 256, 64, row_tiles_at_once=8, num_warps=8, num_stages=3, programs_per_multiprocessor=1)
    with use_tiles({"any": tile}):
        yield


def test_rows_and_columns_fill_whole_tiles():
    from tools.products import Product, figures

    found = figures(Product("y", "any", [1, 129, 0], [300] * 3, [64] * 3, [3] * 3, weights=2), "sm_90")
    assert found.tiles == 3 * 2 and found.waves == pytest.approx(6 / 132)
    assert found.operations == 6 * 2 * 2 * 128 * 256 * 64
    assert found.least_operations == 2 * 2 * 130 * 300 * 64
    assert found.read == 6 * (128 + 2 * 256) * 64 * 2
    assert found.least_read == 2 * 64 * (130 + 2 * 2 * 300) and found.beside == 3 * 130 * 300
    assert found.efficiency == pytest.approx(found.least_operations / (132 * 2 * 2 * 128 * 256 * 64))


def test_the_last_program_to_finish_decides_the_efficiency():
    from tools.products import Product, figures

    rows = [128 * 66, 128 * 66]
    alike = figures(Product("one wave", "any", rows, [256, 256], [640, 640], [2, 2]), "sm_90")
    assert alike.efficiency == 1
    ragged = figures(Product("half of it short", "any", rows, [256, 256], [640, 64], [2, 2]), "sm_90")
    assert ragged.efficiency == pytest.approx((640 + 64) / (2 * 640))


def test_results_of_several_shapes_fill_one_wave():
    from tools.products import Product, figures

    found = figures(Product("both", "any", [128 * 100, 256], [256, 256 * 16], [64, 128], [2, 4]), "sm_90")
    assert found.tiles == 132 and found.operations == found.least_operations == 2 * 128 * 256 * (100 * 64 + 32 * 128)
    assert found.efficiency == pytest.approx((100 * 64 + 32 * 128) / (132 * 128))
    assert found.least_read == 2 * (64 * (12800 + 256) + 128 * (256 + 4096))
    assert found.beside == 2 * 12800 * 256 + 4 * 256 * 4096
