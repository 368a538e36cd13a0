"""The costs that ``ke-ray studies`` lists: of every study that fetches, without a network."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from ke_ray.planning.cost import cost_of
from ke_ray.planning.listed_cost import listed_cost
from ke_ray.shipped import list_shipped
from ke_ray.studies.sweep import load_sweep

SHIPPED = {study.name: study for study in list_shipped()}


@pytest.fixture(autouse=True)
def without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the list of studies needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_every_study_of_published_checkpoints_has_bytes_and_hours(name: str) -> None:
    size, hours = listed_cost(SHIPPED[name])
    if name.startswith(("demo", "dolma_sample")):  # of series that are trained here
        assert (size or 0, hours) == (0, None)
    else:
        assert size
        assert hours


def test_a_scan_is_of_one_checkpoint_and_takes_the_longer_of_fetch_and_score() -> None:
    size, hours = listed_cost(SHIPPED["pythia_1b"])
    assert size == 4e9  # 1B parameters in float32
    score_s = 2 * 1e9 * 2048 * 2048 / (0.6 * 989e12)  # two operations a weight and token, bfloat16
    fetch_s = 4e9 / 1e8  # 100 MB/s
    assert hours == pytest.approx(max(score_s, fetch_s) / 3600)


def test_names_that_count_words_or_active_parameters_do_not_mislead() -> None:
    assert listed_cost(SHIPPED["series/babylm"])[0] == pytest.approx(4 * 124e6)
    assert listed_cost(SHIPPED["series/olmoe"])[0] == pytest.approx(4 * 7e9)
    assert listed_cost(SHIPPED["series/pythia"])[0] == pytest.approx(4 * 160e6)


def test_a_sweep_is_listed_as_its_dry_run_counts_it() -> None:
    cost = cost_of(load_sweep(str(SHIPPED["table1"].path)))
    assert listed_cost(SHIPPED["table1"]) == (cost.bytes_to_fetch, cost.h100_hours)


def test_the_list_has_one_line_for_each_study_and_starts_without_ray() -> None:
    code = (
        "import sys; sys.argv = ['ke-ray', 'studies']\n"
        "from ke_ray.cli import app\n"
        "app(standalone_mode=False)\n"
        "print(*sorted({'ray', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    listed = run.stdout.partition("\n\n")[0].splitlines()
    assert listed[0].split("  ")[-1] == "what it does"
    assert [line.split()[0] for line in listed[1:]] == list(SHIPPED)
    assert run.stderr.strip() == ""
