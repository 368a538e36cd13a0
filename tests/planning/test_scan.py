"""What a scan finds out before Ray starts."""

from __future__ import annotations

import json
import shutil

import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers

from ke_ray.core.measures import DEFAULT_MEASURES
from ke_ray.errors import CheckpointError, DataError, ResultsError, UnsupportedArchitectureError
from ke_ray.planning.scan import prepare_scan
from ke_ray.planning.scan_forecast import forecast
from ke_ray.studies.scan import ScanStudy


@pytest.mark.parametrize(
    ("stored", "scored", "item_bytes"),
    [("float32", "float32", 4), ("bfloat16", "float32", 4), ("float32", "bfloat16", 2)],
)
def test_memory_is_counted_in_the_dtype_that_is_scored(
    scan_study, series, tmp_path, stored, scored, item_bytes
):
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "stored" / "step1"
    model = AutoModelForCausalLM.from_pretrained(series / "step10", dtype=getattr(torch, stored))
    model.save_pretrained(folder)
    setup = prepare_scan(scan_study(checkpoints={"spec": str(folder)}, dtype=scored))
    # What else is in the folder counts with the weights: a few hundred bytes of configuration.
    assert setup.model_bytes == pytest.approx(model.num_parameters() * item_bytes, rel=0.05)


@pytest.fixture
def base_model(series, tmp_path):
    """A checkpoint saved from the bare body, without the LM head."""
    from transformers import OlmoModel

    folder = tmp_path / "base" / "step10"
    OlmoModel.from_pretrained(series / "step10").save_pretrained(folder)
    return folder


def test_default_measures_leave_out_what_a_base_model_lacks(scan_study, base_model, caplog):
    study = scan_study(checkpoints={"spec": str(base_model)})
    study = study.model_copy(update={"measures": DEFAULT_MEASURES})
    study = ScanStudy.model_validate(study.model_dump(exclude={"measures"}))
    setup = prepare_scan(study)
    expected = [name for name in DEFAULT_MEASURES if name != "next_token_entropy"]
    assert list(setup.study.measures) == expected
    assert list(setup.works[0].corpora[0].measures) == expected
    assert setup.folder.manifest["measures"] == expected
    assert "has no next_token_entropy; the other default measures" in caplog.text


def test_a_measure_that_a_base_model_lacks_is_refused_where_it_is_named(scan_study, base_model):
    study = scan_study(
        checkpoints={"spec": str(base_model)}, measures=["next_token_entropy", "loss"]
    )
    remedy = r"names OlmoModel.*Leave next_token_entropy and loss out"
    with pytest.raises(UnsupportedArchitectureError, match=remedy):
        prepare_scan(study)


def test_a_study_takes_one_measure_as_a_text(scan_study):
    assert scan_study(measures="gini, knowledge_entropy").measures == ("knowledge_entropy", "gini")
    with pytest.raises(ValidationError, match="unknown measure 'entropy'"):
        scan_study(measures="entropy")


def test_checkpoints_that_cannot_be_read_are_not_answered_with_a_missing_token_id(
    scan_study, tmp_path
):
    folder = tmp_path / "broken" / "step10"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "olmo"}')
    documents = tmp_path / "documents.jsonl"
    documents.write_text('{"text": "words"}\n')
    study = scan_study(checkpoints={"spec": str(folder)}, data={"x": str(documents)})
    with pytest.raises(CheckpointError, match="holds no weights"):
        prepare_scan(study)


def test_data_that_can_never_be_read_are_refused_before_checkpoints_are_listed(scan_study):
    source = "hf:allenai/dolma:v1_6-sample:train"
    study = scan_study(checkpoints={"spec": "no/such*"}, data={"x": source})
    for plan in (prepare_scan, forecast):
        with pytest.raises(DataError, match=r"dolma\.py.*https://olmo-data\.org/"):
            plan(study)


def test_checkpoints_without_a_tokenizer_name_the_option(scan_study, tmp_path):
    documents = tmp_path / "documents.jsonl"
    documents.write_text('{"text": "words"}\n')
    with pytest.raises(DataError, match=r"no tokenizer\.json; give one with --tokenizer"):
        prepare_scan(scan_study(data={"x": str(documents)}))


def test_every_series_must_be_able_to_read_the_same_token_ids(scan_study, series, tmp_path, caplog):
    for name, change in (("small", {}), ("deep", {"num_hidden_layers": 3, "vocab_size": 130})):
        folder = tmp_path / "mixed" / name / "step1"
        shutil.copytree(series / ("step10" if name == "small" else "step20"), folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
    study = scan_study(checkpoints={"spec": str(tmp_path / "mixed" / "*" / "*")})
    assert not prepare_scan(study).steps_rise
    assert "2 architectures or sizes" in caplog.text
    assert "has a vocabulary of 128" in caplog.text or "one of 128" in caplog.text
    short = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 8}
    (folder / "config.json").write_text(json.dumps(short))
    with pytest.raises(DataError, match="has 8 positions"):
        prepare_scan(study)


@pytest.fixture
def document_study(scan_study, tmp_path):
    """A study of documents, many of which two instances share."""
    documents = tmp_path / "documents.jsonl"
    lines = [json.dumps({"text": " ".join("abcdef"[n % 6] * (1 + n % 90))}) for n in range(400)]
    documents.write_text("\n".join(lines))
    tokenizer = tmp_path / "tokenizer.json"
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate("_abcdef")}, "_"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tokenizer))

    def study(**keys):
        return scan_study(
            data={"text": str(documents)},
            num_instances=70,
            sequence_length=16,
            tokenizer=str(tokenizer),
            eos_token_id=0,
            **keys,
        )

    return study


def test_identity_and_manifest_tell_how_instances_were_drawn(document_study):
    for sampling in ("spread", "first"):
        setup = prepare_scan(document_study(sampling=sampling))
        corpus, manifest = setup.corpora["text"], setup.folder.manifest
        assert manifest["identity"]["sampling"] == {"text": sampling}
        assert manifest["identity"]["groups"] == {"text": corpus.grouping}
        about = manifest["corpora"]["text"]
        assert sum(about["group_sizes"]) == 70
        assert (about["stderr_factor"] > 1.05) == (sampling == "first")
        assert setup.works[0].corpora[0].group_sizes == corpus.group_sizes
    assert prepare_scan(document_study()).corpora["text"].sampling == "spread"


def test_a_folder_of_an_earlier_version_goes_on_with_first_and_not_with_spread(document_study):
    first = document_study(sampling="first")
    manifest = prepare_scan(first).folder.manifest
    for key in ("sampling", "groups"):
        del manifest["identity"][key]
    for key in ("sampling", "group_sizes", "stderr_factor", "note"):
        del manifest["corpora"]["text"][key]
    setup = prepare_scan(first)
    setup.folder.manifest = manifest
    setup.folder.write_manifest()
    with pytest.raises(ResultsError, match="first instances.*--sampling first"):
        prepare_scan(document_study())
    again = prepare_scan(first)
    assert again.folder.manifest["identity"]["sampling"] == {"text": "first"}
    assert again.folder.manifest["corpora"]["text"]["sampling"] == "first"


def test_ready_made_ids_keep_their_order_and_their_old_folders(scan_study):
    study = scan_study()
    setup = prepare_scan(study)
    assert setup.folder.manifest["identity"]["sampling"] == {"ids": "stored"}
    for key in ("sampling", "groups"):
        del setup.folder.manifest["identity"][key]
    setup.folder.write_manifest()
    assert prepare_scan(study).folder.manifest["identity"]["groups"] == {"ids": "equal"}
