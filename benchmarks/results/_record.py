"""A row as a file: what was measured, with what it takes to do so again."""

import importlib.metadata
import json
import os
import platform
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

import eqxmeta as em

# Digits that are kept of each task, for paired differences.
DIGITS = 5

Record = dict[str, Any]


def path_of(folder: Path, table: str, name: str, seed: int) -> Path:
    return folder / table / f"{name.replace(' ', '-')}{f'-seed{seed}' * (seed > 0)}.json"


def of_evaluation(result: em.Evaluation, metric: str, reported: list[int]) -> Record:
    """Mean and interval after each of the `reported` inner steps that there are, `-1` the last. The
    last of them counts: its value for every task, with the number that tells it from others."""
    there = [k for k in reported if k < result.values[metric].shape[1]]
    mean, half = result.mean(metric), result.ci95(metric)
    return {
        "metric": metric,
        "after": there,
        "mean": [_rounded(mean[k]) for k in there],
        "ci95": [_rounded(half[k]) for k in there],
        "transductive": result.transductive,
        "evaluation_seed": result.seed,
        "values": [_rounded(x) for x in result.values[metric][:, there[-1]]],
        "tasks": [_rounded(x) for x in np.asarray(result.tasks)],
    }


def evaluation(found: Record) -> em.Evaluation:
    """What `em.compare` asks for."""
    values = {found["metric"]: np.asarray(found["values"], float)[:, None]}
    tasks, seed = np.asarray(found["tasks"]), found["evaluation_seed"]
    return em.Evaluation(values, found["transductive"], tasks=tasks, seed=seed)


def _rounded(x: float) -> float | None:
    return None if not np.isfinite(x) else float(f"{x:.{DIGITS}g}")


def origin() -> Record:
    """Commit, date, machine and versions. Rows that came in are no change to what makes them."""
    libraries = ("jax", "jaxlib", "equinox", "optax", "numpy")
    changed = _git("diff", "HEAD", "--stat", "--", ".", ":!docs")
    return {
        "commit": _git("rev-parse", "HEAD") + "-changed" * bool(changed),
        "date": date.today().isoformat(),
        "machine": {"platform": platform.platform(), "python": platform.python_version()},
        "versions": {name: importlib.metadata.version(name) for name in libraries},
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True)
    return done.stdout.strip()


def write(path: Path, record: Record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1)
    for numbers in ("values", "tasks", "mean", "ci95", "after"):  # on one line each
        text = _on_one_line(text, numbers)
    beside = path.with_suffix(".part")
    beside.write_text(text + "\n")
    os.replace(beside, path)


def _on_one_line(text: str, name: str) -> str:
    head, *rest = text.split(f'"{name}": [')
    for part in rest:
        numbers, end, tail = part.partition("]")
        head += f'"{name}": [' + " ".join(numbers.split()) + end + tail
    return head


def read(folder: Path, table: str) -> list[Record]:
    return [json.loads(path.read_text()) for path in sorted((folder / table).glob("*.json"))]
