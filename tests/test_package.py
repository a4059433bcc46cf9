"""What is installed: the contents of the wheel, and the types that a user's own checker sees in it. And how the
package is laid out: imports never run upwards, no file is long.

Types of the package itself are checked by `make lint`.
"""

import ast
import graphlib
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.Path:
    """The wheel, built without a network from a copy, since a build leaves files behind."""
    if int(version("setuptools").split(".")[0]) < 77:
        pytest.skip("needs setuptools 77 or later")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("arpo_trl", "tests", "examples", "docs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", target, source], check=True)
    (file,) = target.iterdir()
    return file


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "arpo_trl").rglob("*.py")}
    page = ("viewer.html", "viewer.css", "tree.js", "viewer.js", "distributions.js")
    data = {"arpo_trl/py.typed", *(f"arpo_trl/viewer/{name}" for name in page)}

    assert {name for name in names if ".dist-info/" not in name} == ours | data
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_every_extra_is_in_the_wheel(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
    lines = archive.read(metadata).decode().splitlines()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    assert {line.removeprefix("Provides-Extra: ") for line in lines if line.startswith("Provides-Extra")} == set(
        extras
    )


USERS_SCRIPT = """\
from typing import assert_type

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.rewards import arpo_reward
from arpo_trl.tools import tool

def look_up(word: str) -> str:
    return word

args = ARPOConfig(output_dir="out", branch_factor=2)
assert_type(args.branch_factor, int)
trainer = ARPOTrainer("model", arpo_reward, args, tools=[tool(look_up, retries=1)])
assert_type(trainer, ARPOTrainer)
assert_type(trainer.args, ARPOConfig)
ARPOConfig(output_dir="out", branch_factor="two")  # wrong
ARPOTrainer("model", args={"branch_factor": 2})  # wrong
"""


def test_a_users_checker_sees_types(wheel, tmp_path):
    pytest.importorskip("mypy")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    script = tmp_path / "script.py"
    script.write_text(USERS_SCRIPT)
    settings = tmp_path / "mypy.ini"
    # What the classes inherit takes minutes to read, and is not what is tested
    settings.write_text(
        "[mypy]\nfollow_imports = silent\n[mypy-trl.*,transformers.*,torch.*]\nfollow_imports = skip\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file", settings, "--no-error-summary", "--hide-error-context"]
    environment = {**os.environ, "MYPYPATH": str(tmp_path / "installed")}

    answer = subprocess.run([*command, script.name], cwd=tmp_path, env=environment, capture_output=True, text=True)

    wrong = [number for number, line in enumerate(USERS_SCRIPT.splitlines(), 1) if line.endswith("# wrong")]
    errors = [line for line in answer.stdout.splitlines() if " error: " in line]
    assert [int(line.split(":")[1]) for line in errors] == wrong, answer.stdout + answer.stderr


# -------------------------------------------------------------------------------------------------------------- layout

# From the ground up. A file imports from its own part (a folder, or a file beside the folders) and from the layers
# below.
LAYERS = [
    {"arpo_trl", "named", "plain_data", "random_state", "source_code"},  # the package's face has its version
    {"execution"},
    {"tools", "protocols", "rewards", "scoring", "advantages", "checkpoints"},
    {"data", "rollout"},
    {"config"},
    {"evaluation", "viewer"},
    {"reporting", "resilience", "checks", "model_card"},
    {"trainer"},
]
SOURCES = sorted((ROOT / "arpo_trl").rglob("*.py"))


def module_name(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


MODULES = {module_name(path): path for path in SOURCES}


def imported(path: Path) -> set[tuple[str, ...]]:
    """
    The modules of the package that a file imports anywhere, in functions too; what only type checkers read is not.
    """
    tree = ast.parse(path.read_text("utf-8"))
    checked = [item for item in ast.walk(tree) if isinstance(item, ast.If) and "TYPE_CHECKING" in ast.dump(item.test)]
    skipped = {id(below) for item in checked for statement in item.body for below in ast.walk(statement)}
    package = module_name(path) if path.name == "__init__.py" else module_name(path)[:-1]
    found = set()
    for item in ast.walk(tree):
        if id(item) in skipped:
            continue
        if isinstance(item, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in item.names}
        elif isinstance(item, ast.ImportFrom):
            base = package[: len(package) + 1 - item.level] if item.level else ()
            base += tuple(item.module.split(".")) if item.module else ()
            found |= {(*base, alias.name) if (*base, alias.name) in MODULES else base for alias in item.names}
    return {name for name in found if name in MODULES}


def part(name: tuple[str, ...]) -> str:
    return name[1] if len(name) > 1 else name[0]


def test_every_part_of_the_package_has_one_layer():
    assert sorted(name for layer in LAYERS for name in layer) == sorted({part(name) for name in MODULES})


@pytest.mark.parametrize("name", MODULES, ids=".".join)
def test_imports_never_run_upwards(name):
    layer_of = {member: index for index, layer in enumerate(LAYERS) for member in layer}
    others = {part(target) for target in imported(MODULES[name])} - {part(name)}
    assert [other for other in sorted(others) if layer_of[other] >= layer_of[part(name)]] == []


def test_no_module_imports_itself_through_others():
    graph = {name: imported(path) - {name} for name, path in MODULES.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, with the modules of the circle


@pytest.mark.parametrize(
    "path",
    [path for path in sorted((ROOT / "arpo_trl").rglob("*.*")) if path.suffix in (".py", ".js", ".css", ".html")],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_file_is_long(path):
    assert len(path.read_text("utf-8").splitlines()) <= 500
