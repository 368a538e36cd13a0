"""``ke-ray demo``: the whole workflow on a small generated world, in minutes on two cores."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ke_ray import storage
from ke_ray.cli.scan import execute_scan
from ke_ray.cli.sweep import execute_sweep
from ke_ray.cli.train import execute_continual, execute_pretrain
from ke_ray.config import load_study
from ke_ray.report import build_report
from ke_ray.shipped import study_path
from ke_ray.storage.ownership import claimed
from ke_ray.studies.continual import ContinualStudy
from ke_ray.studies.training import PretrainStudy


class _Phases:
    """Seconds of each phase, start-up and work apart; reruns that skip a phase keep its seconds."""

    def __init__(self, earlier: dict[str, float]) -> None:
        self.seconds = dict(earlier)

    def add(self, name: str, phases_s: dict[str, float], start: tuple[str, ...]) -> None:
        """Sum a command's own phases into ``NAME_start`` and ``NAME``."""
        self.seconds[f"{name}_start"] = round(sum(phases_s.get(k, 0.0) for k in start), 2)
        self.seconds[name] = round(sum(v for k, v in phases_s.items() if k not in start), 2)


def demo(
    folder: Annotated[str, typer.Option(help="Folder for all results.")] = "runs/demo",
) -> None:
    """Pretrain a small series, scan it, inject facts, run a sweep; report the results."""

    with claimed(folder, "demo", evidence=("pretrain", "pretrain")):
        raise typer.Exit(_demo(folder))


def _demo(folder: str) -> int:
    """Run all phases; return the exit code."""
    from ke_ray.results.sweep_folder import sweep_summary
    from ke_ray.studies.scan import ScanStudy
    from ke_ray.studies.sweep import load_sweep

    storage.check_writable(folder)
    world = f"{folder}/pretrain/world"
    summary_path = storage.join(folder, "summary.json")
    before = storage.read_json(summary_path) if storage.exists(summary_path) else {}
    phases = _Phases(before.get("phases_s", {}))
    summary: dict[str, Any] = {"phases_s": phases.seconds}
    tracking = [
        f"mlflow.uri=sqlite:///{Path(folder).absolute()}/mlflow.db",
        "mlflow.experiment=ke_ray demo",
    ]

    _heading("1. Pretrain a small OLMo-architecture model on generated biographies")
    study = load_study(
        study_path("demo_pretrain"), PretrainStudy, [f"output={folder}/pretrain", *tracking]
    )
    started = time.monotonic()
    outcome = execute_pretrain(study)
    if outcome.num_done:
        phases.seconds["pretrain_start"] = round(time.monotonic() - started - outcome.duration_s, 2)
        phases.seconds["pretrain"] = round(outcome.duration_s, 2)

    _look(
        "how the loss falls; twelve checkpoints are kept on the way, the untrained model (step 0) "
        "among them."
    )

    _heading("2. Scan the knowledge entropy of all its checkpoints")
    scan_study = load_study(
        study_path("demo_scan"),
        ScanStudy,
        [
            f"checkpoints.spec={folder}/pretrain/checkpoints",
            f"data.biographies={world}/documents.jsonl.gz",
            f"output={folder}/scan",
            *tracking,
        ],
    )
    scanned = execute_scan(scan_study)
    if scanned.num_done:
        phases.add("scan", scanned.phases_s, ("setup", "ray_start"))
    summary["scan"] = scan_summary(f"{folder}/scan")
    _look(scan_story(summary["scan"]))
    storage.write_json(summary_path, summary)

    _heading("3. Train on from before, at and after the peak, with injected facts")
    inputs = [
        f"starts.spec={folder}/pretrain/checkpoints",
        f"corpus.source={world}/other_documents.jsonl.gz",
        f"injection.paraphrase={world}/facts_paraphrase.json",
        f"injection.once={world}/facts_once.json",
        f"downstream.own_tasks.biographies={world}/questions.jsonl",
        f"entropy.source={world}/documents.jsonl.gz",
    ]
    continual_study = load_study(
        study_path("demo_continual"),
        ContinualStudy,
        [*inputs, f"output={folder}/continual", *tracking],
    )
    continued = execute_continual(continual_study)
    if len(continued.rows) > continued.num_skipped:
        start = ("check", "ray_start", "worker_start")
        phases.add("continual", continued.phases_s, start)
    summary["continual"] = continual_summary(continued.rows)
    _look(continual_story(summary["continual"]))
    storage.write_json(summary_path, summary)

    _heading("4. Resuscitate dormant memories of the last checkpoint: a small sweep")
    sweep_study = load_sweep(
        study_path("demo"),
        [
            *(f"base.{override}" for override in inputs),
            f"base.resuscitation.coefficients={folder}/scan",
            f"output={folder}/sweep",
            *tracking,
        ],
    )
    swept = execute_sweep(sweep_study)
    if len(swept.rows) > swept.num_skipped:
        phases.add("sweep", swept.phases_s, ("ray_start", "worker_start"))
    summary["sweep"] = sweep_summary(f"{folder}/sweep")
    _look(
        "each factor against 'none', the checkpoint as it is. In the paper factors of 1 and more "
        "help a late checkpoint; where intervals overlap, four short trials cannot tell."
    )
    storage.write_json(summary_path, summary)

    report = build_report([folder], storage.join(folder, "report.html"))

    _heading("Where to look")
    typer.echo(f"  numbers   {summary_path}")
    typer.echo(f"  picture   {folder}/scan/entropy.png")
    typer.echo(f"  report    {report}")
    typer.echo(f"  explore   ke-ray dashboard {folder}")
    typer.echo(f"  tables    ke-ray results {folder}")
    typer.echo(f"  MLflow    mlflow ui --backend-store-uri sqlite:///{folder}/mlflow.db")
    return max(scanned.exit_code, continued.exit_code, swept.exit_code)


def scan_summary(folder: str) -> list[dict[str, Any]]:
    """One entry per checkpoint: step, knowledge entropy and its error, in nats."""
    from ke_ray.results import ScanFolder

    return [
        {
            "checkpoint": row["checkpoint"],
            "step": row["step"],
            "knowledge_entropy_nats": row["value"],
            "stderr_nats": row["stderr"],
            "status": row["status"],
        }
        for row in ScanFolder.open(folder).entropy().to_pylist()
        if row["status"] != "ok" or (row["measure"] == "knowledge_entropy" and row["layer"] is None)
    ]


def continual_summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per starting checkpoint, fractions and nats, null where it failed."""
    columns = (
        "step",
        "acquisition",
        "acquisition_low",
        "acquisition_high",
        "forgetting",
        "forgetting_low",
        "forgetting_high",
        "probe_logprob_before",
        "probe_logprob_after",
        "knowledge_entropy_before_nats",
        "knowledge_entropy_after_nats",
        "status",
    )
    return [{name: row.get(name) for name in columns} for row in rows]


def scan_story(scan: list[dict[str, Any]]) -> str:
    """What happened to knowledge entropy, from the summary of a scan."""
    curve = [entry for entry in scan if entry["status"] == "ok"]
    if len(curve) < 3:
        return "the messages above: too few checkpoints were scored to see a curve."

    def at(entry: dict[str, Any]) -> str:
        return f"{entry['knowledge_entropy_nats']:.3f} nats at step {entry['step']:,}"

    def value(entry: dict[str, Any]) -> float:
        return float(entry["knowledge_entropy_nats"])

    start, last = curve[0], curve[-1]
    peak = max(curve[1:], key=value)
    dip = min(curve[1 : curve.index(peak) + 1], key=value)
    story = f"knowledge_entropy: {at(start)}, {at(dip)}, a peak of {at(peak)}, {at(last)}."
    fall, error = value(peak) - value(last), max(peak["stderr_nats"], last["stderr_nats"])
    if fall > 4 * error:
        return f"{story} The fall after the peak is the decay that the paper describes."
    return f"{story} No decay after a peak is to be seen in this series."


def continual_story(rows: list[dict[str, Any]]) -> str:
    """How acquisition and forgetting go with the starting step, beside what the paper found."""
    runs = [row for row in rows if row["status"] == "ok"]

    def path(name: str) -> str:
        return " → ".join(f"{100 * row[name]:+.1f} %" for row in runs)

    if not runs:
        return "the messages above: no run has ended well."
    return (
        f"acquisition and forgetting from start to start: A is {path('acquisition')}, F is "
        f"{path('forgetting')}. In the paper, A falls and F rises as knowledge entropy falls; a "
        "difference counts where the intervals in the table are apart."
    )


def _look(text: str) -> None:
    typer.echo(f"\nLook at {text}")


def _heading(text: str) -> None:
    typer.echo(f"\n── {text} " + "─" * max(0, 90 - len(text)))


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command()(demo)
