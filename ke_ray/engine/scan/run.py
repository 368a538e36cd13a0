"""The scan: entropies of many checkpoints on Ray Data.

The driver lists checkpoints, packs the corpora, leaves out what the output folder already has,
deals work items to the scorers, merges partial sums in float64, and writes each checkpoint's
results as it finishes. Its memory is that of the corpora and of the checkpoints that are being
scored, whatever the length of the series.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

from ke_ray import storage
from ke_ray.engine.cluster.metrics import ScanMeter
from ke_ray.engine.cluster.placement import (
    cluster_nodes,
    count_places,
    gpus_have_bfloat16,
    most_cpus,
)
from ke_ray.engine.cluster.placement_watch import watch_placement
from ke_ray.engine.cluster.session import beside_driver, ray_session
from ke_ray.engine.cluster.shared_storage import check_nodes_see
from ke_ray.engine.scan.collect import Collector
from ke_ray.engine.scan.scorer import CheckpointScorer
from ke_ray.errors import StorageError, UserError
from ke_ray.outcomes import Display, ScanOutcome
from ke_ray.planning.scan import ScanSetup, go_on
from ke_ray.planning.scan_items import load_tokens, plan_items
from ke_ray.planning.scan_messages import ScorerSettings, item_to_json
from ke_ray.planning.scan_monitor import ScanMonitor
from ke_ray.planning.scan_precision import Gpus
from ke_ray.planning.scan_tracking import log_finished, start_scan_run
from ke_ray.storage.ownership import claimed
from ke_ray.studies.own_measures import loaded
from ke_ray.studies.parts import study_label
from ke_ray.tracking.run import TrackedRun
from ke_ray.tracking.tracker import Tracker

log = logging.getLogger(__name__)


@contextmanager
def cluster_gpus() -> Iterator[Gpus]:
    """What ``prepare_scan`` asks about GPUs; once asked, Ray's session lasts for the block."""
    with ExitStack() as stack:

        def ask() -> bool | None:
            stack.enter_context(ray_session())
            return gpus_have_bfloat16()

        yield ask


def run_scan(setup: ScanSetup, display: Display, tracker: Tracker) -> ScanOutcome:
    """Score what is missing and write it.

    Args:
        setup: from ``prepare_scan``.
        display: shows what happens.
        tracker: where the run is logged.

    Returns:
        What was done; failed checkpoints are in it and in the results, never raised.

    Raises:
        ResultsError: another command is writing the output folder.
        StorageError: the output folder cannot be written (what was finished before is kept).
    """
    outcome = ScanOutcome(setup.study.output, num_skipped=setup.num_skipped)
    outcome.phases_s["setup"] = setup.duration_s
    with claimed(setup.study.output, "scan"):
        setup.folder.manifest.update(status="running")
        if setup.changed:
            log.warning("Other weights than before, scanned anew: %s", ", ".join(setup.changed))
        setup.folder.consolidate(without=setup.changed)
        setup.changed.clear()  # their results are gone
        run = start_scan_run(setup, tracker)
        outcome.mlflow_run_id = run.run_id
        status = "FAILED"
        try:
            log_finished(run, setup)
            _run(setup, display, run, outcome)
            status = "FAILED" if outcome.failures else "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            display.stop()
            if setup.folder.manifest["status"] == "running":
                # It did not come to its end; finished parts stay for the same command to resume.
                ending = "interrupted" if status == "KILLED" else "failed"
                setup.folder.manifest["status"] = ending
                with suppress(StorageError):  # a full disk must not hide its own message
                    setup.folder.write_manifest()
            run.set_tags({"ke_ray.num_failed": str(len(outcome.failures))})
            run.finish(status)
    return outcome


def _run(setup: ScanSetup, display: Display, run: TrackedRun, outcome: ScanOutcome) -> None:
    display.start(num_items=len(setup.works), num_skipped=setup.num_skipped)
    if setup.works:
        started = time.monotonic()
        with ray_session():
            outcome.phases_s["ray_start"] = time.monotonic() - started
            started = time.monotonic()
            _score(setup, run, display, outcome)
            while go_on(setup, [name for name, _ in outcome.failures]):
                setup.folder.consolidate()  # the manifest says the round before its first value
                run.set_tags({f"data_sha256.{n}": c.sha256 for n, c in setup.corpora.items()})
                outcome.num_done, outcome.num_skipped = 0, setup.num_skipped
                display.stop()
                display.start(num_items=len(setup.works), num_skipped=setup.num_skipped)
                _score(setup, run, display, outcome)
            outcome.phases_s["scoring"] = time.monotonic() - started
    started = time.monotonic()
    setup.folder.manifest["checkpoints"] = setup.checkpoint_entries()
    setup.folder.consolidate(final=not outcome.failures)
    if outcome.failures:
        setup.folder.manifest["status"] = "failed"
        setup.folder.write_manifest()
    outcome.phases_s["closing"] = time.monotonic() - started


def _score(setup: ScanSetup, run: TrackedRun, display: Display, outcome: ScanOutcome) -> None:
    import ray

    study = setup.study
    inputs = [("The checkpoint", ref.location) for ref in setup.refs if ref.format != "hub"]
    coefficients = study.resuscitation.coefficients if study.resuscitation else None
    check_nodes_see([*inputs, ("resuscitation.coefficients", coefficients)])
    num_actors, per_actor = _actors(setup)
    fetched = any(not ref.is_local for ref in setup.refs)
    load_cost = load_tokens(gpu="num_gpus" in per_actor, fetched=fetched)
    items = plan_items(setup.works, num_actors, load_cost)
    num_actors = min(num_actors, len(items))
    settings = ScorerSettings(
        dtype=study.dtype,
        batch_size=study.batch_size,
        top_k_fraction=study.top_k_fraction,
        dormant_threshold=study.dormant_threshold,
        device=study.device,
        threads=int(per_actor.get("num_cpus", 1)) if "num_gpus" not in per_actor else None,
        cache_dir=storage.absolute(study.cache_dir) if study.cache_dir else None,
        cache_bytes=study.cache_bytes,
        resuscitation=study.resuscitation,
        architecture=study.architecture,
        matmul_precision=study.matmul_precision,
        own_measures=loaded(study.measures),
    )
    monitor = ray.remote(ScanMonitor).options(max_restarts=0, **beside_driver()).remote()
    arrays = {
        name: ray.put((corpus.input_ids, corpus.lengths)) for name, corpus in setup.corpora.items()
    }
    context = ray.data.DataContext.get_current()
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Ray Data would end the scan where no item finishes in half an hour, as a large model on a CPU
    # does not; what cannot go on is told by the watch on placement and by the scorers themselves.
    context.execution_no_progress_timeout_s = -1
    # One block per item, so that Ray Data schedules and retries exactly our items. It restarts
    # actors and retries items without end; the scorer gives an item up after MAX_ATTEMPTS.
    # ``from_items`` makes the blocks here; ``from_arrow`` waits for a task to describe them.
    dataset = ray.data.from_items(
        [{"item": item_to_json(item)} for item in items], override_num_blocks=len(items)
    )
    dataset = dataset.map_batches(
        CheckpointScorer,
        fn_constructor_kwargs={
            "settings": settings,
            # A cluster that was joined runs its workers in a folder of its own.
            "checkpoints": [
                replace(ref, location=storage.absolute(ref.location)) if ref.is_local else ref
                for ref in setup.refs
            ],
            "corpora": arrays,
            "monitor": monitor,
        },
        batch_size=1,  # one item per call; with GPUs Ray Data insists on a number
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            size=num_actors,
            max_tasks_in_flight_per_actor=2,
            max_concurrent_calls_per_actor=2,
            enable_true_multi_threading=True,
        ),
        **per_actor,
    )
    meter = ScanMeter(display, outcome, study_label(study), setup.works, num_actors)
    collector = Collector(setup, settings, run, meter, outcome)
    with _monitored(monitor, meter), watch_placement():
        try:
            for batch in dataset.iter_batches(
                batch_size=None, batch_format="pyarrow", prefetch_batches=0
            ):
                for output in batch.to_pylist():
                    collector.add(output)
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
            log.exception("Ray ended the scan")
            collector.give_up(f"Ray ended the scan before this checkpoint was scored: {reason}")
        else:
            collector.give_up("Ray returned only a part of this checkpoint's results; run again.")


def _actors(setup: ScanSetup) -> tuple[int, dict[str, float]]:
    """How many scorers, and the resources of each.

    One per GPU (or share of one) where there are any; where the study insists on GPUs and there is
    none yet, the scorers wait for them. On CPUs as many as the study requests, else one per core,
    fewer where memory could not hold two models for each.
    """
    nodes = cluster_nodes()
    requested, share = setup.study.num_actors, setup.study.gpus_per_scorer
    num_places = 0 if setup.study.device == "cpu" else count_places(nodes, 1, gpus=share)
    if num_places or setup.study.device == "cuda":
        most = num_places or requested or 1
        return min(requested or most, most), {"num_gpus": share, "num_cpus": 1}
    num_places = count_places(nodes, 1)
    if not num_places:
        raise UserError(
            "The cluster has neither CPUs nor GPUs for a scorer right now; wait until its nodes "
            "are up (ray status) and run the command again."
        )
    num_actors = min(requested or num_places, num_places)
    if requested is None:
        if setup.model_bytes:  # one that is scored, one that loads, and room to work
            memory = sum(node.get("memory", 0) for node in nodes)
            num_actors = max(1, min(num_actors, int(memory / (2.5 * setup.model_bytes))))
        num_actors = min(num_actors, max(1, len(setup.works)))
    return num_actors, {"num_cpus": most_cpus(nodes, num_actors)}


@contextmanager
def _monitored(monitor: Any, meter: ScanMeter) -> Iterator[None]:
    """Ask the monitor for what was scored and for warnings, once a second, on a thread.

    The monitor ends with the block, and every scorer ends with its monitor.
    """
    import ray

    stopped = threading.Event()

    def tick() -> None:
        with suppress(ray.exceptions.RayError):
            answers = [monitor.scored.remote(), monitor.take_warnings.remote()]
            scored, warnings = ray.get(answers, timeout=5)
            meter.tick(*scored)
            for warning in warnings:
                log.warning("%s", warning)

    def tick_on() -> None:
        while not stopped.wait(1.0):
            tick()

    thread = threading.Thread(target=tick_on, name="scan-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join(timeout=10)
        tick()
        ray.kill(monitor)
