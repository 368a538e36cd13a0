"""S3 without credentials: one message, whichever argument names the bucket."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


def scan(folder: Path, **places: str) -> subprocess.CompletedProcess[str]:
    """``ke-ray scan`` where botocore finds no credentials and therefore asks no network."""
    checkpoint = folder / "step1"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(
        '{"model_type": "olmo", "vocab_size": 9, "max_position_embeddings": 8, "eos_token_id": 0}'
    )
    (checkpoint / "model.safetensors").write_bytes(b"")
    np.save(folder / "ids.npy", np.ones((4, 8), dtype=np.uint16))
    places = {"spec": str(folder), "data": str(folder / "ids.npy"), "output": "out"} | places
    options = [f"--data=x={places['data']}", f"--output={places['output']}", "--no-mlflow"]
    command = [sys.executable, "-m", "ke_ray", "scan", places["spec"], *options]
    command += ["--num-instances=4", "--sequence-length=8"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    environment |= {"HOME": str(folder), "AWS_EC2_METADATA_DISABLED": "true"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("place", ["spec", "data", "output"])
def test_a_bucket_without_credentials_is_one_message(tmp_path: Path, place: str) -> None:
    uri = "s3://bucket/olmo_1b" + (".npy" if place == "data" else "")
    done = scan(tmp_path, **{place: uri})
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    for word in (uri, "Unable to locate credentials", "AWS_ACCESS_KEY_ID", "AWS_ENDPOINT_URL"):
        assert word in done.stderr


def test_a_study_in_a_bucket_without_credentials_is_one_message(tmp_path: Path) -> None:
    done = scan(tmp_path, spec="s3://bucket/study.yaml")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "AWS_ACCESS_KEY_ID" in done.stderr
