"""Published data: the list, and files fetched from a local stand-in for their servers."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from checkpoint_site import QUICK, Site

from ke_ray.data.documents import iter_documents
from ke_ray.data.published import (
    FetchedFile,
    PublishedData,
    PublishedFile,
    fetch,
    find_published,
    list_published,
    missing_files,
)
from ke_ray.errors import DataError
from ke_ray.studies.continual import ALL_TASKS

ROOT = Path(__file__).parents[2]
TEXTS = {"a.jsonl": b'{"text": "one"}\n' * 4000, "b.jsonl": b'{"text": "two"}\n' * 9}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    root = tmp_path / "site"
    (root / "texts").mkdir(parents=True)
    for name, content in TEXTS.items():
        (root / "texts" / name).write_bytes(content)
    with Site(root) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


def texts(site: Site, **hashes: str) -> PublishedData:
    """Two files; a sha256 is known of those that ``hashes`` names by their stem."""
    files = tuple(
        PublishedFile(name, f"{site.url}/texts/{name}", None, hashes.get(name[0])) for name in TEXTS
    )
    return PublishedData("texts", "Texts", site.url, "none", "texts", files, size_bytes=0)


def fetched(site: Site, root: Path, **hashes: str) -> list[FetchedFile]:
    return list(fetch(texts(site, **hashes), root, policy=QUICK))


def downloads(site: Site) -> int:
    return site.count("GET", "")


def test_files_arrive_once_and_are_read_by_a_study(site: Site, tmp_path: Path) -> None:
    data = texts(site)
    assert len(missing_files(data, tmp_path)) == 2
    first = fetched(site, tmp_path, a=sha256(TEXTS["a.jsonl"]))
    assert [(file.fetched, file.verified) for file in first] == [(True, True), (True, False)]
    assert {p.name: p.read_bytes() for p in (tmp_path / "texts").glob("*.jsonl")} == TEXTS
    assert missing_files(data, tmp_path) == []
    again = fetched(site, tmp_path)
    assert [(file.fetched, file.verified) for file in again] == [(False, True)] * 2
    assert downloads(site) == 2
    words = [text for text, _ in iter_documents(f"{tmp_path}/texts/*.jsonl")]
    assert (words.count("one"), words.count("two")) == (4000, 9)


def test_a_download_that_was_cut_goes_on_where_it_stopped(site: Site, tmp_path: Path) -> None:
    site.faults["/texts/a.jsonl"] = ["cut"]
    fetched(site, tmp_path, a=sha256(TEXTS["a.jsonl"]))
    ranges = [wanted for method, path, wanted in site.requests if method == "GET" and "a.j" in path]
    num_bytes = len(TEXTS["a.jsonl"])
    assert ranges[1:] == [f"bytes={num_bytes // 2}-{num_bytes - 1}"]


def test_a_changed_file_is_named_and_left_alone(site: Site, tmp_path: Path) -> None:
    fetched(site, tmp_path)
    changed = tmp_path / "texts" / "b.jsonl"
    changed.write_bytes(b"mine")
    with pytest.raises(DataError, match=r"b\.jsonl' has changed.*it had when it arrived.*Move it"):
        fetched(site, tmp_path)
    assert changed.read_bytes() == b"mine"
    with pytest.raises(DataError, match="published at http"):
        fetched(site, tmp_path, b=sha256(TEXTS["b.jsonl"]))


def test_what_is_not_the_published_file_is_not_kept(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not what was published.*expected at '.*a\.jsonl'"):
        fetched(site, tmp_path, a="0" * 64)
    assert list((tmp_path / "texts").iterdir()) == []


def test_a_mirror_without_a_scheme_and_a_damaged_list_of_sums_are_no_tracebacks(
    site: Site, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="mirror 'foo' is no address"):
        list(fetch(texts(site), tmp_path, mirror="foo"))
    fetched(site, tmp_path)
    sums = tmp_path / "texts" / "SHA256SUMS"
    sums.write_text("\nword\n" + sums.read_text())
    assert [file.fetched for file in fetched(site, tmp_path)] == [False, False]


def test_the_hash_that_the_hub_states_is_believed(site: Site, tmp_path: Path) -> None:
    site.stated = {f"/texts/{name}": sha256(content) for name, content in TEXTS.items()}
    assert all(file.verified for file in fetched(site, tmp_path / "one"))
    (tmp_path / "two" / "texts").mkdir(parents=True)
    (tmp_path / "two" / "texts" / "a.jsonl").write_bytes(b"cut o")  # copied by hand, in part
    with pytest.raises(DataError, match="has changed.*published at"):
        fetched(site, tmp_path / "two")
    site.stated["/texts/a.jsonl"] = "1" * 64
    with pytest.raises(DataError, match="is not what was published"):
        fetched(site, tmp_path / "three")


def test_a_file_that_no_server_has_is_named_with_its_place(site: Site, tmp_path: Path) -> None:
    (site.root / "texts" / "b.jsonl").unlink()
    with pytest.raises(DataError, match=r"texts/b\.jsonl' is missing, and http.*--mirror"):
        fetched(site, tmp_path)
    assert (tmp_path / "texts" / "a.jsonl").is_file(), "what has arrived stays"
    site.faults["/texts/b.jsonl"] = ["503"] * 4
    with pytest.raises(DataError, match=r"texts/b\.jsonl' is missing. Cannot fetch"):
        fetched(site, tmp_path)


def test_the_published_facts_are_those_of_the_reference_data(
    site: Site, tmp_path: Path, reference_data: Path
) -> None:
    folder = reference_data / "data" / "fictional_knowledge"
    facts = find_published("fictional_knowledge")
    for file in facts.files:
        content = (folder / file.name).read_bytes()
        assert (file.size_bytes, file.sha256) == (len(content), sha256(content))
    shutil.copytree(folder, site.root / "fictional_knowledge")
    files = list(fetch(facts, tmp_path / "data", mirror=site.url, policy=QUICK))
    assert all(file.verified and file.fetched for file in files)


def test_every_file_that_a_shipped_study_names_is_published() -> None:
    def sources(value: Any) -> Iterator[str]:
        if isinstance(value, dict | list):
            for part in value.values() if isinstance(value, dict) else value:
                yield from sources(part)
        elif isinstance(value, str) and value.startswith("data/"):
            yield value.partition("#")[0]

    places = [
        f"data/{data.folder}/{file.name}"
        for data in list_published().values()
        for file in data.files
    ]
    named = {
        source
        for path in (ROOT / "sweeps").glob("*.yaml")
        for source in sources(yaml.safe_load(path.read_text()))
    }
    assert len(named) >= 5
    assert [name for name in named if not fnmatch.filter(places, name)] == []


def test_addresses_are_those_of_the_hub_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example/")
    first = find_published("c4").files[0]
    address = "datasets/allenai/c4/resolve/main/en/c4-train.00000-of-01024.json.gz"
    assert first.url == f"https://hub.example/{address}"


@pytest.mark.parametrize(
    ("source", "name"),
    [("data/c4/*.json.gz", "c4"), ("data/pubmed/*.jsonl#contents", "pubmed")],
)
def test_a_study_whose_data_is_missing_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"matches no file. 'ke-ray data fetch {name}' fetches it"):
        next(iter(iter_documents(source)))


def test_a_task_published_as_parquet_is_written_as_json_lines(site: Site, tmp_path: Path) -> None:
    rows = [{"goal": "a – b", "sol1": "c", "sol2": "d", "label": 1}] * 2
    pq.write_table(pa.Table.from_pylist(rows), site.root / "piqa.parquet")
    published = (site.root / "piqa.parquet").read_bytes()
    url = f"{site.url}/piqa.parquet"
    file = PublishedFile("piqa/validation.jsonl", url, None, sha256(published))
    data = PublishedData("tasks", "Tasks", site.url, "none", "tasks", (file,), size_bytes=0)
    for fetched_now in (True, False):
        (result,) = fetch(data, tmp_path, policy=QUICK)
        assert (result.fetched, result.verified) == (fetched_now, True)
    lines = (tmp_path / "tasks" / "piqa" / "validation.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    result.path.write_text("{}")
    with pytest.raises(DataError, match=r"piqa/validation\.jsonl' has changed"):
        list(fetch(data, tmp_path, policy=QUICK))


def test_the_six_tasks_are_published_under_the_names_that_are_read() -> None:
    names = {file.name for file in find_published("tasks").files}
    assert names == {f"{task}/validation.jsonl" for task in ALL_TASKS}


def test_an_unknown_name_is_met_with_the_known_ones() -> None:
    with pytest.raises(DataError, match="no published data 'pubmeds'.*fictional.*mean 'pubmed'"):
        find_published("pubmeds")
