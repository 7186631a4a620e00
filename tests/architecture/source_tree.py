"""Reads craken/ as syntax trees, and the picture of it in docs/architecture.md: pure functions over text."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "architecture.md"
WAIVERS = Path(__file__).with_name("waivers.txt")


@cache
def modules() -> dict[str, tuple[Path, ast.Module]]:
    """Return dotted name -> (path, tree) for every file of craken/; a package goes by its own name."""
    found = {}
    for path in sorted((ROOT / "craken").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = (path, ast.parse(path.read_text(), str(path)))
    return found


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room_of(module: str) -> str:
    """Return the room of a dotted name: `craken.zero.group`, `craken.zero` -> `zero`; `craken` itself -> `craken`."""
    return module.split(".")[1] if "." in module else module


@cache
def allowed_rooms() -> dict[str, set[str]]:
    """Parse the "may import" column: room -> the rooms it may import."""
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|$", PICTURE.read_text(), re.MULTILINE)
    rooms = {room for room, _ in rows}
    return {room: _parse_cell(cell.strip(), rooms) for room, cell in rows}


def _parse_cell(cell: str, rooms: set[str]) -> set[str]:
    if cell == "-":
        return set()
    if cell == "everything":
        return rooms | {"craken"}
    words = {word.strip().strip("`") for word in cell.replace("craken's public names", "craken").split(",")}
    unknown = words - rooms - {"craken"}
    assert not unknown, f"docs/architecture.md: {sorted(unknown)} in `may import` are no rooms of the table"
    return words


def imports(tree: ast.Module, *, typing_only: bool = True) -> Iterator[tuple[str, int]]:
    """Yield (dotted name, line) of everything imported; `a.b.c` for `from a.b import c`.

    With `typing_only` false, what stands under `if TYPE_CHECKING:` is left out.
    """
    skipped = set() if typing_only else {id(node) for block in _typing_blocks(tree) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write it absolute"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def _typing_blocks(tree: ast.Module) -> Iterator[ast.If]:
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            yield node


def module_of(dotted: str) -> str | None:
    """Return the module of craken/ that an imported name lives in, or None for anything else."""
    known = modules()
    while dotted:
        if dotted in known:
            return dotted
        dotted = dotted.rpartition(".")[0]
    return None


def qualified(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    """Yield (qualified name, node) of every class and function, nested ones too."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield prefix + child.name, child
                yield from walk(child, f"{prefix}{child.name}.")
            else:
                yield from walk(child, prefix)

    return walk(tree, "")
