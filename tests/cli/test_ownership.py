"""Nobody's files are deleted, and no two commands write one folder at once."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import synthetic
import yaml
from command_process import start_command
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tiny_studies import tiny_continual, tiny_pretrain
from tiny_sweep import tiny_sweep
from waiting import wait_for

from ke_ray import storage
from ke_ray.errors import KeRayError, ResultsError, StorageError
from ke_ray.report import build_report
from ke_ray.report.picture import picture
from ke_ray.storage import ownership
from ke_ray.storage.ownership import LOCK, MARK, claimed, mark_cache
from ke_ray.studies.identity import identity_fields, identity_keys
from ke_ray.training.pretrain import run_pretrain

OURS = (
    *("parts", "tokenizer", "world", "state", "ray", "runs", "data", "checkpoints", "coefficients"),
    *("train.parquet", "prepared.json", "entropy.parquet", "trials.parquet", "entropy.png"),
    *("report.html", "summary.json", "pretrain", "manifest.json", "points.json"),
)
#: Names that earlier sweeps for leftovers took for their own, and others that look like ours.
ALIKE = (
    *(".bashrc.old", ".config.old", ".notes.tmp", ".report.html.swp", ".manifest.json.abcdefgh"),
    *(".out.0123456789ab.tmp", ".out.0123456789ab.old", ".train.parquet.x1y2", ".scan.lock"),
    *(".lock", ".ke-ray-notes", ".ke-ray-0123-out", ".ke-ray-0123456789abcdeX-out", ".ke-ray"),
)


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every file's bytes, and every folder as None."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def put(folder: Path, names: tuple[str, ...] | list[str], seed: int = 0) -> None:
    """Files and folders of somebody else, made long ago."""
    chance = random.Random(seed)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if "." in name.strip(".") or chance.random() < 0.5:
            path.write_bytes(chance.randbytes(chance.randrange(64)))
        else:
            path.mkdir()
            (path / "theirs.txt").write_bytes(chance.randbytes(8))
    for path in folder.rglob("*"):
        os.utime(path, (0, 0))


@pytest.fixture(scope="session")
def world(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny series, a study of each kind, and scans."""
    folder = tmp_path_factory.mktemp("ownership")
    shutil.copytree(pretrained, folder / "series")
    continual = tiny_continual(folder / "unused", folder / "series", downstream=None, entropy=None)
    for name, study in {
        "pretrain": tiny_pretrain(folder / "unused", save_every=3),
        "pretrain-7": tiny_pretrain(folder / "unused", seed=7),
        "continual": continual,
        "continual-fast": continual.model_copy(
            update={"optimizer": continual.optimizer.model_copy(update={"learning_rate": 0.05})}
        ),
        "sweep": tiny_sweep(folder / "unused", folder / "series"),
    }.items():
        text = yaml.safe_dump(study.model_dump(mode="json", exclude_unset=True, by_alias=True))
        (folder / f"{name}.yaml").write_text(text)
    for number in range(2):
        scan = synthetic.make_scan(folder / f"scan{number}", steps=[10 * number, 10 * number + 5])
        manifest = json.loads((scan / "manifest.json").read_text())
        identity = {"measure_version": 1, "corpora": {"biographies": "0", "held_out": "0"}}
        known = {"identity": identity, "corpora": {}, "measures": ["knowledge_entropy"]}
        known["checkpoints"] = []
        (scan / "manifest.json").write_text(json.dumps(manifest | known))
    return folder


def commands(world: Path, output: Path) -> dict[str, list[object]]:
    """Every command that writes a folder or a file, into ``output``."""
    series = world / "series"
    return {
        "scan": [
            *("scan", series / "checkpoints", "--no-mlflow", "-o", output, "--num-instances", 8),
            *("--data", f"d={series / 'world' / 'documents.jsonl.gz'}", "--sequence-length", 32),
        ],
        "pretrain": ["pretrain", world / "pretrain.yaml", "-o", output],
        "continual": ["continual", world / "continual.yaml", "-o", output],
        "sweep": ["sweep", world / "sweep.yaml", "-o", output],
        "resuscitate": [
            *("resuscitate", series / "checkpoints" / "step10", "-o", output),
            *("--control", "attention_temperature", "--factor", 2),
        ],
        "merge": ["results", world / "scan0", world / "scan1", "--merge", output],
        "report": ["report", world / "scan0", "-o", output],
        "demo": ["demo", "--folder", output],
    }


KINDS = tuple(commands(Path(), Path()))
FOLDER_KINDS = tuple(kind for kind in KINDS if kind != "report")


@pytest.mark.parametrize("kind", FOLDER_KINDS)
def test_a_folder_of_somebody_else_is_refused_before_the_first_write(
    kind: str, world: Path, tmp_path: Path, ke_ray: Callable
) -> None:
    for number, names in enumerate((OURS, ALIKE, ("tokenizer",), ("notes.txt",), (MARK,))):
        output = tmp_path / str(number)
        put(output, names)
        before = snapshot(tmp_path)
        result = ke_ray(*commands(world, output)[kind])
        assert result.code == 2, result.err
        assert str(output) in result.err
        assert kind in ("resuscitate", "scan") or "that is new or empty" in result.err
        assert snapshot(tmp_path) == before


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(FOLDER_KINDS),
    names=st.sets(
        st.one_of(
            st.sampled_from((*OURS, *ALIKE)),
            st.text("abAB. _-~#0é", min_size=1, max_size=12).filter(lambda name: name.strip(".")),
        ),
        min_size=1,
        max_size=8,
    ),
    seed=st.integers(0, 99),
)
def test_folders_of_random_names_stay_as_they_are(
    kind: str, names: set[str], seed: int, world: Path, tmp_path: Path, ke_ray: Callable
) -> None:
    output = tmp_path / uuid.uuid4().hex
    put(output, sorted(names), seed)
    before = snapshot(output)
    assert ke_ray(*commands(world, output)[kind]).code == 2
    assert snapshot(output) == before


@pytest.mark.parametrize("kind", ["resuscitate", "report"])
def test_neighbours_of_what_is_written_stay(
    kind: str, world: Path, tmp_path: Path, ke_ray: Callable
) -> None:
    put(tmp_path, ALIKE)
    before = snapshot(tmp_path)
    assert ke_ray(*commands(world, tmp_path / "out")[kind]).code == 0
    after = snapshot(tmp_path)
    assert {name: after.get(name) for name in before} == before
    assert {name.split("/")[0] for name in after} - {name.split("/")[0] for name in before} == {
        "out"
    }


@pytest.mark.slow
@settings(
    max_examples=8, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(
    kind=st.sampled_from(("pretrain", "continual", "resuscitate", "merge", "report")),
    after_s=st.floats(0.0, 2.0),
    beside=st.sets(st.sampled_from((*OURS, *ALIKE)), max_size=6),
    inside=st.sets(st.sampled_from((*ALIKE, "notes.txt", "my runs", "parts.bak")), max_size=4),
)
def test_what_was_there_survives_commands_that_are_killed_and_run_again(
    kind: str, after_s: float, beside: set[str], inside: set[str], world: Path, tmp_path: Path
) -> None:
    kill_and_run_again(kind, after_s, beside, inside, world, tmp_path)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["scan", "sweep"])
def test_what_was_there_survives_commands_of_ray_too(
    kind: str, world: Path, tmp_path: Path
) -> None:
    draw = random.Random(kind)
    beside = set(draw.sample((*OURS, *ALIKE), 6))
    inside = {*draw.sample(ALIKE, 3), "notes.txt"}
    kill_and_run_again(kind, draw.uniform(4, 15), beside, inside, world, tmp_path)


def kill_and_run_again(
    kind: str, after_s: float, beside: set[str], inside: set[str], world: Path, tmp_path: Path
) -> None:
    """Kill a command after some time, put files into its folder, run it to its end, and look."""
    folder = tmp_path / uuid.uuid4().hex
    output = folder / "out"
    put(folder, sorted(beside))
    before = snapshot(folder)
    command = start_command(commands(world, output)[kind], tmp_path / "said")
    command.process.join(after_s)
    if command.returncode is None:
        command.process.kill()
        command.wait()
    if output.is_dir() and kind != "resuscitate":  # additions to a folder that is the command's
        put(folder, [f"out/{name}" for name in sorted(inside)])
        before |= {f"out/{name}": snapshot(folder)[f"out/{name}"] for name in inside}
    again = start_command(commands(world, output)[kind], tmp_path / "said")
    # These two refuse a folder that is finished, and then leave the killed command's lock file.
    finished_before = again.wait() == 2 and kind in ("resuscitate", "merge")
    assert again.returncode == 0 or finished_before, again.stdout
    after = snapshot(folder)
    assert {name: after.get(name) for name in before} == before
    left = [name for name in after if name.endswith(("/" + LOCK, "/" + MARK))]
    assert left == [] or finished_before, kind


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second"), [("continual", "continual-fast"), ("pretrain", "pretrain-7")]
)
def test_of_two_studies_at_once_into_one_folder_the_second_ends_with_one_message(
    first: str, second: str, world: Path, tmp_path: Path
) -> None:
    output, command = tmp_path / "out", first
    one = start_command([command, world / f"{first}.yaml", "-o", output], tmp_path / "one")
    wait_for(lambda: (output / MARK).exists())
    one.send_signal(signal.SIGSTOP)  # in the middle of its work, however fast it is
    two = start_command([command, world / f"{second}.yaml", "-o", output], tmp_path / "two")
    two.wait()
    one.send_signal(signal.SIGCONT)
    assert two.returncode == 2, two.stdout
    (line,) = two.stdout.splitlines()
    assert f"Another ke-ray command is writing '{output}' (process {one.pid} on " in line
    assert one.wait() == 0, one.stdout
    study = yaml.safe_load((world / f"{first}.yaml").read_text())
    config = json.loads((output / "manifest.json").read_text())["config"]
    assert config["optimizer"]["learning_rate"] == study["optimizer"]["learning_rate"]
    assert config.get("seed") == (0 if first == "pretrain" else config.get("seed"))


def test_a_request_that_is_wrong_leaves_no_folder(
    world: Path, tmp_path: Path, ke_ray: Callable
) -> None:
    output = tmp_path / "a" / "b" / "out"
    for kind in ("scan", "continual", "sweep"):
        arguments = commands(world, output)[kind]
        wrong = ["--steps", "77:78"] if kind == "scan" else ["--set", "sequence_length=999"]
        wrong = ["--set", "base.sequence_length=999"] if kind == "sweep" else wrong
        assert ke_ray(*arguments, *wrong).code == 2
        assert list(tmp_path.iterdir()) == [], kind


def test_pretraining_keeps_a_tokenizer_that_its_study_reads(world: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(world / "series", output)
    (output / "manifest.json").write_text(
        (output / "manifest.json").read_text().replace('"identity"', '"earlier"')
    )
    manifest = json.loads((output / "manifest.json").read_text())
    before = snapshot(output / "tokenizer")
    data = {"biographies": None, "vocab_size": None, "tokenizer": str(output / "tokenizer")}
    data["source"] = str(world / "series" / "world" / "documents.jsonl.gz")
    study = tiny_pretrain(output, data=data)
    manifest |= identity_fields(identity_keys(study)) | {"status": "running"}
    (output / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(KeRayError, match=r"data\.tokenizer is .* would now remove"):
        run_pretrain(study)
    assert snapshot(output / "tokenizer") == before


def test_folders_of_earlier_versions_are_known_by_their_manifests(
    tmp_path: Path, world: Path, ke_ray: Callable
) -> None:
    for kind in ("scan", "continual", "sweep", "pretrain"):
        folder = tmp_path / kind
        getattr(synthetic, f"make_{kind}")(folder)
        before = snapshot(folder)
        with claimed(str(folder), kind):
            assert storage.exists(folder / LOCK)
        assert snapshot(folder) == before
        other = "sweep" if kind == "scan" else "scan"
        with pytest.raises(ResultsError, match=f"'{kind}'.*'{other}'"):
            ownership.check_claim(str(folder), other)
    with claimed(str(tmp_path), "demo", evidence=("pretrain", "pretrain")):
        pass


def test_a_claim_without_a_manifest_is_known_again_on_any_storage(tmp_path: Path) -> None:
    for base in (str(tmp_path / "out"), f"memory://{uuid.uuid4().hex}/out"):
        with claimed(base, "scan"):
            storage.write_atomic(storage.join(base, "parts", "x"), b"x")
        assert storage.list_dir(base) == [MARK, "parts"]
        with claimed(base, "scan"):
            pass
        with pytest.raises(ResultsError, match=r"'scan'.*'sweep'"):
            ownership.check_claim(base, "sweep")
        storage.remove(storage.join(base, MARK))
        with pytest.raises(ResultsError, match="'parts'"):
            ownership.check_claim(base, "scan")


def test_only_files_that_carry_our_mark_are_drawn_anew(tmp_path: Path, world: Path) -> None:
    scan = shutil.copytree(world / "scan0", tmp_path / "scan")
    for draw, name in ((build_report, "report.html"), (picture, "entropy.png")):
        source = [scan] if draw is build_report else scan
        target = tmp_path / name
        draw(source, target)
        first = target.read_bytes()
        draw(source, target)
        for content in (b"", b"<html>theirs</html>", first[2000:]):
            target.write_bytes(content)
            with pytest.raises(StorageError, match="exists .* give another name"):
                draw(source, target)
            assert target.read_bytes() == content
        with pytest.raises(StorageError, match="exists .* give another name"):
            draw(source, scan / "manifest.json")
        with pytest.raises(StorageError, match="exists .* give another name"):
            draw(source, scan)
        (scan / name).write_bytes(b"of an earlier version")
        draw(source, scan / name)
        assert len((scan / name).read_bytes()) > 1000


def test_a_cache_keeps_to_folders_of_its_own(tmp_path: Path) -> None:
    names = ("entries", "partial", "locks", "leases", "budget.lock")
    put(tmp_path / "theirs", ("entries", "notes.txt"))
    before = snapshot(tmp_path / "theirs")
    with pytest.raises(StorageError, match="'entries'"):
        mark_cache(tmp_path / "theirs", "checkpoint cache", names)
    assert snapshot(tmp_path / "theirs") == before
    put(tmp_path / "beside", ("notes.txt", "data"))
    mark_cache(tmp_path / "beside", "checkpoint cache", names)
    put(tmp_path / "beside", ("entries",))
    mark_cache(tmp_path / "beside", "checkpoint cache", names)
    put(tmp_path / "earlier", names)
    mark_cache(tmp_path / "earlier", "checkpoint cache", names)
