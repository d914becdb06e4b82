"""Makes rows, or the page of those that there are: see the package."""

import argparse
import os
import sys
import time
import traceback
from pathlib import Path

RECORDS, PAGE = Path("docs/results"), Path("docs/results.md")
SPEED = Path("docs/benchmarks.json")


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results", description=__doc__)
    parser.add_argument("--only", default="", help="TABLE or TABLE/NAME, with commas between")
    parser.add_argument("--best", type=int, help="of these, or the parent table's, the best")
    parser.add_argument("--omniglot", type=Path, help="omniglot28.npz")
    parser.add_argument("--groceries", type=Path, help="a folder, in it one of images a class")
    parser.add_argument("--minutes", type=float, default=2.0, help="of one core, compiling apart")
    parser.add_argument("--steps", type=int, help="outer steps, in the place of minutes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test-tasks", type=int, default=600)
    parser.add_argument("--out", type=Path, default=RECORDS)
    parser.add_argument("--page", action="store_true", help="draw the page, and make no row")
    return parser


def main() -> None:
    parser = options()
    args = parser.parse_args()
    if args.threads < 1 or args.minutes <= 0:
        parser.error("--threads and --minutes: above zero")
    if hasattr(os, "sched_setaffinity"):  # before JAX counts the cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    from . import _page, _row  # after that

    if args.page:
        PAGE.write_text(_page.page(RECORDS, SPEED, _page.TEMPLATE.read_text()))
        return
    if found := _row.fault(args):
        parser.error(found)
    failed = False
    for table, name in _row.chosen(args):
        began = time.monotonic()
        print(f"{table}/{name} ...", flush=True)
        try:
            path = _row.run(args, table, name)
        except Exception:  # the others go on
            traceback.print_exc()
            failed = True
            continue
        print(f"{path}, {time.monotonic() - began:.0f} s", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
