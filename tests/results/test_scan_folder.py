"""Result folders lose nothing, double nothing and refuse to mix what differs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from ke_ray import storage
from ke_ray.errors import ResultsError
from ke_ray.results import ScanFolder, merge_scans, new_manifest, read_manifest
from ke_ray.results.columns import to_table
from ke_ray.results.scan_folder import REPLICATES_SCHEMA
from ke_ray.results.scan_identity import check_identity


def make_folder(path, corpora=("dolma",), checkpoints=()) -> ScanFolder:
    identity = {
        "measure_version": 1,
        "dtype": "float32",
        "corpora": {name: f"sha-{name}" for name in corpora},
    }
    manifest = new_manifest("scan", {"output": str(path)}) | {
        "identity": identity,
        "corpora": {name: {"sha256": f"sha-{name}"} for name in corpora},
        "measures": ["knowledge_entropy"],
        "checkpoints": [
            {"name": name, "location": f"/c/{name}", "revision": None} for name in checkpoints
        ],
    }
    return ScanFolder(str(path), manifest)


def row(checkpoint, step, corpus="dolma", layer=None, value=1.0, sha="w", **more):
    return {
        "checkpoint": checkpoint,
        "step": step,
        "corpus": corpus,
        "layer": layer,
        "measure": "knowledge_entropy",
        "value": value,
        "stderr": 0.1,
        "unit": "nats",
        "weights_sha256": f"{sha}-{checkpoint}",
        "data_sha256": f"sha-{corpus}",
        "status": "ok",
        **more,
    }


def failure(checkpoint, step, corpus="dolma", error="broken"):
    return {
        "checkpoint": checkpoint,
        "step": step,
        "corpus": corpus,
        "status": "failed",
        "error": error,
    }


def replicates(checkpoint, step, values):
    return pa.Table.from_pylist(
        [
            {
                "checkpoint": checkpoint,
                "step": step,
                "corpus": "dolma",
                "layer": None,
                "measure": "knowledge_entropy",
                "group": group,
                "value": value,
            }
            for group, value in enumerate(values)
        ],
        REPLICATES_SCHEMA,
    )


def values_of(folder):
    return {
        (r["checkpoint"], r["corpus"], r["layer"], r["status"]): r["value"]
        for r in folder.entropy().to_pylist()
    }


def test_parts_and_tables_read_the_same(tmp_path):
    folder = make_folder(tmp_path)
    folder.write_part("b", [row("b", 20, value=2.0)], replicates("b", 20, [1.0, 3.0]))
    folder.write_part("a", [row("a", 10, value=1.0)], replicates("a", 10, [0.5, 1.5]))
    before = folder.entropy(), folder.replicates()
    folder.consolidate(final=True)
    assert not storage.exists(storage.join(str(tmp_path), "parts"))
    again = ScanFolder.open(str(tmp_path))
    assert again.entropy().equals(before[0])
    assert (
        again.replicates()
        .sort_by([("step", "ascending"), ("group", "ascending")])
        .equals(before[1].sort_by([("step", "ascending"), ("group", "ascending")]))
    )
    assert again.entropy()["checkpoint"].to_pylist() == ["a", "b"]
    assert again.manifest["status"] == "finished"


def test_stages_seeds_and_branches_order_the_checkpoints(tmp_path):
    folder = make_folder(tmp_path)
    positions = {
        "unknown": {"step": None},
        "seed": {"step": 1, "seed": "2"},
        "branch10": {"step": 1, "stage": 2, "branch": "ingredient10"},
        "branch9": {"step": 5, "stage": 2, "branch": "ingredient9"},
        "anneal": {"step": 0, "stage_label": "anneal"},
        "tokens": {"step": None, "tokens": 30},
        "first": {"step": 20},
    }
    for name, position in positions.items():
        folder.write_part(name, [row(name, **position)])
    order = list(dict.fromkeys(folder.entropy()["checkpoint"].to_pylist()))
    assert order == ["first", "tokens", "branch9", "branch10", "anneal", "unknown", "seed"]


def test_ingredients_of_an_earlier_version_become_branches(tmp_path):
    folder = make_folder(tmp_path)
    folder.write_part("a", [row("a", 1, stage=2)])
    folder.consolidate(final=True)
    uri = storage.join(str(tmp_path), "entropy.parquet")
    table = storage.read_table(uri).drop_columns(["branch", "tokens", "seed"])
    storage.write_table(uri, table.append_column("ingredient", pa.array([3])))
    (read,) = ScanFolder.open(str(tmp_path)).entropy().to_pylist()
    assert (read["branch"], read["tokens"], read["stage"]) == ("ingredient3", None, 2)


def test_folding_goes_checkpoint_by_checkpoint_over_tables_of_any_layout(tmp_path):
    folder = make_folder(tmp_path)
    old = pa.concat_tables([replicates("c", 30, [5.0, 6.0]), replicates("a", 10, [1.0, 2.0])])
    storage.write_table(str(tmp_path / "replicates.parquet"), old)  # one row group
    folder.write_part("b", [row("b", 20)], replicates("b", 20, [3.0, 4.0]))
    folder.write_part("a", [row("a", 10)], replicates("a", 10, [7.0, 8.0]))
    folder.consolidate()
    for number in range(3):
        name = f"long{number}"
        folder.write_part(name, [row(name, number)], replicates(name, number, range(8000)))
    folder.consolidate()
    with parquet.ParquetFile(tmp_path / "replicates.parquet") as file:
        groups = [file.read_row_group(n).to_pydict() for n in range(file.num_row_groups)]
    names = [list(dict.fromkeys(group["checkpoint"])) for group in groups]
    assert names == [["long0", "long1"], ["long2", "a", "b", "c"]]
    assert groups[0]["value"] == [*range(8000)] * 2
    assert groups[1]["value"][8000:] == [7.0, 8.0, 3.0, 4.0, 5.0, 6.0]
    assert groups[1]["group"][8000:] == [0, 1] * 3
    assert folder.replicates()["value"].to_pylist()[24000:] == groups[1]["value"][8000:]


def test_a_later_value_ends_an_earlier_failure_and_is_not_doubled(tmp_path):
    folder = make_folder(tmp_path)
    folder.write_part("a", [failure("a", 10)])
    folder.consolidate()
    assert values_of(folder) == {("a", "dolma", None, "failed"): None}
    folder.write_part("a", [row("a", 10, value=5.0)])
    assert values_of(folder) == {("a", "dolma", None, "ok"): 5.0}
    folder.consolidate(final=True)
    assert values_of(ScanFolder.open(str(tmp_path))) == {("a", "dolma", None, "ok"): 5.0}


def test_a_failure_after_values_is_kept_beside_them(tmp_path):
    folder = make_folder(tmp_path)
    folder.write_part("a", [row("a", 10, value=5.0)])
    folder.consolidate()
    folder.write_part("a", [failure("a", 10, error="gini failed")])
    folder.consolidate()
    assert set(values_of(folder)) == {("a", "dolma", None, "ok"), ("a", "dolma", None, "failed")}
    folder.consolidate()
    assert len(values_of(ScanFolder.open(str(tmp_path)))) == 2


def test_same_weights_are_flagged_with_the_earliest(tmp_path):
    folder = make_folder(tmp_path)
    for name, step in (("late", 30), ("early", 10), ("other", 20)):
        sha = "same" if name != "other" else "own"
        folder.write_part(name, [row(name, step, weights_sha256=sha)])
    flagged = {r["checkpoint"]: r["duplicate_of"] for r in folder.entropy().to_pylist()}
    assert flagged == {"early": None, "other": None, "late": "early"}


def test_coefficients_of_each_corpus_come_back(tmp_path):
    folder = make_folder(tmp_path, corpora=("dolma", "pubmed"))
    arrays = {name: np.random.default_rng(i).random((2, 5)) for i, name in enumerate("ab")}
    folder.write_part("x", [row("x", 1)], None, {"dolma": arrays["a"], "pubmed": arrays["b"]})
    folder.write_manifest()
    again = ScanFolder.open(str(tmp_path))
    assert again.list_coefficients() == ["x.safetensors", "x@pubmed.safetensors"]
    np.testing.assert_allclose(again.mean_coefficients("x"), arrays["a"], rtol=1e-6)
    np.testing.assert_allclose(again.mean_coefficients("x", "pubmed"), arrays["b"], rtol=1e-6)
    with pytest.raises(ResultsError, match=r"no coefficients of checkpoint 'y'.*it has: x, x@pub"):
        again.mean_coefficients("y")


def experts(checkpoint: str, corpus: str, load: list[float]) -> pa.Table:
    rows = [
        {"checkpoint": checkpoint, "corpus": corpus, "layer": 0, "expert": e, "load": value}
        for e, value in enumerate(load)
    ]
    return to_table("experts", rows)


def test_experts_of_the_last_scan_count_and_a_dense_scan_has_no_such_table(tmp_path):
    folder = make_folder(tmp_path / "mixture")
    for load in ([0.5, 0.5], [0.25, 0.75]):
        folder.write_part("x", [row("x", 1)], experts=experts("x", "dolma", load))
        folder.consolidate()
    folder.write_part("y", [row("y", 2)], experts=experts("y", "dolma", [1.0]))
    assert folder.experts()["load"].to_pylist() == [0.25, 0.75, 1.0]
    folder.consolidate(final=True, without=["x"])
    again = ScanFolder.open(folder.uri)
    assert again.experts().select(["checkpoint", "load"]).to_pylist() == [
        {"checkpoint": "y", "load": 1.0}
    ]
    dense = make_folder(tmp_path / "dense")
    dense.write_part("x", [row("x", 1)])
    dense.consolidate(final=True)
    assert not (tmp_path / "dense" / "experts.parquet").exists()
    assert dense.experts().num_rows == 0


def test_merge_takes_the_experts_of_a_corpus_from_the_first_folder_that_has_it(tmp_path):
    for name, corpora, load in (("one", ("dolma",), 0.5), ("two", ("dolma", "c4"), 0.25)):
        folder = make_folder(tmp_path / name, corpora=corpora, checkpoints=["a"])
        for corpus in corpora:
            table = experts("a", corpus, [load, 1 - load])
            folder.write_part("a", [row("a", 1, corpus=corpus)], experts=table)
        folder.consolidate(final=True)
    merged = merge_scans([str(tmp_path / "one"), str(tmp_path / "two")], str(tmp_path / "all"))
    found = {(r["corpus"], r["expert"]): r["load"] for r in merged.experts().to_pylist()}
    assert found == {
        ("dolma", 0): 0.5,
        ("dolma", 1): 0.5,
        ("c4", 0): 0.25,
        ("c4", 1): 0.75,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "bfloat16"}, "dtype = 'float32', this run has 'bfloat16'"),
        ({"corpora": {"dolma": "other"}}, "corpus 'dolma' with data_sha256 sha-dolma"),
    ],
)
def test_other_identities_are_refused(tmp_path, change, message):
    folder = make_folder(tmp_path)
    with pytest.raises(ResultsError, match=message):
        check_identity(
            folder.uri, folder.manifest["identity"], folder.manifest["identity"] | change
        )


def test_another_corpus_may_be_added(tmp_path):
    identity = make_folder(tmp_path).manifest["identity"]
    check_identity("x", identity, identity | {"corpora": {"c4": "sha-c4"}})


def test_spread_instances_do_not_join_first_ones_nor_other_groups(tmp_path):
    before = make_folder(tmp_path).manifest["identity"]
    spread = before | {"sampling": {"dolma": "spread"}, "groups": {"dolma": "equal"}}
    with pytest.raises(ResultsError, match="sampling: first"):
        check_identity("x", before, spread)
    with pytest.raises(ResultsError, match="whole documents"):
        check_identity("x", spread, spread | {"groups": {"dolma": "whole documents"}})
    check_identity("x", before, before | {"sampling": {"dolma": "first"}})
    check_identity("x", spread, spread)


def test_merge_keeps_how_each_corpus_was_sampled(tmp_path):
    for name, corpus, sampling in (("one", "dolma", "spread"), ("two", "c4", "first")):
        folder = make_folder(tmp_path / name, corpora=(corpus,), checkpoints=["a"])
        folder.manifest["identity"]["sampling"] = {corpus: sampling}
        folder.write_part("a", [row("a", 1, corpus=corpus)])
        folder.consolidate(final=True)
    merged = merge_scans([str(tmp_path / "one"), str(tmp_path / "two")], str(tmp_path / "all"))
    assert merged.manifest["identity"]["sampling"] == {"dolma": "spread", "c4": "first"}
    assert set(merged.manifest["identity"]["corpora"]) == {"dolma", "c4"}


def test_merge_joins_checkpoints_and_keeps_their_numbers(tmp_path):
    for name, checkpoint, step in (("one", "a", 10), ("two", "b", 20)):
        folder = make_folder(tmp_path / name, checkpoints=[checkpoint])
        folder.write_part(
            checkpoint,
            [row(checkpoint, step, value=float(step))],
            replicates(checkpoint, step, [1.0, 2.0]),
            {"dolma": np.full((1, 3), step)},
        )
        folder.consolidate(final=True)
    merged = merge_scans([str(tmp_path / "one"), str(tmp_path / "two")], str(tmp_path / "all"))
    assert values_of(merged) == {
        ("a", "dolma", None, "ok"): 10.0,
        ("b", "dolma", None, "ok"): 20.0,
    }
    assert merged.replicates().num_rows == 4
    assert merged.mean_coefficients("b")[0, 0] == 20
    assert read_manifest(str(tmp_path / "all"))["status"] == "finished"
    with pytest.raises(ResultsError, match="holds results of kind"):
        merge_scans([str(tmp_path / "one")], str(tmp_path / "all"))


def test_merge_refuses_one_name_for_two_checkpoints(tmp_path):
    for name in ("one", "two"):
        folder = make_folder(tmp_path / name, checkpoints=["a"])
        folder.manifest["checkpoints"][0]["location"] = f"/elsewhere/{name}"
        folder.write_part("a", [row("a", 1, sha=name)])
        folder.consolidate(final=True)
    with pytest.raises(ResultsError, match="cannot be told apart"):
        merge_scans([str(tmp_path / "one"), str(tmp_path / "two")], str(tmp_path / "all"))


def test_newer_schema_and_other_kinds_are_refused(tmp_path):
    with pytest.raises(ResultsError, match="holds no results"):
        read_manifest(str(tmp_path))
    folder = make_folder(tmp_path)
    folder.manifest["schema_version"] = 99
    folder.write_manifest()
    with pytest.raises(ResultsError, match="schema_version 99"):
        read_manifest(str(tmp_path))
    folder.manifest |= {"schema_version": 1, "kind": "sweep"}
    folder.write_manifest()
    with pytest.raises(ResultsError, match="kind 'sweep', expected 'scan'"):
        ScanFolder.open(str(tmp_path))


def test_a_writer_killed_at_any_moment_leaves_whole_files(tmp_path):
    script = textwrap.dedent(
        f"""
        import sys
        sys.path.insert(0, {str(os.path.dirname(__file__))!r})
        from test_scan_folder import make_folder, row
        folder = make_folder({str(tmp_path / "out")!r})
        folder.write_manifest()
        print("ready", flush=True)
        for number in range(100000):
            name = f"c{{number}}"
            folder.write_part(name, [row(name, number, layer=layer) for layer in range(50)])
            if number % 20 == 19:
                folder.consolidate()
        """
    )
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        while not any((tmp_path / "out").glob("**/[!.]*.entropy.parquet")):
            time.sleep(0.01)
        time.sleep(0.7)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        folder = ScanFolder.open(str(tmp_path / "out"))
        counts: dict[str, int] = {}
        for r in folder.entropy().to_pylist():
            counts[r["checkpoint"]] = counts.get(r["checkpoint"], 0) + 1
        assert counts
        assert set(counts.values()) == {50}


def test_a_fold_leaves_alone_what_another_thread_is_writing(tmp_path):
    folder = make_folder(tmp_path, checkpoints=["a"])
    folder.write_part("a", [row("a", 10)])
    being_written = tmp_path / "parts" / ".ke-ray-1234-b.entropy.parquet"
    being_written.write_bytes(b"the first half")
    folder.consolidate()
    assert [path.name for path in (tmp_path / "parts").iterdir()] == [being_written.name]
    folder.consolidate(final=True)
    assert not (tmp_path / "parts").exists()


def test_results_of_other_weights_are_dropped_whole(tmp_path):
    folder = make_folder(tmp_path, corpora=("dolma", "c4"), checkpoints=["a", "b"])
    for name, step in (("a", 10), ("b", 20)):
        rows = [row(name, step), row(name, step, corpus="c4"), row(name, step, measure="gini")]
        arrays = {"dolma": np.ones((1, 3)), "c4": np.ones((1, 3))}
        folder.write_part(name, rows, replicates(name, step, [1.0, 2.0]), arrays)
    weights = tmp_path / "weights.parquet"
    weights.write_bytes(b"distances from the replaced weights")
    folder.consolidate()
    assert weights.exists()
    folder.consolidate(without=["a"])
    assert not weights.exists()
    again = ScanFolder.open(str(tmp_path))
    assert set(again.finished()) == {("b", "dolma"), ("b", "c4")}
    assert set(again.replicates()["checkpoint"].to_pylist()) == {"b"}
    assert again.list_coefficients() == ["b.safetensors", "b@c4.safetensors"]


def merged_pair(tmp_path, first, second, locations=("/c", "/c")):
    """Merge two folders of a checkpoint ``a``; each argument is (rows, replicates or None)."""
    uris = []
    for name, (rows, values), location in zip("xy", (first, second), locations, strict=True):
        folder = make_folder(tmp_path / name, checkpoints=["a"])
        folder.manifest["checkpoints"][0]["location"] = location
        folder.write_part("a", rows, values)
        folder.consolidate(final=True)
        uris.append(folder.uri)
    return merge_scans(uris, str(tmp_path / "all"))


@pytest.mark.parametrize("failed_first", [True, False])
def test_merge_lets_values_end_a_failure_in_either_order(tmp_path, failed_first):
    pair = [([row("a", 1, value=3.0)], replicates("a", 1, [1.0, 2.0])), ([failure("a", 1)], None)]
    merged = merged_pair(tmp_path, *(pair[::-1] if failed_first else pair))
    assert values_of(merged) == {("a", "dolma", None, "ok"): 3.0}
    assert read_manifest(merged.uri)["status"] == "finished"


def test_merge_takes_what_both_have_once(tmp_path):
    both = ([row("a", 1)], replicates("a", 1, [1.0, 2.0]))
    merged = merged_pair(tmp_path, both, both, locations=("/here", "/moved"))
    assert len(merged.entropy()) == 1
    assert merged.replicates().num_rows == 2


def test_merge_keeps_a_failure_that_nothing_mends(tmp_path):
    merged = merged_pair(tmp_path, ([failure("a", 1)], None), ([failure("a", 1)], None))
    assert values_of(merged) == {("a", "dolma", None, "failed"): None}
    assert read_manifest(merged.uri)["status"] == "failed"


def test_merge_refuses_other_weights_at_one_place(tmp_path):
    with pytest.raises(ResultsError, match="weights_sha256 differs"):
        merged_pair(tmp_path, ([row("a", 1)], None), ([row("a", 1, sha="other")], None))
    assert not (tmp_path / "all").exists()
