"""How the studies in a folder stand, from their files alone; nothing is written.

While a command runs, its counts and rates are those that it keeps in ``.ke-ray.progress.json``
(``ke_ray.progress``); afterwards, and in folders of earlier versions, the result files are counted.
Whether the command lives is what its lock or lease says (``ke_ray.storage.sole_writer``).
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from ke_ray import storage
from ke_ray.errors import KeRayError, ResultsError
from ke_ray.progress import TimeLeft
from ke_ray.results.manifest import SCHEMA_VERSION
from ke_ray.storage.ownership import LOCK, MARK, PROGRESS
from ke_ray.storage.sole_writer import EXPIRES_S, Writer, current_writer

State = Literal["running", "failed", "stopped", "finished"]

_ITEMS = {"scan": "checkpoints", "pretrain": "runs", "continual": "runs", "sweep": "trials"}
_DEMO = ("pretrain", "scan", "continual", "sweep")
_DEPTH, _MAX_FOLDERS = 2, 500
# Never looked into for studies: what result folders, MLflow and Ray keep.
_NO_STUDIES = re.compile(
    r"\.|checkpoints$|coefficients$|parts$|mlruns$|mlartifacts$|artifacts$|ray$"
    r"|.*\.(parquet|json|jsonl|gz|safetensors|png|html|db|yaml|log|txt)$"
)
_STEP = re.compile(r"step(\d+)$")
_AT_ONCE = 16
_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True)
class StudyStatus:
    """How one study stands.

    Attributes:
        kind: ``scan``, ``pretrain``, ``continual``, ``sweep`` or ``demo``.
        state: ``running``: its command lives. ``stopped``: it does not, and did not come to its
            end; the same command resumes. ``failed``: it came to its end, and items failed, or an
            error ended it; the same command tries those again. ``finished``.
        items: what is counted: ``checkpoints``, ``runs`` or ``trials``.
        total, done, failed, stopped_early, left: numbers of them; None where they are not known.
        saved_step: of the newest training state, from which a run of training resumes.
        time_left: of a running command.
        note: what it does at the moment, or why something is not known.
        writer: the command that writes the folder, or did when it was killed.
        sign_of_life_s: seconds since its driver was last known to live.
        work_s: seconds since its workers (scorers, trials) last did something.
        command: as it was typed.
        failures: the first few (item, error).
    """

    folder: str
    kind: str
    state: State
    items: str = ""
    total: int | None = None
    done: int | None = None
    failed: int | None = None
    stopped_early: int = 0
    left: int | None = None
    saved_step: int | None = None
    tokens_per_s: float | None = None
    bytes_per_s: float | None = None
    time_left: TimeLeft | None = None
    note: str = ""
    writer: Writer | None = None
    sign_of_life_s: float | None = None
    work_s: float | None = None
    updated_at: str | None = None
    command: str = ""
    failures: tuple[tuple[str, str], ...] = ()


def read_status(folder: str) -> list[StudyStatus]:
    """The studies in a folder, or in folders inside it (two levels down).

    Raises:
        ResultsError: there is no such folder, none of ke_ray's results in it, or a newer ke_ray
            wrote them.
        StorageError: it cannot be read.
    """
    with storage.explained(folder, "read"):
        studies = _walk(folder, _DEPTH)
    if not studies:
        reason = "holds no results" if storage.exists(folder) else "does not exist"
        raise ResultsError(
            f"'{folder}' {reason}; give the output folder of a ke-ray command, or a folder that "
            "holds some."
        )
    return studies


def joint_state(studies: Iterable[StudyStatus]) -> State:
    """Of several studies: running, failed or stopped if one is, else finished."""
    states = {study.state for study in studies}
    order: tuple[State, ...] = ("running", "failed", "stopped", "finished")
    return next(state for state in order if state in states)


def summary(study: StudyStatus) -> str:
    """How many items are done, failed and left, in words."""
    counts = [
        f"{number:,} {word}"
        for number, word in (
            (study.done, "done"),
            (study.failed, "failed"),
            (study.stopped_early or None, "stopped early"),
            (study.left, "left"),
        )
        if number is not None
    ]
    items = study.items.removesuffix("s") if study.total == 1 else study.items
    total = f"{study.total:,} {items}: " if study.total is not None else ""
    text = f"{total}{', '.join(counts)}" if counts else "nothing yet"
    if study.saved_step is not None:
        text += f"; training resumes from step {study.saved_step:,}"
    return text


def _walk(folder: str, depth: int) -> list[StudyStatus]:
    names = storage.list_dir(folder)
    marked = _text(_json(folder, MARK).get("kind")) if MARK in names else None
    manifest = _json(folder, "manifest.json") if "manifest.json" in names else {}
    if "schema_version" in manifest or marked in _ITEMS:
        return [_study(folder, names, _text(manifest.get("kind")) or marked or "", manifest)]
    inside = [name for name in names if not _NO_STUDIES.match(name)] if depth else []
    if len(inside) > _MAX_FOLDERS:
        raise ResultsError(
            f"'{folder}' holds no manifest.json, but {len(inside)} other things; give the output "
            "folder of a ke-ray command."
        )
    below = _each(lambda name: _walk(storage.join(folder, name), depth - 1), inside)
    studies = [study for found in below for study in found]
    return [_demo(folder, names, studies), *studies] if marked == "demo" else studies


def _study(
    folder: str, names: Sequence[str], kind: str, manifest: Mapping[str, Any]
) -> StudyStatus:
    version = manifest.get("schema_version", 0)
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise ResultsError(
            f"'{folder}' has schema_version {version!r:.20}, this ke_ray reads up to "
            f"{SCHEMA_VERSION}; update ke_ray."
        )
    ends: dict[str | None, State] = {"finished": "finished", "failed": "failed"}
    study = StudyStatus(
        folder,
        kind,
        ends.get(_text(manifest.get("status")), "stopped"),
        _ITEMS.get(kind, "items"),
        updated_at=_text(manifest.get("updated_at")),
        command=_text(manifest.get("command")) or "",
        note="" if manifest else "the command has not written its manifest",
    )
    study, progress = _with_writer(study, names)
    if study.state == "running" and progress:
        return _with_progress(study, progress)
    if study.state == "running":
        is_live = "cost" in manifest  # ke_ray.callbacks
        note = "the command prepares its work, or writes its last files"
        study = replace(study, note="measured while it is trained" if is_live else note)
    try:
        return replace(study, **_COUNTS.get(kind, _no_counts)(folder, manifest))
    except (KeRayError, OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        return replace(study, note=f"its files cannot be counted: {error}")


def _demo(folder: str, names: Sequence[str], studies: Sequence[StudyStatus]) -> StudyStatus:
    """The demo itself, whose parts are studies; its report is written last."""
    at_end = "report.html" in names and len(studies) == len(_DEMO)
    state = joint_state(studies) if at_end else "stopped"
    finished = sum(study.state == "finished" for study in studies)
    failed = sum(study.state == "failed" for study in studies)
    left = len(_DEMO) - finished - failed
    status = StudyStatus(
        *(folder, "demo", state, "studies", len(_DEMO), finished, failed),
        left=left,
        command="ke-ray demo",
    )
    return _with_writer(status, names)[0]


def _with_writer(
    study: StudyStatus, names: Sequence[str]
) -> tuple[StudyStatus, Mapping[str, Any] | None]:
    """The study with what is known of its command; and that command's progress, if it wrote any."""
    writer = current_writer(storage.join(study.folder, LOCK)) if LOCK in names else None
    progress = _json(study.folder, PROGRESS) if PROGRESS in names else {}
    by = progress.get("host"), progress.get("pid")
    if writer is not None and by != (writer.host, writer.pid):
        progress = {}  # of an earlier command
    beat_s = _age_s(progress.get("updated_at"))
    if writer is not None:
        # A lock that is free here may be one of another host, on a disk that passes none on.
        is_alive, elsewhere = writer.is_alive, writer.host != socket.gethostname()
        if is_alive is None or (not is_alive and elsewhere and writer.renewed_s is None):
            is_alive = beat_s is not None and beat_s < EXPIRES_S
        writer = replace(writer, is_alive=is_alive)
        if is_alive:
            study = replace(study, state="running")
    ages = [age for age in (beat_s, writer.renewed_s if writer else None) if age is not None]
    return replace(
        study,
        writer=writer,
        sign_of_life_s=min(ages, default=None),
        work_s=_age_s(progress.get("worked_at")),
    ), progress or None


def _with_progress(study: StudyStatus, progress: Mapping[str, Any]) -> StudyStatus:
    expected = _number(progress.get("seconds_left"))
    low, high = (_number(progress.get(f"seconds_left_{end}")) for end in ("low", "high"))
    failures = progress.get("failures")
    counts: dict[str, Any] = {
        key: _count(progress.get(key)) for key in ("total", "done", "failed", "left")
    }
    return replace(
        study,
        **counts,
        stopped_early=_count(progress.get("stopped_early")) or 0,
        tokens_per_s=_number(progress.get("tokens_per_s")),
        bytes_per_s=_number(progress.get("bytes_per_s")),
        time_left=None if expected is None else TimeLeft(expected, low, high),
        note=_text(progress.get("note"))
        or ("starting up: nothing has been worked on yet" if study.work_s is None else ""),
        failures=_failures(failures if isinstance(failures, list) else ()),
    )


# --- counting result files ---------------------------------------------------------------------


def _scan_counts(folder: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Checkpoints of which all corpora and measures of the last command have values are done."""
    names = [entry["name"] for entry in manifest.get("checkpoints", ())]
    config = manifest.get("config", {})
    wanted = {(corpus, m) for corpus in config.get("data", ()) for m in config.get("measures", ())}
    if manifest.get("status") == "finished" or "merged_from" in manifest:
        wanted = set()  # scans of other checkpoints, corpora and measures may share the folder
    parts = storage.join(folder, "parts")
    uris = [
        storage.join(parts, n) for n in storage.list_dir(parts) if n.endswith(".entropy.parquet")
    ]
    whole = storage.join(folder, "entropy.parquet")
    uris = [*([whole] if storage.exists(whole) else []), *uris]
    current: dict[str, Any] = {}  # instances of the round that a wanted precision is in
    if config.get("precision") or config.get("stderr_nats"):
        current = {n: c.get("num_instances") for n, c in manifest.get("corpora", {}).items()}
    measured: dict[str, set[tuple[Any, Any]]] = {}
    errors: dict[tuple[str, Any], str] = {}
    keys = ["checkpoint", "corpus", "measure", "status", "error", "num_instances"]
    for rows in _each(lambda uri: _distinct(uri, keys), uris):
        ended = {(row["checkpoint"], row["corpus"]) for row in rows if row["status"] != "failed"}
        errors = {key: error for key, error in errors.items() if key not in ended}
        for row in rows:
            if row["status"] == "failed":
                errors[row["checkpoint"], row["corpus"]] = row["error"]
            elif current.get(row["corpus"], row["num_instances"]) == row["num_instances"]:
                pairs = measured.setdefault(row["checkpoint"], set())
                pairs.add((row["corpus"], row["measure"]))
    failed = {checkpoint: error for (checkpoint, _), error in errors.items()}
    done = sum(name in measured and wanted <= measured[name] for name in {*names} - {*failed})
    counts = {"total": len(names), "done": done, "failed": len(failed)}
    left = len(names) - done - len(failed)
    return {**counts, "left": left, "failures": _failures(failed.items())}


def _continual_counts(folder: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    names = list(manifest.get("runs", ()))
    rows = _rows(folder, "runs.parquet", "run", names)
    return _run_counts(folder, rows, len(names))


def _sweep_counts(folder: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    names = storage.list_dir(storage.join(folder, "runs"))
    rows = _rows(folder, "trials.parquet", "trial_id", names)
    return _run_counts(folder, rows, _count(manifest.get("num_trials")))


def _rows(folder: str, table: str, key: str, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Runs or trials that ended, by name: of the table, and of ``run.json`` where it has none."""
    path, rows = storage.join(folder, table), {}
    if storage.exists(path):
        found = _distinct(path, [key, "status", "error"])
        rows = {row[key]: row for row in found if row["status"] != "failed"}

    def ended(name: str) -> dict[str, Any]:
        row = _json(storage.join(folder, "runs", name), "run.json").get("row")
        return row if isinstance(row, dict) else {}

    others = [name for name in names if name not in rows]
    return rows | {name: row for name, row in zip(others, _each(ended, others), strict=True) if row}


def _run_counts(
    folder: str, rows: Mapping[str, Mapping[str, Any]], total: int | None
) -> dict[str, Any]:
    statuses = [row.get("status") for row in rows.values()]
    failed = {name: row.get("error") for name, row in rows.items() if row["status"] == "failed"}
    stopped = statuses.count("stopped")
    return {
        "total": total,
        "done": statuses.count("ok"),
        "failed": len(failed),
        "stopped_early": stopped,
        "left": None if total is None else max(0, total - len(rows)),
        "failures": _failures(failed.items()),
    }


def _pretrain_counts(folder: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    finished = int(manifest.get("status") == "finished")
    failed = int(manifest.get("status") == "failed")
    left = 1 - finished - failed
    steps = [_STEP.match(name) for name in storage.list_dir(storage.join(folder, "state"))]
    saved = sorted((match for match in steps if match), key=lambda m: int(m[1]), reverse=True)
    # A state without its last file was left incomplete by a kill.
    newest = (m for m in saved if storage.exists(storage.join(folder, "state", m[0], "state.json")))
    match = None if finished else next(newest, None)
    return {
        **{"total": 1, "done": finished, "failed": failed, "left": left},
        "saved_step": int(match[1]) if match else None,
    }


def _no_counts(folder: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {}


_COUNTS: dict[str, Callable[[str, Mapping[str, Any]], dict[str, Any]]] = {
    "scan": _scan_counts,
    "pretrain": _pretrain_counts,
    "continual": _continual_counts,
    "sweep": _sweep_counts,
}


def _distinct(uri: str, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The different values of some columns; those that the table lacks are null."""
    table = storage.read_table(uri)
    present = [key for key in keys if key in table.column_names]
    rows = table.group_by(present).aggregate([]).to_pylist()
    return [{**dict.fromkeys(keys), **row} for row in rows]


def _each(function: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
    """The results for all items, in order: on object stores each is a wait."""
    if len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(function, items))


def _json(folder: str, name: str) -> dict[str, Any]:
    """A file's mapping; empty where it is gone, or damaged."""
    try:
        values = storage.read_json(storage.join(folder, name))
    except (OSError, KeRayError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _failures(pairs: Iterable[Sequence[Any]]) -> tuple[tuple[str, str], ...]:
    return tuple((str(pair[0]), str(pair[1] or "")) for pair in list(pairs)[:10] if len(pair) == 2)


def _age_s(at: Any) -> float | None:
    """Seconds since a time in seconds; clocks of two hosts may differ, so that it is at least 0."""
    number = _number(at)
    return None if number is None else max(0.0, time.time() - number)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
