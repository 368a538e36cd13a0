"""``docs/paper.md``: every command is planned as it stands, at the cost that the page states."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from published_hub import published_hub

from ke_ray.planning import scan_forecast, training_forecast
from ke_ray.planning.paper_table import with_costs
from ke_ray.planning.speed import Speed
from ke_ray.planning.sweep import SweepPlan, fixed_points
from ke_ray.studies.sweep import load_sweep

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "paper.md").read_text()
COMMANDS = dict.fromkeys(re.findall(r"^\|[^|]+\| `[\w/.]+` \| `ke-ray ([^`]+)` \|", PAGE, re.M))


@pytest.fixture(scope="module")
def hub(tmp_path_factory, reference_data) -> Iterator[str]:
    with published_hub(tmp_path_factory.mktemp("hub"), reference_data) as server:
        yield server.url


@pytest.fixture
def at_hub(hub, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub)
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("KE_RAY_CACHE", str(tmp_path))
    # Half a second for each command, and its result is not what is tested.
    speed = Speed("CPU", "float32", 1e12, 1.0, "float32")
    for module in (scan_forecast, training_forecast):
        monkeypatch.setattr(module, "measured_speed", lambda *_, **__: speed)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_planned_as_it_stands(ke_ray, at_hub, command: str) -> None:
    kind, study = command.split()
    assert (ROOT / study).is_file()
    result = ke_ray(kind, study, "--dry-run")
    assert result.code == 0, result.err
    assert re.search(r"^bytes to fetch: (about )?\d[\d,]{8,}", result.out, re.M)
    assert re.search(r"^hours", result.out, re.M)


def test_the_costs_are_those_of_the_studies(at_hub) -> None:
    assert len(COMMANDS) >= 14
    assert with_costs(PAGE) == PAGE


@pytest.mark.parametrize(
    "name", ["olmo_1b_stages", "olmo_7b_pubmed", "pythia_1b_pubmed", "olmo_1b_c4"]
)
def test_every_stage_is_a_checkpoint_of_its_own(at_hub, name: str) -> None:
    study = load_sweep(ROOT / "sweeps" / f"{name}.yaml")
    plan = SweepPlan(study)
    for point in fixed_points(study):
        plan.add(point)
    steps = [trial.spec.ref.step or 0 for trial in plan.trials]
    wanted = [point.params["checkpoint"] for point in plan.points]
    assert steps == sorted(set(steps))
    gaps = [abs(step - stage) for step, stage in zip(steps, wanted, strict=True)]
    assert max(gaps) <= 1000
