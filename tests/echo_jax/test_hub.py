"""Models by repository id, from a hub on loopback that speaks real HTTP, through the real client and its cache.

The client is a process of its own: the address of the hub is fixed when huggingface_hub is imported.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from echo_jax import huggingface
from echo_jax.huggingface_find import INDEX_FILE
from tests.echo_jax.checkpoints import CONFIG, SHARD_BYTES, assert_same_bits, random_params
from tests.echo_jax.hub_server import Hub, Repository

ROOT = Path(__file__).resolve().parents[2]
OLD, NEW = "a" * 40, "b" * 40
CLIENT = """
import json, sys
from echo_jax import huggingface_find
for name in sys.argv[1:]:
    try:
        found = huggingface_find.find(name)
        print(json.dumps([str(found.directory), found.name, found.commit]))
    except FileNotFoundError as error:
        print(json.dumps(str(error)))
"""


def save_omni(folder: Path, seed: int) -> Path:
    """A model in several files, beside what a thinker does not need."""
    huggingface.save_pretrained(
        folder, CONFIG, random_params(seed=seed), max_shard_bytes=SHARD_BYTES
    )
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"]["talker.codec_head.weight"] = "talker.safetensors"
    (folder / INDEX_FILE).write_text(json.dumps(index))
    for name in ("talker.safetensors", "README.md", "spk_dict.pt"):
        (folder / name).write_text("large")
    (folder / "merges.txt").write_text("a b")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Files of two commits."""
    place = tmp_path_factory.mktemp("repository")
    return {OLD: save_omni(place / "old", 0), NEW: save_omni(place / "new", 1)}


@pytest.fixture
def hub(folders):
    refs = {"main": NEW, "v1": OLD, "try/longer": OLD}
    gated = Repository(folders, {"main": NEW}, gated=True)
    with Hub({"tiny/echo": Repository(dict(folders), refs), "tiny/gated": gated}) as served:
        yield served


def find(hub: Hub | str, cache: Path, *names: str, offline: bool = False) -> list[list[str] | str]:
    """For each name [directory, name, commit], or what was wrong."""
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
        "HF_ENDPOINT": hub if isinstance(hub, str) else hub.endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, *names],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(names)
    return found


def assert_is(found: list[str] | str, commit: str, folders: dict[str, Path]) -> None:
    directory, name, found_commit = found
    assert (name, found_commit) == (f"tiny/echo@{commit}", commit)
    expected = huggingface.load_pretrained(folders[commit])
    config, params = huggingface.load_pretrained(directory)
    assert config == expected[0]
    assert_same_bits(params, expected[1])
    assert (Path(directory) / "merges.txt").read_text() == "a b"


def test_a_repository_at_a_branch_a_tag_or_a_commit(hub, folders, tmp_path):
    names = [
        "tiny/echo",
        "tiny/echo@v1",
        "tiny/echo@try/longer",
        f"tiny/echo@{NEW}",
        "tiny/echo@v1",
    ]
    found = find(hub, tmp_path, *names)
    for one, commit in zip(found, [NEW, OLD, OLD, NEW, OLD], strict=True):
        assert_is(one, commit, folders)
    asked = hub.downloads()
    # Of each commit once, and nothing that a thinker does not need.
    assert all(asked.count(name) <= 2 for name in asked)
    assert not {"talker.safetensors", "README.md", "spk_dict.pt"} & set(asked)

    # The branch moves on: its name means another model now, the pinned name the same one.
    hub.repositories["tiny/echo"].refs["main"] = OLD
    hub.requests.clear()
    moved, pinned = find(hub, tmp_path, "tiny/echo", found[0][1])
    assert_is(moved, OLD, folders)
    assert_is(pinned, NEW, folders)
    assert not hub.downloads()


def test_offline_a_full_cache_is_enough(hub, folders, tmp_path):
    names = ["tiny/echo", "tiny/echo@v1", f"tiny/echo@{OLD}"]
    find(hub, tmp_path, *names)
    for endpoint, offline in ((hub, True), ("http://127.0.0.1:9", False)):
        hub.requests.clear()
        found = find(endpoint, tmp_path, *names, "tiny/echo@v2", offline=offline)
        for one, commit in zip(found, [NEW, OLD, OLD], strict=False):
            assert_is(one, commit, folders)
        assert found[3].startswith("tiny/echo@v2: no such directory, and the Hugging Face hub did")
        assert "\n" not in found[3]
        assert not hub.requests
    # A cache that lacks a file is not enough, and the file is named.
    missing = (
        Path(found[0][0])
        / sorted(json.loads((folders[NEW] / INDEX_FILE).read_text())["weight_map"].values())[0]
    )
    missing.unlink()
    (found,) = find(hub, tmp_path, "tiny/echo", offline=True)
    assert found.startswith("tiny/echo: ")
    assert missing.name in found
    assert "\n" not in found


def test_what_the_hub_does_not_give_is_one_clear_line(hub, tmp_path):
    found = find(
        hub,
        tmp_path,
        "tiny/echo@v7",
        "tiny/nothing",
        "tiny/gated",
        "tiny/echo@" + "c" * 40,
        "a/b--c",
    )
    start = "no such directory, and the Hugging Face hub did not give it"
    assert found[:3] == [
        f"tiny/echo@v7: {start}: the repository has no such branch, tag or commit",
        f"tiny/nothing: {start}: it has no such repository, or a private one (`hf auth login`)",
        f"tiny/gated: {start}: it is gated; accept its terms there and log in with `hf auth login`",
    ]
    assert (
        found[3]
        == f"tiny/echo@{'c' * 40}: {start}: the repository has no such branch, tag or commit"
    )
    assert found[4] == f"a/b--c: {start}: the name is none that it allows"
    (found,) = find("http://127.0.0.1:9", tmp_path, "tiny/echo")
    assert found.startswith(f"tiny/echo: {start}: ")
    assert "offline, or the connection broke?" in found
    assert "\n" not in found


def test_a_repository_without_a_model_is_named(hub, folders, tmp_path):
    bare = shutil.copytree(folders[NEW], tmp_path / "bare")
    (bare / "config.json").unlink()
    whole = shutil.copytree(folders[NEW], tmp_path / "whole")
    lacking = sorted(whole.glob("model-*.safetensors"))[1]
    lacking.unlink()
    for name, folder in (("bare", bare), ("lacking", whole)):
        hub.repositories[f"tiny/{name}"] = Repository({NEW: folder}, {"main": NEW})
    found = find(hub, tmp_path / "cache", "tiny/bare", "tiny/lacking")
    assert found[0] == "tiny/bare: the repository has no config.json"
    files = len(list(folders[NEW].glob("model-*")))
    assert found[1] == (
        f"tiny/lacking: 1 of {files} files of tensors are not in the cache, the first is {lacking.name}, and the "
        "Hugging Face hub did not give it: it has no such file"
    )


def test_a_download_that_breaks_off_goes_on(hub, tmp_path):
    """Large enough that the client has kept what came before."""
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    content = np.random.default_rng(0).bytes(50_000_000)
    (folder / "model.safetensors").write_bytes(content)
    hub.repositories["tiny/large"] = Repository({NEW: folder}, {"main": NEW})
    hub.breaks["model.safetensors"] = 2
    (found,) = find(hub, tmp_path / "cache", "tiny/large")
    assert (Path(found[0]) / "model.safetensors").read_bytes() == content
    ranges = [
        asked
        for method, path, asked in hub.requests
        if method == "GET" and path.endswith("model.safetensors")
    ]
    assert ranges[0] is None
    first, second = (int(asked.removeprefix("bytes=").removesuffix("-")) for asked in ranges[1:])
    assert 0 < first < second < len(content)


def test_a_download_that_never_arrives_is_no_model(hub, folders, tmp_path):
    name = sorted(folders[NEW].glob("model-*.safetensors"))[1].name
    hub.silent.add(name)
    for offline in (False, True):
        (found,) = find(hub, tmp_path, "tiny/echo", offline=offline)
        assert found.startswith("tiny/echo: 1 of ")
        assert f"the first is {name}, and the Hugging Face hub did not give it: " in found
        assert "\n" not in found
    hub.silent.clear()
    (found,) = find(hub, tmp_path, "tiny/echo")
    assert_is(found, NEW, folders)
