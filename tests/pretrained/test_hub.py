"""The Hugging Face Hub, by a stand-in that keeps repositories in a folder."""

import shutil
from types import SimpleNamespace

import pytest
from data._refused import refused
from models._encoder_only import retrieval
from pretrained._files import checkpoint_of, write

from onepeace_fast import from_pretrained, hub


@pytest.fixture
def repositories(tmp_path, monkeypatch):
    """The folder of the Hub's repositories, and what was asked of it."""
    asked = []

    def snapshot_download(name, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        if not (tmp_path / name).is_dir():
            raise OSError("404 Client Error.\n\nRepository Not Found for url: https://hub")
        return str(tmp_path / name)

    def create_repo(name, private, exist_ok):
        asked.append((name, private, exist_ok))

    def upload_folder(repo_id, folder_path):
        shutil.copytree(folder_path, tmp_path / repo_id)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    client = SimpleNamespace(snapshot_download=snapshot_download, create_repo=create_repo, upload_folder=upload_folder)
    extras = []
    monkeypatch.setattr(hub, "optional", lambda module, extra: extras.append((module, extra)) or client)
    yield SimpleNamespace(folder=tmp_path, asked=asked, extras=extras)
    assert set(extras) <= {("huggingface_hub", "hub")}


def test_a_pushed_model_is_loaded_by_its_name(repositories):
    model = retrieval("text")
    assert model.push_to_hub("someone/model", private=True) == "https://hub/someone/model/commit/1"
    loaded = from_pretrained("someone/model", revision="v1")
    assert loaded.config == model.config
    assert all((value == loaded.state_dict()[name]).all() for name, value in model.state_dict().items())
    patterns = ["config.json", "model.safetensors", "*.pt", "*.pkl"]
    assert repositories.asked == [("someone/model", True, True), ("someone/model", "v1", patterns)]
    assert repositories.extras == [("huggingface_hub", "hub")] * 2


def test_a_repository_with_a_public_checkpoint_is_loaded(repositories):
    (repositories.folder / "someone" / "public").mkdir(parents=True)
    write(repositories.folder / "someone" / "public" / "one-peace.pt", checkpoint_of(retrieval("text")))
    assert from_pretrained("someone/public").config.encoder.modalities == ("text",)


def test_a_repository_that_is_not_there_is_refused_in_one_line(repositories):
    line = refused(
        lambda: from_pretrained("someone/else"), "someone/else: expected a repository", "OSError (404 Client"
    )
    assert line.endswith("Repository Not Found for url: https://hub)")


def test_what_is_not_saved_is_not_pushed(repositories):
    model = retrieval("text")
    model.text_proj.weight = model.encoder.fusion_model.layers[0].self_attn.q_proj.weight
    refused(lambda: model.push_to_hub("someone/model"), "model: ", "tied")
    assert repositories.asked == []


def test_a_path_is_never_asked_of_the_hub(repositories, tmp_path):
    refused(lambda: from_pretrained(tmp_path / "a" / "b"), tmp_path, "nothing there")
    for name in ("nothing.pt", "./a/b", "a/b/c", "/a/b"):
        refused(lambda name=name: from_pretrained(name), name.removeprefix("./"), "nothing there")
    assert repositories.asked == []
