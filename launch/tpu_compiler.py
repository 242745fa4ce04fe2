"""The TPU compiler of libtpu, which runs without a TPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import time
from typing import Any

import jax

from echo_jax.model.config import ThinkerConfig
from echo_jax.text.tokenizer import Tokenizer

# GiB that a program can use of a chip's memory, as the compiler's own message gives it when one does not fit.
HBM_GIB = {"v5e": 15.75, "v6e": 31.25, "v5p": 95.74}
# libtpu asks for these where there is no TPU to tell; the last lets several processes compile at a time.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class DoesNotFitError(RuntimeError):
    """A program needs more memory than a chip has."""


def prepare() -> None:
    """Lets libtpu compile without a TPU; call it before JAX has looked for devices.

    Raises:
      ValueError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"libtpu is not installed: pip install 'jax[tpu]=={jax.__version__}', in an environment of its own if this "
            "one is for another accelerator"
        )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Nothing runs on the TPU, and looking for one takes minutes.
    jax.config.update("jax_platforms", "cpu")


def topology_devices(topology: str) -> list[Any]:
    """The chips of a topology such as "v5e:4x4", to build a mesh on.

    Raises:
      ValueError: there is no such topology.
    """
    # Experimental: imported where it is needed, so that a change in JAX breaks this command alone.
    from jax.experimental import topologies

    if topology.partition(":")[0] not in HBM_GIB:
        raise ValueError(
            f"--topology {topology}: not one of {', '.join(HBM_GIB)}; give a generation and its chips, as in v5e:4x4"
        )
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:
        raise ValueError(f"--topology {topology}: the TPU compiler says: {error}") from None


def model_config(preset: str, layers: int | None, tokenizer: Tokenizer) -> ThinkerConfig:
    """A preset of the model's sizes, with fewer layers in both towers if asked."""
    config = ThinkerConfig.preset(preset, **tokenizer.config_ids)
    if layers is None:
        return config
    return dataclasses.replace(
        config,
        text=dataclasses.replace(config.text, num_layers=layers),
        audio=dataclasses.replace(config.audio, num_layers=layers),
    )


def compile_for(topology: str, name: str, lowered: Any) -> tuple[Any, float]:
    """Compiles a lowered function; returns it and the seconds that took.

    Raises:
      DoesNotFitError: it needs more memory than a chip has.
    """
    begin = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        size = re.search(r"\(([\d.]+)G\)?.{0,40}?\(([\d.]+)G\)", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not size:
            raise
        raise DoesNotFitError(
            f"{topology}: {name} needs {size[1]} GiB of a chip's {size[2]}; use more chips, a larger tensor axis or "
            "smaller batches"
        ) from None
    return compiled, time.perf_counter() - begin
