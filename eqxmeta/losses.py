"""Losses of Equinox models that map one example to one output, with no batch axis.

Each is a `Loss`: `loss(model, batch, key) -> (scalar, metrics)`, means over examples. They are
computed in float32 at least: half-precision outputs are widened first.

A batch is `(x, y)` or `(x, y, weight)`: see `examples`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ._direction import directed as directed
from ._errors import explain
from ._model.predict import predict as predict
from ._model.predict import predicted_class, without_absent
from ._task.examples import as_array, weighted_mean
from ._task.examples import examples as examples
from ._types import Metrics

__all__ = [
    "cross_entropy",
    "directed",
    "examples",
    "gaussian_nll",
    "mse",
    "predict",
    "sigmoid_mse",
]


def __dir__() -> list[str]:
    return __all__


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
    return weighted_mean(_difference(_widened(prediction), y, weight) ** 2, weight), {}


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
    logits, labels, weight = _logits(model, batch, key)
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    return _mean_and_accuracy(losses, logits, labels, weight)


def sigmoid_mse(
    model: Callable, batch: PyTree, key: PRNGKeyArray | None
) -> tuple[Float[Array, ""], Metrics]:
    """Squared error of `sigmoid(logits)` against labels as vectors of zeros and a one, summed over
    classes, mean over examples: Sung et al. 2018 (arXiv 1711.06025), equation 2. `accuracy` as a
    metric.

    Of the same batches as `cross_entropy`, and raises what it raises. A class with a logit of minus
    infinity has no part in it.
    """
    logits, labels, weight = _logits(model, batch, key)
    errors = jax.nn.sigmoid(logits) - jax.nn.one_hot(labels, logits.shape[1], dtype=logits.dtype)
    return _mean_and_accuracy(jnp.sum(errors**2, axis=1), logits, labels, weight)


def gaussian_nll(
    model: Callable, batch: PyTree, key: PRNGKeyArray | None
) -> tuple[Float[Array, ""], Metrics]:
    """Negative log likelihood of targets, each under a normal distribution of its own: in nats,
    mean over examples and outputs; `mse`, of the means, as a metric.

    Of a batch `x: [n, ...]`, and `y: [n, ...]`; the model maps an example to `(mean, scale)`, its
    mean and standard deviation, each of the shape of a target. Raises `TypeError` or `ValueError`
    if it does not.
    """
    x, y, weight = examples(batch)
    out = predict(model, x, key, weight)
    if not isinstance(out, tuple) or len(out) != 2:
        message, received = "Predictions are not a pair.", str(jax.tree.structure(out))
        raise TypeError(explain(message, received, "`(mean, scale)` of each target"))
    mean, scale = (_widened(as_array(part, "Predictions")) for part in out)
    if not mean.shape == scale.shape == y.shape:
        message = "Predictions and targets differ in shape."
        received = f"means {mean.shape}, scales {scale.shape}, targets {y.shape}"
        expected = "the same shape: a mean and a scale for each target"
        raise ValueError(explain(message, received, expected))
    error = _difference(mean, y, weight)
    losses = (error / scale) ** 2 / 2 + jnp.log(scale) + math.log(2 * math.pi) / 2
    return weighted_mean(losses, weight), {"mse": weighted_mean(error**2, weight)}


def _difference(
    prediction: Float[Array, "n ..."], y: Array, weight: Float[Array, " n"] | None
) -> Float[Array, "n ..."]:
    """`prediction - y`, but zero for padding: before a square, whose derivative would be NaN times
    zero."""
    difference = prediction - _widened(y)
    if weight is None:
        return difference
    return jnp.where((weight > 0).reshape(-1, *[1] * (y.ndim - 1)), difference, 0)


def _logits(
    model: Callable, batch: PyTree, key: PRNGKeyArray | None
) -> tuple[Float[Array, "n classes"], Int[Array, " n"], Float[Array, " n"] | None]:
    """The logits of a batch, its labels and its weights."""
    x, y, weight = examples(batch)
    logits = as_array(predict(model, x, key, weight), "Logits")
    if logits.ndim != 2 or y.shape != logits.shape[:1]:
        message = "Logits and labels do not match."
        expected = "logits [n, classes] and labels [n]"
        raise ValueError(explain(message, f"logits {logits.shape}, labels {y.shape}", expected))
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(explain("Labels are not integers.", f"dtype {y.dtype}", "class numbers"))
    labels = y.astype(jnp.int32)
    logits = without_absent(logits, labels, weight)
    if weight is not None:
        labels = jnp.where(weight > 0, labels, 0)
    return _widened(logits), labels, weight


def _mean_and_accuracy(
    losses: Float[Array, " n"],
    logits: Float[Array, "n classes"],
    labels: Int[Array, " n"],
    weight: Float[Array, " n"] | None,
) -> tuple[Float[Array, ""], Metrics]:
    known = (labels >= 0) & (labels < logits.shape[1])
    # A factor, because that reaches the gradient. Optax counts a negative label from the end, and
    # one that is too large is NaN to it, but with the gradient of the normalisation alone.
    losses = losses * jnp.where(known, 1.0, jnp.nan)
    predicted = predicted_class(logits)  # -1 where a logit is NaN
    hits = (predicted == labels).astype(float)
    hits = jnp.where(known & (predicted >= 0), hits, jnp.nan)
    return weighted_mean(losses, weight), {"accuracy": weighted_mean(hits, weight)}


def _widened(x: Array) -> Array:
    return x.astype(jnp.float32) if x.dtype in (jnp.bfloat16, jnp.float16) else x
