"""The page of results: `page.md` with the tables, and every figure, taken from the files."""

import json
import re
from pathlib import Path
from typing import Any

import eqxmeta as em

from .. import _report
from . import _record
from ._row import ranked
from ._tables import TABLES, Table

TEMPLATE = Path(__file__).parent / "page.md"


def page(folder: Path, speed: Path, template: str) -> str:
    """`template`, of the records in `folder` and the ratios in `speed`. `{table/name}` is a row's
    first figure, and with `@k` that after its inner steps number k."""
    records = {key: _record.read(folder, key) for key in TABLES}
    by_name = {(r["table"], r["name"]): r for rs in records.values() for r in rs if not r["seed"]}
    parts = {
        "tables": "\n\n".join(_section(TABLES[key], rs) for key, rs in records.items() if rs),
        "missing": _missing(records),
        "earlier": _earlier(folder / "earlier.json"),
        "speed": _speed(speed),
    }

    def figure(found: re.Match[str]) -> str:
        table, name, after = found.groups()
        result = _first(by_name[table, name])
        return _shown(result, result["after"].index(int(after)) if after else -1)

    text = re.sub(r"\{([\w-]+)/([^}@]+)(?:@(\d+))?\}", figure, template)
    return re.sub(r"\{(\w+)\}", lambda found: parts[found[1]], text)


def _section(table: Table, found: list[_record.Record]) -> str:
    first = ranked([record for record in found if record["seed"] == 0])
    columns = ["as trained (inner steps)"] if table.after else list(first[0]["results"])
    after = [f"after {k}" for k in table.after]
    head = ["", *columns, "to the best", *after, "outer steps", "minutes"]
    rows = [_row(table, record, first[0]) for record in first]
    budgets = sorted({_budget(record) for record in first if record["outer_steps"]})
    told = f"{table.note} Budget: {'; '.join(budgets)}." if budgets else table.note
    return f"## {table.title}\n\n{told}\n\n{_table(head, rows)}{_seeds(found)}"


def _row(table: Table, record: _record.Record, best: _record.Record) -> list[str]:
    result = _first(record)
    cells = [_shown(result, -1) for result in record["results"].values()]
    if table.after:  # what has no inner steps has a closed form
        cells[0] += f" ({result['after'][-1]})" if result["after"][-1] > 0 else " (none)"
    known = {k: _shown(result, i) for i, k in enumerate(result["after"])}
    after = [known.get(k, "") for k in table.after]
    behind = ""
    if record is not best:
        pair = _record.evaluation(result), _record.evaluation(_first(best))
        found = em.compare(*pair, result["metric"])
        scale, digits = (100, ".2f") if result["metric"] == "accuracy" else (1, ".3g")
        behind = f"{scale * found.mean:+{digits}} ± {scale * found.ci95:{digits}}"
        behind += " *" * (not found.significant)
    path = _record.path_of(Path("results"), record["table"], record["name"], record["seed"])
    name = f"[{record['name']}]({path.as_posix()})" + " (transductive)" * result["transductive"]
    steps = f"{record['outer_steps']:,}" if record["outer_steps"] else ""
    return [name, *cells, behind, *after, steps, f"{record['core_seconds'] / 60:.1f}"]


def _first(record: _record.Record) -> dict[str, Any]:
    return next(iter(record["results"].values()))


def _shown(result: dict[str, Any], k: int) -> str:
    mean, half = result["mean"][k], result["ci95"][k]
    if mean is None:
        return "diverges" if result["after"][k] else ""  # before, there may be no prediction
    if result["metric"] == "accuracy":
        return f"{100 * mean:.2f} ± {100 * half:.2f} %"
    return f"{mean:.3g} ± {half:.2g}"


def _budget(record: _record.Record) -> str:
    budget, threads = record["budget"], record["budget"]["threads"]
    steps, minutes = budget.get("outer_steps", 0), budget.get("minutes", 0)
    core = f"outer steps for {minutes:g} minute{'s' * (minutes != 1)} of one core, compiling apart"
    return f"{f'{steps:,} outer steps' if steps else core}, {threads} thread{'s' * (threads > 1)}"


def _seeds(found: list[_record.Record]) -> str:
    lines = []
    for name in sorted({record["name"] for record in found if record["seed"]}):
        of_name = sorted((r for r in found if r["name"] == name), key=lambda r: r["seed"])
        shown = (f"{_shown(_first(r), -1)} (seed {r['seed']})" for r in of_name)
        lines.append(f"- `{name}`: {', '.join(shown)}")
    return "\n\nOther seeds:\n\n" + "\n".join(lines) if lines else ""


def _missing(records: dict[str, list[_record.Record]]) -> str:
    lines = []
    for key, table in TABLES.items():
        there = {record["name"] for record in records[key] if record["seed"] == 0}
        absent = [f"`{name}`" for name in table.names if name not in there]
        if table.parent:
            wanted = f"the {table.best} best of {TABLES[table.parent].title}"
            lines += [f"- {table.title}: {wanted}; there are {len(there)}."] * (
                len(there) < table.best
            )
        elif absent:
            lines.append(f"- {table.title}: {', '.join(absent)}.")
        if there and sum(record["seed"] > 0 for record in records[key]) < 6:
            lines.append(f"- {table.title}: three seeds for the three best rows.")
    lines.append("- `CNP`, which has a loss of its own; an accelerator.")
    return "\n".join(lines)


def _earlier(path: Path) -> str:
    rows = json.loads(path.read_text()) if path.exists() else []
    cells = [[r["name"], r["accuracy"], r["published"], f"`{r['command']}`"] for r in rows]
    return _table(["", "accuracy", "published", "command"], cells)


def _speed(path: Path) -> str:
    rows = []
    for row in (row for of_section in _report.read_json(path).values() for row in of_section):
        if row.ratio and (" over " in row.what or row.target == "import"):
            low, high = min(row.ratio), max(row.ratio)
            rows.append([row.target, row.what, f"{row.median:.3g}", f"{low:.3g}-{high:.3g}"])
    return _table(["target", "what is compared", "measured", "range"], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
