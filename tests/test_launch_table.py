"""The table of launch parameters and the measured one that may replace its entries."""

import json

import pytest

from onepeace_fast.kernels import launch_table
from onepeace_fast.kernels.launch_table import SHIPPED, merged, table_entry, use_table

ENTRY = {"block_rows": 2, "num_warps": 16, "programs_per_multiprocessor": 3}


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Write a table where the kernels look for one, as if the process had just started."""
    path = tmp_path / "table.json"
    monkeypatch.setenv(launch_table.ENVIRONMENT_VARIABLE, str(path))

    def write(text: str):
        path.write_text(text)
        for cached in (launch_table._measured, table_entry):
            cached.cache_clear()
        return path

    yield write
    for cached in (launch_table._measured, table_entry):
        cached.cache_clear()


def test_a_measured_entry_replaces_the_shipped_one_and_no_other(measured):
    measured(json.dumps({"layer_norm": {"sm_90": {"2": {"1024": ENTRY}}}}))
    got = table_entry("layer_norm", "sm_90", 2, 1000)
    assert (got.block_rows, got.num_warps, got.programs_per_multiprocessor) == (2, 16, 3)
    for others in (("layer_norm", "sm_80", 2, 1000), ("layer_norm", "sm_90", 4, 1000), ("residual", "sm_90", 2, 1000)):
        with use_table(SHIPPED):
            shipped = table_entry(*others)
        assert table_entry(*others) == shipped


def test_an_architecture_that_is_new_keeps_the_nearest_older_one_s_other_entries():
    table = merged(SHIPPED, {"layer_norm": {"sm_120": {"2": {"1024": ENTRY}}}})
    new, old = table["layer_norm"]["sm_120"], SHIPPED["layer_norm"]["sm_90"]
    assert new["2"]["1024"] == ENTRY and new["4"] == old["4"] and "sm_120" not in SHIPPED["layer_norm"]


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("[", "Expecting value"),
        ('{"layernorm": {}}', "'layernorm'"),
        ('{"layer_norm": {"hopper": {}}}', "'hopper'"),
        ('{"layer_norm": {"sm_90": {"2": {"1000": {}}}}}', "'1000'"),
        ('{"layer_norm": {"sm_90": {"2": {"1024": {"block_rows": 2}}}}}', "num_warps"),
        (json.dumps({"layer_norm": {"sm_90": {"2": {"1024": {**ENTRY, "num_warps": 3}}}}}), "powers of two"),
        (json.dumps({"layer_norm": {"sm_90": {"2": {"1024": {**ENTRY, "held_in": "cache"}}}}}), "held_in"),
    ],
)
def test_a_table_that_could_not_be_launched_is_one_line_that_says_what_to_do(measured, text, complaint):
    path = measured(text)
    with pytest.raises(ValueError) as caught:
        table_entry("layer_norm", "sm_90", 2, 1000)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and complaint in message and "delete the file" in message
    assert len(message.splitlines()) == 1


def test_a_file_that_is_named_and_missing_leaves_the_shipped_table_and_is_told(monkeypatch, tmp_path):
    launch_table._measured.cache_clear()
    monkeypatch.setenv(launch_table.ENVIRONMENT_VARIABLE, str(tmp_path / "none.json"))
    assert launch_table.table_in_force().startswith(f"shipped; {tmp_path / 'none.json'} does not exist")
    launch_table._measured.cache_clear()
