"""A folder, or a file, of which one process at a time is the owner."""

import contextlib
import errno
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from .._errors import CheckpointInUse, explain
from .paths import make_folder, remove_empty

try:
    import fcntl
except ImportError:
    fcntl = None
    import msvcrt

NAME = ".lock"
_HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
_held: set[int] = set()  # open descriptors with a lock
_BEYOND = 1 << 30  # a byte after all of the file: on Windows nobody can read one that is locked


@contextmanager
def locked(folder: Path, name: str = NAME) -> Iterator[None]:
    """Own `folder`, which is made if there is none, for the length of the block.

    The lock is the operating system's, on the file `name` in it: it ends with its process, however
    that ends. Afterwards the file is gone, and so are folders that were made and got no content.

    Raises `CheckpointInUse` if somebody else owns the folder, also in this process; `OSError` if
    it cannot be made or written to.
    """
    made = make_folder(folder)
    try:
        descriptor, process = _acquire(folder, name), os.getpid()
        _held.add(descriptor)
        try:
            yield
        finally:
            if os.getpid() == process:  # a fork that unwinds owns nothing
                _held.discard(descriptor)
                _release(folder, name, descriptor)
    finally:
        remove_empty(made)


def file_locked(path: Path) -> AbstractContextManager[None]:
    """As `locked`, but own the file `path` alone, by whatever links it is reached."""
    real = Path(os.path.realpath(path))
    return locked(real.parent, f".{real.name}.lock")


def _acquire(folder: Path, name: str) -> int:
    path = folder / name
    while True:
        descriptor = _open(path)
        try:
            _lock(descriptor)
            # An owner removes the file: the one that we have open may be of the past.
            if fcntl is None or _is_open(path, descriptor):
                _sign(descriptor)
                return descriptor
        except OSError as error:
            if error.errno in _HELD:
                owner = os.pread(descriptor, 200, 0) if hasattr(os, "pread") else b""
                os.close(descriptor)
                raise CheckpointInUse(
                    explain(
                        f"Another run writes to the folder {folder}.",
                        f"a lock of {owner.decode(errors='replace').strip() or 'another process'}",
                        "a folder for each run, or to wait until the other one has ended",
                    )
                ) from None
            message = f"The file system of {folder} knows no locks: see that nobody else uses it."
            warnings.warn(f"{message} ({error})", RuntimeWarning, stacklevel=2)
            return descriptor
        os.close(descriptor)


def _open(path: Path) -> int:
    try:  # not through a link: what it leads to would be overwritten
        return os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.ELOOP):
            raise
        expected = "nothing, or the lock of another run: move it away"
        raise OSError(explain(f"{path} is no lock.", "a folder or a link", expected)) from None


def _release(folder: Path, name: str, descriptor: int) -> None:
    path = folder / name
    with contextlib.suppress(OSError):
        if fcntl is not None and _is_open(path, descriptor):
            path.unlink()  # while it is ours
    os.close(descriptor)
    if fcntl is None:
        with contextlib.suppress(OSError):  # Windows refuses it if somebody else has opened it
            path.unlink()


def _lock(descriptor: int) -> None:
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        os.lseek(descriptor, _BEYOND, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # pyright: ignore


def _is_open(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    # For the message of whoever is refused; a full disk is no reason to refuse the owner.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())


def _forget() -> None:
    # A worker that outlives its parent would go on owning what the parent has locked.
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
