"""Published results laid beside studies that repeat them, and studies over stages."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import synthetic

from ke_ray.report import paper
from ke_ray.report.build import sections
from ke_ray.report.charts.figure import Figure, TextTable
from ke_ray.report.sources import find_results
from ke_ray.results.sweep_folder import trials_table
from ke_ray.studies.sweep import SweepStudy, load_sweep

_SWEEPS = Path(__file__).parents[2] / "sweeps"


def _figures(*folders: Path) -> dict[str, Figure]:
    made = sections(find_results(folders))
    return {figure.id: figure for section in made for figure in section.figures}


def _rewrite(folder: Path, table: str, **columns: object) -> None:
    frame = pq.read_table(folder / f"{table}.parquet").to_pandas()
    for name, value in columns.items():
        frame[name] = value(frame) if callable(value) else value
    pq.write_table(pa.Table.from_pandas(frame), folder / f"{table}.parquet")


def _written(folder: Path, study: SweepStudy, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    pq.write_table(trials_table(rows, study.shown_keys), folder / "trials.parquet")
    config = study.model_dump(mode="json", by_alias=True)
    (folder / "manifest.json").write_text(
        json.dumps({"kind": "sweep", "schema_version": 1, "config": config})
    )
    return folder


def _table_1_sweep(folder: Path) -> Path:
    """Trials of ``sweeps/table1.yaml`` as the sweep writes them; A and F drawn anew."""
    study = load_sweep(_SWEEPS / "table1.yaml")
    rng = np.random.default_rng(3)
    rows = []
    for number, point in enumerate(study.points):
        params = {
            "global_batch_size": 128,
            "optimizer.learning_rate": 4e-4,
            "epochs": 1,
            **point,
        }
        rows.append(
            {
                "trial_id": f"{number:04d}",
                "point": number,
                "params": params,
                "status": "ok",
                "checkpoint": f"step{point['checkpoint']}",
                "step": point["checkpoint"] - 150,
                "seed": 6198,
                "corpus": "pubmed",
                "control": "none",
                "num_tokens": params["epochs"] * 204_800 * 1024,
                "acquisition": rng.normal(0.2, 0.05),
                "forgetting": rng.normal(0.1, 0.05),
                "probe_logprob_after": rng.normal(-3, 0.1),
                "downstream_after": rng.normal(0.5, 0.05),
            }
        )
    return _written(folder, study, rows)


def test_table_1_is_laid_over_its_own_sweep(tmp_path: Path) -> None:
    folder = _table_1_sweep(tmp_path / "table1")
    figure = _figures(folder)["sweep-table-1"]
    trials = pq.read_table(folder / "trials.parquet").to_pandas()
    shown = {panel.key[0]: panel.view for panel in figure.panels}
    for column, title in (("acquisition", "Acquisition A"), ("forgetting", "Forgetting F")):
        rows = shown[title].rows
        assert set(rows["setting"]) == set(paper.TABLE_1)
        for name, published in paper.TABLE_1.items():
            line = rows[rows["setting"] == name]
            theirs = line[line["source"] == "the paper"]
            assert tuple(theirs["x"]) == paper.STEPS
            assert tuple(theirs["value"]) == getattr(published, column)
            own = trials[
                (trials["global_batch_size"] == published.global_batch_size)
                & (trials["optimizer.learning_rate"] == published.learning_rate)
                & (trials["epochs"] == published.epochs)
            ]
            ours = line[line["source"] == "these trials"]
            np.testing.assert_allclose(ours["value"], own.sort_values("step")[column] * 100)
    assert isinstance(shown["table"], TextTable)
    assert list(shown["table"].rows[0][:2]) == ["baseline", "117,850"]
    assert shown["table"].rows[0][3] == "25.2"
    assert len(shown["table"].rows) == 20
    assert "trend" in figure.caption


def test_a_cell_agrees_where_the_published_value_is_in_the_interval(tmp_path: Path) -> None:
    folder = _table_1_sweep(tmp_path / "table1")
    published = {
        (int(batch), float(rate), int(epochs)): row.acquisition
        for row in paper.TABLE_1.values()
        for batch, rate, epochs in [(row.global_batch_size, row.learning_rate, row.epochs)]
    }

    def near(frame: pd.DataFrame, offset: float) -> list[float]:
        keys = frame[["global_batch_size", "optimizer.learning_rate", "epochs", "step"]]
        return [
            (published[batch, rate, epochs][paper.nearest_stage(step) or 0] + offset) / 100
            for batch, rate, epochs, step in keys.itertuples(index=False)
        ]

    # Every interval of A begins 1 point below the published value, or just above it at 118k.
    _rewrite(
        folder,
        "trials",
        acquisition=lambda frame: near(frame, 0.5),
        acquisition_low=lambda frame: [
            value + (0.011 if step < 200_000 else 0)
            for value, step in zip(near(frame, -1), frame["step"], strict=True)
        ],
        acquisition_high=lambda frame: near(frame, 2),
    )
    figure = _figures(folder)["sweep-table-1"]
    table = next(panel.view for panel in figure.panels if panel.key == ("table",))
    assert isinstance(table, TextTable)
    agrees = [row[table.columns.index("agrees")] for row in table.rows]
    assert agrees == ["no", "yes", "yes", "yes"] * 5
    assert figure.caption.startswith("A agrees in 15 of 20 cells (the published value")
    trends = figure.panels[-1].view
    assert isinstance(trends, TextTable)
    of_a = [row for row in trends.rows if row[1] == "A %"]
    assert next(row[:5] for row in of_a) == ["baseline", "A %", "4", "−6.4", "−6.4"]
    assert {row[5] for row in of_a} == {"yes"}
    assert {row[6] for row in of_a} == {"+1.00"}
    assert {row[1] for row in trends.rows} == {"A %", "F %", "K after", "P after %"}


def test_k_and_p_of_the_starts_follow_from_the_tables() -> None:
    columns = ("probe_logprob_after", "downstream_after")
    knowledge, accuracy = (paper.before(column) for column in columns)
    np.testing.assert_allclose(knowledge, (-0.376, -0.372, -0.373, -0.371), atol=5e-4)
    np.testing.assert_allclose(accuracy, (60.3, 62.7, 63.6, 64.6), atol=0.05)
    for name, row in paper.TABLE_1.items():  # Eq. 4 and 5 lead back to the printed A and F
        k, p = (np.array(paper.after(name, column)) for column in columns)
        np.testing.assert_allclose((k - knowledge) / np.abs(knowledge) * 100, row.acquisition)
        np.testing.assert_allclose(-(p - accuracy) / accuracy * 100, row.forgetting)
    assert paper.published("baseline", "downstream_after") == (54.0, 54.6, 52.8, 52.0)


def _stage_sweep(folder: Path, name: str = "olmo_1b_stages") -> Path:
    """Trials of a shipped sweep over stages, whose A falls and F grows."""
    study = load_sweep(_SWEEPS / f"{name}.yaml")
    steps = study.grid_points()
    rows = [
        {
            "trial_id": f"{number:04d}",
            "point": number,
            "params": point,
            "status": "ok",
            "checkpoint": f"step{point['checkpoint']}",
            "step": point["checkpoint"],
            "seed": 6198,
            "control": "none",
            "acquisition": 0.25 - 0.005 * number**1.2,
            "forgetting": 0.1 + 0.01 * number**1.1,
            "knowledge_entropy_before_nats": 144.0 - 0.03 * number,
            "downstream_before": 0.6,
            "downstream_after": 0.54 - 0.001 * number,
        }
        for number, point in enumerate(steps)
    ]
    return _written(folder, study, rows)


def test_a_sweep_over_ten_stages_has_the_papers_ten_points(tmp_path: Path) -> None:
    figures = _figures(_stage_sweep(tmp_path / "stages"))
    rows = figures["sweep-acquisition"].panels[0].view.rows
    np.testing.assert_allclose(rows["value"], 25 - 0.5 * np.arange(10) ** 1.2)
    assert "(n = 10; 95 % interval" in figures["sweep-correlation-acquisition"].caption
    assert "r = +1.00 (n" in figures["sweep-correlation-acquisition"].caption
    assert "r = −1.00" in figures["sweep-correlation-forgetting"].caption


def test_studies_over_stages_are_laid_side_by_side(tmp_path: Path) -> None:
    one = _stage_sweep(tmp_path / "a" / "pubmed")
    assert "compare-stages" not in _figures(one)
    other = _stage_sweep(tmp_path / "a" / "c4", "olmo_1b_c4")
    figure = _figures(one, other)["compare-stages"]
    (rows,) = (
        panel.view.rows for panel in figure.panels if panel.key == ("Acquisition A, by step",)
    )
    assert rows.groupby("series").size().to_dict() == {"pubmed": 10, "c4": 4}


def test_a_continual_study_lies_beside_a_sweep_over_stages(tmp_path: Path) -> None:
    """OLMo-1B's stages are a continual study, OLMo-7B's a sweep."""
    small = synthetic.make_continual(tmp_path / "small", steps=(40, 640), seeds=(0, 1))
    large = _stage_sweep(tmp_path / "large", "olmo_7b_pubmed")
    figure = _figures(small, large)["compare-stages"]
    for title in ("Acquisition A", "Forgetting F"):
        (rows,) = (p.view.rows for p in figure.panels if p.key == (f"{title}, by step",))
        assert rows.groupby("series").size().to_dict() == {"small": 2, "large": 4}


def test_the_settings_of_table_1_have_a_correlation_each(tmp_path: Path) -> None:
    folder = _table_1_sweep(tmp_path / "table1")
    entropies = {"knowledge_entropy_before_nats": lambda frame: 150 - frame["step"] / 1e5}
    _rewrite(folder, "trials", **entropies)
    figure = _figures(folder)["sweep-correlation-acquisition"]
    assert len(figure.panels) == 5
    assert figure.caption.count("(n = 4;") == 5


def test_once_and_paraphrase_have_an_acquisition_of_their_own(tmp_path: Path) -> None:
    folder = synthetic.make_continual(tmp_path / "continual", steps=(40, 640), seeds=(0,))
    rows = _figures(folder)["continual-acquisition-by-kind"].panels[0].view.rows
    probes = pq.read_table(folder / "probes.parquet").to_pylist()
    expected = {}
    for start, kind in itertools.product((40, 640), ("once", "paraphrase")):
        key = (f"step{start}-seed0", kind)
        own = [row for row in probes if (row["run"], row["setting"]) == key]
        ends = [
            np.mean([row["logprob_per_token"] for row in own if row["step"] == step])
            for step in (0, max(row["step"] for row in own))
        ]
        expected[start, kind] = (ends[1] - ends[0]) / abs(ends[0]) * 100
    shown = {(row["x"], row["series"]): row["value"] for row in rows.to_dict("records")}
    assert shown == pytest.approx(expected)
    assert shown[40, "paraphrase"] > shown[40, "once"] > 0


def test_the_papers_axis_is_marked_for_its_models_alone(tmp_path: Path) -> None:
    folder = synthetic.make_scan(tmp_path / "scan", steps=[0, 1, 2])

    def marks(spec: str, figure: str = "scan-knowledge-entropy") -> set[float]:
        path = folder / "manifest.json"
        config = {"checkpoints": {"spec": spec}}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"config": config}))
        spec_of = _figures(folder)[figure].panels[0].view.spec()
        return {float(v) for v in re.findall(r"the paper's axis: ([\d.]+)", json.dumps(spec_of))}

    assert marks("allenai/OLMo-1B-hf") == {143.6, 144.0}
    assert marks("allenai/OLMo-1B-hf", "scan-attention-entropy") == {40, 70}
    assert marks("allenai/OLMo-1B-hf", "scan-next-token-entropy") == {2.4, 2.8}
    assert marks("allenai/OLMo-1B-hf", "scan-layers") == {8.88, 9.0}
    assert marks("EleutherAI/pythia-1b", "scan-attention-entropy") == set()
    assert marks("allenai/OLMo-7B-hf") == {297.0, 297.6}
    assert marks("allenai/OLMo-2-0425-1B") == set()


def test_a_sweep_of_another_model_is_not_beside_table_1(tmp_path: Path) -> None:
    folder = _table_1_sweep(tmp_path / "table1")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["config"]["base"]["starts"]["spec"] = "allenai/OLMo-2-0425-1B"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    made = sections(find_results([folder]))
    assert "sweep-table-1" not in {figure.id for figure in made[0].figures}
    assert any("does not start from OLMo-1B" in text for text in made[0].missing)


def test_every_figure_that_the_page_of_the_paper_names_is_made(tmp_path: Path) -> None:
    page = (_SWEEPS.parent / "docs" / "paper.md").read_text()
    named = set(re.findall(r"`((?:scan|continual|sweep|compare)-[\w-]+)`", page))
    for kind, figures in re.findall(r"^\|.*\| `ke-ray (\w+) [^`]+` \|[^|]+\|([^|]+)\|", page, re.M):
        own = re.findall(r"`([\w-]+)`", figures)
        assert own, f"a row without a figure: {figures}"
        assert [name for name in own if not name.startswith(f"{kind}-")] == []
    assert len(named) > 12
    made = {"compare-stages"}  # of several results; the others are those of one
    scan = synthetic.make_scan(tmp_path / "scan", steps=[0, 1, 2])
    entropy = pq.read_table(scan / "entropy.parquet").to_pandas()
    relu = entropy[entropy["measure"] == "knowledge_entropy"].assign(
        measure="knowledge_entropy_relu"
    )
    table = pa.Table.from_pandas(pd.concat([entropy, relu], ignore_index=True))
    pq.write_table(table, scan / "entropy.parquet")
    folders = (
        scan,
        synthetic.make_continual(tmp_path / "continual"),
        synthetic.make_sweep(tmp_path / "sweep"),
        _stage_sweep(tmp_path / "stages"),
        _table_1_sweep(tmp_path / "table1"),
    )
    for folder in folders:
        made |= set(_figures(folder))
    assert named - made == set()
