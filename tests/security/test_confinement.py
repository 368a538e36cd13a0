"""Names from outside become one file name; nothing is written beside the output folder."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from ke_ray import storage
from ke_ray.checkpoints.find.catalog import list_checkpoints
from ke_ray.checkpoints.reference import CheckpointRef
from ke_ray.errors import KeRayError, StorageError, UserError
from ke_ray.results import ScanFolder, new_manifest

HOSTILE = (
    *("..", ".", "", "/etc/passwd", "../../escaped", "a/../../b", "..\\..\\b", "\0", "a\0b"),
    *("~", "~root/x", "C:\\x", "file:///etc", "s3://b/c", "x" * 5000, "é" * 300, "\n", " ", "-rf"),
    *("$(touch x)", "`x`", ";x", "CON", ".git", "..." * 40, "\u202e", "\ud800", "a\r\nb", "%2e%2e"),
)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_slug_is_one_plain_file_name(tmp_path: Path, name: str) -> None:
    slug = storage.slug(name)
    assert 0 < len(slug) <= 150
    assert set(slug) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    assert slug.strip(".")
    assert not slug.startswith("-")
    (tmp_path / slug).write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == [slug]


@pytest.mark.parametrize("name", ["..", "../x", "/x", "a/../../x", "a\0b", "\0"])
def test_a_joined_path_cannot_climb_out(tmp_path: Path, name: str) -> None:
    with pytest.raises(StorageError):
        storage.join(tmp_path, name)
    with pytest.raises(StorageError):
        storage.join("memory://out", "a", name)


@pytest.mark.parametrize("name", HOSTILE)
def test_results_of_a_checkpoint_of_any_name_stay_in_the_folder(tmp_path: Path, name: str) -> None:
    """A revision or checkpoint name as another's manifest or listing might bring it."""
    out = tmp_path / "outer" / "out"
    manifest = new_manifest("scan", {}) | {"identity": {"corpora": {"x": "0"}}, "corpora": {}}
    folder = ScanFolder(str(out), manifest)
    import numpy as np

    told = name.encode("utf-8", "replace").decode()
    row = {"checkpoint": told, "corpus": "x", "measure": "gini", "status": "ok", "value": 1.0}
    folder.write_part(told, [row], coefficients={"x": np.ones((1, 2), np.float32)})
    folder.consolidate(final=True)
    assert folder.mean_coefficients(told).shape == (1, 2)
    outside = [path for path in tmp_path.rglob("*") if path.is_file() and out not in path.parents]
    assert outside == []
    assert {p.parent.name for p in out.rglob("*.safetensors")} == {"coefficients"}


@pytest.mark.parametrize("corpus", ["../../x", "a/b", "/x", "..", "a\0b"])
def test_a_corpus_of_any_name_stays_in_the_folder(tmp_path: Path, corpus: str) -> None:
    """A corpus name of another's manifest, on its way through a merge."""
    import numpy as np

    out = tmp_path / "outer" / "out"
    corpora = {"x": "0", corpus: "1"}
    manifest = new_manifest("scan", {}) | {"identity": {"corpora": corpora}, "corpora": {}}
    row = {"checkpoint": "a", "corpus": corpus, "measure": "gini", "status": "ok", "value": 1.0}
    with contextlib.suppress(StorageError):
        ScanFolder(str(out), manifest).write_part(
            "a", [row], coefficients={corpus: np.ones((1, 2), np.float32)}
        )
    outside = [path for path in tmp_path.rglob("*") if path.is_file() and out not in path.parents]
    assert outside == []


def test_rows_of_a_list_get_plain_unique_names(tmp_path: Path) -> None:
    rows = ["../../..", "/", "/..", "a/../..", "a/..", "b/.", "x" * 240, "https://u:pw@h/../..?q"]
    (tmp_path / "list.csv").write_text("url\n" + "\n".join(rows) + "\n")
    refs = list_checkpoints(str(tmp_path / "list.csv"))
    names = [ref.name for ref in refs]
    assert len(set(names)) == len(rows)
    for name in names:
        assert name == storage.slug(name)
        assert "pw" not in name


def test_a_run_of_any_checkpoint_stays_in_the_output(tmp_path: Path) -> None:
    from tiny_studies import tiny_continual

    from ke_ray.training.runs import RunSpec, part_folder, write_failed

    study = tiny_continual(tmp_path / "outer" / "out", tmp_path)
    for name in HOSTILE:
        ref = CheckpointRef(storage.slug(name), "x", "hf")
        spec = RunSpec(storage.slug(f"{ref.name}-seed0"), ref, 0)
        write_failed(study, spec, "no")
        assert Path(part_folder(study, spec)).parent == tmp_path / "outer" / "out" / "runs"


def test_the_index_of_a_checkpoint_names_files_inside_it(tmp_path: Path) -> None:
    """Also over HTTP and on the Hub, where the index decides what is fetched."""
    from ke_ray.checkpoints.formats.layout import layout_of

    names = ["config.json", "../model.safetensors", "/etc/model.safetensors", "a/model.pt"]
    layout = layout_of([*names, "model-00001-of-00002.safetensors", "../model-1-of-1.safetensors"])
    assert layout is not None
    assert all("/" not in name for name in layout.files)


@pytest.mark.parametrize(
    "output", ["a\0b", "x" * 400, "y/" * 3000, "\udc80", "~nobody-of-this-name/x\0"]
)
@pytest.mark.parametrize("call", ["check_writable", "write_atomic", "exists", "list_dir"])
def test_an_output_that_no_file_system_has_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, call: str
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments: tuple[Any, ...] = (b"x",) if call == "write_atomic" else ()
    try:
        result = getattr(storage, call)(output, *arguments)
    except StorageError as error:
        assert len(str(error)) < 1000
        assert "\0" not in str(error)
    else:
        assert not result or storage.exists(output)
    shutil.rmtree(tmp_path / "y", ignore_errors=True)
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(left) == (call == "write_atomic" and output == "\udc80")


def test_words_of_a_user_that_would_climb_are_refused(tmp_path: Path) -> None:
    from ke_ray.config import validate
    from ke_ray.studies.continual import ContinualStudy, TrainingCorpus
    from ke_ray.studies.jobs import JobStudy
    from ke_ray.studies.scan import ScanStudy

    scan = {"checkpoints": {"spec": "x"}, "output": "o"}
    for name in HOSTILE:
        for model, keys in (
            (ScanStudy, scan | {"data": {name: "x"}}),
            (TrainingCorpus, {"name": name, "source": "x"}),
            (JobStudy, {"name": name, "entrypoint": "true"}),
        ):
            try:
                study = validate(model, keys, "study")
            except UserError:
                continue
            said = study.name if hasattr(study, "name") and study.name else next(iter(study.data))
            assert "/" not in said
            assert said not in (".", "..")
            assert not said.startswith((".", "-"))
    assert ContinualStudy.model_fields["downstream"] is not None


def test_a_shared_folder_is_not_followed_out_by_a_link(tmp_path: Path) -> None:
    """A write replaces a link; it does not write through it to somewhere else."""
    (tmp_path / "precious").write_text("mine")
    os.symlink(tmp_path / "precious", tmp_path / "manifest.json")
    storage.write_atomic(tmp_path / "manifest.json", "new")
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (tmp_path / "manifest.json").is_symlink()


def test_errors_are_ours(tmp_path: Path) -> None:
    with pytest.raises(KeRayError):
        storage.read_text(tmp_path / "a\0b")
