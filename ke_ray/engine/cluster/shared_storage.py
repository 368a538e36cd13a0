"""A check that the nodes of a cluster see the files that a command needs, before work starts.

A local path means another disk on another node. Results that workers write there would be lost
with the node, so each node that can run work looks for what the driver has, and tries the stores
that it will read from and write to.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ke_ray import storage
from ke_ray.errors import StorageError
from ke_ray.secrets import redact

#: A node starts a process for its answer, perhaps with a runtime environment to set up first.
_ANSWER_TIMEOUT_S = 120.0
#: A store that is reached answers within a second; drivers try for minutes.
_STORE_TIMEOUT_S = 20.0
_WEB = ("http://", "https://", "hf://")


def other_nodes(*, on_other_machines: bool = False) -> list[str]:
    """Addresses of the nodes that can run work, the driver's own left out.

    Args:
        on_other_machines: leave out nodes that share the driver's address too.
    """
    nodes, driver = _nodes()
    here = {node["NodeManagerAddress"] for node in driver} if on_other_machines else set()
    return [n["NodeManagerAddress"] for n in nodes if n["NodeManagerAddress"] not in here]


def _nodes() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The other nodes that can run work, and the driver's."""
    import ray

    driver = ray.get_runtime_context().get_node_id()
    alive = [node for node in ray.nodes() if node["Alive"]]
    others = [
        node
        for node in alive
        if node["NodeID"] != driver
        and (node["Resources"].get("CPU") or node["Resources"].get("GPU"))
    ]
    return others, [node for node in alive if node["NodeID"] == driver]


def names_of_nodes(nodes: Iterable[str]) -> str:
    """``the nodes 10.0.0.2, 10.0.0.3``, eight of them at most."""
    names = list(dict.fromkeys(nodes))
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"the node{'s' if len(names) > 1 else ''} {shown}"


def ask_other_nodes(question: Callable[..., Any], *arguments: Any) -> list[tuple[str, Any]]:
    """Call a function once on every other node that can run work, at once; needs a Ray session.

    Returns:
        (address of the node, answer). A node that has just gone runs no work either and is left
        out.

    Raises:
        StorageError: a node did not answer within two minutes, or could not.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    others, _ = _nodes()
    if not others:
        return []
    remote = ray.remote(num_cpus=0, max_retries=2)(question)
    pending = [
        remote.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(*arguments)
        for node in others
    ]
    _, late = ray.wait(pending, num_returns=len(pending), timeout=_ANSWER_TIMEOUT_S)
    addresses = [node["NodeManagerAddress"] for node in others]
    if late:
        silent = [a for a, ref in zip(addresses, pending, strict=True) if ref in late]
        raise StorageError(
            f"{names_of_nodes(silent)} did not answer within {_ANSWER_TIMEOUT_S:.0f} seconds. Look "
            "at `ray status`; remove a node that hangs."
        )
    answers = []
    for address, ref in zip(addresses, pending, strict=True):
        try:
            answers.append((address, ray.get(ref)))
        except ray.exceptions.RayTaskError as error:
            raise StorageError(f"The node {address} could not answer: {error.cause}") from error
        except ray.exceptions.RayError:
            continue
    return answers


def check_nodes_see(inputs: Iterable[tuple[str, str | None]], output: str | None = None) -> None:
    """Ask every node for local inputs, stores and the output folder; needs a Ray session.

    Args:
        inputs: (what it is, path or URI). Local paths that exist on the driver are checked, and one
            URI of each store (``s3://bucket``): globs and Hub names mean the same everywhere, and
            what is missing has messages of its own.
        output: where workers write; None: the driver alone does.

    Raises:
        StorageError: a node sees something else than the driver, or does not reach a store; nothing
            was started.
    """
    if not other_nodes():
        return
    inputs = list(dict.fromkeys(inputs))
    files = [
        (f"{what} '{path}'", storage.absolute(path))
        for what, path in inputs
        if path and storage.is_local(path) and storage.exists(path)
    ]
    uris = [uri for _, uri in [*inputs, ("", output)] if uri and not storage.is_local(uri)]
    # Web servers and the Hub are left out: they are read in other ways than this could try.
    stores = {"/".join(uri.split("/")[:3]): uri for uri in uris if not uri.startswith(_WEB)}
    mark = None
    if output is not None and storage.is_local(output):
        mark = storage.join(storage.absolute(output), f".ke-ray-{secrets.token_hex(8)}-seen")
        storage.write_atomic(mark, b"")
        files.append((f"The output folder '{output}'", mark))
    try:
        answers = ask_other_nodes(_look, [path for _, path in files], stores)
    finally:
        if mark is not None:
            storage.remove(mark)
    for address, (unseen, _) in answers:
        if unseen:
            raise StorageError(
                f"{files[unseen[0]][0]} lies on the driver's disk, and the node "
                f"{address} does not see it there. Give a folder that all nodes "
                "share, or a URI (s3://, gs://, …)."
            )
    for store, uri in stores.items():
        failures = {node: reasons[store] for node, (_, reasons) in answers if store in reasons}
        if failures:
            raise StorageError(
                f"'{redact(uri)}' is not reached from {names_of_nodes(failures)}: "
                f"{'; '.join(sorted(set(failures.values()))[:3])} Nodes need the way to the store, "
                "and its address and keys in the environment of `ray start`."
            )


def _look(paths: Sequence[str], stores: dict[str, str]) -> tuple[list[int], dict[str, str]]:
    """On a node: the numbers of paths that it does not see; stores not reached, with the reason."""
    missing = [number for number, path in enumerate(paths) if not Path(path).exists()]
    reasons = {store: _unreached(uri) for store, uri in stores.items()}
    return missing, {store: reason for store, reason in reasons.items() if reason}


def _unreached(uri: str) -> str:
    """Why this node does not reach a store; empty where it does."""
    reasons = [f"no answer within {_STORE_TIMEOUT_S:.0f} seconds."]

    def look() -> None:
        storage.forget_store(uri)  # the command reaches it, which says nothing about this node
        try:
            storage.exists(uri)
        except (OSError, StorageError) as error:
            reasons.append(str(error))
        else:
            reasons.append("")

    # Drivers have limits of their own, and longer ones.
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(_STORE_TIMEOUT_S)
    return reasons[-1]
