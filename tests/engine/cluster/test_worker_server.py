"""Workers as the tests start them: forked where that changes nothing, fresh otherwise."""

from __future__ import annotations

import os
import sys

import psutil
import pytest
import ray


@pytest.mark.ray
def test_workers_are_forked_unless_their_imports_would_read_something_else(
    ray_cluster: None,
) -> None:
    if os.environ.get("KE_RAY_FRESH_WORKERS"):
        pytest.skip("KE_RAY_FRESH_WORKERS is set")

    def look() -> tuple[bool, bool, int, int]:
        return "torch" in sys.modules, "ray" in sys.modules, os.getppid(), os.getpgid(0)

    remote = ray.remote(look)
    has_torch, has_ray, parent, group = ray.get(remote.remote())
    assert (has_torch, has_ray) == (True, True)
    assert "worker_server.py" in psutil.Process(parent).cmdline()[1]
    assert os.getpid() in [process.pid for process in psutil.Process(parent).parents()]
    assert group not in (os.getpgid(0), parent), "Ray ends a worker by its process group"

    elsewhere = {"env_vars": {"HF_ENDPOINT": "http://127.0.0.1:9"}}
    has_torch, *_ = ray.get(remote.options(runtime_env=elsewhere).remote())
    assert not has_torch
