"""What one would type after a command that has come to its end."""

from __future__ import annotations

import shlex

import typer

from ke_ray import storage
from ke_ray.secrets import redact
from ke_ray.studies.training import PretrainStudy


def after_results(output: str, *, failed: bool) -> list[tuple[str, str]]:
    """(command, what it does) after a scan, a continual study or a sweep."""
    from ke_ray.results.manifest import command_line

    folder = shlex.quote(redact(output))
    commands = [
        (f"ke-ray dashboard {folder}", "explore the results in a browser"),
        (f"ke-ray report {folder} -o report.html", "one file to share"),
        (f"ke-ray results {folder} --csv", "the numbers, for other programs"),
    ]
    return [(command_line(), "try again what failed"), *commands[:2]] if failed else commands


def after_pretrain(study: PretrainStudy) -> list[tuple[str, str]]:
    """The same after a pretraining: its checkpoints are what one goes on with."""
    output, folder = redact(study.output).rstrip("/"), shlex.quote
    series = folder(storage.join(output, "checkpoints"))
    source = study.data.source or storage.join(output, "world", "documents.jsonl.gz")
    scan = (
        f"ke-ray scan {series} --data {folder(f'text={redact(source)}')} --num-instances 256 "
        f"--sequence-length {study.sequence_length} --output {folder(f'{output}-scan')}"
    )
    return [
        (scan, "measure their knowledge entropy"),
        (f"ke-ray checkpoints {series}", "list them"),
        (f"ke-ray report {folder(output)} -o report.html", "the course of training"),
    ]


def print_next(steps: list[tuple[str, str]]) -> None:
    """Print the commands, each with what it does."""
    typer.echo("Next:")
    for command, purpose in steps:
        typer.echo(f"  {command}    # {purpose}")
