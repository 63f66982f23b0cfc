"""The docs say what the code does, and the code is laid out as the docs say."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from conftest import REPO
from hydra import compose, initialize_config_module

from sage import cli, config

PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
# From the top down. What is on a line imports from the lines below it, never from its own line or above.
LAYERS = (
    "__main__",
    "cli",
    "advice",
    "sweeps launch worker",
    "commands",
    "reporting",
    "train",
    "training",
    "static_curricula baseline_scorers",
    "curriculum",
    "scorers order",
    "losses",
    "answering",
    "model",
    "data",
    "config",
    "util",
)
DEPTH = {name: depth for depth, names in enumerate(LAYERS) for name in names.split()}
SAGE = REPO / "sage"
FILES = sorted(file for file in SAGE.rglob("*.py") if "assets" not in file.parts)


def imports(file: Path) -> set[str]:
    """Dotted names of all that a file imports, in functions too, except imports for type checkers."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative import"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text()))
    return found


def room(file: Path) -> str:
    """The folder or top-level module of sage that a file belongs to."""
    return file.relative_to(SAGE).parts[0].removesuffix(".py")


def modules_of(file: Path) -> set[str]:
    """Dotted names of the modules of sage that a file imports."""
    known = {".".join(f.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__") for f in FILES}
    named = {name for name in imports(file) if name.split(".")[0] == "sage"}
    return {name if name in known else name.rpartition(".")[0] for name in named} & known


def test_every_room_has_a_layer():
    assert sorted(DEPTH) == sorted({room(file) for file in FILES} - {"__init__"})


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SAGE)))
def test_imports_point_downwards(file):
    for name in modules_of(file) - {"sage"}:
        target = name.split(".")[1]
        if target != room(file):
            assert DEPTH[room(file)] < DEPTH[target], f"{file} imports upwards or sideways: {name}"


def test_no_circle_of_imports():
    """Protects the reading order inside a folder, where layers do not reach."""
    ahead = {
        ".".join(f.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__"): modules_of(f)
        for f in FILES
    }
    while free := [name for name, targets in ahead.items() if not targets & (ahead.keys() - {name})]:
        for name in free:
            del ahead[name]
    assert not ahead, f"a circle among {sorted(ahead)}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SAGE)))
def test_no_file_is_longer_than_a_reader_can_hold(file):
    assert len(file.read_text().splitlines()) <= 350


def test_only_the_engine_imports_deepspeed():
    users = [
        file.name
        for file in sorted((REPO / "sage").rglob("*.py"))
        if any(name.split(".")[0] == "deepspeed" for name in imports(file))
    ]
    assert users == ["engine.py"]


def test_config_reference_is_current():
    spec = importlib.util.spec_from_file_location(
        "config_reference", REPO / "scripts" / "config_reference.py"
    )
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert (REPO / "docs" / "config.md").read_text() == script.reference(), "run `make docs`"


def test_layout_picture_names_every_room_once():
    picture = (REPO / "README.md").read_text().split("## Layout", 1)[1].split("```")[1]
    named = re.findall(r"^  (\w+)(?:\.py|/) +\S", picture, re.M)
    assert sorted(named) == sorted([*DEPTH, "assets"])
    for folder in ("conf/", "scripts/", "tests/", "docs/", "benchmarks/"):
        assert re.search(rf"^{folder} +\S", picture, re.M), folder


def commands(program: str) -> list[tuple[str, list[str]]]:
    """(page, words) of every line in a code block, every `inline` command and every line of a help text."""
    found = []
    for page in PAGES:
        text = page.read_text()
        blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
        prose = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.M | re.S)
        lines = [line for block in blocks for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", prose)
        for line in lines:
            words = shlex.split(line, comments=True) if line.startswith(f"{program} ") else []
            if words[:1] == [program]:
                found.append((page.name, words))
    for file in sorted((REPO / "conf").glob("*.yaml")):
        lines = re.findall(rf"^ +({program} .*?)(?:  .*)?$", file.read_text(), re.M)
        found += [(file.name, shlex.split(line)) for line in lines if ":" not in line.split()[1]]
    return found


def test_make_targets_in_the_docs_exist():
    targets = set(re.findall(r"^([a-z]+):", (REPO / "Makefile").read_text(), re.M))
    quoted = {word for _, words in commands("make") for word in words[1:] if "=" not in word}
    assert {"demo", "test"} <= quoted <= targets


@pytest.mark.parametrize("page, words", commands("sage"), ids=lambda value: " ".join(value).replace("/", ":"))
def test_sage_commands_in_the_docs_compose(page, words):
    assert words[1] in cli.COMMANDS
    if words[1] not in config.SCHEMAS or words[2:] == [] or words[2].startswith("["):
        return
    overrides = [
        word for word in words[2:] if "=" in word and "<" not in word and not word.startswith("install=")
    ]
    if "-m" in words:  # a sweep: its first job
        overrides = [re.sub(r"^([^=\[{]+=[^,\[{]+),.*", r"\1", word) for word in overrides]
    with initialize_config_module("sage.conf", version_base="1.3"):
        compose(words[1].replace("-", "_"), overrides)


def test_files_in_the_docs_exist():
    for page in PAGES:
        for path in re.findall(
            r"\b((?:scripts|docs|tests|conf|sage|benchmarks)/[\w./-]+\.\w+)", page.read_text()
        ):
            assert (REPO / path).exists() or (page.parent / path).exists(), f"{page.name}: {path}"
