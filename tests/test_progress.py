"""The time left and its spread, and one line that fits its terminal."""

from __future__ import annotations

import numpy as np
import pytest

from ke_ray.progress import Pace, Progress, duration


def paced(seconds: np.ndarray) -> Pace:
    """One unit of work after each of these times."""
    pace = Pace()
    pace.add(0.0, 0)
    for number, at_s in enumerate(np.cumsum(seconds)):
        pace.add(float(at_s), number + 1)
    return pace


def test_even_work_has_a_rate_and_a_narrow_spread() -> None:
    left = paced(np.full(100, 2.0)).left(50, now_s=200.0)
    assert left is not None
    assert left.low_s is not None
    assert left.high_s is not None
    assert left.expected_s == pytest.approx(100.0)
    assert (left.low_s, left.high_s) == pytest.approx((100.0, 100.0))


def test_time_that_passes_without_work_counts() -> None:
    left = paced(np.full(10, 1.0)).left(10, now_s=14.0)
    assert left is not None
    assert left.expected_s == pytest.approx(6.0)


def test_the_interval_holds_the_end_nineteen_times_in_twenty() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        seconds = generator.gamma(2.0, size=120)
        left = paced(seconds[:40]).left(80, now_s=float(seconds[:40].sum()))
        assert left is not None
        assert left.low_s is not None
        assert left.high_s is not None
        hits += left.low_s <= seconds[40:].sum() <= left.high_s
    assert 0.90 <= hits / 400 <= 0.99


def test_too_little_work_has_no_spread_and_too_uneven_work_no_upper_end() -> None:
    few = paced(np.full(3, 1.0)).left(5, now_s=3.0)
    assert few is not None
    assert (few.low_s, few.high_s) == (None, None)
    assert str(few) == "about 0:05 left"
    uneven = paced(np.array([0.1, 0.1, 0.1, 0.1, 100.0])).left(50, now_s=100.4)
    assert uneven is not None
    assert uneven.high_s is None
    assert "at least" in str(uneven)


def test_work_that_is_done_again_does_not_count_twice_and_samples_are_bounded() -> None:
    pace = Pace()
    for second in range(10_000):
        pace.add(float(second), second if second % 100 else 0)
    assert len(pace._samples) <= 1024
    assert pace.rate == pytest.approx(1.0, rel=1e-3)


def test_a_line_fits_every_width_and_keeps_its_counts_longest() -> None:
    progress = Progress("scan", "checkpoints")
    progress.start(12, 3)
    progress.ended("step1", [{"status": "ok"}])
    progress.ended("step2", [{"status": "failed", "error": "broken"}])
    progress.note = "step2: failed: a long message " * 4
    full = progress.line()
    assert full.startswith("scan: 1 done, 1 failed, 10 left")
    assert full.endswith(progress.note)
    for width in range(1, len(full) + 2):
        assert len(progress.line(width)) <= width
    assert progress.line(40) == "scan: 1 done, 1 failed, 10 left"


def test_what_comes_from_outside_is_one_line_without_commands_for_the_terminal() -> None:
    progress = Progress("scan", "checkpoints")
    progress.tokens(1, 2, "step\x1b]0;title\x07\nsecond line")
    assert progress.note == "step\\x1b]0;title\\x07 second line"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00"), (123, "2:03"), (3723, "1:02:03"), (183845, "2 d 3:04:05"), (np.inf, "–")],
)
def test_durations_are_written_as_clocks_are(seconds: float, text: str) -> None:
    assert duration(seconds) == text
