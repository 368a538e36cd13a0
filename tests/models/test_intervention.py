"""Measures by intervention: against loops from the equation, and what they leave behind."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from ke_ray.core import measures
from ke_ray.core.intervention import is_chosen, noise_stream
from ke_ray.core.measures import evaluate
from ke_ray.errors import UnsupportedArchitectureError, UserError
from ke_ray.models.layout import describe
from ke_ray.models.scoring import mean_usage, score_instances, score_model

NOISE = ("sensitivity_all_0.1", "sensitivity_ffn_0.1", "sensitivity_attention_0.1")
MASKS = ("masking_least_0.1", "masking_most_0.1")


def rows(number: int = 6) -> tuple[torch.Tensor, list[int]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (number, 11), generator=generator)
    return ids, torch.randint(2, 12, (number,), generator=generator).tolist()


def loss(model: Any, ids: torch.Tensor, lengths: list[int]) -> float:
    """Nats per predicted token, one instance after the other."""
    total, count = 0.0, 0
    with torch.no_grad():
        for row, length in zip(ids, lengths, strict=True):
            logits = model(row[None, :length], use_cache=False).logits[0, :-1].double()
            total -= float(logits.log_softmax(-1).gather(1, row[1:length, None]).sum())
            count += length - 1
    return total / count


def noisy(model: Any, gamma: float, seed: int, parts: tuple[str, ...]) -> Any:
    """θ + γ σ_W ε, a tensor at a time, by the names that Llama gives its tensors."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in changed.named_parameters():
            if any(part in name for part in parts):
                draws = noise_stream(seed, name).standard_normal(weight.numel(), dtype=np.float32)
                sigma = weight.std(correction=0)
                weight += gamma * sigma * torch.from_numpy(draws).double().view_as(weight)
    return changed


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("all", ("",)),
        ("ffn", (".mlp.",)),
        ("attention", (".self_attn.",)),
        ("embeddings", ("embed_tokens", "lm_head")),
    ],
)
def test_sensitivity_is_the_mean_rise_of_the_loss_over_draws(tiny_decoder, part, names):
    model, (ids, lengths) = tiny_decoder("llama").double(), rows()
    mask = torch.arange(11) < torch.tensor(lengths)[:, None]
    name = f"sensitivity_{part}_0.1"
    got = score_model(model, ids, mask, measures=[name, "loss"], batch_size=4, noise_seeds=3)
    own = loss(model, ids, lengths)
    rises = [loss(noisy(model, 0.1, seed, names), ids, lengths) - own for seed in range(3)]
    assert np.std(rises) > 0
    assert got.row(name).value == pytest.approx(np.mean(rises), rel=1e-9, abs=1e-12)
    assert got.row("loss").value == pytest.approx(own, rel=1e-6)
    assert got.row(name).stderr > 0


@pytest.mark.parametrize("end", ["least", "most"])
def test_masking_is_the_rise_of_the_loss_without_those_memories(tiny_decoder, end):
    model, (ids, lengths) = tiny_decoder("llama").double(), rows()
    mask = torch.arange(11) < torch.tensor(lengths)[:, None]
    name = f"masking_{end}_0.1"
    got = score_model(model, ids, mask, measures=[name])
    usage = mean_usage(model, ids, lengths, num_instances=6, batch_size=2)
    own, changed = loss(model, ids, lengths), copy.deepcopy(model)
    with torch.no_grad():
        for layer, mean in zip(describe(changed), usage, strict=True):
            order = sorted(range(len(mean)), key=lambda i, m=mean: float(m[i]))
            number = round(0.1 * len(mean))
            gone = order[:number] if end == "least" else order[-number:]
            layer.second_projection.weight[:, gone] = 0
    rise = loss(changed, ids, lengths) - own
    assert rise != 0
    assert got.row(name).value == pytest.approx(rise, rel=1e-9, abs=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_noise_is_exactly_no_rise_and_weights_are_restored_to_the_bit(tiny_decoder, dtype):
    model, (ids, _) = tiny_decoder("olmo").to(dtype), rows()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    got = score_model(model, ids, measures=["sensitivity_all_0", *NOISE, *MASKS])
    assert got.row("sensitivity_all_0").value == 0.0
    assert all(abs(got.row(name).value) > 0 for name in NOISE)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name


@pytest.mark.parametrize("training", [False, True])
def test_autocast_sees_the_changed_weights_and_then_the_restored_ones(tiny_decoder, training):
    model, (ids, _) = tiny_decoder("olmo").train(training), rows()
    with torch.autocast("cpu", torch.bfloat16):
        before = score_model(model, ids, measures=["loss"]).row("loss").value
        rise = score_model(model, ids, measures=["sensitivity_all_0.5"])
        assert abs(rise.row("sensitivity_all_0.5").value) > 1e-3
        assert score_model(model, ids, measures=["loss"]).row("loss").value == before
        if training:  # with none of the pass's tensors
            model(input_ids=ids, labels=ids).loss.backward()
            assert all(p.grad is not None for p in model.parameters())


def test_weights_are_restored_where_a_pass_fails(tiny_decoder, monkeypatch):
    model, (ids, _) = tiny_decoder("olmo"), rows()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ran = []

    def fail(*_: Any) -> None:
        ran.append(not torch.equal(model.lm_head.weight, before["lm_head.weight"]))
        if ran[-1]:
            raise MemoryError("no room for a batch")

    hook = model.model.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        score_model(model, ids, measures=["sensitivity_all_0.1"])
    hook.remove()
    assert ran[-1]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_any_split_and_batch_gives_the_same_on_the_chosen_instances(tiny_decoder):
    model, (ids, lengths) = tiny_decoder("olmo").double(), rows(20)
    names = ["knowledge_entropy", *NOISE, *MASKS]
    keys: dict[str, Any] = {"measures": names, "num_instances": 20, "noise_seeds": 2}
    keys["intervention_instances"] = 7
    whole = evaluate(score_instances(model, ids, lengths, batch_size=20, **keys), names)
    usage = mean_usage(model, ids, lengths, num_instances=7, batch_size=3)
    parts = [
        score_instances(
            model, ids[a:b], lengths[a:b], first_instance=a, batch_size=3, usage=usage, **keys
        )
        for a, b in ((9, 20), (0, 1), (1, 9))
    ]
    merged = type(parts[0]).from_tensors(parts[0].to_tensors())
    for part in parts[1:]:
        merged.merge_tensors(part.to_tensors())
    split = evaluate(merged, names)
    for row in whole.rows:
        other = split.row(row.measure, row.layer)
        assert other.value == pytest.approx(row.value, rel=1e-7, abs=1e-12)
        assert other.stderr == pytest.approx(row.stderr, rel=1e-6, abs=1e-12)
    chosen = [i for i in range(20) if is_chosen(i, 7, 20)]
    assert len(chosen) == 7
    alone = score_model(
        model,
        ids[chosen],
        torch.arange(11) < torch.tensor(lengths)[chosen][:, None],
        measures=NOISE,
        noise_seeds=2,
    )
    for name in NOISE:
        assert whole.row(name).value == pytest.approx(alone.row(name).value, rel=1e-9)


def test_a_piece_without_a_chosen_instance_draws_no_noise(tiny_decoder, monkeypatch):
    model, (ids, lengths) = tiny_decoder("olmo"), rows(20)
    assert not is_chosen(0, 7, 20)
    drawn = []
    monkeypatch.setattr("ke_ray.models.intervention.add_noise", lambda *_, **__: drawn.append(1))

    def score(first: int, stop: int) -> Any:
        return score_instances(
            model,
            ids[first:stop],
            lengths[first:stop],
            measures=["sensitivity_all_0.1"],
            num_instances=20,
            first_instance=first,
            intervention_instances=7,
            noise_seeds=1,
        )

    sums = score(0, 1)
    assert drawn == []
    sums.merge_tensors(score(1, 20).to_tensors())
    assert drawn
    assert evaluate(sums, ["sensitivity_all_0.1"]).is_finite()


def test_checkpoints_are_moved_in_the_same_directions(tiny_decoder):
    """Differences between checkpoints vary less from draw to draw than their values do."""
    one, ids = tiny_decoder("olmo").double(), rows(12)[0]
    other = copy.deepcopy(one)
    with torch.no_grad():
        for weight in other.parameters():
            weight *= 1.0 + 1e-3 * torch.randn_like(weight)

    def value(model: Any, num_seeds: int) -> float:
        name = "sensitivity_all_0.3"
        return score_model(model, ids, measures=[name], noise_seeds=num_seeds).row(name).value

    single = [(value(one, n), value(other, n)) for n in (1, 2)]
    spread = abs(single[1][0] - single[0][0])
    spread_of_difference = abs((single[1][1] - single[1][0]) - (single[0][1] - single[0][0]))
    assert spread_of_difference < spread / 10


def test_a_trained_model_loses_more_by_more_noise_and_by_its_most_used_memories(tiny_decoder):
    torch.manual_seed(0)
    model = tiny_decoder("llama").train()
    ids = (torch.arange(12)[None] * torch.arange(1, 9)[:, None] + torch.arange(8)[:, None]) % 90 + 3
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    names = [f"sensitivity_all_{gamma}" for gamma in (0.02, 0.1, 0.5)]
    names += ["masking_least_0.2", "masking_most_0.2"]
    got = score_model(model, ids, measures=names)
    small, middle, large, least, most = (got.row(name).value for name in names)
    assert 0 < small < middle < large
    assert most > 5 * abs(least)


def test_a_mixture_of_experts_is_noisy_and_has_no_masks(tiny_decoder):
    model, (ids, _) = tiny_decoder("olmoe"), rows()
    assert score_model(model, ids, measures=["sensitivity_ffn_0.1"]).is_finite()
    with pytest.raises(UnsupportedArchitectureError, match=r"masking_most_0\.1.*expert"):
        score_model(model, ids, measures=["masking_most_0.1"])


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("sensitivity_all_0.010", "trailing zeros"),
        ("sensitivity_ffn_-1", "from 0 to 10"),
        ("sensitivity_ffn_", "sensitivity_ffn_0.01"),
        ("masking_most_1", "below 1"),
        ("masking_least_0", "above 0"),
        ("sensitivity_heads_0.1", "unknown measure"),
    ],
)
def test_a_name_that_says_no_intervention_is_refused(name, remedy):
    with pytest.raises(UserError, match=remedy):
        measures.check_measures([name])
