"""Every test that the page of promises names exists."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "promises.md").read_text()


def functions_of(path):
    return {n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)}


def test_every_promise_names_tests_that_exist():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "---" not in line]
    promises = [row for row in rows if row != "| promise | held by |"]
    assert len(promises) > 20
    for row in promises:
        _, promise, held_by, _ = row.split("|")
        names = re.findall(r"`((?:\w+/)?test_\w+\.py)::(test_\w+)`", held_by)
        assert len(names) == held_by.count("`") // 2 > 0, row  # nothing that is not a test
        for file, test in names:
            assert (TESTS / file).exists(), f"{file}, for {promise!r}"
            assert test in functions_of(TESTS / file), f"{file}::{test}, for {promise!r}"
