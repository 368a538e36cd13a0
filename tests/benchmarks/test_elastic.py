"""Where scorers join and are lost, a scan ends near the earliest possible."""

from __future__ import annotations

import elastic
import pytest


@pytest.mark.parametrize("story", elastic.STORIES, ids=lambda story: story.name)
@pytest.mark.parametrize("load", [0.02, 0.3])
def test_the_makespan_is_within_15_percent_of_the_bound(story: elastic.Story, load: float) -> None:
    assert elastic.bound(story, load) <= elastic.play(story, load) * 1.001
    assert elastic.play(story, load) <= 1.15 * elastic.bound(story, load)
