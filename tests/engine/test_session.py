"""Starting Ray on a machine that is busy."""

from __future__ import annotations

import logging

import pytest

from ke_ray.engine.session import ray_session
from ke_ray.errors import KeRayError

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
