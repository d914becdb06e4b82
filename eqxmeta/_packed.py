"""Named scalars as few arrays: what the compiled loop keeps of each step."""

from collections.abc import Mapping

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


class Packed(eqx.Module):
    """Scalars under names, those of a dtype together in one array.

    To the compiler every array that a program returns is a kernel of its own: with one for each of
    512 inner steps, compiling them took twice as long as all else.

    - `arrays`: `[..., columns]`, one for each dtype.
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
    """`scalars` as one vector for each dtype."""
    by_dtype: dict[str, dict[str, Array]] = {}
    # Shorter names first, so that `x/2` is before `x/10`: what was cut out of one array is put back
    # as it was, and of neither the compiler leaves a trace.
    for name in sorted(scalars, key=lambda name: (len(name), name)):
        scalar = jnp.asarray(scalars[name])
        by_dtype.setdefault(scalar.dtype.name, {})[name] = scalar
    arrays = tuple(jnp.stack(list(group.values())) for group in by_dtype.values())
    return Packed(arrays, tuple(map(tuple, by_dtype.values())))
