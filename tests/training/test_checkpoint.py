"""Checkpoint folders: whole or absent whenever the process dies, and never lost."""

import errno
import hashlib
import os
import resource
import signal
import sys
import warnings

import pytest
import torch
from safetensors.torch import save_file

from onepeace_fast.training import checkpoint
from onepeace_fast.training.checkpoint import NotWritten


def content(step, size=100):
    """Writers of a checkpoint whose every file depends on the step."""
    tensor = torch.full((size,), float(step))
    return {
        "config.json": lambda path: path.write_text(f'{{"step": {step}}}'),
        "model.safetensors": lambda path: save_file({"weight": tensor}, path),
        "tokenizer.json": lambda path: path.write_text("{}"),
        "training.pt": lambda path: checkpoint.save_state({"step": step, "moment": tensor, "settings": {}}, path),
    }


def save(output, step, keep=1, size=100):
    checkpoint.write(output, step, content(step, size))
    checkpoint.remove_old(output, keep)


def names(output):
    return sorted(path.name for path in output.iterdir())


def test_what_was_written_is_found_and_read_back(tmp_path):
    assert checkpoint.newest(tmp_path) == (None, {})
    for step in (99_999_999, 100_000_000, 20):
        save(tmp_path, step, keep=5)
    found = checkpoint.newest(tmp_path)
    assert found == (tmp_path / "step-100000000", {})
    state = checkpoint.load_state(found.folder)
    assert state["step"] == 100_000_000
    assert torch.equal(state["moment"], torch.full((100,), 1e8))


def test_the_newest_ones_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]


def test_checksums_are_in_the_format_of_sha256sum(tmp_path):
    folder = checkpoint.write(tmp_path, 1, content(1))
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    assert [line[64:] for line in lines] == [f"  {name}" for name in content(1)]


def in_child(action):
    """The exit code of a forked child that returns what ``action`` does; -9 where it was killed."""
    sys.stdout.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads: the child only handles files
        child = os.fork()
    if not child:
        code = 99
        try:
            code = action()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def save_and_die(event, output, step):
    """Write a checkpoint and die of SIGKILL at the ``event``-th operation on files."""
    left = [event]

    def die(name, arguments):
        if name.startswith(("open", "os.", "shutil.")) and any(str(output) in str(value) for value in arguments):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)
    save(output, step)
    return 0


def test_a_kill_at_any_file_operation_leaves_a_usable_checkpoint(tmp_path):
    seen, event = set(), 0
    while True:
        event += 1
        output = tmp_path / str(event)
        with checkpoint.claimed(output):
            save(output, 1)
        code = in_child(lambda event=event, output=output: save_and_die(event, output, 2))
        assert code in (0, -signal.SIGKILL)
        folder, damaged = checkpoint.newest(output)
        assert folder is not None
        assert not damaged
        seen.add(folder.name)
        with checkpoint.claimed(output):
            assert not [name for name in names(output) if name.endswith(".draft")]
            save(output, 3)
        assert names(output) == ["lock", "step-00000003"]
        if code == 0:
            break
    assert event > 15  # the child died at that many places
    assert seen == {"step-00000001", "step-00000002"}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "training.pt", "SHA256SUMS"])
@pytest.mark.parametrize("harm", ["cut", "flipped", "gone"])
def test_a_damaged_newest_checkpoint_is_passed_over_and_kept_aside(tmp_path, name, harm):
    for step in (1, 2):
        save(tmp_path, step, keep=2)
    path = tmp_path / "step-00000002" / name
    data = bytearray(path.read_bytes())
    if harm == "gone":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    folder, damaged = checkpoint.newest(tmp_path)
    assert folder == tmp_path / "step-00000001"
    assert list(damaged) == [tmp_path / "step-00000002"]
    assert (name in damaged[tmp_path / "step-00000002"]) or name == "SHA256SUMS"
    assert checkpoint.set_aside(tmp_path / "step-00000002").name == "step-00000002.damaged"
    save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["step-00000002", "step-00000002.damaged"]
    assert checkpoint.set_aside(tmp_path / "step-00000002").name == "step-00000002.damaged-2"


def test_nothing_is_made_anew_where_every_checkpoint_is_damaged(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step-00000001" / "training.pt").unlink()
    with pytest.raises(ValueError, match=r"or none, got [^\n]* \(step-00000001: training.pt: No such file"):
        checkpoint.newest(tmp_path)
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "training.pt"])
@pytest.mark.parametrize(
    ("error", "kind", "line"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), NotWritten, r"^No space left on device$"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_a_full_disk_or_an_interruption_leaves_no_trace(tmp_path, name, error, kind, line):
    save(tmp_path, 1)

    def fail(path):
        path.write_bytes(b"half")
        raise error

    with pytest.raises(kind, match=line):
        checkpoint.write(tmp_path, 2, {**content(2), name: fail})
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("failing", ["model.safetensors", "training.pt"])
def test_a_file_that_cannot_grow_is_named_by_the_systems_own_words(tmp_path, failing):
    """A limit on the size of files, which the libraries that write them report each in its own way."""
    writers = content(2, size=200_000)
    writers = {name: writer if name == failing else content(2)[name] for name, writer in writers.items()}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(NotWritten, match="File too large") as caught:
            checkpoint.write(tmp_path, 2, writers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == []


def test_two_runs_cannot_write_one_folder(tmp_path):
    with checkpoint.claimed(tmp_path / "run"):
        (tmp_path / "run" / "step-00000001.draft").mkdir()
        assert in_child(lambda: refusal_of(tmp_path / "run")) == 7
        assert "step-00000001.draft" in names(tmp_path / "run")
    with checkpoint.claimed(tmp_path / "run"):
        assert names(tmp_path / "run") == ["lock"]


def refusal_of(output):
    try:
        with checkpoint.claimed(output):
            return 0
    except ValueError as error:
        return 7 if "expected a folder that no other run is writing" in str(error) else 1


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with (
        pytest.raises(ValueError, match=r"that can be written, got .*run \("),
        checkpoint.claimed(tmp_path / "run"),
    ):
        pass


def test_differences_name_every_key_that_differs():
    saved = {"steps": 20, "model": {"encoder": {"layers": 2, "audio": None}}, "old": 1}
    current = {"steps": 30, "model": {"encoder": {"layers": 2, "audio": {"bucket_size": 8}}}, "new": False}
    assert checkpoint.differences(saved, saved) == []
    assert checkpoint.differences(saved, current) == [
        "model.encoder.audio: None there, absent here",
        "model.encoder.audio.bucket_size: absent there, 8 here",
        "new: absent there, False here",
        "old: 1 there, absent here",
        "steps: 20 there, 30 here",
    ]


def test_checksums_are_of_whole_files_also_of_large_ones(tmp_path):
    folder = checkpoint.write(tmp_path, 1, content(1, size=600_000))
    path = folder / "model.safetensors"
    data = path.read_bytes()
    assert len(data) > 2_000_000
    assert checkpoint.digest(path) == hashlib.sha256(data).hexdigest()
    path.write_bytes(data[:-1] + b"\1")
    assert checkpoint.damage(folder) == "model.safetensors changed since it was written"


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (
            lambda path: path.write_bytes(path.read_bytes()[:500]),
            "expected a whole checkpoint, got one that cannot be read",
        ),
        (lambda path: path.write_bytes(b""), "expected a checkpoint by torch.save or pickle, got a file of another"),
        (lambda path: torch.save([1], path), "expected what a training wrote, with its settings, got another file"),
        (
            lambda path: torch.save({"step": 1}, path),
            "expected what a training wrote, with its settings, got another file",
        ),
    ],
    ids=["truncated", "empty", "a list", "without settings"],
)
def test_a_training_file_that_is_none_is_refused_by_its_name(tmp_path, change, got):
    path = checkpoint.write(tmp_path, 1, content(1)) / "training.pt"
    change(path)
    line = ""
    try:
        checkpoint.load_state(path.parent)
    except Exception as error:
        line = f"{type(error).__name__} {error}"
    assert line.startswith(f"ValueError {path}: {got}") and "\n" not in line, line
