"""What the command `onepeace-fast` prints and returns."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import onepeace_fast
from onepeace_fast import cli, cuda_extension, info, ops
from onepeace_fast.kernels import measured as files


def row_of(report: str, name: str) -> str:
    """The one row of a report that begins with a name."""
    (row,) = (line.strip() for line in report.splitlines() if line.strip().startswith(name))
    return row


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip() == f"onepeace_fast {onepeace_fast.__version__}"


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    output = capsys.readouterr().out
    assert all(name in output for name in ("demo", "train", "evaluate", "info"))


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["train"],
        ["train", "run.yaml", "--first-run"],
        ["evaluate", "folder"],
        ["evaluate", "folder", "pairs.tsv", "--batch-size", "0"],
        ["demo", "--steps", "0"],
        ["abacus"],
    ],
)
def test_arguments_that_do_not_fit_end_with_usage_and_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage: onepeace-fast" in capsys.readouterr().err


def test_train_runs_the_configuration_that_it_is_given(monkeypatch):
    given = []
    monkeypatch.setattr(cli.training, "pretrain", lambda path: given.append(path) or 7)
    assert cli.main(["train", "run.yaml"]) == 7 and given == ["run.yaml"]


def test_importing_the_library_loads_no_package_of_its_demo_its_training_or_its_data():
    # torch itself loads tqdm where it finds it.
    code = "import sys, torch; before = {*sys.modules}; import onepeace_fast.cli, onepeace_fast.data.batches"
    code += "; print(*{*sys.modules} - before)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert "onepeace_fast.info" in loaded
    absent = {"sklearn", "tqdm", "matplotlib", "yaml", "soundfile", "scipy", "PIL", "tokenizers", "pyarrow"}
    assert not (absent | {"onepeace_fast.demo.run", "onepeace_fast.training.train"}) & loaded


def test_command_runs_as_a_module():
    command = [sys.executable, "-m", "onepeace_fast.cli", "info"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""
    assert row_of(result.stdout, "torch ").split()[1] == torch.__version__


@pytest.mark.parametrize("name", [*ops.__all__, "added"])
def test_info_says_of_every_operation_of_the_library_what_computes_it(monkeypatch, name):
    monkeypatch.setattr(info, "OPERATIONS", (*info.OPERATIONS, "added"))
    said = row_of(info.describe(), f"operation {name} ").split("works")[1].strip()
    assert said == "reference (eager PyTorch) everywhere" if name == "added" else "on a CPU" in said


@pytest.mark.parametrize("name", ["reference", "fused"])
def test_info_marks_the_backend_that_the_environment_chooses(monkeypatch, name):
    monkeypatch.setenv("ONEPEACE_FAST_BACKEND", name)
    report = info.describe()
    marked = [line for line in report.splitlines() if "chosen by ONEPEACE_FAST_BACKEND" in line]
    assert marked == [f"  {row_of(report, f'backend {name}')}"]


def test_info_says_for_which_batches_a_cpu_takes_each_backend(monkeypatch):
    monkeypatch.delenv("ONEPEACE_FAST_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = info.describe()
    assert "automatic for batches with enough padding" in row_of(report, "backend fused")
    assert "automatic for other batches" in row_of(report, "backend reference")
    assert row_of(report, "GPU").split() == ["GPU", "none"]


@pytest.fixture
def measured_gpu(monkeypatch, tmp_path):
    """A GPU, and how its file comes to be there: in the user's folder or the shipped one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A GPU")
    monkeypatch.setattr(files, "SHIPPED_FOLDER", tmp_path / "shipped")
    monkeypatch.setenv(files.ENVIRONMENT_VARIABLE, str(tmp_path / "own"))
    monkeypatch.delenv("ONEPEACE_FAST_BACKEND", raising=False)

    def write(folder: str, parity: bool = True):
        measured = files.MeasuredGPU("A GPU", "sm_90", {}, "2026-11-28", parity, {}, {})
        return files.write_measured(measured, tmp_path / folder)

    for cached in (files.measured_for, files._name_of):
        cached.cache_clear()
    yield write
    for cached in (files.measured_for, files._name_of):
        cached.cache_clear()


def test_info_says_of_a_gpu_that_it_was_not_measured_or_in_which_file_and_what_to_do(measured_gpu):
    def row() -> str:
        return " ".join(row_of(info.describe(), "measurements of the GPU").split())

    how = "to send its file in, add it to kernels/measured/ by a pull request, or attach it to an issue"
    report = info.describe()
    assert "automatic here" in row_of(report, "backend reference")
    assert "no not measured on this GPU: `" in row() and "selftest` measures it; " + how in row()
    path = measured_gpu("shipped")
    assert row().endswith(f"yes measured on 2026-11-28, every operation within its tolerance: {path}")
    assert "automatic here" in row_of(info.describe(), "backend fused")
    path = measured_gpu("own")
    assert row().endswith(f"within its tolerance: {path}; {how}")
    path = measured_gpu("own", parity=False)
    assert "no not held against the reference" in row() and row().endswith(str(path))
    path.write_text("{")
    files.measured_for.cache_clear()
    assert f"{path}: " in row() and "delete the file" in row()
    assert "delete the file" in row_of(info.describe(), "automatic backend")


def test_info_shows_a_backend_name_that_does_not_exist_instead_of_failing(monkeypatch):
    monkeypatch.setenv("ONEPEACE_FAST_BACKEND", "quick")
    assert "got 'quick'" in row_of(info.describe(), "automatic backend")


def test_info_says_why_there_are_no_triton_kernels_where_triton_is_not_usable(monkeypatch):
    from onepeace_fast import kernels

    monkeypatch.setattr(kernels, "unavailable_reason", lambda: "Triton is not installed")
    assert row_of(info.describe(), "Triton kernels").endswith("Triton is not installed")


BUILT = SimpleNamespace(TOOLKIT="13.0", ARCHITECTURES="sm_90a")


@pytest.mark.parametrize(
    ("extension", "reason", "capability", "row"),
    [
        (None, "not built: no nvcc", None, "no not built: no nvcc"),
        (BUILT, "no NVIDIA driver is found", None, "no built by CUDA 13.0 for sm_90a; no NVIDIA driver is found"),
        (BUILT, None, None, "no built by CUDA 13.0 for sm_90a; torch sees no GPU"),
        (BUILT, None, (9, 0), "works built by CUDA 13.0 for sm_90a"),
        (BUILT, None, (8, 6), "no built by CUDA 13.0 for sm_90a; expected a GPU for which"),
    ],
)
def test_info_tells_whether_the_cuda_extension_runs_here_for_which_gpus_and_if_not_why(
    monkeypatch, extension, reason, capability, row
):
    monkeypatch.setattr(cuda_extension, "extension", lambda: extension)
    monkeypatch.setattr(cuda_extension, "unavailable_reason", lambda: reason)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "GPU")
    found = " ".join(row_of(info.describe(), "CUDA extension").split())
    assert found.startswith(f"CUDA extension {row}")


def test_info_says_whose_attention_s_gradients_are():
    row = row_of(info.describe(), "operation relative_bias_attention")
    assert "CUDA kernels, forward and backward" in row and "gradients by the reference in chunks of heads" in row


def test_info_survives_an_installation_that_lacks_or_breaks_nearly_everything(monkeypatch, tmp_path):
    (tmp_path / "triton.py").write_text("raise OSError('libtriton.so:\\n cannot open')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.setattr(cuda_extension, "_import", lambda: "the CUDA extension cannot be imported: broken")
    cuda_extension.unavailable_reason.cache_clear()
    for module in ("onepeace_fast.kernels", "sklearn"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    report = info.describe()
    cuda_extension.unavailable_reason.cache_clear()
    assert row_of(report, "CUDA extension").endswith("the CUDA extension cannot be imported: broken")
    assert "OSError: libtriton.so: cannot open" in row_of(report, "Triton  ")
    assert "cannot be found out: ModuleNotFoundError" in row_of(report, "Triton kernels")
    assert "no C++ compiler found" in row_of(report, "torch.compile")
    assert row_of(report, "onepeace-fast demo").endswith(f"scikit-learn not installed: {info.DEMO_INSTALL}")


def test_info_follows_the_compiler_that_the_environment_names(monkeypatch, tmp_path):
    compiler = tmp_path / "compiler"
    compiler.touch(mode=0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert row_of(info.describe(), "torch.compile").endswith(f"C++ compiler {compiler}")


def test_table_columns_line_up():
    assert info.format_table([("a", "bb", "c"), ("aaa", "b", "c")]) == "  a    bb  c\n  aaa  b   c"
