"""Every node is asked for the MLflow store before work starts."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from ke_ray.engine.cluster import shared_tracking
from ke_ray.engine.cluster.shared_tracking import _unreachable, check_nodes_reach_store
from ke_ray.errors import StorageError
from ke_ray.studies.parts import TrackingSettings


class Refusing(BaseHTTPRequestHandler):
    """Answers 403, as a proxy before MLflow may."""

    def do_GET(self) -> None:
        self.send_error(403)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def answering() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def silent() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def nodes(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """A cluster of these other nodes; the real function answers here what they are asked."""

    def ask(question: Callable[..., Any], *arguments: Any) -> list[tuple[str, Any]]:
        return [(address, question(*arguments)) for address in addresses]

    def others(*, on_other_machines: bool = False) -> list[str]:
        return [a for a in addresses if not (on_other_machines and a == "127.0.0.1")]

    monkeypatch.setattr(shared_tracking, "ask_other_nodes", ask)
    monkeypatch.setattr(shared_tracking, "other_nodes", others)


def test_a_server_that_answers_anything_is_reached(answering: str) -> None:
    assert _unreachable(answering) == ""


def test_a_server_that_is_not_there_or_silent_is_not(
    silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_tracking, "_ANSWER_TIMEOUT_S", 0.5)
    assert "no answer within" in _unreachable(silent)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert _unreachable(f"http://127.0.0.1:{port}") == "Connection refused"
    assert _unreachable("http://no-such-host.invalid:5000") != ""


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_a_loopback_address_is_refused_where_there_are_other_machines(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes(monkeypatch, "10.77.0.2", "10.77.0.3")
    settings = TrackingSettings(uri=f"http://{host}:5000")
    with pytest.raises(StorageError, match="loopback") as refused:
        check_nodes_reach_store(settings)
    for part in (host, "10.77.0.2, 10.77.0.3", "--mlflow-uri", "--no-mlflow"):
        assert part in str(refused.value)
    check_nodes_reach_store(TrackingSettings(uri=settings.uri, enabled=False))


def test_a_loopback_address_is_taken_where_all_nodes_are_on_one_machine(
    answering: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes(monkeypatch, "127.0.0.1")
    check_nodes_reach_store(TrackingSettings(uri=answering))
    nodes(monkeypatch)
    check_nodes_reach_store(TrackingSettings(uri="http://127.0.0.1:1"))


def test_all_nodes_that_do_not_reach_the_store_are_named_and_no_login_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes(monkeypatch, "10.77.0.2", "10.77.0.3")
    monkeypatch.setenv(
        "MLFLOW_TRACKING_URI", "http://me:planted-password@no-such-host.invalid:5000"
    )
    with pytest.raises(
        StorageError, match=r"not reached from the nodes 10\.77\.0\.2, 10\.77\.0\.3"
    ) as e:
        check_nodes_reach_store(TrackingSettings())
    assert "planted-password" not in str(e.value)


def test_a_database_must_lie_where_all_nodes_see_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes(monkeypatch, "10.77.0.2")
    monkeypatch.chdir(tmp_path)
    settings = TrackingSettings(uri="sqlite:///store/mlflow.db")
    with pytest.raises(StorageError, match=f"there is no file {tmp_path}/store/mlflow.db"):
        check_nodes_reach_store(settings)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "mlflow.db").touch()
    check_nodes_reach_store(settings)
