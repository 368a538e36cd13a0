"""Measures with sums of their own: taps of the pass against loops over its hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from ke_ray.core import measures, sums
from ke_ray.core.measure import Measure
from ke_ray.core.measures import evaluate, register
from ke_ray.core.sums import Sum
from ke_ray.errors import UserError
from ke_ray.models.layout import describe
from ke_ray.models.scoring import score_instances, score_model


@pytest.fixture(autouse=True)
def _own_measures_end_with_the_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(measures, "MEASURES", dict(measures.MEASURES))
    own = dict(sums.SUMS)
    yield
    sums.SUMS.clear()
    sums.SUMS.update(own)


def measure(name: str, needs: Any, values: Callable[..., Any], total: str = "mean") -> Measure:
    own = Measure(
        name=name, title=name, doc=name, unit="x", needs=needs, values=values, total=total
    )
    register(own)
    return own


def spread() -> Measure:
    """How much a memory's coefficient varies between tokens: a sum of squares beside C̄."""
    squares = Sum(
        name="squares",
        tap="coefficients",
        of_instance=lambda rows: rows.square_().mean(dim=0),
        axes=("d_mlp",),
    )
    return measure(
        "spread",
        ("coefficients", squares),
        lambda mean, square: (square - mean**2).clamp_min(0).sqrt().sum(-1) / mean.sum(-1),
    )


def rows() -> tuple[torch.Tensor, list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 97, (5, 11), generator=generator), [11, 7, 1, 4, 9]


def seen(model: Any, ids: torch.Tensor, lengths: list[int], layer: int) -> list[torch.Tensor]:
    """Coefficients [T_n, d_mlp] of every instance, each run alone."""
    found: list[torch.Tensor] = []
    hook = describe(model)[layer].second_projection.register_forward_pre_hook(
        lambda _m, inputs: found.append(
            inputs[0].detach().reshape(-1, inputs[0].shape[-1]).double()
        )
    )
    with torch.no_grad():
        for row, length in zip(ids, lengths, strict=True):
            model(row[None, :length], use_cache=False)
    hook.remove()
    return found


@pytest.mark.parametrize("model_type", ["olmo", "gemma3n_text", "opt"])
def test_a_sum_over_coefficients_is_that_of_the_loop(tiny_decoder, model_type):
    model, (ids, lengths) = tiny_decoder(model_type), rows()
    spread()
    mask = torch.arange(11) < torch.tensor(lengths)[:, None]
    got = score_model(model, ids, mask, measures=["spread"], batch_size=3)
    values = []
    for layer in range(len(describe(model))):
        c = seen(model, ids, lengths, layer)
        mean = torch.stack([own.abs().mean(dim=0) for own in c]).mean(dim=0)
        square = torch.stack([own.square().mean(dim=0) for own in c]).mean(dim=0)
        values.append(float((square - mean**2).sqrt().sum() / mean.sum()))
        assert got.row("spread", layer).value == pytest.approx(values[-1], rel=1e-5)
        assert got.row("spread", layer).stderr > 0
    assert got.row("spread").value == pytest.approx(sum(values) / len(values), rel=1e-5)
    assert got.row("spread").unit == "x"


def test_what_a_sum_does_to_its_rows_changes_no_other_measure(tiny_decoder):
    model, (ids, _) = tiny_decoder("olmo"), rows()
    alone = score_model(model, ids, measures=["knowledge_entropy", "loss"])
    spread()
    beside = score_model(model, ids, measures=["knowledge_entropy", "loss", "spread"])
    for row in alone.rows:
        assert beside.row(row.measure, row.layer).value == row.value


def test_a_sum_over_final_hidden_states_is_that_of_the_loop(tiny_decoder):
    model, (ids, lengths) = tiny_decoder("olmo"), rows()
    length = Sum(name="lengths", tap="hidden", of_instance=lambda h: h.norm(dim=1).mean())
    measure("hidden_norm", length, lambda mean: mean, total="only")
    mask = torch.arange(11) < torch.tensor(lengths)[:, None]
    got = score_model(model, ids, mask, measures=["hidden_norm", "knowledge_entropy"], batch_size=2)
    with torch.no_grad():
        norms = [
            model.base_model(ids[n : n + 1, :t]).last_hidden_state[0].norm(dim=1).mean()
            for n, t in enumerate(lengths)
        ]
    assert got.row("hidden_norm").value == pytest.approx(float(torch.stack(norms).mean()), rel=1e-5)
    assert got.row("hidden_norm").stderr > 0


def test_geometry_of_hidden_states_is_that_of_all_tokens_however_they_are_split(tiny_decoder):
    model, (ids, lengths) = tiny_decoder("olmo"), rows()
    names = ["rank_me", "alpha_req", "knowledge_entropy"]

    def part(first: int, stop: int) -> Any:
        own = score_instances(
            model,
            ids[first:stop],
            lengths[first:stop],
            measures=names,
            num_instances=5,
            first_instance=first,
            batch_size=2,
        )
        return type(own).from_tensors(own.to_tensors())

    got = evaluate(part(3, 5).merge(part(0, 1)).merge_tensors(part(1, 3).to_tensors()), names)
    with torch.no_grad():
        tokens = [model.base_model(ids[n : n + 1, :t])[0][0] for n, t in enumerate(lengths)]
    x = torch.cat(tokens).double().numpy()
    p = np.linalg.svd(x, compute_uv=False)
    p = p / p.sum()
    assert got.row("rank_me").value == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)
    assert np.isnan(got.row("rank_me").stderr)
    assert (None, "rank_me") not in got.replicates
    values = np.linalg.svd(x - x.mean(axis=0), compute_uv=False) ** 2
    ranks = np.arange(4, 16)  # of 31 that are not zero
    slope = np.polyfit(np.log(ranks), np.log(values[ranks - 1]), 1)[0]
    assert got.row("alpha_req").value == pytest.approx(-slope, rel=1e-3)


def test_geometry_behind_a_layer_is_that_of_its_residual_stream(tiny_decoder):
    model, (ids, lengths) = tiny_decoder("olmo", num_hidden_layers=3), rows()
    mask = torch.arange(11) < torch.tensor(lengths)[:, None]
    names = ["rank_me_layer_0", "rank_me_layer_1", "alpha_req_layer_1", "rank_me"]
    got = score_model(model, ids, mask, measures=names, batch_size=2)
    seen: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    handles = [
        model.model.layers[layer].register_forward_hook(
            lambda _module, _inputs, output, layer=layer: seen[layer].append(output)
        )
        for layer in seen
    ]
    with torch.no_grad():
        for n, t in enumerate(lengths):
            model.base_model(ids[n : n + 1, :t])
    for handle in handles:
        handle.remove()
    for layer, parts in seen.items():
        x = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]).double().numpy()
        p = np.linalg.svd(x, compute_uv=False)
        p = p / p.sum()
        expected = np.exp(-(p * np.log(p)).sum())
        assert got.row(f"rank_me_layer_{layer}").value == pytest.approx(expected, rel=1e-4)
    assert got.row("rank_me").value != got.row("rank_me_layer_1").value
    assert np.isfinite(got.row("alpha_req_layer_1").value)
    with pytest.raises(UserError, match="behind layer 2 .* 3 layers; expected a layer from 0 to 1"):
        score_model(model, ids, mask, measures="rank_me_layer_2")
    with pytest.raises(UserError, match="unknown measure 'rank_me_layer_01'"):
        score_model(model, ids, mask, measures="rank_me_layer_01")


def test_a_mixture_of_experts_has_no_rows_of_coefficients_and_says_so(tiny_decoder):
    model, (ids, _) = tiny_decoder("deepseek_v3"), rows()
    spread()
    got = score_model(model, ids, measures=["spread", "rank_me"])
    assert got.row("spread", 0).value > 0  # its first layer is dense
    assert "expert by expert" in got.row("spread", 1).reason
    assert got.row("spread").value == got.row("spread", 0).value
    assert got.is_finite()
    alone = score_model(tiny_decoder("olmoe"), ids, measures=["spread"])
    assert "expert by expert" in alone.row("spread").reason


def test_a_sum_of_the_wrong_shape_is_named(tiny_decoder):
    model, (ids, _) = tiny_decoder("olmo"), rows()
    wrong = Sum(name="wrong", tap="coefficients", of_instance=lambda c: c.mean(), axes=("d_mlp",))
    measure("wrong_one", wrong, lambda mean: mean.sum(-1))
    with pytest.raises(UserError, match=r"sum 'wrong'.*shape \(\) at layer 0; expected \(48,\)"):
        score_model(model, ids, measures=["wrong_one"])


def test_the_pass_ends_where_a_sum_over_coefficients_has_been_seen(tiny_decoder):
    model, (ids, _) = tiny_decoder("olmo"), rows()
    spread()
    ran: list[str] = []
    last = describe(model)[-1].second_projection
    last.register_forward_hook(lambda *_a: ran.append("second"))
    score_model(model, ids, measures=["spread"])
    assert ran == []
    score_model(model, ids, measures=["rank_me"])
    assert ran == ["second"] * 2


def test_a_measure_of_the_number_of_predictions_alone_counts_them(tiny_decoder) -> None:
    measure("predicted", ("predictions",), lambda mean: mean, total="only")
    ids, lengths = rows()
    sums_ = score_instances(
        tiny_decoder("llama"), ids, lengths, measures=("predicted",), num_instances=len(ids)
    )
    expected = sum(length - 1 for length in lengths) / len(lengths)
    assert float(sums_.mean("predictions")) == pytest.approx(expected)


def test_axes_that_the_tap_does_not_have_are_refused() -> None:
    wide = Sum(name="wide", tap="coefficients", of_instance=lambda r: r, axes=("d_model",))
    with pytest.raises(UserError, match="with the tap coefficients"):
        measure("wide", (wide,), lambda mean: mean)
