"""Processes that train together on this machine, over loopback: one of them, and how to start all.

`python -m tests.processes.pair SCENARIO FOLDER PORT COUNT INDEX` is one; a scenario is a function
of `scenarios.py`.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def start(scenario: str, folder: Path, count: int = 2) -> list[subprocess.Popen]:
    """The processes. What they print is in `out-0`, `err-0`, ... of the folder."""
    folder.mkdir(exist_ok=True)
    port, started = free_port(), []
    env = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"}
    for index in range(count):
        command = [sys.executable, "-m", "tests.processes.pair", scenario, str(folder), str(port)]
        with open(folder / f"out-{index}", "w") as out, open(folder / f"err-{index}", "w") as err:
            started.append(
                subprocess.Popen(
                    [*command, str(count), str(index)], cwd=ROOT, stdout=out, stderr=err, env=env
                )
            )
    return started


def finish(started: list[subprocess.Popen], seconds: float = 120) -> list[int]:
    """Their exit codes."""
    try:
        return [process.wait(seconds) for process in started]
    finally:
        for process in started:
            process.kill()


def said(folder: Path, index: int) -> dict:
    """What process `index` has told by `tell`."""
    lines = (folder / f"out-{index}").read_text().splitlines()
    return dict(json.loads(line[5:]) for line in lines if line.startswith("told "))


def wait_for(folder: Path, text: str, started: list[subprocess.Popen]) -> None:
    """Until every process has printed it, or one has come to its end."""
    deadline = time.monotonic() + 120
    while not all(text in (folder / f"out-{i}").read_text() for i in range(len(started))):
        ended = [process.poll() for process in started if process.poll() is not None]
        assert not any(ended) and time.monotonic() < deadline, (folder / "err-0").read_text()
        if ended:  # nothing was left to do
            return
        time.sleep(0.02)


def tell(name: str, value: object) -> None:
    print("told", json.dumps([name, value]), flush=True)


def main(scenario: str, folder: str, port: str, count: str, index: str) -> None:
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    if int(count) > 1:
        # After so many seconds the others know of one that is gone: by default a hundred.
        options = {"heartbeat_timeout_seconds": 10}
        jax.distributed.initialize(f"localhost:{port}", int(count), int(index), **options)
    from . import scenarios

    getattr(scenarios, scenario)(Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
