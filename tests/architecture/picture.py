"""Writes the list of modules in docs/architecture.md from their docstrings: `python -m tests.architecture.picture`."""

from __future__ import annotations

import ast

from tests.architecture.source_tree import PICTURE, ROOT, modules, room_of

HEADING = "## Modules\n"


def module_list() -> str:
    """Return the section: a table a room, the first sentence of each module's docstring."""
    rooms: dict[str, list[str]] = {}
    for name, (path, tree) in modules().items():
        if path.name == "__init__.py":
            continue
        short = path.relative_to(ROOT / "craken").as_posix()
        rooms.setdefault(room_of(name) if "/" in short else "single files", []).append(
            f"| `{short}` | {first_sentence(tree)} |"
        )
    order = sorted(rooms, key=lambda room: (room != "single files", room))
    tables = [f"### {room}\n\n| module | does |\n|---|---|\n" + "\n".join(rooms[room]) + "\n" for room in order]
    return (
        HEADING
        + "\nWritten from the modules' docstrings; `tests/architecture` holds it current.\n\n"
        + "\n".join(tables)
    )


def first_sentence(tree: ast.Module) -> str:
    """Return a docstring's first paragraph on one line, without its full stop."""
    paragraph = (ast.get_docstring(tree) or "").split("\n\n")[0]
    return " ".join(paragraph.split()).rstrip(".:")


def with_current_list(picture: str) -> str:
    return picture.split(HEADING)[0] + module_list()


if __name__ == "__main__":
    PICTURE.write_text(with_current_list(PICTURE.read_text()))
