"""Means over tasks, and their 95% intervals."""

import numpy as np


def half_width95(values: np.ndarray) -> np.ndarray:
    """Of the 95% interval, by Student's t, of the mean over the first axis; NaN if that is 1 long,
    for of one number there is no interval."""
    if len(values) < 2:
        return np.full(values.shape[1:], np.nan)
    from scipy.special import stdtrit  # takes a while to import; JAX depends on SciPy

    n = len(values)
    return np.asarray(stdtrit(n - 1, 0.975) * values.std(axis=0, ddof=1) / np.sqrt(n))


def shown(metric: str, mean: float, half: float, *, sign: bool = False) -> str:
    """A mean and its interval, in percent if it is an accuracy: "76.24 ± 1.10 %"."""
    plus = "+" * sign
    if metric == "accuracy":
        return f"{100 * mean:{plus}.2f} ± {100 * half:.2f} %"
    return f"{mean:{plus}.4g} ± {half:.2g}"
