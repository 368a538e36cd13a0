"""The fields of KubeRay's RayJob, as its CRD reference (ray.io/v1, v1.6) documents them.

A mapping is an object with these fields; ``[X]`` a list of X; ``{str: X}`` any keys; a type or a
tuple of types a value; a frozenset one of these texts. Of Kubernetes' own objects only the fields
that our manifests may use are listed.

Facts: names of fields in KubeRay's and Kubernetes' API references (licence: both are Apache-2.0).
"""

from __future__ import annotations

from typing import Any

QUANTITY = (str, int)
_NAME_AND_KEY = {"name": str, "key": str, "optional": bool}

ENV_VAR = {
    "name": str,
    "value": str,
    "valueFrom": {"secretKeyRef": _NAME_AND_KEY, "configMapKeyRef": _NAME_AND_KEY},
}
CONTAINER = {
    "name": str,
    "image": str,
    "imagePullPolicy": frozenset({"Always", "IfNotPresent", "Never"}),
    "command": [str],
    "args": [str],
    "workingDir": str,
    "env": [ENV_VAR],
    "ports": [{"containerPort": int, "name": str, "protocol": str}],
    "resources": {"requests": {str: QUANTITY}, "limits": {str: QUANTITY}},
    "volumeMounts": [{"name": str, "mountPath": str, "readOnly": bool, "subPath": str}],
}
POD_TEMPLATE = {
    "metadata": {"labels": {str: str}, "annotations": {str: str}},
    "spec": {
        "containers": [CONTAINER],
        "initContainers": [CONTAINER],
        "imagePullSecrets": [{"name": str}],
        "nodeSelector": {str: str},
        "restartPolicy": frozenset({"Always", "OnFailure", "Never"}),
        "serviceAccountName": str,
        "tolerations": [
            {
                "key": str,
                "operator": frozenset({"Exists", "Equal"}),
                "value": str,
                "effect": frozenset({"NoSchedule", "PreferNoSchedule", "NoExecute"}),
            }
        ],
        "volumes": [
            {
                "name": str,
                "persistentVolumeClaim": {"claimName": str, "readOnly": bool},
                "emptyDir": {"sizeLimit": QUANTITY, "medium": str},
                "secret": {"secretName": str, "optional": bool},
            }
        ],
    },
}
HEAD_GROUP_SPEC = {
    "template": POD_TEMPLATE,
    "headService": dict[str, Any],
    "enableIngress": bool,
    "rayStartParams": {str: str},
    "serviceType": frozenset({"ClusterIP", "NodePort", "LoadBalancer"}),
}
WORKER_GROUP_SPEC = {
    "suspend": bool,
    "groupName": str,
    "replicas": int,
    "minReplicas": int,
    "maxReplicas": int,
    "idleTimeoutSeconds": int,
    "rayStartParams": {str: str},
    "template": POD_TEMPLATE,
    "scaleStrategy": {"workersToDelete": [str]},
    "numOfHosts": int,
}
RAY_CLUSTER_SPEC = {
    "suspend": bool,
    "managedBy": str,
    "authOptions": {"mode": frozenset({"disabled", "token"}), "secretName": str},
    "autoscalerOptions": dict[str, Any],
    "headServiceAnnotations": {str: str},
    "enableInTreeAutoscaling": bool,
    "gcsFaultToleranceOptions": dict[str, Any],
    "headGroupSpec": HEAD_GROUP_SPEC,
    "rayVersion": str,
    "workerGroupSpecs": [WORKER_GROUP_SPEC],
}
RAY_JOB = {
    "apiVersion": frozenset({"ray.io/v1"}),
    "kind": frozenset({"RayJob"}),
    "metadata": {
        "name": str,
        "namespace": str,
        "labels": {str: str},
        "annotations": {str: str},
    },
    "spec": {
        "activeDeadlineSeconds": int,
        "backoffLimit": int,
        "rayClusterSpec": RAY_CLUSTER_SPEC,
        "submitterPodTemplate": POD_TEMPLATE,
        "metadata": {str: str},
        "clusterSelector": {str: str},
        "submitterConfig": {"backoffLimit": int},
        "managedBy": str,
        "deletionStrategy": dict[str, Any],
        "entrypoint": str,
        "runtimeEnvYAML": str,
        "jobId": str,
        "submissionMode": frozenset({"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"}),
        "entrypointResources": str,
        "entrypointNumCpus": (int, float),
        "entrypointNumGpus": (int, float),
        "ttlSecondsAfterFinished": int,
        "shutdownAfterJobFinishes": bool,
        "suspend": bool,
    },
}


def problems(value: Any, fields: Any, path: str = "") -> list[str]:
    """What in ``value`` is not as documented, one text each."""
    if isinstance(fields, frozenset):
        return [] if value in fields else [f"{path}: {value!r} is none of {sorted(fields)}"]
    if isinstance(fields, list):
        if not isinstance(value, list):
            return [f"{path}: no list"]
        return [
            p for n, item in enumerate(value) for p in problems(item, fields[0], f"{path}[{n}]")
        ]
    if isinstance(fields, dict):
        if not isinstance(value, dict):
            return [f"{path}: no object"]
        found = []
        for key, item in value.items():
            if str in fields:
                found += problems(item, fields[str], f"{path}.{key}")
            elif key not in fields:
                found.append(f"{path}.{key}: no such field")
            else:
                found += problems(item, fields[key], f"{path}.{key}")
        return found
    if fields == dict[str, Any]:
        return [] if isinstance(value, dict) else [f"{path}: no object"]
    kinds = fields if isinstance(fields, tuple) else (fields,)
    is_right = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    return [] if is_right else [f"{path}: {value!r} is no {' or '.join(k.__name__ for k in kinds)}"]
