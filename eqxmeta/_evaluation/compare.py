"""Evaluations on the same tasks, compared by the difference in each task."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from .._arguments import check_argument, check_choice
from .._direction import Mode, direction
from .._errors import explain
from .._table import Table
from .interval import half_width95, shown
from .result import Evaluation, values_of
from .tasks import same_tasks


@dataclass(frozen=True, repr=False)
class Comparison:
    """By how much one strategy is above another on the same tasks, `a - b`, after adaptation.

    - `metric`: what is compared.
    - `differences`: `[num_tasks]`, of each task.
    - `mean`, `ci95`: their mean, and the half-width of its 95% interval (Student's t).
    - `significant`: whether the interval leaves out zero.
    """

    metric: str
    differences: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.differences.mean())

    @property
    def ci95(self) -> float:
        return float(half_width95(self.differences))

    @property
    def significant(self) -> bool:
        return abs(self.mean) > self.ci95

    def __repr__(self) -> str:
        difference = shown(self.metric, self.mean, self.ci95, sign=True)
        verdict = "significant" if self.significant else "not significant"
        if count := int(np.isnan(self.differences).sum()):
            verdict = f"no verdict: NaN in {count} of them"
        return f"{self.metric}: a - b = {difference} over {len(self.differences)} tasks, {verdict}"


def compare(a: Evaluation, b: Evaluation, metric: str | None = None) -> Comparison:
    """The paired difference of two evaluations on the same tasks, with its 95% interval.

        print(em.compare(maml, protonet))  # accuracy: a - b = -1.20 ± 0.85 % over 600 tasks, ...

    A task that is hard for one is hard for the other, so that the interval of the difference is
    often much smaller than those of the two means. What counts is the value after adaptation.

    - `metric`: `None` is the accuracy if both have it, else the loss.

    Raises `ValueError` if they were not on the same tasks, and says in what they differ; `KeyError`
    for a metric that one of them lacks.
    """
    for name, result in (("a", a), ("b", b)):
        _check_evaluation(result, f"compare({name}=...)")
    _check_same_tasks(a, b, "`compare(a, b)`", "a and b")
    return _paired(a, b, _default((a, b)) if metric is None else metric)


def _paired(a: Evaluation, b: Evaluation, metric: str) -> Comparison:
    last = [values_of(result.values, metric)[:, -1] for result in (a, b)]
    return Comparison(metric, last[0] - last[1])


@dataclass(frozen=True)
class Place:
    """A row of a `Leaderboard`.

    - `name`, `mean`, `ci95`: of the evaluation, after adaptation.
    - `behind`: the paired difference to the best, `None` for the best itself.
    - `best`: whether it is the best, or not significantly worse.
    - `transductive`: as the evaluation says.
    """

    name: str
    mean: float
    ci95: float
    behind: Comparison | None
    best: bool
    transductive: bool


@dataclass(frozen=True, repr=False)
class Leaderboard(Table):
    """`places`, the best first. Print it; `markdown()` is the same for a page."""

    metric: str
    num_tasks: int
    places: tuple[Place, ...]

    def cells(self) -> list[list[str]]:
        lines = [["", self.metric, "to the best"]]
        for place in self.places:
            b = place.behind
            behind = "" if b is None else shown(self.metric, b.mean, b.ci95, sign=True)
            mean = shown(self.metric, place.mean, place.ci95)
            name = f"{place.name}{' (transductive)' * place.transductive}{' *' * place.best}"
            lines.append([name, mean, behind])
        return lines

    def note(self) -> str:
        if len(self.places) == 1:
            return ""
        tied = sum(place.best for place in self.places) > 1
        what = "the best, and what is not significantly worse" if tied else "significantly the best"
        how = f"95 % intervals over {self.num_tasks} tasks, of paired differences to the best"
        return f"Marked *: {what} ({how})."


def leaderboard(
    results: Mapping[str, Evaluation], metric: str | None = None, *, mode: Mode | None = None
) -> Leaderboard:
    """Evaluations on the same tasks, by name, as a table: the best first, and for each of the
    others how far it is behind, as `compare` says it.

        print(em.leaderboard({"MAML": maml, "ProtoNet": protonet}).markdown())

    Marked is the best, with whatever is not significantly worse. (The intervals are those of single
    comparisons: of twenty strategies that are equally good one is likely to seem worse.)

    - `metric`: `None` is the accuracy if all have it, else the loss.
    - `mode`: `"min"` if less is better, `"max"` if more is. `None`: what is known of the metric, as
      for `eqxmeta.callbacks.Checkpoint`.

    Raises `ValueError` if they were not on the same tasks, if there are none, or if nobody says
    which way the metric improves; `KeyError` for a metric that one of them lacks.
    """
    sound = isinstance(results, Mapping) and len(results) > 0
    expected = "one or more results of `evaluate`, by name"
    check_argument(sound, results, "leaderboard(results=...)", expected)
    for name, result in results.items():
        _check_evaluation(result, f"leaderboard(results[{name!r}]=...)")
    first, *others = results
    for other in others:
        pair = f"{first!r} and {other!r}"
        _check_same_tasks(results[first], results[other], "`leaderboard(results)`", pair)
    metric = _default(results.values()) if metric is None else metric
    if mode is None:
        mode = direction(metric, {k: v for x in results.values() for k, v in x.directions.items()})
        expected = "'min' or 'max': nobody says which way this improves"
        check_argument(mode, mode, f"leaderboard(metric={metric!r}, mode=...)", expected)
    else:
        check_choice(mode, "leaderboard(mode=...)", ("min", "max"))
    sign = -1 if mode == "max" else 1
    means = {name: float(result.mean(metric)[-1]) for name, result in results.items()}
    # NaN is no result to be proud of.
    order = sorted(results, key=lambda name: np.nan_to_num(sign * means[name], nan=np.inf))
    places = []
    for name in order:
        half = float(results[name].ci95(metric)[-1])
        behind = None if name == order[0] else _paired(results[name], results[order[0]], metric)
        best = behind is None or not (behind.significant or np.isnan(behind.mean))
        transductive = results[name].transductive
        places.append(Place(name, means[name], half, behind, best, transductive))
    return Leaderboard(metric, len(results[first].values[metric]), tuple(places))


def _default(results: Iterable[Evaluation]) -> str:
    return "accuracy" if all("accuracy" in result.values for result in results) else "loss"


def _check_evaluation(result: object, argument: str) -> None:
    expected = "what `eqxmeta.evaluate` returned"
    check_argument(isinstance(result, Evaluation), result, argument, expected, TypeError)


def _check_same_tasks(a: Evaluation, b: Evaluation, call: str, names: str) -> None:
    if a.tasks is not None and b.tasks is not None and same_tasks(a.tasks, b.tasks):
        return
    counts = [len(next(iter(result.values.values()))) for result in (a, b)]
    if a.tasks is None or b.tasks is None:
        received = f"of {names} it is not known on which tasks they were"
    elif counts[0] != counts[1]:
        received = f"{names} with num_tasks {counts[0]} and {counts[1]}"
    elif a.seed != b.seed:
        received = f"{names} with seed {a.seed} and {b.seed}"
    else:
        received = f"{names} with one seed and number of tasks, but other tasks: another source"
    expected = "evaluations with the same tasks, `num_tasks` and `seed`"
    raise ValueError(explain(f"{call} is of different tasks.", received, expected))
