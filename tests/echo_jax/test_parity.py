"""Log-mel, audio tower and logits equal transformers'; see tests/parity.py."""

from pathlib import Path

import pytest

from tests import parity


def check(case: parity.Case, directory: Path) -> None:
    errors = parity.measure(case, directory)
    assert errors.mel < 1e-4, errors
    assert errors.tower < 1e-4, errors
    assert errors.logits < 1e-4, errors
    assert errors.batch < 1e-5, errors


def test_the_cases_differ_in_every_size():
    fields = set(vars(parity.CASES[0])) - {"seed", "mels", "rope_theta", "rms_norm_eps", "tied"}
    for field in fields:
        values = [getattr(case, field) for case in parity.CASES]
        assert len(set(values)) >= 3, f"{field}: {values}"
    seconds = [s for case in parity.CASES for row in case.rows for s in row]
    assert min(seconds) == 0.1
    assert max(seconds) == 40.0


@pytest.mark.parametrize(
    "case",
    [*parity.CASES[:3], *(pytest.param(case, marks=pytest.mark.slow) for case in parity.CASES[3:])],
    ids=lambda case: case.name,
)
def test_equals_transformers(case, tmp_path):
    check(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_random_sizes_equal_transformers(seed, tmp_path):
    check(parity.random_case(seed), tmp_path)
