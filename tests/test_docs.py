"""The documents name only what exists, and their tables of config values are those of the configs.

python -m tests.test_docs   # writes the tables anew, after a change of a config
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from data.records import KINDS
from echo_jax.train import rewards
from eval import controls
from launch import demo

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
CONFIGS = ("base", "eval", "grpo", "scenes", "sft")
TABLE = re.compile(
    r"(<!-- differences: configs/(\w+)\.py:([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL
)


def load_config(name: str, *variant: str) -> ConfigDict:
    """The config of configs/NAME.py, the default one without a variant."""
    return importlib.import_module(f"configs.{name}").get_config(*variant)


def fields(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """All fields that are no group, by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            found |= fields(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def differences(name: str, variants: list[str]) -> str:
    """The table of the fields in which some variants of a config file differ."""
    sides = [fields(load_config(name, variant)) for variant in variants]
    rows = [f"| field | {' | '.join(f'`{variant}`' for variant in variants)} |"]
    rows.append("|---" * (len(variants) + 1) + "|")
    for field in sorted(set().union(*sides)):
        values = [f"`{side[field]!r}`" if field in side else "–" for side in sides]
        if len(set(values)) > 1:
            rows.append(f"| `{field}` | {' | '.join(values)} |")
    return "\n".join(rows) + "\n"


def with_tables(text: str) -> str:
    """The text with every table as the configs have it."""
    return TABLE.sub(
        lambda found: found[1] + differences(found[2], found[3].split()) + found[4], text
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_of_config_values_are_true(page):
    text = page.read_text(encoding="utf-8")
    assert text == with_tables(text), "python -m tests.test_docs writes the tables anew"


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m ([\w.]+)", TEXT))))
def test_modules_exist(module):
    found = importlib.util.find_spec(module)
    assert found is not None
    if found.submodule_search_locations is not None:
        assert importlib.util.find_spec(f"{module}.__main__") is not None


@pytest.mark.parametrize(
    ("name", "variant"), sorted(set(re.findall(r"configs/(\w+)\.py(?::(\w+))?", TEXT)))
)
def test_config_variants_build(name, variant):
    assert name in CONFIGS
    assert isinstance(load_config(name, *filter(None, [variant])), ConfigDict)


def test_config_fields_exist():
    known: set[str] = set()
    for name in CONFIGS:
        for field in fields(load_config(name)):
            parts = field.split(".")
            known |= {".".join(parts[: i + 1]) for i in range(len(parts))}
    named = set(re.findall(r"\bconfig\.([a-z_0-9]+(?:\.[a-z_0-9]+)*)", TEXT)) - {"json"}
    assert len(named) > 10
    assert named <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_exist(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / link).exists(), link
    folders = "|".join(p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith("."))
    for path in re.findall(rf"`((?:{folders})/[\w./-]+)`", text):
        assert path.startswith("runs/") or (ROOT / path).exists(), path


def test_tables_of_names_are_complete():
    data, grpo, evaluation = (
        (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        for name in ("data", "grpo", "evaluation")
    )
    kinds = re.search(r"\| kind \| asks \|\n\|---\|---\|\n((?:\|.*\n)+)", data)
    assert kinds is not None
    listed = [cell for row in kinds[1].splitlines() for cell in row.split("|")[1].split(",")]
    assert sorted(cell.strip() for cell in listed) == sorted(KINDS)
    for name in rewards.REWARDS:
        assert f"`{name}`" in grpo, name
    for part in rewards.PARTS:
        assert f"`reward/{part}`" in grpo, part
    for name in controls.CONTROLS:
        assert f"| `{name}` |" in evaluation, name


def test_rows_of_the_demo_are_explained():
    evaluation = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| ([A-E]\S*) \|", evaluation, re.MULTILINE)
    assert listed == [letter for letter, *_ in demo.ROWS]


if __name__ == "__main__":
    for document in PAGES:
        document.write_text(with_tables(document.read_text(encoding="utf-8")), encoding="utf-8")
