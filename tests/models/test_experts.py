"""Mixtures of experts against a loop written from the definition, in float64.

The reference shares nothing with the package nor with transformers' experts: it takes the input of
the whole block, computes the router's weights and each expert's inside from the raw parameters of
the token, and adds them up one token at a time, one unpadded instance at a time.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_decoders import TINY_MIXTURES, random_decoder
from torch.utils._python_dispatch import TorchDispatchMode

from ke_ray.core.architecture import Architecture
from ke_ray.core.experts import expert_entropies, expert_masses
from ke_ray.core.measures import evaluate
from ke_ray.errors import UnsupportedArchitectureError
from ke_ray.models import architectures
from ke_ray.models.architectures import check_config, is_mixture
from ke_ray.models.explain import explain
from ke_ray.models.layout import describe
from ke_ray.models.loading import load_model
from ke_ray.models.scoring import compact, score_instances, score_model

MIXTURES = tuple(TINY_MIXTURES)
SHARED = {"qwen2_moe": 20, "deepseek_v2": 24, "deepseek_v3": 24}
DENSE_FIRST = ("qwen3_moe", "deepseek_v2", "deepseek_v3")
BY_EXPERT = ("routing_entropy", "within_expert_entropy")
BY_TOKEN = ("token_entropy", "memory_information")
MEASURES = (
    *("knowledge_entropy", "knowledge_entropy_relu", "gini", "dormant_share"),
    *(*BY_EXPERT, *BY_TOKEN),
)


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def gates(model_type: str, block: Any, config: Any, x: torch.Tensor) -> dict[int, float]:
    """Expert → weight for one token x [d_model], of the two experts it is routed to."""
    router = block.router if model_type == "gpt_oss" else block.gate
    logits = [float(row @ x) for row in router.weight]
    if model_type == "gpt_oss":
        logits = [v + float(b) for v, b in zip(logits, router.bias, strict=True)]
        best = sorted(range(4), key=lambda e: -logits[e])[:2]
        total = sum(math.exp(logits[e]) for e in best)
        return {e: math.exp(logits[e]) / total for e in best}
    if model_type == "deepseek_v3":
        scores = [1 / (1 + math.exp(-v)) for v in logits]
        choice = [s + float(b) for s, b in zip(scores, router.e_score_correction_bias, strict=True)]
        group = [0, 1] if choice[0] + choice[1] > choice[2] + choice[3] else [2, 3]
        total = sum(scores[e] for e in group)
        return {e: 1.5 * scores[e] / total for e in group}
    total = sum(math.exp(v) for v in logits)
    scores = [math.exp(v) / total for v in logits]
    if model_type == "deepseek_v2":
        group = [0, 1] if max(scores[:2]) > max(scores[2:]) else [2, 3]
        return {e: 1.5 * scores[e] for e in group}
    best = sorted(range(4), key=lambda e: -scores[e])[:2]
    total = sum(scores[e] for e in best)
    is_normalised = model_type == "mixtral" or config.norm_topk_prob
    return {e: scores[e] / (total if is_normalised else 1) for e in best}


def expert(
    model_type: str, experts: Any, e: int, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(C, ReLU variant) of expert e for one token, from raw weights."""
    relu = torch.zeros(())
    if model_type == "gpt_oss":
        both = experts.gate_up_proj[e].T @ x + experts.gate_up_proj_bias[e]
        gate = torch.minimum(both[0::2], torch.tensor(experts.limit))
        up = both[1::2].clamp(-experts.limit, experts.limit) + 1
        return gate / (1 + torch.exp(-1.702 * gate)) * up, torch.maximum(gate, relu) * up
    gate, up = (experts.gate_up_proj[e] @ x).split(12)
    return silu(gate) * up, torch.maximum(gate, relu) * up


def ffn(block: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up = block.gate_proj.weight @ x, block.up_proj.weight @ x
    return silu(gate) * up, torch.maximum(gate, torch.zeros(())) * up


def entropy(values: list[float]) -> float:
    total = sum(values)
    return -sum(v / total * math.log(v / total) for v in values if v > 0)


def brute_force(model_type: str, model: Any, rows: list[list[int]]) -> list[dict[str, Any]]:
    """Per layer: C̄ by expert, its ReLU variant, the tokens' share of each, attention entropy."""
    model = copy.deepcopy(model).double().requires_grad_(False)
    model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")
    blocks = [layer.mlp for layer in model.model.layers]
    layers: list[dict[str, Any]] = [
        {"c": {}, "relu": {}, "load": {}, "attention": 0.0, "tokens": []} for _ in blocks
    ]
    for row in rows:
        inputs: list[torch.Tensor] = []
        hooks = [
            b.register_forward_pre_hook(lambda _m, a, to=inputs: to.append(a[0].detach()[0]))
            for b in blocks
        ]
        with torch.no_grad():
            out = model(torch.tensor([row]), use_cache=False, output_attentions=True)
        for hook in hooks:
            hook.remove()
        share = 1 / (len(rows) * len(row))
        for sums, rows_of_heads in zip(layers, out.attentions, strict=True):
            p = rows_of_heads[0].double()  # [heads, T, T]
            sums["attention"] += float(torch.special.entr(p).sum()) * share / len(p)
        for block, sums, tokens in zip(blocks, layers, inputs, strict=True):
            for x in tokens:
                drawn = []  # (expert, weight, C, ReLU variant)
                if not hasattr(block, "experts"):
                    drawn = [(0, 1.0, *ffn(block, x))]
                else:
                    for e, g in gates(model_type, block, model.config, x).items():
                        drawn.append((e, g, *expert(model_type, block.experts, e, x)))
                if model_type == "qwen2_moe":
                    g = 1 / (1 + math.exp(-float(block.shared_expert_gate.weight[0] @ x)))
                    drawn.append((4, g, *ffn(block.shared_expert, x)))
                elif hasattr(block, "shared_experts"):
                    drawn.append((4, 1.0, *ffn(block.shared_experts, x)))
                values = {e: g * c.detach().abs() for e, g, c, _ in drawn}
                sums["tokens"].append((share, values))
                for e, g, c, relu in drawn:
                    for key, value in (
                        ("c", g * c.detach().abs()),
                        ("relu", g * relu.detach().abs()),
                        ("load", 1.0),
                    ):
                        sums[key][e] = sums[key].get(e, 0.0) + value * share
    return layers


def split_by_token(tokens: list[Any], vectors: Any) -> tuple[float, float]:
    """Σ w H(p) and Σ w KL(p ‖ q) over the memories of all experts, from what each token draws."""
    rows = [(share, vectors(drawn)) for share, drawn in tokens]
    total = sum(share * float(c.sum()) for share, c in rows)
    q = sum(share * c for share, c in rows) / total
    within = information = 0.0
    for share, c in rows:
        w, p = share * float(c.sum()) / total, (c / c.sum()).tolist()
        within += w * entropy(p)
        information += w * sum(a * math.log(a / b) for a, b in zip(p, q.tolist(), strict=True) if a)
    return within, information


def example() -> tuple[list[list[int]], torch.Tensor, torch.Tensor]:
    """Rows of different lengths, and the same padded on the left with a mask."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 97, (n,), generator=generator).tolist() for n in (12, 7, 1, 9)]
    ids, mask = torch.zeros(4, 12, dtype=torch.int64), torch.zeros(4, 12, dtype=torch.int64)
    for n, row in enumerate(rows):
        ids[n, 12 - len(row) :] = torch.tensor(row)
        mask[n, 12 - len(row) :] = 1
    return rows, ids, mask


@pytest.mark.parametrize("model_type", MIXTURES)
def test_measures_and_load_of_a_mixture_equal_the_definition(tiny_decoder, model_type):
    model = tiny_decoder(model_type)
    rows, ids, mask = example()
    ids, lengths = compact(ids, mask)
    measures = (*MEASURES, "attention_entropy")
    scored = score_instances(model, ids, lengths, measures=measures, num_instances=4, batch_size=3)
    got, load = evaluate(scored, measures), scored.mean("expert_load")
    for layer, sums in enumerate(brute_force(model_type, model, rows)):
        masses = [float(c.sum()) for c in sums["c"].values()]
        routing = entropy(masses)
        within = sum(float(c.sum()) / sum(masses) * entropy(c.tolist()) for c in sums["c"].values())
        sizes = [48] if layer == 0 and model_type in DENSE_FIRST else [12] * 4
        sizes += [SHARED[model_type]] if len(sizes) > 1 and model_type in SHARED else []

        def vectors(drawn: dict[int, torch.Tensor], sizes: list[int] = sizes) -> torch.Tensor:
            parts = [drawn.get(e, torch.zeros(s)) for e, s in enumerate(sizes)]
            return torch.cat([part.double() for part in parts])

        vector = vectors(sums["c"])
        of_tokens, information = split_by_token(sums["tokens"], vectors)
        relu = [v for c in sums["relu"].values() for v in c.tolist()]
        differences = (vector[:, None] - vector[None, :]).abs().sum()
        expected = {
            "knowledge_entropy": entropy(vector.tolist()),
            "knowledge_entropy_relu": entropy(relu),
            "token_entropy": of_tokens,
            "memory_information": information,
            "routing_entropy": routing,
            "within_expert_entropy": within,
            "gini": float(differences / (2 * len(vector) ** 2 * vector.mean())),
            "dormant_share": float((vector <= 0.1 * vector.mean()).double().mean()),
        }
        if model_type == "gpt_oss":
            assert "sink" in (got.row("attention_entropy", layer).reason or "")
        else:
            expected["attention_entropy"] = sums["attention"]
        assert expected["knowledge_entropy"] == pytest.approx(routing + within, abs=1e-12)
        for measure, value in expected.items():
            assert got.row(measure, layer).value == pytest.approx(value, abs=1e-5), measure
        for e, share in enumerate(load[layer].tolist()):  # share of tokens routed to e
            assert share == pytest.approx(sums["load"].get(e, 0.0), abs=1e-12)


@pytest.mark.parametrize("model_type", ["olmoe", "deepseek_v3"])
def test_batches_padding_and_shards_of_a_mixture_change_nothing(tiny_decoder, model_type):
    model = tiny_decoder(model_type)
    _, ids, mask = example()
    whole = score_model(model, ids, mask, measures=MEASURES, batch_size=4)
    single = score_model(model, ids, mask, measures=MEASURES, batch_size=1)
    right, lengths = compact(ids, mask)
    parts = [
        score_instances(
            model,
            right[a:b],
            lengths[a:b],
            measures=MEASURES,
            num_instances=4,
            first_instance=a,
        )
        for a, b in ((2, 4), (0, 2))
    ]
    travelled = [type(part).from_tensors(part.to_tensors()) for part in parts]
    sharded = evaluate(travelled[0].merge(travelled[1]), MEASURES)
    for row in whole.rows:
        for other in (single, sharded):
            assert other.row(row.measure, row.layer).value == pytest.approx(row.value, abs=1e-6)
            assert other.row(row.measure, row.layer).stderr == pytest.approx(
                row.stderr, abs=1e-6, nan_ok=True
            )


def test_ids_in_the_padding_are_not_routed(tiny_decoder):
    model = tiny_decoder("olmoe")
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(2))
    other = ids.clone()
    other[:, 5:] = 96
    values = [
        score_instances(model, i, [5, 4], measures="knowledge_entropy", num_instances=2)
        for i in (ids, other)
    ]
    for table in ("coefficients", "expert_load"):
        assert torch.equal(values[0].tables[table], values[1].tables[table])
    assert float(values[0].mean("expert_load")[0].sum()) == pytest.approx(2.0)


class LargestTensor(TorchDispatchMode):
    """The largest number of elements that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                self.num_elements = max(self.num_elements, tensor.numel())
        return result


def test_no_tensor_has_the_coefficients_of_all_experts_for_all_tokens(tiny_decoder):
    model = tiny_decoder("olmoe", num_experts=16, intermediate_size=64)
    ids = torch.randint(3, 97, (2, 64), generator=torch.Generator().manual_seed(2))
    with LargestTensor() as largest:
        score_model(model, ids, measures=("knowledge_entropy", "knowledge_entropy_relu"))
    num_tokens, d_expert = 128, 64
    assert largest.num_elements <= num_tokens * 2 * d_expert  # gate and up, were all routed there


@pytest.mark.parametrize("model_type", MIXTURES)
def test_knowledge_entropy_alone_ends_before_the_last_second_projections(tiny_decoder, model_type):
    model = tiny_decoder(model_type)
    ids = torch.tensor([[3, 4, 5, 6]])
    expected = score_model(model, ids).row("knowledge_entropy").value
    for name, parameter in model.model.layers[1].mlp.named_parameters():
        if "down_proj" in name:
            parameter.data.fill_(torch.nan)
    assert score_model(model, ids).row("knowledge_entropy").value == expected
    beside = score_model(model, ids, measures=("knowledge_entropy", "next_token_entropy"))
    assert math.isnan(beside.row("next_token_entropy").value)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_scoring_leaves_the_model_as_it_was(tiny_decoder, model_type):
    model = tiny_decoder(model_type)
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        before = model(ids).logits
        score_model(model, ids, measures=("knowledge_entropy", "next_token_entropy"))
        assert torch.equal(model(ids).logits, before)
    assert model.config._experts_implementation == "grouped_mm"
    assert not any("ke_ray" in name for m in model.modules() for name in vars(m))


@pytest.mark.parametrize("model_type", MIXTURES)
def test_the_pass_with_measured_experts_predicts_the_same(tiny_decoder, model_type):
    model = tiny_decoder(model_type)
    ids = torch.randint(3, 97, (3, 11), generator=torch.Generator().manual_seed(3))
    alone = score_model(model, ids, measures="next_token_entropy")
    beside = score_model(model, ids, measures=("knowledge_entropy", "next_token_entropy"))
    value = alone.row("next_token_entropy").value
    assert beside.row("next_token_entropy").value == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_key_rows_are_views_in_the_order_of_the_coefficients(tiny_decoder, model_type):
    model = tiny_decoder(model_type)
    ids = torch.randint(3, 97, (3, 11), generator=torch.Generator().manual_seed(3))

    def means() -> torch.Tensor:
        sums = score_instances(model, ids, measures="knowledge_entropy", num_instances=3)
        return sums.mean("coefficients").nan_to_num()

    layout = describe(model)[1]
    position = 0
    for rows in layout.key_rows():
        before = means()[1]
        with torch.no_grad():
            rows.weight[7] += 1.0
        moved = (means()[1] - before).abs() > 1e-6
        if bool(before[position : position + 12].any()):  # an expert that is used
            assert moved.nonzero()[:, 0].tolist() == [position + 7]
        position += len(rows.weight)
    assert position == layout.d_mlp == sum(layout.expert_sizes)


@pytest.mark.parametrize("model_type", ["olmoe", "mixtral", "gpt_oss"])
def test_pickled_weights_under_the_names_of_a_wrapper_are_loaded(
    tiny_decoder, model_type, tmp_path
):
    model = tiny_decoder(model_type)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save({f"module.{n}": t for n, t in stored.items()}, tmp_path / "pytorch_model.bin")
    loaded = load_model(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_a_mixture_that_the_user_describes_is_measured(monkeypatch):
    described = Architecture(model_type="flex_olmo", experts="experts")
    monkeypatch.setitem(architectures._DESCRIBED, "flex_olmo", described)
    model = random_decoder("flex_olmo", TINY_MIXTURES["olmoe"])
    got = score_model(model, torch.tensor([[3, 4, 5, 6]]), measures=MEASURES)
    for layer in (0, 1):
        split = [got.row(name, layer).value for name in BY_EXPERT]
        assert min(split) > 0
        assert sum(split) == pytest.approx(got.row("knowledge_entropy", layer).value, abs=1e-12)


@pytest.mark.parametrize("sign", ["has_gate", "has_post_expert_norm"])
def test_experts_of_another_kind_are_refused(tiny_decoder, sign):
    model = tiny_decoder("olmoe")
    module = model.model.layers[1].mlp.experts
    setattr(module, sign, not getattr(module, sign))
    with pytest.raises(UnsupportedArchitectureError, match="OlmoeExperts does not hold gated"):
        score_model(model, torch.tensor([[3, 4, 5]]))


def test_an_explanation_names_the_experts_and_the_shared_one(tiny_decoder):
    lines = explain(tiny_decoder("deepseek_v3").config)
    assert "  experts: 4 of 12 memories, model.layers.*.mlp.experts" in lines
    assert "  shared expert: gated, silu, d_mlp 24" in lines
    assert "  queries: model.layers.*.self_attn.q_b_proj [48, 24]" in lines


def test_the_config_alone_says_that_it_is_a_mixture(tiny_decoder):
    assert is_mixture(tiny_decoder("olmoe").config)
    assert not is_mixture(tiny_decoder("olmo").config)


def test_a_mixture_that_is_not_in_the_table_is_refused_and_the_known_ones_named():
    from transformers import AutoConfig

    config = AutoConfig.for_model("granitemoe", num_local_experts=4)
    with pytest.raises(UnsupportedArchitectureError, match=r"not know.*mixtral.*olmo2"):
        check_config(config)


def test_an_expert_without_tokens_has_no_entropy_and_no_mass():
    mean = torch.tensor([[1.0, 3.0, 0.0, 0.0, 2.0]])
    assert expert_masses(mean, [2, 2, 1]).tolist() == [[4.0, 0.0, 2.0]]
    entropies = expert_entropies(mean, [2, 2, 1])[0]
    assert entropies[0] == pytest.approx(entropy([1.0, 3.0]))
    assert torch.isnan(entropies[1])
    assert entropies[2] == 0.0
