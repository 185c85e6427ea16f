"""Small files on the Hugging Face Hub: recipes, and artifacts beside a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from foveate.core.errors import FoveateError

CARD = "README.md"


def is_repo(text: str) -> bool:
    """Whether a text is written like the name of a repository, ``user/name``."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text) is not None


def fetch(repo: str, file: str, revision: str | None = None, token: str | bool | None = None) -> Path:
    """A file of the repository ``user/name``, downloaded or found in the cache.

    Args:
        repo: the repository.
        file: path in it.
        revision: branch, tag or commit; the main branch if None.
        token: of the Hub; the one that is logged in if None.

    Raises:
        FoveateError: if there is no such repository or file, or the Hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, file, revision=revision, token=token))
    except Exception as error:
        raise _refused(f"Hub {repo!r}: {file} cannot be fetched", error) from error


def push(
    repo: str, files: Mapping[str, bytes], card: str, message: str, private: bool | None = None, token: str | None = None
) -> str:
    """Write ``files`` into the repository ``user/name`` in one commit, and make it if it is not there.

    Args:
        repo: the repository.
        files: content by path in it.
        card: the text of its card, written where it has none.
        message: of the commit.
        private: whether only you may see a repository that is made; the account's default if None.
        token: of the Hub; the one that is logged in if None.

    Returns:
        The address of the commit.

    Raises:
        FoveateError: if the Hub refuses or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData

    api = HfApi(token=token)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if not api.file_exists(repo, CARD):
            data = ModelCardData(library_name="foveate", tags=["foveate", "vision-language"])
            files = {**files, CARD: str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{card}")).encode()}
        operations = [CommitOperationAdd(path, content) for path, content in files.items()]
        return str(api.create_commit(repo, operations, commit_message=message).commit_url)
    except Exception as error:
        raise _refused(f"Hub {repo!r}: cannot be written to", error) from error


def _refused(what: str, error: Exception) -> FoveateError:
    """The library has a dozen kinds of errors for this, of no common kind, some of many lines."""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return FoveateError(f"{what} ({reason}); check the name, the connection and your login (hf auth login)")
