import argparse
import random
import shutil
import sys
import tempfile
import warnings
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, times in (
        ("kill", 100),
        ("writes", 0),
        ("damage", 1000),
        ("exchange", 200),
        ("distributed", 50),
    ):
        command = commands.add_parser(name)
        command.add_argument("--seed", type=int, default=0, help="of what is random")
        if times:
            command.add_argument("--times", type=int, default=times)
    command = commands.add_parser("fuzz")
    command.add_argument("--seed", type=int, default=0, help="of what is random")
    command.add_argument("--minutes", type=float, default=60)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    folder = Path(tempfile.mkdtemp(prefix="eqxmeta-faults-"))
    if args.command == "kill":
        from .kill import kill  # before JAX has any thread: it forks

        tally = kill(folder, args.times, rng)
    elif args.command == "distributed":
        from .distributed import distributed

        tally = distributed(folder, args.times, rng)
    else:
        warnings.simplefilter("ignore", RuntimeWarning)
        if args.command == "writes":
            from .writes import writes

            tally = writes(folder)
        elif args.command == "exchange":
            from .exchange import exchange

            tally = exchange(folder, rng, times=args.times)
        elif args.command == "fuzz":
            from .fuzz import fuzz

            tally = fuzz(folder, rng, args.minutes)
        else:
            from .damage import damage

            tally = damage(folder, args.times, rng)
    print(f"seed {args.seed}: {tally}")
    if tally.lost:
        print(f"kept for whoever looks into it: {folder}")
    else:
        shutil.rmtree(folder)
    return 1 if tally.lost else 0


if __name__ == "__main__":
    sys.exit(main())
