"""A monitor in a plain training loop."""

from __future__ import annotations

import copy
import os
import random
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from command_process import start_process
from tiny_training import VOCABULARY, tiny_mixture, tiny_model, tiny_rows

import ke_ray
from ke_ray.callbacks import Monitor
from ke_ray.callbacks.folder import RunFolder
from ke_ray.data.corpus import build_corpus
from ke_ray.errors import ConfigError, DataError, KeRayError, ResultsError, UserError
from ke_ray.models.scoring import score_model
from ke_ray.report import build_report
from ke_ray.report.sources import find_results
from ke_ray.results.columns import schema
from ke_ray.results.manifest import new_manifest, write_manifest
from ke_ray.results.scan_folder import ScanFolder
from ke_ray.results.status import read_status

D = tiny_rows(num_instances=5).ids
TEXT = torch.from_numpy(tiny_rows(seed=1).ids).long()
#: Dear enough for a model that is measured as often as this.
SETTINGS: dict[str, Any] = {"every": 2, "tokens_per_step": 4 * 12, "max_share": 1.0}


def dropping_model() -> Any:
    """A model whose training draws random numbers, with one part that is not trained."""
    model = tiny_model()
    model.config.attention_dropout = 0.2
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.2
    model.train()
    model.model.layers[0].mlp.eval()
    return model


def train(
    model: Any,
    steps: int,
    measure: Callable[[Any, int], Any] = lambda model, step: None,
    first: int = 0,
    forward: Any = None,
) -> list[float]:
    """Steps of AdamW on two micro-batches each; what ``measure`` is given is live."""
    torch.manual_seed(7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(first + 1, first + steps + 1):
        optimizer.zero_grad(set_to_none=True)
        for half in (0, 1):
            rows = TEXT[(4 * step + 2 * half) % 40 :][:2]
            loss = (model if forward is None else forward)(input_ids=rows, labels=rows).loss
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        measure(model, step)
    return losses


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def table(folder: Path) -> pd.DataFrame:
    return ScanFolder.open(str(folder)).entropy().to_pandas()


def test_values_are_those_of_the_model_at_that_step(tmp_path: Path) -> None:
    names = ["knowledge_entropy", "gini", "loss", "rank_me", "attention_entropy"]
    expected, logged = {}, {}

    def measure(model: Any, step: int) -> None:
        expected[step] = score_model(copy.deepcopy(model), D, measures=names)
        logged[step] = monitor(model, step)

    model = tiny_model()
    with Monitor(D, tmp_path, measures=names, **SETTINGS) as monitor:
        measure(model, 0)
        train(model, 5, measure)
    assert [step for step, metrics in logged.items() if metrics] == [0, 2, 4]
    rows = table(tmp_path)
    assert sorted(set(rows.step)) == [0, 2, 4]
    assert len(rows) == 3 * len(expected[0].rows)
    for step in (0, 2, 4):
        for _, row in rows[rows.step == step].iterrows():
            one = expected[step].row(row.measure, None if pd.isna(row.layer) else int(row.layer))
            assert row.value == one.value
            assert row.stderr == one.stderr or np.isnan(one.stderr)
        metrics = logged[step]
        total = expected[step].row("knowledge_entropy").value
        assert metrics["knowledge_entropy/total_nats"] == total
        assert metrics["knowledge_entropy/layer_01_nats"] < total
        assert metrics["knowledge_entropy/gini/total_fraction"] > 0
        assert metrics["knowledge_entropy/loss/total_nats"] > 0
    assert list(rows.tokens.unique()) == [0, 96, 192]


@pytest.mark.parametrize("make", [dropping_model, tiny_mixture])
def test_training_does_not_notice_that_it_is_measured(
    tmp_path: Path, make: Callable[[], Any]
) -> None:
    alone, watched = make(), make()
    losses = train(alone, 6)
    random.seed(3)
    np.random.seed(3)
    python, arrays = random.random(), np.random.random()
    random.seed(3)
    np.random.seed(3)
    modes = [module.training for module in watched.modules()]
    gradients: list[bool] = []

    names = ["knowledge_entropy", "knowledge_entropy_relu", "attention_entropy", "loss", "rank_me"]
    with Monitor(D, tmp_path, measures=names, **SETTINGS) as monitor:

        def measure(model: Any, step: int) -> None:
            before = [parameter.grad.clone() for parameter in model.parameters()]
            monitor(model, step)
            after = [parameter.grad for parameter in model.parameters()]
            gradients.append(all(map(torch.equal, before, after)))

        assert train(watched, 6, measure) == losses
    assert gradients == [True] * 6
    assert [module.training for module in watched.modules()] == modes
    assert (random.random(), np.random.random()) == (python, arrays)
    ours, theirs = weights(watched), weights(alone)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert len(table(tmp_path).step.unique()) == 3


def test_a_measurement_within_autocast_leaves_gradients_of_weights_alone(tmp_path: Path) -> None:
    """Autocast keeps casts of weights for the region; one made without gradients would be used."""
    found = []
    for number, measured in enumerate((False, True)):
        model = tiny_model().train()
        monitor = Monitor(D, tmp_path / str(number), **SETTINGS)
        with torch.autocast("cpu", torch.bfloat16):
            if measured:
                assert monitor(model, 0)
            model(input_ids=TEXT[:2], labels=TEXT[:2]).loss.backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *found))


def test_what_fails_is_a_row_and_leaves_nothing_behind(tmp_path: Path) -> None:
    model = tiny_model().train()
    monitor = Monitor(D, tmp_path, **SETTINGS)
    assert monitor(model, 2)
    model.model.layers[1].mlp.forward = lambda hidden: 1 / 0
    assert monitor(model, 4) == {}
    del model.model.layers[1].mlp.forward
    assert model.training
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert sum(hooks) == 0
    assert monitor(model, 6)
    monitor.close()
    rows = table(tmp_path)
    failed = rows[rows.status == "failed"]
    assert list(failed.step) == [4]
    assert "ZeroDivisionError" in failed.error.iloc[0]
    assert sorted(set(rows[rows.status == "ok"].step)) == [2, 6]


def test_the_folder_is_one_of_a_scan(tmp_path: Path) -> None:
    folder = tmp_path / "live"
    model = tiny_mixture()
    with Monitor(D, folder, measures=["knowledge_entropy", "routing_entropy"], **SETTINGS) as m:
        m(model, 0)
        (during,) = read_status(str(folder))
        assert (during.state, during.note) == ("running", "measured while it is trained")
        train(model, 4, m)
    stored = pd.read_parquet(folder / "entropy.parquet")
    assert list(stored.columns) == schema("entropy").names
    assert not (folder / "parts").exists()
    scan = ScanFolder.open(str(folder))
    assert scan.manifest["status"] == "finished"
    assert scan.mean_coefficients("step4").shape == (2, 64)
    assert set(scan.experts().to_pandas().checkpoint) == {"step0", "step2", "step4"}
    assert set(scan.replicates().to_pandas().measure) == {"knowledge_entropy", "routing_entropy"}
    assert scan.manifest["cost"]["forecast_share"] == m.cost.share
    assert scan.manifest["cost"]["share"] > 0
    build_report([str(folder)], str(tmp_path / "report.html"))
    page = (tmp_path / "report.html").read_text()
    assert "Knowledge entropy" in page
    assert "Routing entropy" in page
    (study,) = read_status(str(folder))
    assert (study.state, study.done, study.total) == ("finished", 3, 3)


def killed_run(folder: str, at: str) -> None:
    """Train, and be killed in the midst of the third measurement."""
    model, killed = tiny_model(), False
    write = getattr(ScanFolder, at)

    def die(self: ScanFolder, *args: Any, **keys: Any) -> None:
        if killed:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, *args, **keys)

    setattr(ScanFolder, at, die)
    monitor = Monitor(D, folder, **SETTINGS)
    monitor(model, 0)
    train(model, 3, monitor)
    killed = True
    train(model, 3, monitor, first=3)


@pytest.mark.parametrize("at", ["write_part", "write_manifest"])
def test_a_killed_run_leaves_a_readable_folder_and_resumes_in_it(tmp_path: Path, at: str) -> None:
    folder = tmp_path / "live"
    process = start_process(killed_run, str(folder), at)
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL
    steps = [0, 2] if at == "write_part" else [0, 2, 4]
    assert sorted(set(table(folder).step)) == steps
    (result,) = find_results([folder])
    assert set(result.table("entropy")["step"]) == set(steps)
    (study,) = read_status(str(folder))
    assert study.state == "stopped"
    # It resumes from a checkpoint of step 2; what was measured later is measured again.
    model = tiny_model()
    monitor = Monitor(D, folder, **SETTINGS)
    monitor.start(model, 2)
    assert sorted(set(table(folder).step)) == [0, 2]
    train(model, 4, monitor, first=2)
    monitor.close()
    rows = table(folder)
    assert sorted(set(rows.step)) == [0, 2, 4, 6]
    assert not rows.duplicated(["checkpoint", "corpus", "layer", "measure"]).any()
    entries = [entry["name"] for entry in ScanFolder.open(str(folder)).manifest["checkpoints"]]
    assert entries == ["step0", "step2", "step4", "step6"]


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    with Monitor(D, tmp_path, run="a", **SETTINGS) as monitor:
        monitor(model, 2)
    other = replace(monitor.corpus, name="pile")
    for settings, step, message in (
        ({"run": "a"}, 0, "another run, up to step 2.*another output folder"),
        ({"run": "b"}, 4, "run = 'a', this run has 'b'"),
        ({"run": "a", "data": D[:2]}, 4, "data_sha256"),
        ({"run": "a", "data": other}, 4, "measurements on D, and this run's D is pile"),
        ({"run": "a", "autocast": torch.bfloat16}, 4, "autocast = None"),
    ):
        given = {"data": D, **SETTINGS, **settings}
        refused = Monitor(given.pop("data"), tmp_path, **given)
        with pytest.raises(ResultsError, match=message):
            refused.start(model, step)
    with pytest.raises(ResultsError, match="series"):
        Monitor(D, tmp_path, run="a", **SETTINGS).start(tiny_mixture(), 4)
    assert sorted(set(table(tmp_path).step)) == [2]
    with Monitor(D, tmp_path / "early", **SETTINGS) as early:
        early(model, 0)
    with Monitor(D, tmp_path / "early", **SETTINGS) as again:  # training had not begun
        assert again(model, 0)
    assert list(table(tmp_path / "early").step.unique()) == [0]


def test_folders_of_others_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    write_manifest(str(tmp_path / "scan"), new_manifest("scan", {}) | {"identity": {}})
    write_manifest(str(tmp_path / "pretrain"), new_manifest("pretrain", {}))
    for name, message in (
        ("mine", "'notes.txt'"),
        ("scan", "holds a scan, expected a training's measurements"),
        ("pretrain", "kind 'pretrain'"),
    ):
        with pytest.raises(ResultsError, match=message):
            Monitor(D, tmp_path / name, **SETTINGS).start(tiny_model())


def test_a_run_that_raised_does_not_lock_its_folder(tmp_path: Path) -> None:
    model, first = tiny_model(), Monitor(D, tmp_path, **SETTINGS)
    first(model, 2)  # and its training raised, in a notebook
    second = Monitor(D, tmp_path, **SETTINGS)
    second.start(model, 2)
    assert second(model, 4)
    second.close()
    assert sorted(set(table(tmp_path).step)) == [2, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "no D to measure on"),
        ({"data": []}, "no D to measure on"),
        ({"data": [[1, 2], []]}, "Instance 1 of D"),
        ({"data": np.zeros((2, 3))}, "Instance 0 of D"),
        ({"data": [[VOCABULARY + 1]]}, "vocabulary of 64"),
        ({"data": np.ones((1, 40), int)}, "40 tokens but the model has 32 positions"),
        ({"every": 0}, "every is 0; expected at least 1"),
        ({"max_share": 0.0}, "max_share is 0.0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"measures": "knowledge_entropie"}, "Did you mean 'knowledge_entropy'"),
        ({"measures": "sensitivity_all_0.1"}, "leave the weights alone while training"),
        ({"tokens_per_step": None}, "tokens_per_step is not known"),
        ({"every": 1, "max_share": 0.01}, r"every=1 costs too much.*every=42 or more"),
    ],
)
def test_what_cannot_be_measured_is_one_message(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    given = {"data": D, **SETTINGS, **changes}
    with pytest.raises(UserError, match=message) as refusal:
        Monitor(given.pop("data"), tmp_path / "out", **given).start(tiny_model())
    assert isinstance(refusal.value, DataError | ConfigError | UserError)
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_measured_are_one_message(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    mamba = MambaForCausalLM(
        MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    two = torch.nn.ModuleList([tiny_model(), tiny_model()])
    for model, message in (
        (mamba, "mamba"),
        (torch.nn.Linear(2, 2), "Linear holds no model of transformers"),
        (two, "OlmoForCausalLM and OlmoForCausalLM"),
        (None, "NoneType holds no model"),
    ):
        with pytest.raises(UserError, match=message):
            Monitor(D, tmp_path / "out", **SETTINGS).start(model)
    with pytest.raises(UserError, match="loss needs a language-model head"):
        Monitor(D, tmp_path / "bare", measures="loss", **SETTINGS)(tiny_model().model, 0)


class Wrapper(torch.nn.Module):
    """A module of one's own around a model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model

    def forward(self, **batch: Any) -> Any:
        return self.inner(**batch)


def compiled_layers(model: Any) -> Any:
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    "wrap", [Wrapper, lambda model: torch.compile(model, backend="eager"), compiled_layers]
)
def test_what_is_around_the_model_changes_nothing(tmp_path: Path, wrap: Any) -> None:
    expected = []
    train(tiny_model(), 4, lambda model, step: expected.append(score_model(model, D)))
    found = []
    model = tiny_model()
    wrapped = wrap(model)
    monitor = Monitor(D, tmp_path, **SETTINGS)
    train(model, 4, lambda _, step: found.append(monitor(wrapped, step)), forward=wrapped)
    totals = [metrics["knowledge_entropy/total_nats"] for metrics in found if metrics]
    assert totals == [expected[step - 1].row("knowledge_entropy").value for step in (2, 4)]


def test_d_may_be_a_file_lists_or_a_corpus(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", D.astype(np.uint16))
    corpus = build_corpus("mine", str(tmp_path / "d.npy"), num_instances=None, sequence_length=None)
    forms = [D, torch.from_numpy(D), D.tolist(), str(tmp_path / "d.npy"), corpus]
    monitors = [Monitor(form, tmp_path / "out", **SETTINGS) for form in forms]
    assert len({monitor.corpus.sha256 for monitor in monitors}) == 1
    ragged = Monitor([[3, 4, 5], [6]], tmp_path / "out", **SETTINGS)
    assert ragged.corpus.lengths.tolist() == [3, 1]


def test_a_full_disk_does_not_end_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, monitor = tiny_model(), Monitor(D, tmp_path, **SETTINGS)
    monitor.start(model)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunFolder, "write", full)
    assert monitor(model, 2)["knowledge_entropy/total_nats"] > 0
    assert "No space left" in caplog.text


def test_a_measurement_that_takes_longer_than_its_forecast_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, monitor = tiny_model(), Monitor(D, tmp_path, every=1, tokens_per_step=10**9)
    for step in range(5):  # and nothing else is done
        monitor(model, step)
    monitor.close()
    assert caplog.text.count("Measuring takes") == 1
    cost = ScanFolder.open(str(tmp_path)).manifest["cost"]
    assert cost["forecast_share"] < 0.01 < cost["share"]


def test_callbacks_are_an_attribute_of_the_package() -> None:
    assert ke_ray.callbacks.Monitor is Monitor
    assert issubclass(ConfigError, KeRayError)
