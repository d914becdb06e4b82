"""Files from the network and zip archives from strangers: checked before they are believed."""

import functools
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .._errors import explain
from ._extra import need

# Tests serve from the loopback without TLS; nobody else has a reason to change this.
_SCHEMES = ("https",)
_TIMEOUT = 60  # seconds without an answer


@dataclass(frozen=True)
class Remote:
    """A file that somebody published, and how to know it again; `size` in bytes."""

    url: str
    sha256: str
    size: int


def fetch(remote: Remote, folder: Path, caller: str) -> Path:
    """Download `remote` into `folder`, and return its path once its checksum was found right.

    No byte beyond the published size is stored and no redirection is followed. Raises `OSError`
    if the transfer fails, `ValueError` for an address that is not https and for another file than
    the published one; then nothing is left in `folder`.
    """
    pooch = need("pooch", caller)
    scheme, _, _ = remote.url.partition("://")
    if scheme not in _SCHEMES:
        expected = "an https address: nobody can change the file on its way"
        raise ValueError(explain("A download is not safe.", remote.url, expected))
    try:
        path = pooch.retrieve(
            remote.url,
            known_hash=f"sha256:{remote.sha256}",
            fname=remote.url.rpartition("/")[2],
            path=folder,
            downloader=functools.partial(_stream, remote.size),
        )
    except OSError as error:  # those of requests, too
        expected = f"a file of {remote.size:,} bytes"
        raise OSError(explain(f"{remote.url} was not received.", repr(error), expected)) from error
    except ValueError as error:
        expected = f"the published file: {remote.size:,} bytes of sha256 {remote.sha256}"
        message = f"{remote.url} is not what was published."
        raise ValueError(explain(message, str(error), expected)) from error
    return Path(path)


def _stream(size: int, url: str, path: str, _: Any) -> None:
    """Pooch's own downloader knows no limit, and leaves the connection open after an error."""
    import requests  # pooch depends on it

    get = functools.partial(requests.get, stream=True, timeout=_TIMEOUT, allow_redirects=False)
    with open(path, "wb") as file, get(url) as response:
        response.raise_for_status()
        received = 0
        for part in response.iter_content(2**16):
            received += len(part)
            if received > size:
                raise ValueError("more bytes than were published")
            file.write(part)


@contextmanager
def opened_archive(
    path: Path, *, member_size: int, total_size: int
) -> Iterator[tuple[zipfile.ZipFile, list[zipfile.ZipInfo]]]:
    """The zip archive `path` and the files in it, to be read in memory: nothing is extracted, so
    no name in it ever becomes a path. An archive that tries to is refused as a whole all the same.

    `member_size`, `total_size`: what a file, and all files, may hold at most, in bytes unpacked.
    Raises `ValueError`, also for damage that shows while the block reads.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            _check_members(path, infos, member_size, total_size)
            yield archive, [info for info in infos if not info.is_dir()]
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        message = f"The archive {path.name} is damaged."
        raise ValueError(explain(message, repr(error), "a sound zip archive")) from error


def _check_members(
    path: Path, infos: list[zipfile.ZipInfo], member_size: int, total_size: int
) -> None:
    names = [info.filename for info in infos]
    for info in infos:
        name = PurePosixPath(info.filename)
        if name.is_absolute() or ".." in name.parts or set(info.orig_filename) & set("\\:\0"):
            problem = "a path that leads out of the archive"
        elif stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            problem = "a link or a device"
        elif info.flag_bits & 1:
            problem = "encrypted"
        elif info.file_size > member_size:
            problem = f"{info.file_size:,} bytes"
        else:
            continue
        expected = f"files and folders with relative paths, at most {member_size:,} bytes a file"
        message = f"The archive {path.name} is not safe to read."
        raise ValueError(explain(message, f"{info.filename!r}: {problem}", expected))
    total = sum(info.file_size for info in infos)
    if total > total_size or len(set(names)) < len(names):
        raise ValueError(
            explain(
                f"The archive {path.name} is not safe to read.",
                f"{total:,} bytes in {len(names)} members of {len(set(names))} names",
                f"at most {total_size:,} bytes, every name once",
            )
        )
