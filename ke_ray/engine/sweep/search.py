"""A Ray Tune searcher over a sweep's ledger, with Optuna for new points.

Every command builds Optuna's study anew from the ledger: a finished point becomes a finished
Optuna trial with the mean over its seeds, an unfinished one a running trial that ends later. So
the history that TPE sees is exactly what the result files say, whatever was killed when.

A trial that the scheduler stopped is PRUNED for Optuna, with the acquisition it had reached, and
not COMPLETE with an early value (which is what Ray's own OptunaSearch makes of it). A point all of
whose trials failed is FAIL: TPE leaves it out.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState
from ray.tune.search import Searcher

from ke_ray.planning.sweep import SweepPlan
from ke_ray.planning.trials import Point, Trial
from ke_ray.results.sweep_folder import objective_value
from ke_ray.studies.axis import Axis
from ke_ray.studies.sweep import SweepStudy

log = logging.getLogger(__name__)


def distributions(study: SweepStudy) -> dict[str, BaseDistribution]:
    """The space in Optuna's terms."""
    return {key: _distribution(axis) for key, axis in study.space.items()}


def _distribution(axis: Axis) -> BaseDistribution:
    if axis.choice is not None:
        return CategoricalDistribution(axis.choice)
    if axis.integer is not None:
        return IntDistribution(*axis.integer)
    if axis.uniform is not None:
        return FloatDistribution(*axis.uniform)
    assert axis.loguniform is not None
    return FloatDistribution(*axis.loguniform, log=True)


def point_values(study: SweepStudy, rows: Sequence[dict[str, Any]]) -> list[float] | None:
    """The objectives of a point, each the mean over its finished trials; None where one lacks."""
    finished = [row for row in rows if row["status"] == "ok"]
    means = []
    for objective in study.objectives:
        values = [objective_value(row, objective.metric) for row in finished]
        reported = [value for value in values if value is not None]
        if not reported:
            return None
        means.append(sum(reported) / len(reported))
    return means


class _PointSampler:
    """Optuna's study of a sweep, kept in memory and fed from the ledger."""

    def __init__(self, plan: SweepPlan) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.plan, self.space = plan, distributions(plan.study)
        self.study = optuna.create_study(
            directions=[objective.direction for objective in plan.study.objectives],
            sampler=optuna.samplers.TPESampler(
                # Another seed on resume, or the same first draws would come again.
                seed=(plan.study.search_seed * 1_000_003 + len(plan.points)) % 2**32,
                n_startup_trials=plan.study.startup_trials,
                constant_liar=True,
            ),
        )
        self.numbers: dict[int, int] = {}  # of a point → of Optuna's trial
        for point in plan.points:
            self._remember(point)

    def _remember(self, point: Point) -> None:
        if not set(self.space) <= set(point.params):
            return  # a point of its own, outside the space
        params = {key: point.params[key] for key in self.space}
        if not all(
            axis._contains(axis.to_internal_repr(params[k])) for k, axis in self.space.items()
        ):
            return
        trials = self.plan.trials_of(point.number)
        state, values, intermediate = TrialState.RUNNING, None, dict[int, float]()
        if all(trial.is_done for trial in trials):
            rows = [row for trial in trials if (row := trial.row())]
            state, values = self._result(rows)
            intermediate = self._intermediate(rows)
        self.study.add_trial(
            optuna.trial.create_trial(
                state=state,
                values=values,
                params=params,
                distributions=self.space,
                intermediate_values=intermediate if state == TrialState.PRUNED else None,
            )
        )
        self.numbers[point.number] = len(self.study.trials) - 1

    def _result(self, rows: Sequence[dict[str, Any]]) -> tuple[TrialState, list[float] | None]:
        values = point_values(self.plan.study, rows)
        if values is not None:
            return TrialState.COMPLETE, values
        if any(row["status"] == "stopped" for row in rows):
            return TrialState.PRUNED, None
        return TrialState.FAIL, None

    def _intermediate(self, rows: Sequence[dict[str, Any]]) -> dict[int, float]:
        """Where a stopped trial stood, if that is what the objective is about: step → value."""
        if self.plan.study.objectives[0].metric != "acquisition":
            return {}
        return {
            row["stopped_at_step"]: row["acquisition_at_stop"]
            for row in rows
            if row["status"] == "stopped" and row.get("acquisition_at_stop") is not None
        }

    def ask(self) -> Point:
        """Another point."""
        trial = self.study.ask(self.space)
        point = Point(len(self.plan.points), dict(trial.params))
        self.numbers[point.number] = trial.number
        return point

    def tell(self, number: int, rows: Sequence[dict[str, Any]]) -> None:
        """Give Optuna the results of a point."""
        if number not in self.numbers:
            return
        state, values = self._result(rows)
        trial = self.study.trials[self.numbers[number]]
        if trial.state.is_finished():
            return
        if state == TrialState.PRUNED:
            for step, value in self._intermediate(rows).items():
                optuna.trial.Trial(self.study, trial._trial_id).report(value, step)
        self.study.tell(self.numbers[number], values, state=state)


class LedgerSearcher(Searcher):
    """Suggests the trials that are not done, then draws points until there are enough.

    Args:
        plan: points and trials so far; drawn points are added to it and saved.
        config_of: what Tune passes to a trial.
        settle: called once a trial has ended; completes its row where the trial could not, from
            the last result that Tune has of it.
    """

    def __init__(
        self,
        plan: SweepPlan,
        config_of: Callable[[Trial], dict[str, Any]],
        settle: Callable[[Trial, dict[str, Any], bool], None],
    ) -> None:
        super().__init__()
        self.plan, self.config_of, self.settle = plan, config_of, settle
        self.waiting: deque[Trial] = deque(t for t in plan.trials if not t.is_done)
        self.running: dict[str, Trial] = {}
        self.max_concurrent = sys.maxsize
        self._times_abandoned: Counter[str] = Counter()
        draws = plan.study.search == "tpe" and bool(plan.study.space)
        self.sampler = _PointSampler(plan) if draws else None

    @property
    def optuna_study(self) -> optuna.Study | None:
        """Optuna's view of the sweep."""
        return self.sampler.study if self.sampler else None

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        """See Ray. Kept here, since Ray's own count never forgets a trial that was abandoned."""
        self.max_concurrent = max_concurrent
        return True

    def abandoned(self, trial_id: str) -> None:
        """Tune has given a trial up that did not begin: it waits again, or has failed."""
        trial = self.running.get(trial_id)
        if trial is None:
            return  # it has ended in the ordinary way
        self._times_abandoned[trial.trial_id] += 1
        if self._times_abandoned[trial.trial_id] > self.plan.study.retries:
            self.on_trial_complete(trial_id, error=True)
            return
        log.warning("Trial %s got no process in time; it is tried again.", trial.trial_id)
        self.waiting.appendleft(self.running.pop(trial_id))

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """See Ray: a config, or that there is nothing now, or nothing more."""
        if len(self.running) >= self.max_concurrent:
            return None
        if not self.waiting:
            if self.sampler is None or len(self.plan.points) >= self.plan.num_points:
                return None if self.running else Searcher.FINISHED
            point = self.sampler.ask()
            self.waiting.extend(self.plan.add(point))
            self.plan.save_points()  # before its trials can write anything
        trial = self.waiting.popleft()
        self.running[trial_id] = trial
        return self.config_of(trial)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """See Ray."""
        trial = self.running.pop(trial_id, None)
        if trial is None:
            return
        self.settle(trial, result or {}, error)
        if self.sampler is None:
            return
        rows = [t.row() for t in self.plan.trials_of(trial.point.number)]
        if all(row is not None for row in rows):
            self.sampler.tell(trial.point.number, [row for row in rows if row is not None])

    def __getstate__(self) -> dict[str, Any]:
        """For the copy of everything that Tune writes to disk, which nothing ever reads."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is the state."""
