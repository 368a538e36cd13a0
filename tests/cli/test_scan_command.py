"""``ke-ray scan`` as a process of its own: killed, run again, scripted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from ke_ray.results import ScanFolder

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def work(tmp_path):
    """Twelve tiny checkpoints and their data."""
    import torch
    from transformers import OlmoConfig, OlmoForCausalLM

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
    ids = np.random.default_rng(0).integers(2, 64, (200, 32)).astype(np.uint16)
    np.save(tmp_path / "ids.npy", ids)
    return tmp_path


def command(work, output, *more):
    return [
        *(sys.executable, "-m", "ke_ray", "scan", str(work / "series")),
        *("--data", f"ids={work / 'ids.npy'}", "--num-instances", "200"),
        *("--sequence-length", "32", "--batch-size", "1", "--num-actors", "1"),
        *("--measures", "knowledge_entropy,attention_entropy"),
        *("--output", str(work / output), "--mlflow-uri", f"sqlite:///{work}/mlflow.db"),
        *more,
    ]


def environment():
    return {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}


def values_of(folder):
    return {
        (r["checkpoint"], r["layer"], r["measure"]): (r["value"], r["stderr"], r["status"])
        for r in ScanFolder.open(str(folder)).entropy().to_pylist()
    }


def test_a_killed_driver_goes_on_and_redoes_nothing_finished(work):
    process = subprocess.Popen(
        command(work, "killed"), env=environment(), stderr=subprocess.PIPE, start_new_session=True
    )
    parts = work / "killed" / "parts"
    deadline = time.monotonic() + 240
    while len(list(parts.glob("*.entropy.parquet"))) < 3:
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = set(ScanFolder.open(str(work / "killed")).finished())
    assert 3 <= len(finished) < 12
    files = {p: p.stat().st_mtime_ns for p in (work / "killed/coefficients").iterdir()}
    before = values_of(work / "killed")

    result = subprocess.run(
        command(work, "killed"), env=environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert f"{len(finished)} skipped" in result.stdout
    done = {name.split("@")[0] for name, _ in finished}
    for path, stamp in files.items():
        if path.stem in done:
            assert path.stat().st_mtime_ns == stamp, "a finished checkpoint was done again"
    after = values_of(work / "killed")
    assert {key: after[key] for key in before} == before

    undisturbed = subprocess.run(
        command(work, "undisturbed", "--no-mlflow"),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert undisturbed.returncode == 0, undisturbed.stderr
    expected = values_of(work / "undisturbed")
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


def test_a_failure_is_in_the_exit_code_the_summary_and_the_rows(work):
    weights = work / "series" / "step3-tokens1B" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    for name in [f"step{n}-tokens1B" for n in range(5, 12)]:
        shutil.rmtree(work / "series" / name)
    result = subprocess.run(
        command(work, "out", "--no-mlflow"),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "failed: step3-tokens1B" in result.stderr
    assert "4 scanned, 1 failed" in result.stdout
    assert "Traceback" not in result.stderr
    shown = subprocess.run(
        [sys.executable, "-m", "ke_ray", "results", str(work / "out"), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = json.loads(shown.stdout)
    assert any(row.get("status") == "failed" for row in rows)
    assert (work / "out" / "entropy.png").stat().st_size > 10_000
