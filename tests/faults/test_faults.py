"""The short form of ``faults.py``: one disturbed run of two kinds, by the same code."""

from __future__ import annotations

from pathlib import Path

import fault_world
import pytest
from fault_world import difference, leftovers
from faults import run_all, summary

KINDS = ("scorer", "source")


@pytest.mark.ray
@pytest.mark.slow
def test_faults_change_no_result_and_leave_nothing(tmp_path: Path, ray_cluster: None) -> None:
    said: list[str] = []
    outcomes = run_all(KINDS, len(KINDS), seed=0, folder=tmp_path, say=said.append)
    assert [outcome for outcome in outcomes if outcome.problems] == []
    skipped = {kind for kind in KINDS for line in said if line.startswith(f"{kind}: skipped")}
    assert {outcome.kind for outcome in outcomes} == set(KINDS) - skipped
    assert sum(row["survived"] for row in summary(outcomes)) >= len(KINDS) - len(skipped)


def test_what_a_fault_may_not_do_is_seen(tmp_path: Path) -> None:
    whole = {("a", 1): 2.0, ("a", 2): None, "s": "ok"}
    assert difference(whole, whole) == 0.0
    assert difference(whole | {("a", 1): 2.002}, whole) == pytest.approx(1e-3)
    for wrong in (
        {("a", 1): 2.0, "s": "ok"},
        whole | {"b": 1.0},
        whole | {"s": "failed"},
        whole | {("a", 1): float("nan")},
        whole | {("a", 2): 1.0},
    ):
        with pytest.raises(ValueError, match="missing|is|not finite"):
            difference(wrong, whole)
    (tmp_path / "entropy.parquet").touch()
    assert leftovers(tmp_path) == []
    for name in (".entropy.parquet.x1y2", "a.incomplete"):
        (tmp_path / name).touch()
    (tmp_path / "parts").mkdir()
    assert leftovers(tmp_path) == [".entropy.parquet.x1y2", "a.incomplete", "parts"]
    assert fault_world.processes(titles=("no such title",)) == []
