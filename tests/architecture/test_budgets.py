"""Sizes: short files, functions and parameter lists; what is over stands in waivers.txt with its reason."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.architecture.source_tree import ROOT, WAIVERS, modules, qualified, relative

FILE_LINES, FUNCTION_LINES, CLASS_LINES, PARAMETERS, NESTING = 400, 50, 300, 8, 4
_BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def _num_lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _num_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    a = function.args
    named = [arg.arg for arg in (*a.posonlyargs, *a.args)]
    return len(named) - (named[:1] in (["self"], ["cls"])) + len(a.kwonlyargs) + bool(a.vararg) + bool(a.kwarg)


def _depth(node: ast.AST) -> int:
    """Return how deep blocks lie in each other below `node`; an `elif` is as deep as its `if`."""
    deepest = 0
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                is_elif = (
                    isinstance(node, ast.If) and field == "orelse" and isinstance(child, ast.If) and len(value) == 1
                )
                deepest = max(deepest, _depth(child) + (isinstance(child, (*_BLOCKS, *_FUNCTIONS)) and not is_elif))
    return deepest


def _over_budget() -> Iterator[tuple[str, str]]:
    """Yield (`path:name`, what is wrong)."""
    for path, tree in modules().values():
        where, num_lines = relative(path), len(path.read_text().splitlines())
        if num_lines > FILE_LINES:
            yield f"{where}:file", f"{num_lines} lines, at most {FILE_LINES}"
        for name, node in qualified(tree):
            limit = CLASS_LINES if isinstance(node, ast.ClassDef) else FUNCTION_LINES
            if _num_lines(node) > limit:
                yield f"{where}:{name}", f"{_num_lines(node)} lines, at most {limit}"
            if isinstance(node, _FUNCTIONS) and _num_parameters(node) > PARAMETERS:
                yield f"{where}:{name}", f"{_num_parameters(node)} parameters, at most {PARAMETERS}"
            if isinstance(node, _FUNCTIONS) and _depth(node) > NESTING:
                yield f"{where}:{name}", f"blocks {_depth(node)} deep, at most {NESTING}"


def _waivers() -> dict[str, str]:
    lines = [line for line in WAIVERS.read_text().splitlines() if line.strip() and not line.startswith("#")]
    waivers = {}
    for line in lines:
        path, name, reason = (part.strip() for part in line.split(":", 2))
        assert (ROOT / path).is_file(), f"waivers.txt: no file {path}"
        assert len(reason) >= 15, f"waivers.txt: {path}:{name} needs a reason"
        waivers[f"{path}:{name}"] = reason
    return waivers


def test_everything_over_budget_has_a_waiver() -> None:
    waived = _waivers()
    over = [f"{key}: {what}" for key, what in _over_budget() if key not in waived]
    assert not over, "over budget:\n" + "\n".join(over)


def test_every_waiver_is_needed() -> None:
    unused = set(_waivers()) - {key for key, _ in _over_budget()}
    assert not unused, f"waivers nothing needs: {sorted(unused)}"


def test_the_ruler_measures_depth_and_parameters() -> None:
    source = "def f(self, a, *, b=1, **c):\n if a:\n  for x in a:\n   with x:\n    pass\n elif b:\n  pass\n"
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef)
    assert (_depth(function), _num_parameters(function), _num_lines(function)) == (3, 3, 7)
