"""JAX's persistent compilation cache, which the examples use: the same program, the same bits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..same_run import check_same_run

ROOT = Path(__file__).parents[2]


def run(folder, steps, cache=None):
    environment = dict(os.environ)
    if cache is not None:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(cache)
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    command = [sys.executable, "-m", "tests.resume_run", str(folder), str(steps)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_run_that_is_resumed_with_cached_programs_has_the_same_bits(tmp_path):
    straight, resumed, cache = (tmp_path / name for name in ("straight", "resumed", "cache"))
    straight.mkdir(), resumed.mkdir()
    run(straight, 200)
    run(resumed, 100, cache)
    compiled = {path.name for path in cache.glob("*-cache")}
    assert any("train_chunk" in name for name in compiled)
    run(resumed, 200, cache)
    again = {path.name for path in cache.glob("*-cache")}
    assert {name for name in again if "train_chunk" in name} <= compiled  # it was found there
    check_same_run(resumed, straight, 200)
