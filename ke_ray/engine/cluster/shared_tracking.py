"""A check that the nodes of a cluster reach the MLflow store of a command, before work starts.

Trials and training workers write to the store themselves, wherever Ray places them. An address that
only the driver's machine understands would lose what they log, or log it somewhere else.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from ke_ray.engine.cluster.shared_storage import ask_other_nodes, names_of_nodes, other_nodes
from ke_ray.errors import StorageError
from ke_ray.secrets import redact
from ke_ray.studies.parts import TrackingSettings, is_loopback
from ke_ray.tracking.tracker import store_uri

_ANSWER_TIMEOUT_S = 15.0
_SQLITE = "sqlite:///"
_REMEDY = (
    "Run an MLflow server at an address that all nodes reach (mlflow server --host …) and give it "
    "with --mlflow-uri or MLFLOW_TRACKING_URI, or switch tracking off with --no-mlflow."
)


def check_nodes_reach_store(settings: TrackingSettings) -> None:
    """Ask every other node for the study's MLflow store; needs a Ray session and an open store.

    Raises:
        StorageError: the address is a loopback one and there are nodes on other machines, or nodes
            do not reach the store; all of them are named, and nothing was started.
    """
    if not settings.enabled:
        return
    uri = store_uri(settings)
    is_server = uri.startswith(("http://", "https://"))
    elsewhere = other_nodes(on_other_machines=True)
    if is_server and elsewhere and is_loopback(uri):
        raise StorageError(
            f"The MLflow address '{redact(uri)}' is a loopback address, which means another "
            f"machine on each node: {names_of_nodes(elsewhere)} would not find the store. {_REMEDY}"
        )
    if is_server:
        address = _without_login(uri)
    elif uri.startswith(_SQLITE):  # a relative path means another folder to another node
        address = _SQLITE + str(Path(uri.removeprefix(_SQLITE)).absolute())
    else:
        return  # a database server, with drivers and networks of its own
    answers = ask_other_nodes(_unreachable, address)
    failures = {node: reason for node, reason in answers if reason}
    if failures:
        reasons = sorted({redact(reason) for reason in failures.values()})
        raise StorageError(
            f"The MLflow store '{redact(uri)}' is not reached from {names_of_nodes(failures)}: "
            f"{'; '.join(reasons[:3])}. {_REMEDY}"
        )


def _without_login(uri: str) -> str:
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _unreachable(uri: str) -> str:
    """Why this node does not reach a store; empty where it does."""
    if uri.startswith(_SQLITE):
        path = uri.removeprefix(_SQLITE).split("?")[0]
        return "" if Path(path).exists() else f"there is no file {path}"
    import requests

    try:
        # Any answer will do, also of a proxy that requires a login: what the store says to writes
        # is not for this check to know.
        requests.get(f"{uri.rstrip('/')}/health", timeout=_ANSWER_TIMEOUT_S, stream=True).close()
    except requests.exceptions.SSLError:
        return ""  # it answers; MLFLOW_TRACKING_INSECURE_TLS and the like decide what follows
    except requests.exceptions.Timeout:
        return f"no answer within {_ANSWER_TIMEOUT_S:.0f} seconds"
    except requests.exceptions.ConnectionError as error:
        return _first_cause(error)
    except requests.exceptions.RequestException as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def _first_cause(error: BaseException) -> str:
    """``Connection refused``, without the layers that requests and urllib3 wrap it in."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        inner = getattr(cause, "reason", None) or (cause.args[0] if cause.args else None)
        cause = inner if isinstance(inner, BaseException) else cause.__cause__ or cause.__context__
    return f"{type(error).__name__}"
