"""Rows of results are made, skipped and resumed; the page is what is drawn from their files."""

import argparse
import json
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import optax
import pytest

import eqxmeta as em
from benchmarks.results import _page, _record, _row
from benchmarks.results._tables import CENTROID, TABLES, Setting, Table
from eqxmeta.callbacks import Evaluate

DOCS = Path(__file__).parent.parent / "docs"


def prepare(options, name, steps, seed):
    strategy = em.Joint(em.losses.mse, em.InnerLoop(optax.sgd(0.1), 1), optax.sgd(0.01))
    tasks, model = em.tasks.Sinusoid(3, 3), eqx.nn.Linear(1, 1, key=jax.random.key(seed))
    return Setting(strategy, 1, 2, model, tasks, tasks, {"loss": tasks})


@pytest.fixture
def args(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = Table("Lines", ("one", "two"), prepare, "Lines.", metric="loss", after=(0,))
    monkeypatch.setattr(_row, "TABLES", {"lines": table})
    monkeypatch.setattr(_page, "TABLES", {"lines": table})
    return argparse.Namespace(
        only="lines", best=None, omniglot=None, groceries=None, minutes=1, steps=8, threads=1,
        seed=0, test_tasks=10, out=tmp_path / "records",
    )  # fmt: skip


@pytest.mark.slow
def test_a_row_is_made_after_it_was_broken_off_and_skipped_once_there(args, monkeypatch, capsys):
    measure, seen = Evaluate.on_step_end, []

    def broken(callback, run):
        seen.append(run.step)
        if seen == [2, 4]:
            raise RuntimeError("broken off")
        measure(callback, run)

    monkeypatch.setattr(Evaluate, "on_step_end", broken)
    assert _row.chosen(args) == [("lines", "one"), ("lines", "two")]
    with pytest.raises(RuntimeError, match="broken off"):
        _row.run(args, "lines", "one")
    assert not args.out.exists()
    path = _row.run(args, "lines", "one")
    assert "resumed" in capsys.readouterr().out and seen == [2, 4, 4, 6, 8]
    assert _row.chosen(args) == [("lines", "two")]
    record = json.loads(path.read_text())
    assert record["outer_steps"] == 8 and record["checkpoint"] in (2, 4, 6, 8)
    assert record["command"].endswith("--only lines/one --steps 8 --threads 1")
    result = record["results"]["loss"]
    assert len(result["values"]) == 10 and len(result["mean"]) == 2
    np.testing.assert_allclose(np.mean(result["values"]), result["mean"][-1], rtol=1e-4)
    # Of itself the difference is nothing, and with another it is that of the values.
    args.seed = 1
    other = json.loads(_row.run(args, "lines", "one").read_text())["results"]["loss"]
    found = em.compare(_record.evaluation(other), _record.evaluation(result))
    assert found.mean == pytest.approx(np.subtract(other["values"], result["values"]).mean())
    drawn = _page.page(args.out, DOCS / "benchmarks.json", "{tables} {lines/one@0} {missing}")
    mean, half = result["mean"][0], result["ci95"][0]
    assert drawn.count(f"{mean:.3g} ± {half:.2g}") == 2
    assert "- Lines: `two`." in drawn and "(seed 1)" in drawn


def test_what_is_asked_for_must_be_there(args):
    args.only = "lines/three"
    assert "no row 'three' in lines; there are one, two" in _row.fault(args)
    args.only = "circles"
    assert "no table 'circles'" in _row.fault(args)
    args.only = "lines"
    assert not _row.fault(args)


def test_data_that_a_row_needs_is_asked_for(args, monkeypatch):
    monkeypatch.setattr(_row, "TABLES", TABLES)
    args.only = "omniglot-5way-1shot/MAML"
    assert _row.fault(args) == "--omniglot: missing, and omniglot-5way-1shot/MAML needs it"


def test_the_best_rows_are_chosen_of_those_that_there_are():
    def of(name, mean, metric):
        return {"name": name, "results": {"": {"metric": metric, "mean": [0.0, mean]}}}

    for metric, best in (("accuracy", "b"), ("loss", "a")):
        found = [of("a", 0.1, metric), of("b", 0.9, metric)]
        assert _row.ranked(found)[0]["name"] == best


def test_the_page_is_what_is_drawn():
    drawn = _page.page(DOCS / "results", DOCS / "benchmarks.json", _page.TEMPLATE.read_text())
    assert (DOCS / "results.md").read_text() == drawn, "python -m benchmarks.results --page"


def test_every_few_shot_strategy_has_a_row():
    strategies = {name for name in vars(em.strategies) if name[0].isupper()} - {"CNP"}
    rows = {name.partition("-")[0] for name in TABLES["groceries-32"].names} - {CENTROID}
    assert rows == strategies
