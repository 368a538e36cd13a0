"""Measures of your own: from a file and from an installed package, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ke_ray.config import validate
from ke_ray.core import measures, sums
from ke_ray.core.measures import check_measures
from ke_ray.errors import ConfigError, UserError
from ke_ray.models.scoring import score_model
from ke_ray.studies import own_measures
from ke_ray.studies.own_measure import read_own_measure
from ke_ray.studies.own_measures import origins, use_own_measure
from ke_ray.studies.scan import ScanStudy

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "spread.py"
HEAD = "from ke_ray.core.measure import Measure\n"
MAXIMUM = """
largest = Measure(
    name="largest", title="Largest", doc="max", unit="fraction", needs="coefficients",
    values=lambda mean: mean.amax(dim=-1) / mean.sum(dim=-1), total="mean",
)
"""


@pytest.fixture(autouse=True)
def _own_measures_end_with_the_test() -> Iterator[None]:
    registries = (measures.MEASURES, sums.SUMS, own_measures._LOADED, own_measures._NAMES)
    before = [dict(registry) for registry in registries]
    yield
    for registry, content in zip(registries, before, strict=True):
        registry.clear()
        registry.update(content)


def study(*own: str, **keys: Any) -> ScanStudy:
    given = {"checkpoints": {"spec": "x"}, "data": {"d": "d.jsonl"}, "output": "out", **keys}
    return validate(ScanStudy, given | {"own_measures": own}, "the study")


def file_of(folder: Path, text: str) -> str:
    path = folder / "mine.py"
    path.write_text(HEAD + text)
    return f"{path}:largest"


def test_the_example_is_measured_beside_the_others_with_an_error(tiny_decoder) -> None:
    reference = f"{EXAMPLE}:spread"
    made = study(reference, measures=["gini"])
    assert made.measures == ("gini", "spread")
    assert study(reference).measures == (*measures.DEFAULT_MEASURES, "spread")
    assert "measures" not in study(reference).model_fields_set
    ids = torch.randint(3, 97, (6, 9), generator=torch.Generator().manual_seed(0))
    got = score_model(tiny_decoder("olmo"), ids, measures=made.measures)
    assert got.row("spread").value > 0
    assert got.row("spread", 1).stderr > 0
    again = study(**made.model_dump(exclude={"own_measures"}) | {"measures": made.measures})
    assert again.measures == made.measures  # as the manifest has it
    assert len(EXAMPLE.read_text().splitlines()) <= 30


def test_a_file_that_has_changed_takes_the_place_of_what_it_said(tmp_path) -> None:
    reference = file_of(tmp_path, MAXIMUM)
    name = use_own_measure(read_own_measure(reference))
    first = origins((name, "gini"))
    file_of(tmp_path, MAXIMUM.replace("Largest", "Other"))
    use_own_measure(read_own_measure(reference))
    assert measures.MEASURES["largest"].title == "Other"
    assert list(first) == ["largest"] != origins(("largest",))["largest"]
    assert first != origins(("largest",))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("largest = 1 / 0\n", "ZeroDivisionError in line 2: division by zero"),
        ("x = 1\nlargest = (\n", "SyntaxError in line 3"),
        ("largest = 7\n", "a int of the name 'largest'; expected a ke_ray.core.measure.Measure"),
        ("x = 7\n", "nothing of the name 'largest'"),
        (MAXIMUM.replace('="largest"', '="gini"'), "a measure 'gini' already"),
        (MAXIMUM.replace('"coefficients"', '"coefficient"'), "no sum. Did you mean 'coefficients'"),
        (MAXIMUM.replace('"fraction"', '"%"'), "the unit '%'"),
    ],
)
def test_a_file_that_declares_no_measure_says_why(tmp_path, text, problem) -> None:
    with pytest.raises(ConfigError, match=problem):
        study(file_of(tmp_path, text))


@pytest.mark.parametrize(
    ("reference", "problem"),
    [
        ("spread", "'spread' is no measure of a file; give FILE.py:NAME"),
        ("nowhere.py:spread", "cannot read 'nowhere.py'"),
        ("spread.txt:spread", "give FILE.py:NAME"),
    ],
)
def test_a_reference_to_no_file_says_what_to_give(reference, problem) -> None:
    with pytest.raises(ConfigError, match=problem):
        study(reference)


def package(folder: Path, text: str) -> None:
    """An installed package with an entry point."""
    (folder / "somebodys.py").write_text(HEAD + text)
    about = folder / "somebodys-1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys\nVersion: 1.2\n")
    (about / "entry_points.txt").write_text("[ke_ray.measures]\nlargest = somebodys:largest\n")


def test_an_installed_package_offers_measures_by_name(tmp_path, monkeypatch, tiny_decoder) -> None:
    package(tmp_path, MAXIMUM)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "somebodys", raising=False)
    assert study(measures="largest").measures == ("largest",)
    assert origins(("largest", "gini")) == {"largest": "somebodys 1.2"}
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    assert score_model(tiny_decoder("olmo"), ids, measures="largest").row("largest").stderr > 0


def test_a_package_that_cannot_be_imported_is_named(tmp_path, monkeypatch) -> None:
    package(tmp_path, "import nothing_of_the_kind\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "somebodys", raising=False)
    with pytest.raises(UserError, match="somebodys 1.2.*ModuleNotFoundError"):
        check_measures("largest")
