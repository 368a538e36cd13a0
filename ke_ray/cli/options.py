"""Options of several commands, and studies read with their values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel

from ke_ray import storage
from ke_ray.config import load_study, parse_overrides, set_keys, validate
from ke_ray.errors import ConfigError, StorageError
from ke_ray.shipped import study_path

StudyT = TypeVar("StudyT", bound=BaseModel)


def _complete_key(ctx: typer.Context, incomplete: str) -> list[str]:
    """The keys of the command's kind of study, for the shell's completion."""
    from ke_ray.studies.schema import KINDS
    from ke_ray.studies.sweep import dotted_keys

    kind = KINDS.get("job" if ctx.info_name == "submit" else str(ctx.info_name))
    keys = sorted(dotted_keys(kind)) if kind else []
    return [f"{key}=" for key in keys if key.startswith(incomplete)]


Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key; repeatable.",
        autocompletion=_complete_key,
    ),
]
Output = Annotated[str | None, typer.Option("--output", "-o", help="Folder or URI for results.")]
RowsOutput = Annotated[
    str | None,
    typer.Option("--output", "-o", metavar="FILE.parquet", help="Write every row to a new file."),
]
CacheDir = Annotated[str | None, typer.Option(help="Where fetched checkpoints lie.")]
CacheBytes = Annotated[int | None, typer.Option(min=1, help="Its disk budget.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")]
MlflowUri = Annotated[
    str | None, typer.Option("--mlflow-uri", help="Default: MLFLOW_TRACKING_URI, else SQLite.")
]
NoMlflow = Annotated[bool, typer.Option("--no-mlflow", help="Do not log to MLflow.")]
ArchitectureFile = Annotated[
    str | None,
    typer.Option(
        "--architecture", metavar="FILE", help="YAML description of a decoder unknown to ke_ray."
    ),
]
Resuscitate = Annotated[
    str | None,
    typer.Option(
        metavar="ratio=R,factor=F[,control=C][,coefficients=SCAN]",
        help="Apply Algorithm 1 in memory after load.",
    ),
]


def check_rows_output(output: str | None) -> None:
    """Check, before any work, that ``--output`` names a Parquet file that is not there yet.

    Raises:
        ConfigError: another kind of file.
        StorageError: the file exists.
    """
    if output is None:
        return
    if not output.endswith(".parquet"):
        raise ConfigError(f"--output is '{output}'; expected a file name that ends in .parquet.")
    if storage.exists(output):
        raise StorageError(f"'{output}' exists; nothing was changed. Give another name.")


def parse_resuscitate(text: str) -> dict[str, Any]:
    """Parse ``ratio=0.5,factor=2`` into the keys of a study's ``resuscitation`` group.

    Raises:
        ConfigError: not KEY=VALUE pairs.
    """
    pairs = [pair for pair in text.split(",") if pair.strip()]
    if not pairs or not all("=" in pair for pair in pairs):
        raise ConfigError(
            f"--resuscitate is {text!r}; expected KEY=VALUE pairs, for example ratio=0.5,factor=2."
        )
    return set_keys({}, parse_overrides(pairs), "--resuscitate")


def read_study(
    file: str | None,
    model: type[StudyT],
    options: Mapping[str, Any],
    overrides: list[str] | None,
    source: str,
) -> StudyT:
    """Read a study from a file, or from options alone, with options and ``--set`` on top.

    Args:
        file: the study file or its shipped name, or None.
        model: its schema.
        options: values of options by dotted key; None: not given.
        overrides: the ``--set`` texts, which take precedence.
        source: names the source in messages where there is no file.

    Raises:
        ConfigError: see ``ke_ray.config``.
    """
    values = {key: value for key, value in options.items() if value is not None}
    if file is not None:
        file = study_path(file)
        loaded = load_study(file, model, overrides or [])
        if not values:
            return loaded
        merged = loaded.model_dump(exclude_unset=True)
        return validate(model, set_keys(merged, values | parse_overrides(overrides or [])), file)
    merged = set_keys({}, values | parse_overrides(overrides or []))
    missing = [
        name
        for name, field in model.model_fields.items()
        if field.is_required() and name not in merged
    ]
    if missing:
        raise ConfigError(f"{source}: {', '.join(missing)} must be given. See --help.")
    return validate(model, merged, source)
