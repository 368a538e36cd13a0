"""Checkpoints on the Hub beside branches: subfolders, tags, commits, repositories and lists."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub, serving

from ke_ray.checkpoints.fetch.cache import Store
from ke_ray.checkpoints.find.catalog import find_checkpoints, list_checkpoints
from ke_ray.checkpoints.find.csv_list import read_csv_list
from ke_ray.checkpoints.find.folder import from_location
from ke_ray.checkpoints.find.hub_places import _parse_title
from ke_ray.checkpoints.find.names import step_pattern
from ke_ray.checkpoints.formats.fingerprint import weights_sha256
from ke_ray.checkpoints.transfer import RetryPolicy
from ke_ray.errors import CheckpointError, CheckpointSpecError
from ke_ray.models.configuration import read_config
from ke_ray.models.loading import load_model
from ke_ray.models.saving import save_model

QUICK = RetryPolicy(attempts=3, backoff_s=0.02, max_retry_after_s=1.0, timeout_s=2.0)
COMMITS = [
    ("c0", "initial commit"),
    *((f"c{step}", f"Training in progress, step {step}") for step in (500, 1000)),
    ("main", "Training in progress, step 1500"),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, tiny_decoder) -> list[Path]:
    """Three checkpoints of other weights each, to be copied."""
    root = tmp_path_factory.mktemp("checkpoints")
    for seed in range(3):
        save_model(tiny_decoder("llama", seed=seed), root / str(seed))
    return [root / str(seed) for seed in range(3)]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    (tmp_path / "hub").mkdir()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    with serving(tmp_path / "hub") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def subfolders(hub: FakeHub, checkpoints: list[Path]) -> Path:
    """A repository as LMEnt's: a folder for each step, and what else lies about."""
    main = hub.root / "org" / "lm" / "main"
    shutil.copytree(checkpoints[0], main / "step1000")
    shutil.copytree(checkpoints[1], main / "step20000")
    shutil.copytree(checkpoints[2], main / "runs" / "big" / "step1000" / "hf")
    (main / "plots").mkdir()
    (main / "plots" / "loss.png").write_bytes(b"x")
    (main / "tokenizer.json").write_text("{}")
    (main / "README.md").write_text("x")
    return main


def test_subfolders_that_match_are_checkpoints(hub: FakeHub, subfolders: Path) -> None:
    refs = list_checkpoints("org/lm:step*")
    assert [(ref.name, ref.step) for ref in refs] == [("step1000", 1000), ("step20000", 20000)]
    assert [ref.label for ref in refs] == [
        "hf://org/lm@main:step1000",
        "hf://org/lm@main:step20000",
    ]
    assert {ref.commit for ref in refs} == {hub.commit("org/lm", "main")}
    files = [*(subfolders / "step1000").iterdir(), subfolders / "tokenizer.json"]
    assert refs[0].size_bytes == sum(path.stat().st_size for path in files)
    assert sum("/tree/" in request for request in hub.requests) == 2  # pages of one listing
    assert list_checkpoints("hf://org/lm@main:*", steps="2000:") == refs[1:]
    assert [ref.location for ref in list_checkpoints("org/lm:runs/*/step*/hf")] == [
        "hf://org/lm:runs/big/step1000/hf"
    ]
    nested = list_checkpoints("org/lm:**")
    assert sorted((ref.name, ref.step) for ref in nested) == [
        ("hf", 1000), ("step1000", 1000), ("step20000", 20000)
    ]  # fmt: skip
    assert [ref.name for ref in list_checkpoints("org/lm:*", revisions="step2*")] == ["step20000"]


def test_a_subfolder_without_a_glob_is_itself_or_the_series_inside(
    hub: FakeHub, subfolders: Path
) -> None:
    assert [ref.step for ref in list_checkpoints("org/lm:step1000")] == [1000]
    shutil.copytree(subfolders / "step1000", subfolders / "base" / "step7")
    assert [ref.step for ref in list_checkpoints("org/lm:base/")] == [7]


def test_a_subfolder_is_fetched_alone_with_the_tokenizer_of_the_root(
    hub: FakeHub, subfolders: Path, tmp_path: Path
) -> None:
    own = subfolders / "step20000" / "tokenizer.json"
    own.write_text('{"own": 1}')
    refs = list_checkpoints("org/lm:step*")
    assert read_config(refs[0]).model_type == "llama"
    with Store(tmp_path / "cache", policy=QUICK) as store:
        for ref in refs:
            folder = Path(store.fetch(ref))
            assert weights_sha256(folder) == weights_sha256(subfolders / ref.subfolder)
            load_model(folder)
            assert {path.name for path in folder.iterdir()} == {
                *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
            }
        assert json.loads((folder / "tokenizer.json").read_text()) == {"own": 1}
    fetched = {request.partition("/resolve/")[2].partition("/")[2] for request in hub.requests}
    weights = {path for path in fetched if path.endswith(".safetensors")}
    assert weights == {"step1000/model.safetensors", "step20000/model.safetensors"}


def test_a_download_of_a_subfolder_is_resumed(
    hub: FakeHub, subfolders: Path, tmp_path: Path
) -> None:
    (ref,) = list_checkpoints("org/lm:step1000")
    hub.refuse = [("step1000/model.safetensors", 401, {})] * 9
    with Store(tmp_path / "cache", policy=QUICK) as store:
        with pytest.raises(CheckpointError, match="HF_TOKEN"):
            store.fetch(ref)
        hub.refuse, before = [], len(hub.requests)
        load_model(store.fetch(ref))
    assert not any("resolve" in r and "config.json" in r for r in hub.requests[before:])


def test_equal_weights_in_subfolders_are_flagged(hub: FakeHub, subfolders: Path) -> None:
    for path in ("step20000", "runs/big/step1000/hf"):
        weights = subfolders / path / "model.safetensors"
        shutil.copyfile(subfolders / "step1000" / "model.safetensors", weights)
    flagged = {ref.name: ref.duplicate_of for ref in list_checkpoints("org/lm:**")}
    assert sorted(map(str, flagged.values())) == ["None", "step1000", "step1000"]
    assert not any("resolve" in request for request in hub.requests)


def test_mistakes_about_subfolders_are_explained(hub: FakeHub, subfolders: Path) -> None:
    with pytest.raises(CheckpointSpecError, match="no folder with files that matches 'stp.*Did"):
        list_checkpoints("org/lm:stp1000")
    with pytest.raises(CheckpointSpecError, match="none of the 1 folders that match 'plots' holds"):
        list_checkpoints("org/lm:plots")
    with pytest.raises(CheckpointSpecError, match="no revision 'dev'"):
        list_checkpoints("org/lm@dev:step*")
    with pytest.raises(CheckpointSpecError, match="not a Hub repository"):
        list_checkpoints("hf://org/lm:../x")
    (subfolders / "plots" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointSpecError, match=r"LoRA/PEFT adapter.*merge_and_unload"):
        list_checkpoints("org/lm:plots")
    (subfolders / "step1000" / "model.safetensors").unlink()
    assert [ref.step for ref in list_checkpoints("org/lm:step*")] == [1000, 20000]


def test_a_repository_of_too_many_files_is_never_listed_in_part(
    hub: FakeHub, subfolders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ke_ray.checkpoints.hub_api._MAX_ENTRIES", 1)
    with pytest.raises(
        CheckpointSpecError, match="lists more than 1 entries. Name fewer: one subfolder"
    ):
        list_checkpoints("org/lm:step*")


def test_tags_stand_beside_branches(hub: FakeHub, checkpoints: list[Path]) -> None:
    repo = hub.root / "org" / "tagged"
    shutil.copytree(checkpoints[0], repo / "main")
    shutil.copytree(checkpoints[1], repo / "step10")
    shutil.copytree(checkpoints[2], repo / "step20")
    shutil.copytree(checkpoints[2], repo / "step30")
    hub.tags = {"step10", "step30"}
    refs = list_checkpoints("org/tagged")
    assert [ref.revision for ref in refs] == ["step10", "step20", "step30", "main"]
    assert [ref.duplicate_of for ref in refs] == [None, None, "step20", None]
    assert [ref.step for ref in list_checkpoints("org/tagged@step10")] == [10]


@pytest.fixture
def commits(hub: FakeHub, checkpoints: list[Path]) -> FakeHub:
    repo = hub.root / "me" / "run"
    (repo / "c0").mkdir(parents=True)
    (repo / "c0" / ".gitattributes").write_text("")
    for source, revision in zip(checkpoints, ("c500", "c1000", "main"), strict=True):
        shutil.copytree(source, repo / revision)
    hub.commits["me/run"] = list(COMMITS)
    return hub


def test_commits_of_a_branch_are_chosen_by_their_titles(commits: FakeHub, tmp_path: Path) -> None:
    refs = list_checkpoints("me/run#Training in progress*")
    assert [ref.step for ref in refs] == [500, 1000, 1500]
    assert refs[0].name == "Training-in-progress-step-500"
    assert [ref.revision for ref in refs] == [
        commits.commit("me/run", name) for name in ("c500", "c1000", "main")
    ]
    assert all(ref.revision == ref.commit for ref in refs)
    assert list_checkpoints("me/run@main#*step 1*") == refs[1:]
    with Store(tmp_path / "cache", policy=QUICK) as store:
        folder = store.fetch(refs[0])
    assert weights_sha256(folder) == weights_sha256(commits.root / "me" / "run" / "c500")


def test_a_step_pattern_reads_titles_as_they_are_written(commits: FakeHub) -> None:
    refs = list_checkpoints("me/run#Training in progress*", step_pattern="progress, step ([0-9]+)")
    assert [ref.step for ref in refs] == [500, 1000, 1500]
    refs = list_checkpoints("me/run#Training in progress*", step_pattern="(?P<seed>[a-z]+), step")
    assert {ref.seed for ref in refs} == {"progress"}


def test_a_title_with_separated_thousands_gives_no_wrong_step() -> None:
    assert _parse_title("Upload step 5,000 checkpoint", None).step != 5
    assert _parse_title("Training in progress, step 500", None).step == 500


def test_a_step_pattern_reads_the_names_of_a_list(tmp_path: Path) -> None:
    rows = ["seed,location", "3,hf://me/run@round-7", ",hf://me/run@round-8"]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    assert [
        (row.location, ref.step, ref.seed)
        for row in read_csv_list(str(tmp_path / "list.csv"))
        for ref in [from_location(row.location, row, pattern=step_pattern("round-([0-9]+)"))]
    ] == [("hf://me/run@round-7", 7, "3"), ("hf://me/run@round-8", 8, None)]


def test_commits_with_other_weights_or_none_are_told_apart(commits: FakeHub) -> None:
    repo = commits.root / "me" / "run"
    shutil.copyfile(repo / "c500" / "model.safetensors", repo / "c1000" / "model.safetensors")
    listing = find_checkpoints("me/run#*")
    assert [ref.step for ref in listing.checkpoints] == [500, 1000, 1500]
    assert [ref.duplicate_of for ref in listing.checkpoints][1] == "Training-in-progress-step-500"
    assert "1 revisions hold no weights and are left out (initial-commit)" in listing.notes[0]
    with pytest.raises(CheckpointSpecError, match="None of the 4 commits.*'epoch.*step 1500'"):
        list_checkpoints("me/run#epoch *")


@pytest.fixture
def organisation(hub: FakeHub, checkpoints: list[Path]) -> FakeHub:
    for source, name in zip(checkpoints, ("base-step2000", "base-step30", "chat"), strict=True):
        shutil.copytree(source, hub.root / "lab" / name / "main")
    return hub


def test_repositories_of_an_organisation_make_a_series(
    organisation: FakeHub, tmp_path: Path
) -> None:
    refs = list_checkpoints("lab/base-*")
    assert [(ref.repo, ref.step) for ref in refs] == [
        ("lab/base-step30", 30), ("lab/base-step2000", 2000)
    ]  # fmt: skip
    assert [ref.commit for ref in refs] == [organisation.commit(str(r.repo), "main") for r in refs]
    listing = find_checkpoints("lab/base-*")
    assert listing.notes == ("2 repositories match; of each its revision 'main' is listed.",)
    listing = find_checkpoints("hf://lab/base-*@main")
    assert (list(listing.checkpoints), listing.notes) == (refs, ())
    with Store(tmp_path / "cache", policy=QUICK) as store:
        folder = store.fetch(refs[0])
    assert weights_sha256(folder) == weights_sha256(
        organisation.root / "lab" / "base-step30" / "main"
    )


def test_equal_weights_in_repositories_are_flagged(organisation: FakeHub) -> None:
    lab = organisation.root / "lab"
    weights = Path("main", "model.safetensors")
    shutil.copyfile(lab / "base-step30" / weights, lab / "base-step2000" / weights)
    assert [r.duplicate_of for r in list_checkpoints("lab/base-*")] == [None, "base-step30"]


def test_a_folder_here_comes_before_repositories(organisation: FakeHub, tmp_path: Path) -> None:
    shutil.copytree(organisation.root / "lab" / "chat" / "main", tmp_path / "lab" / "base-step9")
    assert [ref.step for ref in list_checkpoints("lab/base-*")] == [9]
    assert [ref.step for ref in list_checkpoints("hf://lab/base-*")] == [30, 2000]


def test_mistakes_about_repositories_are_explained(organisation: FakeHub) -> None:
    with pytest.raises(CheckpointSpecError, match="'lab' has 3 model repositories on http.*'lab/z"):
        list_checkpoints("lab/z*")
    with pytest.raises(CheckpointSpecError, match="no folder 'nobody/z\\*' here.*0 model repos"):
        list_checkpoints("nobody/z*")
    with pytest.raises(CheckpointSpecError, match="one repository, or list.*CSV"):
        list_checkpoints("lab/base-*:step*")


def test_a_list_names_repositories_revisions_and_subfolders(
    organisation: FakeHub, subfolders: Path, tmp_path: Path
) -> None:
    rows = ["step,repository", "1,lab/base-step30", "2,lab/chat@main", ",org/lm:step1000",
            "9,hf://org/lm@main:runs/big/step1000/hf"]  # fmt: skip
    (tmp_path / "list.csv").write_text("\n".join(rows))
    refs = list_checkpoints(str(tmp_path / "list.csv"))
    assert [(ref.step, ref.label) for ref in refs] == [
        (1, "hf://lab/base-step30@main"),
        (2, "hf://lab/chat@main"),
        (9, "hf://org/lm@main:runs/big/step1000/hf"),
        (1000, "hf://org/lm@main:step1000"),
    ]
    assert [ref.commit for ref in refs] == [
        organisation.commit(str(ref.repo), "main") for ref in refs
    ]
    # Seed 2 of the fixtures is in both, seed 0 too.
    assert [ref.duplicate_of for ref in refs] == [None, None, refs[1].name, None]
    with Store(tmp_path / "cache", policy=QUICK) as store:
        folder = store.fetch(refs[2])
    assert weights_sha256(folder) == weights_sha256(subfolders / refs[2].subfolder)
    # Where the list gives no step, the repository's name does, or the revision's.
    shutil.copytree(subfolders / "step1000", organisation.root / "lab" / "chat" / "step77")
    rows = ["repository", "lab/base-step30@main", "lab/base-step2000", "lab/chat@step77"]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    assert [ref.step for ref in list_checkpoints(str(tmp_path / "list.csv"))] == [30, 77, 2000]
    (tmp_path / "list.csv").write_text("step,repository\n1,lab/base-*\n")
    with pytest.raises(CheckpointSpecError, match="may name several checkpoints; a row"):
        list_checkpoints(str(tmp_path / "list.csv"))


def test_the_tokenizer_of_a_subfolder_is_found_in_it_or_at_the_root(
    hub: FakeHub, subfolders: Path, tmp_path: Path
) -> None:
    from ke_ray.data.tokenizer import train_bpe

    for folder, text in ((subfolders, "aaaa"), (subfolders / "step1000", "bbbb")):
        train_bpe([text] * 9, 259).save(str(folder / "tokenizer.json"))
    code = (
        "from ke_ray.data.tokenizer import load_tokenizer\n"
        "for step in (1000, 20000): print(\n"
        "    load_tokenizer(f'org/lm@main:step{step}').encode('aabb').tokens)"
    )
    # huggingface_hub reads the endpoint when it is imported.
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines() == ["['a', 'a', 'bb']", "['aa', 'b', 'b']"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model-Q4_K_M.gguf", "GGUF.*gguf_file"),
        ("adapter_model.safetensors", "LoRA/PEFT.*merge_and_unload"),
        ("gptq_model-4bit-128g.safetensors", "quantised.*original checkpoint"),
    ],
)
def test_repositories_of_other_weights_say_what_to_convert(
    hub: FakeHub, name: str, message: str
) -> None:
    for repo in ("lab/model-a", "lab/model-b"):
        folder = hub.root / repo / "main" / "sub"
        folder.mkdir(parents=True)
        for file in (folder / name, folder.parent / name):
            file.write_bytes(b"x")
        (folder.parent / "config.json").write_text("{}")
    for spec in ("lab/model-a", "lab/model-*", "lab/model-a:sub"):
        with pytest.raises(CheckpointSpecError, match=message):
            list_checkpoints(spec)


def test_a_folder_that_is_a_copy_of_a_checkpoint_on_the_hub_is_flagged(
    organisation: FakeHub, tmp_path: Path
) -> None:
    theirs = organisation.root / "lab" / "base-step30" / "main"
    copy = shutil.copytree(theirs, tmp_path / "copy")
    other = shutil.copytree(theirs, tmp_path / "other")
    with (other / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    (tmp_path / "list.csv").write_text(f"1,hf://lab/base-step30\n2,{copy}\n3,{other}\n")
    refs = list_checkpoints(str(tmp_path / "list.csv"))
    assert [ref.duplicate_of for ref in refs] == [None, refs[0].name, None]
