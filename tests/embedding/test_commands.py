"""``onepeace-fast embed`` and ``search``: a manifest in, a file and what is near out; and after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

for package in ("tokenizers", "PIL", "soundfile", "scipy", "pyarrow"):
    pytest.importorskip(package)

import torch  # noqa: E402
from embedding._small import CAPTIONS, pixels, write_files, write_model  # noqa: E402

from onepeace_fast.cli import main  # noqa: E402
from onepeace_fast.embedding import from_pretrained  # noqa: E402
from onepeace_fast.embedding.store import reading, rows_of  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path):
    write_model(tmp_path)
    images, sounds = write_files(tmp_path)
    lines = ["image\taudio\tcaption"]
    lines += [f"{os.path.basename(images[n])}\t{os.path.basename(sounds[n])}\t{CAPTIONS[n]}" for n in range(3)]
    lines += [f"0.png\t\t{CAPTIONS[3]}", f"\t\t{CAPTIONS[0]}"]  # an image again, empty cells, a caption again
    (tmp_path / "all.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path


def embed(folder, *more, out="all.parquet"):
    return main(["embed", str(folder / "all.tsv"), "--model", str(folder / "public.pt"), "--out",
                 str(folder / out), *more])  # fmt: skip


def find(folder, *more):
    return main(["search", str(folder / "all.parquet"), "--model", str(folder / "public.pt"), *more])


def content(path):
    with reading(path) as (file, _):
        return {(item.modality, item.value): (item.line, torch.tensor(row)) for items, rows in rows_of(file)
                for item, row in zip(items, rows, strict=True)}  # fmt: skip


def test_every_different_item_is_embedded_once(folder, capsys):
    assert embed(folder, "--part", "2") == 0
    found = content(folder / "all.parquet")
    files = {("image", str(folder / f"{n}.png")): n + 2 for n in range(3)}
    files |= {("audio", str(folder / f"{n}.wav")): n + 2 for n in range(3)}
    files |= {("text", CAPTIONS[n]): n + 2 for n in range(4)}
    assert {item: line for item, (line, _) in found.items()} == files
    embedder = from_pretrained(folder / "public.pt")
    for modality in ("text", "image", "audio"):
        values = [value for kind, value in files if kind == modality]
        want = getattr(embedder.embed(**{modality: values}), modality)
        torch.testing.assert_close(torch.stack([found[modality, value][1] for value in values]), want)
    assert capsys.readouterr().out == f"{folder / 'all.parquet'}: 10 embeddings\n"
    assert not (folder / "all.parquet.parts").exists()


def test_searching_finds_a_file_by_itself_and_by_several_together(folder, capsys):
    embed(folder)
    capsys.readouterr()
    assert find(folder, "--image", str(folder / "1.png"), "--top", "2") == 0
    first = capsys.readouterr().out.splitlines()[1].split()
    assert first == ["1.000", "image", str(folder / "1.png")]
    assert find(folder, "--image", str(folder / "1.png"), "--dtype", "bf16") == 0  # the same file's model
    out = str(folder / "found.json")
    query = ["--text", CAPTIONS[1], "--audio", str(folder / "2.wav")]
    assert find(folder, *query, "--of", "text", "audio", "--json", out) == 0
    found = json.loads(Path(out).read_text())
    rows = content(folder / "all.parquet")
    total = rows["text", CAPTIONS[1]][1] + rows["audio", str(folder / "2.wav")][1]
    total /= total.norm()
    want = sorted(((float(row @ total), *item) for item, (_, row) in rows.items() if item[0] != "image"), reverse=True)
    assert [(one["modality"], one["item"]) for one in found] == [w[1:] for w in want]
    assert [one["score"] for one in found] == pytest.approx([w[0] for w in want], abs=1e-5)


def test_a_page_and_an_index_are_made(folder, capsys):
    pytest.importorskip("jinja2")
    pytest.importorskip("faiss")
    embed(folder)
    page, index = folder / "found.html", folder / "all.faiss"
    assert find(folder, "--text", "a dog", "--page", str(page), "--index", str(index)) == 0
    assert index.exists() and page.read_text().count("<li>") == 11  # the query and all ten


def test_a_broken_file_stops_or_is_skipped_and_the_rest_is_kept(folder, capsys):
    (folder / "1.png").write_bytes(b"no image")
    assert embed(folder, "--columns", "image", "caption") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"{folder / '1.png'}: expected ") and line.endswith("(1 such so far; --broken skip goes on)")
    assert not (folder / "all.parquet").exists()
    assert embed(folder, "--columns", "image", "caption", "--broken", "skip") == 1
    assert f"{folder / '1.png'}: expected " in capsys.readouterr().out
    assert sorted(item[0] for item in content(folder / "all.parquet")) == ["image"] * 2 + ["text"] * 4


def test_a_text_is_named_by_its_line(folder, caplog):
    with (folder / "all.tsv").open("a") as file:
        file.write("2.png\t\t" + "dog " * 10000 + "\n")
    assert embed(folder, "--columns", "caption") == 0
    assert f"the first is {folder / 'all.tsv'}, line 7" in caplog.text


@pytest.mark.parametrize(
    ("more", "start"),
    [
        (["--columns", "sound"], "{}/all.tsv: expected sound among its columns"),
        (["--tokenizer", "none.json"], "none.json: expected a tokenizer.json"),
        (["--model", "none.pt"], "none.pt: expected a file"),
        (["--out", "none/all.parquet"], "none/all.parquet: expected a file in a folder that exists"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(folder, capsys, more, start):
    assert embed(folder, *more) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(start.format(folder))


def test_searching_by_another_model_is_refused(folder, capsys):
    embed(folder)
    values = torch.load(folder / "public.pt", weights_only=False)
    values["model"]["text_proj.weight"] += 0.5
    torch.save(values, folder / "public.pt")
    capsys.readouterr()
    assert find(folder, "--text", "a dog") == 2
    assert capsys.readouterr().err == (
        f"{folder / 'all.parquet'}: expected embeddings of this model, got others (text differs)\n"
    )
    assert find(folder) == 2 and "expected at least one" in capsys.readouterr().err


def test_a_branch_without_a_column_leaves_it_out(folder, capsys):
    from_pretrained(folder / "public.pt").model.branch("image").save(folder / "branch")
    assert embed(folder, "--model", str(folder / "branch")) == 0
    assert {kind for kind, _ in content(folder / "all.parquet")} == {"image"}
    err = capsys.readouterr().err
    assert "audio is left out" in err and "text is left out" in err
    assert embed(folder, "--model", str(folder / "branch"), "--columns", "audio", out="b.parquet") == 2
    assert find(folder, "--model", str(folder / "branch"), "--image", str(folder / "0.png")) == 0


@pytest.mark.slow
def test_after_a_kill_it_goes_on_where_it_was(folder):
    from PIL import Image

    for n in range(60):
        Image.fromarray(pixels(n, 400, 400)).save(folder / f"many {n}.png")
    (folder / "all.tsv").write_text("image\n" + "".join(f"many {n}.png\n" for n in range(60)))
    arguments = ["embed", folder / "all.tsv", "--model", folder / "public.pt", "--out", folder / "all.parquet"]
    command = [sys.executable, "-m", "onepeace_fast.cli", *map(str, arguments), "--part", "3"]
    parts = folder / "all.parquet.parts"
    process = subprocess.Popen(command, cwd=ROOT)
    end = time.monotonic() + 120
    while len([*parts.glob("[0-9]*.parquet")]) < 3 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in sorted(parts.glob("[0-9]*.parquet"))}
    assert 3 <= len(kept) < 20 and not (folder / "all.parquet").exists()
    # What was done is not read again.
    for path in [folder / f"many {n}.png" for n in range(6)]:
        path.write_bytes(b"gone")
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    found = content(folder / "all.parquet")
    assert sorted(line for line, _ in found.values()) == [*range(2, 62)] and not parts.exists()
