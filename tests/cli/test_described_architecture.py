"""A decoder that ke_ray's table lacks: explained, described, scanned and resuscitated."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from command_process import run_command
from safetensors.torch import load_file
from tiny_decoders import GROUPED, random_decoder

from ke_ray.checkpoints.reference import CheckpointRef
from ke_ray.core.architecture import Architecture
from ke_ray.errors import CheckpointSpecError, UnsupportedArchitectureError
from ke_ray.models import architectures
from ke_ray.models.saving import save_model
from ke_ray.models.scoring import score_model
from ke_ray.results import ScanFolder, read_manifest
from ke_ray.studies.continual import ContinualStudy
from ke_ray.training.inputs import read_start


@pytest.fixture(autouse=True)
def _forget_descriptions(monkeypatch):
    """Commands that run in this process leave nothing behind."""
    monkeypatch.setattr(architectures, "_DESCRIBED", {})


@pytest.fixture(scope="module")
def model():
    return random_decoder("seed_oss", {**GROUPED, "head_dim": 8})


@pytest.fixture
def work(tmp_path, model):
    """A checkpoint of the unknown type, its description, and data."""
    save_model(model, tmp_path / "series" / "step1")
    (tmp_path / "seed_oss.yaml").write_text("model_type: seed_oss\nup: up_proj\n")
    ids = np.random.default_rng(0).integers(3, 97, (6, 12)).astype(np.uint16)
    np.save(tmp_path / "ids.npy", ids)
    return tmp_path


def test_explain_lists_the_modules_of_an_unknown_decoder(ke_ray, work):
    result = ke_ray("checkpoints", work / "series", "--explain")
    assert result.code == 0, result.err
    assert "SeedOssForCausalLM, model type seed_oss" in result.out
    assert "'seed_oss' is not known to ke_ray" in result.out
    assert "mlp.down_proj (Linear): weight [32, 48]" in result.out


def test_explain_says_what_a_description_makes_of_it(ke_ray, work):
    command = ["checkpoints", work / "series", "--explain", "--architecture"]
    result = ke_ray(*command, work / "seed_oss.yaml")
    assert result.code == 0, result.err
    for line in (
        "layers 0 to 1:",
        "FFN: gated, silu, d_mlp 48",
        "coefficients: input of model.layers.*.mlp.down_proj [32, 48]",
        "queries: model.layers.*.self_attn.q_proj [32, 32]",
    ):
        assert line in result.out
    (work / "wrong.yaml").write_text("model_type: seed_oss\nup: w3\n")
    wrong = ke_ray(*command, work / "wrong.yaml")
    assert "not built like it" in wrong.out
    assert "mlp.up_proj (Linear): weight [48, 32]" in wrong.out


def test_explain_names_what_is_null_and_what_scales_the_logits(ke_ray, tmp_path, tiny_decoder):
    save_model(tiny_decoder("lfm2"), tmp_path / "lfm2" / "step1")
    save_model(tiny_decoder("granite"), tmp_path / "granite" / "step1")
    hybrid = ke_ray("checkpoints", tmp_path / "lfm2", "--explain").out
    assert "attention: none" in hybrid
    assert "attention_entropy: null, the layer has no softmax attention" in hybrid
    scaled = ke_ray("checkpoints", tmp_path / "granite", "--explain").out
    assert "logits: divided by logits_scaling = 1.7" in scaled


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model_type: seed_oss\nupp: x\n", "unknown key 'architecture.upp'.*'up'"),
        ("up: up_proj\n", "model_type is missing"),
        ("model_type: seed_oss\nquery_rows: some\n", "'all', 'first' or 'grouped'"),
        ("[1, 2]", "expected a mapping"),
    ],
)
def test_a_description_that_is_none_is_one_message(ke_ray, work, text, message):
    (work / "bad.yaml").write_text(text)
    for command in (
        ("checkpoints", work / "series", "--explain"),
        ("scan", work / "series", "--data", f"ids={work / 'ids.npy'}", "--output", work / "out"),
        ("resuscitate", work / "series", "--ratio", 0.5, "--output", work / "new"),
    ):
        result = ke_ray(*command, "--architecture", work / "bad.yaml")
        assert result.code == 2
        assert result.err.count("\n") == 1
        assert re.search(message, result.err), result.err


def test_resuscitation_writes_what_its_description_names(ke_ray, work, model):
    command = ["resuscitate", work / "series" / "step1", "--control", "attention_temperature"]
    command += ["--factor", 2, "--output", work / "new"]
    refused = ke_ray(*command)
    assert refused.code == 2
    assert "--architecture FILE" in refused.err
    done = ke_ray(*command, "--architecture", work / "seed_oss.yaml")
    assert done.code == 0, done.err
    name = "model.layers.1.self_attn.q_proj.weight"
    changed = load_file(work / "new" / "model.safetensors")[name]
    torch.testing.assert_close(changed, model.state_dict()[name] / 2)


@pytest.mark.ray
def test_a_scan_uses_it_in_every_process_and_keeps_it_in_its_identity(work, model):
    output = work / "out"
    command = ["scan", work / "series", "--data", f"ids={work / 'ids.npy'}", "--num-instances", 6]
    command += ["--sequence-length", 12, "--num-actors", 1, "--no-mlflow", "--output", output]
    result = run_command([*command, "--architecture", work / "seed_oss.yaml"], work)
    assert result.returncode == 0, result.stderr
    architectures.use_description(Architecture(model_type="seed_oss"))
    ids = torch.from_numpy(np.load(work / "ids.npy").astype(np.int64))
    expected = score_model(model, ids).row("knowledge_entropy").value
    rows = ScanFolder.open(str(output)).entropy().to_pylist()
    value = next(
        row["value"]
        for row in rows
        if (row["measure"], row["layer"]) == ("knowledge_entropy", None)
    )
    assert value == pytest.approx(expected, abs=1e-6)
    kept = read_manifest(str(output), "scan")["identity"]["architecture"]
    assert kept == {"model_type": "seed_oss"}


def test_continual_training_reads_its_start_by_the_description(work):
    folder = str(work / "series" / "step1")
    keys = {
        "starts": {"spec": folder},
        "corpus": {"source": str(work / "ids.npy")},
        "sequence_length": 12,
        "global_batch_size": 2,
        "output": str(work / "out"),
    }
    ref = CheckpointRef("step1", folder, "hf")
    with pytest.raises(UnsupportedArchitectureError, match="seed_oss"):
        read_start(ContinualStudy.model_validate(keys), ref, folder)
    keys["architecture"] = str(work / "seed_oss.yaml")
    # Known now: what is missing is a tokenizer.
    with pytest.raises(CheckpointSpecError, match="tokenizer"):
        read_start(ContinualStudy.model_validate(keys), ref, folder)
