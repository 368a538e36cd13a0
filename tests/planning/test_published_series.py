"""``docs/series.md`` and ``sweeps/series``: what is written of the open series is what happens."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import series_stand_ins
from fake_hub import FakeHub, serving
from series_stand_ins import write_checkpoints, write_documents, write_tokenizer

from ke_ray.checkpoints.find.catalog import find_checkpoints
from ke_ray.checkpoints.find.names import parse_checkpoint_name
from ke_ray.checkpoints.reference import CheckpointRef
from ke_ray.config import load_study
from ke_ray.models.saving import save_model
from ke_ray.planning.scan import prepare_scan
from ke_ray.report import series
from ke_ray.report.charts.scan import scan_figures
from ke_ray.report.sources import find_results
from ke_ray.studies.scan import ScanStudy

ROOT = Path(__file__).parents[2]
STUDIES = {path.stem: path for path in sorted((ROOT / "sweeps" / "series").glob("*.yaml"))}


def table(mark: str) -> list[dict[str, str]]:
    """The rows of a table of ``docs/series.md``."""
    text = (ROOT / "docs" / "series.md").read_text().partition(f"<!-- {mark} -->")[2]
    lines = text.partition("<!-- end -->")[0].strip().splitlines()
    cells = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


SERIES = {row["study"]: row for row in table("series")}
NAMES = {
    series: [row["name"] for row in rows]
    for series, rows in itertools.groupby(table("names"), key=lambda row: row["series"])
}


def study_of(name: str, *overrides: str) -> ScanStudy:
    return load_study(str(STUDIES[name]), ScanStudy, list(overrides))


def test_every_series_has_a_study_and_every_study_a_row() -> None:
    assert set(STUDIES) == set(SERIES)
    assert {row["series"] for row in SERIES.values()} == set(NAMES)
    for name, row in SERIES.items():
        study = study_of(name)
        assert study.checkpoints.spec == row["SPEC"]
        assert study.output == f"runs/series/{name}"
        assert row["sizes"]
        assert row["FFN of the study's size"]
        assert row["odd"]


@pytest.mark.parametrize("row", table("names"), ids=lambda row: row["name"])
def test_the_parser_reads_what_the_page_says(row: dict[str, str]) -> None:
    parsed = parse_checkpoint_name(row["name"])
    numbers = {name: getattr(parsed, name) for name in ("step", "tokens", "words")}
    texts = {"stage": parsed.stage_label, "branch": parsed.branch, "seed": parsed.seed}
    assert numbers == {n: None if row[n] == "–" else int(float(row[n])) for n in numbers}
    assert texts == {name: None if row[name] == "–" else row[name] for name in texts}


@pytest.fixture(scope="module")
def weights(tmp_path_factory, tiny_decoder) -> Iterator[Path]:
    """More checkpoints of a tiny Llama than a series has names, each with other weights."""
    folder = tmp_path_factory.mktemp("weights")
    for seed in range(max(map(len, NAMES.values())) + 1):
        save_model(tiny_decoder("llama", seed=seed), folder / str(seed))
    return folder


@pytest.fixture
def hub(tmp_path: Path, weights: Path, monkeypatch) -> Iterator[FakeHub]:
    """All series under their real names."""
    root = tmp_path / "hub"
    for row in SERIES.values():
        repo = root / re.split("[@:#]", row["SPEC"])[0]
        folder = repo / "main" if ":" in row["SPEC"] else repo
        for seed, name in enumerate(NAMES[row["series"]]):
            shutil.copytree(weights / str(seed), folder / name)
    shutil.copytree(weights / str(len(NAMES["Amber"])), root / "LLM360" / "Amber" / "main")
    for name, last in (("marin", "deeper-starling"), ("datadecide", "step29042-seed-default")):
        repo = root / SERIES[name]["SPEC"]
        shutil.copytree(repo / last, repo / "main")
    (root / SERIES["pythia"]["SPEC"] / "float16").mkdir()  # a branch without a checkpoint
    with serving(root) as server:
        titles = NAMES["Pico"]  # each is the commit, too
        server.commits["pico-lm/pico-decoder-tiny"] = [(title, title) for title in titles]
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(proxy, raising=False)
        yield server


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    path = tmp_path / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(2, 64, (8, 16)).astype(np.uint16))
    return path


def overrides(tmp_path: Path, ids: Path) -> list[str]:
    """What a stand-in cannot have: the text, the amount of it, and a place for results."""
    return [
        *(f"data.dolma={ids}", "tokenizer=null", "num_instances=8", "sequence_length=16"),
        *(f"output={tmp_path / 'out'}", "mlflow.enabled=false", f"cache_dir={tmp_path / 'cache'}"),
    ]


def test_every_study_is_planned_as_it_stands(hub, tmp_path: Path, ids: Path) -> None:
    for name in STUDIES:
        study = study_of(name, *overrides(tmp_path / name, ids))
        setup = prepare_scan(study)
        every = study.checkpoints.every or 1
        listing = find_checkpoints(study.checkpoints.spec, **study.checkpoints.options())
        assert [ref.name for ref in setup.refs] == [ref.name for ref in listing.checkpoints]
        published = NAMES[SERIES[name]["series"]]
        assert len(setup.refs) >= max(1, (len(published) - 2) // every)
        assert len(setup.works) == len(setup.refs)


def listed(name: str) -> tuple[list[CheckpointRef], tuple[str, ...]]:
    """All checkpoints of a study's series, and the notes on them."""
    options = study_of(name).checkpoints.options() | {"every": None, "steps": None}
    listing = find_checkpoints(study_of(name).checkpoints.spec, **options)
    return list(listing.checkpoints), listing.notes


def test_the_series_are_in_the_order_of_training(hub) -> None:
    names = {name: [ref.revision for ref in listed(name)[0]] for name in STUDIES}
    for name in ("pythia", "olmo1", "olmo2", "olmo3", "smollm2", "olmoe", "babylm", "bgpt"):
        assert names[name] == NAMES[SERIES[name]["series"]]
    assert names["opencoder"] == NAMES["OpenCoder"]
    assert [ref.step for ref in listed("lment")[0]] == [10_000, 20_000, 109_672]
    assert [ref.step for ref in listed("pico")[0]] == [0, 1000, 125_000]
    assert names["amber"] == [*NAMES["Amber"], "main"]
    assert names["apertus"] == NAMES["Apertus"][:-1]  # pretraining alone
    assert names["smollm3"][:6] == NAMES["SmolLM3"][:6]
    assert set(names["smollm3"][6:]) == {"it-mid-training", "it-soup-APO"}
    assert set(names["marin"]) == set(NAMES["Marin"])
    by_seed = sorted(NAMES["DataDecide"], key=lambda name: name.partition("-seed-")[2])
    assert names["datadecide"] == by_seed


def test_tokens_go_on_over_the_stages(hub) -> None:
    tokens = {ref.revision: ref.tokens for ref in listed("olmo2")[0]}
    end = tokens["stage1-step1907359-tokens4001B"] or 0
    assert tokens["stage2-ingredient1-step23852-tokens51B"] == end + 51 * 10**9
    assert tokens["stage2-ingredient3-step6000-tokens13B"] == end + 13 * 10**9
    tokens = {ref.revision: ref.tokens for ref in listed("smollm3")[0]}
    assert tokens["stage1-step-40000"] == 94_371_840_000  # "94.4B" on its page
    assert tokens["lc-4k-to-32k-step-4000"] == (4_720_000 + 4000) * 2_359_296
    assert tokens["it-soup-APO"] is None


def test_what_is_odd_is_said(hub) -> None:
    assert "1 revisions have names that are not understood" in listed("pythia")[1][0]
    assert any("3 of 3 checkpoints have no step" in note for note in listed("marin")[1])
    assert any("count words, not steps" in note for note in listed("babylm")[1])
    assert any("several seeds" in note for note in listed("datadecide")[1])
    assert any("count checkpoints" in note for note in listed("amber")[1])


#: More names of regular series, so that each study's ``every`` leaves a curve.
MORE = {
    "amber": [f"ckpt_{number:03}" for number in range(2, 26)],
    "datadecide": [
        f"step{step}-seed-{seed}"
        for step in (1250, 2500, 3750, 5000)
        for seed in ("default", "small-aux-2", "small-aux-3")
    ],
    "olmo1": [f"step{step}-tokens{step // 240}B" for step in range(400_000, 520_000, 10_000)],
    "olmo2": [
        f"stage1-step{step}-tokens{step // 480}B" for step in range(150_000, 210_000, 10_000)
    ],
    "olmo3": [f"stage1-step{step}" for step in range(1000, 36_000, 1000)],
    "olmoe": [f"step{step}-tokens{step // 240}B" for step in range(15_000, 60_000, 5000)],
    "opencoder": [
        f"{stage}_iter_{1000 * n:07}" for stage in ("pretrain", "anneal") for n in range(2, 20)
    ],
    "pico": [f"Saving HF Model -- Step {step}" for step in range(2000, 8000, 1000)],
    "pythia": [f"step{step}" for step in range(2000, 9000, 1000)],
}


@pytest.fixture
def published(tmp_path: Path) -> Iterator[FakeHub]:
    """All series under their real names, in the architectures that they have, and tokenizers."""
    root = tmp_path / "hub"
    for name, row in SERIES.items():
        repo = root / re.split("[@:#]", row["SPEC"])[0]
        folder = repo / "main" if ":" in row["SPEC"] else repo
        names = [*NAMES[row["series"]], *MORE.get(name, []), *(["main"] if name == "amber" else [])]
        write_checkpoints(name, [folder / each for each in names])
        if study_of(name).tokenizer is not None:
            place, _, subfolder = study_of(name).tokenizer.partition(":")
            write_tokenizer(root / place / "main" / subfolder / "tokenizer.json")
    with serving(root) as server:
        titles = [*NAMES["Pico"], *MORE["pico"]]
        server.commits["pico-lm/pico-decoder-tiny"] = [(each, each) for each in titles]
        yield server


@pytest.mark.ray
@pytest.mark.slow
def test_every_study_is_run_as_it_stands(published, tmp_path: Path, ids: Path) -> None:
    """Unchanged but for the amount of data and the places of data, results and weights."""
    write_documents(tmp_path / "documents.json.gz")
    scans = {}
    for name, path in STUDIES.items():
        data = ids if study_of(name).tokenizer is None else tmp_path / "documents.json.gz"
        places = [f"data.dolma={data}", f"output={tmp_path / name}", f"cache_dir={tmp_path / 'c'}"]
        amounts = ["num_instances=8", "sequence_length=16", "num_actors=1", "mlflow.enabled=false"]
        scans[name] = (str(path), places + amounts)
    hidden = ("RAY_ADDRESS", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")
    done = subprocess.run(
        [sys.executable, series_stand_ins.__file__],
        input=json.dumps(scans),
        env={name: value for name, value in os.environ.items() if name not in hidden}
        | {
            "HF_ENDPOINT": published.url,
            "HF_HUB_CACHE": str(tmp_path / "hf"),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=True,
        timeout=550,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == dict.fromkeys(STUDIES, 0)
    for name in STUDIES:
        check_results(name, tmp_path / name)


#: The axis of some.
UNITS = {"opencoder": "tokens", "olmo2": "tokens", "babylm": "words", "datadecide": "step"}


def check_results(name: str, folder: Path) -> None:
    """Values, positions and curves of a study's results are what its names say."""
    names = {*NAMES[SERIES[name]["series"]], *MORE.get(name, [])}
    result = find_results([folder])[0]
    assert series.unit(result) == UNITS.get(name, series.unit(result)), name
    seeds = ["seed default", "seed small-aux-2", "seed small-aux-3"]
    labels = seeds if name == "datadecide" else [""]
    assert [label for label, _ in series.curves(result)] == labels, name
    for table_name in ("entropy", "replicates"):
        rows = pq.read_table(folder / f"{table_name}.parquet").to_pylist()
        for row in rows:
            assert row.get("reason") or math.isfinite(row["value"]), name
        by_name = {row["checkpoint"]: row for row in rows}
        assert len(by_name) >= 2, name
        for row in (by_name[each] for each in names.intersection(by_name)):
            parsed = parse_checkpoint_name(row["checkpoint"])
            assert row["step"] == parsed.step, name
            assert (row["stage_label"], row["seed"]) == (parsed.stage_label, parsed.seed), name
    for _, part in scan_figures(result, name)[0].panels[0].view.rows.groupby("series"):
        assert part["x"].is_monotonic_increasing, name
        assert part["x"].is_unique, name
