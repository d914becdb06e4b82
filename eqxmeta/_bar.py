"""A bar that shows progress: in a terminal on stderr, in a notebook as a widget."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any

from ._errors import Unfailing

if TYPE_CHECKING:
    from tqdm import tqdm

# What is done sooner needs no bar.
_SECONDS = 2.0


def open_bar(disable: bool | None = None, **options: Any) -> "tqdm":
    """tqdm's bar with these options. `disable=None`: quiet unless there is a terminal or a
    notebook. It fails over nothing that becomes of stderr."""
    if in_notebook():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # without ipywidgets it is a line of text
            from tqdm.auto import tqdm
        return tqdm(disable=bool(disable), **options)
    from tqdm import tqdm

    stdout, stderr = Unfailing(sys.stdout), Unfailing(sys.stderr)
    with redirect_stdout(stdout), redirect_stderr(stderr):  # tqdm flushes both
        return tqdm(disable=disable, **_size(stderr), **options)


def in_notebook() -> bool:
    """Whether this is a kernel of Jupyter, which is no terminal and shows what is printed."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return "IPKernelApp" in getattr(shell, "config", ())


@contextmanager
def progress(total: int, unit: str) -> Iterator[Callable[[int], object]]:
    """A bar for a block that takes longer than a moment: `advance(n)` when `n` more are done."""
    if not in_notebook() and not Unfailing(sys.stderr).isatty():  # tqdm would start its thread
        yield lambda n: None
        return
    bar = open_bar(total=total, unit=unit, delay=_SECONDS, leave=False)
    try:
        yield bar.update
    finally:
        bar.close()


def _size(stderr: Unfailing) -> dict[str, Any]:
    """That of the terminal, as it changes; or, of one that knows of no columns or no rows (many
    that programs and containers make up), what would be there: tqdm would show nothing."""
    try:
        columns, rows = os.get_terminal_size(stderr.fileno())
    except Exception:  # no terminal
        return {"dynamic_ncols": True}
    if columns > 1 and rows > 2:
        return {"dynamic_ncols": True}
    return {"ncols": columns - 1 if columns > 1 else 79, "nrows": 24}
