"""Commands on a host, forked from one process that has imported what they need.

It reads a line of JSON for each, ``{"words": […], "log": PATH, "environment": {…}}``, and answers
with the command's process number, and with its exit code when it has ended.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys


def main() -> None:
    """Fork commands until the input ends."""
    import mlflow  # noqa: F401
    import pandas  # noqa: F401
    import ray.data
    import ray.train  # noqa: F401
    import torch
    import transformers  # noqa: F401

    import ke_ray.cli
    import ke_ray.training.loop
    import ke_ray.training.tracking

    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            null = os.open(os.devnull, os.O_RDONLY)
            log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for source, target in ((null, 0), (log, 1), (log, 2)):
                os.dup2(source, target)
            os.environ.update(request["environment"])
            signal.signal(signal.SIGINT, signal.default_int_handler)
            torch.set_num_threads(1)
            sys.argv = ["ke-ray", *request["words"]]
            try:
                ke_ray.cli.main()
            except SystemExit as stop:
                atexit._run_exitfuncs()  # which forked processes leave out
                os._exit(int(stop.code or 0))
            os._exit(70)
        print(pid, flush=True)
        status = os.waitpid(pid, 0)[1]
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
