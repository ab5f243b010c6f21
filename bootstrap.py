"""Run onepeace_fast from a checkout: python3 bootstrap.py COMMAND [ARGUMENTS]

  demo     the demonstration; arguments go to `onepeace-fast demo`
  demo-unival  three claims of UnIVAL's paper; arguments go to `onepeace-fast demo-unival`
  demo-mico  what more modalities are worth to MiCo; arguments go to `onepeace-fast demo-mico`
  test     ruff's rules and format, mypy, then the quick tests on all cores; arguments go to pytest; --coverage: with
           their coverage
  test-all the slow tests, which test leaves out; arguments go to pytest
  bench    the benchmarks; arguments go to pytest
  docs     the pages of the API, from the docstrings, into build/docs
  kernels  compiles every kernel for sm_80 and sm_90, with no GPU, and checks registers, spills, shared memory and the
           width of memory accesses; CUDA's where there is nvcc; --all: a row for every Triton configuration;
           then the model of what they cost, beside its last committed table, and the bytes that a layer moves
  mutants  plants faults in copies of this checkout and runs the tests that must fail then; names choose some
  rehearse what the GPU tests and benchmarks do on the host, with no GPU: devices, host reads, compiles, launches
           --short: less, in a few minutes; --versions 2.11 or oldest: in an environment with these torch and Triton
  gpu      all that needs a GPU, in stages with one deadline: --minutes M (default 8); --stages A,B: only these;
           --list: what they are; results into $OUT, or benchmarks/results, whole whenever it is stopped

All but gpu run in .venv beside this file. The first run builds it and says what it downloads; a torch that this Python
already has is used if it is recent enough. gpu runs in this Python as it is, installs only this checkout into it, and
downloads nothing.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from importlib.util import find_spec
from pathlib import Path

# Before any annotation below is evaluated, so that an old Python says this line and no stack trace.
if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit("onepeace_fast needs Python 3.10 or later; {} is {}.{}".format(sys.executable, *sys.version_info[:2]))

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "onepeace_fast.json"
LEFT_OUT = ROOT / "onepeace_fast" / "cuda_left_out.txt"

ARCHITECTURES = "ONEPEACE_FAST_CUDA_ARCHITECTURES"

OLDEST_TORCH = (2, 8)
PINNED_TORCH = "2.13.0"
INCLUDED = {"demo": ["demo"], "dev": ["demo", "train", "docs", "dev"]}
INCLUDED["demo-unival"] = INCLUDED["demo-mico"] = INCLUDED["demo"]
INCLUDED["test-all"] = [*INCLUDED["dev"], "transformers"]
DOWNLOADS = {
    "base": "triton (about 300 MB, only on Linux), numpy, safetensors (about 20 MB)",
    "build": "pybind11, ninja and, only where there is an NVIDIA GPU and no nvcc, CUDA's compiler (about 300 MB)",
    "demo": "scikit-learn with SciPy, matplotlib, eSpeak NG (GPL-3), soundfile (about 80 MB)",
    "train": "pyarrow, tokenizers, TensorBoard, Pillow (about 90 MB)",
    "docs": "pdoc with Jinja2 and Pygments (about 3 MB)",
    "transformers": "Hugging Face's transformers (about 30 MB)",
    "dev": "pytest and plugins, hypothesis, ruff, mypy, build, setuptools, pybind11, ninja (about 45 MB)",
}
TORCH_DOWNLOAD = (
    f"torch {PINNED_TORCH} (200 MB for CPUs, gigabytes with CUDA, as pip's configuration decides; without a GPU "
    "install PyTorch's CPU wheels first, see PyTorch's 'Get started' page)"
)
CHECKS = (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"])
# What would disturb an installation into an environment; else pip is as it is configured.
PIP = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore", "PIP_USER": "0"}
PROBE = "import torch; print(torch.__version__, torch.cuda.is_available(), torch.__path__[0], sep='|')"

Torch = namedtuple("Torch", ["version", "cuda", "folder"])


class Stop(Exception):
    """Ends the command with one line for the user and an exit code."""

    def __init__(self, line: str, code: int = 1) -> None:
        super().__init__(line)
        self.code = code


def say(line: str) -> None:
    """Print a heading at once, before the output of the command it announces."""
    print(f"==> {line}", flush=True)


def run(command: list[str], **environment: str) -> int:
    """Run a command in the checkout and return its exit code."""
    return subprocess.call(command, cwd=ROOT, env={**os.environ, **environment})


def become(command: list[str]) -> int:
    """Run a command in the checkout in this process's place, so that a signal to this process ends the command."""
    if os.name == "nt":  # whose exec returns to the caller at once
        return run(command)
    os.chdir(ROOT)
    sys.stdout.flush()
    os.execv(command[0], command)


def probe_torch(python: Path | str) -> Torch | None:
    """Return the torch that an interpreter imports, or None."""
    result = subprocess.run([str(python), "-c", PROBE], cwd=ROOT, capture_output=True, text=True)
    if result.returncode != 0:
        return None
    version, cuda, folder = result.stdout.strip().splitlines()[-1].split("|", 2)
    return Torch(version, cuda == "True", folder)


def release(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def fits(torch: Torch | None) -> bool:
    """Tell whether a torch is there and recent enough."""
    return torch is not None and release(torch.version) >= OLDEST_TORCH


def setuptools_version() -> str:
    """Return the version of this Python's setuptools, "0" where it has none."""
    from importlib import metadata  # here, since the oldest Pythons, which get their one line above, lack it

    return next((found.version for found in metadata.distributions(name="setuptools")), "0")


def identity() -> dict[str, str]:
    """Describe what an environment cannot outlive: another interpreter, another place of the checkout."""
    return {"python": platform.python_version(), "prefix": sys.base_prefix, "checkout": str(ROOT)}


def inputs() -> str:
    """Return a digest of what decides what is installed and compiled: files, and which nvcc is there."""
    machine = [os.environ.get(name, "") for name in ("CUDA_HOME", ARCHITECTURES)]
    machine.append(shutil.which("nvcc") or "")
    files = [ROOT / "pyproject.toml", ROOT / "setup.py", *sorted((ROOT / "build_backend").glob("*.py"))]
    files += sorted(path for path in (ROOT / "csrc").glob("*") if path.is_file())
    parts = [value.encode() for value in machine] + [path.read_bytes() for path in files]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def read_stamp() -> dict | None:
    """Return what the stamp in .venv says, {} for a damaged one, None without .venv; refuse a .venv made by others."""
    if not VENV.exists() or (VENV.is_dir() and not any(VENV.iterdir())):
        return None
    if not STAMP.exists():
        raise Stop(f"{VENV} was not made by this script and stays as it is: move or delete it, then run this again.")
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(stamp: dict) -> None:
    """Write the stamp in one step."""
    draft = STAMP.with_suffix(".new")
    draft.write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")
    draft.replace(STAMP)


def usable(stamp: dict | None) -> bool:
    """Tell whether the environment is whole and still belongs to this interpreter and checkout."""
    whole = bool(stamp) and stamp.get("complete") is True and stamp.get("identity") == identity()
    return whole and PYTHON.exists() and Path(stamp.get("host_torch") or ROOT).exists()


def creation_commands(*flags: str) -> list[list[str]]:
    """Return the commands that make .venv with a pip in it, in whichever way this machine offers."""
    target = [*flags, str(VENV)]
    host_pip = find_spec("pip")
    if find_spec("venv") and find_spec("ensurepip"):
        return [[sys.executable, "-m", "venv", *target]]
    if find_spec("venv") and host_pip and host_pip.origin:
        # Debian without python3-venv: this Python's pip, run by the new interpreter, brings the new one its own.
        fill = [str(PYTHON), str(Path(host_pip.origin).parent), "install", "--ignore-installed", "pip"]
        return [[sys.executable, "-m", "venv", "--without-pip", *target], fill]
    if find_spec("virtualenv"):
        return [[sys.executable, "-m", "virtualenv", *target]]
    if shutil.which("virtualenv"):
        return [["virtualenv", "--python", sys.executable, *target]]
    if shutil.which("uv"):
        return [["uv", "venv", "--seed", "--allow-existing", "--python", sys.executable, *target]]
    raise Stop("This Python cannot make virtual environments: `sudo apt install python3-venv`, then run this again.")


def create() -> dict:
    """Make .venv anew and return its stamp, not yet complete."""
    if Path(sys.prefix).resolve() == VENV.resolve():
        raise Stop("The environment .venv must be built anew and is active: type `deactivate`, then run this again.")
    torch = probe_torch(sys.executable)
    reused = fits(torch)
    nested = sys.prefix != sys.base_prefix
    commands = creation_commands(*(["--system-site-packages"] if reused and not nested else []))
    if VENV.exists():
        shutil.rmtree(VENV)
    VENV.mkdir()
    stamp = {"complete": False, "identity": identity(), "extras": [], "host_torch": torch.folder if reused else None}
    write_stamp(stamp)
    say(f"Making {VENV}" + (f", which shares torch {torch.version} of {sys.executable}" if reused else ""))
    for command in commands:
        code = run(command)
        if code != 0:
            raise Stop(f"Making .venv failed at `{' '.join(command)}`: its lines above say why.", code)
    if reused and nested:  # the system's packages would be those below that environment, not its own
        library = VENV / "Lib" if os.name == "nt" else VENV / "lib" / "python{}.{}".format(*sys.version_info[:2])
        (library / "site-packages" / "host_torch.pth").write_text(f"{Path(torch.folder).parent}\n", encoding="utf-8")
    return stamp


def install(stamp: dict, extra: str) -> None:
    """Install the checkout and an extra into .venv; the stamp is complete only once that has succeeded."""
    torch = probe_torch(PYTHON)
    pins = [] if fits(torch) else [f"torch=={PINNED_TORCH}"]
    downloads = [TORCH_DOWNLOAD] * len(pins) + [DOWNLOADS[name] for name in ["base", "build", *INCLUDED[extra]]]
    say("Installing into .venv; pip downloads what is not there or in its cache:")
    print("      " + "\n      ".join(downloads), flush=True)
    write_stamp({**stamp, "complete": False})
    command = [
        str(PYTHON),
        "-m",
        "pip",
        "install",
        "--no-input",
        *pins,
        "--editable",
        f".[{','.join(INCLUDED[extra])}]",
    ]
    code = run(command, **PIP)
    if code != 0:
        write_stamp(stamp)  # pip resolves and downloads first: an environment that was whole still is
        raise Stop("pip failed: see its lines above. Offline? Or a proxy to set (`pip config`)? Run this again.", code)
    if LEFT_OUT.exists():  # what the build said, which pip does not show
        say(f"Installed without the CUDA extension: {LEFT_OUT.read_text(encoding='utf-8').strip()}")
    extras = sorted({*stamp["extras"], *INCLUDED[extra]})
    write_stamp({**stamp, "complete": True, "inputs": inputs(), "extras": extras})


def prepare(extra: str) -> None:
    """Bring .venv to the state that an extra needs, without calling pip where it is there already."""
    stamp = read_stamp()
    if usable(stamp) and stamp["inputs"] == inputs() and {*INCLUDED[extra]} <= {*stamp["extras"]}:
        return
    if stamp is not None and not usable(stamp):
        say("The environment .venv is unfinished or belongs to another Python or folder: building it anew")
    install(stamp if usable(stamp) else create(), extra)


def in_environment(*words: str) -> int:
    """Run a module by the interpreter of .venv."""
    return run([str(PYTHON), "-m", *words])


def gpu(arguments: list[str]) -> int:
    """Run the stages of tools/gpu_run in this interpreter, which must have all that they need."""
    if not {"--list", "-h", "--help"} & set(arguments):
        torch = probe_torch(sys.executable)
        if torch is None:
            raise Stop(f"gpu needs a torch with CUDA, and {sys.executable} cannot import torch.", 2)
        if not torch.cuda:
            raise Stop(f"gpu needs a CUDA device, and torch {torch.version} of {sys.executable} sees none.", 2)
        if release(setuptools_version()) < (77, 0):
            raise Stop(f"gpu installs this checkout without a download and needs setuptools 77 in {sys.executable}.", 2)
    return become([sys.executable, "-m", "tools.gpu_run", *arguments])


PARALLEL = ("pytest", "-n", "auto", "--dist", "loadfile")  # on all cores, a file of tests on one of them
COVERAGE = ("--cov", "--cov-report=term-missing:skip-covered", "--cov-fail-under=90")
# What each says before it runs a module of .venv, and the module with its first arguments; gpu runs none of them.
COMMANDS = {
    "demo": ("Running the demonstration", "onepeace_fast.cli", "demo"),
    "demo-unival": ("Running the demonstration of UnIVAL", "onepeace_fast.cli", "demo-unival"),
    "demo-mico": ("Running the demonstration of MiCo", "onepeace_fast.cli", "demo-mico"),
    "test": ("Running the quick tests; `make test-all` runs the others", *PARALLEL),
    "test-all": ("Running the slow tests", *PARALLEL, "--no-loadscope-reorder", "-m", "slow and not gpu"),
    "bench": ("Running the benchmarks", "pytest", "benchmarks"),
    "docs": ("Rendering the docstrings", "tools.api_pages"),
    "kernels": ("Compiling the kernels for GPUs that need not be here", "tools.compile_kernels"),
    "mutants": ("Planting faults in copies of this checkout", "tools.mutants"),
    "rehearse": ("Rehearsing for a GPU that need not be here", "tools.rehearsal"),
    "gpu": (),
}


# What kernels runs besides, whatever its arguments.
KERNEL_TOOLS = ("tools.kernel_model", "tools.layer_traffic", "tools.compile_cuda")


def start(command: str, arguments: list[str]) -> int:
    """Prepare what a command needs, run it and return its exit code."""
    if command == "gpu":
        return gpu(arguments)
    prepare(command if command in INCLUDED else "dev")
    heading, *module = COMMANDS[command]
    if command == "test":
        say("Checking the code with ruff and mypy")
        for check in CHECKS:
            code = in_environment(*check)
            if code != 0:
                return code
        module += COVERAGE if "--coverage" in arguments else ()
        arguments = [argument for argument in arguments if argument != "--coverage"]
    say(heading)
    code = in_environment(*module, *arguments)
    for tool in KERNEL_TOOLS if command == "kernels" else ():
        code = in_environment(tool) or code
    return code


def main(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    command, *rest = arguments or ["--help"]
    if {"-h", "--help"} & {command, *rest[:1]}:
        print(__doc__.strip())
        return 0
    try:
        if command not in COMMANDS:
            raise Stop(f"There is no command {command!r}: choose one of {', '.join(COMMANDS)}.", 2)
        return start(command, rest)
    except Stop as stop:
        line, code = str(stop), stop.code
    except OSError as error:
        line, code = f"{command} stopped: {error}", 1
    except KeyboardInterrupt:
        line, code = "Interrupted; run the same command again to go on.", 130
    print(line, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
