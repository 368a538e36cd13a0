"""What a scan finds out before Ray starts."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from ke_ray.engine.scan_setup import prepare_scan
from ke_ray.errors import ResultsError


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
