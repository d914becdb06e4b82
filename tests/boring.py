"""The smallest strategy, model and tasks that make every part of the loop work.

They compile in a fraction of a second, tell in their metrics which step they were in, and fail on
request.
"""

import contextlib
from collections.abc import Iterator

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import eqxmeta as em
from eqxmeta.callbacks import Callback

from .helpers import tree_allclose


class BoringModel(eqx.Module):
    """`x: [3] -> [1]`; zero parameters, so that every run starts alike."""

    weight: Array
    bias: Array

    def __init__(self, size: int = 3):
        self.weight = jnp.zeros(size)
        self.bias = jnp.zeros(1)

    def __call__(self, x: Array) -> Array:
        return jnp.sum(self.weight * x, keepdims=True) + self.bias


class BoringTasks(eqx.Module):
    """Linear functions with random coefficients: `x: [4, 3]`, `y: [4, 1]`, twice."""

    def sample(self, key: Array) -> em.Task:
        coefficients, x = jnp.split(jax.random.normal(key, (9, 3)), [1])
        y = 1.0 + jnp.sum(coefficients * x, axis=1, keepdims=True)
        return em.Task((x[:4], y[:4]), (x[4:], y[4:]))


class BoringStrategy(em.Strategy):
    """Momentum on the query loss, with noise from the step's key.

    `state.step` counts from 0, hooks from 1: in the step that hooks call `n`, the metric `index` is
    `n - 1`. `nan_loss`, `inf_model`, `nan_optimizer` are steps (as hooks count) in which the loss
    is NaN, the bias becomes infinite, the momentum becomes NaN. As NumPy's numbers they are arrays,
    and one program serves them all.
    """

    noise: float = 0.1
    nan_loss: np.int32 = eqx.field(default=-1, converter=np.int32)
    inf_model: np.int32 = eqx.field(default=-1, converter=np.int32)
    nan_optimizer: np.int32 = eqx.field(default=-1, converter=np.int32)

    def init(self, model):
        return em.TrainState(jnp.zeros((), jnp.int32), model, jax.tree.map(jnp.zeros_like, model))

    def loss(self, model, batch, key):
        return em.losses.mse(model, batch, key)

    @eqx.filter_jit
    def inner_adapt(self, model, support, *, key=None):
        grads = jax.grad(lambda m: self.loss(m, support, key)[0])(model)
        return jax.tree.map(lambda p, g: p - 0.1 * g, model, grads)

    @eqx.filter_jit
    def outer_update(self, state, tasks, *, key):
        def mean_loss(model):
            return jnp.mean(jax.vmap(lambda t: self.loss(model, t.query, None)[0])(tasks))

        loss, grads = jax.value_and_grad(mean_loss)(state.model)
        if key is not None and self.noise:
            noise = self.noise * jax.random.normal(key, state.model.weight.shape)
            grads = eqx.tree_at(lambda g: g.weight, grads, grads.weight + noise)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, state.opt_state, grads)
        model = jax.tree.map(lambda p, m: p - 0.01 * m, state.model, momentum)
        step = state.step + 1
        loss = jnp.where(step == self.nan_loss, jnp.nan, loss)
        model = eqx.tree_at(
            lambda m: m.bias, model, jnp.where(step == self.inf_model, jnp.inf, model.bias)
        )
        momentum = eqx.tree_at(
            lambda m: m.bias,
            momentum,
            jnp.where(step == self.nan_optimizer, jnp.nan, momentum.bias),
        )
        metrics = {
            "loss": loss,
            "index": state.step,
            "seen": jnp.mean(tasks.query[1]),
        }
        return em.TrainState(step, model, momentum), metrics


class Recorder(Callback):
    """Appends `(name, hook, step)` to `events`, keeps all rows, and acts on request.

    `act(hook, step, run)` is called from every hook. `step` is that of the last row for
    `on_chunk_end`, `run.step` for the others.
    """

    def __init__(self, name="recorder", *, every=None, events=None, act=None):
        self.name = name
        self.every = every
        self.events = [] if events is None else events
        self.rows = []
        self.errors = []
        self.stop_reason = None
        self._act = act

    def _record(self, hook, step, run):
        self.events.append((self.name, hook, step))
        if self._act is not None:
            self._act(hook, step, run)

    def on_fit_start(self, run):
        self._record("on_fit_start", run.step, run)

    def on_chunk_end(self, run, metrics):
        self.rows.append({name: np.array(rows) for name, rows in metrics.items()})
        self._record("on_chunk_end", int(metrics["step"][-1]), run)

    def on_step_end(self, run):
        self._record("on_step_end", run.step, run)

    def on_exception(self, run, error):
        self.errors.append(error)
        self._record("on_exception", run.step, run)

    def on_fit_end(self, run):
        self.stop_reason = run.stop_reason
        self._record("on_fit_end", run.step, run)

    @property
    def metrics(self) -> dict[str, np.ndarray]:
        """All rows that were delivered, in the order of delivery."""
        return {k: np.concatenate([rows[k] for rows in self.rows]) for k in self.rows[0]}

    def steps_of(self, hook: str) -> list[int]:
        return [s for name, h, s in self.events if (name, h) == (self.name, hook)]


def recorders(everys):
    """A recorder for each `name: every`, and the list of events that they share."""
    events = []
    return events, [Recorder(name, every=every, events=events) for name, every in everys.items()]


def at(hook, step, action):
    """For `Recorder(act=...)`: `action(run)` at the first call of `hook` at `step` or later."""
    done = []

    def act(hook_now, step_now, run):
        if hook_now == hook and step_now >= step and not done:
            done.append(step_now)
            action(run)

    return act


# A program lives as long as a strategy that it was compiled for: those of the tests share one.
_BORING = BoringStrategy()


def boring_fit(steps, *, strategy=None, model=None, tasks=None, resume=None, **options):
    """`Trainer(...).fit(...)` with everything boring, except what is given."""
    options = {"meta_batch_size": 2, "summary": False, **options}
    trainer = em.Trainer(_BORING if strategy is None else strategy, **options)
    return trainer.fit(
        BoringModel() if model is None else model,
        BoringTasks() if tasks is None else tasks,
        steps,
        resume=resume,
    )


def same_bits(x, y) -> bool:
    return tree_allclose(x, y, rtol=0, atol=0)


def host_batch(step: int, *, meta_batch_size: int = 2, dtype=np.float32) -> em.Task:
    """A batch of tasks in NumPy that depends on `step` alone."""
    x = np.random.default_rng(step).normal(size=(meta_batch_size, 8, 3)).astype(dtype)
    y = 1 + x.sum(axis=-1, keepdims=True)
    return em.Task((x[:, :4], y[:, :4]), (x[:, 4:], y[:, 4:]))


_compiled: list[str] = []


def _listen(event: str, seconds: float, **fields) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled.append(fields.get("fun_name", ""))


# Once, at import: JAX has no public way to take a listener off again.
jax.monitoring.register_event_duration_secs_listener(_listen)


@contextlib.contextmanager
def compilations(of: str = "train_chunk") -> Iterator[list[str]]:
    """The programs of that name which XLA compiles meanwhile: a list, filled at the end."""
    begin, found = len(_compiled), []
    yield found
    found += [name for name in _compiled[begin:] if of in name]
