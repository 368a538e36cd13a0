"""What a dry run says about evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_studies import tiny_continual

from ke_ray.config import load_study
from ke_ray.core.dynamics import dynamics
from ke_ray.planning.evaluation_forecast import evaluation_cost
from ke_ray.planning.training_forecast import forecast, num_tokens
from ke_ray.studies.continual import ContinualStudy, ProbeSettings
from ke_ray.training import snapshot
from ke_ray.training.continual import run_continual
from ke_ray.training.runs import list_runs

SWEEPS = Path(__file__).parents[2] / "sweeps"


def test_the_paper_study_says_what_its_evaluations_cost(tmp_path: Path, pretrained: Path) -> None:
    keys = [f"starts.spec={pretrained / 'checkpoints'}", "starts.nearest=[]", f"output={tmp_path}"]
    study = load_study(SWEEPS / "olmo_1b_pubmed.yaml", ContinualStudy, keys)
    tokens = num_tokens(study)
    assert tokens is not None
    cost = evaluation_cost(study, tokens)
    # 0 and the end; nine injections with both sides and eight doublings, the tenth in the end.
    num_steps = 1 + 9 * 10 + 2
    assert cost.num_probings == num_steps - 1 + 2
    assert cost.probes == cost.num_probings * 130 * 15 * 26
    assert cost.entropy == 2 * 512 * 2048
    assert cost.perplexity == 2 * 256 * 1024
    evaluated = cost.probes + cost.tasks + cost.entropy + cost.perplexity
    assert cost.share == pytest.approx(evaluated / (3 * 1600 * 128 * 1024))
    assert str(cost) in forecast(study)
    assert f"evaluation: about {cost.share:.1%} of training's operations" in forecast(study)


@pytest.mark.parametrize("resuscitation", [None, {"ratio": 0.5, "factor": 2.0}])
def test_a_run_probes_as_often_as_its_forecast_says(
    resuscitation: Any, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tiny_continual(
        tmp_path, pretrained, resuscitation=resuscitation, downstream=None, held_out=None
    )
    probings = []

    def score(*args: Any, **options: Any) -> Any:
        probings.append(args)
        return score_probes(*args, **options)

    score_probes = snapshot.score_probes
    monkeypatch.setattr(snapshot, "score_probes", score)
    run_continual(study, list_runs(study)[-1])
    tokens = num_tokens(study)
    assert tokens is not None
    assert len(probings) == evaluation_cost(study, tokens).num_probings


def test_by_default_every_injection_but_the_last_has_dynamics() -> None:
    injections = range(160, 1601, 160)
    steps = ProbeSettings().resolve(injections, 1600)
    # Knowledge rises for ten steps after an injection and then decays.
    values = [-abs((step % 160) - 10) for step in steps]
    *found, last = dynamics(steps, values, injections)
    assert all(each.effectivity > 0 and each.decay > 0 for each in found)
    assert last.lam_step is None
    assert len(steps) < 1600 / 10
