"""A fault at the nth call that touches the disk, and the count of what became of faults."""

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Callable
from unittest import mock

from eqxmeta._checkpoint import container as _container
from eqxmeta._files import atomic as _atomic
from eqxmeta._files import paths as _files


class Tally:
    """Faults by kind, and the lost ones in words."""

    def __init__(self):
        self.tried: Counter[str] = Counter()
        self.lost: list[str] = []

    def add(self, kind: str, problem: str | None = None) -> None:
        self.tried[kind] += 1
        if problem is not None:
            self.lost.append(f"{kind}: {problem}")

    def __str__(self) -> str:
        tried = ", ".join(f"{count} {kind}" for kind, count in self.tried.items())
        total = sum(self.tried.values())
        figures = f"tried {total}, survived {total - len(self.lost)}, lost {len(self.lost)}"
        return "\n".join([f"{figures} ({tried})", *self.lost])


class Disk:
    """Counts writes to files, fsyncs and renames of the library, and calls `act` at the nth. With
    `opens` it counts files that are opened as well, also those to be read."""

    def __init__(
        self,
        nth: int | None = None,
        act: Callable[[], None] | None = None,
        *,
        opens: bool = False,
    ):
        self.calls: list[str] = []
        self._opens = opens
        self._nth = nth
        self._act = act
        self._lock = threading.Lock()

    def touch(self, name: str) -> None:
        with self._lock:
            self.calls.append(name)
            now = len(self.calls) == self._nth
        if now and self._act is not None:
            self._act()

    @contextlib.contextmanager
    def watched(self):
        with contextlib.ExitStack() as stack:
            for name in ("fsync", "replace", "rename"):
                stack.enter_context(mock.patch.object(os, name, self._counted(getattr(os, name))))
            for module in (_container, _atomic, _files):
                stack.enter_context(mock.patch.object(module, "open", self._open, create=True))
            yield self

    def _counted(self, function):
        def counted(*args, **kwargs):
            self.touch(function.__name__)
            return function(*args, **kwargs)

        return counted

    def _open(self, *args, **kwargs):
        if self._opens:
            self.touch("open")
        return _File(open(*args, **kwargs), self)


class _File:
    """A file whose writes are counted."""

    def __init__(self, file, disk: Disk):
        self._file = file
        self._disk = disk

    def write(self, data):
        self._disk.touch("write")
        return self._file.write(data)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return self._file.__exit__(*error)
