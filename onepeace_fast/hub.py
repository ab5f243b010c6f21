"""Repositories of the Hugging Face Hub: a model's files from there and to there."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onepeace_fast.installation import optional

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILES = ("config.json", "model.safetensors", "*.pt", "*.pkl")


def download(name: str, revision: str | None) -> Path:
    """The folder with a repository's model files, in the Hub's cache.

    Raises:
        ValueError: the Hub has no such repository or revision, or does not answer; one line.
        ImportError: huggingface_hub is missing.
    """
    hub = optional("huggingface_hub", "hub")
    try:
        return Path(hub.snapshot_download(name, revision=revision, allow_patterns=list(FILES)))
    except Exception as error:  # its errors are of many kinds: of the repository, of the network, of the cache
        raise ValueError(f"{name}: expected a repository of the Hugging Face Hub, got {_line(error)}") from None


def upload(name: str, save: Callable[[Path], None], private: bool | None) -> str:
    """Write a model's folder into a repository, which is made where there is none; the address of the commit.

    Raises:
        ValueError: the Hub refuses it, or does not answer; one line.
        ImportError: huggingface_hub is missing.
    """
    hub = optional("huggingface_hub", "hub")
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        try:
            hub.create_repo(name, private=private, exist_ok=True)
            commit: Any = hub.upload_folder(repo_id=name, folder_path=folder)
        except Exception as error:
            raise ValueError(f"{name}: expected a repository that can be written, got {_line(error)}") from None
    return str(commit.commit_url)


def _line(error: Exception) -> str:
    return f"{type(error).__name__} ({' '.join(str(error).split())[:200]})"
