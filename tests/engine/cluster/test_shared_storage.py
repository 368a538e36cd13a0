"""Every node is asked for the stores of a command before work starts."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest
import s3fs

from ke_ray.engine.cluster import shared_storage
from ke_ray.engine.cluster.shared_storage import check_nodes_see
from ke_ray.errors import StorageError


@pytest.fixture(autouse=True)
def _nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two other nodes; the real function answers here what they are asked."""

    def ask(question: Callable[..., Any], *arguments: Any) -> list[tuple[str, Any]]:
        return [(node, question(*arguments)) for node in ("10.77.0.2", "10.77.0.3")]

    monkeypatch.setattr(shared_storage, "ask_other_nodes", ask)
    monkeypatch.setattr(shared_storage, "other_nodes", lambda: ["10.77.0.2", "10.77.0.3"])


def test_stores_that_answer_and_what_is_no_store_are_taken() -> None:
    check_nodes_see(
        [
            ("The checkpoint", "memory://series/step1"),
            ("data", "hf:org/name"),
            ("data", "https://no-such-host.invalid/data.json"),
            ("data", None),
        ],
        "memory://out",
    )


@pytest.mark.parametrize("place", ["input", "output"])
def test_a_silent_store_is_named_with_all_nodes(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_storage, "_STORE_TIMEOUT_S", 0.3)
    s3fs.S3FileSystem.clear_instance_cache()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "AWS_ACCESS_KEY_ID": "tests",
            "AWS_SECRET_ACCESS_KEY": "tests",
        }.items():
            monkeypatch.setenv(name, value)
        inputs = [("corpus.source", "s3://bucket/data/*.json")] if place == "input" else []
        with pytest.raises(StorageError, match=r"10\.77\.0\.2, 10\.77\.0\.3: no answer") as refused:
            check_nodes_see(inputs, "s3://bucket/out" if place == "output" else None)
    assert "'s3://bucket/" in str(refused.value)
    assert "environment of `ray start`" in str(refused.value)
    s3fs.S3FileSystem.clear_instance_cache()
