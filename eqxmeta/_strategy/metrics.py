"""Named scalars as few arrays: what the compiled loop keeps of each step."""

from collections.abc import Mapping

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

# The metric of a run that skips steps: 1 for a step that was not taken, 0 for others.
SKIPPED = "skipped"


class Packed(eqx.Module):
    """Scalars under names, of which those of a series `x/0`, `x/1`, ... are one array.

    To the compiler every array that a program returns is a kernel of its own: with one for each of
    512 inner steps, compiling them took twice as long as all else. (Nor should all be one array: a
    kernel that computes a scalar can also put it where it belongs, but not into a vector.)

    - `arrays`: `[..., columns]`, one for each series and for each scalar that is in none.
    - `names`: those of the columns of each array.
    """

    arrays: tuple[Array, ...]
    names: tuple[tuple[str, ...], ...] = eqx.field(static=True)

    def unpacked(self) -> dict[str, np.ndarray]:
        """Each name's values, `[...]`, in the order of the names. On the host: a view."""
        columns = {
            name: np.asarray(array)[..., index]
            for array, names in zip(self.arrays, self.names, strict=True)
            for index, name in enumerate(names)
        }
        return {name: columns[name] for name in sorted(columns)}


def pack(scalars: Mapping[str, Array]) -> Packed:
    """`scalars` as one vector for each series, if it is of one dtype."""
    series: dict[tuple[str, str], dict[str, Array]] = {}
    # Shorter names first, so that `x/2` is before `x/10`: what was cut out of one array is put back
    # as it was, and of neither the compiler leaves a trace.
    for name in sorted(scalars, key=lambda name: (len(name), name)):
        scalar = jnp.asarray(scalars[name])
        series.setdefault((_stem(name), scalar.dtype.name), {})[name] = scalar
    arrays = tuple(jnp.stack(list(members.values())) for members in series.values())
    return Packed(arrays, tuple(map(tuple, series.values())))


def _stem(name: str) -> str:
    stem, slash, number = name.rpartition("/")
    return stem + slash if number.isdecimal() and slash else name
