"""K and P of untrained starts, without a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_studies import tiny_continual

from ke_ray.errors import DataError
from ke_ray.models.loading import load_model
from ke_ray.training.inputs import load_inputs, read_start
from ke_ray.training.runs import list_runs
from ke_ray.training.snapshot import take_snapshot
from ke_ray.training.starts import find_sources, measure_starts


def test_starts_are_measured_as_a_run_measures_them(tmp_path: Path, series: Path) -> None:
    study = tiny_continual(tmp_path / "out", series)
    measured = list(measure_starts(study))
    assert [spec.ref.step for spec, _ in measured] == [5, 10]
    spec, snapshot = measured[-1]
    inputs = load_inputs(study, read_start(study, spec.ref, spec.ref.location), spec.seed)
    whole = take_snapshot(load_model(spec.ref.location), study, inputs.questions)
    assert snapshot.knowledge == pytest.approx(whole.knowledge)
    assert snapshot.accuracy == whole.accuracy
    assert snapshot.entropy_nats is None, "only what the gate asks for"


def test_neither_corpus_nor_output_is_touched(tmp_path: Path, series: Path) -> None:
    changes = {"corpus": {"source": str(tmp_path / "nothing.jsonl")}, "resuscitation": None}
    study = tiny_continual(tmp_path / "out", series, **changes)
    assert len(list(measure_starts(study, limit=1))) == len(list_runs(study))
    assert not (tmp_path / "out").exists()


def test_a_missing_source_is_noticed_first(tmp_path: Path, series: Path) -> None:
    study = tiny_continual(tmp_path / "out", series)
    assert set(find_sources(study).values()) == {1}
    study = tiny_continual(tmp_path, series, corpus={"source": "data/pubmed/*.jsonl#contents"})
    with pytest.raises(DataError, match="'ke-ray data fetch pubmed'"):
        find_sources(study)
