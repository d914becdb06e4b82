"""Losses of Equinox models that map one example to one output, with no batch axis.

Each is a `Loss`: `loss(model, (x, y), key) -> (scalar, metrics)`, means over examples. They are
computed in float32 at least: half-precision outputs are widened first.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ._direction import directed as directed
from ._errors import explain
from ._model.predict import predict as predict
from ._model.predict import predicted_class
from ._task.task import Task
from ._types import Metrics


def mse(
    model: Callable, batch: PyTree, key: PRNGKeyArray | None
) -> tuple[Float[Array, ""], Metrics]:
    """Mean squared error, over examples and outputs. No further metrics.

    `batch` is `(x, y)`, `x: [n, ...]`, `y: [n, ...]` of the shape of the predictions. Raises
    `ValueError` if the shapes differ: `[n]` against `[n, 1]` would broadcast to `[n, n]`.
    """
    x, y = _examples(batch)
    prediction = _array(predict(model, x, key), "Predictions")
    if prediction.shape != y.shape:
        labels = y.ndim == 1 and jnp.issubdtype(y.dtype, jnp.integer)
        hint = ". Of class numbers: `eqxmeta.losses.cross_entropy`" if labels else ""
        message = "Predictions and targets differ in shape."
        received = f"predictions {prediction.shape}, targets {y.shape}"
        expected = f"the same shape: one target for each output of each example{hint}"
        raise ValueError(explain(message, received, expected))
    return jnp.mean((_widened(prediction) - _widened(y)) ** 2), {}


def cross_entropy(
    model: Callable, batch: PyTree, key: PRNGKeyArray | None
) -> tuple[Float[Array, ""], Metrics]:
    """Cross-entropy in nats, mean over examples, of logits and integer labels; `accuracy` in
    [0, 1] as a metric.

    `batch` is `(x, y)`, `x: [n, ...]`, `y: [n]` of integers in `range(classes)`; the model maps
    an example to `[classes]` logits. A label outside that range, or a NaN among the logits, makes
    the loss, its gradient and the accuracy NaN. Raises `ValueError` or `TypeError` if shapes or
    dtypes are others.
    """
    x, y = _examples(batch)
    logits = _array(predict(model, x, key), "Logits")
    if logits.ndim != 2 or y.shape != logits.shape[:1]:
        message = "Logits and labels do not match."
        expected = "logits [n, classes] and labels [n]"
        raise ValueError(explain(message, f"logits {logits.shape}, labels {y.shape}", expected))
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(explain("Labels are not integers.", f"dtype {y.dtype}", "class numbers"))
    labels = y.astype(jnp.int32)
    known = (labels >= 0) & (labels < logits.shape[1])
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(_widened(logits), labels)
    # A factor, because that reaches the gradient. Optax counts a negative label from the end, and
    # one that is too large is NaN to it, but with the gradient of the normalisation alone.
    losses = losses * jnp.where(known, 1.0, jnp.nan)
    predicted = predicted_class(logits)  # -1 where a logit is NaN
    hits = (predicted == labels).astype(float)
    hits = jnp.where(known & (predicted >= 0), hits, jnp.nan)
    return jnp.mean(losses), {"accuracy": jnp.mean(hits)}


def _examples(batch: PyTree) -> tuple[PyTree, Array]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        whole = isinstance(batch, Task)
        received = "a whole `Task`" if whole else str(jax.tree.structure(batch))
        expected = "`(x, y)`" + ", such as `task.support`" * whole
        raise TypeError(explain("A batch is not a pair.", received, expected))
    x, y = batch
    return x, _array(y, "Targets")


def _array(x: Any, what: str) -> Array:
    if not isinstance(x, jax.Array | np.ndarray | np.generic):
        received = str(jax.tree.structure(x))
        raise TypeError(explain(f"{what} are not an array.", received, "one array"))
    return jnp.asarray(x)


def _widened(x: Array) -> Array:
    return x.astype(jnp.float32) if x.dtype in (jnp.bfloat16, jnp.float16) else x
