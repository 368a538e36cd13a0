"""Scans of published values over HTTP, in both layouts, and of data that needs a tokenizer."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import shutil
import threading

import pytest
from checkpoint_site import Site, refs_of

from ke_ray.results import ScanFolder
from ke_ray.studies.scan import ScanStudy

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture
def scanned(scan):
    """Runs a scan given by its keys; its outcome and its rows."""

    def run(values):
        study = ScanStudy.model_validate(values | {"mlflow": {"enabled": False}})
        outcome = scan(study)
        return outcome, ScanFolder.open(study.output).entropy().to_pylist()

    return run


@contextlib.contextmanager
def served(folder):
    """A folder on a loopback HTTP server; yields its URL and what was asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(f"{self.command} {self.path}")

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_golden_values_over_http_in_both_layouts(scanned, reference_data, tmp_path):
    golden = reference_data / "golden"
    cache = tmp_path / "cache"
    with served(golden) as (url, asked):
        lines = ["Step,Checkpoint Directory"]
        for step, place in enumerate(
            ("tiny-seed0/hf", "tiny-seed0/olmo", "tiny-seed1/olmo"), start=1
        ):
            lines.append(f"{step},{url}/{place}/")
        (tmp_path / "list.csv").write_text("\n".join(lines))
        outcome, rows = scanned(
            {
                "checkpoints": {"spec": str(tmp_path / "list.csv")},
                "data": {"ids": str(golden / "tiny-seed0" / "inputs.safetensors")},
                "num_instances": 16,
                "sequence_length": 128,
                "num_actors": 2,
                "measures": ("knowledge_entropy", "knowledge_entropy_relu", "attention_entropy"),
                # Room for two checkpoints at a time; the third takes the place of one.
                "cache_dir": str(cache),
                "cache_bytes": 2_400_000,
                "output": str(tmp_path / "out"),
            }
        )
    assert outcome.exit_code == 0
    expected = json.loads((golden / "tiny-seed0" / "golden.json").read_text())["float64"]
    for measure in ("knowledge_entropy", "knowledge_entropy_relu", "attention_entropy"):
        per_layer = {
            (row["step"], row["layer"]): row["value"] for row in rows if row["measure"] == measure
        }
        for step in (1, 2):
            for layer, value in enumerate(expected[measure]["per_layer"]):
                assert per_layer[step, layer] == pytest.approx(value, abs=1e-5)
            assert per_layer[step, None] == pytest.approx(expected[measure]["sum"], abs=2e-5)
    by_step = {row["step"]: row for row in rows}
    # The layouts agree in the canonical hash, so the native copy is flagged.
    assert by_step[1]["weights_sha256"] == by_step[2]["weights_sha256"]
    assert by_step[2]["duplicate_of"] == by_step[1]["checkpoint"]
    assert by_step[3]["duplicate_of"] is None
    assert asked.count("GET /tiny-seed1/olmo/model.pt") == 1
    left = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    assert left <= 2_400_000


def test_more_checkpoints_are_fetched_ahead(scanned, reference_data, tmp_path):
    golden = reference_data / "golden" / "tiny-seed0"
    for step in range(3):
        folder = tmp_path / "site" / f"step{step}-unsharded"
        shutil.copytree(golden / "hf", folder)
    site = Site(tmp_path / "site")
    site.gate = threading.Barrier(3)  # nobody gets weights before three have asked for some
    threading.Thread(target=site.serve_forever, daemon=True).start()
    refs_of(site, tmp_path)
    outcome, rows = scanned(
        {
            "checkpoints": {"spec": str(tmp_path / "list.csv")},
            "data": {"ids": str(golden / "inputs.safetensors")},
            "num_instances": 16,
            "sequence_length": 128,
            "num_actors": 1,
            "prefetch": 2,
            "measures": ("knowledge_entropy",),
            "cache_dir": str(tmp_path / "cache"),
            "output": str(tmp_path / "out"),
        }
    )
    site.shutdown()
    assert outcome.exit_code == 0
    assert len({row["value"] for row in rows if row["layer"] is None}) == 1
    assert site.count("GET", ".safetensors") == 3


def test_padding_does_not_count_in_a_scan(scanned, reference_data, tmp_path):
    golden = reference_data / "golden" / "tiny-seed1"
    _, rows = scanned(
        {
            "checkpoints": {"spec": str(golden / "hf")},
            "data": {
                "padded": f"{golden}/inputs.safetensors#padded_input_ids,padded_attention_mask"
            },
            "num_instances": 16,
            "sequence_length": 128,
            "measures": ("knowledge_entropy", "next_token_entropy"),
            "output": str(tmp_path / "out"),
        }
    )
    expected = json.loads((golden / "golden.json").read_text())["float64_padded"]
    totals = {row["measure"]: row for row in rows if row["layer"] is None}
    assert totals["knowledge_entropy"]["step"] is None
    assert totals["knowledge_entropy"]["value"] == pytest.approx(
        expected["knowledge_entropy_masked_instance_mean"]["sum"], abs=2e-5
    )
    assert totals["next_token_entropy"]["value"] == pytest.approx(
        expected["next_token_entropy_masked_instance_mean"], abs=1e-5
    )


def test_documents_are_tokenised_with_what_the_checkpoint_brings(
    scanned, scan_study, series, tmp_path
):
    import shutil

    from ke_ray.data.tokenizer import save_tokenizer

    folder = tmp_path / "series"
    shutil.copytree(series, folder)
    texts = [f"document {number} about nothing in particular" for number in range(400)]
    (tmp_path / "texts.jsonl").write_text(
        "\n".join(json.dumps({"text": text, "id": str(i)}) for i, text in enumerate(texts))
    )
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = sorted({word for text in texts for word in text.split() if not word.isdigit()})
    vocabulary = {"<eos>": 0} | {word: number + 1 for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel({**vocabulary, "<unk>": 100}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for checkpoint in folder.iterdir():
        save_tokenizer(tokenizer, checkpoint, eos_token_id=0)
    outcome, rows = scanned(
        scan_study(
            checkpoints={"spec": str(folder)},
            data={"texts": str(tmp_path / "texts.jsonl")},
            num_instances=20,
            measures=("gini",),
        ).model_dump(exclude={"mlflow"})
    )
    assert outcome.exit_code == 0
    assert {row["corpus"] for row in rows} == {"texts"}
    assert {row["num_tokens"] for row in rows} == {20 * 24}
