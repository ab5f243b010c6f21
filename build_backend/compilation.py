"""How the CUDA extension is compiled: every file of csrc/ by nvcc, side by side, through ninja."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from cuda_toolkit import ENVIRONMENT_VARIABLE, Decision, dotted

MODULE = "_cuda"
SOURCES = Path("csrc")
OBJECTS = Path("build") / "cuda"  # setuptools' own folder for an editable install is thrown away
LEFT_OUT = "cuda_left_out.txt"
JOB_MEMORY = 2**30  # bytes that one nvcc may take; it took 0.2 * 2**30 when that was measured


def say(line: str) -> None:
    """Print a line, also to the terminal that pip keeps a build's output from."""
    print(line, flush=True)
    if not sys.stdout.isatty():
        try:
            with open("/dev/tty", "w", encoding="utf-8") as terminal:
                terminal.write(f"\r{line}\n")
        except OSError:
            pass


def sources() -> list[Path]:
    """What is compiled: long files, which take longest, first, so that all processors end at about the same time."""
    found = [*SOURCES.glob("*.cu"), *SOURCES.glob("*.cpp")]
    return sorted(found, key=lambda path: (-path.stat().st_size, path.name))


def jobs(files: int, memory: int, processors: int) -> int:
    """How many compilers run at once: no more than there are files, processors and room for in memory."""
    return max(1, min(files, processors, memory // JOB_MEMORY))


def available_memory() -> int:
    """Bytes that this machine and its control group still give."""
    free = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = meminfo.read_text(encoding="utf-8").splitlines()
        free = [int(line.split()[1]) * 1024 for line in lines if "MemAvailable" in line]
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.exists() and used.exists() and limit.read_text(encoding="utf-8").strip() != "max":
        free.append(int(limit.read_text(encoding="utf-8")) - int(used.read_text(encoding="utf-8")))
    return min(free)


def ninja_file(decision: Decision, folder: Path, output: Path) -> str:
    """The rules of compilation and linking."""
    import pybind11  # here, since nothing else needs it where the extension is left out

    toolkit, names = decision.toolkit, ",".join(decision.architectures)
    flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", f"-I{SOURCES.resolve()}"]
    flags += [f"-gencode=arch={name.replace('sm_', 'compute_')},code={name}" for name in decision.architectures]
    # For files of C++ alone, so that another Python or pybind11 compiles no kernel again.
    binding = [f"-isystem={path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    binding.append(f'-DONEPEACE_FAST_ARCHITECTURES=\\"{names}\\"')
    link = ["-shared", "-cudart=static", "-Xlinker=--exclude-libs,ALL", *(f"-L{path}" for path in toolkit.libraries)]
    lines = [
        "ninja_required_version = 1.5",
        f"nvcc = {_escaped(toolkit.nvcc)}",
        f"flags = {' '.join(map(_escaped, flags))}",
        "rule compile",
        "  command = $nvcc $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        f"  description = nvcc $in ({names})",
        "rule link",
        f"  command = $nvcc {' '.join(map(_escaped, link))} $in -o $out",
        "  description = link $out",
    ]
    objects = []
    for source in sources():
        objects.append(_escaped(folder.resolve() / f"{source.name}.o"))
        lines.append(f"build {objects[-1]}: compile {_escaped(source.resolve())}")
        if source.suffix == ".cpp":
            lines.append(f"  flags = $flags {' '.join(map(_escaped, binding))}")
    lines.append(f"build {_escaped(output)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def _escaped(value: object) -> str:
    """A path or flag as ninja reads it."""
    return str(value).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def compile_extension(decision: Decision, output: Path) -> None:
    """Compile what has changed, and link it."""
    for folder in (OBJECTS, output.parent):
        folder.mkdir(parents=True, exist_ok=True)
    (OBJECTS / "build.ninja").write_text(ninja_file(decision, OBJECTS, output), encoding="utf-8")
    count = jobs(len(sources()), available_memory(), len(os.sched_getaffinity(0)))
    nvcc, version = decision.toolkit.nvcc, dotted(decision.toolkit.version)
    names = ",".join(decision.architectures)
    choose = f"{ENVIRONMENT_VARIABLE} chooses other GPUs, or none"
    say(f"onepeace_fast: building the CUDA extension for {names} by {nvcc} {version}, {count} at once; {choose}")
    ninja = ["ninja"] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
    environment = {**os.environ, "NINJA_STATUS": "[%f/%t] "}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([*ninja, "-C", str(OBJECTS), "-j", str(count)], env=environment, **streams) as process:
        for line in process.stdout:
            say(line.rstrip())
    if process.returncode != 0:
        raise SystemExit(
            "onepeace_fast: the CUDA extension does not compile: see above. To install without it: "
            f"{ENVIRONMENT_VARIABLE}=none pip install ."
        )


def record(decision: Decision, package: Path) -> None:
    """Where the extension is left out, say so, write down why, and take away what an earlier installation left."""
    reason = package / LEFT_OUT
    reason.unlink(missing_ok=True)
    if decision.left_out is None:
        return
    if decision.wanted:
        raise SystemExit(f"{ENVIRONMENT_VARIABLE}: asks for the CUDA extension, but {decision.left_out}")
    for stale in package.glob(f"{MODULE}.*"):
        stale.unlink()
    reason.write_text(f"{decision.left_out}\n", encoding="utf-8")
    say(f"onepeace_fast: all is installed but the CUDA extension, which is left out: {decision.left_out}")
