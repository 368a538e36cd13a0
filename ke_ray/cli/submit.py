"""``ke-ray submit``: run a command as a job on a cluster."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
import yaml

from ke_ray.cli.options import DryRun, Set
from ke_ray.engine.cluster.job_server import JobServer
from ke_ray.engine.cluster.submit import new_submission_id, run_job
from ke_ray.errors import KeRayError
from ke_ray.studies.jobs import load_job, refuse_loopback_tracking, runtime_env_of

_INTERRUPTED = 130


def submit(
    job: Annotated[str, typer.Argument(metavar="JOB.yaml", help="The job file (jobs/).")],
    address: Annotated[
        str,
        typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="The cluster's job server."),
    ] = "http://127.0.0.1:8265",
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Follow the log and end with its exit code.")
    ] = True,
    overrides: Set = None,
    dry_run: DryRun = False,
) -> None:
    """Submit a job file to a Ray cluster, follow it, and end with the job's own exit code."""

    loaded = load_job(job, overrides or [], os.environ)
    runtime_env = runtime_env_of(loaded, os.environ)
    if dry_run:
        plan = loaded.model_dump(exclude={"env", "working_dir", "runtime_env"}, exclude_none=True)
        print(yaml.safe_dump(plan | {"runtime_env": runtime_env}, sort_keys=False), end="")
        return

    server = JobServer(address)
    refuse_loopback_tracking(loaded, runtime_env, server.num_machines())
    if not wait:
        submission_id = new_submission_id(loaded.name)
        server.submit(loaded, runtime_env, submission_id)
        print(submission_id)
        _say(_how_to(submission_id, server.address))
        if loaded.timeout_s or loaded.retries:
            _say("timeout_s and retries have no effect with --no-wait.")
        return

    submitted: list[str] = []

    def on_submitted(submission_id: str, attempt: int) -> None:
        submitted.append(submission_id)
        again = f", attempt {attempt} of {loaded.retries + 1}" if attempt > 1 else ""
        _say(f"Job {submission_id} on {server.address}{again}: {loaded.entrypoint}")

    try:
        result = run_job(server, loaded, runtime_env, write=_write, on_attempt=on_submitted)
    except KeyboardInterrupt:
        if submitted:
            _interrupted(server, submitted[-1])
        raise typer.Exit(_INTERRUPTED) from None
    _say(f"Job {result.submission_id} {result.status.lower()}, exit code {result.exit_code}.")
    if result.exit_code and result.message:
        _say(result.message)
    raise typer.Exit(result.exit_code)


def _interrupted(server: JobServer, submission_id: str) -> None:
    """Leave the job running unless a person at a terminal says otherwise."""
    stop = False
    if sys.stdin.isatty():
        try:
            answer = input(f"\nStop job {submission_id} on the cluster too? [y/N] ")
            stop = answer.strip().lower() in ("y", "yes")
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
    if not stop:
        _say(f"Detached; the job keeps running. {_how_to(submission_id, server.address)}")
        return
    try:
        server.stop(submission_id)
    except KeRayError as error:
        _say(str(error))
    else:
        _say(f"Job {submission_id} is being stopped. Finished work is saved.")


def _how_to(submission_id: str, address: str) -> str:
    return (
        f"Follow: ray job logs --follow --address {address} {submission_id}. "
        f"Stop: ray job stop --address {address} {submission_id}"
    )


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command()(submit)
