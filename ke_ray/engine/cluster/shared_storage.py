"""Whether the nodes of a cluster see the files that a command needs, found out before work starts.

A local path means another disk on another node. Results that workers write there would be lost
with the node, so each node that can run work is asked for what the driver has.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path

from ke_ray import storage
from ke_ray.errors import StorageError

__all__ = ["check_nodes_see"]


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
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    driver = ray.get_runtime_context().get_node_id()
    others = [
        node
        for node in ray.nodes()
        if node["Alive"]
        and node["NodeID"] != driver
        and (node["Resources"].get("CPU") or node["Resources"].get("GPU"))
    ]
    if not others:
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
        missing = ray.remote(num_cpus=0, max_retries=2)(_missing)
        asked = [
            missing.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote([path for _, path in found])
            for node in others
        ]
        answers = []
        for answer in asked:
            try:
                answers.append(ray.get(answer))
            except ray.exceptions.RayError:  # a node that has just gone runs no work either
                answers.append([])
    finally:
        if mark is not None:
            storage.remove(mark)
    for node, unseen in zip(others, answers, strict=True):
        if unseen:
            raise StorageError(
                f"{found[unseen[0]][0]} lies on the driver's disk, and the node "
                f"{node['NodeManagerAddress']} does not see it there. Give a folder that all nodes "
                "share, or a URI (s3://, gs://, …)."
            )


def _missing(paths: Sequence[str]) -> list[int]:
    return [number for number, path in enumerate(paths) if not Path(path).exists()]
