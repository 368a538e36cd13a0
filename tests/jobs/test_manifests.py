"""The shipped manifests, checked offline: KubeRay's documented fields, Ray's own cluster schema."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import jsonschema
import kuberay_fields as kuberay
import pytest
import yaml

from ke_ray.secrets import is_secret_name

ROOT = Path(__file__).parents[2]
MANIFESTS = [ROOT / "jobs" / f"kuberay-{kind}.yaml" for kind in ("cpu", "gpu")]


@pytest.fixture(params=MANIFESTS, ids=lambda path: path.stem)
def manifest(request):
    return yaml.safe_load(request.param.read_text())


def pods(manifest):
    cluster = manifest["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_every_field_is_one_that_kuberay_documents(manifest):
    assert kuberay.problems(manifest, kuberay.RAY_JOB) == []


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("spec", "entryPoint"), "python"),
        (("spec", "entrypoint"), ["python"]),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "password"),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "replicas"), True),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "minreplicas"), 1),
    ],
)
def test_the_check_finds_a_wrong_field(manifest, place, value):
    wrong = copy.deepcopy(manifest)
    target = wrong
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    found = kuberay.problems(wrong, kuberay.RAY_JOB)
    assert len(found) == 1
    assert str(place[-1]) in found[0]


def test_the_token_is_on_and_comes_from_a_secret(manifest):
    assert manifest["spec"]["rayClusterSpec"]["authOptions"] == {
        "mode": "token",
        "secretName": "ke-ray-token",
    }
    for pod in pods(manifest):
        for variable in pod["containers"][0].get("env", []):
            if is_secret_name(variable["name"]):
                assert set(variable) == {"name", "valueFrom"}, "a secret stands in the manifest"
                assert "secretKeyRef" in variable["valueFrom"]


def test_ray_is_the_version_that_is_pinned(manifest):
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert manifest["spec"]["rayClusterSpec"]["rayVersion"] == pinned[1]


def test_every_mount_has_its_volume_and_results_outlive_the_pods(manifest):
    for pod in pods(manifest):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {m["mountPath"]: m["name"] for m in pod["containers"][0]["volumeMounts"]}
        assert set(mounts.values()) == set(volumes)
        assert "persistentVolumeClaim" in volumes[mounts["/mnt/ke_ray"]]


def test_nothing_is_served_outside_of_the_kubernetes_cluster(manifest):
    head = manifest["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert head["serviceType"] == "ClusterIP"
    assert not head.get("enableIngress")


def test_only_the_gpu_manifest_asks_for_gpus():
    for path in MANIFESTS:
        limits = [
            pod["containers"][0]["resources"]["limits"].get("nvidia.com/gpu")
            for pod in pods(yaml.safe_load(path.read_text()))
        ]
        assert limits == [None, "1" if "gpu" in path.stem else None]


def test_gpu_workers_come_from_zero_for_as_many_scorers_as_there_may_be():
    (path,) = [path for path in MANIFESTS if "gpu" in path.stem]
    spec = yaml.safe_load(path.read_text())["spec"]
    (workers,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert spec["rayClusterSpec"]["enableInTreeAutoscaling"]
    assert (workers["replicas"], workers["minReplicas"]) == (0, 0)
    assert f"--device cuda --set max_actors={workers['maxReplicas']}" in spec["entrypoint"]


def test_the_launcher_file_is_valid_for_ray_and_keeps_the_token_on():
    import ray

    schema = json.loads(
        Path(ray.__file__).with_name("autoscaler").joinpath("ray-schema.json").read_text()
    )
    cluster = yaml.safe_load((ROOT / "jobs" / "cluster.yaml").read_text())
    jsonschema.validate(cluster, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(cluster | {"worker_nodes": {}}, schema)
    starts = cluster["head_start_ray_commands"][1:] + cluster["worker_start_ray_commands"][1:]
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert any(path.endswith(".ray/auth_token") for path in cluster["file_mounts"])
