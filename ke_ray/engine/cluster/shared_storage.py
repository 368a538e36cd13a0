"""Whether the nodes of a cluster see the files that a command needs, found out before work starts.

A local path means another disk on another node. Results that workers write there would be lost
with the node, so each node that can run work is asked for what the driver has.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ke_ray import storage
from ke_ray.errors import StorageError

__all__ = ["ask_other_nodes", "check_nodes_see", "other_nodes"]

#: A node starts a process for its answer, perhaps with a runtime environment to set up first.
_ANSWER_TIMEOUT_S = 120.0


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


def ask_other_nodes(question: Callable[..., Any], *arguments: Any) -> list[tuple[str, Any]]:
    """Call a function once on every other node that can run work, at once; needs a Ray session.

    Returns:
        (address of the node, answer). A node that has just gone runs no work either and is left
        out.

    Raises:
        StorageError: a node did not answer within two minutes.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    others, _ = _nodes()
    if not others:
        return []
    remote = ray.remote(num_cpus=0, max_retries=2)(question)
    asked = [
        remote.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(*arguments)
        for node in others
    ]
    _, late = ray.wait(asked, num_returns=len(asked), timeout=_ANSWER_TIMEOUT_S)
    addresses = [node["NodeManagerAddress"] for node in others]
    if late:
        silent = ", ".join(a for a, ref in zip(addresses, asked, strict=True) if ref in late)
        raise StorageError(
            f"No answer within {_ANSWER_TIMEOUT_S:.0f} seconds from {silent}, asked what it sees "
            "of this command's files and addresses. Look at `ray status`; remove a node that hangs."
        )
    answers = []
    for address, ref in zip(addresses, asked, strict=True):
        try:
            answers.append((address, ray.get(ref)))
        except ray.exceptions.RayError:
            continue
    return answers


def check_nodes_see(inputs: Iterable[tuple[str, str | None]], output: str | None = None) -> None:
    """Ask every node for local inputs and for the output folder; needs a Ray session.

    Args:
        inputs: (what it is, path or URI). Only local paths that exist on the driver are asked for:
            globs, Hub names and URIs mean the same everywhere, and what is missing has messages of
            its own.
        output: where workers write; None: the driver alone does.

    Raises:
        StorageError: a node sees something else than the driver; nothing was started.
    """
    if not other_nodes():
        return
    found = [
        (f"{what} '{place}'", storage.absolute(place))
        for what, place in dict.fromkeys(inputs)
        if place and storage.is_local(place) and storage.exists(place)
    ]
    mark = None
    if output is not None and storage.is_local(output):
        mark = storage.join(storage.absolute(output), f".seen-by-all-nodes-{secrets.token_hex(4)}")
        storage.write_atomic(mark, b"")
        found.append((f"The output folder '{output}'", mark))
    try:
        answers = ask_other_nodes(_missing, [path for _, path in found])
    finally:
        if mark is not None:
            storage.remove(mark)
    for address, unseen in answers:
        if unseen:
            raise StorageError(
                f"{found[unseen[0]][0]} lies on the driver's disk, and the node "
                f"{address} does not see it there. Give a folder that all nodes "
                "share, or a URI (s3://, gs://, …)."
            )


def _missing(paths: Sequence[str]) -> list[int]:
    return [number for number, path in enumerate(paths) if not Path(path).exists()]
