"""Names near the limit: what starts can be ended and resumed, and the rest is refused at once."""

import os

import jax.numpy as jnp
import pytest

import eqxmeta as em
from eqxmeta.callbacks import JSONL, AdaptationPlot, Checkpoint, TensorBoard

from ..boring import Recorder, boring_fit

LONGEST = 255 - 16


def fit(path, steps, **options):
    recorder = Recorder()
    callbacks = [recorder, JSONL(path), Checkpoint(path.parent / "saved", every=5)]
    boring_fit(steps, callbacks=callbacks, **options)
    return recorder


@pytest.mark.parametrize("letter", ["x", "é"])
def test_a_log_whose_name_is_accepted_can_be_resumed_and_set_aside(tmp_path, letter):
    name = letter * (LONGEST // len(letter.encode()))
    path = tmp_path / name.ljust(LONGEST - len(name.encode()) + len(name), "x")
    assert len(os.fsencode(path.name)) == LONGEST
    fit(path, 5)
    for count in range(2):  # a line too many, damage in the middle: all that is ever written beside
        path.write_bytes(b"{\n" + path.read_bytes())
        with pytest.warns(RuntimeWarning, match="damaged"):
            fit(path, 10 + count, resume="auto")
    assert path.read_bytes().count(b"\n") == 11
    em.save(path.with_name("y" * LONGEST), jnp.ones(1))


@pytest.mark.parametrize("size", [LONGEST + 1, 245, 255, 256, 5000])
@pytest.mark.parametrize("through", ["name", "link"])
def test_longer_ones_are_refused_before_anything_is_there(tmp_path, size, through):
    path = tmp_path / ("x" * size)
    if through == "link":
        if size > 255:
            pytest.skip("no such name")
        (tmp_path / "link").symlink_to(path.name)
        path = tmp_path / "link"
    before = os.listdir(tmp_path)
    told = r"(?s)path=.* is too long.*Received: a name of [0-9,]+ bytes.*Expected: 239 bytes"
    with pytest.raises(OSError, match=told):
        fit(path, 5)
    with pytest.raises(OSError, match=told):
        em.save(path, jnp.ones(1))
    with (
        pytest.raises(OSError, match=told),
        AdaptationPlot(em.tasks.Sinusoid(shots=5, queries=5), path).exclusive(),
    ):
        pass
    assert os.listdir(tmp_path) == before


@pytest.mark.parametrize("callback", [Checkpoint, TensorBoard, JSONL])
def test_folders_that_leave_no_room_for_a_name(tmp_path, callback):
    def attached(path):
        if callback is Checkpoint:
            return Checkpoint(path, every=1)
        return callback(path / "log" if callback is JSONL else path)

    deep = tmp_path
    while len(os.fsencode(deep)) < 3_900:
        deep = deep / ("x" * 200)
    for path, told in ((deep, "a path of"), (tmp_path / ("x" * 256), "a name of 256 bytes")):
        with pytest.raises(OSError, match=f"(?s)too long.*Received: {told}.*Expected: "):
            boring_fit(1, callbacks=[attached(path)])
    assert os.listdir(tmp_path) == []


def test_halves_of_characters_are_in_no_path(tmp_path):
    for use in (
        lambda p: em.save(p, jnp.ones(1)),
        em.inspect,
        lambda p: em.load(p, jnp.ones(1)),
        JSONL,
    ):
        with pytest.raises(ValueError, match=r"(?s)path=.*Received: .*\\ud800.*Expected: a path"):
            use(str(tmp_path / "\ud800"))
