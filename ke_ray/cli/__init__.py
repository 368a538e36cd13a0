"""Command line: ``ke-ray COMMAND``, one module per group of commands.

Commands import heavy packages when they run, which keeps ``ke-ray --help`` quick.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import traceback
from types import FrameType

import typer

from ke_ray.cli import (
    checkpoints,
    compare,
    data,
    demo,
    doctor,
    relate,
    resuscitate,
    scan,
    status,
    studies,
    submit,
    sweep,
    train,
    verify,
    view,
    weights,
)
from ke_ray.errors import KeRayError
from ke_ray.secrets import RedactingFormatter, printable

__all__ = ["app", "main"]

app = typer.Typer(
    name="ke-ray",
    help="Knowledge entropy over checkpoint series: scan, continual learning, resuscitation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for module in (
    *(demo, checkpoints, data, train, scan, resuscitate, verify, sweep, submit),
    *(compare, weights, relate, status, view, studies, doctor),
):
    module.register(app)


@app.callback()
def _options(
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Log more, to standard error."),
) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, stream=sys.stderr)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(RedactingFormatter("%(levelname)s %(name)s: %(message)s"))
    for noisy in ("httpx", "urllib3", "fsspec", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if verbose:
        os.environ.setdefault("KE_RAY_WORKER_LOGS", "1")


def _terminated(number: int, frame: FrameType | None) -> None:
    # A job that is stopped gets SIGTERM: end as on Ctrl-C, with truthful statuses.
    raise KeyboardInterrupt


def _print_uncaught(error: BaseException | None) -> None:
    """Print a traceback as Python does, without secrets and control characters."""
    if error is not None and not isinstance(error, SystemExit):
        text = printable("".join(traceback.format_exception(error)))
        print(text, end="", file=sys.stderr, flush=True)


def main() -> None:
    """Run a command and end the process with its exit code.

    0: success. 1: something failed, and the results say what. 2: the request is wrong.
    130: interrupted; the same command resumes.
    """
    signal.signal(signal.SIGTERM, _terminated)
    threading.excepthook = lambda thread: _print_uncaught(thread.exc_value)
    # torch reads it on import. Threads that spin while they wait make small models many times
    # slower as soon as another process needs the core.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        code = app(standalone_mode=False)
    except typer.Exit as stop:
        code = stop.exit_code
    except KeyboardInterrupt:
        code = 130
    except KeRayError as error:
        print(f"ke-ray: {error}", file=sys.stderr)
        code = error.exit_code
    except Exception as error:
        # Click's usage errors, recognised by this method because typer vendors their classes.
        show = getattr(error, "show", None)
        if show is None:
            _print_uncaught(error)
        else:
            show()
        code = getattr(error, "exit_code", 1)
    if code == 130:  # typer turns an interrupt into this code by itself
        message = "Interrupted. Finished work is saved. Run the same command again to resume."
        print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.exit(code if isinstance(code, int) else 0)
