"""Tables, for the terminal and as Markdown."""

import abc
from collections.abc import Sequence


class Table(abc.ABC):
    """Rows that print as a table. `markdown()` is the same for a page; notebooks show it."""

    @abc.abstractmethod
    def cells(self) -> Sequence[Sequence[str]]:
        """The text of every cell, row by row; the first row is the header."""

    def note(self) -> str:
        """What is said below the table; empty if nothing is."""
        return ""

    def __str__(self) -> str:
        rows = self.cells()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [_line(row, widths) for row in rows]
        rule = "  ".join("-" * width for width in widths)
        return "\n".join([lines[0], rule, *lines[1:], *[self.note()] * bool(self.note())])

    __repr__ = __str__

    def markdown(self) -> str:
        header, *rows = [[cell.replace("|", "\\|") for cell in row] for row in self.cells()]
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"{text}\n\n{self.note()}" if self.note() else text

    _repr_markdown_ = markdown


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    """The first column to the left, for it has names; the others to the right."""
    first, *rest = zip(row, widths, strict=True)
    aligned = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
    return "  ".join(aligned).rstrip()
