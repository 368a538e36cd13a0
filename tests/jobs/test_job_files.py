"""Job files: the shipped ones name commands that exist, and none carries a secret."""

from __future__ import annotations

import shlex
import urllib.parse
import zipfile
from pathlib import Path
from string import Template

import pytest
import typer
import yaml

from ke_ray.cli import app
from ke_ray.config import load_study
from ke_ray.errors import ConfigError
from ke_ray.secrets import is_secret_name
from ke_ray.studies.continual import ContinualStudy
from ke_ray.studies.jobs import load_job, refuse_loopback_tracking, runtime_env_of
from ke_ray.studies.scan import ScanStudy
from ke_ray.studies.sweep import load_sweep
from ke_ray.studies.training import PretrainStudy
from ke_ray.studies.upload import SECRET_FILES

ROOT = Path(__file__).parents[2]
JOBS = sorted(
    path for path in (ROOT / "jobs").glob("*.yaml") if path.read_text().count("\nkind: job\n")
)
PLANTED = "hf_planted0secret1value2"
QUOTED = 'pl"anted\\pass word'
SUBMITTER = {"MLFLOW_TRACKING_URI": "http://mlflow.internal:5000"}


def write(folder: Path, **keys) -> str:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump({"kind": "job", "entrypoint": "true", **keys}))
    return str(path)


def entry_of(path: Path) -> tuple[str, dict[str, str]]:
    """The command line of a job or of a RayJob, and its variables."""
    if path.stem.startswith("kuberay"):
        return yaml.safe_load(path.read_text())["spec"]["entrypoint"], {}
    job = load_job(str(path), [], SUBMITTER)
    return job.entrypoint, job.env


def test_there_is_a_job_for_each_kind_of_study():
    assert {path.stem for path in JOBS} == {"scan", "pretrain", "continual", "sweep"}


@pytest.mark.parametrize(
    "path", [*JOBS, *sorted((ROOT / "jobs").glob("kuberay-*.yaml"))], ids=lambda path: path.stem
)
def test_the_command_line_is_one_that_ke_ray_takes(path):
    entry, variables = entry_of(path)
    expanded = Template(entry).substitute(variables)  # KeyError: a variable that nobody sets
    *python, name, study = shlex.split(expanded)[:5]
    assert python == ["python", "-m", "ke_ray"]
    command = typer.main.get_command(app).commands[name]
    context = command.make_context(name, shlex.split(expanded)[4:])
    file = ROOT / study.removeprefix("/opt/ke_ray/")
    overrides = list(context.params["overrides"] or [])
    if name == "sweep":
        load_sweep(str(file), overrides)
    else:
        kinds = {"scan": ScanStudy, "pretrain": PretrainStudy, "continual": ContinualStudy}
        load_study(str(file), kinds[name], overrides)
    assert context.params["output"].startswith("/mnt/ke_ray/"), "results must outlive the job"


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_shipped_job_is_found_from_any_folder(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    job = load_job(str(path), [], SUBMITTER)
    runtime_env = runtime_env_of(job, SUBMITTER)
    assert Path(runtime_env["working_dir"]).resolve() == ROOT
    assert runtime_env["env_vars"]["KE_RAY_RUNS"] == "/mnt/ke_ray/runs"
    assert runtime_env["env_vars"]["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert not any(is_secret_name(name) for name in runtime_env["env_vars"])


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_shipped_job_takes_the_mlflow_address_from_its_submitter(path):
    assert "127.0.0.1:5000" not in path.read_text()
    for environ in ({}, {"MLFLOW_TRACKING_URI": ""}):
        with pytest.raises(
            ConfigError, match=r"MLFLOW_TRACKING_URI .*every node.*--set env\.MLFLOW"
        ):
            load_job(str(path), [], environ)
    for job in (
        load_job(str(path), [], SUBMITTER),
        load_job(str(path), [f"env.MLFLOW_TRACKING_URI={SUBMITTER['MLFLOW_TRACKING_URI']}"], {}),
    ):
        env_vars = runtime_env_of(job, {})["env_vars"]
        assert env_vars["MLFLOW_TRACKING_URI"] == SUBMITTER["MLFLOW_TRACKING_URI"]
        assert "--mlflow-uri $MLFLOW_TRACKING_URI" in job.entrypoint, "a study may name another"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "0.0.0.0", "127.8.0.9"])
@pytest.mark.parametrize("form", ["env", "option", "override"])
def test_a_loopback_mlflow_address_is_refused_where_there_are_other_nodes(tmp_path, host, form):
    uri = f"http://{host}:5000"
    entry = {"option": f"--mlflow-uri '{uri}'", "override": f"--set mlflow.uri={uri}"}
    job = load_job(
        write(
            tmp_path,
            entrypoint=f"ke-ray sweep x {entry.get(form, '')}",
            env={"MLFLOW_TRACKING_URI": uri} if form == "env" else {},
        ),
        [],
        {},
    )
    runtime_env = runtime_env_of(job, {})
    with pytest.raises(ConfigError, match=r"loopback.* 3 machines") as error:
        refuse_loopback_tracking(job, runtime_env, 3)
    assert uri in str(error.value)
    for unharmed in (1, None):
        refuse_loopback_tracking(job, runtime_env, unharmed)


def test_an_address_of_another_machine_is_taken(tmp_path):
    job = load_job(
        write(tmp_path, entrypoint="ke-ray scan x --mlflow-uri http://10.77.0.101:5000"), [], {}
    )
    refuse_loopback_tracking(job, {"env_vars": SUBMITTER}, 3)


def sent(folder: Path, excludes: list[str]) -> set[str]:
    """The names of the files that Ray would upload."""
    from ray._private.runtime_env.packaging import create_package

    package = folder.parent / "package.zip"
    create_package(str(folder), package, include_gitignore=True, excludes=excludes)
    with zipfile.ZipFile(package) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def test_code_and_studies_travel_and_nothing_else(tmp_path):
    travels = [
        "ke_ray/__init__.py",
        "ke_ray/data/corpus.py",
        "ke_ray/report/runs.py",
        "ke_ray/report/assets/report.css",
        "ke_ray/evaluation/tasks/multiple_choice.yaml",
        "sweeps/olmo_1b.yaml",
        "constraints.txt",
    ]
    stays = [
        *(".git/config", ".venv/bin/python", "runs/demo/mlflow.db", "data/pubmed/a.jsonl.gz"),
        *("ke_ray/__pycache__/a.pyc", "model.safetensors", "deep/er/model.safetensors", "x.npy"),
        *("mlruns/0/meta.yaml", "mlflow.db", ".env", ".env.local", "id.pem", "auth_token"),
        *("tests/test_config.py", ".mypy_cache/x", ".hypothesis/x", "coefficients.pt"),
    ]
    tree = tmp_path / "tree"
    for name in travels + stays:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("x")
    excludes = yaml.safe_load((ROOT / "jobs" / "runtime_env.yaml").read_text())["excludes"]
    assert sent(tree, excludes) == set(travels)
    assert set(SECRET_FILES) <= set(excludes)


@pytest.mark.parametrize("runtime_env", [None, "{excludes: ['!.env', '!*.pem', '!.ssh/']}"])
def test_secrets_and_what_lies_outside_never_travel(tmp_path, caplog, runtime_env):
    tree, outside = tmp_path / "tree", tmp_path / "outside"
    outside.mkdir()
    (outside / "private.txt").write_text("x")
    secrets = [
        *(".git-credentials", ".ssh/id_rsa", "deep/.aws/credentials", ".envrc", "prod.env"),
        *(".env", ".git/config", ".netrc", "my.pem", ".config/gcloud/x.json", ".kube/config"),
    ]
    for name in ["code.py", "my [x]/ok.txt", *secrets]:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("x")
    (tree / "inside.py").symlink_to("code.py")
    (tree / "my [x]" / "all").symlink_to(outside)
    (tree / "one file*.txt").symlink_to(outside / "private.txt")
    keys = {"working_dir": "tree"}
    if runtime_env:
        (tmp_path / "env.yaml").write_text(runtime_env)
        keys["runtime_env"] = "env.yaml"
    result = runtime_env_of(load_job(write(tmp_path, **keys), [], {}), {})
    assert sent(tree, result["excludes"]) == {"code.py", "my [x]/ok.txt", "inside.py"}
    assert "2 links lead out" in caplog.text


@pytest.mark.parametrize(
    ("name", "is_secret"),
    [
        ("HF_TOKEN", True),
        ("RAY_AUTH_TOKEN", True),
        ("MLFLOW_TRACKING_PASSWORD", True),
        ("AWS_SECRET_ACCESS_KEY", True),
        ("AWS_ACCESS_KEY_ID", True),
        ("OPENAI_API_KEY", True),
        ("client-secret", True),
        ("TOKENIZERS_PARALLELISM", False),
        ("RAY_AUTH_TOKEN_PATH", False),
        ("eos_token_id", False),
        ("num_tokens", False),
        ("KE_RAY_RUNS", False),
    ],
)
def test_what_a_secrets_name_is(name, is_secret):
    assert is_secret_name(name) is is_secret


@pytest.mark.parametrize(
    "keys",
    [
        {"env": {"HF_TOKEN": PLANTED}},
        {"env": {"MY_DB_PASSWORD": PLANTED}},
        {"env": {"HARMLESS": PLANTED}},
        {"entrypoint": f"HF_TOKEN={PLANTED} python -m ke_ray scan x"},
        {"entrypoint": "tool --api-key 12345678"},
        {"entrypoint": f"echo {PLANTED}"},
        {"metadata": {"note": f"with {PLANTED}"}},
        {"env": {"MLFLOW_TRACKING_URI": "http://me:pw@mlflow:5000"}},
        {"working_dir": "https://x-access:abc@example.com/code.zip"},
        {"working_dir": "https://git@x:pw@example.com/code.zip"},
        {"entrypoint": "DB_PASSWORD='$literal' tool"},
        {"entrypoint": "DB_PASSWORD=${X:-literal} tool"},
        {"entrypoint": "DB_PASSWORD=$X'literal' tool"},
        {"entrypoint": 'DB_PASSWORD="" ; DB_PASSWORD=""literal tool'},
        {"entrypoint": "tool hf_somebodyelses12"},
        {"entrypoint": "curl -H 'Authorization: Basic dXNlcjpwYXNz' x"},
        {"metadata": {"header": "Bearer abcdef0123456789"}},
        {"entrypoint": "tool 'https://b.s3.amazonaws.com/x?X-Amz-Signature=0a1b&X-Amz-Date=1'"},
        {"entrypoint": "tool https://a.blob.core.windows.net/x?sv=1&sig=0a1b"},
        {"entrypoint": "echo " + shlex.quote(QUOTED)},
        {"entrypoint": 'echo "' + QUOTED.replace("\\", "\\\\").replace('"', '\\"') + '"'},
        {"metadata": {"note": f"with {QUOTED}"}},
        {"metadata": {"url": "http://h/" + urllib.parse.quote(QUOTED)}},
        {"metadata": {QUOTED: "x"}},
    ],
)
def test_a_job_with_a_secret_is_refused_without_showing_it(tmp_path, keys):
    with pytest.raises(ConfigError, match=r"environment of the nodes") as refused:
        load_job(write(tmp_path, **keys), [], {"HF_TOKEN": PLANTED, "MY_PASSWORD": QUOTED})
    assert QUOTED not in str(refused.value)
    assert PLANTED not in str(refused.value)


def test_a_secret_in_an_override_or_in_the_runtime_env_is_refused_too(tmp_path):
    path = write(tmp_path, runtime_env="env.yaml")
    with pytest.raises(ConfigError, match="HF_TOKEN"):
        load_job(path, [f"env.HF_TOKEN={PLANTED}"], {})
    (tmp_path / "env.yaml").write_text("pip: [--extra-index-url=https://me:pw@host/simple]\n")
    with pytest.raises(ConfigError, match=r"'pip'.*user name"):
        runtime_env_of(load_job(path, [], {}), {})
    (tmp_path / "env.yaml").write_text("env_vars: {WANDB_API_KEY: abc}\n")
    with pytest.raises(ConfigError, match="WANDB_API_KEY"):
        runtime_env_of(load_job(path, [], {}), {})


def test_what_is_no_secret_is_taken(tmp_path):
    keys = {
        "entrypoint": "ke-ray scan hf --tokenizer x --eos-token-id 0 --set a.num_tokens=3 "
        '--api-key $KEY HF_TOKEN="${HF_TOKEN}" B_TOKEN=${HF_TOKEN:?} '
        "TOKEN=$(cat /run/token) bash -c 'TOKEN=$T x'",
        "env": {"RAY_AUTH_TOKEN_PATH": "/etc/token", "OMP_NUM_THREADS": 2, "URL": "http://h:1/a@b"},
        "working_dir": "git+ssh://git@example.com/code.zip",
    }
    job = load_job(write(tmp_path, **keys), [], {"HF_TOKEN": PLANTED, "PASSWORD": ""})
    assert job.env["OMP_NUM_THREADS"] == "2"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"entrypont": "x"}, "Did you mean 'entrypoint'"),
        ({"kind": "scan"}, "kind 'scan'.*'kind: job'"),
        ({"name": "../up"}, "'name'"),
        ({"env": {"A": True}}, "env.A"),
        ({"retries": -1}, "'retries'"),
        ({"timeout_s": 0}, "'timeout_s'"),
        ({"runtime_env": "absent.yaml"}, "relative to the file"),
        ({"working_dir": "absent"}, "relative to the file"),
    ],
)
def test_a_wrong_job_file_is_one_clear_message(tmp_path, keys, message):
    with pytest.raises(ConfigError, match=message):
        runtime_env_of(load_job(write(tmp_path, **keys), [], {}), {})
