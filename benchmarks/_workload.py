"""The founding notebook's MAML on sine waves, as plain NumPy: what every peer computes.

`y = A sin(x - phase)`, an MLP 1-40-40-1 with ReLU, mean squared error over points and then over
tasks, one inner SGD step, Adam outside.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

TASKS, POINTS = 16, 32  # a step; points in the support set, and again in the query set
LAYERS = (1, 40, 40, 1)
INNER_RATE = 0.01
OUTER_RATE, B1, B2, EPS = 1e-3, 0.9, 0.999, 1e-8
READ_EVERY = 100  # outer steps from one reading of the loss to the next

Weights = list[tuple[np.ndarray, np.ndarray]]
# Support x and y, query x and y: `[tasks, points, 1]` each.
Tasks = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def initial_weights(seed: int) -> Weights:
    """`(weight [out, in], bias [out])` of every layer, uniform as in torch and Equinox."""
    rng = np.random.default_rng(seed)
    weights = []
    for fan_in, fan_out in pairwise(LAYERS):
        limit = fan_in**-0.5
        weight = rng.uniform(-limit, limit, (fan_out, fan_in))
        bias = rng.uniform(-limit, limit, fan_out)
        weights.append((weight.astype(np.float32), bias.astype(np.float32)))
    return weights


def sample(rng: np.random.Generator, tasks: int = TASKS) -> Tasks:
    """New tasks, sampled on the host as the notebook does."""
    amplitude = rng.uniform(0.1, 5.0, (tasks, 1, 1))
    phase = rng.uniform(-np.pi, np.pi, (tasks, 1, 1))
    x = rng.uniform(-5.0, 5.0, (tasks, 2 * POINTS, 1))
    y = amplitude * np.sin(x - phase)
    x, y = x.astype(np.float32), y.astype(np.float32)
    return x[:, :POINTS], y[:, :POINTS], x[:, POINTS:], y[:, POINTS:]


def relative_error(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> float:
    """Norm of `a - b` over the norm of `b`, over all leaves together, in float64."""
    if [x.shape for x in a] != [x.shape for x in b]:
        raise ValueError(f"shapes differ: {[x.shape for x in a]} and {[x.shape for x in b]}")
    flat_a, flat_b = (np.concatenate([x.ravel() for x in xs]).astype(np.float64) for xs in (a, b))
    return float(np.linalg.norm(flat_a - flat_b) / np.linalg.norm(flat_b))
