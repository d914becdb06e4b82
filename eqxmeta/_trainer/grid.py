"""A grid of a strategy's numbers as one compiled program."""

import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._arguments import check_argument, check_int, check_number
from .._errors import explain
from .._model.check import check_model
from .._preflight.outer_update import check_outer_update
from .._strategy.strategy import Strategy
from .._task.device_source import Sampled
from .runs import GridRuns, name_of
from .seed_arguments import check_alike, check_source, check_trainer
from .several import fit_several, stack
from .start import initial_state
from .trainer import Trainer


def fit_grid(
    make_trainer: Callable[..., Trainer],
    model: PyTree,
    tasks: Any,
    steps: int,
    *,
    grid: Mapping[str, Iterable[float]],
) -> GridRuns:
    """What `make_trainer(**point).fit(model, tasks, steps)` computes, for every point of a grid of
    numbers in one compiled program.

        def trainer(outer, inner):
            loop = em.InnerLoop(optax.sgd(inner), steps=1)
            return em.Trainer(em.MAML(em.losses.mse, loop, optax.adam(outer)), meta_batch_size=25)

        grid = {"outer": [1e-3, 3e-3], "inner": [0.01, 0.03, 0.1]}
        runs = em.fit_grid(trainer, model, tasks, steps=2_000, grid=grid)
        board = em.leaderboard(runs.evaluate(validation))
        best = runs.state(board.places[0].name)

    - `make_trainer`: from a number for each name of the grid to a trainer without callbacks, whose
      strategy has the numbers where they belong. It is called with Python's floats, once for each
      point, and then with numbers that JAX traces. So they may be rates, penalties and decays, and
      no numbers of steps or layers; nor may a Python `if` look at them.
    - `model`, `tasks`: as for `fit_seeds`.
    - `grid`: the values of each number; every combination is a point, the last name's values
      changing first.

    Run `i` is that of the trainer of point `i`, up to rounding; with one seed for all, they see the
    same tasks. (Adam's `1 - b2` is then computed in float32: of `b2=0.999` it is off by 1e-5.) As
    in `fit_seeds`, memory is that of all runs together, one that diverges does not stop the others,
    and Ctrl-C and `max_time` end all.

    Raises `TypeError` or `ValueError` for invalid arguments.
    """
    check_maker(make_trainer, grid)
    points = points_of(grid)
    steps = check_int(steps, "fit_grid(steps=...)", minimum=1, what="outer steps")
    check_model(model, "fit_grid(model=...)")
    check_source(tasks, "fit_grid")
    trainers = []
    for point in points:
        trainers.append(make_trainer(**point))
        check_trainer(trainers[-1], f"fit_grid(make_trainer=...)({name_of(point)})", "GridRuns")
    trainer, strategies = trainers[0], tuple(trainer.strategy for trainer in trainers)
    steps = min(steps, trainer.fast_dev_run or steps)
    inits = [initial_state(strategy, model, "fit_grid(model=...)") for strategy in strategies]
    check_alike(inits, "fit_grid(make_trainer=...)", "the states of points")

    def make(**values: Array) -> Strategy:
        return make_trainer(**values).strategy

    source = Sampled(tasks, trainer.meta_batch_size)
    # Of weak types, as Python's own numbers are, so that they leave a narrow model narrow.
    values = {name: jnp.stack([jnp.asarray(p[name]) for p in points]) for name in points[0]}

    def step(values: dict[str, Float[Array, ""]]) -> None:
        check_outer_update(make(**values), inits[0], source.example)

    try:
        jax.eval_shape(step, {name: x[0] for name, x in values.items()})
    except Exception as error:
        check_outer_update(trainer.strategy, inits[0], source.example)  # not for the tracing?
        message = "This error came with numbers that JAX traces, in the place of Python's."
        expected = "a `make_trainer` that computes with them in `jax.numpy`: a rate, a penalty, a "
        expected += "decay; no number of steps, and nothing that a Python `if` looks at"
        error.add_note(explain(message, f"`make_trainer` of {', '.join(values)}", expected))
        raise
    runs = fit_several(
        trainer, source, stack(inits), [trainer.seed for trainer in trainers], steps,
        names=[name_of(point) for point in points], caller="fit_grid", make=make, values=values,
    )  # fmt: skip
    return GridRuns(points, strategies, *runs, make)


def check_maker(make_trainer: Any, grid: Any) -> None:
    argument = "fit_grid(make_trainer=...)"
    expected = "a function of the grid's numbers that returns an `eqxmeta.Trainer`"
    fault = "is not a function from numbers to a trainer"
    check_argument(callable(make_trainer), make_trainer, argument, expected, TypeError, fault)
    expected = "one or more names, each with one or more values: `{'rate': [1e-3, 1e-2]}`"
    check_argument(isinstance(grid, Mapping) and grid, grid, "fit_grid(grid=...)", expected)
    signature = inspect.signature(make_trainer)
    try:
        signature.bind(**dict.fromkeys(grid))
    except TypeError as error:
        message = f"`{argument}` does not take the names of the grid."
        received = f"a function of `{signature}`, and the names {tuple(grid)}"
        raise TypeError(explain(message, received, "the same names")) from error


def points_of(grid: Mapping[str, Iterable[float]]) -> tuple[dict[str, float], ...]:
    """Every combination, the last name's values changing first."""
    columns = []
    for name, values in grid.items():
        argument = f"fit_grid(grid={{{name!r}: ...}})"
        sound = isinstance(values, Iterable) and not isinstance(values, str | bytes)
        check_argument(sound, values, argument, "one or more numbers", TypeError)
        numbers = [float(check_number(value, argument)) for value in values]
        names = [name_of({name: number}) for number in numbers]
        sound = numbers and len(set(names)) == len(names)
        expected = "one or more numbers that differ in their first six digits"
        check_argument(sound, numbers, argument, expected, fault="is empty or repeats a number")
        columns.append(numbers)
    return tuple(dict(zip(grid, values, strict=True)) for values in itertools.product(*columns))
