"""Jobs on a real head node: ``ke-ray submit`` and Ray's own ``ray job submit``."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray_head
import yaml
from command_process import Command, run_command
from waiting import wait_for

from ke_ray.results import ScanFolder

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[3]
PLANTED = "hf_planted0secret1value2"
PROGRAM = [sys.executable, "-m", "ke_ray"]
SLEEPS = "echo begun; sleep 600"


@pytest.fixture(scope="module")
def head() -> Iterator[ray_head.Head]:
    with ray_head.running_head() as running:
        yield running


def submit_arguments(head, folder: Path, *arguments: str, **keys) -> list[str]:
    path = folder / f"{keys.get('name', 'job')}.yaml"
    path.write_text(yaml.safe_dump({"kind": "job", **keys}))
    return ["submit", str(path), "--address", head.address, *arguments]


def submit(head, folder, *arguments, environment=None, **keys) -> Command:
    words = submit_arguments(head, folder, *arguments, **keys)
    return run_command(words, folder, environment=environment or head.environment)


def status_of(head, name: str) -> str:
    return head.jobs(name)[-1]["status"]


def test_a_scan_runs_as_a_job_and_its_results_are_there(head, series, token_ids, tmp_path):
    output = tmp_path / "results" / "scan"
    result = submit(
        head,
        tmp_path,
        name="scan",
        entrypoint=(
            f"python -m ke_ray scan {series} --data ids={token_ids} --num-instances 70 "
            f"--sequence-length 24 --num-actors 1 --no-mlflow --output {output}"
        ),
        working_dir=str(ROOT),
        runtime_env=str(ROOT / "jobs" / "runtime_env.yaml"),
        # A variable that ke_ray itself hands to its workers must not clash with the job's.
        env={"HF_HOME": str(tmp_path / "hf"), "OMP_WAIT_POLICY": "passive"},
        environment=head.environment | {"HF_TOKEN": PLANTED, "MLFLOW_TRACKING_PASSWORD": PLANTED},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "4 scanned, 0 failed" in result.stdout, "the job's log is not on standard output"
    assert "succeeded, exit code 0" in result.stderr
    rows = ScanFolder.open(str(output)).entropy().to_pylist()
    assert {row["checkpoint"] for row in rows} == {f"step{n}" for n in (10, 20, 30, 40)}
    assert {row["status"] for row in rows} == {"ok"}

    holders = [
        path
        for place in (head.folder, tmp_path)
        for path in place.rglob("*")
        if path.is_file()
        and path.name != "token"
        and any(word.encode() in path.read_bytes() for word in (PLANTED, head.token))
    ]
    assert holders == [], "a secret of the submitter, or the token, was written down"
    assert PLANTED not in head.get("/api/jobs/", head.token).text


def test_the_machines_of_a_cluster_are_counted(head):
    counts = (
        "from ke_ray.engine.cluster.job_server import JobServer\n"
        f"print(JobServer({head.address!r}).num_machines())"
    )

    def counted() -> str:  # a fresh process: Ray reads the token's variables once
        command = [sys.executable, "-c", counts]
        return subprocess.check_output(command, env=head.environment, text=True, timeout=300)

    wait_for(lambda: counted().strip() != "None")
    assert counted().strip() == "1"


def test_a_job_that_fails_gives_its_own_exit_code(head, tmp_path):
    result = submit(
        head,
        tmp_path,
        name="wrong",
        entrypoint=f"python -m ke_ray scan {tmp_path}/absent --data x.npy --output o",
        retries=3,
    )
    assert result.returncode == 2, result.stderr
    assert f"{tmp_path}/absent" in result.stdout
    assert len(head.jobs("wrong")) == 1, "a wrong request was tried again"

    result = submit(head, tmp_path, name="seven", entrypoint="exit 7", retries=1)
    assert result.returncode == 7, result.stderr
    assert "attempt 2 of 2" in result.stderr
    ids = [job["submission_id"] for job in head.jobs("seven")]
    assert len(set(ids)) == 2


def test_rays_own_command_runs_ke_ray(head, tmp_path):
    result = subprocess.run(
        [
            *(ray_head.RAY, "job", "submit", "--address", head.address),
            *("--working-dir", ".", "--runtime-env", "jobs/runtime_env.yaml"),
            *("--", "python", "-m", "ke_ray", "--help"),
        ],
        cwd=ROOT,
        env=head.environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Knowledge entropy over checkpoint series" in result.stdout


def test_a_call_without_the_token_is_refused(head, tmp_path):
    assert head.get("/api/jobs/").status_code == 401
    assert head.get("/api/jobs/", token="0" * 64).status_code in (401, 403)
    assert head.get("/api/jobs/", token=head.token).status_code == 200
    nobody = ray_head.clean_environment() | {"HOME": str(tmp_path)}
    (tmp_path / "other").write_text("0" * 64)
    before = len(head.jobs(""))
    words = submit_arguments(head, tmp_path, name="thief", entrypoint="true")
    for environment in (nobody, nobody | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "other")}):
        result = subprocess.run(  # a fresh process: Ray reads these variables once
            [*PROGRAM, *words],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert result.returncode == 2
        assert "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH" in result.stderr
        assert "Traceback" not in result.stderr
    assert len(head.jobs("")) == before


def test_a_job_whose_time_is_up_is_stopped(head, tmp_path):
    result = submit(head, tmp_path, name="long", entrypoint=SLEEPS, timeout_s=10)
    assert result.returncode == 124, result.stderr
    assert "begun" in result.stdout
    assert "timeout_s (10)" in result.stderr
    wait_for(lambda: status_of(head, "long") == "STOPPED")


def test_an_interrupt_detaches_and_stops_only_when_told_to(head, tmp_path):
    def interrupted(name: str, answer: bytes | None) -> tuple[int, str]:
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [*PROGRAM, *submit_arguments(head, tmp_path, name=name, entrypoint=SLEEPS)],
            env=head.environment,
            stdin=subprocess.DEVNULL if answer is None else theirs,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            while (line := process.stdout.readline()) != "begun\n":
                assert line, process.communicate()[1]
            process.send_signal(signal.SIGINT)
            if answer is not None:
                os.write(ours, answer)
            out, err = process.communicate(timeout=60)
            return process.returncode, out + err
        finally:
            os.close(ours)
            os.close(theirs)
            if process.poll() is None:
                process.kill()

    code, said = interrupted("unattended", None)
    assert code == 130
    assert "the job keeps running" in said
    code, said = interrupted("declined", b"n\n")
    assert code == 130
    assert "[y/N]" in said
    assert "the job keeps running" in said
    code, said = interrupted("agreed", b"y\n")
    assert code == 130
    assert "is being stopped" in said
    wait_for(lambda: status_of(head, "agreed") == "STOPPED")
    assert status_of(head, "unattended") == status_of(head, "declined") == "RUNNING"
    for name in ("unattended", "declined"):
        stop = [ray_head.RAY, "job", "stop", "--address", head.address]
        job = head.jobs(name)[-1]["submission_id"]
        subprocess.run([*stop, job], env=head.environment, check=True, capture_output=True)


def test_without_waiting_the_id_is_all_that_is_printed(head, tmp_path):
    result = submit(head, tmp_path, "--no-wait", name="alone", entrypoint="true")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == head.jobs("alone")[-1]["submission_id"]
    wait_for(lambda: status_of(head, "alone") == "SUCCEEDED")
