"""``ke-ray verify``."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_studies import tiny_continual, tiny_pretrain, write_study

from ke_ray.report import paper
from ke_ray.training.pretrain import run_pretrain
from ke_ray.training.starts import measure_starts


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verified") / "series"
    run_pretrain(tiny_pretrain(folder))
    return folder


def test_starts_are_laid_beside_those_that_the_tables_imply(
    ke_ray, tmp_path: Path, series: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A tiny start under the name and the step of one of the paper's.
    folder = tmp_path / "OLMo-1B"
    shutil.copytree(series / "checkpoints" / "step10", folder / "step738020")
    study = tiny_continual(tmp_path / "out", series, starts={"spec": str(folder), "steps": None})
    file = write_study(study, tmp_path / "study.yaml")
    result = ke_ray("verify", file)
    assert result.code == 1
    assert f"{series}/world/facts_once.json: 1 file" in result.out
    ((_, snapshot),) = measure_starts(study)
    lines = [line.split() for line in result.out.splitlines() if line.startswith("step738020")]
    assert [line[-1] for line in lines] == ["compared", "no"]
    assert lines[0][5:7] == [f"{snapshot.knowledge:.3f}", "-0.371"]
    assert lines[1][3:5] == [f"{100 * (snapshot.accuracy or 0):.1f}", "64.6"]
    monkeypatch.setattr(paper, "before", lambda _: (0, 0, 0, 100 * (snapshot.accuracy or 0) + 2))
    assert ke_ray("verify", file).code == 0
    assert not (tmp_path / "out").exists()


def test_starts_of_another_model_are_shown_and_not_judged(
    ke_ray, tmp_path: Path, series: Path
) -> None:
    file = write_study(tiny_continual(tmp_path / "out", series), tmp_path / "study.yaml")
    result = ke_ray("verify", file, "--limit", "2")
    assert result.code == 0
    assert "starts: step5, step10" in result.out


def test_missing_data_ends_it_before_anything_is_loaded(ke_ray, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = ke_ray("verify", Path(__file__).parents[2] / "sweeps" / "table1.yaml")
    assert result.code == 2
    assert "ke-ray data fetch pubmed" in result.err
