"""Habits of the house: docstrings, no prints, names that say something, a picture that shows every module."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator

import pytest

from tests.architecture.picture import with_current_list
from tests.architecture.source_tree import PICTURE, ROOT, modules, relative

FILES = [pytest.param(path, tree, id=relative(path)) for path, tree in modules().values()]
_PLACES = re.compile(
    # a developer's machine, and hosts of package registries (their clients know them)
    r"(?<![\w.])/(?:work|root|home/\w+)/|pypi\.org|pythonhosted\.org|npmjs\.|debian\.org|[\w.-]*(?:artifactory|nexus|devpi)[\w.-]*\.\w+/"
)


@pytest.mark.parametrize(("path", "tree"), FILES)
def test_a_module_opens_with_a_docstring(path, tree) -> None:
    assert ast.get_docstring(tree), f"{relative(path)} has no docstring"


@pytest.mark.parametrize(("path", "tree"), FILES)
def test_a_module_prints_nothing_and_imports_no_star(path, tree) -> None:
    for node in ast.walk(tree):
        is_print = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        assert not is_print, f"{relative(path)}:{node.lineno} prints; use craken.log"
        is_star = isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
        assert not is_star, f"{relative(path)}:{node.lineno} imports *"


@pytest.mark.parametrize(("path", "tree"), FILES)
def test_a_module_has_a_name_that_says_what_it_is(path, tree) -> None:
    assert path.stem not in {"utils", "util", "helpers", "helper", "common", "misc"}, relative(path)


@pytest.mark.parametrize(("path", "tree"), [file for file in FILES if file.values[0].name == "__init__.py"])
def test_a_package_only_re_exports(path, tree) -> None:
    for node in tree.body[1:]:
        lazy = isinstance(node, ast.FunctionDef) and node.name == "__getattr__"
        typing = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        constant = isinstance(node, ast.Assign | ast.AnnAssign) and _is_literal(node.value)
        assert lazy or typing or constant or isinstance(node, ast.Import | ast.ImportFrom), (
            f"{relative(path)}:{node.lineno}"
        )


def _is_literal(node: ast.expr | None) -> bool:
    return node is not None and not any(isinstance(part, ast.Call | ast.Lambda) for part in ast.walk(node))


def test_the_picture_lists_every_module_with_its_sentence() -> None:
    text = PICTURE.read_text()
    assert text == with_current_list(text), "docs/architecture.md is stale: run python -m tests.architecture.picture"


def _stage_tests(tree: ast.Module) -> Iterator[int]:
    """Yield the lines that compare something called stage with an integer."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Compare):
            continue
        sides = [node.left, *node.comparators]
        names = [
            side.attr if isinstance(side, ast.Attribute) else side.id
            for side in sides
            if isinstance(side, ast.Attribute | ast.Name)
        ]
        numbers = [
            part
            for side in sides
            for part in ast.walk(side)
            if isinstance(part, ast.Constant) and type(part.value) is int
        ]
        if numbers and any(name == "stage" or name.endswith("_stage") for name in names):
            yield node.lineno


@pytest.mark.parametrize(
    ("path", "tree"), [file for file in FILES if relative(file.values[0]) != "craken/zero/plans/policy.py"]
)
def test_only_the_policy_tests_a_stage_number(path, tree) -> None:
    assert not list(_stage_tests(tree)), f"{relative(path)}: lines {list(_stage_tests(tree))}; ask the policy's row"


def test_the_ruler_sees_stage_numbers() -> None:
    source = "a.stage == 2\nzero_stage >= 1\nstage in (1, 2)\nstage == other\nstages == 2\n"
    assert list(_stage_tests(ast.parse(source))) == [1, 2, 3]


def test_no_tracked_file_names_a_machine_or_a_registry_host() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    files = [ROOT / name for name in tracked if name and name != relative(ROOT / "tests/architecture/test_hygiene.py")]
    found = [
        f"{relative(path)}:{number}: {match.group()}"
        for path in files
        if path.is_file()
        for number, line in enumerate(path.read_text(errors="ignore").splitlines(), 1)
        if (match := _PLACES.search(line))
    ]
    assert not found, "\n".join(found)
