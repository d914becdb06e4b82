"""The benchmarks run and report; what they measure is not tested."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks._report import Row, read_json, table, write_json
from benchmarks._timing import paired

RESULTS = {
    "one": [
        Row("fast", "a over b", [3.0, 1.0, 2.0], note="on a good day"),
        Row("slow", "a over b", [0.5], details=[{"steps": 1}]),
    ],
    "two": [Row("missing", "a over b", []), Row("plain", "µs", [7.0])],
}


def test_the_table_has_a_line_for_every_row_and_its_command():
    lines = table(RESULTS).splitlines()
    fast, missing = lines[1], lines[4]
    assert " ".join(fast.split()) == "fast a over b python -m benchmarks --only one 2 1-3"
    assert lines[2].strip() == "on a good day" and lines[3].startswith("slow")
    assert " ".join(missing.split()) == "missing a over b python -m benchmarks --only two - -"
    assert len(lines) == 1 + 4 + 1


def test_json_gives_back_the_rows_and_tells_the_machine(tmp_path):
    write_json(tmp_path / "results.json", RESULTS)
    assert read_json(tmp_path / "results.json") == RESULTS
    machine = json.loads((tmp_path / "results.json").read_text())["machine"]
    assert {"date", "cpus", "python", "jax"} <= set(machine)


def test_pairs_are_timed_in_turn():
    calls = []
    found = paired(lambda: calls.append("a"), {"b": lambda: calls.append("b")}, pairs=3)
    assert calls == ["a", "b"] * 4  # the first two warm up
    assert list(found) == ["b"] and len(found["b"]) == 3 and min(found["b"]) > 0


@pytest.mark.slow
def test_a_section_runs_from_the_command_line(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--only", "inner_loop", "--quick"]
    done = subprocess.run(
        [*command, "--pairs", "1", "--out", str(tmp_path)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "python -m benchmarks --only inner_loop" in done.stdout
    row, _ = read_json(tmp_path / "results.json")["inner_loop"]
    assert len(row.ratio) == 1
