"""The shipped scans run as they stand, against stand-ins of the Hub and of their data's hosts.

No study file is changed. Names of revisions, shards and sizes are the published ones; the content
is tiny.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from fake_hub import FakeHub, serving
from https_hosts import https_hosts, serving_files
from tokenizers import Tokenizer, models, pre_tokenizers

from ke_ray.config import load_study
from ke_ray.data.olmo_order import read_olmo_source
from ke_ray.models.saving import save_model
from ke_ray.planning.scan_forecast import forecast
from ke_ray.planning.scan_precision import local_gpus
from ke_ray.studies.scan import ScanStudy

ROOT = Path(__file__).parents[3]
SWEEPS = ROOT / "sweeps"
OLMO_1B, OLMO_7B, PYTHIA = "allenai/OLMo-1B-hf", "allenai/OLMo-7B-hf", "EleutherAI/pythia-1b"

#: What a revision of a series holds: the published shape, and the size of each weight file.
OLMO = {"model_type": "olmo", "vocab_size": 50304, "max_position_embeddings": 2048}
OLMO |= {"eos_token_id": 50279, "pad_token_id": 1, "architectures": ["OlmoForCausalLM"]}
CONFIGS = {
    OLMO_1B: OLMO
    | {"hidden_size": 2048, "intermediate_size": 8192}
    | {"num_hidden_layers": 16, "num_attention_heads": 16, "tie_word_embeddings": True},
    OLMO_7B: OLMO
    | {"hidden_size": 4096, "intermediate_size": 11008}
    | {"num_hidden_layers": 32, "num_attention_heads": 32},
    PYTHIA: {"model_type": "gpt_neox", "vocab_size": 50304, "max_position_embeddings": 2048}
    | {"hidden_size": 2048, "intermediate_size": 8192, "architectures": ["GPTNeoXForCausalLM"]}
    | {"num_hidden_layers": 16, "num_attention_heads": 8, "eos_token_id": 0},
}
SIZES = {
    OLMO_1B: {"model.safetensors": 4_711_000_000},
    OLMO_7B: {f"model-0000{n}-of-00006.safetensors": 4_590_000_000 for n in range(1, 7)},
    PYTHIA: {"model.safetensors": 2_090_000_000},
}


def published(repo: str, reference_data: Path) -> list[str]:
    """The names of the revisions with checkpoints."""
    if repo == PYTHIA:
        steps = [0, *(2**n for n in range(10)), *range(1000, 143_001, 1000)]
        return [f"step{step}" for step in steps]
    name, batch = ("OLMo-1B", 2048) if repo == OLMO_1B else ("OLMo-7B", 2160)
    with (reference_data / "data" / "olmo_checkpoints" / f"{name}.csv").open() as file:
        steps = [int(row["Step"]) for row in csv.DictReader(file)]
    return [f"step{step}-tokens{step * batch * 2048 / 1e9:.0f}B" for step in steps]


def selected(revisions: list[str], first_step: int, every: int) -> list[str]:
    steps = {name: int(name.removeprefix("step").partition("-")[0]) for name in revisions}
    return [name for name in revisions if steps[name] >= first_step][::every]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    with serving(tmp_path / "hub") as server:
        yield server


def add_revisions(hub: FakeHub, repo: str, contents: dict[str, Path]) -> None:
    """Revisions with the content of a folder each."""
    (hub.root / repo).mkdir(parents=True)
    for revision, folder in contents.items():
        (hub.root / repo / revision).symlink_to(folder)


@pytest.mark.parametrize(
    ("study", "repo", "first_step", "every"),
    [
        ("olmo_1b", OLMO_1B, 18_000, 10),
        ("olmo_7b", OLMO_7B, 40_000, 20),
        ("pythia_1b", PYTHIA, 0, 5),
    ],
)
def test_a_shipped_scan_is_forecast_from_what_is_published(
    hub: FakeHub,
    tmp_path: Path,
    reference_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    study: str,
    repo: str,
    first_step: int,
    every: int,
) -> None:
    revisions = published(repo, reference_data)
    num_checkpoints = len(selected(revisions, first_step, every))
    content = tmp_path / "content"
    content.mkdir()
    (content / "config.json").write_text(json.dumps(CONFIGS[repo]))
    for name in SIZES[repo]:
        (content / name).write_bytes(b"")
    if len(SIZES[repo]) > 1:
        shards = {f"tensor{n}": name for n, name in enumerate(SIZES[repo])}
        (content / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    add_revisions(hub, repo, dict.fromkeys(["main", *revisions], content))
    hub.sizes = SIZES[repo]
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    text = forecast(load_study(SWEEPS / f"{study}.yaml", ScanStudy))
    assert f"checkpoints: {num_checkpoints} (0 duplicates)" in text
    assert f"tokens to score: {num_checkpoints * 2048 * 2048:,} (1 corpora)" in text
    fetched = int(re.search(r"bytes to fetch: ([\d,]+)", text)[1].replace(",", ""))
    assert fetched == pytest.approx(num_checkpoints * sum(SIZES[repo].values()), rel=1e-4)
    assert "hours on GPUs" in text


@pytest.fixture
def data_hosts(tmp_path: Path) -> Iterator[tuple[Path, dict[str, str], dict[str, int]]]:
    """The folder of the hosts' files, the URL of each host, and the bytes sent of each path."""
    root = tmp_path / "data"
    root.mkdir()
    with serving_files(root) as (url, sent):
        yield root, dict.fromkeys(("olmo-data.org", "olmo-checkpoints.org"), url), sent


def run(command: list[str] | str, tmp_path: Path, hosts: dict[str, str]) -> str:
    """A program of its own whose network is the stand-ins; what it printed."""
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf")}
    for name in ("RAY_ADDRESS", "HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE"):
        environment.pop(name, None)
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment |= {"KE_RAY_RUNS": str(tmp_path / "runs"), "KE_RAY_CACHE": str(tmp_path / "cache")}
    environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{tmp_path}/mlflow.db"
    with https_hosts(hosts, tmp_path) as variables:
        done = subprocess.run(
            command,
            shell=isinstance(command, str),
            cwd=ROOT,
            env=environment | variables,
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.ray
@pytest.mark.slow
def test_the_shipped_job_runs_to_its_end(
    hub: FakeHub, data_hosts, tmp_path: Path, reference_data: Path, tiny_decoder
) -> None:
    """``jobs/scan.yaml`` on ``sweeps/olmo_1b.yaml``; the command requests less, as any user may."""
    words = [f"word{n}" for n in range(90)]
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="word0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    contents = [tmp_path / "first", tmp_path / "last"]
    for seed, folder in enumerate(contents):
        save_model(tiny_decoder("olmo", seed=seed, max_position_embeddings=2048), folder)
        tokenizer.save(str(folder / "tokenizer.json"))
    revisions = published(OLMO_1B, reference_data)
    by_revision = dict.fromkeys(["main", *revisions], contents[0])
    chosen = selected(revisions, 18_000, 10)
    add_revisions(hub, OLMO_1B, by_revision | {chosen[-1]: contents[1]})
    hub.base = "https://huggingface.co"

    root, hosts, sent = data_hosts
    study = load_study(SWEEPS / "olmo_1b.yaml", ScanStudy)
    (source,) = study.data.values()
    file = root / source.removeprefix("https://olmo-data.org/")
    file.parent.mkdir(parents=True)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, 500)) for _ in range(100)]
    lines = [json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(texts)]
    file.write_bytes(gzip.compress("".join(lines).encode()))

    entrypoint = yaml.safe_load((ROOT / "jobs" / "scan.yaml").read_text())["entrypoint"]
    assert "sweeps/olmo_1b.yaml" in shlex.split(entrypoint)
    less = "--limit 2 --num-instances 8 --num-actors 1 --no-mlflow"
    run(f"{entrypoint} {less}", tmp_path, hosts | {"huggingface.co": hub.url})
    rows = pq.read_table(tmp_path / "runs" / "olmo_1b" / "entropy.parquet").to_pylist()
    assert {row["checkpoint"] for row in rows} == {chosen[0], chosen[-1]}
    assert {row["measure"] for row in rows} == set(study.measures)
    manifest = json.loads((tmp_path / "runs" / "olmo_1b" / "manifest.json").read_text())
    assert study.dtype == "auto"
    assert manifest["identity"]["dtype"] == ("bfloat16" if local_gpus() else "float32")
    assert manifest["corpora"]["dolma"]["source"] == source
    assert manifest["corpora"]["dolma"]["num_tokens"] == 8 * 2048
    assert sent[f"/{file.relative_to(root)}"] > 0


def test_the_shipped_order_reads_the_papers_instances(data_hosts, tmp_path: Path) -> None:
    """``sweeps/olmo_1b_data.yml``, of whose 249 parts each has three instances here."""
    path = "sweeps/olmo_1b_data.yml"
    order = read_olmo_source(str(ROOT / path))
    assert len(order.parts) == len(set(order.parts)) == 249
    root, hosts, sent = data_hosts
    for number, url in enumerate(order.parts):
        file = root / url.removeprefix("https://olmo-data.org/")
        file.parent.mkdir(parents=True, exist_ok=True)
        instances = np.arange(3 * number, 3 * number + 3, dtype="<u2")
        file.write_bytes(np.repeat(instances, 2048).tobytes() + b"\1\0" * 7)  # and a short chunk
    assert order.order is not None
    file = root / order.order.removeprefix("https://olmo-checkpoints.org/")
    file.parent.mkdir(parents=True)
    shuffled = np.random.default_rng(0).permutation(3 * 249).astype("<u4")
    file.write_bytes(shuffled.tobytes())
    program = (
        "from ke_ray.data.corpus import build_corpus\n"
        f"corpus = build_corpus('d', '{path}', num_instances=40, sequence_length=2048)\n"
        "print(*corpus.instance_ids)\n"
        "print(*corpus.input_ids[:, -1])"
    )
    ids, tokens = run([sys.executable, "-c", program], tmp_path, hosts).splitlines()
    assert ids == tokens == " ".join(map(str, shuffled[:40]))
    assert sum(sent.values()) == 40 * 2048 * 2 + 40 * 4
