"""Job files: a command line as a Ray job, with its environment and working folder.

Paths in the file are relative to the file. Secrets are never submitted: a submission is stored by
the cluster and shown by its dashboard, so a file that holds one is refused. Nodes get ``HF_TOKEN``
and the like from their own environment (``docs/cluster.md``).
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, field_validator

from ke_ray import storage
from ke_ray.config import Strict, load_study, read_yaml
from ke_ray.errors import ConfigError
from ke_ray.secrets import is_secret_name, redact
from ke_ray.studies.parts import is_loopback
from ke_ray.studies.upload import what_stays

_URL_WITH_USER = re.compile(r"://(?!git@[^/\s@]*(?:[/\s]|$))[^/\s]*@")
_ASSIGNMENT = re.compile(r"(?:--([A-Za-z][\w-]*)[=\s]\s*|(?<![\w.-])([A-Za-z_]\w*)=)([^\s;&|]+)")
# What the node's shell puts in: $NAME, ${NAME}, $(command). Between '…' it would be literal.
_FROM_SHELL = re.compile(r"""["]?\$(?:\w+|\{\w+(?::?\?[^}]*|:?-)?\}|\(.*)["')}\]]*""")
_TRACKING_URI = re.compile(r"""(?:--mlflow-uri[=\s]\s*|\bmlflow\.uri=)['"]?([^\s'"]+)""")
_SHORTEST_SECRET = 6


class JobStudy(Strict):
    """A command line, its resources, timeout and retries, for ``ke-ray submit``."""

    kind: Literal["job"] = "job"
    name: str = Field("ke-ray", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,60}$")
    entrypoint: str = Field(min_length=1, description="shell command, run in the working folder")
    entrypoint_num_cpus: float = Field(0, ge=0, description="CPU cores for the command itself")
    entrypoint_num_gpus: float = Field(0, ge=0, description="GPUs for the command itself")
    env: dict[str, str | None] = Field(
        default_factory=dict,
        description="no secrets; null: from the submitter's environment",
    )
    working_dir: str | None = Field(None, description="folder to upload, or URI of a zip")
    runtime_env: str | None = Field(None, description="YAML file of a Ray runtime environment")
    timeout_s: float | None = Field(None, gt=0, description="per attempt, from its submission")
    retries: int = Field(0, ge=0, le=100, description="attempts after the first")
    metadata: dict[str, str] = Field(default_factory=dict, description="shown by the dashboard")

    @field_validator("env", "metadata", mode="before")
    @classmethod
    def _texts(cls, values: Any) -> Any:
        # `OMP_NUM_THREADS: 1` means the text. `yes` means nothing, and stays refused.
        if not isinstance(values, Mapping):
            return values
        return {
            key: str(v) if isinstance(v, int | float) and not isinstance(v, bool) else v
            for key, v in values.items()
        }


def load_job(path: str, overrides: list[str], environ: Mapping[str, str]) -> JobStudy:
    """Read a job file.

    Args:
        path: a YAML file with ``kind: job``.
        overrides: ``KEY=VALUE`` texts.
        environ: the submitter's environment; the values of its secrets must not be in the job.

    Returns:
        The job, its ``working_dir`` and ``runtime_env`` resolved against the file's folder, and
        without null variables in ``env``.

    Raises:
        ConfigError: not a valid job, one that holds a secret, or one that takes a variable from an
            environment that does not have it.
    """
    job = load_study(path, JobStudy, overrides)
    job = job.model_copy(update={"env": _with_own(job.env, path, environ)})
    refuse_secrets(job.model_dump(), path, environ)
    folder = path.rsplit("/", 1)[0] if "/" in path else "."
    return job.model_copy(
        update={
            key: _beside(folder, value)
            for key in ("working_dir", "runtime_env")
            if (value := getattr(job, key)) is not None
        }
    )


def _with_own(
    env: Mapping[str, str | None], path: str, environ: Mapping[str, str]
) -> dict[str, str]:
    """``env`` with its null values taken from the submitter's environment."""
    result = {}
    for name, value in env.items():
        value = environ.get(name) if value is None else value
        if not value:
            meaning = (
                " (the address of an MLflow server that every node of the cluster reaches)"
                if name == "MLFLOW_TRACKING_URI"
                else ""
            )
            raise ConfigError(
                f"{path} takes the variable {name}{meaning} from your environment, which does not "
                f"have it. Set it there, or give --set env.{name}=VALUE."
            )
        result[name] = value
    return result


def _beside(folder: str, path: str) -> str:
    if path.startswith("/") or "://" in path:
        return path
    # Not storage.join, which refuses "..": a job file may well lie in a folder of the project.
    return path if folder == "." else f"{folder}/{path}"


def runtime_env_of(job: JobStudy, environ: Mapping[str, str]) -> dict[str, Any]:
    """The Ray runtime environment of a job: its file, with ``env`` and ``working_dir`` on top.

    Args:
        job: from ``load_job``.
        environ: the submitter's environment; see ``load_job``.

    Raises:
        ConfigError: no such file or folder, no mapping, or a secret in it.
    """
    result: dict[str, Any] = {}
    if job.runtime_env is not None:
        result = read_yaml(job.runtime_env, "the job's runtime_env, relative to the file")
        env_vars = result.get("env_vars") or {}
        if not isinstance(env_vars, Mapping):
            raise ConfigError(f"{job.runtime_env}: 'env_vars' must be a mapping of texts.")
        refuse_secrets(result, job.runtime_env, environ)
    if job.env:
        result["env_vars"] = {**(result.get("env_vars") or {}), **job.env}
    if job.working_dir is not None:
        if storage.is_local(job.working_dir) and not storage.exists(job.working_dir):
            raise ConfigError(
                f"The job's working_dir '{job.working_dir}' does not exist. Paths in a job file "
                "are relative to the file."
            )
        result["working_dir"] = job.working_dir
    folder = result.get("working_dir")
    if isinstance(folder, str) and storage.is_local(folder) and storage.local_path(folder).is_dir():
        excludes = result.get("excludes") or []
        if not isinstance(excludes, list) or not all(isinstance(e, str) for e in excludes):
            raise ConfigError(f"{job.runtime_env}: 'excludes' must be a list of patterns.")
        result["excludes"] = what_stays(folder, excludes)
    if folder is None:
        # Without a folder there is nothing to leave out, and Ray warns about it.
        result.pop("excludes", None)
    return result


def refuse_secrets(values: Mapping[str, Any], source: str, environ: Mapping[str, str]) -> None:
    """Refuse values that hold a secret; the message never shows it.

    Args:
        values: keys of a job or of a runtime environment.
        source: the file, for the message.
        environ: the submitter's environment; none of its secrets' values may occur.

    Raises:
        ConfigError: a variable with a secret's name, such an assignment in a text, a URL with user
            name and password, what ``redact`` would remove, or the value of one of the submitter's
            own secrets.
    """
    advice = (
        "Submissions are stored by the cluster and shown by its dashboard; set it in the "
        "environment of the nodes instead (docs/cluster.md)."
    )
    for key, value in _leaves(values):
        if value and is_secret_name(key):
            raise ConfigError(f"{source}: '{key}' looks like a secret. {advice}")
        rest = value
        for option, variable, given in _ASSIGNMENT.findall(value):
            if _FROM_SHELL.fullmatch(given):
                rest = rest.replace(given, "", 1)
            elif is_secret_name(option or variable) and given.strip("'\""):
                raise ConfigError(
                    f"{source}: the text of '{key}' sets '{option or variable}'. {advice}"
                )
        if _URL_WITH_USER.search(value):
            raise ConfigError(f"{source}: '{key}' holds a URL with a user name in it. {advice}")
        rest = rest.replace("://git@", "://")
        if redact(rest) != rest:
            raise ConfigError(
                f"{source}: '{key}' holds what looks like an access token, a header with one, or "
                f"a signed URL. {advice}"
            )
    # Quotes of the shell and of URLs may stand between a secret's characters.
    text = "\n".join(part for leaf in _leaves(values) for part in leaf)
    texts = [_bare(text), _bare(urllib.parse.unquote(text))]
    for name, secret in environ.items():
        bare = _bare(secret)
        if is_secret_name(name) and len(bare) >= _SHORTEST_SECRET and any(bare in t for t in texts):
            raise ConfigError(f"{source} holds the value of your variable {name}. {advice}")


def _bare(text: str) -> str:
    return re.sub(r"""[\\'"]""", "", text)


def refuse_loopback_tracking(
    job: JobStudy, runtime_env: Mapping[str, Any], num_machines: int | None
) -> None:
    """Refuse a loopback MLflow address where the cluster has more machines than one.

    Args:
        runtime_env: of the job.
        num_machines: of the cluster; None: unknown.

    Raises:
        ConfigError: the other machines cannot reach that address.
    """
    env_vars = runtime_env.get("env_vars") or {}
    given = [("MLFLOW_TRACKING_URI", str(env_vars.get("MLFLOW_TRACKING_URI", "")))]
    given += [("--mlflow-uri", uri) for uri in _TRACKING_URI.findall(job.entrypoint)]
    for name, uri in given:
        if is_loopback(uri) and (num_machines or 1) > 1:
            raise ConfigError(
                f"The job's {name} is '{uri}', a loopback address, and the cluster has "
                f"{num_machines} machines: on each of them it means that machine itself. Give the "
                "address of an MLflow server that every node reaches, or use --no-mlflow in the "
                "entrypoint."
            )


def _leaves(values: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text and number in nested values, with the nearest key above it."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield from _leaves(value, str(name))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _leaves(value, key)
    elif values is not None:
        yield key, str(values)
