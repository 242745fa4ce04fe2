"""Damaged checkpoints: named, set aside, and never read as if they were whole."""

import logging
import shutil
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echo_jax.train.checkpoint import CheckpointError, Checkpoints, TrainState
from echo_jax.train.retention import Retention

WIDTH = 4096  # arrays large enough for files of their own
STEPS = (1, 2, 3)


def pipeline():
    dataset = grain.MapDataset.range(20).shuffle(seed=3).repeat(None).batch(4)
    # Hundreds of these are made here: none should read far ahead.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def state(step: int) -> TrainState:
    rng = np.random.default_rng(step)
    params = {"layer": {"kernel": jnp.asarray(rng.normal(size=(4, WIDTH)), jnp.float32)}}
    opt_state = ({"mu": jnp.full((WIDTH,), step, jnp.bfloat16), "count": jnp.int32(step)}, None)
    return TrainState(step=step, params=params, opt_state=opt_state, key=jax.random.key(step))


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """Three steps, after one, two and three batches."""
    folder = tmp_path_factory.mktemp("written") / "c"
    data = pipeline()
    with Checkpoints(folder, Retention(keep_last=3)) as checkpoints:
        for step in STEPS:
            next(data)
            checkpoints.save(state(step), data, {"name": "x"}, {"loss": step})
    return folder


def restored_step(folder: Path) -> int:
    """The step that a run goes on from; asserts that state and data are exactly those of that step."""
    data = pipeline()
    with Checkpoints(folder, Retention(keep_last=3)) as checkpoints:
        found = checkpoints.restore(state(0), data)
    right = state(found.step)
    for x, y in zip(
        jax.tree.leaves((found.params, found.opt_state, jax.random.key_data(found.key))),
        jax.tree.leaves((right.params, right.opt_state, jax.random.key_data(right.key))),
        strict=True,
    ):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    undisturbed = pipeline()
    for _ in range(found.step):
        next(undisturbed)
    np.testing.assert_array_equal(next(data), next(undisturbed))
    return found.step


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip(file: Path, share: float = 0.5, bit: int = 0) -> None:
    content = bytearray(file.read_bytes()) or bytearray(1)
    content[min(int(len(content) * share), len(content) - 1)] ^= 1 << bit
    file.write_bytes(content)


CHOSEN = {
    "data": lambda step: largest(step / "arrays"),
    "manifest": lambda step: step / "arrays" / "manifest.ocdbt",
    "host": lambda step: step / "host" / "metadata",
    "iterator": lambda step: step / "iterator" / "metadata",
}


@pytest.mark.parametrize("choose", CHOSEN.values(), ids=CHOSEN.keys())
@pytest.mark.parametrize("how", [cut, empty, flip, Path.unlink])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    choose, how, written, tmp_path, capfd, caplog
):
    folder = Path(shutil.copytree(written, tmp_path / "c"))
    how(choose(folder / "3"))
    damaged = {p.relative_to(folder / "3"): p.read_bytes() for p in files(folder / "3")}
    with caplog.at_level(logging.WARNING):
        assert restored_step(folder) == 2
    said = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith(f"checkpoint {folder / '3'} is damaged (")
    target = folder / "damaged" / "3"
    assert said[0].endswith(f"it is now {target}, and the run goes on from step 2")
    assert "\n" not in said[0]
    assert "Traceback" not in capfd.readouterr().err
    # Moved, not changed, and not met again.
    assert damaged == {p.relative_to(target): p.read_bytes() for p in files(target)}
    caplog.clear()
    assert restored_step(folder) == 2
    assert not [record for record in caplog.records if "damaged" in record.getMessage()]


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_damage_anywhere_is_either_harmless_or_found(written, tmp_path, capfd):
    outcomes: dict[int, list[str]] = {2: [], 3: []}
    damages = {
        "cut": cut,
        "empty": empty,
        "gone": Path.unlink,
        **{
            f"flip {share} {bit}": lambda file, s=share, b=bit: flip(file, s, b)
            for share, bit in ((0.0, 0), (0.3, 6), (0.8, 3), (1.0, 7))
        },
    }
    folder = tmp_path / "c"
    for file in files(written / "3"):
        for name, damage in damages.items():
            shutil.copytree(written, folder)
            where = file.relative_to(written)
            damage(folder / where)
            # The assertions on what is restored are in there.
            outcomes[restored_step(folder)].append(f"{where}: {name}")
            shutil.rmtree(folder)
    assert "Traceback" not in capfd.readouterr().err
    assert len(outcomes[2]) > 20
    print("\n".join(["harmless:", *outcomes[3]]))
    # What decides the values is in these, and any change of them is found.
    for name in ("host/metadata", "iterator/metadata", "arrays/manifest.ocdbt"):
        found = [outcome for outcome in outcomes[2] if outcome.startswith(f"3/{name}: ")]
        assert len(found) == len(damages), (name, found)


def test_missing_parts_and_empty_folders(written, tmp_path):
    for number, spoil in enumerate(
        (
            lambda step: shutil.rmtree(step / "arrays"),
            lambda step: shutil.rmtree(step / "host"),
            lambda step: shutil.rmtree(step / "iterator"),
            lambda step: [shutil.rmtree(step), step.mkdir()],
        )
    ):
        folder = Path(shutil.copytree(written, tmp_path / str(number)))
        spoil(folder / "3")
        assert restored_step(folder) == 2
        assert (folder / "damaged" / "3").is_dir()
        # The run reaches the step again, and its folder is damaged again.
        data = pipeline()
        with Checkpoints(folder, Retention(keep_last=3)) as checkpoints:
            checkpoints.save(state(3), data, {})
        spoil(folder / "3")
        assert restored_step(folder) == 2
        assert (folder / "damaged" / "3-1").is_dir()


def test_several_damaged_ones_are_passed_over(written, tmp_path):
    folder = Path(shutil.copytree(written, tmp_path / "c"))
    flip(largest(folder / "3" / "arrays"))
    cut(folder / "2" / "host" / "metadata")
    assert restored_step(folder) == 1
    assert sorted(path.name for path in (folder / "damaged").iterdir()) == ["2", "3"]


def test_a_checkpoint_under_the_name_of_another_step_is_damaged(written, tmp_path):
    folder = Path(shutil.copytree(written, tmp_path / "c"))
    (folder / "3").rename(folder / "4")
    assert restored_step(folder) == 2


def test_none_that_is_whole_is_an_error_and_nothing_is_moved(written, tmp_path):
    folder = Path(shutil.copytree(written, tmp_path / "c"))
    for step in STEPS:
        flip(largest(folder / str(step) / "arrays"))
    before = files(folder)
    for _ in range(2):
        with (
            Checkpoints(folder) as checkpoints,
            pytest.raises(CheckpointError, match="holds no checkpoint that is whole") as error,
        ):
            checkpoints.restore(state(0), pipeline())
        said = str(error.value)
        assert "(3: arrays: params/layer/kernel is not what was written; 2: " in said
        assert said.endswith("give another --workdir, or remove this folder to start anew")
        assert "\n" not in said
        assert files(folder) == before


def test_the_best_are_found_although_one_is_damaged(written, tmp_path):
    folder = Path(shutil.copytree(written, tmp_path / "c"))
    flip(folder / "1" / "host" / "metadata")
    best = Retention(keep_last=1, keep_best=1, best_metric="loss", best_mode="min")
    with Checkpoints(folder, best) as checkpoints:
        checkpoints.save(state(4), pipeline(), {}, {"loss": 9.0})
    assert sorted(path.name for path in folder.iterdir() if path.name.isdigit()) == ["2", "4"]
