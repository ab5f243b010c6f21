"""Whether, by what and for which GPUs the CUDA extension is built; machines are pretended, nothing is compiled."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import compilation
import cuda_toolkit
import pytest

NVCC = """#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release {version}, V{version}.1" ;;
--list-gpu-code) printf 'sm_80\\nsm_86\\nsm_90\\nsm_100\\n' ;;
--list-gpu-arch) printf 'compute_80\\ncompute_86\\ncompute_90\\ncompute_100\\n' ;;
esac
"""
FOLDER = Path(cuda_toolkit.__file__).parent
ASK = """
import json, backend
for kind in ("wheel", "editable", "sdist"):
    print(json.dumps(getattr(backend, f"get_requires_for_build_{kind}")()))
"""
H100, A100, RTX_3090, T4, B200, UNKNOWN = (9, 0), (8, 0), (8, 6), (7, 5), (10, 0), (15, 0)


class Machine:
    """A machine without nvcc, driver, wheels or wishes, until a test adds them."""

    def __init__(self, monkeypatch, folder: Path) -> None:
        self.monkeypatch, self.folder = monkeypatch, folder
        monkeypatch.setenv("PATH", str(folder / "path"))
        for name in ("CUDA_HOME", cuda_toolkit.ENVIRONMENT_VARIABLE):
            monkeypatch.delenv(name, raising=False)
        self.driver(None)
        self.packages = {}
        monkeypatch.setattr(cuda_toolkit, "find_spec", self.packages.get)
        self.install("pybind11", "ninja")

    def install(self, *names: str, folders: tuple[Path, ...] = ()) -> None:
        for name in names:
            spec = type("Spec", (), {"submodule_search_locations": [str(folder) for folder in folders]})
            self.packages[name] = spec

    def driver(self, version: tuple[int, int] | None, *capabilities: tuple[int, int]) -> None:
        found = cuda_toolkit.Driver(version, capabilities) if version else None
        self.monkeypatch.setattr(cuda_toolkit, "find_driver", lambda: found)

    def nvcc(self, place: str, version: str = "13.0") -> Path:
        """Put an nvcc into a folder of this machine."""
        program = self.folder / place / "nvcc"
        program.parent.mkdir(parents=True)
        program.write_text(NVCC.format(version=version))
        program.chmod(0o755)
        return program

    def wish(self, architectures: str) -> None:
        self.monkeypatch.setenv(cuda_toolkit.ENVIRONMENT_VARIABLE, architectures)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    return Machine(monkeypatch, tmp_path)


def one_line(text: str | None) -> str:
    assert text and "\n" not in text
    return text


def test_nvcc_comes_from_cuda_home_else_path_else_the_wheels(machine, monkeypatch, tmp_path):
    assert cuda_toolkit.find_toolkit() is None
    wheel = machine.nvcc("site/nvidia/cu13/bin", "13.4")
    machine.install("nvidia", folders=(tmp_path / "site" / "nvidia",))
    assert cuda_toolkit.find_toolkit() == (wheel, (13, 4), (wheel.parent.parent / "lib",))
    on_path = machine.nvcc("path", "12.8")
    assert cuda_toolkit.find_toolkit() == (on_path, (12, 8), ())
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert cuda_toolkit.find_toolkit().nvcc == on_path
    at_home = machine.nvcc("home/bin", "13.1")
    assert cuda_toolkit.find_toolkit() == (at_home, (13, 1), ())


@pytest.mark.parametrize(
    ("driver", "wheels"),
    [((13, 0), "cuda-toolkit[nvcc,cudart,cccl]>=13.0,<13.1"), ((13, 4), "cuda-toolkit[nvcc,cudart,cccl]>=13.0,<13.5")],
)
def test_a_driver_without_nvcc_asks_for_wheels_no_newer_than_itself(machine, driver, wheels):
    machine.driver(driver, H100)
    assert cuda_toolkit.build_requirements() == ["pybind11>=2.13", "ninja", wheels]
    assert wheels in one_line(cuda_toolkit.decide().left_out)  # where pip was told not to fetch them


def test_the_hooks_add_the_requirements_to_setuptools_own(machine):
    (machine.folder / "setup.py").write_text("from setuptools import setup\nsetup(setup_requires=['other'])\n")
    machine.nvcc("path")
    for architectures, added in (("sm_80", ["pybind11>=2.13", "ninja"]), ("none", []), ("", [])):
        # In a process of its own, since setuptools and distutils replace each other while they are imported.
        environment = {**os.environ, "PYTHONPATH": str(FOLDER)}
        environment |= {cuda_toolkit.ENVIRONMENT_VARIABLE: architectures}
        options = {"cwd": machine.folder, "env": environment, "capture_output": True, "text": True, "check": True}
        said = subprocess.run([sys.executable, "-c", ASK], **options).stdout.splitlines()[-3:]
        assert [json.loads(line) for line in said] == [["other", *added], ["other", *added], ["other"]]


@pytest.mark.parametrize("driver", [(None,), ((13, 0),)], ids=["no driver", "no GPU"])
def test_without_a_gpu_nvcc_alone_compiles_nothing_and_the_reason_says_how_to_ask(machine, driver):
    machine.nvcc("path")
    machine.driver(*driver)
    assert cuda_toolkit.build_requirements() == []
    decision = cuda_toolkit.decide()
    assert decision.toolkit is None and decision.architectures == () and not decision.wanted
    reason = one_line(decision.left_out)
    assert reason.startswith("no NVIDIA GPU is found here; to compile it for others, ")
    variable, _, architectures = reason.partition(", ONEPEACE")[2].removesuffix(" pip install .").partition("=")
    assert f"ONEPEACE{variable}" == cuda_toolkit.ENVIRONMENT_VARIABLE
    machine.wish(architectures.replace(",sm_120", ""))  # which this nvcc does not know
    decision = cuda_toolkit.decide()
    assert decision.architectures == ("sm_80", "sm_90a", "sm_100", "compute_90") and decision.wanted
    assert cuda_toolkit.build_requirements() == list(cuda_toolkit.BUILD_TOOLS.values())


def test_on_another_system_than_linux_a_wish_is_refused_in_one_line(machine, monkeypatch, package):
    machine.nvcc("path")
    machine.wish("sm_80")
    monkeypatch.setattr(cuda_toolkit.sys, "platform", "win32")
    assert cuda_toolkit.build_requirements() == []
    with pytest.raises(SystemExit) as ended:
        compilation.record(cuda_toolkit.decide(), package)
    assert one_line(str(ended.value)).endswith("but expected Linux, for which alone it can be compiled, got win32")


def test_a_wish_without_nvcc_and_driver_asks_for_no_wheels_and_the_reason_says_what_is_missing(machine):
    machine.wish("sm_80")
    assert cuda_toolkit.build_requirements() == []
    reason = one_line(cuda_toolkit.decide().left_out)
    assert reason.startswith("neither nvcc nor an NVIDIA driver is found; put nvcc on PATH or set CUDA_HOME")


def test_a_driver_for_which_pypi_has_no_nvcc_asks_for_nothing(machine):
    machine.driver((12, 8), H100)
    assert cuda_toolkit.build_requirements() == []
    said = one_line(cuda_toolkit.decide().left_out)
    assert said.startswith("expected a driver of CUDA 13.0 or later, for which PyPI has nvcc, got 12.8; update it")


def test_an_nvcc_too_old_and_missing_tools_are_named(machine):
    machine.driver((13, 0), H100)
    machine.nvcc("path", "11.8")
    said = one_line(cuda_toolkit.decide().left_out)
    assert said.startswith("expected an nvcc of CUDA 12.0 or later, got ") and "of CUDA 11.8" in said
    machine.nvcc("home/bin")
    machine.monkeypatch.setenv("CUDA_HOME", str(machine.folder / "home"))
    machine.packages.clear()
    assert one_line(cuda_toolkit.decide().left_out).startswith("pybind11 and ninja not installed")


@pytest.mark.parametrize(
    ("capabilities", "architectures"),
    [
        ((H100, H100), ("sm_90a",)),
        ((B200,), ("sm_100",)),
        ((H100, A100, RTX_3090), ("sm_80", "sm_86", "sm_90a")),
        ((T4, A100), ("sm_80",)),
        ((UNKNOWN,), ("compute_90",)),
    ],
)
def test_the_gpus_present_decide_the_architectures(machine, capabilities, architectures):
    machine.nvcc("path")
    machine.driver((13, 0), *capabilities)
    assert cuda_toolkit.decide().architectures == architectures


def test_gpus_that_are_all_too_old_leave_it_out(machine):
    machine.nvcc("path")
    machine.driver((13, 0), T4)
    assert one_line(cuda_toolkit.decide().left_out).endswith("8.0 or later, got 7.5")


def test_the_environment_names_the_architectures(machine):
    machine.nvcc("path")
    machine.driver((13, 0), H100)
    machine.wish("sm_80, compute_90")
    decision = cuda_toolkit.decide()
    assert decision.architectures == ("sm_80", "compute_90") and decision.wanted
    text = compilation.ninja_file(decision, machine.folder, machine.folder / "_cuda.so")
    assert "-gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90,code=compute_90" in text
    machine.wish("none")
    assert cuda_toolkit.decide().left_out and cuda_toolkit.build_requirements() == []


def test_what_takes_longest_to_compile_begins_first():
    assert [path.name for path in compilation.sources()][:2] == ["relative_bias_attention_forward.cu", "binding.cpp"]


@pytest.mark.parametrize("bad", ["90", "sm_90a,8.0", "all", "none,sm_80", "sm_75", "sm_90a,compute_70", "compute_100"])
def test_other_names_of_architectures_end_in_one_line(machine, bad):
    machine.wish(bad)
    with pytest.raises(SystemExit) as ended:
        cuda_toolkit.decide()
    message = one_line(str(ended.value))
    assert message.startswith("ONEPEACE_FAST_CUDA_ARCHITECTURES: expected ") and ", got '" in message


def test_architectures_that_nvcc_does_not_know_are_named_in_one_line(machine):
    program = machine.nvcc("path", "12.0")
    machine.wish("sm_80,sm_120,sm_121")
    decision = cuda_toolkit.decide()
    got = f"{program} of CUDA 12.0; update it, then install again"
    expected = f"expected an nvcc that knows sm_120, sm_121, got {got}"
    assert one_line(decision.left_out) == expected and decision.wanted and decision.architectures == ()


class Library:
    """What libcuda answers: GPUs of these compute capabilities, and initialisation's result."""

    def __init__(self, version: int, capabilities: tuple = (), initialised: int = 0) -> None:
        def answer(pointer, value):
            pointer._obj.value = value
            return 0

        self.cuDriverGetVersion = lambda pointer: answer(pointer, version)
        self.cuInit = lambda flags: initialised
        self.cuDeviceGetCount = lambda pointer: answer(pointer, len(capabilities))
        self.cuDeviceGetAttribute = lambda pointer, which, gpu: answer(pointer, capabilities[gpu][which - 75])


@pytest.mark.parametrize(
    ("library", "found"),
    [
        (Library(13000, (H100, RTX_3090)), ((13, 0), (H100, RTX_3090))),
        (Library(12080, (), 100), ((12, 8), ())),
        (Library(0), None),
    ],
    ids=["two GPUs", "no GPU", "a stub"],
)
def test_the_driver_is_asked_for_its_version_and_its_gpus(monkeypatch, library, found):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert cuda_toolkit.find_driver() == found


@pytest.fixture
def package(machine):
    """A source tree that an earlier editable installation left its extension in."""
    folder = machine.folder / "onepeace_fast"
    folder.mkdir()
    (folder / "_cuda.cpython-310-x86_64-linux-gnu.so").touch()
    return folder


def test_an_editable_installation_without_the_extension_keeps_the_reason_and_no_old_extension(machine, package, capsys):
    compilation.record(cuda_toolkit.decide(), package)
    (record,) = package.iterdir()
    reason = record.read_text().strip()
    assert record.name == compilation.LEFT_OUT and reason == cuda_toolkit.decide().left_out
    said = one_line(capsys.readouterr().out.strip())
    assert said == f"onepeace_fast: all is installed but the CUDA extension, which is left out: {reason}"
    machine.nvcc("path")
    machine.driver((13, 0), H100)
    compilation.record(cuda_toolkit.decide(), package)
    assert not record.exists()


def test_architectures_that_are_asked_for_and_cannot_be_built_end_the_installation(machine, package):
    machine.wish("sm_90a")
    with pytest.raises(SystemExit) as ended:
        compilation.record(cuda_toolkit.decide(), package)
    assert one_line(str(ended.value)).startswith("ONEPEACE_FAST_CUDA_ARCHITECTURES: asks for the CUDA extension, but")


def test_a_build_says_in_one_line_for_which_gpus_by_what_and_how_to_choose(machine, monkeypatch, capsys):
    machine.nvcc("path")
    machine.driver((13, 0), H100)
    monkeypatch.chdir(machine.folder)
    monkeypatch.setattr(compilation, "ninja_file", lambda *arguments: "")
    ninja = machine.folder / "path" / "ninja"
    ninja.write_text("#!/bin/sh\n")
    ninja.chmod(0o755)
    compilation.compile_extension(cuda_toolkit.decide(), machine.folder / "out" / "_cuda.so")
    said = one_line(capsys.readouterr().out.strip())
    assert said.startswith("onepeace_fast: building the CUDA extension for sm_90a by ")
    assert said.endswith("ONEPEACE_FAST_CUDA_ARCHITECTURES chooses other GPUs, or none")


def test_compilers_run_side_by_side_as_far_as_processors_and_memory_allow():
    gibibyte = 2**30
    assert compilation.jobs(4, 64 * gibibyte, 2) == 2
    assert compilation.jobs(4, 64 * gibibyte, 16) == 4
    assert compilation.jobs(4, 7 * gibibyte // 2, 16) == 3
    assert compilation.jobs(4, 0, 16) == 1
    assert 0 < compilation.available_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
