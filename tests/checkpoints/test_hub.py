"""The Hub, imitated by a real local server: revisions, hashes, rate limits, downloads, refusals."""

from __future__ import annotations

import logging
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fake_hub import FakeHub, serving

from ke_ray.checkpoints import hub as hub_module
from ke_ray.checkpoints.fetch.cache import Store
from ke_ray.checkpoints.find import catalog
from ke_ray.checkpoints.find.catalog import find_checkpoints, list_checkpoints
from ke_ray.checkpoints.formats.fingerprint import weights_sha256
from ke_ray.checkpoints.transfer import RetryPolicy
from ke_ray.errors import CheckpointError, CheckpointSpecError
from ke_ray.models.configuration import read_config
from ke_ray.models.loading import load_model
from ke_ray.models.saving import save_model

QUICK = RetryPolicy(attempts=3, backoff_s=0.02, max_retry_after_s=1.0, timeout_s=2.0)
TOKEN = "hf_planted_secret_0123456789"


@pytest.fixture
def hub(tmp_path: Path, tiny_decoder, monkeypatch) -> Iterator[FakeHub]:
    root = tmp_path / "hub"
    repo = root / "org" / "series"
    for step in (0, 1, 2, 1000):
        save_model(tiny_decoder("llama", seed=step), repo / f"step{step}-tokens{step}B")
    shutil.copytree(repo / "step1000-tokens1000B", repo / "main")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving(root) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def test_revisions_with_a_step_are_the_series(hub: FakeHub) -> None:
    refs = list_checkpoints("org/series")
    assert [ref.step for ref in refs] == [0, 1, 2, 1000]
    assert refs[3].tokens == 10**12
    assert refs[3].revision == "step1000-tokens1000B"
    assert refs[3].commit == hub.commit("org/series", "step1000-tokens1000B")
    folder = hub.root / "org" / "series" / "step1-tokens1B"
    assert refs[1].size_bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert [ref.duplicate_of for ref in refs] == [None] * 4
    assert not any("resolve" in request for request in hub.requests)
    assert refs == list_checkpoints("hf://org/series")


def rename(repo: Path, names: dict[str, str]) -> None:
    for old, new in names.items():
        (repo / old).rename(repo / new)


def test_main_ends_the_series_where_its_weights_are_its_own(hub: FakeHub, tiny_decoder) -> None:
    repo = hub.root / "org" / "series"
    rename(repo, {"step0-tokens0B": "ckpt_000", "step1-tokens1B": "ckpt_001"})
    rename(repo, {"step2-tokens2B": "ckpt_002", "step1000-tokens1000B": "ckpt_003"})
    assert [ref.revision for ref in list_checkpoints("org/series")][-1] == "ckpt_003"
    shutil.rmtree(repo / "main")
    save_model(tiny_decoder("llama", seed=9), repo / "main")
    listing = find_checkpoints("org/series")
    assert [ref.revision for ref in listing.checkpoints][-2:] == ["ckpt_003", "main"]
    assert any("count checkpoints" in note for note in listing.notes)
    assert [ref.revision for ref in list_checkpoints("org/series", limit=2)] == ["ckpt_000", "main"]


def test_revisions_that_are_not_understood_are_named(hub: FakeHub, tiny_decoder) -> None:
    repo = hub.root / "org" / "series"
    rename(repo, {"step1-tokens1B": "fp16", "step2-tokens2B": "dev"})
    listing = find_checkpoints("org/series")
    assert [ref.step for ref in listing.checkpoints] == [0, 1000]
    (note,) = listing.notes
    assert "2 revisions have names that are not understood" in note
    assert "(fp16, dev)" in note
    assert "--revisions '*'" in note
    assert len(find_checkpoints("org/series", revisions="*").checkpoints) == 5
    pattern = r"(?P<step>\d+)$"
    refs = list_checkpoints("org/series", step_pattern=pattern)  # fp16 has a number after all
    assert [(ref.revision, ref.step) for ref in refs] == [
        ("step0-tokens0B", 0),
        ("fp16", 16),
        ("step1000-tokens1000B", 1000),
    ]


def test_names_without_a_number_are_all_kept_in_the_hubs_order(hub: FakeHub, tiny_decoder) -> None:
    repo = hub.root / "org" / "series"
    rename(repo, {"step0-tokens0B": "kestrel", "step1-tokens1B": "ocelot"})
    rename(repo, {"step2-tokens2B": "jellyfish", "step1000-tokens1000B": "deeper-starling"})
    listing = find_checkpoints("org/series")  # main has the weights of deeper-starling
    names = [ref.revision for ref in listing.checkpoints]
    assert names == ["ocelot", "kestrel", "jellyfish", "deeper-starling"]  # as the stand-in answers
    assert {ref.step for ref in listing.checkpoints} == {None}
    (note,) = listing.notes
    assert "4 of 4 checkpoints have no step" in note
    assert "in the Hub's order" in note
    shutil.rmtree(repo / "main")
    save_model(tiny_decoder("llama", seed=9), repo / "main")
    assert [ref.revision for ref in list_checkpoints("org/series")][-1] == "main"


def test_selection_asks_only_for_what_is_selected(hub: FakeHub) -> None:
    refs = list_checkpoints("org/series", steps="1:", every=2)
    assert [ref.step for ref in refs] == [1, 1000]
    assert sum("/tree/" in request for request in hub.requests) == 4  # two pages each
    assert [ref.revision for ref in list_checkpoints("org/series@main")] == ["main"]
    assert [ref.step for ref in list_checkpoints("org/series", revisions="step?-*")] == [0, 1, 2]


def test_branches_with_the_weights_of_others_are_flagged_before_any_download(
    hub: FakeHub,
) -> None:
    repo = hub.root / "org" / "series"
    for wrong in ("step1-tokens1B", "step2-tokens2B"):
        shutil.copyfile(
            repo / "step1000-tokens1000B" / "model.safetensors", repo / wrong / "model.safetensors"
        )
    refs = list_checkpoints("org/series", revisions="*")
    flagged = {ref.name: ref.duplicate_of for ref in refs}
    original = "step1-tokens1B"
    assert flagged == {
        "step0-tokens0B": None,
        "step1-tokens1B": None,
        "step2-tokens2B": original,
        "step1000-tokens1000B": original,
        "main": original,
    }
    assert not any("resolve" in request for request in hub.requests)


def test_fetched_files_are_those_of_the_listed_commit(hub: FakeHub, tmp_path: Path) -> None:
    refs = list_checkpoints("org/series", steps="0:1")
    with Store(tmp_path / "cache", policy=QUICK) as store:
        assert store.bytes_to_fetch(refs).num_bytes == sum(ref.size_bytes or 0 for ref in refs)
        for ref in refs:
            folder = store.fetch(ref)
            assert weights_sha256(folder) == weights_sha256(
                hub.root / "org" / "series" / str(ref.revision)
            )
            load_model(folder)
            names = {path.name for path in Path(folder).iterdir()}
            assert names == {"config.json", "generation_config.json", "model.safetensors"}
    asked = [request for request in hub.requests if "/resolve/" in request]
    assert asked
    assert all(any(f"/{ref.commit}/" in request for ref in refs) for request in asked)


def test_a_configuration_is_read_without_the_weights(hub: FakeHub) -> None:
    config = read_config(list_checkpoints("org/series", limit=1)[0])
    assert (config.model_type, config.hidden_size) == ("llama", 32)
    assert not any(request.endswith("model.safetensors") for request in hub.requests)


def test_pickles_are_not_fetched_beside_safetensors(hub: FakeHub, tmp_path: Path) -> None:
    folder = hub.root / "org" / "series" / "step0-tokens0B"
    (folder / "pytorch_model.bin").write_bytes(b"x" * 1000)
    (folder / "optimizer.pt").write_bytes(b"x" * 1000)
    (ref,) = list_checkpoints("org/series", steps="0")
    with Store(tmp_path / "cache", policy=QUICK) as store:
        assert "pytorch_model.bin" not in {p.name for p in Path(store.fetch(ref)).iterdir()}
    assert not any("pytorch_model" in request or "optim" in request for request in hub.requests)


def test_a_rate_limit_is_waited_out(hub: FakeHub, tmp_path: Path) -> None:
    hub.refuse = [("/tree/", 429, {"Retry-After": "1"}), ("/refs", 503, {})]
    start = time.monotonic()
    assert len(list_checkpoints("org/series")) == 4
    assert time.monotonic() - start >= 1.0
    hub.refuse = [("resolve", 503, {}), ("resolve", 500, {})]
    with Store(tmp_path / "cache", policy=QUICK) as store:
        load_model(store.fetch(list_checkpoints("org/series", limit=1)[0]))


def test_what_is_not_there_is_said(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointSpecError, match=r"no folder 'org/none' here.*There is no 'org/no"
    ):
        list_checkpoints("org/none")
    with pytest.raises(
        CheckpointSpecError, match="no revision 'step1000-tokens1000'.*Did you mean"
    ):
        list_checkpoints("org/series@step1000-tokens1000")
    with pytest.raises(CheckpointSpecError, match="No revision of 'org/series' matches 'step9"):
        list_checkpoints("org/series", revisions="step9*")
    hub.refuse = [("/refs", 401, {})]
    with pytest.raises(CheckpointSpecError, match="set HF_TOKEN"):
        list_checkpoints("hf://org/series")
    hub.refuse = [("/refs", 403, {"X_Error_Code": "GatedRepo"})]
    with pytest.raises(CheckpointSpecError, match="gated"):
        list_checkpoints("hf://org/series")
    refs = list_checkpoints("org/series")
    shutil.rmtree(hub.root / "org" / "series" / "step2-tokens2B")
    (hub.root / "org" / "series" / "step1-tokens1B" / "model.safetensors").unlink()
    with Store(tmp_path / "cache", policy=QUICK) as store:
        with pytest.raises(CheckpointError, match="no revision"):
            store.fetch(refs[2])
        with pytest.raises(CheckpointError, match="holds no config"):
            store.fetch(refs[1])


def test_a_revision_without_weights_is_a_broken_checkpoint_or_none(hub: FakeHub) -> None:
    (hub.root / "org" / "series" / "step2-tokens2B" / "model.safetensors").unlink()
    (hub.root / "org" / "series" / "main" / "model.safetensors").unlink()
    assert [ref.step for ref in list_checkpoints("org/series", revisions="*")] == [0, 1, 2, 1000]
    with pytest.raises(CheckpointSpecError, match="None of the selected revisions of .* weights"):
        list_checkpoints("org/series@main")


def test_no_network_is_said_within_20_seconds(monkeypatch) -> None:
    for module in (hub_module, catalog):
        assert module._FIRST_ANSWER_S < 20
        monkeypatch.setattr(module, "_FIRST_ANSWER_S", 1.0)

    def refused(spec: str, endpoint: str) -> None:
        with pytest.raises(CheckpointSpecError, match="Cannot reach"):
            list_checkpoints(spec, endpoint=endpoint)

    # A port where nobody listens, and a server that accepts and never answers.
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor() as pool:
        mute = f"http://127.0.0.1:{silent.getsockname()[1]}"
        calls = [
            pool.submit(refused, spec, endpoint)
            for spec, endpoint in (
                ("org/series", "http://127.0.0.1:9"),
                ("org/series", mute),
                (f"{mute}/step1-unsharded/", mute),
            )
        ]
        for call in calls:
            call.result()


def test_offline_mode_is_named(hub: FakeHub, monkeypatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointSpecError, match="HF_HUB_OFFLINE is set"):
        list_checkpoints("org/series")


def test_the_token_goes_into_the_header_and_nowhere_else(
    hub: FakeHub, tmp_path: Path, caplog, capfd
) -> None:
    caplog.set_level(logging.DEBUG)
    refs = list_checkpoints("org/series", limit=1)
    with Store(tmp_path / "cache", policy=QUICK) as store:
        store.fetch(refs[0])
    messages = [repr(refs)]
    for refusal in (401, 404, 500):
        hub.refuse = [("/refs", refusal, {})] * 4
        with pytest.raises(CheckpointSpecError) as caught:
            list_checkpoints("org/series")
        messages.append(str(caught.value))
    assert f"Bearer {TOKEN}" in hub.tokens
    out, err = capfd.readouterr()
    texts = [caplog.text, out, err, *messages]
    texts += [
        path.read_bytes().decode("latin-1")
        for path in (tmp_path / "cache").rglob("*")
        if path.is_file()
    ]
    assert not any(TOKEN in text for text in texts)
