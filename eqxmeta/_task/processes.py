"""The processes of a run: what one of them decides by itself, all agree on."""

import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from .._errors import explain

# How many numbers are agreed on at once, at most; and that which no process has.
_NUMBERS, _NONE = 2, np.iinfo(np.int32).max
# Digits of a size: JAX has 64 bits only if asked to.
_DIGIT = 2**30
# For so long others are told of an error: they may compile, or be in a hook; or have died.
_SECONDS = 60.0


class Processes:
    """The processes whose devices are in `mesh`. All of them make the same calls in the same order,
    and what one alone knows (a signal, its clock, an error) passes to the others where all come by:
    in `agree`, before everything that they compute together. A single process asks nobody.

    - `several`: whether there is more than one.
    - `first`: whether this is the one that writes the files and speaks to the user.
    """

    # What another has failed by, since `together` began: of an evaluation in a run, of which the
    # run has an object of its own, too. Nobody waits to be told of it again.
    _heard: ClassVar[BaseException | None] = None

    def __init__(self, mesh: Mesh | None):
        processes = set() if mesh is None else {d.process_index for d in mesh.devices.flat}
        self.several = len(processes) > 1
        self.first = not self.several or jax.process_index() == 0

    def agree(self, number: int = 0) -> int:
        """The least number that any process has. Raises what another has failed by."""
        return self._gather((number,))[0] if self.several else number

    def from_first(self, value: Any) -> Any:
        """Process 0's `value`, plain or NumPy; the others may give anything."""
        if not self.several:
            return value
        data = np.frombuffer(pickle.dumps(value) if self.first else b"", np.uint8)
        high, low = self._gather(divmod(len(data), _DIGIT) if self.first else ())
        if not self.first:
            data = np.zeros(high * _DIGIT + low, np.uint8)
        return pickle.loads(multihost_utils.broadcast_one_to_all(data).tobytes())

    @contextmanager
    def together(self) -> Iterator[None]:
        """All leave the block as one: what a process fails by in it, the others fail by."""
        if not self.several:
            yield
            return
        Processes._heard = None
        try:
            yield
            self.agree()
        except BaseException as error:
            # What JAX raises for a lost connection has many types.
            if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):
                message = "What several processes compute together has failed."
                expected = "that all of them go on. If one has ended, its output says why: start "
                expected += "them all again, with `resume='auto'`"
                error.add_note(explain(message, str(error).partition("\n")[0], expected))
            elif Processes._heard is None:
                self._tell(error)
            raise

    def _tell(self, error: BaseException) -> None:
        """Let the next `agree` of the others raise `error`."""

        def tell() -> None:
            try:
                data = pickle.dumps(error)
                pickle.loads(data)  # not all that can be written can be read
            except Exception:
                data = pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
            with suppress(Exception):  # nobody may be there any more
                self._gather((), data)

        thread = threading.Thread(target=tell, name="eqxmeta-tell", daemon=True)
        thread.start()
        thread.join(_SECONDS)

    def _gather(self, numbers: Any, error: bytes = b"") -> list[int]:
        row = np.full(1 + _NUMBERS, _NONE, np.int32)
        row[0] = len(error)
        row[1 : 1 + len(numbers)] = numbers
        rows = multihost_utils.process_allgather(row)
        if not rows[:, 0].any():
            return rows[:, 1:].min(axis=0).tolist()
        sizes = rows[:, 0]
        data = np.zeros(sizes.max(), np.uint8)
        data[: len(error)] = np.frombuffer(error, np.uint8)
        everyone = multihost_utils.process_allgather(data)
        failed = int(np.flatnonzero(sizes)[0])
        heard = Processes._heard = pickle.loads(everyone[failed, : sizes[failed]].tobytes())
        received, expected = f"process {failed} of {len(sizes)}", "that none fails: all end as one"
        heard.add_note(explain("Another process has failed.", received, expected))
        raise heard
