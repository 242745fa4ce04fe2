import importlib.util
import json

import pytest

from launch import compile_check

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v9:4x4"], "not one of v5e, v6e, v5p"),
        (["--topology", "v5e:4x4", "--tensor", "5"], "has 16 chips, not 3 x 5"),
        (["--topology", "v5e:4x4", "--data", "2"], "has 16 chips, not 2 x 4"),
        (["--topology", "v5e:4x4", "--batch", "63"], "--batch 63 cannot be divided over 4"),
        (["--topology", "v5e:4x4", "--admitted", "3"], "--admitted 3 cannot be divided over 4"),
        (["--model", "qwen"], "unknown model preset 'qwen'"),
    ],
)
@needs_libtpu
def test_what_cannot_be_compiled_is_refused_in_one_line(capsys, arguments, message):
    assert compile_check.main(arguments) == 2
    out, error = capsys.readouterr()
    assert not out
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "--batch 0: must be at least 1"),
        (["--prompt-tokens", "4096"], "leave some of the 4096 --positions"),
        (["--seconds", "0.005"], "give a multiple of 0.01"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit):
        compile_check.main(arguments)
    assert message in capsys.readouterr().err


def test_without_libtpu_the_command_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert compile_check.main([]) == 2
    assert "pip install 'jax[tpu]" in capsys.readouterr().err


@pytest.mark.slow
@needs_libtpu
def test_two_layers_at_full_width_decode_and_insert_in_place(capsys):
    """So many rows that no buffer of the cache fits in VMEM, where the compiler would keep it."""
    arguments = (
        "--topology v5e:4x4 --layers 2 --batch 1024 --positions 1024 --seconds 3 --admitted 8"
    )
    status = compile_check.main(arguments.split())
    out, error = capsys.readouterr()
    assert status == 0, error
    assert out.splitlines()[-1].startswith("| v5e:4x4, 4 x 4 | yes |")


@pytest.mark.slow
@needs_libtpu
def test_a_program_too_large_for_a_chip_is_said_to_be(capsys):
    arguments = (
        "--topology v5e:4x4 --layers 2 --batch 16384 --positions 4096 --seconds 3 --admitted 8"
    )
    assert compile_check.main(arguments.split()) == 1
    assert "of a chip's 15.75" in capsys.readouterr().err


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(("stage", "programs"), [("sft", 1), ("grpo", 2)])
def test_two_layers_at_full_width_train(capsys, tmp_path, stage, programs):
    table = tmp_path / "table.json"
    arguments = [
        f"--config=configs/{stage}.py:paper",
        "--topology=v5e:4x4",
        "--layers=2",
        f"--json={table}",
    ]
    assert compile_check.main(arguments) == 0
    out, _ = capsys.readouterr()
    rows = json.loads(table.read_text())
    assert len(rows) == programs == len(out.splitlines()) - 2
    for row in rows:
        assert row["peak_gib"] < row["hbm_gib"]
        # Recomputing a layer's forward pass costs a third at most; the head's costs as much again.
        assert row["hardware_flops"] <= 1.35 * row["model_flops"]
        # Weights and their gradients travel, activations and logits do not.
        assert sum(row["sent"].values()) < 1.5 * row["least_sent"]


@needs_libtpu
def test_configs_that_cannot_be_compiled_are_refused_in_one_line(capsys):
    for arguments, message in (
        (["--config=configs/sft.py:tiny", "--topology=v5e:4x4"], "config.data.max_tokens=0"),
        (["--config=configs/sft.py:paper", "--topology=v5e:3x3"], "the TPU compiler says"),
        (
            ["--config=configs/sft.py:paper", "--topology=v5e:4x4", "--config.mesh.tensor=5"],
            "is no mesh of the 16 devices",
        ),
        (
            ["--config=configs/sft.py:paper", "--topology=v5e:4x4", "--config.batch_size=12"],
            "config.batch_size=12",
        ),
    ):
        assert compile_check.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
