"""The loop against a plain one, and its independence of workers and micro-batches."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import ArrayRows, run_workers, tiny_keys, tiny_model, tiny_rows

from ke_ray.errors import DataError, NonFiniteLossError
from ke_ray.training.batches import BatchPlan
from ke_ray.training.loop import Hooks, Progress, train


def plain_loop(num_steps: int, seed: int) -> tuple[list[float], torch.nn.Module]:
    """The recipe written out: no accumulation, no workers, nothing shared with the loop."""
    model, rows, batch_size = tiny_model(), tiny_rows(seed=seed).ids, 8
    matrices = [p for n, p in model.named_parameters() if "embed" not in n]
    others = [p for n, p in model.named_parameters() if "embed" in n]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=3e-3,
        betas=(0.9, 0.95),
        eps=1e-5,
    )
    per_epoch, warmup, losses = len(rows) // batch_size, round(0.1 * num_steps), []
    for step in range(1, num_steps + 1):
        epoch, within = divmod(step - 1, per_epoch)
        order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(len(rows))
        batch = rows[order[within * batch_size : (within + 1) * batch_size]]
        ids = torch.tensor(batch.astype(np.int64))
        if step <= warmup:
            factor = 0.1 + 0.9 * step / warmup
        else:
            angle = math.pi * (step - warmup) / (num_steps - warmup)
            factor = 0.1 + 0.9 * (1 + math.cos(angle)) / 2
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * factor
        logits = model(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 64), ids[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, model


@pytest.mark.parametrize("micro_batch_size", [None, 4, 1])
def test_fifty_steps_equal_a_plain_loop(micro_batch_size: int | None) -> None:
    expected, reference = plain_loop(50, seed=7)
    model = tiny_model()
    keys = tiny_keys(micro_batch_size=micro_batch_size)
    state = train(model, tiny_rows(seed=7), keys, num_steps=50)
    losses = [row["loss"] for row in state.records["train"]]
    assert losses == pytest.approx(expected, abs=1e-6)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert losses[-1] < losses[0] - 0.5


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    return run_workers(tmp_path_factory.mktemp("alone"), 1)


@pytest.mark.parametrize(
    ("world_size", "keys"),
    [
        (2, {"num_workers": 2}),
        (2, {"num_workers": 2, "micro_batch_size": 2, "strategy": "fsdp"}),
        pytest.param(4, {"num_workers": 4, "micro_batch_size": 1}, marks=pytest.mark.slow),
    ],
    ids=["ddp2", "fsdp2", "ddp4"],
)
def test_workers_change_nothing_beyond_rounding(
    tmp_path: Path, alone: dict[str, np.ndarray], world_size: int, keys: dict[str, object]
) -> None:
    together = run_workers(tmp_path, world_size, keys=keys)
    assert set(together) == set(alone)
    for name, expected in alone.items():
        np.testing.assert_allclose(together[name], expected, atol=2e-6, err_msg=name)


def test_sharded_workers_keep_only_their_own_gradients_between_micro_batches(
    tmp_path: Path, alone: dict[str, np.ndarray]
) -> None:
    keys = {"num_workers": 2, "micro_batch_size": 2, "strategy": "fsdp"}
    job = {"keys": keys | {"activation_checkpointing": True}, "max_logits": 5 * 64}
    together = run_workers(tmp_path, 2, watch_gradients=True, **job)
    assert together["held"].tolist() == [0, 16 * 32 // 2] * 12
    np.testing.assert_allclose(together["loss"], alone["loss"], atol=2e-6)
    np.testing.assert_allclose(together["grad_norm"], alone["grad_norm"], atol=2e-6)


@pytest.fixture(scope="module")
def mixture_alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    return run_workers(tmp_path_factory.mktemp("mixture"), 1, mixture=True, num_steps=4)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_workers_train_a_mixture_of_experts_together(
    tmp_path: Path, mixture_alone: dict[str, np.ndarray], strategy: str
) -> None:
    keys = {"num_workers": 2, "strategy": strategy}
    together = run_workers(tmp_path, 2, mixture=True, num_steps=4, keys=keys)
    assert any("experts.gate_up_proj" in name for name in together)
    for name, expected in mixture_alone.items():
        np.testing.assert_allclose(together[name], expected, atol=2e-6, err_msg=name)


def test_bfloat16_and_checkpointing_follow_the_plain_path() -> None:
    def losses(**changes: object) -> list[float]:
        state = train(tiny_model(), tiny_rows(), tiny_keys(**changes), num_steps=5)
        return [row["loss"] for row in state.records["train"]]

    plain = losses()
    assert losses(activation_checkpointing=True) == pytest.approx(plain, abs=1e-6)
    mixed = losses(precision="bfloat16")
    assert mixed == pytest.approx(plain, abs=0.02)
    assert mixed != plain


def test_every_epoch_shows_each_instance_at_most_once() -> None:
    plan = BatchPlan(tiny_rows(21, seed=5), global_batch_size=4)
    assert plan.steps_per_epoch == 5
    epochs = [
        np.concatenate([plan.instances(e * 5 + s, 0, 4) for s in range(1, 6)]) for e in range(2)
    ]
    for shown in epochs:
        assert len(set(shown.tolist())) == 20
    assert epochs[0].tolist() != epochs[1].tolist()
    whole = plan.instances(7, 0, 4)
    halves = np.concatenate([plan.instances(7, 0, 2), plan.instances(7, 2, 4)])
    assert whole.tolist() == halves.tolist()


def test_a_corpus_smaller_than_one_batch_is_refused() -> None:
    with pytest.raises(DataError, match="has 3 rows, one step takes 8"):
        train(tiny_model(), tiny_rows(3), tiny_keys(), num_steps=1)


@pytest.mark.parametrize("log_every", [1, 4])
def test_a_loss_that_is_not_finite_names_step_and_rows(log_every: int, tmp_path: Path) -> None:
    class Poison(torch.nn.Module):
        """Makes the loss of rows that hold token 63 infinite."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_model()

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
            out = self.inner(input_ids=input_ids, use_cache=use_cache)
            bad = (input_ids == 63).any(dim=1)
            out.logits = torch.where(bad[:, None, None], torch.inf, out.logits)
            return out

    ids = tiny_rows(48, sequence_length=6).ids.copy()  # too short for token 63 to come up
    assert not (ids == 63).any()
    plan = BatchPlan(ArrayRows(ids), 8)
    poisoned = plan.instances(5, 2, 4)
    ids[poisoned, 0] = 63
    uri = str(tmp_path / "states")
    keys = tiny_keys(log_every=log_every, save_every=2)
    with pytest.raises(NonFiniteLossError) as caught:
        train(Poison(), ArrayRows(ids), keys, num_steps=6, state_uri=uri)
    message = str(caught.value)
    assert "step 5" in message
    assert "global rows [2, 3]" in message
    assert str(poisoned.tolist()) in message
    assert (tmp_path / "states" / "step00000004" / "state.json").is_file()
    assert not (tmp_path / "states" / "step00000006").exists()


def test_hooks_see_the_steps_they_asked_for_and_change_the_batch() -> None:
    seen: list[tuple[int, int]] = []
    shown: list[Progress] = []
    changed: list[int] = []

    def transform(step: int, first_row: int, rows: np.ndarray) -> np.ndarray:
        changed.append(step)
        assert first_row == 0
        return np.full_like(rows, 2) if step == 3 else rows

    hooks = Hooks(
        transform=transform,
        after_step=lambda step, model, state: seen.append((step, state.step)),
        at_steps=frozenset({0, 2, 4}),
        on_progress=shown.append,
    )
    with_hook = train(tiny_model(), tiny_rows(), tiny_keys(), num_steps=4, hooks=hooks)
    without = train(tiny_model(), tiny_rows(), tiny_keys(), num_steps=4)
    assert seen == [(0, 0), (2, 2), (4, 4)]
    assert changed == [1, 2, 3, 4]
    assert [p.record.step for p in shown] == [1, 2, 3, 4]
    assert shown[-1].time_left_s == 0
    ours, plain = (
        [row["loss"] for row in state.records["train"]] for state in (with_hook, without)
    )
    assert ours[:2] == plain[:2]
    assert ours[2] != plain[2]


@pytest.mark.slow
def test_compiled_layers_follow_the_plain_path() -> None:
    plain = train(tiny_model(), tiny_rows(), tiny_keys(), num_steps=3)
    compiled = train(tiny_model(), tiny_rows(), tiny_keys(compile=True), num_steps=3)
    ours, theirs = ([row["loss"] for row in s.records["train"]] for s in (compiled, plain))
    assert ours == pytest.approx(theirs, abs=1e-4)
