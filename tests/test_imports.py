"""The floor plan: imports run one way, downwards, and importing the library imports little."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Section 1 of the design, from the top; a module may import what stands in its own line or below.
# `leaves` are what users mix and match: nothing in the library may depend on one of them.
LAYERS = {
    "callbacks": "callbacks",
    "package": "eqxmeta __main__",
    "trainer": "_trainer _resume _loop _non_finite _plan _preflight _slow_convolutions"
    " _seeds _seed_arguments _summary _pace _signals",
    "chunk, evaluate, checkpoint, callback contract": (
        "_chunk _packed _sources _host_source _evaluate _figure _plot_adaptation _plot_confusion"
        " _loss_check _check _checkpoint _checkpoint_files _inspect _callback _drawing _monitor"
        " _run"
    ),
    "leaves": "losses nn tasks data",
    "strategies": "strategies",
    "strategy, inner loop, meta-gradients": (
        "_strategy _inner_loop _hoist _meta_gradient _safe_sqrt _task_chunk _flops"
    ),
    "task, state, types": (
        "_task _state _seed_runs _types _model _select _predict _support_statistics "
        "_examples_first _channels_last _interpret"
    ),
    "plain Python": (
        "_checkpoint_folder _container _event_file _event_summaries _files _json _protobuf"
        " _arguments _errors _published _background _lock _fingerprint _native _evaluation"
    ),
}
RANK = {name: rank for rank, names in enumerate(LAYERS.values()) for name in names.split()}
LEAVES = set(LAYERS["leaves"].split())
# What strategies have in common; no strategy is among it.
SHARED = {
    f"eqxmeta.strategies.{name}"
    for name in ("_arguments", "_by_inner_loop", "_head", "_support_labels")
}


def modules() -> dict[str, Path]:
    """Every module of the library, by its dotted name; a package by the name of its folder."""
    found = {}
    for folder, name in ((ROOT / "eqxmeta", "eqxmeta"), (ROOT / "callbacks", "eqxmeta.callbacks")):
        for path in sorted(folder.rglob("*.py")):
            inner = path.relative_to(folder).with_suffix("").parts
            inner = inner[:-1] if inner[-1] == "__init__" else inner
            # A link to the callbacks, as some editable installs make, is not a second copy.
            if inner[:1] != ("callbacks",):
                found[".".join([name, *inner])] = path
    return found


MODULES = modules()


def statements(path: Path, *, typing: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports of a file, in functions too; those for type checkers only if `typing`."""
    todo: list[ast.AST] = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        only_typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        todo += node.orelse if only_typing and not typing else ast.iter_child_nodes(node)


def imported(name: str, *, typing: bool = False) -> set[str]:
    """The modules of the library that module `name` imports, by dotted name."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in statements(path, typing=typing):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # What is imported may itself be a module: `from . import _container`.
            inner = [f"{module}.{alias.name}" for alias in node.names]
            targets = [x for x in inner if x in MODULES]
            targets += [module] if len(targets) < len(inner) else []
        found |= {target for target in targets if target.split(".")[0] == "eqxmeta"}
    assert found <= MODULES.keys(), f"{name} imports {found - MODULES.keys()}"
    return found - {name}


def part(name: str) -> str:
    """`eqxmeta.tasks._sinusoid` -> `tasks`; `eqxmeta` -> `eqxmeta`."""
    return name.removeprefix("eqxmeta.").split(".")[0]


def test_every_module_has_a_place():
    unplaced = {part(name) for name in MODULES} - RANK.keys()
    assert not unplaced, f"say in LAYERS where they belong: {unplaced}"


@pytest.mark.parametrize("name", MODULES)
def test_imports_do_not_climb(name):
    # Types too: a module that speaks of what is above it knows of it.
    rank = RANK[part(name)]
    climbing = [
        other for other in imported(name) if RANK[part(other)] < rank and part(other) != part(name)
    ]
    assert not climbing


@pytest.mark.parametrize("name", MODULES)
def test_types_are_imported_from_the_same_layer_or_below(name):
    rank = RANK[part(name)]
    assert all(RANK[part(other)] >= rank for other in imported(name, typing=True))


def test_no_import_goes_in_circles():
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            path.append(name)
            for other in sorted(imported(name)):
                visit(other)
            path.pop()
            done.add(name)

    for name in MODULES:
        visit(name)
    assert done == MODULES.keys()


def test_nothing_but_the_front_door_imports_a_leaf():
    for name in MODULES:
        if name != "eqxmeta" and part(name) not in LEAVES:
            assert not {part(other) for other in imported(name, typing=True)} & LEAVES, name


def test_leaves_do_not_know_each_other_nor_any_strategy():
    for name in MODULES:
        if part(name) in LEAVES:
            others = {part(other) for other in imported(name)} - {part(name)}
            assert not others & (LEAVES | {"strategies", "_strategy", "_inner_loop"}), name


def test_the_library_never_imports_its_callbacks():
    for name in MODULES:
        if part(name) != "callbacks":
            assert "callbacks" not in {part(other) for other in imported(name, typing=True)}, name
            assert "callbacks" not in {
                alias.name.split(".")[0]
                for node in statements(MODULES[name], typing=True)
                for alias in node.names
            }, name


def test_callbacks_and_strategies_never_import_each_other():
    for folder, shared in (("callbacks", set()), ("strategies", SHARED)):
        package = f"eqxmeta.{folder}"
        for name in MODULES:
            if name.startswith(f"{package}."):
                siblings = {x for x in imported(name, typing=True) if part(x) == folder}
                assert siblings <= shared, name


def test_no_module_imports_the_package_as_a_whole():
    # That would run everything in it, and go in circles as soon as somebody reorders it.
    for name in MODULES:
        assert "eqxmeta" not in imported(name, typing=True), name


@pytest.mark.parametrize("path", [p for p in MODULES.values() if p.name == "__init__.py"])
def test_init_files_only_re_export(path):
    for index, node in enumerate(ast.parse(path.read_text()).body):
        docstring = (
            index == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        )
        if docstring:
            continue
        assert isinstance(node, ast.ImportFrom), ast.unparse(node)
        # `as` the same name: what a type checker takes for a re-export.
        assert all(alias.asname == alias.name for alias in node.names), ast.unparse(node)
        assert all(not alias.name.startswith("_") for alias in node.names), ast.unparse(node)


def run(code: str, cwd: Path) -> str:
    """What Python prints elsewhere, with the library as it is installed."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_the_library_imports_little(tmp_path):
    code = """
import sys, eqxmeta
heavy = ("matplotlib", "tensorboardX", "tensorboard", "tqdm", "torch", "tensorflow")
heavy += ("PIL", "pooch", "requests")
print([name for name in heavy if name in sys.modules])
print("eqxmeta.callbacks" in sys.modules)
import eqxmeta.callbacks
print([name for name in heavy if name in sys.modules])
"""
    assert run(code, tmp_path).split("\n") == ["[]", "False", "['tqdm']"]


def test_a_bare_import_of_callbacks_is_refused(tmp_path):
    code = """
try:
    import callbacks
except ModuleNotFoundError as error:
    print(error.name)
import eqxmeta.callbacks
print(eqxmeta.callbacks.Checkpoint.__module__)
"""
    assert run(code, tmp_path).split("\n") == ["callbacks", "eqxmeta.callbacks._checkpoint"]


def test_importing_the_library_does_not_wake_the_device(tmp_path):
    # Else the user's own settings of JAX, made after the import, come too late.
    code = """
import eqxmeta, eqxmeta.callbacks
from jax._src import xla_bridge
print(xla_bridge.backends_are_initialized())
"""
    assert run(code, tmp_path) == "False"
