"""Starting Ray: on a machine that is busy, and beside a program's own signal handlers."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

from ke_ray.engine.cluster.session import ray_session
from ke_ray.errors import KeRayError, UserError

TIMED_OUT = Exception("The current node timed out during startup. This could happen because …")


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[Exception | None]:
    """What each ``ray.init`` raises, in order; None: it works."""
    import ray

    outcomes: list[Exception | None] = []

    def init(**_: object) -> None:
        error = outcomes.pop(0)
        if error is not None:
            raise error

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    return outcomes


def test_a_slow_start_is_tried_once_more(starts, caplog: pytest.LogCaptureFixture) -> None:
    starts += [TIMED_OUT, None]
    with caplog.at_level(logging.WARNING), ray_session():
        assert starts == []
    assert "trying once more" in caplog.text


def test_two_slow_starts_are_one_message(starts) -> None:
    starts += [TIMED_OUT, TIMED_OUT]
    with pytest.raises(KeRayError, match="twice: this machine is too busy"), ray_session():
        pass
    assert starts == []


def test_another_failure_is_not_tried_again(starts) -> None:
    starts += [ValueError("no such option"), None]
    with pytest.raises(ValueError, match="no such option"), ray_session():
        pass
    assert len(starts) == 1


def test_a_cluster_of_other_versions_names_both(
    starts, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.77.0.1:6379")
    # Ray's words (ray/_private/utils.py).
    text = "The cluster was started with:\n    Ray: 2.59.0\n    Python: 3.12.1\n"
    text += "This process on 10.77.0.2 was started with:\n    Ray: 2.60.0\n    Python: 3.11.7\n"
    starts.append(RuntimeError(f"Version mismatch: {text}"))
    with pytest.raises(UserError, match=r"10\.77\.0\.1.*2\.59\.0.*2\.60\.0"), ray_session():
        pass
    starts.append(ConnectionError("Failed to connect to Ray cluster at 10.77.0.1:6379"))
    with pytest.raises(UserError, match=r"no Ray cluster answers.*10\.77\.0\.1"), ray_session():
        pass
    assert capfd.readouterr().err == ""


@pytest.mark.ray
def test_ray_leaves_the_answer_to_sigterm_alone() -> None:
    """As a process of its own, since Ray's handler is set once, when it starts."""
    code = """
import os, signal
from ke_ray.engine.cluster.session import ray_session
def terminated(number, frame):
    raise KeyboardInterrupt
signal.signal(signal.SIGTERM, terminated)
try:
    with ray_session(num_cpus=1):
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
except KeyboardInterrupt:
    print("mine")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "mine\n"), done.stderr
