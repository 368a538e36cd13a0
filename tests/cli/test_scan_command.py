"""``ke-ray scan`` as a process of its own: killed, run again, scripted."""

from __future__ import annotations

import json
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from command_process import run_command, start_command
from transformers import OlmoConfig, OlmoForCausalLM

from ke_ray.models.loading import load_model
from ke_ray.models.scoring import score_model
from ke_ray.results import ScanFolder

pytestmark = [pytest.mark.ray, pytest.mark.slow]

MEASURES = ["knowledge_entropy", "attention_entropy"]


@pytest.fixture
def work(tmp_path):
    """Twelve tiny checkpoints and their data."""
    for number in range(12):
        torch.manual_seed(number)
        config = OlmoConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            eos_token_id=0,
            pad_token_id=1,
        )
        OlmoForCausalLM(config).save_pretrained(tmp_path / "series" / f"step{number}-tokens1B")
    ids = np.random.default_rng(0).integers(2, 64, (80, 32)).astype(np.uint16)
    np.save(tmp_path / "ids.npy", ids)
    return tmp_path


def arguments(work, output, *more):
    return [
        *("scan", work / "series", "--data", f"ids={work / 'ids.npy'}", "--num-instances", 80),
        *("--sequence-length", 32, "--batch-size", 1, "--num-actors", 1),
        *("--measures", ",".join(MEASURES), "--output", work / output),
        *more,
    ]


def values_of(folder):
    return {
        (r["checkpoint"], r["layer"], r["measure"]): (r["value"], r["stderr"], r["status"])
        for r in ScanFolder.open(str(folder)).entropy().to_pylist()
    }


def undisturbed(work):
    """The same values by one call for each checkpoint."""
    ids = torch.from_numpy(np.load(work / "ids.npy").astype(np.int64))
    return {
        (folder.name, row.layer, row.measure): (row.value, row.stderr, "ok")
        for folder in (work / "series").iterdir()
        for row in score_model(load_model(folder), ids, measures=MEASURES).rows
    }


def test_a_killed_driver_goes_on_and_redoes_nothing_finished(work):
    tracked = ("--mlflow-uri", f"sqlite:///{work}/mlflow.db")
    command = start_command(arguments(work, "killed", *tracked), work / "said.txt")
    parts = work / "killed" / "parts"
    deadline = time.monotonic() + 240
    while len(list(parts.glob("*.entropy.parquet"))) < 3:
        assert command.returncode is None, command.stdout
        assert time.monotonic() < deadline
        time.sleep(0.02)
    command.send_signal(signal.SIGKILL)
    command.wait()
    finished = set(ScanFolder.open(str(work / "killed")).finished())
    assert 3 <= len(finished) < 12
    files = {p: p.stat().st_mtime_ns for p in (work / "killed/coefficients").iterdir()}
    before = values_of(work / "killed")

    result = run_command(arguments(work, "killed", *tracked), work)
    assert result.returncode == 0, result.stderr
    assert f"{len(finished)} skipped" in result.stdout
    done = {name.split("@")[0] for name, _ in finished}
    for path, stamp in files.items():
        if path.stem in done:
            assert path.stat().st_mtime_ns == stamp, "a finished checkpoint was done again"
    after = values_of(work / "killed")
    assert {key: after[key] for key in before} == before

    expected = undisturbed(work)
    assert after.keys() == expected.keys()
    for key, (value, stderr, status) in expected.items():
        np.testing.assert_allclose(after[key][:2], (value, stderr), 1e-6, 1e-6, err_msg=str(key))
        assert after[key][2] == status == "ok"

    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{work}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("ke_ray").experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"], "the killed run was not continued"
    points = client.get_metric_history(runs[0].info.run_id, "knowledge_entropy/total_nats")
    assert {point.step for point in points} == set(range(12))


def test_a_failure_is_in_the_exit_code_the_summary_and_the_rows(work, ke_ray):
    weights = work / "series" / "step3-tokens1B" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    for name in [f"step{n}-tokens1B" for n in range(5, 12)]:
        shutil.rmtree(work / "series" / name)
    result = run_command(arguments(work, "out", "--no-mlflow"), work)
    assert result.returncode == 1
    assert "failed: step3-tokens1B" in result.stderr
    assert "4 scanned, 1 failed" in result.stdout
    assert "Traceback" not in result.stderr
    shown = ke_ray("results", work / "out", "--json")
    assert shown.code == 0, shown.err
    rows = json.loads(shown.out)
    assert any(row.get("status") == "failed" for row in rows)
    assert (work / "out" / "entropy.png").stat().st_size > 10_000
