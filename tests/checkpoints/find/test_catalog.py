"""Listing: every kind of SPEC, selections, duplicates, and one clear error for each mistake."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ke_ray.checkpoints.find.catalog import find_checkpoints, list_checkpoints
from ke_ray.checkpoints.find.csv_list import parse_csv_list
from ke_ray.checkpoints.find.duplicates import flag_duplicates, folder_fingerprint
from ke_ray.checkpoints.reference import CheckpointRef
from ke_ray.errors import CheckpointSpecError, KeRayError


def make(folder: Path, content: bytes = b"w", config: str = "config.json") -> Path:
    folder.mkdir(parents=True)
    (folder / config).write_text("{}")
    (folder / "model.safetensors").write_bytes(content)
    return folder


@pytest.fixture
def series(tmp_path: Path) -> Path:
    for step in (0, 20, 3, 100):
        make(tmp_path / "run" / f"step{step}", f"weights {step}".encode())
    return tmp_path / "run"


def steps(refs: list[CheckpointRef]) -> list[int | None]:
    return [ref.step for ref in refs]


def test_one_folder(series: Path, monkeypatch) -> None:
    (ref,) = list_checkpoints(str(series / "step20"))
    assert (ref.name, ref.step, ref.format, ref.is_local) == ("step20", 20, "hf", True)
    assert ref.size_bytes == len("{}") + len("weights 20")
    monkeypatch.chdir(series / "step20")
    assert list_checkpoints(".")[0].name == "step20"
    assert list_checkpoints(f"file://{series}/step20")[0].step == 20


def test_folder_of_folders_in_step_order(series: Path) -> None:
    make(series / "final", b"weights final")
    make(series / ".step7.tmp", b"half written")
    (series / "logs").mkdir()
    (series / "logs" / "config.yaml").write_text("not a checkpoint")
    refs = list_checkpoints(str(series))
    assert steps(refs) == [0, 3, 20, 100, None]
    assert [ref.name for ref in refs] == ["step0", "step3", "step20", "step100", "final"]


def test_checkpoints_subfolder_of_a_run(series: Path, tmp_path: Path) -> None:
    shutil.move(series, tmp_path / "other" / "checkpoints")
    assert steps(list_checkpoints(str(tmp_path / "other"))) == [0, 3, 20, 100]


def test_glob(series: Path) -> None:
    assert steps(list_checkpoints(str(series / "step[0-9]"))) == [0, 3]
    assert steps(list_checkpoints(f"{series.parent}/*/step*0")) == [0, 20, 100]


def test_native_and_hf_folders_are_told_apart(tmp_path: Path) -> None:
    make(tmp_path / "a" / "iter_0000010", b"1", "config.yaml")
    make(tmp_path / "a" / "global_step20", b"2")
    make(tmp_path / "a" / "checkpoint-30", b"3")
    refs = list_checkpoints(str(tmp_path / "a"))
    assert [(ref.step, ref.format) for ref in refs] == [(10, "native"), (20, "hf"), (30, "hf")]


def test_broken_checkpoints_are_listed_not_passed_over(series: Path) -> None:
    (series / "step20" / "model.safetensors").unlink()
    (series / "step3" / "config.json").unlink()
    assert steps(list_checkpoints(str(series))) == [0, 3, 20, 100]


def test_selection(series: Path) -> None:
    spec = str(series)
    assert steps(list_checkpoints(spec, steps="3:20")) == [3, 20]
    assert steps(list_checkpoints(spec, steps="3:")) == [3, 20, 100]
    assert steps(list_checkpoints(spec, steps=":3")) == [0, 3]
    assert steps(list_checkpoints(spec, steps="20")) == [20]
    assert steps(list_checkpoints(spec, every=2)) == [0, 20]
    assert steps(list_checkpoints(spec, every=2, steps="1:")) == [3, 100]
    assert steps(list_checkpoints(spec, limit=1)) == [0]
    assert steps(list_checkpoints(spec, limit=2)) == [0, 100]
    assert steps(list_checkpoints(spec, limit=3)) == [0, 20, 100]
    assert steps(list_checkpoints(spec, limit=9)) == [0, 3, 20, 100]
    assert steps(list_checkpoints(spec, revisions="step*0")) == [0, 20, 100]


def test_stages_keep_training_order(tmp_path: Path) -> None:
    names = [
        "stage2-ingredient2-step10-tokens1B",
        "stage1-step900-tokens9B",
        "stage2-ingredient1-step20-tokens2B",
        "stage1-step1000-tokens10B",
        "stage2-ingredient1-step10-tokens1B",
    ]
    for name in names:
        make(tmp_path / name, name.encode())
    ordered = [ref.name for ref in list_checkpoints(str(tmp_path))]
    assert ordered == [names[1], names[3], names[4], names[2], names[0]]


def test_names_are_unique_even_without_case(tmp_path: Path) -> None:
    for run in ("a", "b"):
        make(tmp_path / run / "step1", run.encode())
    make(tmp_path / "c" / "STEP1", b"c")
    refs = list_checkpoints(str(tmp_path / "*" / "*"))
    assert sorted(ref.name for ref in refs) == ["a-step1", "b-step1", "c-STEP1"]
    # A narrower selection of the same SPEC keeps the names, so that results are found again.
    chosen = list_checkpoints(str(tmp_path / "*" / "*"), limit=1)
    assert chosen[0].name == "a-step1"


def test_published_lists_parse_whole(reference_data: Path) -> None:
    folder = reference_data / "data" / "olmo_checkpoints"
    for name, count, first, last in (
        ("OLMo-1B.csv", 351, 1000, 738_020),
        ("OLMo-7B.csv", 527, 5000, 558_223),
    ):
        refs = list_checkpoints(str(folder / name))
        assert len(refs) == len({ref.name for ref in refs}) == count
        assert (refs[0].step, refs[-1].step) == (first, last)
        assert all(ref.format == "native" and not ref.is_local for ref in refs)
        with (folder / name).open() as file:
            rows = {int(row[0]): row[1] for row in list(csv.reader(file))[1:]}
        assert {ref.step: ref.location for ref in refs} == rows
    gap = list_checkpoints(str(folder / "OLMo-1B.csv"), steps="117850:330000")
    assert [ref.step for ref in gap] == [117_850, 330_000]


def test_csv_with_relative_paths_ingredients_and_no_header(series: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("ingredient,path,step\n2,run/step3,\n1,run/step20,7\n")
    refs = list_checkpoints(str(tmp_path / "a.csv"))
    assert [(ref.branch, ref.step) for ref in refs] == [("ingredient1", 7), ("ingredient2", 3)]
    assert refs[1].location == str(tmp_path / "run" / "step3")
    assert refs[1].format == "hf"
    (tmp_path / "b.csv").write_text("\ufeff5,https://host/x/step5-unsharded/\n\n6,hf://o/r@main\n")
    rows = parse_csv_list((tmp_path / "b.csv").read_bytes(), base=".", origin="b.csv")
    assert [(row.step, row.location) for row in rows] == [
        (5, "https://host/x/step5-unsharded/"),
        (6, "hf://o/r@main"),
    ]


def test_a_trainers_output_folder_is_its_series_with_the_final_step(tmp_path: Path) -> None:
    out = make(tmp_path / "a-run", b"final")  # sorts before "checkpoint-…"
    (out / "trainer_state.json").write_text('{"global_step": 750, "log_history": []}')
    for step in (500, 1000):
        make(out / f"checkpoint-{step}", f"{step}".encode())
    assert [(ref.name, ref.step) for ref in list_checkpoints(str(out))] == [
        ("checkpoint-500", 500),
        ("a-run", 750),
        ("checkpoint-1000", 1000),
    ]
    (out / "trainer_state.json").write_text('{"global_step": 1000}')
    shutil.copyfile(out / "checkpoint-1000" / "model.safetensors", out / "model.safetensors")
    refs = list_checkpoints(str(out))
    assert steps(refs) == [500, 1000, 1000]
    assert (refs[2].name, refs[2].duplicate_of) == ("a-run", "checkpoint-1000")
    (out / "model.safetensors").unlink()  # stopped before the end: only a configuration is left
    assert steps(list_checkpoints(str(out))) == [500, 1000]


@pytest.mark.parametrize("state", ["[", "[]", "{}", '{"global_step": -1}', "[" * 100_000, None])
def test_a_final_step_that_cannot_be_read_is_unknown_and_said(tmp_path: Path, state) -> None:
    out = make(tmp_path / "out", b"final")
    make(out / "checkpoint-5", b"5")
    if state is not None:
        (out / "trainer_state.json").write_text(state)
    listing = find_checkpoints(str(out))
    assert steps(list(listing.checkpoints)) == [5, None]
    assert "1 of 2 checkpoints have no step" in listing.notes[0]
    assert "(out)" in listing.notes[0]


def sizes(folder: Path, n_layers: int) -> None:
    config = {"model_type": "olmo", "hidden_size": 64, "intermediate_size": 256}
    text = json.dumps(config | {"num_hidden_layers": n_layers})
    (make(folder, str(folder).encode()) / "config.json").write_text(text)


def test_several_sizes_are_several_series(tmp_path: Path, caplog) -> None:
    for n_layers in (2, 4):
        for step in (1, 2):
            sizes(tmp_path / f"L{n_layers}" / f"step{step}", n_layers)
    listing = find_checkpoints(str(tmp_path / "*" / "*"))
    assert [ref.name for ref in listing.checkpoints] == [
        *("L2-step1", "L2-step2"),
        *("L4-step1", "L4-step2"),
    ]
    assert len({ref.series for ref in listing.checkpoints}) == 2
    assert "2 architectures or sizes" in listing.notes[0]
    assert "olmo, 4 layers, d_model 64, d_mlp 256 (2)" in listing.notes[0]
    list_checkpoints(str(tmp_path / "*" / "*"))
    assert "2 architectures or sizes" in caplog.text
    assert find_checkpoints(str(tmp_path / "L2")).notes == ()


def test_several_stages_and_shared_steps_are_said(tmp_path: Path) -> None:
    for name in (
        "stage1-step10",
        "stage1-step20",
        "stage2-ingredient1-step10",
        "step_10",
        "step10",
    ):
        make(tmp_path / name, name.encode())
    # A name without a stage belongs to the first one, as OLMo-2-7B's "step150-tokens1B" does.
    stages, repeated = find_checkpoints(str(tmp_path)).notes
    assert "stage 2, ingredient1 (1)" in stages
    assert "3 checkpoints share their step" in repeated


def test_a_step_pattern_reads_folders_that_are_not_understood(tmp_path: Path) -> None:
    for name in ("model-e1", "model-e2", "model-e10", "final"):
        make(tmp_path / name, name.encode())
    refs = list_checkpoints(str(tmp_path), step_pattern=r"-e(\d+)$")
    assert steps(refs) == [1, 2, 10, None]
    refs = list_checkpoints(str(tmp_path), step_pattern=r"-e(\d+)$", tokens_per_step=100)
    assert [ref.tokens for ref in refs] == [100, 200, 1000, None]
    with pytest.raises(CheckpointSpecError, match="must have one group"):
        list_checkpoints(str(tmp_path), step_pattern="e")


def test_a_list_says_stage_seed_and_branch(tmp_path: Path) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b", b"b")
    text = "path,step,tokens,stage,seed,branch\na,1,10,decay,7,left\nb,1,5,1,7,\n"
    (tmp_path / "x.csv").write_text(text)
    first, second = list_checkpoints(str(tmp_path / "x.csv"))
    assert (first.stage, first.stage_label, first.seed, first.branch) == (1, "stage1", "7", None)
    assert (second.stage, second.stage_label, second.branch) == (None, "decay", "left")
    assert (first.tokens, second.tokens) == (5, 10)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is empty"),
        (b"step,url\n", "no rows"),
        (b"name,weight\na,b\n", "line 1: expected a header"),
        (b"step,url\n1,http://x/\ntwo,http://y/\n", "line 3: step 'two'"),
        (b"step,url\n1,\n", "line 2: no folder or URL"),
        (b"\xff\xfe\x00", "not a CSV text file"),
        (b'step,url\n"1,http://x\n', "not a CSV text file"),
    ],
)
def test_broken_lists_name_the_line(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "x.csv").write_bytes(text)
    with pytest.raises(CheckpointSpecError, match=message):
        list_checkpoints(str(tmp_path / "x.csv"))


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("", {}, "is empty"),
        ("no-such-folder", {}, "There is no folder 'no-such-folder'"),
        ("/no/such/folder", {}, "There is no folder"),
        ("no-such.csv", {}, "There is no file"),
        ("{run}/step3/config.json", {}, "is a file"),
        ("{run}/nothing*", {}, "matches 0 paths"),
        ("{run}/*/*.json", {}, "none of them a checkpoint"),
        ("{empty}", {}, "holds no checkpoint"),
        ("{run}", {"steps": "4:19"}, "it has steps 0 to 100"),
        ("{run}", {"steps": "20:3"}, "20 is above 3"),
        ("{run}", {"steps": "a:b"}, "expected a range"),
        ("{run}", {"steps": ":"}, "expected a range"),
        ("{run}", {"every": 0}, "every is 0"),
        ("{run}", {"limit": -1}, "limit is -1"),
        ("{run}", {"revisions": "step30"}, "No revision.*Did you mean 'step3'"),
        ("hf://../../etc", {}, "not a Hub repository"),
        ("nothing-of-this-kind://x/y", {}, "cannot be opened"),
    ],
)
def test_mistakes_are_explained(series: Path, spec: str, options: dict, message: str) -> None:
    (series.parent / "empty").mkdir()
    spec = spec.format(run=series, empty=series.parent / "empty")
    with pytest.raises(CheckpointSpecError, match=message) as caught:
        list_checkpoints(spec, **options)
    assert "\n" not in str(caught.value)


def test_same_weights_are_flagged_with_the_earliest(series: Path) -> None:
    shutil.copyfile(
        series / "step3" / "model.safetensors", series / "step100" / "model.safetensors"
    )
    refs = list_checkpoints(str(series))
    assert [ref.duplicate_of for ref in refs] == [None, None, None, "step3"]
    assert refs[1].weights_fingerprint == refs[3].weights_fingerprint
    assert [ref.duplicate_of for ref in list_checkpoints(str(series), steps="20:")] == [None, None]


def test_files_that_differ_only_between_samples_are_told_apart(tmp_path: Path) -> None:
    data = bytearray(8 * 2**20)
    make(tmp_path / "step1", bytes(data))
    data[300_000] = 1  # between the first two samples
    make(tmp_path / "step2", bytes(data))
    make(tmp_path / "step3", bytes(data))
    refs = list_checkpoints(str(tmp_path))
    assert len({ref.weights_fingerprint for ref in refs}) == 1
    assert [ref.duplicate_of for ref in refs] == [None, None, "step2"]


def test_a_changed_file_is_sampled_again(tmp_path: Path) -> None:
    folder = make(tmp_path / "x", b"before")
    first = folder_fingerprint(folder)
    (folder / "model.safetensors").write_bytes(b"after!")
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert folder_fingerprint(folder) != first


def test_fingerprints_given_by_a_source_are_compared_as_they_are() -> None:
    refs = [
        CheckpointRef(f"s{i}", "hf://o/r", "hub", weights_fingerprint=f"lfs-sha256:{i % 2}")
        for i in range(4)
    ]
    assert [ref.duplicate_of for ref in flag_duplicates(refs)] == [None, None, "s0", "s1"]


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    data=st.binary(max_size=200) | st.text('",\n\r\0 step,url/.:a1é', max_size=200).map(str.encode)
)
def test_any_bytes_give_rows_or_one_clear_error(data: bytes) -> None:
    try:
        rows = parse_csv_list(b"step,url\n" + data, base="/base", origin="x.csv")
    except KeRayError as error:
        assert str(error)
    else:
        assert all(row.location for row in rows)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 10**9), st.text("abc/ ,\"'é", min_size=1).filter(str.strip)),
        min_size=1,
        max_size=5,
    )
)
def test_what_csv_writes_is_read_back(rows: list[tuple[int, str]]) -> None:
    buffer = io.StringIO()
    csv.writer(buffer).writerows([("Step", "URL"), *((s, f"http://h/{p}") for s, p in rows)])
    read = parse_csv_list(buffer.getvalue().encode(), base=".", origin="x.csv")
    assert [(row.step, row.location) for row in read] == [
        (s, f"http://h/{p}".strip()) for s, p in rows
    ]


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    spec=st.text(max_size=30).filter(lambda s: "://" not in s and "/" not in s)
    | st.sampled_from(
        ["[", "**", "~", "..\0", "x.csv", "hf://", "hf://a/b/c", "hf://@", "file://"]
    ),
    steps=st.none() | st.text(":0123456789 -", max_size=8),
)
def test_any_spec_gives_a_listing_or_one_clear_error(
    tmp_path: Path, monkeypatch, spec, steps
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        list_checkpoints(spec, steps=steps, endpoint="http://127.0.0.1:9")
    except CheckpointSpecError as error:
        assert str(error)


def test_two_stars_find_series_at_any_depth_and_end_somewhere(tmp_path, monkeypatch):
    for name in ("a/step1", "a/b/step2"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(name.encode())
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    for spec in (f"{tmp_path}/**/step*", "**/step*", "a/**/**/step*"):
        assert [ref.step for ref in list_checkpoints(spec)] == [1, 2]
    assert [ref.step for ref in list_checkpoints("a/**/b/*")] == [2]
    with pytest.raises(CheckpointSpecError, match=r"5,000 folders.*in front of"):
        list_checkpoints("/**/nowhere")
