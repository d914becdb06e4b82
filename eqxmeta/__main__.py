"""`python -m eqxmeta inspect PATH`: what is in a checkpoint, and whether it is sound."""

import argparse
import sys

from ._checkpoint.inspect import inspect
from ._errors import CheckpointError, tell


def main() -> int:
    """The exit code: 0, or 1 if there is no sound checkpoint, with the reason on stderr."""
    parser = argparse.ArgumentParser(prog="python -m eqxmeta")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("inspect", help="print a checkpoint's manifest and its leaves")
    command.add_argument("path", help="a file written by eqxmeta.save or by Checkpoint")
    try:
        inspect(parser.parse_args().path)
    except (CheckpointError, OSError, ValueError) as error:
        tell(error, sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
