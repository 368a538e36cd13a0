"""``ke-ray resuscitate``: a modified checkpoint on disk, for others' tools."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, cast

import typer

from ke_ray.cli.checkpoints import Revisions
from ke_ray.cli.options import ArchitectureFile
from ke_ray.errors import ConfigError
from ke_ray.models.architectures import use_description
from ke_ray.studies.architecture import read_architecture
from ke_ray.studies.parts import EvaluationText

if TYPE_CHECKING:
    from ke_ray.resuscitation.export import ResuscitatedCheckpoint, WeightsLayout


def resuscitate(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="One checkpoint.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder for the new checkpoint.")],
    coefficients: Annotated[
        str | None,
        typer.Option(metavar="SCAN_DIR|FILE.pt", help="Mean coefficients of this checkpoint."),
    ] = None,
    ratio: Annotated[float | None, typer.Option(help="p: share of rows scaled, in (0, 1].")] = None,
    factor: Annotated[float, typer.Option(help="q > 0; temperature of that control.")] = 1.0,
    control: Annotated[
        str | None, typer.Option(help="random, matched_norm or attention_temperature.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random control.")] = 0,
    layout: Annotated[str, typer.Option(help="hf, or native (OLMo's own).")] = "hf",
    allow_mismatch: Annotated[
        bool, typer.Option("--allow-mismatch", help="Accept coefficients of other weights.")
    ] = False,
    measure: Annotated[
        str | None,
        typer.Option(metavar="[NAME=]DATA", help="Also measure knowledge entropy on this corpus."),
    ] = None,
    num_instances: Annotated[int, typer.Option(min=1, help="N of --measure.")] = 64,
    sequence_length: Annotated[
        int | None, typer.Option(min=2, help="T of --measure; default: 1024 or all positions.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Default: the checkpoint's.")] = None,
    revisions: Revisions = None,
    architecture: ArchitectureFile = None,
    cache_dir: Annotated[str | None, typer.Option(help="Folder for fetched checkpoints.")] = None,
) -> None:
    """Scale the weights of the least used memories (Algorithm 1), or a control of it."""
    from ke_ray.data.corpus import parse_data_option
    from ke_ray.resuscitation.export import check_request, single_checkpoint, write_resuscitated

    if architecture is not None:
        use_description(read_architecture(architecture))
    if layout not in ("hf", "native"):
        raise ConfigError(f"--layout is {layout!r}; expected 'hf' or 'native'.")
    settings = check_request(
        output,
        ratio=ratio,
        factor=factor,
        control=control,
        seed=seed,
        coefficients=coefficients,
        allow_mismatch=allow_mismatch,
    )
    text = None
    if measure is not None:
        name, source = parse_data_option(measure)
        text = EvaluationText(
            name=name,
            source=source,
            num_instances=num_instances,
            sequence_length=sequence_length,
        )
    result = write_resuscitated(
        single_checkpoint(checkpoint, revisions),
        output,
        settings,
        layout=cast("WeightsLayout", layout),
        measure=text,
        tokenizer=tokenizer,
        cache_dir=cache_dir,
    )
    for line in describe(result):
        typer.echo(line)


def describe(result: ResuscitatedCheckpoint) -> list[str]:
    """Lines for the terminal; entropies in nats."""
    if result.control == "attention_temperature":
        lines = [f"Attention scores divided by {result.factor:g} in every layer; no memory scaled."]
    else:
        what = f"ratio {result.ratio:g}, factor {result.factor:g}"
        lines = [
            f"Resuscitated with {what}" + (f", control {result.control}" if result.control else "")
        ]
        lines.append("layer  rows selected  zero rows  knowledge entropy  predicted")
        for layer, numbers in enumerate(
            zip(
                result.selected_rows,
                result.dead_rows,
                result.entropy_nats,
                result.predicted_entropy_nats,
                strict=True,
            )
        ):
            selected, dead, before, after = numbers
            lines.append(f"{layer:5d}  {selected:13d}  {dead:9d}  {before:17.4f}  {after:9.4f}")
        lines.append(
            f"total  {sum(result.selected_rows):13d}  {sum(result.dead_rows):9d}  "
            f"{sum(result.entropy_nats):17.4f}  {sum(result.predicted_entropy_nats):9.4f}   nats; "
            "predicted with layer inputs held fixed"
        )
    if result.coefficients_verified is False:
        lines.append(
            f"Coefficients are not known to be of these weights ({result.coefficients}); recorded."
        )
    if result.measured_after_nats is not None and result.measured_before_nats is not None:
        lines.append(
            f"measured on {result.measured_on}: {result.measured_before_nats:.4f} → "
            f"{result.measured_after_nats:.4f} nats"
        )
    else:
        lines.append(
            f"To measure it: ke-ray scan {result.output} --data DATA --output SCAN, with the data "
            "of the first scan (or --measure DATA here)."
        )
    lines.append(
        f"weights sha256 {result.weights_sha256_before[:12]}… → "
        f"{result.weights_sha256_after[:12]}…, {result.layout} layout: {result.output}"
    )
    return lines


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command()(resuscitate)
