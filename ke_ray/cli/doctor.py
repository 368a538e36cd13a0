"""``ke-ray doctor``: what this machine has, and what to do about what is missing."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Literal
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import psutil
import typer
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Column, Table

from ke_ray import __version__
from ke_ray.checkpoints.fetch.cache import default_cache_dir
from ke_ray.checkpoints.hub import endpoint_url
from ke_ray.config import read_yaml
from ke_ray.secrets import redact
from ke_ray.shipped import list_shipped, tested_versions
from ke_ray.studies.parts import TrackingSettings

_ANSWER_S = 5.0
_GIB = 2**30
_CACHE_BYTES = 30 * _GIB  # a checkpoint of OLMo-7B, the largest of the shipped studies


@dataclass(frozen=True)
class Finding:
    """What was found out about one thing.

    Attributes:
        status: ``ok``; ``note``: something works otherwise or not at all, which matters to some
            studies; ``problem``: ke_ray cannot be used as it is.
        remedy: what to do, empty where nothing is to be done.
    """

    subject: str
    status: Literal["ok", "note", "problem"]
    text: str
    remedy: str = ""


def doctor() -> None:
    """Say what this machine has and reaches; exit code 1 where ke_ray cannot be used as it is."""
    findings = [*_packages(), *_machine(), *_accelerators(), _cache(), *_services()]
    table = Table("", "", Column(overflow="fold"), box=None, pad_edge=False, show_header=False)
    colours = {"ok": "green", "note": "yellow", "problem": "red"}
    for finding in findings:
        text = finding.text + (f"\n→ {finding.remedy}" if finding.remedy else "")
        status = f"[{colours[finding.status]}]{finding.status}[/]"
        table.add_row(status, finding.subject, redact(text).replace("[", r"\["))
    Console().print(table)
    problems = sum(finding.status == "problem" for finding in findings)
    plural = "" if problems == 1 else "s"
    typer.echo(f"\n{problems} problem{plural}." if problems else "\nReady.")
    raise typer.Exit(1 if problems else 0)


def _packages() -> Iterator[Finding]:
    yield Finding("ke_ray", "ok", f"{__version__}, Python {sys.version.split()[0]}")
    tested = tested_versions()
    unlike, wrong = [], []
    for text in importlib.metadata.requires("ke-ray") or ():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is not installed")
            continue
        pin = tested.get(requirement.name.lower().replace("_", "-"))
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} (needs {requirement.specifier})")
        elif pin not in (None, version.partition("+")[0]):
            unlike.append(f"{requirement.name} {version} (tested: {pin})")
    if wrong:
        yield Finding("packages", "problem", ", ".join(wrong), "pip install --upgrade ke-ray")
    elif unlike:
        remedy = "if something fails, install the versions of constraints.txt"
        yield Finding("packages", "note", ", ".join(unlike), remedy)
    else:
        yield Finding("packages", "ok", "the tested versions")


def _machine() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("cores", "ok", f"{usable}")
    text = f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free"
    few = memory.available < 4 * _GIB
    remedy = "a Ray session and a small model take 4 GiB; close something" if few else ""
    yield Finding("memory", "note" if few else "ok", text, remedy)


def _accelerators() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            yield Finding(
                f"GPU {index}", "ok", f"{device.name}, {device.total_memory / _GIB:.0f} GiB"
            )
        return
    if os.path.exists("/dev/nvidia0"):
        remedy = "install a torch that was built for this driver (pytorch.org, Get Started)"
        text = f"this machine has one, which torch {torch.__version__} cannot use"
        yield Finding("GPU", "problem", text, remedy)
        return
    yield Finding("GPU", "note", "none: models are scored and trained on CPUs")


def _cache() -> Finding:
    folder = default_cache_dir()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    text = f"{free / _GIB:.0f} GiB free for fetched checkpoints in {folder}"
    if free < _CACHE_BYTES:
        remedy = "set cache_dir in a study, or KE_RAY_CACHE, to a folder on a larger disk"
        return Finding("cache", "note", text, remedy)
    return Finding("cache", "ok", text)


def _services() -> Sequence[Finding]:
    from ke_ray.tracking.tracker import store_uri

    address = os.environ.get("RAY_ADDRESS")
    store = store_uri(TrackingSettings())
    proxy = "behind a proxy, set HTTPS_PROXY"
    answers = functools.partial(functools.partial, _answers)  # later, all of them at once
    checks: list[Callable[[], Finding]] = []
    if not address:
        text = "RAY_ADDRESS is not set: commands start a Ray session of their own here"
        checks.append(functools.partial(Finding, "Ray", "ok", text))
    elif "://" in address:
        checks.append(answers("Ray", address, "start the cluster, or unset RAY_ADDRESS"))
    else:
        checks.append(functools.partial(_ray_listens, address))
    if store.startswith("http"):
        remedy = "start it, or set MLFLOW_TRACKING_URI; --no-mlflow does without"
        checks.append(answers("MLflow", f"{store.rstrip('/')}/health", remedy))
    else:
        text = f"{store} (a local database)"
        checks.append(functools.partial(Finding, "MLflow", "ok", text))
    remedy = f"local checkpoints work without; {proxy}; a mirror, HF_ENDPOINT"
    checks.append(answers("Hub", endpoint_url(), remedy))
    remedy = f"shipped scans read it; {proxy}, or give a corpus of yours by --data NAME=SOURCE"
    checks += [answers("data", url, remedy) for url in sorted(set(_data_urls()))]
    with ThreadPoolExecutor(len(checks)) as pool:
        return list(pool.map(lambda check: check(), checks))


def _data_urls() -> Iterator[str]:
    for study in list_shipped():
        if study.kind == "scan":
            sources = read_yaml(str(study.path), "a study file").get("data", {}).values()
            yield from (source for source in sources if source.startswith("https://"))


def _answers(subject: str, url: str, remedy: str) -> Finding:
    """Whether a server answers at all, if only with a refusal."""
    try:
        with urlopen(Request(url, method="HEAD"), timeout=_ANSWER_S):
            return Finding(subject, "ok", f"{url} answers")
    except HTTPError as error:
        status: Literal["ok", "note"] = "note" if error.code >= 500 else "ok"
        return Finding(subject, status, f"{url} answers ({error.code})")
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        return Finding(subject, "note", f"{url} does not answer: {reason}", remedy)


def _ray_listens(address: str) -> Finding:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_S).close()
    except (OSError, ValueError) as error:
        remedy = "start the cluster, or unset RAY_ADDRESS to run on this machine"
        return Finding("Ray", "note", f"{address} cannot be reached: {error}", remedy)
    variables = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if any(map(os.environ.get, variables)) or (Path.home() / ".ray" / "auth_token").is_file():
        return Finding("Ray", "ok", f"{address} listens; a token is set")
    remedy = "set RAY_AUTH_TOKEN_PATH to a file with the cluster's"
    return Finding("Ray", "note", f"{address} listens; no token is set", remedy)


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command()(doctor)
