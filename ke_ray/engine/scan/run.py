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
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from typing import Any

from ke_ray import storage
from ke_ray.engine.cluster.metrics import ScanMeter
from ke_ray.engine.cluster.placement import (
    actors_of_job,
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
from ke_ray.planning.scan_dealing import Dealer
from ke_ray.planning.scan_items import load_tokens, plan_items
from ke_ray.planning.scan_messages import ScorerSettings
from ke_ray.planning.scan_monitor import ScanMonitor
from ke_ray.planning.scan_precision import Gpus
from ke_ray.planning.scan_tracking import log_finished, start_scan_run
from ke_ray.storage.ownership import claimed
from ke_ray.studies.own_measures import loaded
from ke_ray.studies.parts import study_label
from ke_ray.tracking.run import TrackedRun
from ke_ray.tracking.tracker import Tracker

log = logging.getLogger(__name__)

#: Per scorer, beyond those of a plan: for what is lost, and for cuts where scorers come and go.
_SPARE_TICKETS = 16


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
    num_actors, max_actors, per_actor = _actors(setup)
    fetched = any(not ref.is_local for ref in setup.refs)
    load_cost = load_tokens(gpu="num_gpus" in per_actor, fetched=fetched)
    num_items, most_items = (
        len(plan_items(setup.works, number, load_cost)) for number in (num_actors, max_actors)
    )
    num_actors, max_actors = min(num_actors, num_items), min(max_actors, most_items)
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
    dealer = Dealer(setup.works, num_actors, load_cost)
    monitor = ray.remote(ScanMonitor).options(max_restarts=0, **beside_driver()).remote(dealer)
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
    # One block per ticket, with which a scorer asks the monitor for an item: so what is next is
    # decided when a scorer is free, for as many as there are. Ray Data restarts actors and retries
    # tickets without end; an item is given up after MAX_ATTEMPTS.
    # ``from_items`` makes the blocks here; ``from_arrow`` waits for a task to describe them.
    num_tickets = most_items + _SPARE_TICKETS * max_actors
    scored = ray.data.from_items(
        [{"ticket": number} for number in range(num_tickets)], override_num_blocks=num_tickets
    ).map_batches(
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
        batch_size=1,  # one ticket per call; with GPUs Ray Data insists on a number
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            size=max_actors,  # those without a place wait for one, as nodes join
            max_tasks_in_flight_per_actor=2,
            max_concurrent_calls_per_actor=2,
            enable_true_multi_threading=True,
        ),
        **per_actor,
    )
    meter = ScanMeter(display, outcome, study_label(study), setup.works)
    collector = Collector(setup, settings, run, meter, outcome)
    with _monitored(monitor, meter), watch_placement(max_actors - num_actors):
        try:
            batches = scored.iter_batches(
                batch_size=None, batch_format="pyarrow", prefetch_batches=0
            )
            with closing(iter(batches)) as batches:
                while not collector.is_done and (batch := next(batches, None)) is not None:
                    for output in batch.to_pylist():
                        collector.add(output)
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
            log.exception("Ray ended the scan")
            collector.give_up(f"Ray ended the scan before this checkpoint was scored: {reason}")
        else:
            collector.give_up("Ray returned only a part of this checkpoint's results; run again.")


def _actors(setup: ScanSetup) -> tuple[int, int, dict[str, float]]:
    """How many scorers at first and at most, and the resources of each.

    One per GPU (or share of one) where there are any; where the study insists on GPUs and there is
    none yet, the scorers wait for them. On CPUs as many as the study requests, else one per core,
    fewer where memory could not hold two models for each.
    """
    nodes = cluster_nodes()
    requested, share = setup.study.num_actors, setup.study.gpus_per_scorer
    most_wanted = setup.study.max_actors or 0
    num_places = 0 if setup.study.device == "cpu" else count_places(nodes, 1, gpus=share)
    if num_places or setup.study.device == "cuda":
        most = num_places or requested or 1
        num_actors = min(requested or most, most)
        return num_actors, max(num_actors, most_wanted), {"num_gpus": share, "num_cpus": 1}
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
    cpus = most_cpus(nodes, num_actors)
    return num_actors, max(num_actors, most_wanted), {"num_cpus": cpus}


@contextmanager
def _monitored(monitor: Any, meter: ScanMeter) -> Iterator[None]:
    """Tell the monitor which scorers there are, and ask what was scored, once a second on a thread.

    The monitor ends with the block, and every scorer ends with its monitor.
    """
    import ray

    stopped = threading.Event()

    def tick() -> None:
        with suppress(ray.exceptions.RayError):
            num_alive, lost = _scorers()
            answers = [
                monitor.update.remote(lost),
                monitor.scored.remote(),
                monitor.take_warnings.remote(),
            ]
            _, (num_tokens, busy_s), warnings = ray.get(answers, timeout=5)
            meter.tick(num_tokens, busy_s, num_alive)
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


def _scorers() -> tuple[int, list[str]]:
    """How many scorers are alive, and the names of those that are dead or restart."""
    num_alive, lost = 0, []
    for actor in actors_of_job():
        if CheckpointScorer.__name__ in actor.class_name:
            num_alive += actor.state == actor.ALIVE
            if actor.state in (actor.RESTARTING, actor.DEAD):
                lost.append(actor.actor_id.hex())
    return num_alive, lost
