"""``ke-ray resuscitate``: a modified checkpoint on disk, for others' tools."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from ke_ray.cli.checkpoints import Revisions
from ke_ray.errors import ConfigError

if TYPE_CHECKING:
    from ke_ray.resuscitation.export import Resuscitated


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
    seed: Annotated[int, typer.Option(min=0, help="Which rows the random control takes.")] = 0,
    layout: Annotated[str, typer.Option(help="hf, or native (OLMo's own).")] = "hf",
    allow_mismatch: Annotated[
        bool, typer.Option("--allow-mismatch", help="Take coefficients of other weights.")
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
    cache_dir: Annotated[str | None, typer.Option(help="Where fetched checkpoints lie.")] = None,
) -> None:
    """Scale the weights of the least used memories (Algorithm 1), or a control of it."""
    from ke_ray.resuscitation.export import (
        Measurement,
        check_request,
        one_checkpoint,
        write_resuscitated,
    )

    if layout not in ("hf", "native"):
        raise ConfigError(f"--layout is {layout!r}; expected 'hf' or 'native'.")
    check_request(
        ratio=ratio, factor=factor, control=control, coefficients=coefficients, output=output
    )
    done = write_resuscitated(
        one_checkpoint(checkpoint, revisions),
        output,
        ratio=ratio,
        factor=factor,
        control=control,
        seed=seed,
        coefficients=coefficients,
        allow_mismatch=allow_mismatch,
        layout=cast('Literal["hf", "native"]', layout),
        measure=None
        if measure is None
        else Measurement(measure, num_instances, sequence_length, tokenizer),
        cache_dir=cache_dir,
    )
    for line in describe(done):
        typer.echo(line)


def describe(done: Resuscitated) -> list[str]:
    """What was done, for the terminal; entropies in nats."""
    if done.control == "attention_temperature":
        lines = [f"Attention scores divided by {done.factor:g} in every layer; no memory scaled."]
    else:
        what = f"ratio {done.ratio:g}, factor {done.factor:g}"
        lines = [
            f"Resuscitated with {what}" + (f", control {done.control}" if done.control else "")
        ]
        lines.append("layer  rows selected  zero rows  knowledge entropy  predicted")
        for layer, numbers in enumerate(
            zip(
                done.selected_rows,
                done.dead_rows,
                done.entropy_nats,
                done.predicted_entropy_nats,
                strict=True,
            )
        ):
            selected, dead, before, after = numbers
            lines.append(f"{layer:5d}  {selected:13d}  {dead:9d}  {before:17.4f}  {after:9.4f}")
        lines.append(
            f"total  {sum(done.selected_rows):13d}  {sum(done.dead_rows):9d}  "
            f"{sum(done.entropy_nats):17.4f}  {sum(done.predicted_entropy_nats):9.4f}   nats; "
            "predicted with layer inputs held fixed"
        )
    if done.coefficients_verified is False:
        lines.append(
            f"Coefficients are not known to be of these weights ({done.coefficients}); recorded."
        )
    if done.measured_after_nats is not None and done.measured_before_nats is not None:
        lines.append(
            f"measured on {done.measured_on}: {done.measured_before_nats:.4f} → "
            f"{done.measured_after_nats:.4f} nats"
        )
    else:
        lines.append(
            f"To measure it: ke-ray scan {done.output} --data DATA --output SCAN, with the data of "
            "the first scan (or --measure DATA here)."
        )
    lines.append(
        f"weights sha256 {done.weights_sha256_before[:12]}… → "
        f"{done.weights_sha256_after[:12]}…, {done.layout} layout: {done.output}"
    )
    return lines


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command()(resuscitate)
