"""The rooms of the package: imports run down docs/architecture.md's list and never up, and the limits of size hold."""

import ast
import re
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the bottom up; a room may import those below it, and those beside it where there is no circle.
FLOORS = (("errors", "fields", "declared", "finite", "maps", "records", "shapes"), ("files", "runtime"),
          ("data", "calibration", "checkpoints"), ("networks", "diffusion", "metrics"),
          ("training", "damage", "options"), ("report",), ("families",), ("inspection", "compare"))
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted(path for path in (ROOT / "dbad").rglob("*.py"))
SCRIPTS = sorted(ROOT.glob("*.py"))


def room_of(path: Path) -> str | None:
    """The room of a module; None for those that are entries: `__main__` modules and the package itself."""
    parts = path.relative_to(ROOT / "dbad").with_suffix("").parts
    return None if parts[-1] == "__main__" or parts == ("__init__",) else parts[0]


def imported(path: Path, at_once: bool = False) -> set[str]:
    """The modules of the package that a module imports, but for annotations alone; `at_once`: not inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if at_once else ast.walk(tree)
    guarded = {id(node) for block in ast.walk(tree) if isinstance(block, ast.If)
               and "TYPE_CHECKING" in ast.unparse(block.test) for node in ast.walk(block)}
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and id(node) not in guarded and (node.module or "").startswith("dbad"):
            names = [f"{node.module}.{name.name}" for name in node.names]
            found |= {name if as_path(name) else node.module for name in names}
    return found


def as_path(module: str) -> Path | None:
    """The file of a module of the package, None for what is none."""
    base = ROOT / module.replace(".", "/")
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def test_every_module_is_in_a_room_of_the_plan():
    assert {room for path in MODULES if (room := room_of(path))} == FLOOR.keys()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_run_down(path):
    room = room_of(path)
    if room is None:
        return
    for module in imported(path):
        target = module.split(".")[1] if "." in module else None
        assert target is None or FLOOR[target] <= FLOOR[room], f"{path.relative_to(ROOT)} imports {module}"


def test_there_is_no_circle_of_rooms():
    rooms: dict[str, set[str]] = {}
    for path in filter(room_of, MODULES):
        targets = {module.split(".")[1] for module in imported(path) if "." in module}
        rooms.setdefault(room_of(path), set()).update(targets - {room_of(path)})
    for room in rooms:
        _visit(room, rooms, (), set())


def test_modules_do_not_import_each_other_in_a_circle():
    """While they are loaded; a family is opened by a function that imports its detector when it is called."""
    edges = {module_of(path): {module for module in imported(path, at_once=True) if as_path(module)} - {module_of(path)}
             for path in MODULES}
    done: set[str] = set()
    for module in edges:
        _visit(module, edges, (), done)


def module_of(path: Path) -> str:
    """The name of a module of the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _visit(node: str, graph: dict[str, set[str]], path: tuple[str, ...], done: set[str]) -> None:
    assert node not in path, f"a circle: {' -> '.join([*path[path.index(node):], node])}"
    if node in done:
        return
    for target in sorted(graph.get(node, ())):
        _visit(target, graph, (*path, node), done)
    done.add(node)


def test_nothing_in_the_package_imports_a_script():
    names = {path.stem for path in SCRIPTS}
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)] + [
            name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
        assert not names & set(modules), path


@pytest.mark.parametrize("path", [*SCRIPTS, *MODULES], ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_and_functions_stay_small(path):
    text = path.read_text(encoding="utf-8")
    most = 150 if path in SCRIPTS else 300
    assert text.count("\n") <= most
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            own = [argument for argument in arguments if argument.arg not in ("self", "cls")]
            assert node.end_lineno - node.lineno < 50, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"
            assert len(own) <= 8, f"{node.name} has {len(own)} arguments"


def test_nobody_outside_the_families_asks_which_method_it_is():
    for path in [*SCRIPTS, *(path for path in MODULES if room_of(path) != "families")]:
        assert not re.search(r"""method ==|get\(["']method["']""", path.read_text(encoding="utf-8")), path


def test_the_map_for_newcomers_lists_the_rooms_that_there_are():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text[text.index("## Rooms"):text.index("## Arrows")]
    listed = re.findall(r"^\| `([a-z_]+)(?:/|\.py)` ", table, flags=re.MULTILINE)
    assert sorted(listed) == sorted(chain.from_iterable(FLOORS))
    order = [FLOOR[room] for room in listed]
    assert order == sorted(order, reverse=True), "the list runs from the top floor down"
    assert "docs/architecture.md" in (ROOT / "README.md").read_text(encoding="utf-8")
