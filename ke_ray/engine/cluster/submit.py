"""Running a job on a cluster: attempts, each with a name of its own."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ke_ray.engine.cluster.job_server import JobResult, JobServer

if TYPE_CHECKING:
    from ke_ray.studies.jobs import JobStudy

log = logging.getLogger(__name__)

_BAD_INPUT = 2  # no retry makes it better


def new_submission_id(name: str) -> str:
    """A submission id that no other job has: name, time (UTC), 32 random bits."""
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"


def run_job(
    server: JobServer,
    job: JobStudy,
    runtime_env: Mapping[str, Any],
    *,
    write: Callable[[str], None],
    on_attempt: Callable[[str, int], None],
) -> JobResult:
    """Submit and follow a job, again as often as ``job.retries`` says.

    A wrong request (exit code 2), a stopped job and one whose time was up are not tried again.
    All commands resume from what is finished, so that a retry costs only what was lost.

    Args:
        server: the cluster's job server.
        job: the job.
        runtime_env: from ``ke_ray.studies.jobs.runtime_env_of``.
        write: gets the log.
        on_attempt: called just before each submission with its id and the attempt's number from 1.

    Returns:
        How the last attempt ended.
    """
    from ke_ray.engine.cluster.placement import describe_resources

    attempt = 1
    needs = {"CPU": job.entrypoint_num_cpus, "GPU": job.entrypoint_num_gpus}
    needed = describe_resources(needs) if any(needs.values()) else ""
    while True:
        submission_id = new_submission_id(job.name)
        on_attempt(submission_id, attempt)
        server.submit(job, runtime_env, submission_id)
        result = server.follow(submission_id, write, job.timeout_s, needed)
        if result.status != "FAILED" or result.exit_code == _BAD_INPUT or attempt > job.retries:
            return result
        log.warning("Attempt %d of %s failed: %s", attempt, job.name, result.message)
        attempt += 1
