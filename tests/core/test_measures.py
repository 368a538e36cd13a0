from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from ke_ray.core import concentration, entropy
from ke_ray.core.geometry import moments
from ke_ray.core.jackknife import group_of, group_sizes, standard_error
from ke_ray.core.layers import Absence, Layers
from ke_ray.core.measure import Measure
from ke_ray.core.measures import (
    DEFAULT_MEASURES,
    MEASURES,
    Evaluation,
    check_measures,
    evaluate,
    register,
    required_sums,
)
from ke_ray.core.statistics import GroupSums
from ke_ray.core.sums import Sum, all_tables
from ke_ray.errors import UserError
from ke_ray.studies.scan import ScanStudy

N_LAYERS, D_MLP, D_MODEL, NUM_INSTANCES = 3, 40, 12, 100
EXPERTS = [10, 5, 25]  # the memories of a layer as those of three experts
SMOOTH = [name for name, measure in MEASURES.items() if measure.has_error]


def _values(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "coefficients": (N_LAYERS, D_MLP),
        "coefficients_relu": (N_LAYERS, D_MLP),
        "token_entropies": (N_LAYERS,),
        "attention_entropy": (N_LAYERS,),
        "next_token_entropy": (),
        "token_nats": (),
        "predictions": (),
        "intervened_predictions": (),
        "hidden_moments": (D_MODEL + 1, D_MODEL + 1),
        "expert_load": (N_LAYERS, len(EXPERTS)),
    }
    values = {
        name: torch.rand((NUM_INSTANCES, *shape), generator=generator).double() ** 2
        for name, shape in shapes.items()
    }
    # Of one token each.
    hidden = torch.randn(NUM_INSTANCES, 1, D_MODEL, generator=generator)
    values["hidden_moments"] = torch.stack([moments(rows) for rows in hidden])
    return values


def _sums(
    values: dict[str, torch.Tensor],
    names: tuple[str, ...] = tuple(all_tables()),
    batch_size: int = 16,
) -> GroupSums:
    sums = GroupSums.empty(
        NUM_INSTANCES,
        names,
        d_model=D_MODEL,
        layers=Layers((D_MLP,) * N_LAYERS, experts=(tuple(EXPERTS),) * N_LAYERS),
    )
    for batch in torch.arange(NUM_INSTANCES).split(batch_size):
        sums.count(batch, torch.full((len(batch),), 7))
        for name in names:
            sums.add(name, batch, values[name][batch])
    return sums


def _direct(measure: str, values: dict[str, torch.Tensor]) -> np.ndarray:
    """Per-layer values, or the only value, of a measure straight from the instances' values."""
    means = [values[table].mean(dim=0) for table in MEASURES[measure].tables]
    functions = {
        "knowledge_entropy": entropy.entropy_nats,
        "knowledge_entropy_relu": entropy.entropy_nats,
        "token_entropy": lambda weighted, x: weighted / x.sum(dim=-1),
        "memory_information": lambda weighted, x: (
            entropy.entropy_nats(x) - weighted / x.sum(dim=-1)
        ),
        "attention_entropy": lambda x: x,
        "next_token_entropy": lambda x: x,
        "loss": lambda nats, count: nats / count,
        "perplexity": lambda nats, count: (nats / count).exp(),
        "effective_memories": lambda x: entropy.entropy_nats(x).exp(),
        "participation_ratio": concentration.participation_ratio,
        "gini": concentration.gini,
        "top_k_mass": lambda x: concentration.top_k_mass(x, 0.05),
        "dormant_share": lambda x: concentration.dormant_share(x, 0.9),
        "routing_entropy": lambda x: _split_entropy(x)[0],
        "within_expert_entropy": lambda x: _split_entropy(x)[1],
    }
    return np.asarray(functions[measure](*means).numpy())


def _split_entropy(mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """H(π) and Σ π_e H_e of each layer, from their definition."""
    routing, within = [], []
    for layer in mean:
        parts = layer.split(EXPERTS)
        shares = [float(part.sum() / layer.sum()) for part in parts]
        routing.append(-sum(share * math.log(share) for share in shares))
        inner = [-sum(p * math.log(p) for p in (part / part.sum()).tolist()) for part in parts]
        within.append(sum(s * h for s, h in zip(shares, inner, strict=True)))
    return torch.tensor(routing, dtype=torch.float64), torch.tensor(within, dtype=torch.float64)


def _total(measure: str, per_layer: np.ndarray) -> float:
    if MEASURES[measure].total == "only":
        return float(per_layer)
    in_sum = {
        "knowledge_entropy",
        "knowledge_entropy_relu",
        "token_entropy",
        "memory_information",
        "attention_entropy",
        "effective_memories",
        "routing_entropy",
        "within_expert_entropy",
    }
    return float(per_layer.sum() if measure in in_sum else per_layer.mean())


def _evaluate(sums: GroupSums, measures: list[str]) -> Evaluation:
    return evaluate(sums, measures, top_k_fraction=0.05, dormant_threshold=0.9)


def test_names_and_units_are_the_published_ones() -> None:
    assert {name: measure.unit for name, measure in MEASURES.items()} == {
        "knowledge_entropy": "nats",
        "knowledge_entropy_relu": "nats",
        "token_entropy": "nats",
        "memory_information": "nats",
        "attention_entropy": "nats",
        "next_token_entropy": "nats",
        "loss": "nats",
        "perplexity": "tokens",
        "rank_me": "dimensions",
        "alpha_req": "exponent",
        "effective_memories": "memories",
        "participation_ratio": "fraction",
        "gini": "fraction",
        "top_k_mass": "fraction",
        "dormant_share": "fraction",
        "routing_entropy": "nats",
        "within_expert_entropy": "nats",
    }


def test_what_a_scan_measures_by_default_is_what_it_always_measured() -> None:
    expected = (
        *("knowledge_entropy", "attention_entropy", "next_token_entropy", "effective_memories"),
        *("participation_ratio", "gini", "top_k_mass", "dormant_share"),
    )
    assert expected == DEFAULT_MEASURES


@pytest.fixture
def largest_memory() -> Iterator[Measure]:
    """A measure that only this file knows."""
    measure = Measure(
        name="largest_memory",
        title="Largest memory",
        doc="max p",
        unit="fraction",
        needs="coefficients",
        values=lambda mean: mean.amax(dim=-1) / mean.sum(dim=-1),
        total="mean",
    )
    register(measure)
    yield measure
    del MEASURES["largest_memory"]


def test_a_registered_measure_is_evaluated_with_an_error(largest_memory: Measure) -> None:
    values = _values()
    result = evaluate(_sums(values), ["gini", "largest_memory"])
    mean = values["coefficients"].mean(dim=0)
    expected = (mean.amax(dim=-1) / mean.sum(dim=-1)).tolist()
    rows = [row for row in result.rows if row.measure == "largest_memory"]
    assert [row.value for row in rows] == pytest.approx([*expected, sum(expected) / N_LAYERS])
    assert all(row.stderr > 0 and row.unit == "fraction" for row in rows)
    assert result.replicates[(None, "largest_memory")].shape == (64,)


def test_a_registered_measure_is_accepted_by_a_study(largest_memory: Measure) -> None:
    study = ScanStudy.model_validate(
        {
            "checkpoints": {"spec": "x"},
            "data": {"d": "d.jsonl"},
            "output": "out",
            "measures": ["largest_memory"],
        }
    )
    assert study.measures == ("largest_memory",)


def test_a_name_is_registered_once(largest_memory: Measure) -> None:
    register(largest_memory)
    with pytest.raises(UserError, match="'largest_memory'.*another name"):
        register(dataclasses.replace(largest_memory, unit="nats"))


@pytest.mark.parametrize("measure", SMOOTH)
def test_values_and_replicates_equal_recomputing_from_the_instances(measure: str) -> None:
    values = _values()
    result = _evaluate(_sums(values), [measure])
    groups = group_of(torch.arange(NUM_INSTANCES), NUM_INSTANCES)
    without = [
        _direct(measure, {name: table[groups != g] for name, table in values.items()})
        for g in range(64)
    ]
    direct = _direct(measure, values)
    layers = range(N_LAYERS) if direct.ndim else ()
    for layer in layers:
        assert result.row(measure, layer).value == pytest.approx(direct[layer], rel=1e-12)
        np.testing.assert_allclose(
            result.replicates[(layer, measure)], [w[layer] for w in without], rtol=1e-12
        )
    total = result.row(measure)
    expected = np.array([_total(measure, w) for w in without])
    assert total.layer is None
    assert total.unit == MEASURES[measure].unit
    assert total.value == pytest.approx(_total(measure, direct), rel=1e-12)
    np.testing.assert_allclose(result.replicates[(None, measure)], expected, rtol=1e-12)
    error = standard_error(_total(measure, direct), expected, group_sizes(NUM_INSTANCES))
    assert total.stderr == pytest.approx(float(error), rel=1e-6)
    assert total.stderr > 0


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"needs": "coefficient"}, r"'coefficient', which is no sum. Did you mean 'coefficients'"),
        ({"needs": "next_token_entropy"}, "total 'mean'; expected 'only'"),
        ({"total": "only"}, "total 'only'; expected 'sum' or 'mean'"),
        (
            {"needs": Sum(name="coefficients", tap="hidden", of_instance=len), "total": "only"},
            "a sum 'coefficients' already",
        ),
        (
            {
                "needs": Sum(name="x", tap="hidden", of_instance=len, axes=("d_mlp",)),
                "total": "only",
            },
            "d_mlp stands alone, with the tap coefficients",
        ),
    ],
)
def test_a_declaration_that_cannot_work_is_refused(change, problem, largest_memory) -> None:
    with pytest.raises(UserError, match=problem):
        register(dataclasses.replace(largest_memory, name="other", **change))
    assert "other" not in MEASURES


def test_a_count_of_memories_has_a_value_but_no_error_and_no_replicates() -> None:
    values = _values()
    result = _evaluate(_sums(values), ["dormant_share"])
    direct = _direct("dormant_share", values)
    assert [row.value for row in result.rows] == pytest.approx([*direct, direct.mean()])
    assert all(math.isnan(row.stderr) for row in result.rows)
    assert not result.replicates


def test_everything_at_once_equals_one_at_a_time_and_rows_are_ordered() -> None:
    sums = _sums(_values())
    together = _evaluate(sums, list(reversed(SMOOTH)))
    rows = [row for name in SMOOTH for row in _evaluate(sums, [name]).rows]
    assert list(together.rows) == rows
    assert [row.layer for row in together.rows if row.measure == "gini"] == [0, 1, 2, None]
    assert [row.layer for row in together.rows if row.measure == "next_token_entropy"] == [None]
    assert set(together.replicates) == {(row.layer, row.measure) for row in together.rows}
    assert together.num_instances == NUM_INSTANCES
    assert together.num_tokens == 7 * NUM_INSTANCES
    assert together.group_counts.tolist() == group_sizes(NUM_INSTANCES).tolist()
    assert together.is_finite()


def test_the_split_of_the_data_changes_neither_value_nor_error() -> None:
    values = _values()
    whole = _evaluate(_sums(values, batch_size=NUM_INSTANCES), list(MEASURES))
    for batch_size in (1, 7, 33):
        for a, b in zip(
            whole.rows,
            _evaluate(_sums(values, batch_size=batch_size), list(MEASURES)).rows,
            strict=True,
        ):
            assert (a.layer, a.measure) == (b.layer, b.measure)
            assert a.value == pytest.approx(b.value, rel=1e-12)
            assert a.stderr == pytest.approx(b.stderr, rel=1e-8, nan_ok=True)


def test_uniform_and_one_hot_use() -> None:
    values = _values()
    values["coefficients"] = torch.full((NUM_INSTANCES, N_LAYERS, D_MLP), 0.2).double()
    uniform = evaluate(_sums(values), ["knowledge_entropy", "effective_memories", "gini"])
    assert uniform.row("knowledge_entropy").value == pytest.approx(3 * math.log(D_MLP))
    assert uniform.row("knowledge_entropy").stderr == pytest.approx(0.0, abs=1e-12)
    assert uniform.row("effective_memories").value == pytest.approx(3 * D_MLP)
    assert uniform.row("gini").value == pytest.approx(0.0, abs=1e-12)
    values["coefficients"][:, :, 1:] = 0.0
    one_hot = evaluate(_sums(values), ["knowledge_entropy", "effective_memories", "gini"])
    assert one_hot.row("knowledge_entropy").value == 0.0
    assert one_hot.row("effective_memories").value == 3.0
    assert one_hot.row("gini").value == pytest.approx(1 - 1 / D_MLP)


def test_a_dead_layer_makes_its_rows_and_the_total_not_finite() -> None:
    values = _values()
    values["coefficients"][:, 1] = 0.0
    result = evaluate(_sums(values), ["knowledge_entropy"])
    assert not result.is_finite()
    assert math.isnan(result.row("knowledge_entropy", 1).value)
    assert math.isnan(result.row("knowledge_entropy").value)
    assert math.isfinite(result.row("knowledge_entropy", 0).value)


def test_one_instance_has_values_but_no_errors() -> None:
    sums = GroupSums.empty(1, ["coefficients"], n_layers=1, d_mlp=4)
    sums.count(torch.tensor([0]), torch.tensor([5]))
    sums.add("coefficients", torch.tensor([0]), torch.rand(1, 1, 4))
    result = evaluate(sums, ["knowledge_entropy"])
    assert result.is_finite()
    assert math.isnan(result.row("knowledge_entropy").stderr)


def test_only_the_tables_that_are_needed_are_asked_for() -> None:
    assert required_sums(["knowledge_entropy", "gini", "dormant_share"]) == ("coefficients",)
    assert required_sums(["next_token_entropy"]) == ("next_token_entropy",)
    assert set(required_sums(list(MEASURES))) == set(all_tables()) - {
        "expert_load",
        "intervened_predictions",
    }
    values = _values()
    only = _sums(values, ("coefficients",))
    assert len(evaluate(only, ["knowledge_entropy"]).rows) == N_LAYERS + 1
    with pytest.raises(ValueError, match="attention_entropy"):
        evaluate(only, ["attention_entropy"])


def test_measures_are_deduplicated_and_ordered() -> None:
    assert check_measures(["gini", "knowledge_entropy", "gini"]) == ("knowledge_entropy", "gini")


def test_an_unknown_measure_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'knowledge_entropy'"):
        check_measures(["knowlege_entropy"])
    with pytest.raises(UserError, match="no measure.*at least one of knowledge_entropy"):
        check_measures([])


def test_parameters_out_of_range_are_refused_even_where_unused() -> None:
    sums = _sums(_values(), ("coefficients",))
    with pytest.raises(UserError, match="top_k_fraction"):
        evaluate(sums, ["knowledge_entropy"], top_k_fraction=0.0)
    with pytest.raises(UserError, match="dormant_threshold"):
        evaluate(sums, ["knowledge_entropy"], dormant_threshold=-1.0)


def test_one_measure_may_be_given_as_a_text() -> None:
    assert check_measures("knowledge_entropy") == ("knowledge_entropy",)
    assert check_measures("gini, knowledge_entropy") == ("knowledge_entropy", "gini")
    with pytest.raises(UserError, match=r"unknown measure 'knowledge'\."):
        check_measures("knowledge")
    assert evaluate(_sums(_values()), "gini").row("gini").measure == "gini"


def test_a_row_that_does_not_exist_names_those_that_do() -> None:
    evaluation = evaluate(_sums(_values()), ["gini", "next_token_entropy"])
    with pytest.raises(UserError, match="'knowledge_entropy'.*has next_token_entropy, gini"):
        evaluation.row("knowledge_entropy")
    with pytest.raises(UserError, match="no layer 7; it has layers 0 to 2 and the total"):
        evaluation.row("gini", 7)
    with pytest.raises(UserError, match="no layer 0; it has a total"):
        evaluation.row("next_token_entropy", 0)


def test_names_errors_and_acquisition_need_no_torch() -> None:
    code = (
        "import sys, ke_ray.core.measures, ke_ray.core.jackknife, ke_ray.core.acquisition, "
        "ke_ray.core.dynamics; print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stdout.strip() == "False"


def test_layers_with_and_without_experts_are_measured_as_each_alone() -> None:
    generator = torch.Generator().manual_seed(5)
    experts = [(40,), (8, 4), (8, 4), (40,)]
    mean = [torch.rand(sum(sizes), generator=generator).double() for sizes in experts]
    padded = torch.nn.utils.rnn.pad_sequence(mean, batch_first=True)
    names = [name for name, m in MEASURES.items() if m.needs == "coefficients"]

    def evaluated(values: torch.Tensor, sizes: list[tuple[int, ...]]) -> Evaluation:
        layers = Layers.of([sum(row) for row in sizes], [Absence.NONE] * len(sizes), sizes)
        sums = GroupSums.empty(1, ["coefficients"], layers=layers)
        sums.count(torch.tensor([0]), torch.tensor([3]))
        sums.add("coefficients", torch.tensor([0]), values[None])
        return _evaluate(GroupSums.from_tensors(sums.to_tensors()), names)

    together = evaluated(padded, experts)
    for layer, (values, sizes) in enumerate(zip(mean, experts, strict=True)):
        alone = evaluated(values[None], [sizes])
        for name in names:
            assert together.row(name, layer).value == alone.row(name, 0).value
    assert together.row("routing_entropy", 0).value == 0.0
