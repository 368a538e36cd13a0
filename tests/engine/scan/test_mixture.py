"""A scan of a mixture of experts: what the folder holds, and that it can be resuscitated from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ke_ray.checkpoints.formats.fingerprint import weights_sha256
from ke_ray.core.experts import expert_entropies, expert_masses
from ke_ray.core.measures import MEASURES, evaluate
from ke_ray.models.loading import load_model
from ke_ray.models.scoring import score_instances
from ke_ray.planning import scan_items as plan
from ke_ray.results import ScanFolder
from ke_ray.resuscitation.coefficients import find_coefficients

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

SIZES = [12, 12, 12, 12]


def test_a_scan_of_olmoe_has_routing_within_and_load(
    scan, scan_study, tiny_decoder, token_ids, tmp_path, monkeypatch
):
    series = tmp_path / "series"
    for step in (10, 20, 30):
        model = tiny_decoder("olmoe", seed=step, vocab_size=128)
        model.save_pretrained(series / f"step{step}")
    monkeypatch.setattr(plan, "MIN_TOKENS_OF_A_CUT", 1)
    monkeypatch.setitem(plan.BYTES_PER_S, "here", 1e15)  # the last checkpoint comes in pieces
    study = scan_study(checkpoints={"spec": str(series)}, num_actors=2, batch_size=7)
    outcome = scan(study)
    assert outcome.exit_code == 0
    folder = ScanFolder.open(study.output)
    rows = folder.entropy().to_pylist()
    measures = {row["measure"] for row in rows}
    assert measures == {n for n, m in MEASURES.items() if m.is_default or m.by_expert}
    assert {row["d_mlp"] for row in rows} == {48}
    ids = np.load(token_ids).astype(np.int32)
    experts = folder.experts().to_pylist()
    assert len(experts) == 3 * 2 * 4
    for name in ("step10", "step30"):
        model = load_model(series / name)
        sums = score_instances(
            model, ids, measures=sorted(measures), num_instances=70, batch_size=70
        )
        expected = {(r.layer, r.measure): r for r in evaluate(sums, sorted(measures)).rows}
        own = [row for row in rows if row["checkpoint"] == name]
        assert len(own) == len(expected)
        for row in own:
            same = expected[row["layer"], row["measure"]]
            assert row["value"] == pytest.approx(same.value, abs=1e-6)
            if row["measure"] != "dormant_share":
                assert row["stderr"] == pytest.approx(same.stderr, abs=1e-6)
        mean, load = sums.mean("coefficients"), sums.mean("expert_load")
        masses = expert_masses(mean, SIZES)
        for row in (row for row in experts if row["checkpoint"] == name):
            layer, e = row["layer"], row["expert"]
            assert row["num_memories"] == 12
            assert row["load"] == pytest.approx(float(load[layer, e]), abs=1e-12)
            share = float(masses[layer, e] / masses[layer].sum())
            assert row["mass"] == pytest.approx(share, abs=1e-6)
            entropy = float(expert_entropies(mean, SIZES)[layer, e])
            assert row["entropy_nats"] == pytest.approx(entropy, abs=1e-6)
    found = find_coefficients(
        study.output, weights_sha256=weights_sha256(series / "step30"), checkpoint="step30"
    )
    assert found.verified
    torch.testing.assert_close(torch.from_numpy(found.values), mean.float(), rtol=1e-5, atol=0)
