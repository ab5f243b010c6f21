"""pytest on the emulated GPU: `python -m pytest -p tools.rehearsal.plugin -m gpu tests`.

Comparisons of values are left out: `tolerance.assert_within_rule` and `torch.testing.assert_close` look at dtypes,
shapes and devices alone, and tests of repeats run twice. A failed assertion of a test that launched a kernel outside
the library's ops is no fault either, since nobody computed what it looks at; the summary says how many these are.
"""

from __future__ import annotations

import contextlib
import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tools.rehearsal import two_devices
from tools.rehearsal.driver import Driver
from tools.rehearsal.emulation import emulated_gpu

ARCHITECTURE = "REHEARSAL_ARCHITECTURE"  # sm_90 without it
COMPILING = "REHEARSAL_COMPILING"  # "1": kernels are compiled and launched, else the programs they need are counted
REPORT = "REHEARSAL_REPORT"  # a JSON file of what was found
REPEATS, MANY_ROWS = 2, 320
# What is left out, by the names of the functions that a test's failure passes through, and why.
LEFT_OUT = {
    "check_compiled": "torch.compile does not trace emulated tensors",
    "check_compiled_once": "torch.compile does not trace emulated tensors",
    "check_registration": "opcheck compares what ops compute on the tensors it makes itself",
}


WITHOUT_EXTENSION = "the CUDA extension was not built"  # which is not emulated
# Tests of what kernels compute, which their own assertions judge.
OF_VALUES = {
    "test_both_places_of_the_norm_keep_the_rule_where_the_mean_is_far_above_the_deviation",
    "test_float16_stays_finite_where_the_hidden_rows_are_beyond_its_range",
    "test_rows_read_by_an_index_have_the_bits_of_the_whole_norm",
}


class LeftOut(Exception):
    """A check that cannot be made on emulated tensors."""


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Before any test is imported: modules ask at once whether there is a GPU."""
    architecture = os.environ.get(ARCHITECTURE, "sm_90")
    driver = Driver(architecture, os.environ.get(COMPILING) == "1") if find_spec("triton") else None
    stack = contextlib.ExitStack()
    stack.enter_context(emulated_gpu(driver))
    early_config.pluginmanager.register(Rehearsal(driver, stack), "rehearsal")


class Rehearsal:
    """Runs the tests, and keeps what they launched and how they ended."""

    def __init__(self, driver: Driver | None, stack: contextlib.ExitStack) -> None:
        self.driver, self.stack = driver, stack
        self.tests: dict[str, dict[str, Any]] = {}
        compare_nothing()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for module in {item.module for item in items if hasattr(item, "module")}:
            if hasattr(module, "REPEATS"):
                module.REPEATS = REPEATS

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Any:
        before = (two_devices.State.launches, two_devices.State.judged, *self.counts())
        ended, line = "passed", ""
        try:
            return (yield)
        except LeftOut as error:
            ended, line = "left out", str(error)
            pytest.skip(line)
        except pytest.skip.Exception as error:
            ended, line = "skipped", str(error)
            raise
        except AssertionError as error:
            launched, valued = two_devices.State.launches - before[0], two_devices.State.judged - before[1]
            if launched > valued or item.originalname in OF_VALUES:
                ended, line = "values", "it looks at values that nobody computed"
                pytest.skip(line)
            ended, line = "fault", one_line(error)
            raise
        except Exception as error:
            ended, line = "fault", one_line(error)
            if WITHOUT_EXTENSION in line:
                ended = "left out"
                pytest.skip(line)
            raise
        finally:
            two_devices.forbid_host_reads(False)
            compiles, launches = (now - then for now, then in zip(self.counts(), before[2:], strict=True))
            self.tests[item.nodeid] = {"ended": ended, "line": line, "compiles": compiles, "launches": launches}

    def counts(self) -> tuple[int, int]:
        """Compiles and launches so far."""
        return 0 if self.driver is None else len(self.driver.programs), two_devices.State.launches

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and report.when != "call":
            line = str(report.longrepr).strip().splitlines()[-1]
            self.tests[report.nodeid] = {"ended": "fault", "line": line, "compiles": 0, "launches": 0}

    def pytest_sessionfinish(self) -> None:
        if path := os.environ.get(REPORT):
            programs = {} if self.driver is None else self.driver.programs
            found = {"tests": self.tests, "programs": programs, "launches": self.counts()[1]}
            Path(path).write_text(json.dumps(found), encoding="utf-8")

    def pytest_unconfigure(self) -> None:
        self.stack.close()


def one_line(error: BaseException) -> str:
    """An exception in one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:300]


def compare_nothing() -> None:
    """Take comparisons of values, and what cannot be emulated, out of the library's and the tests' support."""
    import support.contract as contract
    import support.kernels
    import torch

    from onepeace_fast import tolerance

    def same_kind(actual: Any, expected: Any, *_: Any, **how: Any) -> None:
        for mine, theirs in zip(*(v if isinstance(v, (list, tuple)) else [v] for v in (actual, expected)), strict=True):
            if isinstance(mine, torch.Tensor):
                assert mine.shape == theirs.shape, f"expected shape {list(theirs.shape)}, got {list(mine.shape)}"
                assert mine.device == theirs.device, f"expected a tensor on {theirs.device}, got {mine.device}"

    def within_rule(name: str, actual: Any, *others: Any, **how: Any) -> None:
        for other in others[:2]:
            same_kind(actual, other)

    def left_out(name: str) -> Any:
        def check(*_: Any, **__: Any) -> None:
            raise LeftOut(LEFT_OUT[name])

        return check

    def equal(mine: torch.Tensor, other: torch.Tensor) -> bool:
        if mine.device != other.device:
            raise two_devices.DeviceMixError(f"torch.equal: got tensors on {mine.device} and {other.device}")
        return mine.shape == other.shape and mine.dtype == other.dtype

    torch.equal = equal

    def far_apart(rows: torch.Tensor, folder: Path) -> torch.Tensor:
        values = rows.cpu()
        stride = 2**30 + 16
        size = 2 * stride + values.shape[1]  # of which a file that is empty elsewhere takes nothing
        storage = torch.from_file(str(folder / "sparse"), shared=True, size=size, dtype=values.dtype)
        return two_devices.EmulatedTensor(storage.as_strided(values.shape, (stride, 1)).copy_(values))

    support.kernels.far_apart = far_apart
    support.kernels.REPEATS, support.kernels.MANY_ROWS = REPEATS, MANY_ROWS
    tolerance.assert_within_rule = contract.assert_within_rule = within_rule
    torch.testing.assert_close = same_kind
    torch.compile = left_out("check_compiled")
    for name in LEFT_OUT:
        setattr(contract, name, left_out(name))
