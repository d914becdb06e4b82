"""Everything that is claimed about speed and memory, measured.

    python -m benchmarks [--only loop,peers] [--pairs 5] [--quick] [--out runs/benchmarks]

Prints a table, and writes it to `results.json` in the folder `--out`, replacing that of an earlier
run.
"""

import argparse
import importlib
from pathlib import Path

from . import _report

# By name, the module; each has `run(pairs, quick) -> list[Row]`.
SECTIONS = {
    "loop": "loop",
    "start": "start",
    "peers": "against_peers",
    "meta_gradient": "meta_gradient",
    "inner_loop": "inner_loop",
    "layout": "layout",
    "convolution": "convolution",
    "seeds": "seeds",
    "devices": "devices",
    "grid": "grid",
    "anil": "anil",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas between")
    parser.add_argument("--pairs", type=int, default=5, help="how often each two are timed")
    parser.add_argument("--quick", action="store_true", help="tiny settings: does it run?")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder")
    args = parser.parse_args()
    names = args.only.split(",")
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"--only: no {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    if args.pairs < 1:
        parser.error("--pairs: at least 1")

    args.out.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in names:
        print(f"{name} ...", flush=True)
        section = importlib.import_module(f"{__package__}.{SECTIONS[name]}")
        results[name] = section.run(args.pairs, args.quick)
        # After each: an hour's work is not lost with the last section.
        _report.write_json(args.out / "results.json", results)
    print(_report.table(results))


if __name__ == "__main__":
    main()
