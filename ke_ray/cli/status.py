"""``ke-ray status``: how running and ended studies stand, told from their folders."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ke_ray.progress import duration, one_line

if TYPE_CHECKING:
    from ke_ray.results.status import StudyStatus

#: 2 is that of a folder without results, as of every request that is wrong.
EXIT_CODES = {"finished": 0, "failed": 1, "running": 3, "stopped": 4}
_ENDS = {
    "running": "running",
    "stopped": "stopped before its end; the same command resumes",
    "failed": "failed; the same command tries again what failed",
    "finished": "finished",
}
_SHOWN_FAILURES = 3


def status(
    output: Annotated[
        str, typer.Argument(metavar="OUTPUT", help="A command's output folder, or several in one.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say how a study stands, from any shell or host that reads its folder.

    Exit codes: 0 finished, 1 failed, 3 running, 4 stopped before its end (the same command
    resumes), 2 not a folder of results. Of several studies: running if one is, else failed, else
    stopped.
    """
    from ke_ray.results.status import joint_state, read_status

    studies = read_status(output)
    state = joint_state(studies)
    if as_json:
        values = {
            "folder": output,
            "state": state,
            "exit_code": EXIT_CODES[state],
            "studies": [_as_json(study) for study in studies],
        }
        typer.echo(json.dumps(values, indent=2))
    else:
        for study in studies:
            for line in status_lines(study):
                typer.echo(line)
    raise typer.Exit(EXIT_CODES[state])


def status_lines(study: StudyStatus) -> list[str]:
    """What a person reads of one study: a title, and indented lines."""
    from ke_ray.results.status import summary

    lines = [f"{study.folder}: {study.kind}, {_ENDS[study.state]}"]
    if study.total is not None or study.done is not None:
        lines.append(f"  {summary(study)}")
    pace = [
        *([f"{study.tokens_per_s:,.0f} tokens/s"] if study.tokens_per_s else []),
        *([f"{study.bytes_per_s / 1e6:,.1f} MB/s of checkpoints"] if study.bytes_per_s else []),
        *([str(study.time_left)] if study.time_left else []),
    ]
    lines += [f"  {', '.join(pace)}"] if pace else []
    lines += [f"  {study.note}"] if study.note else []
    lines += [f"  {line}" for line in _signs_of_life(study)]
    lines += [f"  failed: {name}: {error}" for name, error in study.failures[:_SHOWN_FAILURES]]
    more = (study.failed or 0) - _SHOWN_FAILURES
    if study.failures and more > 0:
        lines.append(f"  … and {more:,} more")
    if study.command and study.state in ("stopped", "failed"):
        lines.append(f"  command: {study.command}")
    # Names and errors come from files that others may have written.
    return [line[: len(line) - len(line.lstrip())] + one_line(line) for line in lines]


def _signs_of_life(study: StudyStatus) -> list[str]:
    lines = []
    writer = study.writer
    if writer is not None and writer.pid is not None:
        end = "" if writer.is_alive else ", is gone"
        lines.append(f"process {writer.pid} on {writer.host}, since {writer.since}{end}")
    ages = [
        f"{what} {f'{seconds:.0f} s' if seconds < 120 else duration(seconds)} ago"
        for what, seconds in (("driver", study.sign_of_life_s), ("work", study.work_s))
        if seconds is not None
    ]
    if ages:
        lines.append(f"last sign of life: {', '.join(ages)}")
    elif study.updated_at and study.state != "finished":
        lines.append(f"last sign of life: manifest written {study.updated_at}")
    return lines


def _as_json(study: StudyStatus) -> dict[str, Any]:
    left, writer = study.time_left, study.writer
    return {
        "folder": study.folder,
        "kind": study.kind,
        "state": study.state,
        "items": study.items,
        "total": study.total,
        "done": study.done,
        "failed": study.failed,
        "stopped_early": study.stopped_early,
        "left": study.left,
        "saved_step": study.saved_step,
        "tokens_per_s": study.tokens_per_s,
        "bytes_per_s": study.bytes_per_s,
        "seconds_left": left and left.expected_s,
        "seconds_left_low": left and left.low_s,
        "seconds_left_high": left and left.high_s,
        "note": study.note,
        "writer": writer
        and {
            "host": writer.host,
            "pid": writer.pid,
            "since": writer.since,
            "is_alive": writer.is_alive,
        },
        "seconds_since_sign_of_life": study.sign_of_life_s,
        "seconds_since_work": study.work_s,
        "updated_at": study.updated_at,
        "command": study.command,
        "failures": [{"name": name, "error": error} for name, error in study.failures],
    }


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command()(status)
