"""The download of Omniglot, from a server on the loopback: all of it arrives, or nothing does."""

import gc
import hashlib
import http.server
import io
import threading
import zipfile

import numpy as np
import pytest
from PIL import Image

import eqxmeta as em
from eqxmeta.data import _omniglot_archives

pytestmark = pytest.mark.usefixtures("as_users_run_it")


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; `said[path]` is a length that it claims in the place of the true one."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.said: dict[str, int] = {}
        self.asked: list[str] = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path in self.server.files:
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
    running.files, running.said, running.asked = {}, {}, []
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(_omniglot_archives, "_URL", running.url)
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


def png(ink):
    file = io.BytesIO()
    Image.fromarray(np.where(ink, 0, 255).astype(np.uint8)).convert("1").save(file, "PNG")
    return file.getvalue()


def archive(folders):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        for folder, number in folders.items():
            target.writestr(f"{folder}/", b"")
            for drawer in range(20, 0, -1):
                name = f"{folder}/{number:04}_{drawer:02}.png"
                target.writestr(name, png(drawing(number, drawer)))
        target.writestr("__MACOSX/._images", b"what systems leave in archives")
    return file.getvalue()


def publish(server, monkeypatch, **archives):
    for split, content in archives.items():
        server.files[f"/images_{split}.zip"] = content
        sha256 = hashlib.sha256(content).hexdigest()
        monkeypatch.setitem(_omniglot_archives._ARCHIVES, split, sha256)


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
    refused(tmp_path, ValueError, "images_evaluation.zip has changed.*sha256")


# After an error Pooch leaves its connection to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_transfer_that_breaks_off(server, tmp_path):
    body = server.files["/images_evaluation.zip"]
    server.files["/images_evaluation.zip"] = body[:-100]
    refused(tmp_path, ValueError, "has changed")  # and claims to be whole
    server.said["/images_evaluation.zip"] = len(body)
    refused(tmp_path, OSError, "could not be downloaded")
    del server.files["/images_evaluation.zip"]
    refused(tmp_path, OSError, "could not be downloaded.*404")
    gc.collect()


def test_a_file_that_is_there_is_never_written_over(server, tmp_path):
    (tmp_path / "omniglot28.npz").write_bytes(b"the user's own")
    with pytest.raises(ValueError, match=r"omniglot28\.npz cannot be read"):
        em.data.omniglot(tmp_path, download=True)
    assert (tmp_path / "omniglot28.npz").read_bytes() == b"the user's own"
    assert server.asked == []


def test_what_is_pinned_is_https():
    assert _omniglot_archives._URL.startswith("https://")
    assert [len(sha256) for sha256 in _omniglot_archives._ARCHIVES.values()] == [64, 64]


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
