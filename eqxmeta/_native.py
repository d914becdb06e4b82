import numpy as np


def native(x: np.ndarray) -> np.ndarray:
    """Floats as JAX takes them: in this machine's order of bytes, and of 64 bits at most. Others,
    and those that are so, come back as they are."""
    if x.dtype.kind != "f":
        return x
    kind = x.dtype.newbyteorder("=") if x.dtype.itemsize <= 8 else np.dtype(np.float64)
    return x.astype(kind, copy=False)
