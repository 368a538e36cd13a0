"""What scoring promises beyond the values: invariances, economy, and errors that say what to do."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch

from ke_ray.core.measures import MEASURES, needing_head
from ke_ray.errors import DataError, UnsupportedArchitectureError, UserError
from ke_ray.models.layout import describe
from ke_ray.models.scoring import compact, score_instances, score_model

ENTROPIES = (
    "knowledge_entropy",
    "knowledge_entropy_relu",
    "token_entropy",
    "memory_information",
    "attention_entropy",
    "next_token_entropy",
    "loss",
)


def instances(n=10, width=14, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (n, width), generator=generator)
    lengths = torch.randint(1, width + 1, (n,), generator=generator)
    lengths[0] = width
    return ids, lengths


def same(left, right, tolerance=1e-6):
    assert len(left.rows) == len(right.rows)
    for a, b in zip(left.rows, right.rows, strict=True):
        assert (a.layer, a.measure) == (b.layer, b.measure)
        assert a.value == pytest.approx(b.value, abs=tolerance)
    assert left.replicates.keys() == right.replicates.keys()
    for key, values in left.replicates.items():
        np.testing.assert_allclose(values, right.replicates[key], atol=tolerance)


@pytest.mark.parametrize("model_type", ["olmo", "gemma2", "gpt2", "mistral"])
def test_batch_size_and_padding_side_change_nothing(tiny_decoder, model_type):
    model = tiny_decoder(model_type)
    ids, lengths = instances()
    right = (torch.arange(14)[None] < lengths[:, None]).long()
    reference = score_model(model, ids, right, measures=ENTROPIES, batch_size=1)
    for batch_size in (3, 10, 64):
        same(reference, score_model(model, ids, right, measures=ENTROPIES, batch_size=batch_size))
    left_ids, left = torch.zeros_like(ids), torch.zeros_like(ids)
    holes_ids, holes = torch.full((10, 20), -1), torch.zeros(10, 20)
    generator = torch.Generator().manual_seed(4)
    for n, length in enumerate(lengths.tolist()):
        left_ids[n, 14 - length :] = ids[n, :length]
        left[n, 14 - length :] = 1
        where = torch.randperm(20, generator=generator)[:length].sort().values
        holes_ids[n, where] = ids[n, :length]
        holes[n, where] = 1
    same(reference, score_model(model, left_ids, left, measures=ENTROPIES, batch_size=4))
    same(reference, score_model(model, holes_ids, holes, measures=ENTROPIES, batch_size=4))


def test_what_stands_in_the_padding_does_not_matter(tiny_decoder):
    model = tiny_decoder("olmo")
    ids, lengths = instances()
    real = torch.arange(14)[None] < lengths[:, None]
    reference = score_model(model, ids, real, measures=ENTROPIES)
    for filler in (0, 96, -100, 10**6):
        same(reference, score_model(model, ids.where(real, filler), real, measures=ENTROPIES), 0.0)


def test_any_split_merged_in_any_order_gives_the_same(tiny_decoder):
    model = tiny_decoder("olmo")
    ids, lengths = instances(n=70)
    whole = score_instances(model, ids, lengths, measures=ENTROPIES, num_instances=70, batch_size=7)
    assert whole.is_complete()
    assert whole.total_tokens == int(lengths.sum())
    parts = [
        score_instances(
            model,
            ids[a:b].to(torch.int32).numpy(),
            lengths[a:b].numpy(),
            measures=ENTROPIES,
            num_instances=70,
            first_instance=a,
            batch_size=4,
        )
        for a, b in ((31, 70), (0, 5), (5, 31))
    ]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    assert merged.counts.tolist() == whole.counts.tolist()
    assert merged.num_tokens.tolist() == whole.num_tokens.tolist()
    for name, table in whole.tables.items():
        torch.testing.assert_close(merged.tables[name], table, atol=1e-5, rtol=1e-5)


def test_order_of_instances_does_not_matter(tiny_decoder):
    model = tiny_decoder("olmo")
    ids, lengths = instances()
    real = torch.arange(14)[None] < lengths[:, None]
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    forward = score_model(model, ids, real, measures=ENTROPIES)
    shuffled = score_model(model, ids[order], real[order], measures=ENTROPIES)
    for row in forward.rows:
        assert row.value == pytest.approx(shuffled.row(row.measure, row.layer).value, abs=1e-6)


@pytest.mark.parametrize("model_type", ["olmo", "phi3", "gpt_neox"])
def test_the_pass_ends_when_everything_asked_for_was_seen(tiny_decoder, model_type):
    model = tiny_decoder(model_type)
    last = describe(model)[-1]
    ran: list[str] = []
    for name, module in (
        ("attention", last.attention),
        ("up", last.up),
        ("second", last.second_projection),
        ("head", model.get_output_embeddings()),
    ):
        module.register_forward_hook(lambda *_a, name=name: ran.append(name))
    ids, lengths = instances(n=2)

    def score(*measures):
        ran.clear()
        score_instances(model, ids, lengths, measures=measures, num_instances=2)
        return set(ran)

    assert score("attention_entropy") == set()
    assert score("knowledge_entropy") == {"attention", "up"}
    assert score("token_entropy") == {"attention", "up"}
    assert score("gini", "attention_entropy") == {"attention", "up"}
    assert score("knowledge_entropy_relu") <= {"attention", "up"}
    assert score("next_token_entropy") == {"attention", "up", "second", "head"}


def test_only_the_sums_that_are_needed_are_kept(tiny_decoder):
    model = tiny_decoder("olmo")
    ids, lengths = instances(n=2)
    for name, measure in MEASURES.items():
        sums = score_instances(model, ids, lengths, measures=[name], num_instances=2)
        assert set(sums.tables) == set(measure.tables)


def test_measuring_more_changes_neither_the_forward_pass_nor_the_values(tiny_decoder):
    model = tiny_decoder("llama")
    ids, _ = instances(n=3)
    together = score_model(model, ids, measures=ENTROPIES)
    for measure in ENTROPIES:
        alone = score_model(model, ids, measures=[measure])
        for row in alone.rows:
            assert together.row(measure, row.layer).value == pytest.approx(row.value, abs=1e-6)


def test_the_model_is_left_as_it_was(tiny_decoder):
    for model_type in ("olmo", "gemma2"):
        model = tiny_decoder(model_type).train()
        implementation = model.config._attn_implementation
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        ids, _ = instances(n=2)
        score_model(model, ids, measures=ENTROPIES)
        ids[0, 0] = 5
        with pytest.raises(RuntimeError, match="stop here"):
            score_instances(
                model,
                ids,
                measures=ENTROPIES,
                num_instances=2,
                on_batch=lambda _n: (_ for _ in ()).throw(RuntimeError("stop here")),
            )
        assert model.training
        assert model.config._attn_implementation == implementation
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert not any("_ke_ray" in key for m in model.modules() for key in vars(m))
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, weights[name])


def test_activations_are_gone_when_the_next_layer_runs(tiny_decoder):
    model = tiny_decoder("olmo", num_hidden_layers=4)
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def watch(_module, args):
        nonlocal most
        alive.append(weakref.ref(args[0]))
        most = max(most, sum(ref() is not None for ref in alive))

    for layout in describe(model):
        layout.second_projection.register_forward_pre_hook(watch)
    ids, _ = instances(n=8)
    score_model(model, ids, measures=["knowledge_entropy", "knowledge_entropy_relu"], batch_size=2)
    assert len(alive) == 16
    assert most == 1


def test_progress_counts_real_tokens(tiny_decoder):
    ids, lengths = instances(n=5)
    seen: list[int] = []
    score_instances(
        tiny_decoder("olmo"),
        ids,
        lengths,
        measures=["gini"],
        num_instances=5,
        batch_size=2,
        on_batch=seen.append,
    )
    assert seen == [int(lengths[0:2].sum()), int(lengths[2:4].sum()), int(lengths[4])]


def test_compact_moves_real_tokens_to_the_front_in_order():
    ids, lengths = compact(
        np.array([[9, 8, 7, 6], [1, 2, 3, 4]]), np.array([[0, 1, 0, 1], [1] * 4])
    )
    assert lengths.tolist() == [2, 4]
    assert ids[0, :2].tolist() == [8, 6]
    assert ids[1].tolist() == [1, 2, 3, 4]


def test_a_bare_body_scores_but_predicts_nothing(tiny_decoder):
    model = tiny_decoder("olmo")
    ids, _ = instances(n=2)
    same(score_model(model, ids), score_model(model.base_model, ids), 0.0)
    with pytest.raises(UnsupportedArchitectureError, match="needs a language-model head"):
        score_model(model.base_model, ids, measures=["next_token_entropy"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda ids, mask: (ids.clone().index_fill_(1, torch.tensor([3]), 97), mask),
            "token id 97",
        ),
        (lambda ids, mask: (ids - 4, mask), "outside the model's vocabulary of 97"),
        (lambda ids, mask: (ids.repeat(1, 5), None), "70 tokens but the model has 64 positions"),
        (lambda ids, mask: (ids, torch.zeros_like(mask)), "padding only"),
        (lambda ids, mask: (ids, mask[:, :3]), "attention_mask has shape"),
        (lambda ids, mask: (ids.float(), mask), "whole numbers"),
        (lambda ids, mask: (ids[0], None), "expected whole numbers of shape"),
        (lambda ids, mask: (ids[:0], None), "at least one of each"),
    ],
)
def test_unusable_input_is_named(tiny_decoder, change, message):
    ids, lengths = instances(n=3)
    lengths[:] = 14
    mask = (torch.arange(14)[None] < lengths[:, None]).long()
    with pytest.raises(DataError, match=message):
        score_model(tiny_decoder("olmo"), *change(ids, mask))


def test_unknown_measure_and_batch_size(tiny_decoder):
    ids, _ = instances(n=3)
    with pytest.raises(UserError, match="Did you mean 'knowledge_entropy'"):
        score_model(tiny_decoder("olmo"), ids, measures=["knowledge_entrpy"])
    with pytest.raises(DataError, match="batch_size is 0"):
        score_model(tiny_decoder("olmo"), ids, batch_size=0)


def test_nan_weights_show_in_the_sums(tiny_decoder):
    model = tiny_decoder("olmo")
    with torch.no_grad():
        describe(model)[1].up_weight()[0, 0] = torch.nan
    ids, _ = instances(n=2)
    assert not score_model(model, ids).is_finite()


def test_a_model_that_shares_the_config_still_runs_while_another_is_measured(tiny_decoder):
    from transformers import AutoModelForCausalLM

    from ke_ray.models.attention import measure_attention

    model = tiny_decoder("olmo")
    other = AutoModelForCausalLM.from_config(model.config).eval()
    ids, _ = instances(n=2)
    expected = other(ids).logits
    with measure_attention(model, describe(model), lambda _layer, _entropy: None):
        torch.testing.assert_close(other(ids).logits, expected)


def test_a_base_model_has_every_measure_but_those_of_logits(tiny_decoder):
    model = tiny_decoder("olmo")
    ids, lengths = instances()
    real = torch.arange(ids.shape[1]) < lengths[:, None]
    of_logits = needing_head(tuple(MEASURES))
    assert of_logits == ("next_token_entropy", "loss", "perplexity")
    others = [name for name in MEASURES if name not in of_logits]
    same(
        score_model(model.base_model, ids, real, measures=others),
        score_model(model, ids, real, measures=others),
    )
    for name in ("next_token_entropy", "loss"):
        with pytest.raises(UnsupportedArchitectureError, match=rf"{name} needs a language-model h"):
            score_model(model.base_model, ids, measures=[name])


def test_one_measure_may_be_given_as_a_text(tiny_decoder):
    ids, _ = instances()
    scores = score_model(tiny_decoder("olmo"), ids, measures="gini")
    assert {row.measure for row in scores.rows} == {"gini"}
