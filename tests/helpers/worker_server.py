"""Ray's workers in processes that have the imports already.

Every scorer, trainer and trial is a process of its own that imports torch and transformers: five
seconds of a core, and the tests start hundreds. Here they are forked from one server that has
imported them; Ray itself they import anew, since it reads its settings then. Nothing else about
them changes: Ray starts this file in place of its ``setup_worker.py``, and the worker registers,
works, is killed and is missed as any other.

A worker whose interpreter must differ (another ``PYTHONPATH``, another Hub, a command around it) is
started by Ray's own file. With ``KE_RAY_FRESH_WORKERS=1`` all are.
"""

from __future__ import annotations

import atexit
import gc
import hashlib
import importlib
import importlib.util
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from argparse import ArgumentParser
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

_SOCKET = "KE_RAY_TEST_WORKER_SERVER"
#: What libraries read when they are imported.
_READ_AT_IMPORT = ("HF_", "TRANSFORMERS_", "TORCH_", "PYTHONPATH")
#: What scorers, trainers and trials import, without Ray.
_PRELOADED = (
    *("torch", "transformers.modeling_layers", "transformers.processing_utils"),
    *("mlflow.tracking", "pandas", "pyarrow.parquet", "lm_eval.tasks"),
    *("ke_ray.models.scoring", "ke_ray.training.continual", "ke_ray.training.pretrain"),
    *("ke_ray.planning.scan_messages", "ke_ray.planning.trials"),
)


def use_worker_server(start: bool = True) -> None:
    """Let the Ray nodes that this process starts fork their workers from the server.

    The process that starts it has it as a child; its own children inherit the variable.

    Args:
        start: a server for this environment, if there is none.
    """
    if os.environ.get("KE_RAY_FRESH_WORKERS"):
        return
    if start and not _fits(os.environ):
        _start_server()
    from ray._private import ray_constants

    # Ray joins it to a folder, which an absolute path replaces.
    ray_constants.SETUP_WORKER_FILENAME = str(Path(__file__).resolve())


def variables() -> dict[str, str]:
    """What a process with another environment needs, to use the server too."""
    return {_SOCKET: os.environ[_SOCKET]} if _SOCKET in os.environ else {}


def _start_server() -> None:
    folder = tempfile.mkdtemp(prefix="krw")  # short: socket paths have 107 characters
    path = f"{folder}/{_what_is_read_at_import(os.environ)}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(128)
        number = listener.fileno()
        server = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(number)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"},
            stdin=subprocess.DEVNULL,
            pass_fds=[number],
            start_new_session=True,  # a Ctrl-C in the terminal is none for Ray's workers
        )
    os.environ[_SOCKET] = path

    def end() -> None:
        server.kill()
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(end)


def _what_is_read_at_import(environment: Mapping[str, str]) -> str:
    """A digest of the variables that libraries read then."""
    read = sorted(item for item in environment.items() if item[0].startswith(_READ_AT_IMPORT))
    return hashlib.sha256(repr(read).encode()).hexdigest()[:16]


def _fits(environment: Mapping[str, str]) -> bool:
    """Whether the environment names a server whose imports are those of this environment."""
    return environment.get(_SOCKET, "").endswith("/" + _what_is_read_at_import(environment))


def _start_worker(arguments: list[str]) -> None:
    """Do what Ray's ``setup_worker.py`` does, and become it where the server will not do."""
    parser = ArgumentParser(allow_abbrev=False)
    parser.add_argument("--serialized-runtime-env-context", default="{}")
    parser.add_argument("--language")
    options, worker = parser.parse_known_args(arguments)
    context = json.loads(options.serialized_runtime_env_context)
    environment = {**os.environ, **(context.pop("env_vars", None) or {})}
    if context.get("py_executable") == sys.executable:
        del context["py_executable"]
    is_worker = options.language == "PYTHON" and worker[0].endswith("default_worker.py")
    if is_worker and _fits(environment) and not any(context.values()):
        with suppress(OSError), socket.socket(socket.AF_UNIX) as server:
            server.connect(environment[_SOCKET])
            message = {"arguments": worker, "environment": environment, "folder": os.getcwd()}
            socket.send_fds(server, [b"0"], [0, 1, 2])
            server.sendall(json.dumps(message).encode())
            server.shutdown(socket.SHUT_WR)
            if server.recv(1):
                return
    package = importlib.util.find_spec("ray")  # not imported: it takes half a second
    assert package is not None
    assert package.origin is not None
    own = Path(package.origin).parent / "_private" / "workers" / "setup_worker.py"
    os.execv(sys.executable, [sys.executable, str(own), *arguments])


def _serve(listener: socket.socket) -> None:
    """Fork a worker for each message, until the process that started this one is gone."""
    owner = os.getppid()
    while not select.select([listener], [], [], 2)[0]:  # it imports when there is something to do
        if os.getppid() != owner:
            return
    gc.disable()  # imports leave no garbage
    for name in _PRELOADED:
        importlib.import_module(name)
    import numpy

    assert "ray" not in sys.modules
    gc.enable()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for workers
    listener.settimeout(2)
    while os.getppid() == owner:
        try:
            connection = listener.accept()[0]
        except TimeoutError:
            continue
        connection.settimeout(None)
        _, descriptors, _, _ = socket.recv_fds(connection, 1, 3)
        with connection, connection.makefile("rb") as stream:
            try:
                message = json.loads(stream.read())
            except ValueError:
                message = None  # killed before it had said what it wants
            if message and not os.fork():
                listener.close()
                os.setpgid(0, 0)  # as Ray does, which ends a worker by its group
                connection.sendall(b"1")
                for number, descriptor in enumerate(descriptors):
                    os.dup2(descriptor, number)
                stream.close()
                connection.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                numpy.random.seed()
                _work(**message)
            for descriptor in descriptors:
                os.close(descriptor)


def _work(arguments: list[str], environment: dict[str, str], folder: str) -> None:
    """Be the worker; does not return."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    tempfile.tempdir = None
    sys.argv = arguments
    sys.path[0] = str(Path(arguments[0]).parent)
    code = 1
    try:
        runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        _serve(socket.socket(fileno=int(sys.argv[2])))
    else:
        _start_worker(sys.argv[1:])
