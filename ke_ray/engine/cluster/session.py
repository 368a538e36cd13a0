"""Ray sessions, with the settings that ke_ray needs everywhere.

Environment variables are set before Ray is imported, since it reads them then; so the modules that
a driver imports before its session import Ray inside functions. Ray's ports bind to all interfaces
whatever address is requested, so token authentication is switched on: a call without the token is
refused.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ke_ray.errors import KeRayError, UserError

log = logging.getLogger(__name__)

_OBJECT_STORE_BYTES = 512 << 20

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Two seconds between health checks would be added to every report of a training run.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_V2_ENABLED": "1",
    # It tells workers that their node will be taken away, so that they save in time. Ours save as
    # they go; a worker that went with its node is replaced without it too.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Ray warns at each start that a later version will not hide GPUs from CPU actors.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # In a submitted job Ray refuses variables for the workers that the job's environment has too.
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",
    # Ray Data's own actors draw an error line about their arguments, once for each; what matters
    # reaches us as exceptions.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TOKENIZERS_PARALLELISM": "false",
}


def worker_env() -> dict[str, str]:
    """Environment of worker processes, which OpenMP and glibc read when a process starts.

    OpenMP threads sleep instead of spinning: two spinning threads on a busy core make small-model
    work many times slower. How many threads an actor has Ray says itself, from its CPUs.

    glibc keeps freed memory, in one heap for all threads. It would give blocks of 128 KiB to
    32 MiB back to the system, more or less of them by the chance of what was freed first, and each
    batch would fault its activations in again: up to 15 % of the time (benchmarks/README.md).

    What the driver's environment has already is kept.
    """
    from ke_ray import storage

    defaults = {
        "OMP_WAIT_POLICY": "passive",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # the largest that glibc would come to by itself
        "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
        "TOKENIZERS_PARALLELISM": "false",
    }
    env = {name: os.environ.get(name, value) for name, value in defaults.items()}
    if stores := storage.known_stores():
        env[storage.KNOWN_STORES] = stores
    for name in ("HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT", "KE_RAY_STORE_GIVE_UP_S"):
        if name in os.environ:
            env[name] = os.environ[name]
    return env


@contextmanager
def ray_session(
    *,
    num_cpus: int | None = None,
    resources: dict[str, float] | None = None,
    object_store_bytes: int = _OBJECT_STORE_BYTES,
) -> Iterator[None]:
    """A Ray session for the time of the block.

    Joins the cluster that ``RAY_ADDRESS`` names (a submitted job has it set), else the session
    this process already has, else starts a local one and ends it afterwards.

    Args:
        num_cpus: for a local session; default all.
        resources: custom resources of a local session.
        object_store_bytes: cap of a local object store, whose default takes a third of memory.

    Raises:
        UserError: ``RAY_ADDRESS`` names a cluster that does not answer, or a node of which has
            another ke_ray.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    address = os.environ.get("RAY_ADDRESS")
    if not address and "ray" not in sys.modules:
        # Ray reads the mode when it is imported; set later, its processes and ours would differ.
        # Unset, a local session asks for a token all the same. A cluster that is already there
        # decides for itself.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    if ray.is_initialized():
        yield
        return
    settings: dict[str, Any] = {
        "logging_level": logging.WARNING,
        "log_to_driver": bool(os.environ.get("KE_RAY_WORKER_LOGS")),
    }
    if not address or address == "local":
        # Workers of a local session inherit our environment. With one of their own, those that
        # Ray starts beforehand would fit nobody, and each actor would wait for a new process.
        for name, value in worker_env().items():
            os.environ.setdefault(name, value)
        # address="local": a bare init() may find the stale address file of another session.
        settings |= {
            "address": "local",
            "num_cpus": num_cpus,
            "resources": resources,
            "object_store_memory": object_store_bytes,
            "include_dashboard": False,
        }
    else:
        settings |= {"address": address, "runtime_env": {"env_vars": worker_env()}}
    native: list[str] = []
    try:
        with _quiet_stderr(native), kept_handlers(signal.SIGTERM), _interruptible():
            _start(settings)
    except Exception as error:
        refusals = (ConnectionError, RuntimeError, ray.exceptions.AuthenticationError)
        if address and isinstance(error, refusals):
            log.debug("%s", "".join(native))
            raise UserError(_why_not_joined(address, error, "".join(native))) from error
        sys.stderr.write("".join(native))
        raise
    try:
        if settings["address"] != "local":
            from ke_ray.engine.cluster.shared_code import check_nodes_run_this_code

            check_nodes_run_this_code()
        yield
    finally:
        ray.shutdown()


def _why_not_joined(address: str, error: Exception, native: str) -> str:
    """The message for a cluster that refused this process or is not there.

    Args:
        native: what Ray's core wrote, which alone says that a token was refused.
    """
    said = " ".join(str(error).split())
    if "AuthToken" in said + native or type(error).__name__ == "AuthenticationError":
        return (
            f"The cluster at RAY_ADDRESS '{address}' refuses this command's token. All nodes, and "
            "the commands on them, need the same one: ~/.ray/auth_token, or the file that "
            "RAY_AUTH_TOKEN_PATH names, with RAY_AUTH_MODE=token."
        )
    if "Version mismatch" in said:
        return f"The cluster at RAY_ADDRESS '{address}' has other versions than this: {said}"
    first, *_ = str(error).strip().splitlines() or [type(error).__name__]
    return (
        f"RAY_ADDRESS is '{address}', but no Ray cluster answers there: {first.rstrip('.')}. "
        "Start one, or unset RAY_ADDRESS to run on this machine."
    )


def _start(settings: dict[str, Any]) -> None:
    """``ray.init``, tried once more where a local node did not come up in time.

    Ray gives its own processes 30 seconds, which a machine under heavy load may need more of; the
    second time what they read is in memory.
    """
    import ray

    try:
        ray.init(**settings)
    except Exception as error:  # Ray raises a plain Exception here
        if settings["address"] != "local" or "timed out" not in str(error).lower():
            raise
        log.warning("Ray did not start within 30 seconds (is this machine busy?); trying once more")
        ray.shutdown()
        try:
            ray.init(**settings)
        except Exception as again:
            if "timed out" not in str(again).lower():
                raise
            raise KeRayError(
                "Ray did not start within 30 seconds, twice: this machine is too busy. Run the "
                "same command again when it is quieter."
            ) from again


@contextmanager
def kept_handlers(*numbers: signal.Signals) -> Iterator[None]:
    """Give the program its own signal handlers back after the block.

    ``ray.init`` replaces the answer to SIGTERM by an exit of its own, and a Ray Train run leaves
    one to SIGINT that swallows Ctrl-C for the rest of the process. Ray's stay where the program
    has none. Handlers belong to the main thread.
    """
    own = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in own.items():
                if callable(handler):
                    signal.signal(number, handler)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt where SIGTERM or SIGINT came in the block, whatever was made of it.

    ``ray.init`` answers SIGTERM by ``sys.exit``, and Python drops what a handler raises while a
    process is forked, as Ray's are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    for end in (reader, writer):
        os.set_blocking(end, False)
    before = signal.set_wakeup_fd(writer)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
        with open(reader, "rb") as received:
            if {signal.SIGTERM, signal.SIGINT}.intersection(received.read()):
                raise KeyboardInterrupt


@contextmanager
def _quiet_stderr(native: list[str]) -> Iterator[None]:
    """Keep what native code writes to standard error to itself; where the block fails, in a list.

    Ray's core says on every start that it read its log level, below Python's logging.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as output:
        os.dup2(output.fileno(), 2)
        try:
            yield
        except BaseException:
            sys.stderr.flush()
            output.seek(0)
            native.append(output.read().decode(errors="replace"))
            raise
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)


def beside_driver() -> dict[str, Any]:
    """Options of an actor that must live as long as the driver: on its node, without a CPU.

    Elsewhere it would die with a node that the work itself survives.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = ray.get_runtime_context().get_node_id()
    return {
        "num_cpus": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
    }
