"""Settings of every test process: CPU, and compiled programs kept between runs."""

import importlib.util
import os
import pathlib

# Before jax is imported anywhere: these are read once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_CACHE = pathlib.Path(__file__).resolve().parents[1] / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch, beside another test process on few cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach out

# torch is the oracle of these; where it cannot be installed the others still run, and the header says what did not.
_NEED_TORCH = (
    "echo_jax/sampler/test_transformers.py",
    "echo_jax/test_huggingface.py",
    "echo_jax/test_parity.py",
)
_HAS_TORCH = importlib.util.find_spec("torch") is not None
collect_ignore = [] if _HAS_TORCH else list(_NEED_TORCH)


def pytest_report_header() -> list[str]:
    """Names the tests that are left out."""
    return [] if _HAS_TORCH else [f"torch is not installed, left out: {', '.join(_NEED_TORCH)}"]
