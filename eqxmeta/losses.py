"""Losses of Equinox models that map one example to one output, with no batch axis.

Each is a `Loss`: `loss(model, batch, key) -> (scalar, metrics)`, means over examples. They are
computed in float32 at least: half-precision outputs are widened first.

A batch is `(x, y)` or `(x, y, weight)`: see `examples`.
"""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ._direction import directed as directed
from ._errors import explain
from ._model.predict import predict as predict
from ._model.predict import predicted_class
from ._task.examples import as_array, weighted_mean
from ._task.examples import examples as examples
from ._types import Metrics


def mse(
    model: Callable, batch: PyTree, key: PRNGKeyArray | None
) -> tuple[Float[Array, ""], Metrics]:
    """Mean squared error, over examples and outputs. No further metrics.

    Of a batch `x: [n, ...]`, and `y: [n, ...]` of the shape of the predictions. Raises
    `ValueError` if the shapes differ: `[n]` against `[n, 1]` would broadcast to `[n, n]`.
    """
    x, y, weight = examples(batch)
    prediction = as_array(predict(model, x, key, weight), "Predictions")
    if prediction.shape != y.shape:
        labels = y.ndim == 1 and jnp.issubdtype(y.dtype, jnp.integer)
        hint = ". Of class numbers: `eqxmeta.losses.cross_entropy`" if labels else ""
        message = "Predictions and targets differ in shape."
        received = f"predictions {prediction.shape}, targets {y.shape}"
        expected = f"the same shape: one target for each output of each example{hint}"
        raise ValueError(explain(message, received, expected))
    difference = _widened(prediction) - _widened(y)
    if weight is not None:  # before the square, whose derivative would be NaN times zero
        exists = (weight > 0).reshape(-1, *[1] * (y.ndim - 1))
        difference = jnp.where(exists, difference, 0)
    return weighted_mean(difference**2, weight), {}


def cross_entropy(
    model: Callable, batch: PyTree, key: PRNGKeyArray | None
) -> tuple[Float[Array, ""], Metrics]:
    """Cross-entropy in nats, mean over examples, of logits and integer labels; `accuracy` in
    [0, 1] as a metric.

    Of a batch `x: [n, ...]`, and `y: [n]` of integers in `range(classes)`; the model maps an
    example to `[classes]` logits. A label outside that range, or a NaN among the logits, makes the
    loss, its gradient and the accuracy NaN.

    With weights tasks may differ in their number of classes, which is the largest label of the
    batch plus one, that of an example of weight 0 too: the model may have more logits, and those
    of classes which the task does not have count as minus infinity.

    Raises `ValueError` or `TypeError` if shapes or dtypes are others.
    """
    x, y, weight = examples(batch)
    logits = as_array(predict(model, x, key, weight), "Logits")
    if logits.ndim != 2 or y.shape != logits.shape[:1]:
        message = "Logits and labels do not match."
        expected = "logits [n, classes] and labels [n]"
        raise ValueError(explain(message, f"logits {logits.shape}, labels {y.shape}", expected))
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(explain("Labels are not integers.", f"dtype {y.dtype}", "class numbers"))
    labels = y.astype(jnp.int32)
    if weight is not None:
        absent = jnp.arange(logits.shape[1]) > jnp.max(labels)
        logits = jnp.where(absent, -jnp.inf, logits)
        labels = jnp.where(weight > 0, labels, 0)
    known = (labels >= 0) & (labels < logits.shape[1])
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(_widened(logits), labels)
    # A factor, because that reaches the gradient. Optax counts a negative label from the end, and
    # one that is too large is NaN to it, but with the gradient of the normalisation alone.
    losses = losses * jnp.where(known, 1.0, jnp.nan)
    predicted = predicted_class(logits)  # -1 where a logit is NaN
    hits = (predicted == labels).astype(float)
    hits = jnp.where(known & (predicted >= 0), hits, jnp.nan)
    return weighted_mean(losses, weight), {"accuracy": weighted_mean(hits, weight)}


def _widened(x: Array) -> Array:
    return x.astype(jnp.float32) if x.dtype in (jnp.bfloat16, jnp.float16) else x
