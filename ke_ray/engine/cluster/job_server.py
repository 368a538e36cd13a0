"""A cluster's job server: a job is submitted, followed to its end, and stopped.

The job is the cluster's from its submission on: when this process ends, the job goes on. What the
follower adds is the log, the exit code and the time limit.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ke_ray.errors import KeRayError, UserError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from ke_ray.studies.jobs import JobStudy

log = logging.getLogger(__name__)

_REQUEST_TIMEOUT_S = 120.0
_ANSWER_TIMEOUT_S = 15.0
_LOOK_EVERY_S = 10.0
_LOST_AFTER_S = 60.0
_STOPPED_AFTER_S = 30.0
_WAITS_AFTER_S = 15.0
_CHATTY = (  # they report each ignored folder and each closed connection
    "ray.dashboard.modules.job.sdk",
    "ray.dashboard.modules.dashboard_sdk",
    "ray._private.runtime_env.packaging",
)
_TIMED_OUT = 124  # as of timeout(1)
_INTERRUPTED = 130


@dataclass(frozen=True)
class JobResult:
    """How a job ended.

    Attributes:
        status: ``SUCCEEDED``, ``FAILED``, ``STOPPED`` or ``TIMED_OUT``.
        exit_code: the job's own; 1 where it failed without one, 124 where its time was up, 130
            where it was stopped.
        message: what the cluster says about it.
    """

    submission_id: str
    status: str
    exit_code: int
    message: str


def exit_code_of(status: str, driver_exit_code: int | None) -> int:
    """The exit code to end with, from what the job server says of a job that is over.

    A process that a signal ended has a negative code there; shells say 128 + signal.
    """
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":
        return _INTERRUPTED
    if not driver_exit_code:
        return 1
    return driver_exit_code if driver_exit_code > 0 else 128 - driver_exit_code


class _Log:
    """Passes a log on once, however often it is read again from its beginning."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._position = self._written = 0

    def rewind(self) -> None:
        self._position = 0

    def add(self, text: str) -> None:
        new = text[max(0, self._written - self._position) :]
        self._position += len(text)
        self._written = max(self._written, self._position)
        if new:
            self._write(new)


class _Start:
    """Says once that a job waits for a node that can hold its command."""

    def __init__(self, needs: str) -> None:
        self._needs = needs
        self._since = time.monotonic()

    def look(self, status: str) -> None:
        if status != "PENDING" or not self._needs:
            return
        if time.monotonic() - self._since >= _WAITS_AFTER_S:
            log.warning(
                "The job waits for a node with %s free for its command (entrypoint_num_cpus, "
                "entrypoint_num_gpus); `ray status` shows what the nodes have.",
                self._needs,
            )
            self._needs = ""


class JobServer:
    """The job server of a cluster: submit, follow, stop.

    Args:
        address: its HTTP address, ``http://127.0.0.1:8265``. It wins over ``RAY_ADDRESS``.

    Raises:
        UserError: not such an address, nothing answers there, or it requires a token.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        if not self.address.startswith(("http://", "https://")):
            raise UserError(
                f"'{address}' is not a job server's address; give that of the dashboard, such as "
                "http://127.0.0.1:8265."
            )
        _prepare_token(os.environ)
        self._reach()
        self._client = self._connect()

    def submit(self, job: JobStudy, runtime_env: Mapping[str, Any], submission_id: str) -> None:
        """Upload the working folder and submit.

        Raises:
            UserError: the runtime environment is not valid, or the server refuses the job.
            KeRayError: the server went away.
        """
        with self._explained():
            try:
                self._client.submit_job(
                    entrypoint=job.entrypoint,
                    submission_id=submission_id,
                    runtime_env=dict(runtime_env),
                    metadata=dict(job.metadata),
                    entrypoint_num_cpus=job.entrypoint_num_cpus or None,
                    entrypoint_num_gpus=job.entrypoint_num_gpus or None,
                )
            except (ValueError, TypeError, RuntimeError) as error:
                raise UserError(
                    f"The job cannot be submitted to {self.address}: {_first_line(error)}"
                ) from error
            except OSError as error:
                raise KeRayError(
                    f"The job server at {self.address} went away while job {submission_id} was "
                    f"submitted ({_first_line(error)}); it may be running all the same."
                ) from error

    def stop(self, submission_id: str) -> bool:
        """Ask a job to end (SIGTERM, then SIGKILL); whether it was running."""
        with self._explained():
            try:
                return bool(self._client.stop_job(submission_id))
            except (OSError, RuntimeError) as error:
                raise KeRayError(
                    f"Job {submission_id} could not be stopped: {_first_line(error)}"
                ) from error

    def num_machines(self) -> int | None:
        """Addresses that the nodes of the cluster have; None where the server does not say."""
        with self._explained():
            try:
                answer = self._client._do_request("GET", "/api/v0/nodes").json()
                nodes = answer["data"]["result"]["result"]
                addresses = {node["node_ip"] for node in nodes if node["state"] == "ALIVE"}
                return len(addresses) or None  # a head that has just started knows none yet
            except (OSError, RuntimeError, ValueError, LookupError, TypeError) as error:
                log.info("the nodes of %s are not known: %s", self.address, error)
                return None

    def result(self, submission_id: str, start: _Start | None = None) -> JobResult | None:
        """How a job ended; None while it has not."""
        details = self._client.get_job_info(submission_id)
        status = str(details.status.value)
        if start is not None:
            start.look(status)
        if not details.status.is_terminal():
            return None
        code = exit_code_of(status, details.driver_exit_code)
        return JobResult(submission_id, status, code, (details.message or "").strip())

    def follow(
        self,
        submission_id: str,
        write: Callable[[str], None],
        timeout_s: float | None = None,
        needs: str = "",
    ) -> JobResult:
        """Pass the log on until the job is over; a lost connection is taken up again.

        Args:
            submission_id: the job.
            write: gets the log's text, each part once.
            timeout_s: stop the job after so many seconds.
            needs: resources of the job's command, for a message where it waits for them.

        Raises:
            KeRayError: the server has not answered for a minute; the job may go on.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        text, start = _Log(write), _Start(needs)
        lost_since: float | None = None
        while True:
            with self._explained():
                try:
                    asyncio.run(self._tail(submission_id, text, deadline, start))
                except _lost_errors() as error:
                    log.info("the log of %s broke off: %s", submission_id, error)
                try:
                    result = self.result(submission_id, start)
                    lost_since = None
                except _lost_errors() as error:
                    lost_since = lost_since or time.monotonic()
                    if time.monotonic() - lost_since > _LOST_AFTER_S:
                        raise KeRayError(
                            f"The job server at {self.address} no longer answers "
                            f"({_first_line(error)}). Job {submission_id} may still be running."
                        ) from error
                    result = None
            if result is not None:
                return result
            if deadline is not None and time.monotonic() >= deadline:
                return self._time_is_up(submission_id, timeout_s or 0.0)
            time.sleep(0.5)

    def _time_is_up(self, submission_id: str, timeout_s: float) -> JobResult:
        self.stop(submission_id)
        until = time.monotonic() + _STOPPED_AFTER_S
        with suppress(*_lost_errors()):
            while self.result(submission_id) is None and time.monotonic() < until:
                time.sleep(0.5)
        message = f"It was stopped: it took longer than timeout_s ({timeout_s:g})."
        return JobResult(submission_id, "TIMED_OUT", _TIMED_OUT, message)

    async def _tail(
        self, submission_id: str, text: _Log, deadline: float | None, start: _Start
    ) -> None:
        """Read the log from its beginning until the server closes it, or the time is up."""
        text.rewind()
        parts = self._client.tail_job_logs(submission_id)
        ended_since: float | None = None
        pending = asyncio.ensure_future(anext(parts, None))
        try:
            while True:
                now = time.monotonic()
                wait_s = _LOOK_EVERY_S if deadline is None else min(_LOOK_EVERY_S, deadline - now)
                done, _ = await asyncio.wait({pending}, timeout=max(wait_s, 0.0))
                if done:
                    part = pending.result()
                    if part is None:
                        return
                    text.add(part)
                    pending = asyncio.ensure_future(anext(parts, None))
                elif deadline is not None and time.monotonic() >= deadline:
                    return
                elif self.result(submission_id, start) is not None:
                    # Over, and yet the log is open: wait for its end once more, not for ever.
                    if ended_since is not None:
                        return
                    ended_since = time.monotonic()
        finally:
            pending.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await pending
            with suppress(Exception):
                await parts.aclose()

    def _reach(self) -> None:
        """Any HTTP answer will do: the client itself would wait for ever."""
        import requests

        try:
            requests.get(f"{self.address}/api/version", timeout=_ANSWER_TIMEOUT_S)
        except requests.RequestException as error:
            raise UserError(
                f"No job server answers at {self.address}. Start a cluster there (ray start "
                "--head --dashboard-host 127.0.0.1), forward its port (ssh -L "
                "8265:127.0.0.1:8265 HEAD), or give another --address."
            ) from error

    def _connect(self) -> JobSubmissionClient:
        from ray.job_submission import JobSubmissionClient

        if not log.isEnabledFor(logging.INFO):
            for noisy in _CHATTY:
                logging.getLogger(noisy).setLevel(logging.WARNING)

        class Client(JobSubmissionClient):
            """Never waits for ever for an answer."""

            def _do_request(self, *args: Any, **kwargs: Any) -> Any:
                kwargs.setdefault("timeout", _REQUEST_TIMEOUT_S)
                return super()._do_request(*args, **kwargs)

        with self._explained(), _without("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            try:
                return Client(self.address)
            except (OSError, RuntimeError, ValueError) as error:
                raise UserError(
                    f"What answers at {self.address} is not Ray's job server: {_first_line(error)}"
                ) from error

    @contextmanager
    def _explained(self) -> Iterator[None]:
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            token = "no valid token" if os.environ.get("RAY_AUTH_MODE") == "token" else "no token"
            raise UserError(
                f"The cluster at {self.address} requires its token, and got {token}. Set "
                "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a file with the cluster's token."
            ) from error


def _prepare_token(environ: Any) -> None:
    """Switch the token on where there is one, and say so where its file cannot be read.

    Ray sends it only in ``RAY_AUTH_MODE=token``, and ends the process when the file is missing.

    Raises:
        UserError: ``RAY_AUTH_TOKEN_PATH`` names no readable file, or an empty one.
    """
    path = environ.get("RAY_AUTH_TOKEN_PATH")
    has_default = (Path.home() / ".ray" / "auth_token").is_file()
    if "RAY_AUTH_MODE" not in environ and (path or environ.get("RAY_AUTH_TOKEN") or has_default):
        environ["RAY_AUTH_MODE"] = "token"
    if not path or environ.get("RAY_AUTH_TOKEN") or environ.get("RAY_AUTH_MODE") != "token":
        return
    try:
        is_empty = not Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"RAY_AUTH_TOKEN_PATH is '{path}', which cannot be read: {error}") from None
    if is_empty:
        raise UserError(f"RAY_AUTH_TOKEN_PATH is '{path}', which is empty; write the token there.")


def _lost_errors() -> tuple[type[Exception], ...]:
    import aiohttp

    # requests' errors are OSErrors; RuntimeError is the client's for any other HTTP status.
    return (OSError, RuntimeError, aiohttp.ClientError, asyncio.TimeoutError)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:500] if lines else type(error).__name__


@contextmanager
def _without(*names: str) -> Iterator[None]:
    """Hide variables that would win over the requested address."""
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
