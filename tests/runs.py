"""Small training runs: their data, their commands, and what they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile
from ml_collections import ConfigDict

from data.records import EaqaRecord
from echo_jax import huggingface
from tests.models import citing_model, citing_tokenizer

ROOT = Path(__file__).resolve().parents[1]


def record(number: int) -> EaqaRecord:
    return EaqaRecord(
        id=f"r{number}",
        audio_path=f"{number}.wav",
        duration_s=3.0,
        question="What?",
        choices=("ok", "A"),
        answer="ok",
        cot="<think> <seg>1.0, 2</seg> ok</think><answer>ok</answer>",
        kind="order",
        events=(),
        evidence=(),
        difficulty=1,
        split="train",
        source="test",
    )


def make_place(folder: Path, records: int = 5) -> Path:
    """Fills a folder with sound files, records and a model directory."""
    rng = np.random.default_rng(0)
    rows = [record(number) for number in range(records)]
    for row in rows:
        soundfile.write(folder / row.audio_path, rng.normal(0, 0.1, 48_000), 16_000)
    lines = [json.dumps(row.to_json()) + "\n" for row in rows]
    (folder / "records.jsonl").write_text("".join(lines))
    tokenizer = citing_tokenizer()
    config, params = citing_model(tokenizer)
    huggingface.save_pretrained(folder / "model", config, params, tokenizer)
    return folder


def fill(config: ConfigDict, place: Path) -> ConfigDict:
    """The config of a stage, over the data and the model of `make_place`."""
    config.init_from = str(place / "model")
    config.data.root = str(place)
    config.data.records = str(place / "records.jsonl")
    config.data.clip_seconds = 3.0
    if config.stage == "sft":
        config.listening_fraction = 0.0  # there are no labelled scenes here
    return config


def arguments(stage: str, place: Path, workdir: Path, *more: str) -> list[str]:
    """The same as flags of launch.train."""
    return [
        f"--config=configs/{stage}.py:test",
        f"--workdir={workdir}",
        f"--config.init_from={place / 'model'}",
        f"--config.data.root={place}",
        f"--config.data.records={place / 'records.jsonl'}",
        "--config.data.clip_seconds=3.0",
        *(["--config.listening_fraction=0.0"] if stage == "sft" else []),
        *more,
    ]


def start(*given: str, module: str = "launch.train") -> subprocess.Popen[str]:
    """Starts a command of the checkout; both its outputs are in `stdout`."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *given],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def read_lines(path: Path) -> list[dict]:
    """The records of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
