"""The studies in ``sweeps/`` of this kind say what they claim."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml

from ke_ray.config import load_study
from ke_ray.data.documents import DOCUMENT_SUFFIXES, iter_documents
from ke_ray.studies.continual import ALL_TASKS, ContinualStudy
from ke_ray.studies.scan import ScanStudy
from ke_ray.studies.training import PretrainStudy

ROOT = Path(__file__).parents[2]
SWEEPS = ROOT / "sweeps"

#: Data sets of the Hub that are (or were) made by a script, which `datasets` >= 4 does not run.
MADE_BY_SCRIPTS = {
    *("allenai/dolma", "bigscience/P3", "EleutherAI/pile", "the_pile", "HuggingFaceGECLM/REDDIT"),
    *("togethercomputer/RedPajama-Data-1T", "togethercomputer/RedPajama-Data-V2", "oscar"),
    *("oscar-corpus/OSCAR-2301", "mc4", "pg19", "scientific_papers", "wikipedia", "bookcorpus"),
}


@pytest.mark.parametrize(
    ("overrides", "steps", "every"),
    [
        ([], 1600, 160),
        (["global_batch_size=2048"], 100, 10),
        (["epochs=3"], 4800, 160),
        (["optimizer.learning_rate=1e-3"], 1600, 160),
        (["optimizer.learning_rate=1e-4"], 1600, 160),
    ],
)
def test_the_papers_baseline_and_its_variants(overrides: list[str], steps: int, every: int) -> None:
    study = load_study(SWEEPS / "olmo_1b_pubmed.yaml", ContinualStudy, overrides)
    assert study.corpus.num_instances is not None
    assert study.injection is not None
    per_epoch = study.corpus.num_instances // study.global_batch_size
    assert study.epochs * per_epoch == steps
    assert per_epoch // (study.injection.count or 0) == every
    assert study.schedule.num_warmup_steps(1600) == 80
    assert study.optimizer.betas == (0.9, 0.95)
    assert study.optimizer.eps == 1e-5
    assert study.downstream is not None
    assert set(study.downstream.tasks) == set(ALL_TASKS)


def test_the_demo_pretrains_at_least_eight_spaced_checkpoints() -> None:
    study = load_study(SWEEPS / "demo_pretrain.yaml", PretrainStudy)
    assert len(study.checkpoint_steps) >= 8
    assert study.checkpoint_steps[-1] == study.num_steps
    gaps = [b - a for a, b in zip(study.checkpoint_steps, study.checkpoint_steps[1:], strict=False)]
    assert gaps == sorted(gaps)


def test_the_demo_continues_from_what_the_demo_pretrained() -> None:
    pretrain = load_study(SWEEPS / "demo_pretrain.yaml", PretrainStudy)
    study = load_study(SWEEPS / "demo_continual.yaml", ContinualStudy)
    assert study.starts.spec.startswith(pretrain.output)
    assert set(study.starts.nearest) < set(pretrain.checkpoint_steps)
    assert study.sequence_length <= pretrain.sequence_length
    assert study.downstream is not None
    assert study.downstream.own_tasks


def texts_of(values: Any) -> Iterator[str]:
    """Every text in nested values."""
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, list):
        for value in values:
            yield from texts_of(value)
    elif isinstance(values, str):
        yield values


@pytest.mark.parametrize(
    "path", sorted([*SWEEPS.rglob("*.yaml"), *(ROOT / "jobs").glob("*.yaml")]), ids=lambda p: p.name
)
def test_no_shipped_file_reads_a_data_set_that_is_made_by_a_script(path: Path) -> None:
    named = {
        name
        for text in texts_of(yaml.safe_load(path.read_text()))
        for name in re.findall(r"(?<![\w/])hf:(?!//)([\w./-]+)", text)
    }
    assert named & MADE_BY_SCRIPTS == set()


@pytest.mark.parametrize(
    "path",
    [
        *(SWEEPS / f"{name}.yaml" for name in ("olmo_1b", "olmo_7b", "pythia_1b")),
        *sorted(SWEEPS.glob("series/*.yaml")),
    ],
    ids=lambda path: path.stem,
)
def test_the_shipped_scans_read_a_file_of_dolma_over_https(path: Path) -> None:
    study = load_study(path, ScanStudy)
    (source,) = study.data.values()
    if path.stem == "opencoder":  # its tokenizer comes as code
        assert source == "runs/series/opencoder_ids.npy"
        assert source in (SWEEPS.parent / "docs" / "series.md").read_text()
        return
    assert re.fullmatch(r"https://olmo-data\.org/dolma-v1_6-8B-sample/\S+\.json\.gz", source)
    assert source.endswith(DOCUMENT_SUFFIXES)


def test_a_file_of_documents_is_read_over_http_as_it_is_served(tmp_path: Path) -> None:
    """As olmo-data.org does: gzip files with a length, no listing, no redirect."""
    documents = [
        {"id": str(n), "text": f"Document {n}. " * 400, "source": "common-crawl", "metadata": {}}
        for n in range(200)
    ]
    lines = "".join(json.dumps(document) + "\n" for document in documents)
    (tmp_path / "v1_5r2_sample-0000.json.gz").write_bytes(gzip.compress(lines.encode()))
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1_5r2_sample-0000.json.gz"
        texts = [text for text, _ in iter_documents(url)]
        server.shutdown()
    assert texts == [document["text"] for document in documents]
