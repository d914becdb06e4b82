"""The same MAML as others write it, a module for each way.

Every module has a class `Peer`:

- `Peer.name`, and `Peer.extra`: what of this project's extras installs it (`""`: nothing more).
- `Peer(weights)`: `_workload.initial_weights(seed)`, never changed.
- `.meta_gradient(tasks)`: at `weights`, of the mean query loss after the inner step; in order
  w1, b1, w2, b2, w3, b3.
- `.train(steps)`: outer steps from `weights` on tasks of its own, those of every other peer, with
  sampling; returns when all is done. Meanwhile `.loss` is what was read back last.

The first call of either compiles or warms up. A module whose library is not installed raises
`ImportError`.
"""

import importlib

# By module, without the underscore.
EXTRAS = {
    "notebook": "",
    "torch_func": "bench-torch",
    "torch_loop": "bench-torch",
    "higher": "bench-higher",
    "torchopt": "bench-torchopt",
}


def available() -> tuple[dict[str, type], dict[str, tuple[str, str]]]:
    """The peers that can be imported, by module; of the others the reason and the extra."""
    found, missing = {}, {}
    for name, extra in EXTRAS.items():
        try:
            found[name] = importlib.import_module(f"{__name__}._{name}").Peer
        except ImportError as error:
            missing[name] = (str(error), extra)
    return found, missing
