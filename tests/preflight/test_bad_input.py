"""Mistakes that users make, each told in three parts, before anything is compiled where that is
possible. None leaves a file or a thread behind.

Arguments of a wrong type or size are in `test_arguments` and beside what they are arguments of;
here are those that only meet their consequence elsewhere: in another object, in the user's own
code, on the disk, or at a later step.
"""

import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import eqxmeta as em
from eqxmeta.callbacks import (
    JSONL,
    AdaptationPlot,
    Callback,
    Checkpoint,
    Confusion,
    EarlyStopping,
    Evaluate,
    Histograms,
    Lambda,
    ProgressBar,
    TensorBoard,
)

from ..boring import BoringModel, BoringStrategy, BoringTasks, boring_fit, compilations, host_batch

pytestmark = pytest.mark.usefixtures("as_users_run_it")

SGD = optax.sgd(0.1)
INNER = em.InnerLoop(SGD, steps=1)
KEY = jax.random.key(0)
IMAGES = em.tasks.Episodes(np.zeros((4, 2, 2), np.uint8), [0, 0, 1, 1], 2, 1, 1)
LINEAR = eqx.nn.Linear(3, 1, key=KEY)


def maml(loss=em.losses.mse, **options):
    return em.MAML(loss, INNER, SGD, **options)


def fit(folder, *callbacks, steps=5, seed=0, **options):
    """A run that would write files into `folder`."""
    attached = [
        JSONL(folder / "log.jsonl"),
        TensorBoard(folder / "board"),
        Checkpoint(folder / "saved", every=2),
        *callbacks,
    ]
    return boring_fit(steps, callbacks=attached, seed=seed, **{"strategy": maml(), **options})


class Mistake(NamedTuple):
    """`make(folder)` raises `error`, whose text has `invalid`, `received` and `expected` (regular
    expressions) in its three parts. `late`: known only when the run has begun."""

    make: Callable
    error: type[Exception]
    invalid: str
    received: str
    expected: str
    late: bool = False


class Source(eqx.Module):
    """Tasks by the function `draw(key)`."""

    draw: Callable

    def sample(self, key):
        return self.draw(key)


class Hosted(dict):
    """Host batches, of which some are other than they should be."""

    def __init__(self, changed, steps=80):
        super().__init__({step: host_batch(step) for step in range(steps)} | changed)


class Failing:
    def __getitem__(self, step):
        return 1 / step


class Model(eqx.Module):
    """`apply(weight, x)`"""

    weight: jax.Array
    apply: Callable = lambda weight, x: jnp.sum(weight * x, keepdims=True)

    def __call__(self, x):
        return self.apply(self.weight, x)


X, Y = jnp.ones((4, 3)), jnp.ones((4, 1))


class Keyless(eqx.Module):
    def sample(self):
        return em.Task((X, Y), (X, Y))


def tasks(support, query=(X, Y)):
    return Source(lambda key: em.Task(support, query))


def labelled(classes):
    """A batch of the host, labels below `classes`."""
    return em.Task(*2 * [(np.ones((2, 4, 3), np.float32), np.tile(np.arange(4) % classes, (2, 1)))])


def numpy_in_sample(key):
    x = np.asarray(jax.random.normal(key, (4, 3)))
    return em.Task((x, x[:, :1]), (x, x[:, :1]))


def host_loss(model, batch, key):
    return jnp.asarray(float(em.losses.mse(model, batch, key)[0])), {}


def branching_loss(model, batch, key):
    loss, _ = em.losses.mse(model, batch, key)
    return (loss if loss < 1 else 2 * loss), {}


def reporting(name, value=jnp.ones(())):  # noqa: B008
    return lambda model, batch, key: (em.losses.mse(model, batch, key)[0], {name: value})


class WidensModel(BoringStrategy):
    def outer_update(self, state, tasks, *, key):
        new, metrics = BoringStrategy.outer_update(self, state, tasks, key=key)
        return eqx.tree_at(lambda s: s.model.bias, new, new.model.bias.astype(jnp.int32)), metrics


class DropsOptimizer(BoringStrategy):
    def outer_update(self, state, tasks, *, key):
        new, metrics = BoringStrategy.outer_update(self, state, tasks, key=key)
        return em.TrainState(new.step, new.model, None), metrics


class Reports(BoringStrategy):
    metric: object = None

    def outer_update(self, state, tasks, *, key):
        new, metrics = BoringStrategy.outer_update(self, state, tasks, key=key)
        return new, metrics | {"index": self.metric}


class NoLoss(em.Strategy):
    loss = None

    def init(self, model):
        return em.TrainState(jnp.zeros((), jnp.int32), model, ())

    def inner_adapt(self, model, support, *, key=None):
        return model

    def outer_update(self, state, tasks, *, key):
        return state, {}


class Pair(em.GradientStrategy):
    loss: Callable = em.losses.mse
    optimizer: optax.GradientTransformation = SGD

    def inner_adapt(self, model, support, *, key=None):
        return model, 0.1


class Misspelt(Callback):
    def on_stepend(self, run):
        pass


def logging(value):
    return Lambda(every=2, on_step_end=lambda run: run.log(value))


def occupied(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("somebody's")
    return path


def pipe(folder):
    os.mkfifo(folder / "x")
    return folder / "x"


def saved(folder, **options):
    """A folder with the checkpoints of a run."""
    boring_fit(4, callbacks=[Checkpoint(folder / "old", every=2)], **options)
    return folder / "old"


def resumed(folder, *, first=None, path=None, **second):
    old = saved(folder, **(first or {}))
    again = [Checkpoint(old, every=2)]
    return boring_fit(8, callbacks=again, resume=path or "auto", **second)


def best(folder):
    """A folder in which the first checkpoint is the best one."""
    watched = Checkpoint(folder / "old", every=2, monitor="index", mode="min")
    boring_fit(4, callbacks=[watched])
    return folder / "old"


def damaged(folder):
    old = saved(folder)
    for path in old.iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    return old / "step-000000004.ckpt"


def state_of(model=LINEAR):
    return maml().init(model)


IMAGES, LABELS = np.zeros((12, 2), np.float32), np.arange(12) // 4
NOT_A_MODEL = "an instance of an Equinox module|at least one floating-point array"
A_SOURCE = r"`eqx\.Module` with `sample\(key\) -> Task`"
TRACED = "that JAX can trace"
ONE_EXAMPLE = "a model that takes one such example"

# fmt: off
MISTAKES = {
    # The model.
    "a model is None": Mistake(
        lambda f: em.Trainer(maml(), meta_batch_size=2).fit(None, BoringTasks(), 5),
        ValueError, r"fit\(model=", "None", NOT_A_MODEL),
    "a model is a function": Mistake(
        lambda f: fit(f, model=lambda x: x), ValueError, r"fit\(model=", "<lambda>", NOT_A_MODEL),
    "a model is a list of layers": Mistake(
        lambda f: fit(f, model=[LINEAR, eqx.nn.Linear(1, 1, key=KEY)]),
        TypeError, r"`loss\(model, batch, key\)`", "list", ONE_EXAMPLE),
    "a model under vmap": Mistake(
        lambda f: fit(f, model=jax.vmap(LINEAR)),
        ValueError, r"fit\(model=", "function", "no batch axis.*model itself"),
    "a model has integers only": Mistake(
        lambda f: fit(f, model=Model(jnp.arange(3))),
        ValueError, r"fit\(model=.*no parameters", "Model", "floating-point array"),
    "a model is NaN to begin with": Mistake(
        lambda f: fit(f, model=Model(jnp.array([0, jnp.nan, 0]))),
        ValueError, r"fit\(model=.*NaN", "weight", "finite"),
    "a state where its model is meant": Mistake(
        lambda f: fit(f, model=state_of()),
        TypeError, r"fit\(model=", "TrainState", r"state\.model"),
    "a state is evaluated": Mistake(
        lambda f: em.evaluate(maml(), state_of(), BoringTasks(), num_tasks=2),
        TypeError, r"evaluate\(model=", "TrainState", r"state\.model"),
    "a strategy where the model is meant": Mistake(
        lambda f: fit(f, model=maml()), ValueError, r"fit\(model=", "MAML", NOT_A_MODEL),
    "model and tasks are swapped": Mistake(
        lambda f: fit(f, model=BoringTasks(), tasks=LINEAR),
        ValueError, r"fit\(model=.*task source", "BoringTasks", r"fit\(model, tasks\)"),
    "a model for other inputs": Mistake(
        lambda f: fit(f, model=eqx.nn.Linear(2, 1, key=KEY)),
        TypeError, r"refused one example.*`loss\(model, batch, key\)`",
        r"Linear, and an example of shape float32\[3\], of a batch of \(float32\[4,3\]",
        ONE_EXAMPLE),
    "a model that branches": Mistake(
        lambda f: fit(f, model=Model(jnp.ones(3), lambda w, x: w * x if x[0] > 0 else w)),
        jax.errors.TracerBoolConversionError, r"refused one example.*`loss\(model, batch, key\)`",
        r"Model, and an example of shape float32\[3\]", TRACED),
    "a model that wants a batch": Mistake(
        lambda f: fit(f, model=Model(jnp.ones(3),
                                     lambda w, x: jax.vmap(lambda r: w * r)(x))),
        ValueError, "Predictions and targets differ", r"\(4, 3, 3\)", "one target"),
    "a model that returns a pair": Mistake(
        lambda f: fit(f, model=Model(jnp.ones(3), lambda w, x: (w * x, x))),
        TypeError, "Predictions are not an array", "PyTreeDef", "one array"),
    "a model that returns too much": Mistake(
        lambda f: fit(f, model=Model(jnp.ones(3), lambda w, x: w * x)),
        ValueError, "Predictions and targets differ", r"\(4, 3\), targets \(4, 1\)", "same shape"),
    "a model of complex numbers": Mistake(
        lambda f: fit(f, strategy=em.MAML(em.losses.mse, em.InnerLoop(SGD, steps=2), SGD),
                      model=Model(jnp.ones(3, jnp.complex64),
                                     lambda w, x: jnp.real(jnp.sum(w * x, keepdims=True)))),
        TypeError, "real parameters", "complex64", "reverse"),
    # The tasks.
    "tasks are a list of single tasks": Mistake(
        lambda f: fit(f, tasks=[em.Task((X, Y), (X, Y))] * 5),
        ValueError, r"tasks\[0\].*number of tasks", "4", "meta_batch_size=2"),
    "tasks are an empty list": Mistake(
        lambda f: fit(f, tasks=[]), ValueError, "`tasks` is too short", "0 batches", "0 to 4"),
    "tasks are a string": Mistake(
        lambda f: fit(f, tasks="omniglot"), TypeError, r"tasks\[0\]", "str", "eqxmeta.Task"),
    "tasks are an array": Mistake(
        lambda f: fit(f, tasks=np.ones((5, 4, 3))),
        TypeError, r"tasks\[0\]", "ndarray", "eqxmeta.Task"),
    "tasks are a data set": Mistake(
        lambda f: fit(f, tasks=(np.ones((9, 3)), np.ones((9, 1))), steps=2),
        TypeError, r"tasks\[0\]", "ndarray", "eqxmeta.Task"),
    "tasks are a function": Mistake(
        lambda f: fit(f, tasks=BoringTasks().sample),
        TypeError, r"fit\(tasks=", "sample", A_SOURCE),
    "sample takes no key": Mistake(
        lambda f: fit(f, tasks=Keyless()),
        TypeError, r"`fit\(tasks=\.\.\.\)\.sample\(key\)`", "Keyless", r"`sample\(key\) -> Task`"),
    "sample needs numbers where JAX has tracers": Mistake(
        lambda f: fit(f, tasks=Source(numpy_in_sample)),
        jax.errors.TracerArrayConversionError, r"`fit\(tasks=\.\.\.\)\.sample\(key\)`", "key",
        TRACED),
    "sample forgets the query set": Mistake(
        lambda f: fit(f, tasks=tasks((X, Y), None)),
        ValueError, "no query set", "None", "pytree of arrays"),
    "no support examples": Mistake(
        lambda f: fit(f, tasks=tasks((X[:0], Y[:0]))),
        ValueError, "support", r"\(0, 3\)", "1 or longer"),
    "x and y differ in length": Mistake(
        lambda f: fit(f, tasks=tasks((X, Y[:3]))),
        ValueError, "differ in shape", r"predictions \(4, 1\), targets \(3, 1\)", "same shape"),
    "a task has a number of Python": Mistake(
        lambda f: fit(f, tasks=tasks((X, Y, 0.5))),
        ValueError, "support", "None for what is not an array", "arrays"),
    "y has lost its last axis": Mistake(
        lambda f: fit(f, tasks=tasks((X, Y[:, 0]), (X, Y[:, 0]))),
        ValueError, "differ in shape", r"targets \(4,\)", "same shape"),
    "only the query set's y has": Mistake(
        lambda f: fit(f, tasks=tasks((X, Y), (X, Y[:, 0]))),
        ValueError, "differ in shape", r"targets \(4,\)", "same shape"),
    "labels are floats": Mistake(
        lambda f: fit(f, strategy=maml(em.losses.cross_entropy),
                      model=eqx.nn.Linear(3, 2, key=KEY), tasks=tasks(*2 * [(X, Y[:, 0])])),
        TypeError, "Labels are not integers", "float32", "class numbers"),
    "labels are one-hot": Mistake(
        lambda f: fit(f, strategy=maml(em.losses.cross_entropy),
                      model=eqx.nn.Linear(3, 2, key=KEY),
                      tasks=tasks(*2 * [(X, jnp.ones((4, 2), int))])),
        ValueError, "Logits and labels", r"labels \(4, 2\)", r"labels \[n\]"),
    "a batch is a dict": Mistake(
        lambda f: fit(f, tasks=tasks({"x": X, "y": Y})),
        TypeError, "not a pair", "'x'", r"\(x, y\)"),
    "labels are out of range in a later task": Mistake(
        lambda f: fit(f, strategy=maml(em.losses.cross_entropy),
                      model=eqx.nn.Linear(3, 2, key=KEY),
                      tasks=Hosted({0: labelled(1), 1: labelled(4)}, steps=2), steps=2),
        em.NonFiniteError, "not finite at step 2",
        r"labels must be in range\(classes\).*support\[1\]` from 0 to 3", "finite", late=True),
    "a head smaller than the number of classes": Mistake(
        lambda f: fit(f, strategy=maml(em.losses.cross_entropy),
                      model=eqx.nn.Linear(2, 2, key=KEY),
                      tasks=em.tasks.Episodes(IMAGES, LABELS, 3, 1, 1)),
        em.NonFiniteError, "not finite at step 1",
        r"labels must be in range\(classes\).*support\[1\]` from 0 to 2", "finite", late=True),
    "images without labels": Mistake(
        lambda f: em.tasks.Episodes(IMAGES, ways=5, shots=1, queries=1),
        TypeError, "`labels` is missing", "", r"Episodes\("),
    "an augmentation without a key": Mistake(
        lambda f: em.tasks.Episodes(IMAGES, LABELS, 3, 1, 1, augment=lambda image: image),
        TypeError, "`augment`, <lambda>", "an image", r"augment\(image, \*, key\)"),
    "more ways than classes": Mistake(
        lambda f: em.tasks.Episodes(IMAGES, LABELS, 5, 1, 1), ValueError,
        "`ways`", "3 classes", "ways=5"),
    "more shots and queries than examples": Mistake(
        lambda f: em.tasks.Episodes(IMAGES, LABELS, 3, 2, 3), ValueError,
        "too few examples", "has 4", "shots=2 [+] queries=3"),
    "more labels than images": Mistake(
        lambda f: em.tasks.Episodes(IMAGES, np.arange(13) // 4, 3, 1, 1), ValueError,
        "`labels` does not match", r"\(13,\) for 12", "one label an image"),
    "images are NaN": Mistake(
        lambda f: em.tasks.Episodes(IMAGES * np.nan, LABELS, 3, 1, 1), ValueError,
        "`images`.*not finite", "NaN", "finite"),
    "shots are text": Mistake(
        lambda f: em.tasks.Sinusoid("10", 10), TypeError, "`shots`", "'10'", "integer"),
    "the host's source fails": Mistake(
        lambda f: fit(f, tasks=Failing()), ZeroDivisionError, r"came out of `tasks\[0\]`",
        "Failing", "a batch of tasks"),
    "the host's batch changes its shape at step 57": Mistake(
        lambda f: fit(f, steps=80, tasks=Hosted({57: host_batch(57, meta_batch_size=3)})),
        ValueError, r"`tasks\[57\]` differs", r"\[3, 4, 3\]", r"\[2, 4, 3\]", late=True),
    "the host's batch changes its dtype at step 57": Mistake(
        lambda f: fit(f, steps=80, tasks=Hosted({57: host_batch(57, dtype=np.float64)})),
        ValueError, r"`tasks\[57\]` differs", "float64", "float32", late=True),
    "the host has no step 57": Mistake(
        lambda f: fit(f, steps=80, tasks=Hosted({}, steps=57)),
        ValueError, "`tasks` is too short", "57 batches", "0 to 79"),
    "the host's arrays hold objects": Mistake(
        lambda f: fit(f, tasks=Hosted({0: jax.tree.map(lambda x: x.astype(object),
                                                       host_batch(0))})),
        TypeError, r"`tasks\[0\]`", "object", "numbers"),
    # The strategy and its parts.
    "a loss that returns a vector": Mistake(
        lambda f: fit(f, strategy=maml(lambda m, b, k: (jax.vmap(m)(b[0])[:, 0], {}))),
        ValueError, "not a loss", r"float32\[4\]", "scalar"),
    "a loss of two arguments": Mistake(
        lambda f: fit(f, strategy=maml(lambda m, b: (jnp.ones(()), {}))),
        TypeError, r"`loss\(model, batch, key\)`", r"float32\[4,3\]",
        r"`loss\(model, batch, key\)` -> \(scalar"),
    "a loss that needs a number": Mistake(
        lambda f: fit(f, strategy=maml(host_loss)),
        jax.errors.ConcretizationTypeError, r"`loss\(model, batch, key\)`", "batch", TRACED),
    "a loss that branches on its value": Mistake(
        lambda f: fit(f, strategy=maml(branching_loss)),
        jax.errors.TracerBoolConversionError, r"`loss\(model, batch, key\)`", "batch", TRACED),
    "a metric of the loss is called loss": Mistake(
        lambda f: fit(f, strategy=maml(reporting("loss"))),
        ValueError, "reserved name", "loss", "other than"),
    "a metric of the loss is called skipped": Mistake(
        lambda f: fit(f, strategy=maml(reporting("skipped"))),
        ValueError, "reserved name", "skipped", "another name"),
    "a metric of the loss is not a scalar": Mistake(
        lambda f: fit(f, strategy=maml(reporting("errors", jnp.ones(4)))),
        ValueError, "metrics of `loss", r"'errors': float32\[4\]", "scalar arrays"),
    "a metric of the loss is complex": Mistake(
        lambda f: fit(f, strategy=maml(reporting("phase", jnp.ones((), jnp.complex64)))),
        ValueError, "metrics of `loss", r"'phase': complex64\[\]", "real numbers"),
    "a metric of the loss is a key": Mistake(
        lambda f: fit(f, strategy=maml(reporting("key", KEY))),
        ValueError, "metrics of `loss", r"'key': key<fry>\[\]", "real numbers"),
    "a metric of outer_update is complex": Mistake(
        lambda f: fit(f, strategy=Reports(metric=jnp.complex64(1j))),
        ValueError, r"metrics of `Reports\.outer_update`", r"'index': complex64\[\]",
        "real numbers"),
    "a metric of outer_update is a number of Python": Mistake(
        lambda f: fit(f, strategy=Reports(metric=0.5)),
        ValueError, r"metrics of `Reports\.outer_update`", r"'index': float 0\.5", "scalar arrays"),
    "an evaluation of a complex metric": Mistake(
        lambda f: em.evaluate(maml(reporting("phase", jnp.ones((), jnp.complex64))), LINEAR,
                              BoringTasks(), num_tasks=2),
        ValueError, "metrics of `loss", r"'phase': complex64\[\]", "real numbers"),
    "a loss that returns a number alone": Mistake(
        lambda f: fit(f, strategy=maml(lambda m, b, k: em.losses.mse(m, b, k)[0])),
        TypeError, "something else than a pair", r"float32\[\]", "dict of scalar metrics"),
    "outer_update changes a dtype": Mistake(
        lambda f: fit(f, strategy=WidensModel()),
        ValueError, "dtype", r"bias: float32\[1\] -> int32\[1\]", "as in the old one"),
    "outer_update changes the structure": Mistake(
        lambda f: fit(f, strategy=DropsOptimizer()),
        ValueError, "structure", r"opt_state\.bias: float32\[1\] -> None", "as in the old one"),
    "outer_update of one task": Mistake(
        lambda f: maml().outer_update(state_of(), BoringTasks().sample(KEY), key=KEY),
        ValueError, "outer_update", r"4 tasks, of support \(float32\[4,3\]", "a leading task axis"),
    "outer_update of arrays": Mistake(
        lambda f: maml().outer_update(state_of(), (X, Y), key=KEY),
        TypeError, "batch of tasks", "tuple", "eqxmeta.Task"),
    "outer_update of a model": Mistake(
        lambda f: maml().outer_update(LINEAR, host_batch(0), key=KEY),
        TypeError, "outer_update.*state", "Linear", "init"),
    "outer_update of what looks like a batch": Mistake(
        lambda f: maml().outer_update(state_of(eqx.nn.Linear(1, 1, key=KEY)),
                                      em.Task((Y, Y), (Y, Y)), key=KEY),
        ValueError, "outer_update", r"4 tasks, of support \(float32\[4,1\]", "a leading task axis"),
    "inner_adapt of a task": Mistake(
        lambda f: maml().inner_adapt(LINEAR, em.Task((X, Y), (X, Y))),
        TypeError, "not a pair", "Task", r"\(x, y\).*task\.support"),
    "inner_adapt returns a pair": Mistake(
        lambda f: fit(f, strategy=Pair()),
        TypeError, r"`Pair\.inner_adapt`", r"tuple\(BoringModel, float\)", "adapted model alone"),
    "the check of a batch": Mistake(
        lambda f: em.check_meta_gradient(maml(), LINEAR, host_batch(0)),
        TypeError, r"check_meta_gradient\(task=", r"float32\[2,4,3\]", r"x\[0\], tasks"),
    "the check of a source": Mistake(
        lambda f: em.check_meta_gradient(maml(), LINEAR, BoringTasks()),
        TypeError, r"check_meta_gradient\(task=", "BoringTasks", r"tasks\.sample\(key\)"),
    "adapt names a layer that there is not": Mistake(
        lambda f: fit(f, strategy=em.MAML(
            em.losses.mse, em.InnerLoop(SGD, 1, adapt=lambda m: m.layers[9]), SGD),
            model=eqx.nn.MLP(3, 1, 2, 1, key=KEY)),
        IndexError, r"`InnerLoop\(adapt=", "MLP", r"lambda m: m\.layers\[-1\]"),
    "head names a field that there is not": Mistake(
        lambda f: fit(f, strategy=em.ANIL(em.losses.mse, INNER, SGD, head=lambda m: m.hed)),
        AttributeError, r"`ANIL\(head=", "BoringModel", r"lambda m: m\.layers\[-1\]"),
    "an optax optimizer as the inner loop": Mistake(
        lambda f: em.MAML(em.losses.mse, SGD, SGD),
        TypeError, r"MAML\(inner=", "GradientTransformation", "InnerLoop"),
    "an optimizer that was not called": Mistake(
        lambda f: em.MAML(em.losses.mse, INNER, optax.adam),
        TypeError, r"MAML\(optimizer=", "function adam", r"optax\.sgd\(0\.01\)"),
    "a chunk of no tasks": Mistake(
        lambda f: maml(task_chunk=0), ValueError, r"MAML\(task_chunk=", "0", "1 or more"),
    "an optimizer where a strategy is meant": Mistake(
        lambda f: fit(f, strategy=optax.adam(1e-3)),
        TypeError, r"Trainer\(strategy=", "GradientTransformation", "MAML"),
    # The trainer.
    "a policy that there is not": Mistake(
        lambda f: fit(f, on_non_finite="ignore"),
        ValueError, r"Trainer\(on_non_finite=", "'ignore'", "'raise', 'skip' or 'stop'"),
    "a policy is None": Mistake(
        lambda f: fit(f, on_non_finite=None),
        ValueError, r"Trainer\(on_non_finite=", "None", "'raise', 'skip' or 'stop'"),
    "a policy for several seeds": Mistake(
        lambda f: em.fit_seeds(em.Trainer(maml(), meta_batch_size=2, on_non_finite="skip"),
                               LINEAR, BoringTasks(), 3, seeds=2),
        ValueError, r"fit_seeds\(trainer=", "skip", "SeedRuns.finite"),
    "a key where a seed is meant": Mistake(
        lambda f: fit(f, seed=KEY), TypeError, r"Trainer\(seed=", "key", "integer from 0"),
    "a seed out of range": Mistake(
        lambda f: fit(f, seed=2**32), ValueError, r"Trainer\(seed=", "4294967296", r"2\*\*32 - 1"),
    "a trial of another kind": Mistake(
        lambda f: fit(f, fast_dev_run="yes"),
        TypeError, r"Trainer\(fast_dev_run=", "'yes'", "bool"),
    # Callbacks.
    "settings that are a list": Mistake(
        lambda f: TensorBoard(f, hparams=["lr"]), TypeError, r"TensorBoard\(hparams=", "'lr'",
        "mapping"),
    "a callback's class": Mistake(
        lambda f: fit(f, ProgressBar), TypeError, r"callbacks\[3\]", "class", "not the class"),
    "two callbacks of one name": Mistake(
        lambda f: fit(f, Evaluate(BoringTasks(), every=2), Evaluate(BoringTasks(), every=3)),
        ValueError, r"callbacks\[4\]", "'Evaluate' twice", "unique names"),
    "a misspelt hook": Mistake(
        lambda f: fit(f, Misspelt()), TypeError, "hook", "on_stepend", "on_step_end"),
    "a hook that takes nothing": Mistake(
        lambda f: fit(f, Lambda(on_fit_end=lambda: None)),
        TypeError, "signature", r"on_fit_end\(\)", r"on_fit_end\(self, run|on_fit_end"),
    "no checkpoint is kept": Mistake(
        lambda f: Checkpoint(f, every=2, keep=0),
        ValueError, r"Checkpoint\(keep=", "0", "1 or more"),
    "checkpoints at no step": Mistake(
        lambda f: Checkpoint(f, every=0), ValueError, r"Checkpoint\(every=", "0", "1 or more"),
    "a mode by another name": Mistake(
        lambda f: Checkpoint(f, every=2, monitor="loss", mode="maximum"),
        ValueError, r"Checkpoint\(mode=", "'maximum'", "'min' or 'max'"),
    "a monitor that is a list": Mistake(
        lambda f: Checkpoint(f, every=2, monitor=["loss"]),
        ValueError, r"Checkpoint\(monitor=", r"\['loss'\]", "name"),
    "a folder is None": Mistake(
        lambda f: Checkpoint(None, every=2), TypeError, r"Checkpoint\(folder=", "None", "path"),
    "a log's path is a number": Mistake(
        lambda f: JSONL(5), TypeError, r"JSONL\(path=", "5", "path"),
    "a log's folder is None": Mistake(
        lambda f: TensorBoard(None), TypeError, r"TensorBoard\(logdir=", "None", "path"),
    "a plot's path is None": Mistake(
        lambda f: AdaptationPlot(em.tasks.Sinusoid(2, 2), None),
        TypeError, r"AdaptationPlot\(path=", "None", "path"),
    "a picture's path is a number": Mistake(
        lambda f: Confusion(IMAGES, 5), TypeError, r"Confusion\(path=", "5", "path"),
    "patience for nothing": Mistake(
        lambda f: EarlyStopping("loss", patience=0), ValueError,
        r"EarlyStopping\(patience=", "0", "1 or more"),
    "a difference that is text": Mistake(
        lambda f: EarlyStopping("loss", patience=1, min_delta="small"), ValueError,
        r"EarlyStopping\(min_delta=", "'small'", "finite number"),
    "a monitor that is no training metric": Mistake(
        lambda f: fit(f, EarlyStopping("accuracy", patience=1, every=2)), KeyError,
        "EarlyStopping", "accuracy", "grad_norm"),
    "a monitor that no callback logs": Mistake(
        lambda f: fit(f, EarlyStopping("eval/los", patience=1), Evaluate(BoringTasks(), every=2)),
        ValueError, r"EarlyStopping\(monitor=", "'eval/los'", "one of eval/loss"),
    "a training metric is monitored as if a callback logged it": Mistake(
        lambda f: fit(f, EarlyStopping("loss", patience=1)),
        ValueError, r"EarlyStopping\(monitor=", "'loss'", "if `every` is given"),
    "the best by a name that no callback logs": Mistake(
        lambda f: fit(f, Checkpoint(f / "best", every=2, monitor="los", name="best")),
        ValueError, r"Checkpoint\(monitor=", "'los'", "grad_norm, loss, loss_before"),
    "a trial run's monitor is misspelt": Mistake(
        lambda f: fit(f, Checkpoint(f / "best", every=2, monitor="los", name="best"),
                      fast_dev_run=True),
        ValueError, r"Checkpoint\(monitor=", "'los'", "grad_norm, loss, loss_before"),
    "evaluation of a list": Mistake(
        lambda f: Evaluate([BoringTasks()], every=2),
        TypeError, r"Evaluate\(tasks=...\)\[0\]", "BoringTasks", "Task"),
    "evaluation of a host source that is too short": Mistake(
        lambda f: Evaluate([host_batch(0)] * 3, every=2, num_tasks=7),
        ValueError, r"Evaluate\(num_tasks=", "7", "6 or less"),
    "a number in the place of a model to convert": Mistake(
        lambda f: em.nn.fast(3), TypeError, r"fast\(model\)", "3", "Equinox module"),
    "evaluation of tasks of another shape": Mistake(
        lambda f: fit(f, Evaluate(em.tasks.Sinusoid(2, 2), every=5), model=LINEAR),
        TypeError, "the evaluation", r"query \(float32\[2,1\]", "a result; why"),
    "evaluation after steps that cannot be counted": Mistake(
        lambda f: fit(f, Evaluate(BoringTasks(), every=5, inner_steps=3),
                      strategy=BoringStrategy()),
        ValueError, r"Evaluate\(inner_steps=.*has no effect", "BoringStrategy", "left out"),
    "evaluation without a loss": Mistake(
        lambda f: fit(f, Evaluate(BoringTasks(), every=5), strategy=NoLoss()),
        TypeError, "NoLoss", "None", r"loss\(model, batch, key\)"),
    "text is logged": Mistake(
        lambda f: fit(f, logging({"note": "good"})),
        TypeError, r"run\.log", "'note': 'good'", "number", late=True),
    "an array is logged": Mistake(
        lambda f: fit(f, logging({"norms": np.ones(3)})),
        TypeError, r"run\.log", "norms", "number", late=True),
    "a curve of unequal lengths is logged": Mistake(
        lambda f: fit(f, logging({"c": em.Curve(np.ones(3), np.ones(2))})),
        TypeError, r"run\.log.*a malformed Curve", r"mean: float64\[3\], ci95: float64\[2\]",
        "inner_steps", late=True),
    "a picture of floats is logged": Mistake(
        lambda f: fit(f, logging({"p": em.Image(np.ones((4, 4, 3)))})),
        TypeError, r"run\.log.*a malformed Image", r"float64\[4, 4, 3\]", "uint8", late=True),
    "two evaluations under one prefix": Mistake(
        lambda f: fit(f, Evaluate(BoringTasks(), every=2),
                      Evaluate(BoringTasks(), every=2, seed=1, name="more")),
        ValueError, "same name", "'eval/loss', of .*Evaluate", "prefix="),
    "a bare number is logged": Mistake(
        lambda f: fit(f, logging(0.5)), TypeError, r"run\.log", "0.5", "mapping", late=True),
    # The disk.
    "a file in the place of the checkpoints' folder": Mistake(
        lambda f: boring_fit(5, callbacks=[JSONL(f / "log"),
                                           Checkpoint(occupied(f / "x"), every=2)]),
        NotADirectoryError, r"Checkpoint\(folder=", "a file", "folder"),
    "a file above the checkpoints' folder": Mistake(
        lambda f: boring_fit(5, callbacks=[JSONL(f / "log"),
                                           Checkpoint(occupied(f / "x") / "y", every=2)]),
        NotADirectoryError, r"Checkpoint\(folder=", "a file", "folder"),
    "a folder that cannot be made": Mistake(
        lambda f: boring_fit(5, callbacks=[JSONL(f / "log"), Checkpoint("/proc/x", every=2)]),
        OSError, r"Checkpoint\(folder=", "/proc/x", "can be written"),
    "a file in the place of TensorBoard's folder": Mistake(
        lambda f: boring_fit(5, callbacks=[JSONL(f / "log"), TensorBoard(occupied(f / "x"))]),
        NotADirectoryError, r"TensorBoard\(logdir=", "a file", "folder"),
    "a folder in the place of the log": Mistake(
        lambda f: boring_fit(5, callbacks=[Checkpoint(f / "saved", every=2), JSONL(f)]),
        IsADirectoryError, r"JSONL\(path=", "a folder", "file"),
    "checkpoints of an earlier run": Mistake(
        lambda f: boring_fit(5, callbacks=[Checkpoint(saved(f), every=2)]),
        FileExistsError, "earlier run", "step-000000004", "resume="),
    "resume with another strategy": Mistake(
        lambda f: resumed(f, strategy=maml()),
        em.CheckpointMismatch, "another run", "BoringStrategy", "MAML"),
    "resume with another seed": Mistake(
        lambda f: resumed(f, seed=1), em.CheckpointMismatch, "another run", "seed=0", "seed=1"),
    "resume with another size": Mistake(
        lambda f: resumed(f, meta_batch_size=3),
        em.CheckpointMismatch, "another run", "meta_batch_size=2", "meta_batch_size=3"),
    "resume with another model": Mistake(
        lambda f: resumed(f, first={"model": BoringModel()}, model=BoringModel(1)),
        em.CheckpointMismatch, "array leaves", r"weight.*float32\[3\]", "same leaves"),
    "resume from a folder": Mistake(
        lambda f: resumed(f, path=f / "old"), em.CheckpointNotFound, "old is a folder",
        "a folder with 2 of them, the newest step-000000004.ckpt$",
        "file.*old/step-000000004.ckpt"),
    "load the model of a folder": Mistake(
        lambda f: em.load_model(best(f), BoringModel()), em.CheckpointNotFound, "old is a folder",
        "2 of them, the newest step-000000004.ckpt, the best step-000000002.ckpt$",
        "old/step-000000002.ckpt"),
    "inspect an empty folder": Mistake(
        lambda f: em.inspect(f), em.CheckpointNotFound,
        "is a folder", "without checkpoints", "`save`"),
    "inspect what never was a checkpoint": Mistake(
        lambda f: em.inspect(__file__), em.CheckpointCorrupt, "is damaged",
        "begins with .*Mistakes.*, and is no zip archive", "the bytes that `save` wrote"),
    "resume is misspelt": Mistake(
        lambda f: fit(f, resume="atuo"), em.CheckpointNotFound, "resume='atuo'", "no such file",
        "'auto', the path"),
    "resume from nothing": Mistake(
        lambda f: resumed(f, path=f / "none.ckpt"),
        em.CheckpointNotFound, "none.ckpt", "no such file", "file"),
    "load what is damaged": Mistake(
        lambda f: em.load(damaged(f), state_of()), em.CheckpointCorrupt, "damaged", ".", "bytes"),
    "save into no folder": Mistake(
        lambda f: em.save(f / "a" / "b.ckpt", LINEAR),
        FileNotFoundError, "Cannot save", "does not exist", "existing folder"),
    **({"save in the place of a pipe": Mistake(
        lambda f: em.save(pipe(f), LINEAR), OSError, r"save\(path=", "a pipe", "a file"),
        "a log in the place of a pipe": Mistake(
        lambda f: boring_fit(5, callbacks=[JSONL(pipe(f))]),
        OSError, r"JSONL\(path=", "a pipe", "a file"),
    } if hasattr(os, "mkfifo") else {}),
    "save in the place of a folder": Mistake(
        lambda f: em.save(f, LINEAR), IsADirectoryError, r"save\(path=", "a folder", "a file"),
    **({"save where nobody can": Mistake(
        lambda f: em.save("/proc/x", LINEAR), OSError, r"save\(path=", "/proc", "written to"),
    } if Path("/proc").is_dir() else {}),
    "model and path are swapped": Mistake(
        lambda f: em.save(LINEAR, f / "x"), TypeError, r"save\(path=", "Linear", "a path"),
    "load from None": Mistake(
        lambda f: em.load(None, LINEAR), TypeError, r"load\(path=", "None", "a path"),
    "load a model from None": Mistake(
        lambda f: em.load_model(None, LINEAR), TypeError, r"load_model\(path=", "None", "a path"),
    "inspect a model": Mistake(
        lambda f: em.inspect(LINEAR), TypeError, r"inspect\(path=", "Linear", "a path"),
    "a folder with a NUL": Mistake(
        lambda f: Checkpoint(f"{f}/a\0b", every=2), ValueError, r"Checkpoint\(folder=", "x00",
        "NUL"),
    "save shapes": Mistake(
        lambda f: em.save(f / "b.ckpt", eqx.filter_eval_shape(lambda: LINEAR)),
        TypeError, r"'\.weight' has no values", "ShapeDtypeStruct", "an array"),
    "save what could not be loaded": Mistake(
        lambda f: em.save(f / "b.ckpt", {"a": np.zeros(3, ml_dtypes.float6_e2m3fn)}),
        TypeError, "cannot be stored", "float6_e2m3fn", "JAX has"),
    "save what is no number": Mistake(
        lambda f: em.save(f / "b.ckpt", {"a": np.array(["text"])}),
        TypeError, "cannot be stored", "str", "numbers"),
    "save notes that are not JSON": Mistake(
        lambda f: em.save(f / "b.ckpt", LINEAR, meta={"a": X}), TypeError, "meta", "Array", "dict"),
}
# fmt: on


def files(folder):
    return {
        path: path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if "old" not in path.parts and path.name != "x"
    }


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_mistake(mistake, tmp_path):
    threads = set(threading.enumerate())
    with compilations() as compiled, pytest.raises(mistake.error) as caught:
        mistake.make(tmp_path)
    notes = getattr(caught.value, "__notes__", [])
    text = str(caught.value.args[0]) if isinstance(caught.value, KeyError) else str(caught.value)
    text = "\n".join([text, *notes])
    # What is JAX's or Python's own keeps its type and text, and gets a note in three parts.
    parts = re.search(r"(?s)([^\n]*)\nReceived: (.+?)\nExpected: (.+)\Z", text)
    assert parts is not None, text
    wanted = (mistake.invalid, mistake.received, mistake.expected)
    for part, pattern in zip(parts.groups(), wanted, strict=True):
        assert re.search(pattern, part, re.DOTALL), f"{pattern!r} is not in {part!r}"
    assert set(threading.enumerate()) <= threads
    if not mistake.late:
        assert files(tmp_path) == {}
        # A run made to be resumed is another's.
        assert compiled == [] or (tmp_path / "old").exists()


def test_there_are_many():
    assert len(MISTAKES) >= 60


def test_what_is_no_mistake(tmp_path):
    # Numbers of NumPy, paths with `..` in them, keys of the old style.
    strategy = em.MAML(em.losses.mse, em.InnerLoop(SGD, steps=np.int64(1)), SGD)
    trainer = em.Trainer(
        strategy,
        meta_batch_size=np.int32(2),
        seed=np.uint32(2**32 - 1),
        callbacks=[
            Checkpoint(tmp_path / "a" / ".." / "b", every=np.int64(2)),
            Evaluate(BoringTasks(), every=2, num_tasks=np.int16(3)),
            JSONL(tmp_path / "log.jsonl"),
        ],
        summary=False,
    )
    assert int(trainer.fit(LINEAR, BoringTasks(), np.int64(4)).step) == 4
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        "step-000000002.ckpt",
        "step-000000004.ckpt",
    ]
    adapted = strategy.inner_adapt(LINEAR, (X, Y), key=jax.random.PRNGKey(0))
    assert jax.tree.structure(adapted) == jax.tree.structure(LINEAR)


@pytest.mark.slow
def test_numbers_of_numpy_become_pythons():
    # A static field of NumPy's would be another program for the same number, and is not JSON.
    two, six = np.int64(2), np.int32(16)
    key = jax.random.key(0)
    made = [
        em.nn.Conv4(two, two, size=six, width=two, key=key),
        em.nn.OmniglotFC(two, two, key=key),
        em.nn.SupportNorm(two),
        em.data.random_crop(two),
        em.ProtoNet(em.losses.cross_entropy, SGD, ways=two),
        em.tasks.Sinusoid(two, two),
        Checkpoint("saved", every=two, keep=two),
        EarlyStopping("loss", patience=two, every=two),
        Histograms(every=two),
    ]
    for thing in made:
        leaves = jax.tree.leaves(thing) if isinstance(thing, eqx.Module) else vars(thing).values()
        static = str(jax.tree.structure(thing))  # with what is not a leaf
        assert "np.int" not in static and not any(type(x) in (np.int32, np.int64) for x in leaves)
    assert made[0] == em.nn.Conv4(2, 2, size=16, width=2, key=key)
