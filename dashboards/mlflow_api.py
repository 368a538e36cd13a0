"""Runs from an MLflow server over its REST API, for lists and links (no MLflow import)."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

_TIMEOUT_S = 10.0


def _call(base: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{base.rstrip('/')}/api/2.0/mlflow/{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
        return json.load(answer)


def experiments(base: str) -> dict[str, str]:
    """Experiment name → id.

    Raises:
        OSError: the server does not answer.
    """
    reply = _call(base, "experiments/search", {"max_results": 200})
    return {entry["name"]: entry["experiment_id"] for entry in reply.get("experiments", [])}


def runs(base: str, experiment_id: str) -> list[dict[str, Any]]:
    """The newest 200 runs: name, status, start time, last metrics, link.

    Raises:
        OSError: the server does not answer.
    """
    body = {"experiment_ids": [experiment_id], "max_results": 200}
    rows = []
    for run in _call(base, "runs/search", body).get("runs", []):
        info, data = run["info"], run.get("data", {})
        metrics = {m["key"]: m["value"] for m in data.get("metrics", [])}
        tags = {t["key"]: t["value"] for t in data.get("tags", [])}
        rows.append(
            {
                "run": info.get("run_name") or info["run_id"],
                "status": info["status"],
                "parent": tags.get("mlflow.parentRunId", ""),
                "link": run_link(base, info["run_id"], info["experiment_id"]),
                **metrics,
            }
        )
    return rows


def run_link(base: str, run_id: str, experiment_id: str | None = None) -> str:
    """The address of a run's page; the experiment is looked up where it is not given.

    Raises:
        OSError: the server does not answer or does not know the run.
    """
    if experiment_id is None:
        query = urllib.parse.urlencode({"run_id": run_id})
        experiment_id = _call(base, f"runs/get?{query}")["run"]["info"]["experiment_id"]
    return f"{base.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"
