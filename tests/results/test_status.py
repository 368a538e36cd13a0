"""How studies stand: real commands that run and are killed, leases on S3, files of every kind."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from command_process import run_command, start_command
from tiny_studies import tiny_pretrain, write_study
from waiting import wait_for

from ke_ray import storage
from ke_ray.errors import ResultsError
from ke_ray.results import ScanFolder, new_manifest, write_manifest
from ke_ray.results.columns import schema, to_table
from ke_ray.results.status import StudyStatus, joint_state, read_status
from ke_ray.storage import sole_writer as locks
from ke_ray.storage.ownership import LOCK, MARK, PROGRESS, claimed
from ke_ray.storage.sole_writer import sole_writer


def only(folder: object) -> StudyStatus:
    (study,) = read_status(str(folder))
    return study


def scan_folder(uri: str, names: list[str], corpora: tuple[str, ...] = ("dolma",)) -> ScanFolder:
    """A scan of these checkpoints, of which nothing is finished."""
    config = {"data": dict.fromkeys(corpora, "x"), "measures": ["knowledge_entropy", "gini"]}
    folder = ScanFolder(
        uri,
        new_manifest("scan", config)
        | {
            "identity": {"corpora": dict.fromkeys(corpora, "sha")},
            "checkpoints": [{"name": name} for name in names],
        },
    )
    folder.write_manifest()
    return folder


def rows(checkpoint: str, corpus: str = "dolma", error: str | None = None) -> list[dict[str, Any]]:
    common = {"checkpoint": checkpoint, "step": int(checkpoint[4:]), "corpus": corpus}
    if error is not None:
        return [{**common, "status": "failed", "error": error}]
    measures = ("knowledge_entropy", "gini")
    return [{**common, "measure": m, "value": 1.0, "status": "ok"} for m in measures]


# --- real commands -----------------------------------------------------------------------------


def test_a_training_is_told_while_it_runs_when_it_is_killed_and_when_it_is_interrupted(
    tmp_path: Path,
) -> None:
    output = tmp_path / "out"
    study = tiny_pretrain(output, num_steps=100_000, save_every=20, checkpoints={"steps": [1]})
    file = write_study(study, tmp_path / "study.yaml")
    command = start_command(["pretrain", file], tmp_path / "said")
    wait_for(lambda: (output / "state").exists() and only(output).work_s is not None, command)
    asked = run_command(["status", output, "--json"], tmp_path)
    values = json.loads(asked.stdout)
    assert (asked.returncode, values["exit_code"], values["state"]) == (3, 3, "running")
    (told,) = values["studies"]
    assert told["writer"] | {"since": ""} == {
        **{"host": os.uname().nodename, "pid": command.pid, "since": "", "is_alive": True}
    }
    assert (told["total"], told["done"], told["left"]) == (1, 0, 1)
    assert told["seconds_since_sign_of_life"] < locks.EXPIRES_S
    assert "step " in told["note"]
    assert command.returncode is None, "looking on does not disturb"

    wait_for(lambda: any(output.glob("state/step*/state.json")), command)
    command.send_signal(signal.SIGKILL)
    command.wait()
    killed = only(output)
    assert killed.state == "stopped"
    assert killed.writer is not None
    assert (killed.writer.pid, killed.writer.is_alive) == (command.pid, False)
    assert killed.saved_step is not None
    assert killed.saved_step % 20 == 0
    lines = run_command(["status", output], tmp_path)
    assert lines.returncode == 4
    assert f"training resumes from step {killed.saved_step}" in lines.stdout
    assert f"process {command.pid} on {os.uname().nodename}" in lines.stdout
    assert f"command: ke-ray pretrain {file}" in lines.stdout

    before = killed.saved_step
    command = start_command(["pretrain", file], tmp_path / "said")
    wait_for(lambda: (only(output).saved_step or 0) > before or _has_step(output, before), command)
    command.send_signal(signal.SIGINT)
    assert command.wait() == 130
    interrupted = only(output)
    assert (interrupted.state, interrupted.writer) == ("stopped", None)
    assert f"Saved in {output}: 1 run: 0 done, 0 failed, 1 left; training resumes from step " in (
        command.stdout
    )
    assert "\x1b" not in command.stdout, "a log file holds no commands for terminals"
    assert not (output / PROGRESS).exists()


def _has_step(output: Path, step: int) -> bool:
    return any(int(p.parent.name[4:]) > step for p in output.glob("state/step*/state.json"))


def test_a_finished_study_is_told_with_exit_code_0(pretrained: Path, tmp_path: Path) -> None:
    asked = run_command(["status", pretrained], tmp_path)
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.splitlines()[:2] == [
        f"{pretrained}: pretrain, finished",
        "  1 run: 1 done, 0 failed, 0 left",
    ]


# --- who writes --------------------------------------------------------------------------------


def test_a_lease_on_s3_tells_whether_its_command_lives(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = f"{s3}/leased"
    scan_folder(folder, ["step1", "step2"]).write_part("step1", rows("step1"))
    with sole_writer(storage.join(folder, LOCK), folder):
        study = only(folder)
        assert study.state == "running"
        assert study.writer is not None
        assert (study.writer.pid, study.writer.host) == (os.getpid(), os.uname().nodename)
        assert study.sign_of_life_s is not None
        assert (study.done, study.left) == (1, 1)
        lease = storage.read_bytes(storage.join(folder, LOCK))
    assert only(folder).state == "stopped"
    storage.write_atomic(storage.join(folder, LOCK), lease)  # as a killed command leaves it
    assert only(folder).state == "running", "until the lease expires"
    monkeypatch.setattr(locks, "EXPIRES_S", 0.0)
    study = only(folder)
    assert (study.state, study.writer and study.writer.is_alive) == ("stopped", False)


def test_progress_counts_only_of_the_command_that_writes(tmp_path: Path) -> None:
    folder = str(tmp_path / "scan")
    scan_folder(folder, ["step1", "step2", "step3"]).write_part("step1", rows("step1"))
    told = {"total": 3, "done": 2, "failed": 0, "left": 1, "updated_at": time.time()}
    with claimed(folder, "scan"):
        own = {"host": os.uname().nodename, "pid": os.getpid()}
        storage.write_json(storage.join(folder, PROGRESS), {**told, **own})
        assert (only(folder).done, only(folder).left) == (2, 1)
        storage.write_json(storage.join(folder, PROGRESS), {**told, **own, "pid": 1})
        assert (only(folder).done, only(folder).left) == (1, 2)
        storage.remove(storage.join(folder, PROGRESS))


def test_a_command_on_another_host_whose_lock_does_not_reach_here_lives_while_its_heart_beats(
    tmp_path: Path,
) -> None:
    folder = str(tmp_path / "scan")
    scan_folder(folder, ["step1"])
    other = {"host": "elsewhere", "pid": 7}
    lock = {"ke_ray": "lock", "since": "2026-01-01T00:00:00+00:00", **other}
    storage.write_json(storage.join(folder, LOCK), lock)
    progress = {**other, "total": 1, "done": 0, "failed": 0, "left": 1}
    storage.write_json(storage.join(folder, PROGRESS), {**progress, "updated_at": time.time()})
    assert only(folder).state == "running"
    long_ago = time.time() - 2 * locks.EXPIRES_S
    storage.write_json(storage.join(folder, PROGRESS), {**progress, "updated_at": long_ago})
    study = only(folder)
    assert study.state == "stopped"
    assert study.sign_of_life_s is not None
    assert study.sign_of_life_s >= 2 * locks.EXPIRES_S


def test_looking_on_never_stops_a_command_from_starting(tmp_path: Path) -> None:
    lock = str(tmp_path / LOCK)
    storage.write_json(lock, {"ke_ray": "lock", "host": "h", "pid": 1, "since": ""})
    with open(lock) as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as current_writer does, for much longer
        release = threading.Timer(0.06, fcntl.flock, (file, fcntl.LOCK_UN))
        release.start()
        with sole_writer(lock, "out"):
            pass
        release.join()


# --- counting files ----------------------------------------------------------------------------


def test_a_scan_is_counted_by_checkpoint_corpus_and_measure(tmp_path: Path) -> None:
    names = [f"step{number}" for number in range(1, 7)]
    folder = scan_folder(str(tmp_path), names, corpora=("dolma", "web"))
    for name in ("step1", "step2"):
        folder.write_part(name, rows(name) + rows(name, "web"))
    folder.write_part("step3", rows("step3"))  # one corpus of two
    folder.write_part("step4", rows("step4", error="torn") + rows("step4", "web", error="torn"))
    folder.consolidate()
    folder.write_part("step5", rows("step5", error="away"))
    study = only(tmp_path)
    assert (study.state, study.total) == ("stopped", 6)
    assert (study.done, study.failed, study.left) == (2, 2, 2)
    assert study.failures == (("step4", "torn"), ("step5", "away"))
    folder.write_part("step4", rows("step4") + rows("step4", "web"))  # another attempt
    assert (only(tmp_path).done, only(tmp_path).failed) == (3, 1)


def test_a_folder_of_a_thousand_checkpoints_is_read_with_a_few_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"step{number}" for number in range(1000)]
    folder = scan_folder(str(tmp_path), names)
    table = [row for name in names[:990] for row in rows(name)]
    columns = schema("entropy")
    parquet.write_table(pa.Table.from_pylist(table, columns), tmp_path / "entropy.parquet")
    folder.write_part("step990", rows("step990"))
    opened: list[str] = []
    for name in ("read_json", "open_table", "list_dir", "exists"):
        real = getattr(storage, name)
        monkeypatch.setattr(
            storage, name, lambda uri, real=real: (opened.append(str(uri)), real(uri))[1]
        )
    study = only(tmp_path)
    assert (study.done, study.left) == (991, 9)
    assert len(opened) < 10
    with sole_writer(str(tmp_path / LOCK), "out"):
        own = {"host": os.uname().nodename, "pid": os.getpid(), "updated_at": time.time()}
        storage.write_json(tmp_path / PROGRESS, {**own, "total": 1000, "done": 991, "left": 9})
        opened.clear()
        assert only(tmp_path).done == 991
        assert not [path for path in opened if path.endswith(".parquet")]


def test_runs_and_trials_are_counted_from_tables_and_from_rows_that_came_after(
    tmp_path: Path,
) -> None:
    runs = {"a": "ok", "b": "failed", "c": None, "d": "ok"}
    config: dict[str, Any] = {"output": "x"}
    manifest = new_manifest("continual", config) | {"runs": [*runs], "status": "interrupted"}
    write_manifest(str(tmp_path / "c"), manifest)
    table = [{"run": "a", "status": "ok"}, {"run": "b", "status": "failed", "error": "NaN"}]
    storage.write_table(tmp_path / "c" / "runs.parquet", to_table("runs", table))
    for name in ("b", "d"):
        row = {"run": name, "status": runs[name], "error": "NaN" if name == "b" else None}
        storage.write_json(tmp_path / "c" / "runs" / name / "run.json", {"row": row})
    continual = only(tmp_path / "c")
    assert (continual.total, continual.done, continual.failed, continual.left) == (4, 2, 1, 1)
    assert continual.failures == (("b", "NaN"),)

    write_manifest(str(tmp_path / "s"), new_manifest("sweep", config) | {"num_trials": 5})
    for name, end in {"0": "ok", "1": "stopped", "2": "failed"}.items():
        row = {"status": end, "error": "died"}
        storage.write_json(tmp_path / "s" / "runs" / name / "run.json", {"row": row})
    storage.make_dirs(tmp_path / "s" / "runs" / "3" / "state")  # under way
    sweep = only(tmp_path / "s")
    counts = (sweep.total, sweep.done, sweep.stopped_early, sweep.failed, sweep.left)
    assert counts == (5, 1, 1, 1, 2)


# --- several studies, and none -----------------------------------------------------------------


def test_a_demo_is_told_with_its_parts_and_is_over_with_its_report(
    pretrained: Path, tmp_path: Path
) -> None:
    demo = tmp_path / "demo"
    shutil.copytree(pretrained, demo / "pretrain")
    storage.write_json(demo / MARK, {"ke_ray": "output", "kind": "demo"})
    first, *parts = read_status(str(demo))
    assert (first.kind, first.state, first.done, first.left) == ("demo", "stopped", 1, 3)
    assert [(part.kind, part.state) for part in parts] == [("pretrain", "finished")]
    for kind in ("scan", "continual", "sweep"):
        config: dict[str, Any] = {}
        finished = new_manifest(kind, config) | {"status": "finished"}
        write_manifest(str(demo / kind), finished)
    assert read_status(str(demo))[0].state == "stopped", "the report is missing"
    (demo / "report.html").write_text("")
    assert read_status(str(demo))[0].state == "finished"
    with claimed(str(demo), "demo"):
        assert read_status(str(demo))[0].state == "running"


def test_of_several_studies_the_one_that_needs_attention_counts(tmp_path: Path) -> None:
    config: dict[str, Any] = {}
    for name, end in {"a": "finished", "b": "running", "c": "failed"}.items():
        write_manifest(str(tmp_path / name), new_manifest("scan", config) | {"status": end})
    studies = read_status(str(tmp_path))
    assert [study.state for study in studies] == ["finished", "stopped", "failed"]
    assert joint_state(studies) == "failed"
    assert joint_state(studies[:2]) == "stopped"
    with claimed(str(tmp_path / "b"), "scan"):
        assert joint_state(read_status(str(tmp_path))) == "running"


def test_what_holds_no_results_is_refused_and_damage_is_told(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match=r"absent' does not exist"):
        read_status(str(tmp_path / "absent"))
    with pytest.raises(ResultsError, match="holds no results; give the output folder"):
        read_status(str(tmp_path))
    file = tmp_path / "file.txt"
    file.write_text("x")
    asked = run_command(["status", file], tmp_path)
    assert (asked.returncode, asked.stderr.count("\n")) == (2, 1)
    broken = tmp_path / "broken"
    scan_folder(str(broken), ["step1"])
    (broken / "entropy.parquet").write_bytes(b"no table")
    study = only(broken)
    assert (study.state, study.done) == ("stopped", None)
    assert "cannot be counted" in study.note
    (broken / "manifest.json").write_text('{"kind": "scan", "schema_version": 99}')
    with pytest.raises(ResultsError, match="schema_version 99"):
        read_status(str(broken))
    for other in ('{"kind": "scan"}', "[1]", '{"manifest_version": 3}', "{"):
        (broken / "manifest.json").write_text(other)  # not of ke_ray
        with pytest.raises(ResultsError, match="holds no results"):
            read_status(str(broken))


def test_names_and_errors_in_files_give_a_terminal_no_commands(tmp_path: Path) -> None:
    folder = scan_folder(str(tmp_path / "scan"), ["step1"])
    folder.write_part("step1", rows("step1", error="\x1b]52;c;aGk=\x07 torn\nsecond line"))
    asked = run_command(["status", tmp_path / "scan"], tmp_path)
    assert asked.returncode == 4
    assert "  failed: step1: \\x1b]52;c;aGk=\\x07 torn second line" in asked.stdout.splitlines()
    assert "\x1b" not in asked.stdout


def test_it_needs_neither_torch_nor_ray(tmp_path: Path) -> None:
    scan_folder(str(tmp_path), ["step1"]).write_part("step1", rows("step1"))
    code = (
        "import sys; from ke_ray.results.status import read_status; "
        f"assert read_status({str(tmp_path)!r})[0].done == 1; print(*sys.modules)"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"torch", "ray", "transformers", "mlflow"} & set(loaded.stdout.split())
