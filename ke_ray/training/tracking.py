"""One training run in MLflow: losses as they come, status truthful at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ke_ray.studies.parts import TrackingSettings
from ke_ray.tracking.run import NoRun, TrackedRun
from ke_ray.tracking.tracker import open_tracker
from ke_ray.training.loop import Progress
from ke_ray.training.parallel import Worker

if TYPE_CHECKING:
    from ke_ray.studies.continual import ContinualStudy
    from ke_ray.training.runs import RunSpec

#: A run's curves have about this many points: enough to see, cheap enough to send.
POINTS = 200
#: They are sent together, as a write costs as much as a step of a small model.
SEND_EVERY_S = 5.0


@contextmanager
def tracked_run(
    settings: TrackingSettings,
    worker: Worker,
    *,
    name: str,
    key: str,
    kind: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str] | None = None,
    parent_id: str | None = None,
) -> Iterator[TrackedRun]:
    """An MLflow run on the main worker (a run that logs nothing elsewhere).

    It ends FINISHED, FAILED after an exception, KILLED after an interrupt; a killed process is
    found out by the next one that logs to the store. The store is opened in the background, and
    nothing that it does or does not do is an error here: the work has started.
    """
    if not worker.is_main:
        yield NoRun()
        return
    with open_tracker(settings, deferred=True) as tracker:
        run = tracker.start_run(
            name, key=key, kind=kind, params=params, tags=tags, parent_id=parent_id
        )
        try:
            yield run
        except Exception:
            run.finish("FAILED")
            raise
        except BaseException:
            run.finish("KILLED")
            raise
        run.finish("FINISHED")


def log_progress(run: TrackedRun, num_steps: int) -> Callable[[Progress], None]:
    """A callback for the loop that logs about :data:`POINTS` points of each curve."""
    interval = max(1, num_steps // POINTS)
    last = -interval

    def log(progress: Progress) -> None:
        nonlocal last
        record = progress.record
        if record.step - last < interval and record.step != num_steps:
            return
        last = record.step
        metrics = {
            "train/loss": record.loss,
            "train/learning_rate": record.learning_rate,
            "train/grad_norm": record.grad_norm,
            "train/tokens_per_s": record.tokens_per_s,
            "train/num_tokens": record.num_tokens,
        }
        run.log_metrics(metrics, record.step, hold_s=SEND_EVERY_S)

    return log


def run_params(study: ContinualStudy, spec: RunSpec) -> dict[str, Any]:
    """What the tracking store shows of a run: what its result depends on, to compare runs by.

    Where coefficients came from, and whether they are of these weights, are tags of the run.
    """
    params = study.model_dump(
        mode="json", exclude={"mlflow", "starts", "seeds", "kind", "output", "executor"}
    )
    settings = params.get("resuscitation")
    if settings is not None:
        hidden = {"coefficients", "allow_mismatch"}
        hidden |= set() if settings["control"] == "random" else {"seed"}
        params["resuscitation"] = {k: v for k, v in settings.items() if k not in hidden}
    own = {"checkpoint": spec.ref.name, "pretraining_step": spec.ref.step, "seed": spec.seed}
    return {**params, **own}
