"""``ke-ray resuscitate`` on the golden models, and everything it must refuse."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

RATIOS = (0.25, 0.5, 0.75)
FACTORS = (0.5, 1.0, 2.0)


@pytest.fixture(scope="module", params=[0, 1])
def golden(request, reference_data):
    return reference_data / "golden" / f"tiny-seed{request.param}"


@pytest.fixture(scope="module")
def values(golden):
    return load_file(golden / "golden.safetensors")


def make_scan(folder, golden, values, name="golden"):
    """A scan folder with the golden model's coefficients, under the name ``name``."""
    import pyarrow

    from ke_ray import storage
    from ke_ray.checkpoints.formats.fingerprint import weights_sha256
    from ke_ray.results import ScanFolder, new_manifest
    from ke_ray.results.scan_folder import ENTROPY_SCHEMA

    ids = load_file(golden / "inputs.safetensors")["input_ids"]
    corpora = {"text": {"source": "ids", "sha256": "0" * 64, "num_instances": len(ids)}}
    manifest = new_manifest("scan", {}) | {"corpora": corpora, "status": "finished"}
    manifest["identity"] = {"corpora": {"text": "0" * 64}}
    storage.write_json(str(folder / "manifest.json"), manifest)
    row = dict.fromkeys(ENTROPY_SCHEMA.names) | {
        "checkpoint": name,
        "corpus": "text",
        "measure": "knowledge_entropy",
        "value": 1.0,
        "unit": "nats",
        "weights_sha256": weights_sha256(golden / "hf"),
        "status": "ok",
    }
    table = pyarrow.Table.from_pylist([row], schema=ENTROPY_SCHEMA)
    storage.write_table(str(folder / "entropy.parquet"), table)
    (folder / "coefficients").mkdir()
    save_file(
        {"mean_abs_coefficients": values["avg_coefficients"].contiguous()},
        folder / "coefficients" / f"{name}.safetensors",
    )
    assert ScanFolder.open(str(folder)).mean_coefficients(name).shape == (2, 256)
    return folder


@pytest.fixture
def scan(tmp_path, golden, values):
    return make_scan(tmp_path / "scan", golden, values)


def ff_proj(folder):
    return {
        name: tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
        if name.endswith("ff_proj.weight")
    }


@pytest.mark.parametrize("given", ["hf", "olmo"])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("factor", FACTORS)
def test_every_golden_multiplier_is_in_the_written_weights(
    ke_ray, golden, values, scan, tmp_path, ratio, factor, given
):
    out = tmp_path / "new"
    layout = "native" if given == "hf" else "hf"
    command = ["resuscitate", golden / given, "--coefficients", scan, "--ratio", ratio]
    result = ke_ray(*command, "--factor", factor, "--layout", layout, "--output", out)
    assert result.code == 0, result.err
    expected = values[f"multipliers.p{ratio}_q{factor}"].double()
    before = load_file(golden / "hf" / "model.safetensors")
    after = load_file(out / "model.safetensors")
    for layer in range(2):
        old = before[f"model.layers.{layer}.mlp.up_proj.weight"].double()
        if layout == "native":
            new = after[f"transformer.blocks.{layer}.ff_proj.weight"][:256].double()
        else:
            new = after[f"model.layers.{layer}.mlp.up_proj.weight"].double()
        column = old.abs().argmax(dim=1, keepdim=True)
        found = (new.gather(1, column) / old.gather(1, column))[:, 0]
        torch.testing.assert_close(found, expected[layer], rtol=1e-5, atol=0)
    record = json.loads((out / "resuscitation.json").read_text())
    assert record["selected_rows"] == [int(values[f"selected.p{ratio}"][i].sum()) for i in (0, 1)]


@pytest.mark.parametrize("source", ["scan", "authors"])
def test_the_golden_resuscitated_tensors_and_their_entropy(
    ke_ray, golden, values, scan, tmp_path, source
):
    place = scan
    if source == "authors":  # T · C̄, as their script saves it
        place = tmp_path / "mlp_average_coefficients.pt"
        torch.save(values["official_avg_act_abs"], place)
    ids = tmp_path / "ids.npy"
    np.save(ids, load_file(golden / "inputs.safetensors")["input_ids"].numpy().astype(np.uint16))
    out = tmp_path / "new"
    result = ke_ray(
        *("resuscitate", golden / "olmo", "--coefficients", place, "--ratio", 0.5, "--factor", 2),
        *("--layout", "native", "--output", out, "--measure", f"text={ids}"),
        *("--num-instances", 16, "--sequence-length", 128),
    )
    assert result.code == 0, result.err
    assert (out / "config.yaml").is_file()
    assert len(ff_proj(out)) == 2
    for name, tensor in ff_proj(out).items():
        wanted = values[f"resuscitated.p0.5_q2.0.{name}"]
        torch.testing.assert_close(tensor, wanted, rtol=1e-5, atol=0)
    record = json.loads((out / "resuscitation.json").read_text())
    told = json.loads((golden / "golden.json").read_text())
    official = told["resuscitated_p0.5_q2.0_official"]["knowledge_entropy"]
    # The authors add 1e-9 inside the logarithm: 2.6e-7 a layer here.
    assert record["measured_after_nats"] == pytest.approx(official, abs=2e-5)
    assert record["measured_before_nats"] == pytest.approx(
        told["float64"]["knowledge_entropy"]["sum"], abs=2e-5
    )
    # With its inputs fixed, the first layer is predicted exactly.
    mean = values["resuscitated.p0.5_q2.0.avg_coefficients"][0].double()
    share = mean / mean.sum()
    assert record["predicted_entropy_nats"][0] == pytest.approx(
        float(-(share * share.log()).sum()), abs=1e-5
    )
    assert record["coefficients_verified"] is (source == "scan")
    assert record["coefficients_of_other_weights"] is (False if source == "scan" else None)
    assert f"{record['measured_after_nats']:.4f}" in result.out


def test_the_written_folder_is_a_checkpoint_with_the_recorded_hash(ke_ray, golden, scan, tmp_path):
    from ke_ray.checkpoints.formats.fingerprint import weights_sha256

    hashes = []
    for layout in ("hf", "native"):
        out = tmp_path / layout
        arguments = ["--coefficients", scan, "--ratio", 0.5, "--factor", 1, "--layout", layout]
        result = ke_ray("resuscitate", golden / "hf", *arguments, "--output", out)
        assert result.code == 0, result.err
        record = json.loads((out / "resuscitation.json").read_text())
        assert weights_sha256(out) == record["weights_sha256_after"]
        assert weights_sha256(golden / "hf") == record["weights_sha256_before"]
        hashes.append(record["weights_sha256_after"])
    assert hashes[0] == hashes[1] != record["weights_sha256_before"]


@pytest.mark.parametrize("control", ["random", "matched_norm", "attention_temperature"])
def test_controls(ke_ray, golden, scan, tmp_path, control):
    out = tmp_path / "new"
    arguments = ["--factor", 2, "--control", control, "--output", out]
    if control != "attention_temperature":
        arguments += ["--coefficients", scan, "--ratio", 0.5]
    result = ke_ray("resuscitate", golden / "hf", *arguments)
    assert result.code == 0, result.err
    before = load_file(golden / "hf" / "model.safetensors")
    after = load_file(out / "model.safetensors")
    changed = {name.split(".", 3)[-1] for name in before if not before[name].equal(after[name])}
    query = {"self_attn.q_proj.weight"}
    assert changed == (query if control == "attention_temperature" else {"mlp.up_proj.weight"})
    record = json.loads((out / "resuscitation.json").read_text())
    assert (record["control"], record["factor"]) == (control, 2)
    if control == "matched_norm":
        assert record["predicted_entropy_nats"] == pytest.approx(record["entropy_nats"])


def test_a_scan_of_the_written_folder_shows_what_was_predicted(
    ke_ray, golden, values, scan, tmp_path
):
    from ke_ray import storage
    from ke_ray.resuscitation.prediction import prediction_lines, write_predictions

    out = tmp_path / "new"
    arguments = ["--coefficients", scan, "--ratio", 0.5, "--factor", 2, "--output", out]
    assert ke_ray("resuscitate", golden / "hf", *arguments).code == 0
    record = json.loads((out / "resuscitation.json").read_text())
    # As a scan of that folder leaves it (tests/engine has a real one).
    after = make_scan(tmp_path / "after", golden, values, name="new")
    manifest = storage.read_json(str(after / "manifest.json"))
    manifest["checkpoints"] = [{"name": "new", "location": str(out)}]
    storage.write_json(str(after / "manifest.json"), manifest)
    (row,) = write_predictions(str(after))
    assert row["predicted_nats"] == pytest.approx(sum(record["predicted_entropy_nats"]))
    assert row["before_nats"] == pytest.approx(sum(record["entropy_nats"]))
    assert (row["measured_nats"], row["factor"], row["control"]) == (1.0, 2.0, None)
    assert prediction_lines([row])[-1].endswith("   1.0000  text")
    assert write_predictions(str(scan)) == [], "nothing there was resuscitated"


@pytest.mark.parametrize("names", ["now", "earlier"])
def test_records_of_checkpoints_resuscitated_in_memory_outlive_a_version(scan, names):
    """A scan that an earlier version began has the predictions of its checkpoints."""
    from ke_ray import storage
    from ke_ray.resuscitation.prediction import write_predictions, write_record

    manifest = storage.read_json(str(scan / "manifest.json"))
    manifest["identity"]["resuscitation"] = {"ratio": 0.5, "factor": 2.0, "control": None}
    storage.write_json(str(scan / "manifest.json"), manifest)
    record = {
        "now": {
            "coefficients": "measured before",
            "coefficients_verified": True,
            "entropy_nats": [1.0, 2.0],
            "predicted_entropy_nats": [1.5, 2.5],
        },
        "earlier": {
            "before_nats": [1.0, 2.0],
            "predicted_nats": [1.5, 2.5],
            "notes": {"coefficients": "measured before"},
        },
    }[names]
    write_record(str(scan), "golden", json.dumps(record))
    (row,) = write_predictions(str(scan))
    assert (row["before_nats"], row["predicted_nats"], row["ratio"]) == (3.0, 4.0, 0.5)
    assert (row["coefficients"], row["coefficients_verified"]) == ("measured before", True)


def test_coefficients_of_a_resuscitated_scan_are_not_the_files_own(ke_ray, golden, scan, tmp_path):
    """Its rows have the files' hash, but what was measured are the weights changed after load."""
    from ke_ray import storage

    manifest = storage.read_json(str(scan / "manifest.json"))
    manifest["identity"]["resuscitation"] = {"ratio": 0.5, "factor": 2.0}
    storage.write_json(str(scan / "manifest.json"), manifest)
    out = tmp_path / "new"
    arguments = ["--coefficients", scan, "--ratio", 0.5, "--output", out]
    refused = ke_ray("resuscitate", golden / "hf", *arguments)
    assert refused.code == 2
    assert "golden, resuscitated after load" in refused.err
    assert ke_ray("resuscitate", golden / "hf", *arguments, "--allow-mismatch").code == 0
    record = json.loads((out / "resuscitation.json").read_text())
    assert record["coefficients_verified"] is False


def test_coefficients_of_other_weights_only_when_allowed_and_recorded(
    ke_ray, golden, values, reference_data, scan, tmp_path
):
    other = (
        reference_data / "golden" / ("tiny-seed1" if golden.name.endswith("0") else "tiny-seed0")
    )
    arguments = ["resuscitate", other / "hf", "--coefficients", scan, "--ratio", 0.5]
    out = tmp_path / "new"
    refused = ke_ray(*arguments, "--output", out)
    assert (refused.code, len(refused.err.splitlines())) == (2, 1)
    assert "--allow-mismatch" in refused.err
    assert not out.exists()
    allowed = ke_ray(*arguments, "--output", out, "--allow-mismatch")
    assert allowed.code == 0, allowed.err
    record = json.loads((out / "resuscitation.json").read_text())
    assert record["coefficients_of_other_weights"] is True
    assert "not known to be of these weights" in allowed.out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--ratio", "0"], "in (0, 1]"),
        (["--ratio", "1.01"], "in (0, 1]"),
        (["--ratio", "nan"], "in (0, 1]"),
        (["--ratio", "0.5", "--factor", "0"], "above 0"),
        (["--ratio", "0.5", "--factor", "inf"], "above 0"),
        (["--ratio", "0.5", "--control", "randm"], "Did you mean 'random'?"),
        (["--factor", "2"], "--ratio must be given"),
        (["--ratio", "0.5", "--layout", "olmo"], "'hf' or 'native'"),
        (["--ratio", "0.5", "--coefficients", "{tmp}/none"], "holds no results"),
        (["--ratio", "0.5", "--coefficients", "{tmp}/none.pt"], "no coefficients file"),
        (["--ratio", "0.5", "--coefficients", "{tmp}/pickle.pt"], "not a plain tensor file"),
        (["--ratio", "0.5", "--coefficients", "{tmp}/small.pt"], "2 layers of 256"),
        (["--control", "attention_temperature", "--factor", "-1"], "above 0"),
    ],
)
def test_bad_input_is_one_message_and_nothing_written(
    ke_ray, golden, scan, tmp_path, arguments, expected
):
    torch.save({"f": np.zeros}, tmp_path / "pickle.pt")
    torch.save(torch.ones(2, 12), tmp_path / "small.pt")
    out = tmp_path / "new"
    given = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    if "--coefficients" not in given:
        given += ["--coefficients", str(scan)]
    result = ke_ray("resuscitate", golden / "hf", *given, "--output", out)
    assert result.code == 2, result.err
    assert len(result.err.strip().splitlines()) == 1
    assert expected in result.err
    assert not out.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".new")]


def test_an_occupied_folder_and_a_series_are_refused(ke_ray, golden, scan, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "note").write_text("mine")
    arguments = ["--coefficients", scan, "--ratio", 0.5]
    result = ke_ray("resuscitate", golden / "hf", *arguments, "--output", taken)
    assert result.code == 2
    assert "exists already" in result.err
    assert [path.name for path in taken.iterdir()] == ["note"]
    for step in (1, 2):
        (tmp_path / f"series/step{step}").parent.mkdir(exist_ok=True)
        (tmp_path / f"series/step{step}").symlink_to(golden / "hf")
    result = ke_ray("resuscitate", tmp_path / "series", *arguments, "--output", tmp_path / "new")
    assert result.code == 2
    assert re.search(r"names 2 checkpoints \(step1, step2\)", result.err)


def test_no_native_layout_for_another_family(ke_ray, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    torch.save(torch.rand(2, 24), tmp_path / "c.pt")
    arguments = ["--coefficients", tmp_path / "c.pt", "--ratio", 0.5, "--layout", "native"]
    result = ke_ray("resuscitate", tmp_path / "llama", *arguments, "--output", tmp_path / "new")
    assert result.code == 2
    assert "llama" in result.err
    assert not (tmp_path / "new").exists()
    result = ke_ray("resuscitate", tmp_path / "llama", *arguments[:-2], "-o", tmp_path / "new")
    assert result.code == 0, result.err
