"""Settings of every test process: CPU, and compiled programs kept between runs."""

import os
import pathlib

# Before jax is imported anywhere: these are read once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_CACHE = pathlib.Path(__file__).resolve().parents[1] / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch, beside another test process on few cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach out
