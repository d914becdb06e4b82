"""What a benchmark found: a table to read, and a file to compare with."""

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
    - `note`: what else to know. `details`: a table behind this row, for the JSON file.
    """

    target: str
    what: str
    ratio: list[float]
    note: str = ""
    details: list[dict[str, Any]] = field(default_factory=list)

    @property
    def median(self) -> float | None:
        return statistics.median(self.ratio) if self.ratio else None


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
    header = ("target", "what is compared", "command", "measured", "range")
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


def _numbers(row: Row) -> tuple[str, str]:
    if not row.ratio:
        return "-", "-"
    return f"{row.median:.3g}", f"{min(row.ratio):.3g}-{max(row.ratio):.3g}"


def write_json(path: Path, results: Results) -> None:
    rows = []
    for section, of_section in results.items():
        for row in of_section:
            first = {"section": section, "command": command(section)}
            rows.append(first | dataclasses.asdict(row) | {"median": row.median})
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


def read_json(path: Path) -> dict[str, list[Row]]:
    names = [f.name for f in dataclasses.fields(Row)]
    results: dict[str, list[Row]] = {}
    for row in json.loads(path.read_text())["rows"]:
        results.setdefault(row["section"], []).append(Row(**{name: row[name] for name in names}))
    return results
