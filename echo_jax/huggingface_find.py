"""Where a model lies: a directory, the workdir of a finished stage, or a repository on the Hugging Face hub.

Of a repository only the small files and the shards that hold tensors of the thinker are downloaded, by huggingface_hub
and into its cache, all from one commit.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Parts of a whole Omni checkpoint that a thinker for sound does not have.
_IGNORED_PREFIXES = ("thinker.visual.", "visual.", "talker.", "token2wav.")
_SMALL_FILES = ("*.json", "merges.txt", "*.jinja")
# owner/name or owner/name@revision; a revision may hold slashes (refs/pr/1).
_REPO_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[^\s@]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclasses.dataclass(frozen=True)
class Found:
    """A model that is there.

    Attributes:
      directory: holds config.json.
      name: finds the same model again: the path as given, or owner/name@COMMIT for a repository.
      commit: which commit of the repository the directory holds, None for a path.
    """

    directory: Path
    name: str
    commit: str | None = None


def find(path_or_repo_id: str | os.PathLike[str]) -> Found:
    """Finds the model behind a path or a repository id, and downloads what is not in the cache.

    Args:
      path_or_repo_id: a model directory; the workdir of a finished training stage (its `export` is meant); or
        `owner/name` on the hub, with `@revision` behind it for a branch, tag or commit other than the newest of main.
        Where the hub cannot be reached, what the cache holds of that revision is taken if it is whole.

    Raises:
      FileNotFoundError: nothing there, or no model in it; one line that names the path.
    """
    name = os.fspath(path_or_repo_id)
    path = Path(name).expanduser()
    if path.is_dir():
        for candidate in (path, path / "export"):
            if (candidate / "config.json").is_file():
                return Found(candidate, name)
        raise FileNotFoundError(
            f"{path} holds no model: neither config.json nor export/config.json "
            "(a training workdir has export/ once its stage has finished)"
        )
    if path.exists():
        raise FileNotFoundError(
            f"{path} is a file; give the model directory that holds config.json"
        )
    if given := _REPO_ID.fullmatch(name):
        return _download(given["repo"], given["revision"])
    raise FileNotFoundError(
        f"{name}: no such directory, and not a repository id of the form owner/name or owner/name@revision"
    )


def resolve(path_or_repo_id: str | os.PathLike[str]) -> Path:
    """The directory of the model that `find` finds."""
    return find(path_or_repo_id).directory


def is_pinned(name: str) -> bool:
    """Whether a name is owner/name@COMMIT, which means the same model for ever."""
    given = _REPO_ID.fullmatch(name)
    return given is not None and _COMMIT.fullmatch(given["revision"] or "") is not None


def is_ignored(key: str) -> bool:
    """Whether a tensor of a checkpoint belongs to a part that the thinker does not have."""
    return key.startswith(_IGNORED_PREFIXES)


def needed_shards(index: Path) -> list[str]:
    """Shard files of an index that hold at least one tensor of the thinker."""
    return sorted({file for key, file in weight_map(index).items() if not is_ignored(key)})


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard file, as an index says.

    Raises:
      ValueError: the file is no index.
    """
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        return dict(content["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{index} is not a safetensors index (no weight_map): {error!r}"
        ) from error


def _download(repo_id: str, revision: str | None) -> Found:
    """Downloads (or finds in the cache) the parts of a hub repository that a thinker needs."""
    import huggingface_hub

    name = repo_id if revision is None else f"{repo_id}@{revision}"

    def fetch(at: str | None, *patterns: str) -> Path:
        return Path(
            huggingface_hub.snapshot_download(repo_id, revision=at, allow_patterns=list(patterns))
        )

    # What a failed connection raises has no name that all releases of huggingface_hub share.
    try:
        directory = fetch(revision, *_SMALL_FILES)
    except Exception as error:
        raise FileNotFoundError(
            f"{name}: no such directory, and the Hugging Face hub did not give it: {_reason(error)}"
        ) from error
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{name}: the repository has no config.json")
    index = directory / INDEX_FILE
    wanted = needed_shards(index) if index.is_file() else [SINGLE_FILE]

    def missing() -> list[str]:
        return [file for file in wanted if not (directory / file).is_file()]

    reason = "it has no such file"
    if missing():
        try:
            # From the same commit: somebody may push in between.
            fetch(directory.name, *wanted)
        except Exception as error:
            reason = _reason(error)
    if left := missing():
        raise FileNotFoundError(
            f"{name}: {len(left)} of {len(wanted)} files of tensors are not in the cache, the first is {left[0]}, "
            f"and the Hugging Face hub did not give it: {reason}"
        )
    return Found(directory, f"{repo_id}@{directory.name}", directory.name)


def _reason(error: Exception) -> str:
    """Why the hub gave nothing, in one line."""
    from huggingface_hub import errors

    known: tuple[tuple[type[Exception], str], ...] = (
        (
            errors.GatedRepoError,
            "it is gated; accept its terms there and log in with `hf auth login`",
        ),
        (
            errors.RepositoryNotFoundError,
            "it has no such repository, or a private one (`hf auth login`)",
        ),
        (errors.RevisionNotFoundError, "the repository has no such branch, tag or commit"),
        (errors.HFValidationError, "the name is none that it allows"),
    )
    for kind, words in known:
        if isinstance(error, kind):
            return words
    said = " ".join(str(error).split()) or type(error).__name__
    said = said if len(said) <= 300 else f"{said[:300]}..."
    return f"{said} (offline, or the connection broke? what has arrived is kept; run it again)"
