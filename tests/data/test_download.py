"""The download of Omniglot, from a server on the loopback: all of it arrives, or nothing does."""

import hashlib
import http.server
import io
import stat
import threading
import zipfile

import numpy as np
import pytest
from PIL import Image

import eqxmeta as em
from eqxmeta.data import _download, _omniglot_archives
from eqxmeta.data._download import Remote
from eqxmeta.data._omniglot_archives import _Part

pytestmark = pytest.mark.usefixtures("as_users_run_it")


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; `said[path]` is a length that it claims in the place of the true one."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.said: dict[str, int] = {}
        self.moved: dict[str, str] = {}
        self.asked: list[str] = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path in self.server.moved:
            self.send_response(302)
            self.send_header("Location", self.server.moved[self.path])
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.path in self.server.files:
            body = self.server.files[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(self.server.said.get(self.path, len(body))))
            self.end_headers()
            self.wfile.write(body)
        else:
            self.send_error(404)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def running():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def server(running, monkeypatch, tmp_path):
    """A server of two small archives, sound unless a test changes them, and an empty folder for
    temporary files."""
    running.files, running.said, running.moved, running.asked = {}, {}, {}, []
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(_download, "_SCHEMES", ("https", "http"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(_omniglot_archives.tempfile, "tempdir", str(tmp_path / "tmp"))
    publish(running, monkeypatch, background=archive(BACKGROUND), evaluation=archive(EVALUATION))
    return running


# Numbers as published, so that the rule of the Vinyals split applies: 1201 is its first test
# character. Out of order, as an archive may be.
BACKGROUND = {
    "images_background/Armenian/character02": 28,
    "images_background/Arcadian/character01": 1,
}
EVALUATION = {"images_evaluation/Gurmukhi/character42": 1201}


def drawing(number, drawer):
    """Ink is True, 105 x 105."""
    return np.random.default_rng((number, drawer)).random((105, 105)) < 0.3


def png(ink, mode="1", kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(np.where(ink, 0, 255).astype(np.uint8)).convert(mode).save(file, kind)
    return file.getvalue()


def archive(folders, extra=(), drawers=20):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        for folder, number in folders.items():
            target.writestr(f"{folder}/", b"")
            for drawer in range(drawers, 0, -1):
                name = f"{folder}/{number:04}_{drawer:02}.png"
                target.writestr(name, png(drawing(number, drawer)))
        target.writestr("__MACOSX/._images", b"what systems leave in archives")
        for info, content in extra:
            target.writestr(info, content)
    return file.getvalue()


def publish(server, monkeypatch, **archives):
    parts = []
    for split, content in archives.items():
        path = f"/images_{split}.zip"
        server.files[path] = content
        remote = Remote(server.url + path, hashlib.sha256(content).hexdigest(), len(content))
        parts.append(_Part(split, remote, {"background": 2, "evaluation": 1}[split]))
    monkeypatch.setattr(_omniglot_archives, "_PARTS", tuple(parts))


def left_behind(tmp_path):
    return [path for path in tmp_path.rglob("*") if path != tmp_path / "tmp"]


def refused(tmp_path, error, said, root="data"):
    with pytest.raises(error, match=f"(?s){said}") as caught:
        em.data.omniglot(tmp_path / root, download=True)
    assert "\nReceived: " in str(caught.value) and "\nExpected: " in str(caught.value)
    assert left_behind(tmp_path) == []


def mean_ink(ink):
    """The mean over the pixels whose centre is in a cell, 3.75 pixels wide."""
    cell = np.ceil((np.arange(105) + 0.5) / 3.75) - 1  # on the border: of the earlier one
    inside = np.arange(28)[:, None] == cell
    weights = inside / inside.sum(1, keepdims=True)
    return 255 * weights @ ink @ weights.T


def test_archives_become_a_compact_file(server, tmp_path):
    root = tmp_path / "some" / "where"
    train = em.data.omniglot(root, "train", download=True)
    assert train.class_names == ("Arcadian/character01",)
    assert em.data.omniglot(root, "val").class_names == ("Armenian/character02",)
    test = em.data.omniglot(root, "test")
    assert test.class_names == ("Gurmukhi/character42",)
    for data, number in ((train, 1), (test, 1201)):
        assert data.images.shape == (20, 1, 28, 28)
        expected = np.stack([mean_ink(drawing(number, drawer)) for drawer in range(1, 21)])
        assert np.abs(data.images[:, 0] - expected).max() < 1.5  # Pillow rounds twice
    assert sorted(path.name for path in root.iterdir()) == ["omniglot28.npz"]
    assert not any((tmp_path / "tmp").iterdir())
    with np.load(root / "omniglot28.npz") as file:
        assert list(file["split"]) == ["background", "background", "evaluation"]
        assert list(file["vinyals"]) == ["train", "val", "test"]
        assert file["images"].dtype == np.uint8 and file["images"].shape == (3, 20, 28, 28)
    assert server.asked == ["/images_background.zip", "/images_evaluation.zip"]
    em.data.omniglot(root, download=True)  # it is there
    assert len(server.asked) == 2


def test_another_file_than_the_published_one(server, tmp_path):
    body = server.files["/images_evaluation.zip"]
    changed = bytearray(body)
    changed[200] ^= 1
    server.files["/images_evaluation.zip"] = bytes(changed)
    refused(tmp_path, ValueError, "images_evaluation.zip is not what was published.*sha256")


def test_a_transfer_that_breaks_off(server, tmp_path):
    body = server.files["/images_evaluation.zip"]
    server.files["/images_evaluation.zip"] = body[:-100]
    refused(tmp_path, ValueError, "not what was published")  # and claims to be whole
    server.said["/images_evaluation.zip"] = len(body)
    refused(tmp_path, OSError, "was not received")
    del server.files["/images_evaluation.zip"]
    refused(tmp_path, OSError, "was not received.*404")


def test_more_bytes_than_were_published(server, tmp_path):
    server.files["/images_background.zip"] += b"x" * 2**20
    refused(tmp_path, ValueError, "more bytes than were published")


def test_redirections_are_not_followed(server, tmp_path):
    server.files["/elsewhere"] = server.files.pop("/images_background.zip")
    server.moved["/images_background.zip"] = f"{server.url}/elsewhere"
    refused(tmp_path, ValueError, "not what was published")
    assert "/elsewhere" not in server.asked


def test_only_https(server, tmp_path, monkeypatch):
    monkeypatch.setattr(_download, "_SCHEMES", ("https",))
    refused(tmp_path, ValueError, "not safe.*http://.*https")
    assert server.asked == []


def test_what_is_pinned_is_https():
    # The module's own, not those of a test.
    background, evaluation = _omniglot_archives._PARTS
    assert background.characters + evaluation.characters == 1623
    for part in (background, evaluation):
        assert part.remote.url.startswith("https://") and len(part.remote.sha256) == 64
    assert _download._SCHEMES == ("https",)


def link(name):
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize(
    ("member", "said"),
    [
        (("../outside.png", b"x"), "leads out"),
        (("images_background/../../outside.png", b"x"), "leads out"),
        (("/tmp/outside.png", b"x"), "leads out"),
        (("..\\outside.png", b"x"), "leads out"),
        (("C:/outside.png", b"x"), "leads out"),
        ((link("images_background/link"), b"/etc/passwd"), "a link"),
        (("images_background/large.png", bytes(2**17 + 1)), "131,073 bytes"),
    ],
)
def test_unsafe_archives_are_refused_as_a_whole(server, tmp_path, monkeypatch, member, said):
    publish(server, monkeypatch, background=archive(BACKGROUND, [member]))
    refused(tmp_path, ValueError, f"images_background.zip is not safe to read.*{said}")


def test_an_archive_that_unpacks_to_too_much(server, tmp_path, monkeypatch):
    monkeypatch.setattr(_omniglot_archives, "_TOTAL_SIZE", 1000)
    refused(tmp_path, ValueError, "not safe to read.*at most 1,000 bytes")


def broken(content):
    """A flipped bit in the compressed data of the first drawing."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        offset = next(i.header_offset for i in file.infolist() if i.file_size)
    changed = bytearray(content)
    changed[offset + 120] ^= 4
    return bytes(changed)


NAME = "images_background/Arcadian/character01/0001_21.png"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no archive at all", "damaged"),
        (broken(archive(BACKGROUND)), "damaged|not a drawing"),
        (archive(BACKGROUND, drawers=19), "incomplete.*20 drawings"),
        (archive(EVALUATION), "incomplete.*1 characters.*2 characters"),
        (archive(BACKGROUND, [(NAME, b"")]), "incomplete"),
    ],
)
def test_damaged_and_incomplete_archives(server, tmp_path, monkeypatch, content, said):
    publish(server, monkeypatch, background=content)
    refused(tmp_path, ValueError, said)


@pytest.mark.parametrize(
    "content",
    [
        b"no picture",
        png(np.ones((105, 105), bool))[:40],
        png(np.ones((105, 104), bool)),
        png(np.ones((105, 105), bool), mode="RGB"),
        png(np.ones((105, 105), bool), kind="GIF"),
    ],
)
def test_members_that_are_not_drawings(server, tmp_path, monkeypatch, content):
    folder = {"images_evaluation/Gurmukhi/character42": 1201}
    whole = archive(folder, drawers=19)
    file = io.BytesIO(whole)
    with zipfile.ZipFile(file, "a") as target:
        target.writestr("images_evaluation/Gurmukhi/character42/1201_20.png", content)
    publish(server, monkeypatch, evaluation=file.getvalue())
    refused(tmp_path, ValueError, "1201_20.png is not a drawing")


def test_a_disk_that_is_full_at_the_end(server, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_omniglot_archives.np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space left"):
        em.data.omniglot(tmp_path / "data", download=True)
    assert [path.name for path in left_behind(tmp_path)] == ["data"]


def test_without_the_extra(server, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pooch", None)
    refused(tmp_path, ImportError, r"no pooch.*eqxmeta\[data\]")
