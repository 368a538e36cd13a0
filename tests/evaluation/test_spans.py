"""Span scores equal a plain loop over single sequences, for every architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny_decoders import TINY, TINY_MIXTURES

from ke_ray.data.probes import Probe
from ke_ray.errors import DataError
from ke_ray.evaluation.prefix_tree import Span
from ke_ray.evaluation.probes import score_probes
from ke_ray.evaluation.spans import _can_share, score_spans
from ke_ray.models.architectures import supported_model_types

Build = Callable[..., Any]
VOCAB = 97


def make_spans(seed: int = 0) -> list[Span]:
    """Groups with common contexts, a pair with a common long prefix, lone ones, and duplicates."""
    rng = np.random.default_rng(seed)

    def ids(count: int) -> list[int]:
        return [int(token) for token in rng.integers(3, VOCAB, count)]

    spans = []
    for _ in range(4):
        context = ids(int(rng.integers(3, 20)))
        spans += [Span(context, ids(int(rng.integers(1, 6)))) for _ in range(4)]
    stem = ids(12)
    spans += [Span([*stem, *ids(2)], ids(3)), Span([*stem, *ids(1)], ids(3))]
    spans += [Span(ids(int(rng.integers(1, 30))), ids(int(rng.integers(1, 4)))) for _ in range(8)]
    spans += [spans[0], spans[5]]
    return spans


@torch.no_grad()
def one_at_a_time(model: Any, spans: list[Span]) -> list[list[float]]:
    """ℓ of each target token from the equation: a pass a span, softmax in float64."""
    result = []
    for span in spans:
        ids = torch.tensor([[*span.context_ids, *span.target_ids]])
        logits = model(ids).logits[0].double()
        start = len(span.context_ids)
        result.append(
            [
                float(torch.log_softmax(logits[start + j - 1], 0)[token])
                for j, token in enumerate(span.target_ids)
            ]
        )
    return result


# Layers that mix tokens in their order, ALiBi, or modelling code without positions and masks.
SEPARATE = {
    *("falcon_h1", "lfm2", "qwen3_next", "qwen3_5_text", "olmo_hybrid", "nemotron_h"),
    *("bloom", "mpt", "falcon", "gpt_neo", "gptj"),
}


@pytest.mark.parametrize("model_type", supported_model_types())
def test_scores_equal_one_at_a_time_for_every_architecture(
    tiny_decoder: Build, model_type: str
) -> None:
    config = (TINY | TINY_MIXTURES)[model_type]
    windows = {key: 64 for key in ("sliding_window", "window_size") if key in config}
    model = tiny_decoder(model_type, **windows)
    spans = make_spans()
    assert _can_share(model, 30) is (model_type not in SEPARATE)
    expected = one_at_a_time(model, spans)
    scores = score_spans(model, spans, batch_tokens=100)
    tokens = np.concatenate(expected)
    np.testing.assert_allclose(scores.token_logprobs, tokens, atol=1e-5)
    np.testing.assert_allclose(scores.logprob_summed, [sum(e) for e in expected], atol=1e-5)
    assert scores.num_target_tokens.tolist() == [len(e) for e in expected]
    # The scores mean something: they differ between spans by far more than the tolerance.
    assert np.std(tokens) > 0.05


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("batch_tokens", [1, 64, 100_000])
def test_batching_and_sharing_change_nothing(
    tiny_model: Build, attention: str, share: bool, batch_tokens: int
) -> None:
    model = tiny_model("olmo", attention=attention)
    spans = make_spans(1)
    scores = score_spans(model, spans, batch_tokens=batch_tokens, share_prefixes=share)
    expected = [sum(values) for values in one_at_a_time(model, spans)]
    np.testing.assert_allclose(scores.logprob_summed, expected, atol=1e-5)


def test_order_of_spans_changes_nothing(tiny_model: Build) -> None:
    model = tiny_model("gpt_neox")
    spans = make_spans(2)
    order = np.random.default_rng(0).permutation(len(spans))
    straight = score_spans(model, spans)
    shuffled = score_spans(model, [spans[i] for i in order])
    np.testing.assert_allclose(shuffled.logprob_summed, straight.logprob_summed[order], atol=1e-5)


def test_greedy_marks_spans_the_model_would_write_itself(tiny_model: Build) -> None:
    model = tiny_model("olmo")
    context = [5, 6, 7]
    ids = torch.tensor([context])
    for _ in range(4):
        best = model(ids).logits[0, -1].argmax().reshape(1, 1)
        ids = torch.cat([ids, best], dim=1)
    target = ids[0, 3:].tolist()
    wrong = [*target[:-1], (target[-1] + 1) % VOCAB]
    scores = score_spans(model, [Span(context, wrong), Span(context, target)])
    assert scores.is_greedy.tolist() == [False, True]


def test_soft_capped_logits_are_capped(tiny_model: Build) -> None:
    model = tiny_model("gemma2", final_logit_softcapping=0.5)
    spans = make_spans(3)
    expected = [sum(values) for values in one_at_a_time(model, spans)]
    np.testing.assert_allclose(score_spans(model, spans).logprob_summed, expected, atol=1e-5)


def test_sequences_beyond_a_sliding_window_are_not_shared_and_right(tiny_model: Build) -> None:
    model = tiny_model("mistral", sliding_window=8)
    spans = make_spans(4)
    assert not _can_share(model, 9)
    expected = [sum(values) for values in one_at_a_time(model, spans)]
    np.testing.assert_allclose(score_spans(model, spans).logprob_summed, expected, atol=1e-5)


def test_an_architecture_outside_the_table_is_scored_without_sharing(tiny_model: Build) -> None:
    model = tiny_model("persimmon")
    spans = make_spans(5)
    assert not _can_share(model, 9)
    expected = [sum(values) for values in one_at_a_time(model, spans)]
    np.testing.assert_allclose(score_spans(model, spans).logprob_summed, expected, atol=1e-5)


def test_the_models_mode_and_hooks_are_put_back(tiny_model: Build) -> None:
    model = tiny_model("olmo").train()
    state = torch.get_rng_state()
    first = score_spans(model, make_spans())
    assert model.training
    assert not model.get_output_embeddings()._forward_pre_hooks
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(p.grad is not None for p in model.parameters())
    second = score_spans(model.eval(), make_spans())
    assert (first.logprob_summed == second.logprob_summed).all()


@pytest.mark.parametrize("how", ["in place", "wrapped", "layers"])
def test_compiled_models_are_scored_by_their_own_code(tiny_model: Build, how: str) -> None:
    model, spans = tiny_model("olmo"), make_spans()
    expected = score_spans(model, spans).logprob_summed
    if how == "in place":
        model.compile(backend="eager")
    elif how == "wrapped":
        model = torch.compile(model, backend="eager")
    else:
        for layer in model.model.layers:
            layer.compile(backend="eager")
    with torch.no_grad():
        model(torch.ones((2, 7), dtype=torch.int64))  # what training would have compiled
    np.testing.assert_allclose(score_spans(model, spans).logprob_summed, expected, atol=1e-6)


def test_bad_spans_are_one_clear_message(tiny_model: Build) -> None:
    model = tiny_model("olmo")
    for span, message in [
        (Span([], [1]), "at least one context"),
        (Span([1], []), "at least one context"),
        (Span([1] * 64, [1, 2]), "65 tokens, and the model takes 64"),
        (Span([VOCAB], [1]), "the model has 97 embeddings"),
    ]:
        with pytest.raises(DataError, match=message):
            score_spans(model, [span])
    assert score_spans(model, [Span([1] * 64, [1])]).num_target_tokens.tolist() == [1]
    assert score_spans(model, []).logprob_summed.shape == (0,)


def make_probes() -> list[Probe]:
    levels = ("memorization", "semantic", "compositional")
    spans = make_spans(6)
    return [
        Probe(
            "paraphrase" if i % 2 else "once", i // 6, levels[i % 3], i % 5,
            tuple(span.context_ids), tuple(span.target_ids),
        )
        for i, span in enumerate(spans)
    ]  # fmt: skip


def test_probes_are_grouped_by_level_setting_and_paragraph(tiny_model: Build) -> None:
    model, probes = tiny_model("olmo"), make_probes()
    scores = score_probes(model, probes)
    raw = one_at_a_time(model, [Span(p.context_ids, p.target_ids) for p in probes])
    per_token = np.array([np.mean(values) for values in raw])
    np.testing.assert_allclose(scores.logprob_per_token, per_token, atol=1e-5)
    rows = {(row["setting"], row["level"]): row for row in scores.by_level()}
    assert len(rows) == 6
    for (setting, level), row in rows.items():
        members = [i for i, p in enumerate(probes) if (p.setting, p.level) == (setting, level)]
        assert row["num_probes"] == len(members)
        assert row["logprob_per_token"] == pytest.approx(per_token[members].mean(), abs=1e-5)
        summed = np.mean([sum(raw[i]) for i in members])
        assert row["logprob_summed"] == pytest.approx(summed, abs=1e-5)
    labels, values = scores.paragraphs()
    for label, value in zip(labels, values, strict=True):
        members = [i for i, p in enumerate(probes) if (p.setting, p.instance) == label]
        assert value == pytest.approx(per_token[members].mean(), abs=1e-5)
    items = scores.items()
    assert [item["num_target_tokens"] for item in items] == [len(p.target_ids) for p in probes]
    assert [item["logprob_summed"] for item in items] == scores.logprob_summed.tolist()


def test_a_probe_longer_than_the_model_is_named(tiny_model: Build) -> None:
    probe = Probe("once", 3, "semantic", 1, (5,) * 70, (1,))
    with pytest.raises(DataError, match=r"probe 1 \(semantic\) of once fact 3 has 70 tokens"):
        score_probes(tiny_model("olmo"), [probe])
    with pytest.raises(DataError, match="no probes"):
        score_probes(tiny_model("olmo"), [])


@pytest.mark.gpu
def test_scores_on_a_gpu_equal_the_cpus(tiny_model: Build) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model, spans = tiny_model("olmo"), make_spans()
    expected = score_spans(model, spans)
    scores = score_spans(model.cuda(), spans)
    np.testing.assert_allclose(scores.token_logprobs, expected.token_logprobs, atol=1e-3)
    assert (scores.is_greedy == expected.is_greedy).all()
