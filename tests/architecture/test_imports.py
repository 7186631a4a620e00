"""Who imports whom: the table in docs/architecture.md is the law, and this holds the code to it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.architecture.source_tree import allowed_rooms, imports, module_of, modules, relative, room_of

OPTIONAL = ("transformers", "accelerate", "tokenizers", "tensorboard", "wandb")
NAMES = sorted(modules())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "craken"])
def test_a_room_imports_only_what_the_table_allows(name: str) -> None:
    room, table = room_of(name), allowed_rooms()
    assert room in table, f"room `{room}` has no row in docs/architecture.md"
    path, tree = modules()[name]
    for dotted, line in imports(tree):
        target = module_of(dotted)
        if target is not None and room_of(target) != room:
            assert room_of(target) in table[room], f"{relative(path)}:{line}: `{room}` may not import `{dotted}`"


def test_every_row_of_the_table_is_a_room() -> None:
    rooms = {room_of(name) for name in NAMES}
    assert set(allowed_rooms()) <= rooms, f"rows without code: {sorted(set(allowed_rooms()) - rooms)}"


def test_no_module_is_part_of_an_import_cycle() -> None:
    graph = {
        name: sorted({t for dotted, _ in imports(tree, typing_only=False) if (t := module_of(dotted)) and t != name})
        for name, (_, tree) in modules().items()
    }
    finished: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, "import cycle: " + " -> ".join((*trail[trail.index(name) :], name))
        if name not in finished:
            for target in graph[name]:
                visit(target, (*trail, name))
            finished.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("name", [name for name in NAMES if room_of(name) != "comm"])
def test_only_comm_talks_to_torch_distributed(name: str) -> None:
    path, tree = modules()[name]
    for dotted, line in imports(tree):
        # the elastic agent supervises processes: it is the launcher's, and no collective
        is_agent = room_of(name) == "launch" and dotted.startswith(
            ("torch.distributed.launcher", "torch.distributed.elastic")
        )
        assert is_agent or not dotted.startswith("torch.distributed"), f"{relative(path)}:{line}: {dotted} outside comm"
    text = path.read_text()
    assert "dist.is_initialized(" not in text, f"{relative(path)} asks torch.distributed; ask craken.comm"
    assert "torch.distributed." not in text or room_of(name) == "launch", (
        f"{relative(path)} reaches into torch.distributed"
    )


@pytest.mark.parametrize("dependency", OPTIONAL)
def test_an_optional_dependency_is_imported_in_one_file(dependency: str) -> None:
    files = {
        relative(path)
        for path, tree in modules().values()
        for dotted, _ in imports(tree)
        if dependency in dotted.split(".") and module_of(dotted) is None
    }
    assert len(files) <= 1, f"{dependency} is imported in {sorted(files)}"


def _fresh_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_craken_costs_under_a_second_over_torch_and_no_transformers() -> None:
    # CPU seconds, so that a busy machine does not decide; an attribute, because the package loads on first use
    code = (
        "import time, sys, torch, torch.distributed; start = time.process_time(); import craken; craken.initialize; "
        "print(time.process_time() - start, *{'transformers', 'accelerate', 'tokenizers', 'wandb'} & set(sys.modules))"
    )
    seconds, *heavy = _fresh_python(code).split()
    assert float(seconds) < 1.0
    assert not heavy


def test_importing_the_config_room_needs_no_torch() -> None:
    code = "import sys, craken.config; print([m for m in sys.modules if m == 'torch' or m.startswith('craken.engine')])"
    assert _fresh_python(code) == "[]"
