"""Columns are declared once, and what derives from them agrees."""

from __future__ import annotations

import pyarrow
import pytest

from ke_ray.core.measures import MEASURES
from ke_ray.core.position import POSITION
from ke_ray.results.column_docs import DOCS, fill_in
from ke_ray.results.columns import OBJECTIVES, TABLES, names, schema, to_table
from ke_ray.studies.continual import ContinualStudy


@pytest.mark.parametrize("page", ["results.md", "measures.md"])
def test_the_documented_tables_are_the_declared_ones(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    assert fill_in(text) == text, "run: python -m ke_ray.results.column_docs"
    assert all(f"| `{measure}` |" in text for measure in MEASURES)


def test_every_table_is_documented() -> None:
    text = (DOCS / "results.md").read_text(encoding="utf-8")
    assert all(f"<!-- columns: {table} -->" in text for table in TABLES)


@pytest.mark.parametrize("table", TABLES)
def test_every_table_has_a_schema_of_distinct_columns(table: str) -> None:
    assert schema(table).names == list(names(table))
    assert len(set(names(table))) == len(names(table))


def test_a_checkpoint_has_its_position_in_every_table_that_names_it() -> None:
    for table in ("entropy", "replicates", "experts", "weights", "resuscitation"):
        assert set(POSITION) <= set(names(table))
    start = {name if name != "seed" else "pretraining_seed" for name in POSITION}
    for table in ("runs", "trials"):
        assert start <= set(names(table))
    assert [table for table in TABLES if "checkpoint" in names(table)] == [
        *("entropy", "replicates", "experts", "weights", "resuscitation", "runs", "trials")
    ]


def test_an_objective_needs_a_group_that_a_study_has() -> None:
    assert {str(column.needs) for column in OBJECTIVES.values()} <= set(ContinualStudy.model_fields)
    assert OBJECTIVES["forgetting"].direction == "minimize"
    assert set(OBJECTIVES) <= {*names("runs"), *names("trials")}


def test_rows_become_a_table_with_nulls_for_what_is_missing() -> None:
    table = to_table("perplexity", [{"run": "a", "perplexity": 2.0}])
    assert table.schema == schema("perplexity")
    assert table.to_pylist()[0]["num_tokens"] is None
    assert table.column("perplexity").type == pyarrow.float64()
    with pytest.raises(KeyError, match="'perplexity' has no column 'loss'"):
        to_table("perplexity", [{"loss": 1.0}])
