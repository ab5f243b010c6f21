"""bootstrap.py in a checkout of its own, on a machine that starts nothing."""

import importlib.util
import shutil
import sys

import pytest
from installation._machine import SCRIPT, Machine, offer


@pytest.fixture
def bootstrap(tmp_path):
    """bootstrap.py as a module, standing in a checkout of its own."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    shutil.copy(SCRIPT, checkout)
    (checkout / "pyproject.toml").write_text("[project]\n")
    (checkout / "setup.py").write_text("setup()\n")
    specification = importlib.util.spec_from_file_location("bootstrap_under_test", checkout / "bootstrap.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def machine(bootstrap, monkeypatch):
    """A machine with ensurepip, no torch, and no active virtual environment."""
    machine = Machine(bootstrap)
    monkeypatch.setattr(bootstrap, "run", machine.run)
    monkeypatch.setattr(bootstrap, "become", machine.run)
    monkeypatch.setattr(bootstrap, "probe_torch", machine.probe)
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    offer(bootstrap, monkeypatch, "venv", "ensurepip")
    return machine


@pytest.fixture
def gpu(bootstrap, machine, monkeypatch):
    """A machine with a GPU."""
    machine.torches[sys.executable] = ("2.11.0+cu130", True, "torch")
    monkeypatch.setattr(bootstrap, "setuptools_version", lambda: "77.0.3")
    return machine
