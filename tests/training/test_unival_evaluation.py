"""What a UnIVAL checkpoint's answers are measured by."""

import json
import shutil

import pytest
import torch
from training._unival_runs import MODEL, write_tasks, write_unival

from onepeace_fast import cli
from onepeace_fast.backend import ENVIRONMENT_VARIABLE
from onepeace_fast.data.text import Tokenizer
from onepeace_fast.models.unival import Hypothesis, Unival
from onepeace_fast.training import checkpoint, command, unival_evaluation

TASKS = ["caption", "vqa", "grounding", "matching", "video_caption"]


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    """Faults are planted where kernels run in Triton's interpreter, which takes minutes."""
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus without sounds, and a run of one step."""
    folder = tmp_path_factory.mktemp("evaluation")
    lines = [line for line in write_tasks(folder).read_text().splitlines() if "audio" not in line]
    (folder / "tasks.jsonl").write_text("\n".join(lines) + "\n")
    stages = [{"tasks": TASKS, "steps": 1}]
    keys = {"stages": stages, "batch_size": 5, "warm_up": 0, "learning_rate": 1e-3, "checkpoint_every": 1}
    assert command.pretrain(str(write_unival(folder, **keys))) == 0
    return folder


def evaluated(folder, *options, manifest="tasks.jsonl", place="run/step-00000001"):
    path = folder / "figures.json"
    path.unlink(missing_ok=True)
    arguments = ["evaluate", str(folder / place), str(folder / manifest), "--json", str(path)]
    return cli.main([*arguments, *options]), json.loads(path.read_text())["tasks"] if path.exists() else None


def test_figures_are_those_of_the_answers_and_of_the_model_s_loss(folder, monkeypatch, capsys):
    """Every second text of a batch is written as the manifest has it, the others with a word more."""
    asked = []

    def generate(self, source, *, beams, max_length, answers, samples, **maps):
        asked.append((len(source), max_length, answers and answers.largest))
        targets = [target[target != 1].tolist() for target in written.pop(0)]
        return [[Hypothesis(t[:-1] + [5] * (place % 2), 0.0), Hypothesis([7], -1.0)] for place, t in enumerate(targets)]

    loss, written, losses = Unival.loss, [], []

    def remembered(self, *, target, **inputs):
        written.append(target)
        found = loss(self, target=target, **inputs)
        losses.append((found.item(), (target != 1).sum().item()))
        return found

    monkeypatch.setattr(Unival, "generate", generate)
    monkeypatch.setattr(Unival, "loss", remembered)
    code, found = evaluated(folder, "--batch-size", "4")
    assert code == 0
    assert {task: one["samples"] for task, one in found.items()} == dict(zip(TASKS, (3, 6, 3, 6, 3), strict=True))
    assert [one["right"] for one in found.values()] == pytest.approx([2 / 3, 1 / 2, 2 / 3, 1 / 2, 2 / 3])
    assert [one["chance"] for one in found.values()] == [None, pytest.approx(1 / 3), None, 1 / 2, None]
    mean = sum(value * count for value, count in losses[1:3]) / sum(count for _, count in losses[1:3])
    assert found["vqa"]["loss"] == pytest.approx(mean)
    assert [count for count, *_ in asked] == [3, 4, 2, 3, 4, 2, 3]
    assert [bool(answers) for *_, answers in asked] == [False, True, True, False, True, True, False]
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["task", "samples", "right", "by", "chance", "loss"]
    assert table[2].split()[:4] == ["vqa", "6", "50.0%", "33.3%"]


def test_questions_are_answered_among_the_manifest_s_answers(folder):
    """A checkpoint that has learned nothing still writes one of them."""
    code, found = evaluated(folder)
    assert code == 0
    assert all(torch.tensor(one["loss"]).isfinite() for one in found.values())
    assert found["vqa"]["right"] > 0 and found["matching"]["right"] > 0 and found["caption"]["right"] == 0


def test_every_choice_has_room_and_counts_once(folder, monkeypatch):
    """Also one that no sample has as its answer; "Red" and "red" are the same tokens."""
    image = {"image": "image0.npy"}
    rows = [{"task": "matching", **image, "caption": "a red wall", "answer": "yes"}]
    rows += [{"task": "vqa", **image, "question": "what is it?", "answer": text} for text in ("Red", "red", "a wall")]
    (folder / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lengths = []

    def generate(self, source, *, max_length, **inputs):
        lengths.append(max_length)
        return [[]] * len(source)

    monkeypatch.setattr(Unival, "generate", generate)
    monkeypatch.setattr(unival_evaluation, "MATCHES", ("yes", "no, not at all"))
    _, found = evaluated(folder, manifest="choices.jsonl")
    tokenizer = Tokenizer.load(folder / "run" / "step-00000001" / "tokenizer.json")
    assert lengths == [len(tokenizer.tokens(text)[0]) + 1 for text in ("no, not at all", "a wall")]
    assert [one["chance"] for one in found.values()] == [1 / 2, 1 / 2]


@pytest.mark.parametrize(
    ("options", "manifest", "part"),
    [
        (("--columns", "image", "audio"), "tasks.jsonl", "--columns: expected none for UnIVAL's tasks"),
        ((), "sounds.jsonl", "expected a checkpoint trained on text and audio, got one of text and image and video"),
        ((), "none.jsonl", "expected a manifest of JSON lines"),
        ((), "deep.jsonl", "deep.jsonl, line 1: expected a JSON object, got another text (maximum recursion"),
        (("--json", "."), "tasks.jsonl", "--json: expected a file in a folder that exists, got ."),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(folder, capsys, options, manifest, part):
    (folder / "deep.jsonl").write_text("[" * 100_000)
    row = {"task": "audio_caption", "audio": "audio0.npy", "caption": "a sound"}
    (folder / "sounds.jsonl").write_text(json.dumps(row) + "\n")
    found = None
    try:
        found = evaluated(folder, *options, manifest=manifest)
    except RecursionError as error:
        assert not error, "not refused"
    assert found == (2, None)
    assert part in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "{folder}: expected a folder that save() wrote, got one without config.json"),
        ("{", "{folder}/config.json: expected a configuration that save() wrote, got no JSON"),
        ("[1]", "{folder}/config.json: expected a configuration that save() wrote, got list [1]"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_refused_by_its_name(folder, tmp_path, capsys, text, says):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert evaluated(folder, place=tmp_path) == (2, None)
    assert capsys.readouterr().err.startswith(says.format(folder=tmp_path))


def test_mico_is_not_measured_yet(folder, capsys):
    (folder / "mico").mkdir()
    (folder / "mico" / "config.json").write_text(json.dumps({"model": "mico"}))
    assert evaluated(folder, place="mico") == (2, None)
    line = f"{folder / 'mico'}: expected a checkpoint of ONE-PEACE or UnIVAL, got one of MiCo, which is not measured"
    assert line in capsys.readouterr().err


def test_a_truncated_checkpoint_is_damaged(folder, capsys):
    shutil.copytree(folder / "run" / "step-00000001", folder / "truncated")
    path = folder / "truncated" / "training.pt"
    path.write_bytes(path.read_bytes()[:1000])
    found = None
    try:
        found = evaluated(folder, place="truncated")
    except RuntimeError as error:
        assert not error, "read before it was checked"
    assert found == (2, None)
    line = f"{path.parent}: expected a whole checkpoint, got a damaged one (training.pt changed since it was written)"
    assert line in capsys.readouterr().err


def test_a_merged_checkpoint_is_evaluated_as_one_and_begins_a_run(folder, capsys):
    """With the bins and the modalities of those that it was merged of."""
    one, two = folder / "run" / "step-00000001", folder / "two"
    shutil.copytree(one, two)
    (two / "SHA256SUMS").unlink()
    state = checkpoint.load_state(two)
    torch.save({"settings": state["settings"], "trained": [*state["trained"], "audio"]}, two / "training.pt")
    assert cli.main(["merge", "--out", str(folder / "merged"), f"{one}=0.5", f"{two}=0.5"]) == 0
    assert sorted(path.name for path in (folder / "merged").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json", "training.pt",
    ]  # fmt: skip
    assert evaluated(folder, place="merged") == evaluated(folder)
    assert checkpoint.load_state(folder / "merged") == {
        "settings": state["settings"], "trained": ["text", "image", "video", "audio"],
    }  # fmt: skip
    keys = {"init": "merged", "bins": 9, "model": None, "stages": [{"tasks": TASKS, "steps": 1}]}
    path = write_unival(folder, "on", batch_size=5, warm_up=0, **keys)
    capsys.readouterr()
    assert command.pretrain(str(path)) == 2
    assert f"bins: expected 11, with which {folder / 'merged'} was trained, got 9" in capsys.readouterr().err


def test_checkpoints_of_other_bins_are_not_merged_and_none_is_written_over(folder, capsys):
    one, other = folder / "run" / "step-00000001", folder / "other bins"
    before = {path.name: path.read_bytes() for path in one.iterdir()}
    assert cli.main(["merge", "--out", str(one), f"{one}=1"]) == 2
    assert capsys.readouterr().err == f"{one}: expected a new folder or an empty one, got one with files in it\n"
    assert {path.name: path.read_bytes() for path in one.iterdir()} == before
    shutil.copytree(one, other)
    torch.save({"settings": checkpoint.load_state(one)["settings"] | {"bins": 12}}, other / "training.pt")
    assert cli.main(["merge", "--out", str(folder / "none"), f"{one}=0.5", f"{other}=0.5"]) == 2
    line = f"bins: expected the same in all models, got 11 in {one} and 12 in {other}\n"
    assert capsys.readouterr().err == line and not (folder / "none").exists()


@pytest.mark.slow
def test_a_small_model_learns_its_samples_by_heart_in_two_stages(folder, tmp_path):
    write_tasks(tmp_path)
    learned = [task for task in TASKS if task != "matching"]
    stages = [{"tasks": learned[:3], "steps": 150}, {"tasks": learned, "steps": 100}]
    model = MODEL | {"embed_dim": 32, "ffn_dim": 64}
    keys = {"stages": stages, "model": model, "batch_size": 12, "warm_up": 10, "learning_rate": 5e-3}
    assert command.pretrain(str(write_unival(tmp_path, checkpoint_every=1000, **keys))) == 0
    (tmp_path / "run" / "step-00000250").rename(tmp_path / "run" / "step-00000001")
    (tmp_path / "tasks.jsonl").write_text((folder / "tasks.jsonl").read_text())
    code, found = evaluated(tmp_path)
    assert code == 0
    assert {task: found[task]["right"] for task in learned} == dict.fromkeys(learned, 1.0)
