"""What a benchmark found: a table to read, a file to compare with, and a plot."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One comparison.

    - `target`: its name; `what`: of which two things `ratio` is.
    - `ratio`: one value a pair, empty if it could not be measured. Where there is no second thing
      `what` names the unit instead.
    - `asked`: what the median should at least be (`at_least=False`: at most), if anything.
    - `note`: what else to know. `details`: a table behind this row, for the JSON file.
    """

    target: str
    what: str
    ratio: list[float]
    asked: float | None = None
    at_least: bool = True
    note: str = ""
    details: list[dict[str, Any]] = field(default_factory=list)

    @property
    def median(self) -> float | None:
        return statistics.median(self.ratio) if self.ratio else None

    @property
    def reached(self) -> bool | None:
        """`None`: nothing was asked, or nothing measured."""
        if self.asked is None or self.median is None:
            return None
        return self.median >= self.asked if self.at_least else self.median <= self.asked


Results = Mapping[str, Sequence[Row]]  # by section


def command(section: str) -> str:
    return f"python -m benchmarks --only {section}"


def machine() -> dict[str, Any]:
    libraries = ("jax", "jaxlib", "equinox", "optax", "numpy")
    return {
        "date": date.today().isoformat(),
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in libraries},
    }


def table(results: Results) -> str:
    header = ("target", "what is compared", "command", "median", "range", "asked", "reached")
    lines, notes = [header], [""]
    for section, rows in results.items():
        for row in rows:
            lines.append((row.target, row.what, command(section), *_numbers(row)))
            notes.append(row.note)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for cells, note in zip(lines, notes, strict=True):
        text.append("  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip())
        text += [f"    {note}"] * bool(note)
    return "\n".join(text)


def _numbers(row: Row) -> tuple[str, str, str, str]:
    asked = "" if row.asked is None else f"{'>=' if row.at_least else '<='} {row.asked:g}"
    if not row.ratio:
        return "-", "-", asked, ""
    spread = f"{min(row.ratio):.3g}-{max(row.ratio):.3g}"
    reached = {True: "yes", False: "no", None: ""}[row.reached]
    return f"{row.median:.3g}", spread, asked, reached


def write_json(path: Path, results: Results) -> None:
    rows = []
    for section, of_section in results.items():
        for row in of_section:
            derived = {"median": row.median, "reached": row.reached}
            first = {"section": section, "command": command(section)}
            rows.append(first | dataclasses.asdict(row) | derived)
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


def read_json(path: Path) -> dict[str, list[Row]]:
    names = [f.name for f in dataclasses.fields(Row)]
    results: dict[str, list[Row]] = {}
    for row in json.loads(path.read_text())["rows"]:
        results.setdefault(row["section"], []).append(Row(**{name: row[name] for name in names}))
    return results


def plot(path: Path, results: Results) -> None:
    """Bars of what was measured over what was asked, right of the line where it was reached."""
    from matplotlib.figure import Figure

    rows = [row for rows in results.values() for row in rows if row.reached is not None]
    if not rows:
        return

    def score(row: Row, value: float) -> float:
        return value / row.asked if row.at_least else row.asked / value

    figure = Figure(figsize=(9, 1 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for i, row in enumerate(rows):
        scores = [score(row, value) for value in row.ratio]
        # Around the line at 1, so that a bar to the left is a target that was missed.
        axes.barh(i, score(row, row.median) - 1, left=1, color="C0" if row.reached else "C3")
        axes.plot([min(scores), max(scores)], [i, i], color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [row.target for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("measured / asked (inverted where little is good); line: lowest to highest")
    figure.savefig(path, dpi=150)
