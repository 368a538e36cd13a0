"""A store that refuses, fails or is not there is one message and an exit code, in every command."""

from __future__ import annotations

import itertools
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs
from fault_proxy import FaultProxy
from tiny_studies import tiny_continual, tiny_pretrain, write_study
from tiny_sweep import tiny_sweep

from ke_ray.checkpoints.fetch.checkpoint import fetch_into
from ke_ray.checkpoints.reference import CheckpointRef
from ke_ray.cli import main
from ke_ray.errors import StoreOutageError
from ke_ray.storage import patience

STORE = "s3://results"


class Store:
    """An S3 service that answers all requests as ``rules`` say, and its address."""

    def __init__(self, proxy: FaultProxy, folder: Path) -> None:
        self.address = f"http://127.0.0.1:{proxy.server_port}"
        self._folder = folder

    def answer(self, fault: str) -> None:
        rule = {"fault": fault, "share": 1.0}
        (self._folder / "faults.json").write_text(json.dumps([rule]))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    with FaultProxy(("127.0.0.1", 0), 9, tmp_path) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        store = Store(proxy, tmp_path)
        for name, value in {
            "AWS_ENDPOINT_URL": store.address,
            "AWS_ACCESS_KEY_ID": "tests",
            "AWS_SECRET_ACCESS_KEY": "tests",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",  # the client's own retries take seconds
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
        monkeypatch.setattr(patience, "_answered", set())  # a store that never answered
        s3fs.S3FileSystem.clear_instance_cache()
        yield store
        s3fs.S3FileSystem.clear_instance_cache()
        proxy.shutdown()


@pytest.fixture(scope="module")
def commands(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The words of every command that reads or writes a store, with the store's address."""
    folder = tmp_path_factory.mktemp("studies")
    checkpoint = str(pretrained / "checkpoints" / "step10")
    output = Path(folder / "out")
    studies = {
        "pretrain": tiny_pretrain(output),
        "continual": tiny_continual(output, pretrained),
        "sweep": tiny_sweep(output, pretrained),
    }
    words = {
        name: [name, str(write_study(study, folder / f"{name}.yaml")), "--output", f"{STORE}/out"]
        for name, study in studies.items()
    }
    scan = ["--data", f"ids={STORE}/ids.npy", "--num-instances", "4", "--sequence-length", "8"]
    return words | {
        "scan": ["scan", f"{STORE}/series", *scan, "--output", str(folder / "scan"), "--no-mlflow"],
        "scan of stored ids": ["scan", checkpoint, *scan, "--output", str(folder / "scan")],
        "checkpoints": ["checkpoints", f"{STORE}/series"],
        "results": ["results", f"{STORE}/scan"],
        "report": ["report", f"{STORE}/scan", "--output", str(folder / "report.html")],
        "status": ["status", f"{STORE}/scan"],
        "weights": ["weights", f"{STORE}/scan"],
        "compare": ["compare", f"{STORE}/scan"],
        "relate": ["relate", f"{STORE}/scan", f"{STORE}/continual"],
        "resuscitate": [
            *("resuscitate", f"{STORE}/series/step10", "--output", str(folder / "again")),
            *("--coefficients", f"{STORE}/scan", "--ratio", "0.5", "--factor", "2"),
        ],
    }


#: Each command meets one of them; writers also a bucket that is not there.
FAULTS = ("503", "no credentials", "500", "403", "reset", "404")
COMMANDS = (
    *("pretrain", "continual", "sweep", "scan", "scan of stored ids", "checkpoints", "results"),
    *("report", "status", "weights", "compare", "relate", "resuscitate"),
)
CASES = [*zip(COMMANDS, itertools.cycle(FAULTS), strict=False), ("pretrain", "404")]


def ended(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["ke-ray", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@pytest.mark.parametrize(("command", "fault"), CASES)
def test_it_is_one_message(
    store: Store,
    commands: dict[str, list[str]],
    command: str,
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if fault == "no credentials":
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("HOME", "/nonexistent")
    store.answer("403" if fault == "no credentials" else fault)
    code = ended(commands[command], monkeypatch)
    said = capfd.readouterr().err
    assert code == 2, said
    assert "Traceback" not in said
    assert said.count("ke-ray: ") == 1, said
    assert STORE in said


def test_an_outage_of_its_store_makes_no_checkpoint_a_broken_one(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KE_RAY_STORE_GIVE_UP_S", "0.1")
    patience._answered.add(STORE)  # it was listed from there
    store.answer("503")
    ref = CheckpointRef("step10", f"{STORE}/series/step10", "hf")
    with pytest.raises(StoreOutageError, match="Finished work is saved"):
        fetch_into(ref, tmp_path)
