"""One row: paced, trained, its best checkpoint on validation tasks measured on others."""

import argparse
import json
import shlex
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import eqxmeta as em
from eqxmeta.callbacks import Checkpoint, Evaluate, Lambda

from . import _record
from ._tables import TABLES, Setting, Table

TEST_SEED = 1


class Clock:
    """The pace of outer steps in processor time, without what comes before the first chunk of them.
    With one thread on an idle core it is the time on the wall."""

    def __init__(self) -> None:
        self._steps, self._seconds = 0, 0.0
        self._last: float | None = None

    def callback(self) -> Lambda:
        return Lambda(on_chunk_end=self._chunk)

    def _chunk(self, run: Any, metrics: Any) -> None:
        now = time.process_time()
        if self._last is not None:
            self._seconds += now - self._last
            self._steps += len(metrics["step"])
        self._last = now

    def seconds_a_step(self) -> float:
        return self._seconds / self._steps


def steps_for(minutes: float, prepare: Callable[[int], Setting], seconds: float = 6.0) -> int:
    """So many outer steps as take `minutes` of one core, from a short trial."""
    setting, clock = prepare(1_000_000), Clock()
    trainer = em.Trainer(
        setting.strategy, meta_batch_size=setting.meta_batch, callbacks=[clock.callback()],
        max_time=seconds, summary=False,
    )  # fmt: skip
    trainer.fit(setting.model, setting.train, 1_000_000)
    if trainer.stop_reason == "interrupted":
        raise SystemExit(130)
    return max(10, round(60 * minutes / clock.seconds_a_step()))


def make(
    table: Table, prepare: Callable[[int], Setting], folder: Path, budget: dict[str, float], *,
    test_tasks: int = 600, val_tasks: int = 100, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """The measured part of a row. `folder` has what it takes to go on, until it is done."""
    folder.mkdir(parents=True, exist_ok=True)
    paced = folder / "steps.json"
    began, setting, best_step, steps = time.process_time(), prepare(1), None, 0
    if setting.train is not None:
        if not paced.exists():
            asked = budget.get("outer_steps") or steps_for(budget["minutes"], prepare)
            paced.write_text(json.dumps(int(asked)))
        steps = json.loads(paced.read_text())
        setting = prepare(steps)
        every = -(-steps // 4)
        scored = {"num_tasks": val_tasks, "inner_steps": setting.inner_steps, "prefix": "val"}
        after = f"/after_{setting.counts}" if setting.counts else ""
        mode = "min" if table.metric == "loss" else "max"
        monitor = f"val/{table.metric}{after}"
        callbacks = [
            Evaluate(setting.val, every=every, **scored),
            best := Checkpoint(folder / "checkpoints", every=every, monitor=monitor, mode=mode),
        ]
        trainer = em.Trainer(
            setting.strategy, meta_batch_size=setting.meta_batch, callbacks=callbacks, seed=seed
        )
        state = trainer.fit(setting.model, setting.train, steps, resume="auto")
        if trainer.stop_reason == "interrupted":
            raise SystemExit(130)
        state = em.load(best.best_path, state) if best.best_path else state
        best_step = int(state.step)
        setting = setting._replace(model=state.model)
    results = {}
    for column, test in setting.tests.items():
        options = {"num_tasks": test_tasks, "inner_steps": setting.inner_steps, "seed": TEST_SEED}
        result = em.evaluate(setting.strategy, setting.model, test, **options)
        after = [*table.after, setting.counts or -1]
        results[column] = _record.of_evaluation(result, table.metric, after)
    shutil.rmtree(folder)
    jax.clear_caches()
    return {
        "outer_steps": steps,
        "checkpoint": best_step,
        # With compiling and evaluating; of a row that was broken off, since it went on.
        "core_seconds": round(time.process_time() - began, 1),
        "meta_batch_size": setting.meta_batch,
        "inner_steps": setting.inner_steps,
        "results": results,
    }


def ranked(found: list[_record.Record]) -> list[_record.Record]:
    """The best first, by the first column."""
    first = [next(iter(record["results"].values())) for record in found]
    sign = [1 if result["metric"] == "loss" else -1 for result in first]
    means = [np.float64(result["mean"][-1]) for result in first]  # None: NaN
    order = sorted(range(len(found)), key=lambda i: np.nan_to_num(sign[i] * means[i], nan=np.inf))
    return [found[i] for i in order]


def fault(args: argparse.Namespace) -> str:
    """What is wrong with `--only`, or which data its rows lack; else nothing."""
    for part in filter(None, args.only.split(",")):
        key, _, name = part.partition("/")
        if key not in TABLES:
            return f"--only: no table {key!r}; there are {', '.join(TABLES)}"
        if name and name not in TABLES[key].names:
            return f"--only: no row {name!r} in {key}; there are {', '.join(TABLES[key].names)}"
    for key, name in chosen(args):
        data = key.partition("-")[0]
        if getattr(args, data, key) is None:
            return f"--{data}: missing, and {key}/{name} needs it"
    return ""


def chosen(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Table and name of the rows that are asked for, and not there."""
    rows = []
    wanted = [part.partition("/") for part in args.only.split(",") if part]
    for key, table in TABLES.items():
        source, best = table.parent or key, args.best or table.best
        there = [r for r in _record.read(args.out, source) if r["seed"] == 0]
        names = [record["name"] for record in ranked(there)][:best] if best else table.names
        for name in names:
            asked = not wanted or any(t == key and n in ("", name) for t, _, n in wanted)
            if asked and not _record.path_of(args.out, key, name, args.seed).exists():
                rows.append((key, name))
    return rows


def run(args: argparse.Namespace, key: str, name: str) -> Path:
    """Makes a row and writes its file."""
    table, path = TABLES[key], _record.path_of(args.out, key, name, args.seed)
    budget = {"outer_steps": args.steps} if args.steps else {"minutes": args.minutes}
    measured = make(
        table, lambda steps: table.prepare(args, name, steps, args.seed),
        Path("runs/results") / path.relative_to(args.out).with_suffix(""), budget,
        test_tasks=args.test_tasks, seed=args.seed,
    )  # fmt: skip
    given = {"--omniglot": args.omniglot, "--groceries": args.groceries}
    flag, file = next(((f, v) for f, v in given.items() if key.startswith(f[2:])), ("", ""))
    data = f" {flag} {Path(file).name}" if flag else ""
    size = f"--steps {args.steps}" if args.steps else f"--minutes {args.minutes:g}"
    seed = f" --seed {args.seed}" if args.seed else ""
    only = shlex.quote(f"{key}/{name}")
    command = f"python -m benchmarks.results --only {only}{data} {size} --threads {args.threads}"
    first = {"table": key, "name": name, "seed": args.seed, "command": command + seed}
    first |= {"budget": budget | {"threads": args.threads}}
    _record.write(path, first | _record.origin() | measured)
    return path
