"""Secrets are planted, everything is run, and everything that was written is searched for them."""

from __future__ import annotations

import base64
import functools
import http.server
import os
import shutil
import tempfile
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_process import run_command
from tiny_studies import tiny_continual

pytestmark = [pytest.mark.ray, pytest.mark.slow]

USER, PASSWORD = "planted-user", "planted@pass word"
SECRETS = {
    "HF_TOKEN": "hf_plantedtoken0123456789",
    "RAY_AUTH_TOKEN": "ab12" * 16,
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-password",
    "a password in MLFLOW_TRACKING_URI": "planted-uri-password",
    "a password in a source": PASSWORD,
    "the same, quoted": urllib.parse.quote(PASSWORD, safe=""),
    "the same, as it is sent": base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode(),
}


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files for those who log in."""

    def log_message(self, *_: object) -> None:
        pass

    def send_head(self):  # type: ignore[no-untyped-def]
        given = self.headers.get("Authorization", "")
        if given != "Basic " + SECRETS["the same, as it is sent"]:
            self.send_error(401)
            return None
        return super().send_head()


@pytest.fixture
def place(tmp_path: Path, pretrained: Path) -> Path:
    """Inputs in ``in/``, served over HTTP; everything else under it may hold no secret."""
    shutil.copytree(pretrained, tmp_path / "in" / "series")
    return tmp_path


@pytest.fixture
def site(place: Path) -> Iterator[str]:
    """The base URL of ``in/``, with user name and password."""
    handler = functools.partial(Handler, directory=str(place / "in"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        login = f"{USER}:{SECRETS['the same, quoted']}"
        yield f"http://{login}@127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def mlflow_uri(mlflow_server: str) -> str:
    """A real MLflow server's address, with a password that it does not ask for."""
    password = SECRETS["a password in MLFLOW_TRACKING_URI"]
    return mlflow_server.replace("http://", f"http://planted-user:{password}@")


def test_no_output_holds_a_planted_secret(
    place: Path, site: str, mlflow_uri: str, mlflow_folder: Path
) -> None:
    pages_before = set(mlflow_folder.rglob("*.html"))
    ray_folder = Path(tempfile.mkdtemp(prefix="kr"))  # short: socket paths have 107 characters
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    environment |= {name: value for name, value in SECRETS.items() if name.isidentifier()}
    environment |= {
        "MLFLOW_TRACKING_URI": mlflow_uri,
        "MLFLOW_EXPERIMENT_NAME": "planted",
        "RAY_AUTH_MODE": "token",
        "RAY_TMPDIR": str(ray_folder),
        "KE_RAY_CACHE": str(place / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    checkpoint = f"{site}/series/checkpoints/step10"
    documents = f"{site}/series/world/documents.jsonl.gz"
    study = tiny_continual(
        place / "continual",
        place / "in" / "series",
        starts={"spec": checkpoint, "steps": None},
        tokenizer=f"{checkpoint}/tokenizer.json",
        corpus={"source": f"{site}/series/world/other_documents.jsonl.gz"},
        injection=None,
        downstream=None,
        held_out=None,
        entropy={"source": documents},
        executor="ray",
        cpus_per_worker=1,
        mlflow={"enabled": True},
    )
    (place / "in" / "continual.yaml").write_text(study.model_dump_json(exclude_unset=True))
    (place / "in" / "sweep.yaml").write_text(
        "kind: sweep\nbase: continual.yaml\nspace: {optimizer.learning_rate: [0.001]}\n"
        f"objectives: [knowledge_entropy_after_nats]\noutput: {place / 'sweep'}\n"
    )
    (place / "in" / "list.csv").write_text(f"step,url\n10,{checkpoint}\n5,{site}/absent/step5\n")
    scan = ["--data", f"x={documents}", "--tokenizer", f"{checkpoint}/tokenizer.json"]
    scan += ["--num-instances", "8", "--sequence-length", "32", "-o", str(place / "scan")]
    said = ""
    for command, code in (
        (["scan", f"{place}/in/list.csv", *scan], 1),  # one of the two is not there
        (["scan", checkpoint, *scan, "--dry-run"], 0),
        (["scan", f"{site}/absent", *scan], 2),
        (["checkpoints", checkpoint, "--json"], 0),
        (["continual", f"{place}/in/continual.yaml"], 0),
        (["continual", f"{place}/in/continual.yaml", "--dry-run"], 0),
        (["sweep", f"{place}/in/sweep.yaml"], 0),
        (["report", str(place / "scan"), str(place / "sweep"), "-o", str(place / "r.html")], 0),
        (["submit", str(place / "in" / "job.yaml")], 2),
    ):
        (place / "in" / "job.yaml").write_text(f"kind: job\nentrypoint: ke-ray scan {checkpoint}\n")
        done = run_command(["-v", *command], place / "in", environment=environment, cwd=place)
        said += done.stdout + done.stderr
        assert done.returncode == code, f"{command[0]}: {done.stdout + done.stderr}"
    for folder in ("scan", "continual", "sweep"):
        assert (place / folder / "manifest.json").is_file()
    assert set(mlflow_folder.rglob("*.html")) - pages_before, "no artifact was logged"
    assert list(ray_folder.rglob("raylet.out")), "Ray's logs are elsewhere"

    found = [f"the terminal shows {name}" for name, secret in SECRETS.items() if secret in said]
    for root in (place, ray_folder, mlflow_folder):
        for path in sorted(root.rglob("*")):
            if path.is_file() and place / "in" not in path.parents:
                content = path.read_bytes()
                found += [
                    f"{path} holds {name}"
                    for name, secret in SECRETS.items()
                    if secret.encode() in content or secret in path.name
                ]
    shutil.rmtree(ray_folder, ignore_errors=True)
    assert found == [], "\n".join(found)
