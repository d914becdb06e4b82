"""The floor plan: rooms import one way, downwards, and importing the library imports little.

`python -m tests.test_imports` prints it: the floors, what each room imports, and the figures.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent

# The rooms, from the top: a module may import from its own room and from those below. A room is a
# folder, or a file beside `eqxmeta/__init__.py`.
ROOMS = (
    "callbacks",  # logging, checkpoints, evaluation during a run
    "eqxmeta __main__",  # the front door
    "_trainer",  # fit, resume, several seeds
    "_learner",  # a trained strategy at work
    "_evaluation",  # how well a model adapts, in numbers and pictures
    "_loop",  # the compiled loop and the hooks
    "_preflight",  # what can be found wrong, or counted, before a run
    "_callback",  # the contract of callbacks
    "strategies",  # the algorithms
    "_strategy",  # the contract of strategies
    "losses rules nn tasks data",  # what users mix and match
    "_checkpoint",  # files of arrays
    "_meta_gradient",  # the inner loop and derivatives through it
    "_task",  # tasks, and where they come from
    "_model",  # states, and what is asked of a model
    "_images",  # images as arrays
    "_files",  # paths, locks, writes
    "_jaxpr",  # what reads or rewrites jaxprs
    "_direction",  # which way a metric improves
    "_arguments",
    "_types",
    "_table",  # tables, for the terminal and as Markdown
    "_keys",  # of randomness: split, or used more than once on purpose
    "_bar",  # progress, in a terminal or a notebook
    "_errors",
)
RANK = {room: rank for rank, line in enumerate(reversed(ROOMS)) for room in line.split()}


def modules() -> dict[str, Path]:
    """Every module by its dotted name, a package by the name of its folder. `eqxmeta/callbacks` is
    a link to `callbacks/`."""
    found = {}
    folders = [ROOT / "eqxmeta", *(path for path in (ROOT / "eqxmeta").iterdir() if path.is_dir())]
    for path in sorted(path for folder in folders for path in folder.glob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def statements(path: Path) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports of a file: those in functions too, and those for type checkers only, for a module
    that speaks of what is above it knows of it."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return (node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom))


def imported(name: str) -> set[str]:
    """The modules of the library that module `name` imports, by dotted name."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in statements(path):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # What is imported may itself be a module: `from . import container`.
            inner = [f"{module}.{alias.name}" for alias in node.names]
            targets = [x for x in inner if x in MODULES]
            targets += [module] if len(targets) < len(inner) else []
        found |= {target for target in targets if target.split(".")[0] == "eqxmeta"}
    assert found <= MODULES.keys(), f"{name} imports {found - MODULES.keys()}"
    return found - {name}


def room(name: str) -> str:
    """`eqxmeta.tasks._sinusoid` -> `tasks`; `eqxmeta` -> `eqxmeta`."""
    return name.removeprefix("eqxmeta.").split(".")[0]


def between_rooms() -> dict[str, set[str]]:
    """Which rooms each room imports from."""
    arrows = {(room(name), room(other)) for name in MODULES for other in imported(name)}
    return {a: {y for x, y in arrows if x == a != y} for a in map(room, MODULES)}


def floors(graph: dict[str, set[str]]) -> list[list[str]]:
    """Who stands on what, the lowest first. Raises `CycleError`, which names the circle."""
    sorter, found = TopologicalSorter(graph), []
    sorter.prepare()
    while sorter.is_active():
        found.append(sorted(sorter.get_ready()))
        sorter.done(*found[-1])
    return found


def picture() -> Iterator[str]:
    files, rooms = {name: imported(name) for name in MODULES}, between_rooms()
    for number, floor in reversed(list(enumerate(floors(rooms)))):
        yield from (f"{number}  {name:15} -> {' '.join(sorted(rooms[name]))}" for name in floor)
    for what, graph in (("modules", files), ("rooms", rooms)):
        arrows = sum(map(len, graph.values()))
        yield f"{len(graph)} {what}, {arrows} arrows, {len(floors(graph))} floors, no circle"


def test_every_module_is_in_a_room():
    assert {room(name) for name in MODULES} == RANK.keys()


def test_imports_go_down():
    climbing = [
        f"{name} imports {other}"
        for name in MODULES
        for other in imported(name)
        # Rooms of one line do not know each other; a room's files do.
        if room(other) != room(name) and RANK[room(other)] >= RANK[room(name)]
    ]
    assert not climbing


def test_no_import_goes_in_circles():
    floors({name: imported(name) for name in MODULES})
    floors(between_rooms())


def test_nothing_in_the_library_depends_on_what_users_mix_and_match():
    leaves = {"losses", "nn", "tasks", "data", "strategies", "callbacks"}
    for name in MODULES:
        if name != "eqxmeta" and room(name) not in leaves:
            assert not {room(other) for other in imported(name)} & leaves, name


def test_callbacks_and_strategies_never_import_each_other():
    for name in MODULES:
        if room(name) in ("callbacks", "strategies") and name.count(".") == 2:
            assert room(name) not in {room(other) for other in imported(name)}, name


def test_no_module_imports_the_package_as_a_whole():
    # That would run everything in it, and go in circles as soon as somebody reorders it.
    for name in MODULES:
        assert "eqxmeta" not in imported(name), name


def test_init_files_only_re_export():
    for path in MODULES.values():
        if path.name != "__init__.py":
            continue
        first, *rest = ast.parse(path.read_text()).body or [None]
        for node in rest if isinstance(first, ast.Expr | None) else [first, *rest]:
            assert isinstance(node, ast.ImportFrom), path
            # `as` the same name: what a type checker takes for a re-export.
            assert all(alias.asname == alias.name for alias in node.names), path
            assert not any(alias.name.startswith("_") for alias in node.names), path


def test_every_module_says_what_it_is():
    for path in MODULES.values():
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_a_room_has_about_ten_files():
    for folder in {path.parent for path in MODULES.values()}:
        assert len(list(folder.glob("[!_]*.py"))) <= 12, folder


def run(code: str, cwd: Path) -> str:
    """What Python prints elsewhere."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_the_library_imports_little(tmp_path):
    # Nor does it wake the device: else the user's settings of JAX, made after it, come too late.
    code = """
import sys, eqxmeta
from jax._src import xla_bridge
heavy = ("matplotlib", "tensorboardX", "tensorboard", "tqdm", "torch", "tensorflow")
heavy += ("PIL", "pooch", "requests", "scipy.special")
print([name for name in heavy if name in sys.modules])
print("eqxmeta.callbacks" in sys.modules)
import eqxmeta.callbacks
print([name for name in heavy if name in sys.modules])
print(xla_bridge.backends_are_initialized())
"""
    assert run(code, tmp_path).split("\n") == ["[]", "False", "['tqdm']", "False"]


if __name__ == "__main__":
    print(*picture(), sep="\n")
