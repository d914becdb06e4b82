"""What `dir` shows of the library's public modules is the library's."""

import inspect

import pytest

import eqxmeta as em
import eqxmeta.callbacks

PUBLIC = ["", "losses", "rules", "nn", "tasks", "data", "callbacks"]


@pytest.mark.parametrize("name", PUBLIC)
def test_dir_has_only_public_names(name):
    module = getattr(em, name) if name else em
    names = [n for n in dir(module) if not n.startswith("_")]
    # `jaxtyping` is put there by the check of annotations, in tests alone.
    shown = {n: getattr(module, n) for n in names if n != "jaxtyping"}
    assert shown
    for n, x in shown.items():
        where = x.__name__ if inspect.ismodule(x) else getattr(x, "__module__", "eqxmeta")
        assert where.startswith("eqxmeta"), n
        assert not (inspect.ismodule(x) and name), n
    if name in ("losses", "rules"):
        private = [f"eqxmeta.{name}", "eqxmeta._direction", "eqxmeta._model.predict"]
        assert {x.__module__ for x in shown.values()} <= {*private, "eqxmeta._task.examples"}


def test_help_begins_with_how_it_is_used():
    lines = inspect.getdoc(em.MAML).splitlines()
    assert lines[2].lstrip().startswith("maml = em.MAML(em.losses.mse, em.InnerLoop(")
