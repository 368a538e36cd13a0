"""The HTML report: complete, self-contained, honest about what results lack."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import synthetic

from ke_ray.core.jackknife import critical_t, group_sizes
from ke_ray.errors import UserError
from ke_ray.report.build import build_report, sections
from ke_ray.report.sources import find_results
from ke_ray.results.columns import names


def _built(tmp_path: Path, *results: Path) -> str:
    target = tmp_path / "report.html"
    build_report(results, target)
    return target.read_text(encoding="utf-8")


def _words(page: str) -> str:
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page)))


def _numbers(page: str, figure: str, place: int = 0) -> dict[str, list]:
    """The rows behind a panel of a figure, as columns."""
    part = page[page.index(f'<figure id="{figure}"') :]
    panel = json.loads(re.search(r'<script type="application/json">(.*?)</script>', part, re.S)[1])
    panel = panel["panels"][place]
    script = rf'<script type="application/json" id="{panel["rows"]}">(.*?)</script>'
    columns = json.loads(re.search(script, page, re.S)[1])
    return {
        name: [values["names"][at] for at in values["at"]] if "at" in values else values
        for name, values in columns.items()
    } | {"headings": panel["columns"]}


@pytest.fixture(scope="module")
def demo_page(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return _built(tmp_path_factory.mktemp("report"), demo_folder)


def test_every_figure_of_the_demo_is_there(demo_page: str) -> None:
    figures = re.findall(r'<figure id="([^"]+)"', demo_page)
    assert len(figures) == len(set(figures))
    expected = {
        *("pretrain-loss", "scan-knowledge-entropy", "scan-attention-entropy"),
        *("scan-next-token-entropy", "scan-changes", "scan-layers", "scan-layer-map"),
        *("scan-similarity", "scan-distribution", "scan-mass", "scan-gini", "scan-dormant-share"),
        *("continual-acquisition", "continual-forgetting", "continual-probes"),
        *("continual-correlation-acquisition", "continual-correlation-forgetting"),
        *("continual-probe-logprob-before-after", "continual-downstream-before-after"),
        *("sweep-factor-curve", "sweep-ratio-factor", "sweep-pareto", "sweep-parameters"),
    }
    assert expected <= set(figures)


def test_the_page_is_whole_and_small(demo_page: str) -> None:
    assert len(demo_page.encode()) < 3_000_000
    own = re.sub(r"<script>.*?</script>", "", demo_page, flags=re.S)
    outside = re.findall(r'(?:src|href)="(?!#|data:)([^"]+)"', own)
    assert outside == []
    assert "@import" not in own
    assert "url(" not in own
    assert "<script src" not in demo_page


def test_the_numbers_are_those_of_the_files(demo_page: str, demo_folder: Path) -> None:
    data = _numbers(demo_page, "scan-knowledge-entropy")
    table = pq.read_table(demo_folder / "scan" / "entropy.parquet").to_pandas()
    rows = table[
        (table["measure"] == "knowledge_entropy")
        & table["layer"].isna()
        & (table["corpus"] == "biographies")
    ].sort_values("step")
    own = [place for place, name in enumerate(data["series"]) if name == "biographies"]
    value, low, high = (np.array(data[name])[own] for name in ("value", "low", "high"))
    np.testing.assert_allclose(value, rows["value"], rtol=1e-6)
    errors = critical_t(group_sizes(int(rows["num_instances"].iloc[0])))
    assert errors == pytest.approx(2.0, abs=0.01)
    np.testing.assert_allclose((high - low) / 2, errors * rows["stderr"], rtol=0.01)
    assert data["headings"]["value"] == "knowledge entropy (nats)"


def test_commands_fingerprints_and_ceiling_are_told(demo_page: str) -> None:
    words = _words(demo_page)
    assert "ke-ray scan study.yaml" in words
    assert f"{abs(synthetic.hash_of('biographies')):064x}" in words
    assert "ceiling 4·ln 64 = 16.64 nats" in words
    assert "worker killed by signal 9" in words
    assert "not requested ('--measures knowledge_entropy_relu')" in words


def test_three_stages_get_no_correlation_interval(demo_page: str) -> None:
    words = _words(demo_page)
    assert "n = 3; too few points for an interval" in words
    assert "0.997" in words


def test_no_results_yet(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    page = _built(tmp_path, tmp_path / "runs")
    assert "No results yet. 'ke-ray demo' makes a whole set" in _words(page)
    assert "<figure" not in page
    with pytest.raises(UserError, match="There is no"):
        _built(tmp_path, tmp_path / "nowhere")


def test_failed_checkpoints_are_listed_with_their_error(tmp_path: Path) -> None:
    scan = synthetic.make_scan(tmp_path / "scan", steps=[0, 1], failed=("step2",))
    words = _words(_built(tmp_path, scan))
    assert "Failed checkpoints" in words
    assert "step2: the file model.safetensors is truncated" in words


def test_an_older_schema_is_shown_with_what_it_has(tmp_path: Path) -> None:
    scan = synthetic.make_scan(tmp_path / "scan", steps=[0, 1], corpora=("a",))
    table = pq.read_table(scan / "entropy.parquet")
    pq.write_table(table.drop(["stderr", "duplicate_of", "status"]), scan / "entropy.parquet")
    manifest = json.loads((scan / "manifest.json").read_text())
    (scan / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 0}))
    page = _built(tmp_path, scan)
    words = _words(page)
    assert "schema version 0, older than" in words
    assert "has no column stderr, status" in words
    data = _numbers(page, "scan-knowledge-entropy")
    assert len(data["value"]) == 2
    assert data["low"] == [None, None]


def test_a_folder_of_an_earlier_version_is_given_every_declared_column(tmp_path: Path) -> None:
    study = synthetic.make_continual(tmp_path / "continual", steps=(40,), seeds=(0,))
    table = pq.read_table(study / "runs.parquet")
    pq.write_table(table.drop(["num_steps", "forgetting"]), study / "runs.parquet")
    (result,) = find_results([study])
    frame = result.table("runs")
    assert set(names("runs")) <= set(frame)
    assert frame["num_steps"].isna().all()
    assert [note for note in result.notes if "no column" in note] == [
        "runs.parquet has no column forgetting: shown as unknown."
    ]


def test_a_newer_schema_is_shown_with_a_warning(tmp_path: Path) -> None:
    scan = synthetic.make_scan(tmp_path / "scan", steps=[0, 1], corpora=("a",))
    manifest = json.loads((scan / "manifest.json").read_text())
    (scan / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 99}))
    assert "newer than the" in _words(_built(tmp_path, scan))


def test_a_half_finished_study_shows_what_there_is(tmp_path: Path) -> None:
    study = synthetic.make_continual(tmp_path / "continual", steps=(40,), seeds=(0,))
    for name in ("probes", "downstream", "perplexity", "dynamics", "injections"):
        (study / f"{name}.parquet").unlink()
    (study / "train.parquet").write_bytes(b"PAR1 half a file")
    page = _built(tmp_path, study)
    words = _words(page)
    assert "no probes.parquet" in words
    assert "train.parquet cannot be read" in words
    assert '<figure id="continual-acquisition"' in page
    assert '<figure id="continual-probes"' not in page
    assert "needs two or more starting points" in words


def test_a_study_without_any_finished_run(tmp_path: Path) -> None:
    study = synthetic.make_continual(tmp_path / "continual", steps=(), failed=("a", "b"))
    words = _words(_built(tmp_path, study))
    assert "No run has finished yet." in words
    assert "a: loss not finite" in words


def test_different_data_are_warned_about_and_never_laid_over_each_other(tmp_path: Path) -> None:
    synthetic.make_scan(tmp_path / "r" / "one", steps=[0, 1], corpora=("a",))
    synthetic.make_scan(tmp_path / "r" / "two", steps=[0, 1], corpora=("a",), data_salt="!")
    page = _built(tmp_path, tmp_path / "r")
    assert "must not be compared" in _words(page)
    assert '<figure id="compare-scans"' not in page


def test_scans_of_the_same_data_are_compared(tmp_path: Path) -> None:
    synthetic.make_scan(tmp_path / "r" / "one", steps=[0, 1], corpora=("a",))
    synthetic.make_scan(tmp_path / "r" / "two", steps=[0, 2], corpora=("a",), seed=1)
    page = _built(tmp_path, tmp_path / "r")
    assert "must not be compared" not in _words(page)
    names = dict.fromkeys(_numbers(page, "compare-scans")["series"])
    assert list(names) == ["one (a)", "two (a)"]


def test_one_folder_with_two_data_hashes_is_warned_about(tmp_path: Path) -> None:
    scan = synthetic.make_scan(tmp_path / "scan", steps=[0, 1], corpora=("a",))
    table = pq.read_table(scan / "entropy.parquet")
    mixed = pc.if_else(pc.equal(table["step"], 1), pa.scalar("f" * 64), table["data_sha256"])
    place = table.schema.get_field_index("data_sha256")
    pq.write_table(table.set_column(place, "data_sha256", mixed), scan / "entropy.parquet")
    assert "holds corpus 'a' with 2 data hashes" in _words(_built(tmp_path, scan))


def test_names_from_results_cannot_become_markup(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    scan = synthetic.make_scan(tmp_path / "scan", steps=[0, 1], corpora=("a",), failed=(evil,))
    entropy = pq.read_table(scan / "entropy.parquet")
    place = entropy.schema.get_field_index("checkpoint")
    names = pc.replace_substring(entropy["checkpoint"], "step1", evil)
    pq.write_table(entropy.set_column(place, "checkpoint", names), scan / "entropy.parquet")
    study = synthetic.make_continual(tmp_path / "continual", steps=(40,), seeds=(0,))
    table = pq.read_table(study / "runs.parquet")
    for name in ("run", "checkpoint"):
        place = table.schema.get_field_index(name)
        table = table.set_column(place, name, pa.array([evil]))
    pq.write_table(table, study / "runs.parquet")
    page = _built(tmp_path, scan, study)
    assert "<script>alert" not in page
    assert "\\u003c/script>\\u003cscript>alert(1)" in page  # in the rows, as a name


def test_table_1_is_overlaid_only_where_the_study_repeats_it(tmp_path: Path) -> None:
    config = {
        "starts": {"spec": "allenai/OLMo-1B-hf"},
        "corpus": {"name": "pubmed", "source": "data/pubmed/*.jsonl.gz"},
        "global_batch_size": 128,
        "optimizer": {"learning_rate": 4e-4},
        "epochs": 1,
    }
    study = synthetic.make_continual(
        tmp_path / "continual", steps=(117850, 738020), seeds=(0,), config=config
    )
    words = _words(_built(tmp_path, study))
    assert "Table 1 is not laid over A and F: the runs do not see 204,800 sequences" in words
    table = pq.read_table(study / "runs.parquet")
    place = table.schema.get_field_index("num_tokens")
    tokens = pa.array([204_800 * 1024] * len(table))
    pq.write_table(table.set_column(place, "num_tokens", tokens), study / "runs.parquet")
    page = _built(tmp_path, study)
    data = _numbers(page, "continual-acquisition")
    assert data["series"][-4:] == ["paper, Table 1 (baseline)"] * 4
    assert data["value"][-4:] == [25.2, 24.8, 21.4, 18.8]
    assert "compare the trend over the stages, not the values" in _words(page)
    manifest = json.loads((study / "manifest.json").read_text())
    manifest["config"]["optimizer"]["learning_rate"] = 2e-4
    (study / "manifest.json").write_text(json.dumps(manifest))
    page = _built(tmp_path, study)
    assert "no row with batch 128, learning rate 0.0002 and 1 epochs" in _words(page)
    assert "paper, Table 1" not in page


def test_building_imports_neither_torch_nor_ray_nor_mlflow(
    demo_folder: Path, tmp_path: Path
) -> None:
    code = (
        "import sys; from ke_ray.report import build_report; "
        f"build_report([{str(demo_folder)!r}], {str(tmp_path / 'r.html')!r}); "
        "bad = {'torch', 'ray', 'mlflow', 'transformers'} & set(sys.modules); "
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_original_is_its_own_original_in_the_factor_curve(tmp_path: Path) -> None:
    folder = synthetic.make_sweep(tmp_path / "sweep")
    path = folder / "trials.parquet"
    trials = pq.read_table(path).to_pandas()
    resuscitated = trials["amplifying_factor"].notna()
    trials["acquisition_vs_original"] = trials["acquisition"].where(resuscitated) / 2
    pq.write_table(pa.Table.from_pandas(trials), path)

    figure = next(
        figure
        for section in sections(find_results([folder]))
        for figure in section.figures
        if figure.id == "sweep-factor-curve"
    )
    with_line = [
        panel.key[0] for panel in figure.panels if '"original"' in json.dumps(panel.view.spec())
    ]
    assert "Acquisition A" in with_line
    assert "A against the original start" in with_line


def test_equal_rows_are_kept_once(demo_page: str) -> None:
    names = re.findall(r'<script type="application/json" id="(rows-[^"]+)"', demo_page)
    used = re.findall(r'"rows":"(rows-[^"]+)"', demo_page)
    assert len(names) == len(set(names))
    assert set(names) == set(used)
    assert len(used) > len(names)


def test_the_front_is_the_sweeps_own(tmp_path: Path) -> None:
    folder = synthetic.make_sweep(tmp_path / "sweep")
    settings = pq.read_table(folder / "settings.parquet").to_pandas()
    first = settings["point"].iloc[0]
    pq.write_table(
        pa.Table.from_pandas(settings.assign(on_front=settings["point"] == first)),
        folder / "settings.parquet",
    )
    data = _numbers(_built(tmp_path, folder), "sweep-pareto")
    own = settings[settings["metric"] == "acquisition"].set_index("point")
    front = [place for place, name in enumerate(data["series"]) if name == "Pareto front"]
    assert [data["point"][place] for place in front] == [first]
    np.testing.assert_allclose(data["value"], own.loc[data["point"], "value"] * 100, rtol=1e-6)
    np.testing.assert_allclose(
        [value or np.nan for value in data["low"]], own.loc[data["point"], "low"] * 100, rtol=1e-6
    )


def test_a_sweep_without_its_settings_says_so(tmp_path: Path) -> None:
    folder = synthetic.make_sweep(tmp_path / "sweep")
    (folder / "settings.parquet").unlink()
    page = _built(tmp_path, folder)
    assert "Pareto front: needs a settings.parquet" in _words(page)
    assert '<figure id="sweep-pareto"' not in page
