"""The stages of `make gpu`: what each runs, in which order, and how its output is read."""

from __future__ import annotations

import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.gpu_run.plugin import DEVICE_LOST
from tools.gpu_run.processes import FAILED, PASSED, ROOT, UNAVAILABLE, Job, by_exit_code, python
from tools.gpu_run.records import counted, outcomes_of
from tools.gpu_run.schedule import Stage, State

SMOKE = (
    "layer_norm", "residual", "gated_sub_ln", "routed_ffn", "grouped_ffn", "grouped_ffn_row_index", "grouped_ffn_plain",
    "hybrid_ffn", "attention_72", "attention_257",
)  # fmt: skip
# Those whose kernels a rehearsal on a CPU has not.
NEEDS_KERNELS = ("grouped_ffn", "grouped_ffn_row_index", "grouped_ffn_plain", "hybrid_ffn")
SANITIZED = ("attention_72", "attention_33")  # at most 72 tokens: racecheck is hundreds of times slower
PARITY = "repeat or test_parity or test_on_gpu or test_goldens or test_encoder"
ENCODER = "tests/kernels/test_encoder.py"  # whose tests compile whole layers each
KERNEL_TESTS, SHARDS = "tests/kernels/", 3  # processes of each of these files, of which each compiles its own kernels
NOTHING_COLLECTED, LEFT_OUT, BENCHMARK_LOST_DEVICE = 5, 4, 3  # exit codes: pytest's, our tools', the benchmark's
FINISH = 3.0  # seconds of its share that the benchmark is not told of, to end by itself
# Seconds without an answer, after which a kernel is taken to hang: of a smoke check's case, of a test or of a variant.
CASE_ANSWERS, TEST_ANSWERS = 45.0, 60.0
PROPOSAL = 12.0  # seconds that the headline leaves for the proposal, which imports torch
REFUSED = re.compile(
    r"Device not supported|device is not supported|LibraryNotLoaded|Failed to initialize", re.IGNORECASE
)
REPORTED = re.compile(r"Invalid __\w+__|[1-9]\d* hazard|race reported|Misaligned|Out-of-range", re.IGNORECASE)


@dataclass(frozen=True)
class Machine:
    """Where the stages run: ``out`` for results, ``work`` for what nobody reads later; ``keyword`` chooses tests."""

    device: str
    out: Path
    date: str
    work: Path
    cores: int
    keyword: str = ""

    @property
    def on_gpu(self) -> bool:
        """Whether this is the real thing and no rehearsal on a CPU."""
        return self.device != "cpu"


def stages(machine: Machine) -> list[Stage]:
    """All stages, in order."""
    return [
        Stage(
            "build", 100, "installs this checkout; then the CUDA extension and Triton's kernels, side by side",
            [lambda _: _install(machine), lambda _: [*_kernels(machine), *_compile(machine, "headline")]],
        ),
        Stage(
            "smoke", 90, "each op in bfloat16 against its reference, in its own process; a lost device ends the run",
            [lambda _: [_smoke(machine, n) for n in SMOKE if machine.on_gpu or n not in NEEDS_KERNELS]],
        ),
        Stage(
            "parity", 80, "the tests that both backends agree, and that 50 repeats are bitwise equal",
            [lambda _: _tests(machine, "parity", PARITY)], check=lambda cut: _wrong(machine, "parity", cut, least=1),
        ),
        Stage(
            "benchmarks", 130, "the layer and its FFN by every strategy, attention at 64 x 257, pointwise operations",
            [lambda _: [_benchmark(machine, "headline")], lambda state: _proposal(machine, state)],
        ),
        Stage(
            "tests", 120, "the other tests that need a GPU, file by file in processes side by side",
            [lambda _: _tests(machine, "tests")], check=lambda cut: _wrong(machine, "tests", cut),
        ),
        Stage(
            "peers", 100, "what torch.compile makes of the same, then the remaining shapes",
            [lambda _: _compile(machine, "rest"), lambda _: [_benchmark(machine, "rest")]],
        ),
        Stage(
            "sanitizers", 40, "memcheck and racecheck over attention's kernels at two short shapes",
            [lambda _: _sanitizers(machine)],
        ),
    ]  # fmt: skip


def closer_look(check: str) -> list[str]:
    """The commands that show more of a fault of a smoke check."""
    command = f"{sys.executable} -m tools.gpu_run.smoke {check}"
    return [f"CUDA_LAUNCH_BLOCKING=1 {command}", f"PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer {command}"]


def _install(machine: Machine) -> list[Job]:
    """This checkout without its CUDA extension, which takes longer and is built beside Triton's kernels."""
    if not machine.on_gpu:
        return []
    options = ["--no-input", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    options += [] if os.access(sysconfig.get_path("purelib"), os.W_OK) else ["--user"]
    environment = {
        "ONEPEACE_FAST_CUDA_ARCHITECTURES": "none", "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_ROOT_USER_ACTION": "ignore", "PIP_USER": "0",
    }  # fmt: skip
    command = python("-m", "pip", "install", *options, "--editable", ".")
    return [Job("install", command, environment, needed=True)]


def _kernels(machine: Machine) -> list[Job]:
    """The extension, and what the smoke checks launch, which none of the benchmark's variants does."""
    modules = {"extension": "extension", "compile smoke": "smoke_kernels"} if machine.on_gpu else {}
    return [Job(name, python("-m", f"tools.gpu_run.{one}"), judge=_or_unavailable) for name, one in modules.items()]


def _or_unavailable(code: int, lines: Sequence[str]) -> tuple[str, str]:
    """A job that ends with ``LEFT_OUT`` has said in its last line why this machine cannot do it."""
    return (UNAVAILABLE, lines[-1] if lines else "") if code == LEFT_OUT else by_exit_code(code, lines)


def _compile(machine: Machine, part: str) -> list[Job]:
    if part == "rest" and not machine.on_gpu:
        return []  # a rehearsal compiles nothing
    share = 0.5 if part == "rest" else 1.0  # the other half is for times
    return [Job(f"compile {part}", _gpu_script(machine, part, "--warm", share=share), most_seconds=TEST_ANSWERS)]


def _gpu_script(
    machine: Machine, part: str, *options: str, share: float = 1.0, left: float = FINISH
) -> Callable[[float], list[str]]:
    """benchmarks/gpu.py for a share of the time that it will be given, less what is ``left`` after it."""
    script = [
        sys.executable,
        str(ROOT / "benchmarks" / "gpu.py"),
        "--out",
        str(machine.out),
        "--device",
        machine.device,
    ]
    script += [] if machine.on_gpu else ["--quick"]

    def command(seconds: float) -> list[str]:
        budget = f"{max(share * seconds - left, 1.0):.1f}"
        return [*script, "--part", part, "--date", machine.date, "--budget-seconds", budget, *options]

    return command


def _benchmark(machine: Machine, part: str) -> Job:
    """After the device was lost, or the process died, another one goes on with what is left."""
    left = FINISH + (PROPOSAL if part == "headline" else 0.0)
    return Job(
        f"measure {part}",
        _gpu_script(machine, part, left=left),
        shown=True,
        again=lambda code: code == BENCHMARK_LOST_DEVICE or code < 0,
        most_seconds=TEST_ANSWERS,
    )


def _proposal(machine: Machine, state: State) -> list[Job]:
    found = [path for path in machine.out.glob(f"gpu_*_{machine.date}.json") if machine.on_gpu]
    if machine.keyword or not found or not state.passed("smoke", "parity"):
        return []
    command = python("-m", "tools.gpu_run.proposal", str(found[0]), str(machine.out))
    return [Job("proposal", command, shown=True, judge=_or_unavailable)]


def _smoke(machine: Machine, check: str) -> Job:
    command = python("-m", "tools.gpu_run.smoke", check, "--device", machine.device)
    how: dict[str, Any] = {"judge": _or_unavailable, "ends_run": _lost, "most_seconds": CASE_ANSWERS}
    return Job(check, command, shown=True, **how)


def _tests(machine: Machine, stage: str, keyword: str = "") -> list[Job]:
    """pytest over the GPU's tests that no earlier stage has run, each file in a process of its own, or in several.

    After a test by which a process lost the device, or its life, another one goes on behind it: pytest-xdist would run
    that test again, and wait for ever.
    """
    chosen = " and ".join(f"({words})" for words in (keyword, machine.keyword) if words)
    common = ["-m", "pytest", "-p", "tools.gpu_run.plugin", "-p", "no:cacheprovider", "-q", "--tb=short", "-m", "gpu"]
    common += ["-k", chosen] if chosen else []
    tested = ":".join(str(path) for path in sorted(machine.work.glob("*.jsonl")))

    def job(file: str, shard: int, shards: int) -> Job:
        name = file.replace("/", ".") + (f".{shard}" if shards > 1 else "")
        environment = {
            "GPU_RUN_TESTS": str(machine.work / f"{stage}-{name}.jsonl"), "GPU_RUN_TESTED": tested,
            "GPU_RUN_SHARD": f"{shard}/{shards}",
        }  # fmt: skip
        how: dict[str, Any] = {"judge": _tests_judge, "again": _died, "most_seconds": TEST_ANSWERS}
        return Job(f"{stage} {name}", python(*common, file), environment, **how)

    files = files_of_gpu_tests()
    if keyword:
        files = [file for file in files if _names(file, keyword)]
    shards_of = {file: SHARDS if file == ENCODER or (file.startswith(KERNEL_TESTS) and not keyword) else 1
                 for file in sorted(files, key=lambda file: file != ENCODER)}  # fmt: skip
    return [job(file, shard, shards) for file, shards in shards_of.items() for shard in range(1, shards + 1)]


def _names(file: str, keyword: str, root: Path = ROOT) -> bool:
    """Whether a file can have tests that a keyword of words with "or" between them chooses: a process costs seconds."""
    text = f"{file} {(root / file).read_text(encoding='utf-8')}".lower()  # pytest does not look at the case either
    return any(word in text for word in keyword.split(" or "))


def _died(code: int) -> bool:
    return code == DEVICE_LOST or code < 0


def _lost(code: int | None) -> bool:
    """A signal ended the process, or it saw the device lost, or nothing ends it; a wrong value is none of these."""
    return code is None or _died(code)


def files_of_gpu_tests(root: Path = ROOT) -> list[str]:
    """The files that have tests for a GPU, those of the kernels first, since they compile longest."""
    found = {str(path.relative_to(root)): path for path in sorted(root.glob("tests/**/test_*.py"))}
    kernels = [name for name in found if name.startswith(KERNEL_TESTS)]
    marked = [name for name, path in found.items() if "pytest.mark.gpu" in path.read_text(encoding="utf-8")]
    return [*kernels, *(name for name in marked if name not in kernels)]


def _tests_judge(code: int, lines: Sequence[str]) -> tuple[str, str]:
    return (PASSED, "no test is left for it") if code == NOTHING_COLLECTED else by_exit_code(code, lines)


def _wrong(machine: Machine, stage: str, cut: bool, least: int = 0) -> str | None:
    """What is wrong with a stage's tests: some have failed, or fewer have passed than show anything."""
    counts = counted(outcomes_of(machine.work, stage))
    if counts["failed"]:
        return f"{counts['failed']} tests have failed"
    if counts["passed"] < least and not cut:
        return "no test has passed: none was found, or all were skipped"
    return None


def sanitizer_program(environment: Mapping[str, str] = os.environ) -> str | None:
    """compute-sanitizer of PATH, else of CUDA_HOME."""
    home = environment.get("CUDA_HOME")
    beside = Path(home) / "bin" / "compute-sanitizer" if home else None
    return shutil.which("compute-sanitizer") or (str(beside) if beside and beside.is_file() else None)


def _sanitizers(machine: Machine) -> list[Job]:
    program = sanitizer_program()
    if program is None:
        line = "compute-sanitizer is neither on PATH nor in CUDA_HOME"
        return [
            Job("sanitizers", python("-c", f"import sys; print({line!r}); sys.exit({LEFT_OUT})"), judge=_or_unavailable)
        ]
    jobs = []
    for check in SANITIZED:
        for tool in ("memcheck", "racecheck"):
            checked = [program, "--tool", tool, "--kernel-name", "kns=onepeace_fast", "--error-exitcode", "99"]
            command = [*checked, sys.executable, "-m", "tools.gpu_run.smoke", check, "--device", machine.device]
            # Without PyTorch's cache the end of each tensor is the end of its memory.
            environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            jobs.append(Job(f"{tool} {check}", lambda _, it=command: it, environment, judge=_sanitizer_judge))
    return jobs


def _sanitizer_judge(code: int, lines: Sequence[str]) -> tuple[str, str]:
    """A tool that refuses the device has found nothing: neither a fault nor its absence."""
    if code == LEFT_OUT:
        return _or_unavailable(code, lines)
    refusal = next((line for line in lines if REFUSED.search(line)), None)
    if code != 0 and refusal and not any(REPORTED.search(line) for line in lines):
        return UNAVAILABLE, f"compute-sanitizer refuses: {refusal.strip(' =')}"
    report = next((line.strip(" =") for line in lines if REPORTED.search(line)), None)
    return (FAILED, report) if code != 0 and report else by_exit_code(code, lines)
