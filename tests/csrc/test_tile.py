"""Matrices in shared memory: no two rows of a matrix instruction's eight are in the same banks."""

import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
from support import host_shim
from support.kernel_attention import HEAD_SIZES

SOURCE = Path(__file__).with_name("tile_probe.cu")
CHUNK, CHUNKS_OF_ALL_BANKS = 8, 8  # elements of 16 bits in 16 bytes; 32 banks of 4 bytes


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """By head size: rows, chunks, offsets, and the offsets that are stepped to."""
    if shutil.which(host_shim.COMPILER) is None:
        pytest.skip(f"no C++ compiler is found (set CXX, or install {host_shim.COMPILER})")
    program = tmp_path_factory.mktemp("probe") / "probe"
    sources = [SOURCE, *(host_shim.SHIM / name for name in ("fibers.cpp", "warp.cpp"))]
    options = [*host_shim.FLAGS, f"-I{host_shim.SHIM}", f"-I{host_shim.CSRC}", "-x", "c++"]
    subprocess.run([host_shim.COMPILER, *options, *map(str, sources), "-o", str(program)], check=True)
    found = defaultdict(list)
    for line in subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.splitlines():
        head_size, *place = map(int, line.split())
        found[head_size].append(place)
    return found


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_eight_rows_of_a_matrix_instruction_are_in_different_banks(places, head_size):
    groups = defaultdict(set)
    for row, chunk, offset, _ in places[head_size]:
        groups[row // 8, chunk].add(offset // CHUNK % CHUNKS_OF_ALL_BANKS)
    assert len(groups) == 4 * head_size // CHUNK
    assert {key: len(banks) for key, banks in groups.items()} == dict.fromkeys(groups, CHUNKS_OF_ALL_BANKS)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_each_chunk_has_a_place_of_its_own_that_is_stepped_to(places, head_size):
    offsets = [offset for _, _, offset, _ in places[head_size]]
    assert sorted(offsets) == list(range(0, 32 * head_size, CHUNK))
    assert offsets == [stepped for _, _, _, stepped in places[head_size]]
