"""Capacity of a cluster: what its nodes can hold, and which GPUs torch can use.

An actor or a worker lives on one node, so everything is counted node by node: a share of the
cluster's sum may fit on none. Ray counts GPUs that a node declares, whether torch can use them or
not.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from ke_ray.errors import ConfigError
from ke_ray.planning.scan_precision import local_gpus

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

#: Resources of one node, as Ray names them: ``CPU``, ``GPU``, ``memory`` (bytes), …
Node = Mapping[str, float]

_GPU_PROBE_TIMEOUT_S = 120
#: Nodes that ``ray up`` or KubeRay started carry this label.
_GROUP_LABEL = "ray.io/node-group"


def cluster_nodes() -> list[dict[str, float]]:
    """Resources of each node that is alive."""
    import ray

    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def actors_of_job() -> Iterator[Any]:
    """Ray's record (``ActorTableData``) of each actor of this command's job, dead ones included.

    Read from the same store as ``ray.nodes()``: the public state API asks the dashboard, which need
    not be reachable from the driver's node.
    """
    import ray
    from ray._private.state import state
    from ray.core.generated import gcs_pb2

    store = state._connect_and_get_accessor()
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    yield from map(gcs_pb2.ActorTableData.FromString, store.get_actor_table(job, None))


def may_grow() -> bool:
    """Whether something may add nodes: the cluster launcher or KubeRay started those there are."""
    import ray

    return any(_GROUP_LABEL in node["Labels"] for node in ray.nodes() if node["Alive"])


def count_places(nodes: Sequence[Node], cpus: int, gpus: float = 0) -> int:
    """How many workers of ``cpus`` CPUs and ``gpus`` GPUs all nodes hold together.

    A share of a GPU is one of one GPU: two GPUs have two places for 0.6 of one, not three.
    """
    total = 0
    for node in nodes:
        places = int(node.get("CPU", 0)) // cpus
        if 0 < gpus < 1:
            places = min(places, int(node.get("GPU", 0)) * int(1 / gpus + 1e-9))
        elif gpus:
            places = min(places, int(node.get("GPU", 0) / gpus + 1e-9))
        total += places
    return total


def most_cpus(nodes: Sequence[Node], num_workers: int, gpus: float = 0) -> int:
    """The most CPUs that each of ``num_workers`` can have at the same time.

    Returns:
        0 where the nodes do not hold so many workers of one CPU.
    """
    largest = max((int(node.get("CPU", 0)) for node in nodes), default=0)
    fitting = (c for c in range(largest, 0, -1) if count_places(nodes, c, gpus) >= num_workers)
    return next(fitting, 0)


def describe_resources(resources: Node) -> str:
    """``4 CPUs and 1 GPU``; other resources are left out."""
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    text = f"{cpus:g} CPU{'' if cpus == 1 else 's'}"
    return text + (f" and {gpus:g} GPU{'' if gpus == 1 else 's'}" if gpus else "")


def describe_nodes(nodes: Sequence[Node]) -> str:
    """``2 nodes with 4 CPUs and 1 GPU, 1 node with 0 CPUs``, the largest first."""
    ordered = sorted(nodes, key=lambda n: (n.get("GPU", 0), n.get("CPU", 0)), reverse=True)
    counts = Counter(describe_resources(node) for node in ordered)
    texts = [f"{n} node{'' if n == 1 else 's'} with {text}" for text, n in counts.items()]
    return ", ".join(texts) or "no nodes"


def training_nodes(use_gpu: bool | None) -> list[dict[str, float]]:
    """The nodes as training counts them: with their GPUs only where it is to use them.

    The workers of a run agree on one device before they start, so a task on each node that declares
    GPUs first finds out whether torch can use one there.

    Args:
        use_gpu: None: where torch can use the GPUs that are declared.

    Raises:
        ConfigError: GPUs are requested, or some nodes have usable ones, and a node declares GPUs
            that torch cannot use.
    """
    nodes = cluster_nodes()
    without = [{name: n for name, n in node.items() if name != "GPU"} for node in nodes]
    if use_gpu is False or not any(node.get("GPU") for node in nodes):
        return nodes if use_gpu else without
    if use_gpu and not in_driver():
        return nodes  # a trial of a sweep, whose driver has looked
    answers = _gpu_problems()
    problems = {address: problem for address, problem in answers.items() if problem is not None}
    if not problems:
        return nodes
    address, problem = next(iter(problems.items()))
    message = f"The node {address} declares GPUs, but {problem}"
    if use_gpu is None and len(problems) == len(answers):
        log.warning("%s, as on all nodes that declare GPUs. Training runs on CPUs.", message)
        return without
    raise ConfigError(
        f"{message}. Set use_gpu: false to train on CPUs, or install a torch that can use the GPUs "
        "of all nodes that declare some."
    )


def gpus_have_bfloat16() -> bool | None:
    """Whether all GPUs that torch can use have units for bfloat16; None where it can use none."""
    answers = [units for units in _on_gpu_nodes(_probe_units).values() if units is not None]
    return all(answers) if answers else None


def _gpu_problems() -> dict[str, str | None]:
    """Why torch cannot use a GPU, None where it can, by address of the nodes that declare any."""
    return _on_gpu_nodes(_probe_gpu)


def _on_gpu_nodes(question: Callable[[], Answer]) -> dict[str, Answer | None]:
    """The answer of each node that declares GPUs, by its address; None of one that has gone."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # A process of its own: CUDA remembers which devices it saw first.
    probe = ray.remote(num_cpus=0, max_calls=1, max_retries=2)(question)
    answers = {
        node["NodeManagerAddress"]: probe.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote()
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("GPU")
    }
    found: dict[str, Answer | None] = {}
    for address, answer in answers.items():
        try:
            found[address] = ray.get(answer, timeout=_GPU_PROBE_TIMEOUT_S)
        except ray.exceptions.RayError as error:  # a node that has just gone runs nothing either
            log.debug("The node %s did not say whether torch can use its GPUs: %s", address, error)
            found[address] = None
    return found


def _probe_gpu() -> str | None:
    _unhide_gpus()
    return _cuda_problem()


def _probe_units() -> bool | None:
    _unhide_gpus()
    return local_gpus()


def _unhide_gpus() -> None:
    # Ray hides all GPUs from a task that was granted none.
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        if os.environ.get(name) == "":
            del os.environ[name]


def _cuda_problem() -> str | None:
    """Why torch cannot use a GPU in this process; None where it can."""
    import torch

    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} there was built without CUDA"
    return f"torch {torch.__version__} there finds no CUDA device"


def granted_device() -> tuple[str, str | None]:
    """The device of this actor, and a problem where it is not the one that Ray granted.

    Returns:
        ``cuda`` where Ray granted a GPU and torch can use it, else ``cpu``; and, where Ray granted
        a GPU that torch cannot use, a sentence that says why.
    """
    import ray

    if not ray.get_runtime_context().get_accelerator_ids().get("GPU"):
        return "cpu", None
    problem = _cuda_problem()
    if problem is None:
        return "cuda", None
    address = ray.util.get_node_ip_address()
    return "cpu", f"Ray granted a GPU on the node {address}, but {problem}"


def in_driver() -> bool:
    """Whether this process is the one that connected to Ray, and not a worker of it."""
    import ray

    return ray.get_runtime_context().get_actor_id() is None
