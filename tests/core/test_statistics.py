from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from ke_ray.core.jackknife import group_of, group_sizes
from ke_ray.core.statistics import GroupSums
from ke_ray.core.sums import TABLES

N_LAYERS, D_MLP = 2, 5


class Dataset:
    """Per-instance token means of every table, and token counts, for N instances."""

    def __init__(self, num_instances: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.num_instances = num_instances
        self.num_tokens = torch.randint(1, 9, (num_instances,), generator=generator)
        self.values = {
            "coefficients": torch.rand(num_instances, N_LAYERS, D_MLP, generator=generator),
            "coefficients_relu": torch.rand(num_instances, N_LAYERS, D_MLP, generator=generator),
            "attention_entropy": torch.rand(num_instances, N_LAYERS, generator=generator),
            "next_token_entropy": torch.rand(num_instances, generator=generator),
            "expert_load": torch.rand(num_instances, N_LAYERS, 1, generator=generator),
        }

    def empty(self) -> GroupSums:
        return GroupSums.empty(self.num_instances, list(TABLES), n_layers=N_LAYERS, d_mlp=D_MLP)

    def sums(self, instances: Tensor, batch_size: int, *, by_layer: bool = False) -> GroupSums:
        sums = self.empty()
        for batch in instances.split(batch_size):
            sums.count(batch, self.num_tokens[batch])
            for name, values in self.values.items():
                if by_layer and "n_layers" in TABLES[name]:
                    for layer in range(N_LAYERS):
                        sums.add(name, batch, values[batch][:, layer], layer=layer)
                else:
                    sums.add(name, batch, values[batch])
        return sums

    def everything(self) -> GroupSums:
        return self.sums(torch.arange(self.num_instances), self.num_instances)


def assert_same(a: GroupSums, b: GroupSums) -> None:
    assert torch.equal(a.counts, b.counts)
    assert torch.equal(a.num_tokens, b.num_tokens)
    assert a.tables.keys() == b.tables.keys()
    for name, table in a.tables.items():
        torch.testing.assert_close(table, b.tables[name], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("num_instances", [1, 2, 63, 64, 65, 100, 127, 128, 2048])
def test_groups_are_contiguous_balanced_and_cover_everything(num_instances: int) -> None:
    groups = [group_of(i, num_instances) for i in range(num_instances)]
    assert groups == sorted(groups)
    assert sorted(set(groups)) == list(range(min(64, num_instances)))
    sizes = group_sizes(num_instances)
    assert sizes.tolist() == [groups.count(g) for g in range(min(64, num_instances))]
    assert sizes.max() - sizes.min() <= 1
    assert torch.equal(group_of(torch.arange(num_instances), num_instances), torch.tensor(groups))


def test_group_sizes_of_no_instances_are_refused() -> None:
    with pytest.raises(ValueError, match="num_instances is 0"):
        group_sizes(0)


def test_mean_equals_a_loop_over_instances_whatever_their_lengths() -> None:
    """An instance of 2 tokens weighs as much as one of 2,048: a mean of instance means."""
    data = Dataset(70)
    sums = data.everything()
    for name, values in data.values.items():
        loop = torch.zeros(values.shape[1:], dtype=torch.float64)
        for row in values:
            loop += row.double() / 70
        torch.testing.assert_close(sums.mean(name), loop, rtol=1e-13, atol=0)
    assert sums.total_instances == 70
    assert sums.total_tokens == int(data.num_tokens.sum())
    assert sums.is_complete()


def test_sums_are_exact_to_float64_rounding() -> None:
    data = Dataset(200)
    column = data.values["coefficients"][:, 1, 3]
    exact = float(sum(Fraction(float(value)) for value in column) / 200)
    assert float(data.everything().mean("coefficients")[1, 3]) == pytest.approx(exact, rel=1e-14)


@pytest.mark.parametrize("batch_size", [1, 3, 64, 130])
@pytest.mark.parametrize("by_layer", [False, True])
def test_batch_size_and_adding_by_layer_change_nothing(batch_size: int, by_layer: bool) -> None:
    data = Dataset(130)
    assert_same(data.sums(torch.arange(130), batch_size, by_layer=by_layer), data.everything())


@pytest.mark.parametrize("seed", range(5))
def test_any_split_in_any_order_gives_the_same_sums(seed: int) -> None:
    data = Dataset(150, seed)
    generator = np.random.Generator(np.random.PCG64(seed))
    order = torch.from_numpy(generator.permutation(150))
    cuts = np.sort(generator.choice(np.arange(1, 150), size=6, replace=False)).tolist()
    parts = [data.sums(part, 4) for part in order.tensor_split(cuts)]
    merged = data.empty()
    for index in generator.permutation(len(parts)):
        merged.merge(parts[index])
    assert_same(merged, data.everything())


def test_merge_is_associative_and_commutative() -> None:
    data = Dataset(90)

    def part(index: int) -> GroupSums:
        return data.sums(torch.arange(index * 30, index * 30 + 30), 7)

    left = part(0).merge(part(1)).merge(part(2))
    right = part(2).merge(part(0).merge(part(1)))
    other = part(0).merge(part(2).merge(part(1)))
    assert_same(left, right)
    assert_same(left, other)


def test_leave_one_out_equals_recomputing_without_the_group() -> None:
    data = Dataset(100)
    sums = data.everything()
    groups = group_of(torch.arange(100), 100)
    for name, values in data.values.items():
        left_out = list(sums.leave_one_out(name))
        assert len(left_out) == 64
        for group, mean in enumerate(left_out):
            expected = values[groups != group].double().mean(dim=0)
            torch.testing.assert_close(mean, expected, rtol=1e-12, atol=0)


def test_leave_one_out_is_never_negative() -> None:
    """A memory used in one group only: the subtraction must not leave a negative rest."""
    sums = GroupSums.empty(64, ["coefficients"], n_layers=1, d_mlp=3)
    sums.count(torch.arange(64), torch.ones(64))
    values = torch.zeros(64, 1, 3)
    values[17, 0, 0], values[::7, 0, 1], values[:, 0, 2] = 0.1, 0.3, 1e-8
    sums.add("coefficients", torch.arange(64), values)
    assert all(bool((mean >= 0).all()) for mean in sums.leave_one_out("coefficients"))
    assert float(list(sums.leave_one_out("coefficients"))[17][0, 0]) == 0.0


def test_one_instance_leaves_nothing_out() -> None:
    data = Dataset(1)
    (mean,) = data.everything().leave_one_out("coefficients")
    assert bool(mean.isnan().all())


def test_tensors_survive_the_round_trip_and_hold_only_groups_with_instances() -> None:
    data = Dataset(640)
    part = data.sums(torch.arange(25, 45), 8)
    flat = part.to_tensors()
    assert flat["groups"].tolist() == [2, 3, 4]
    assert tuple(flat["sum.coefficients"].shape) == (3, N_LAYERS, D_MLP)
    assert_same(GroupSums.from_tensors(flat), part)
    assert_same(data.empty().merge_tensors(flat), part)
    assert not part.is_complete()
    empty = GroupSums.from_tensors(data.empty().to_tensors())
    assert_same(empty, data.empty())


def test_merging_tensors_equals_merging_sums() -> None:
    data = Dataset(130)
    merged = data.empty()
    for part in torch.arange(130).split(17):
        merged.merge_tensors(data.sums(part, 5).to_tensors())
    assert_same(merged, data.everything())
    assert merged.is_complete()


def test_an_instance_counted_twice_is_not_complete() -> None:
    data = Dataset(10)
    sums = data.everything()
    sums.count(torch.tensor([3]), torch.tensor([1]))
    assert not sums.is_complete()


def test_low_precision_values_are_summed_in_float64() -> None:
    sums = GroupSums.empty(4096, ["next_token_entropy"], n_layers=1, d_mlp=1)
    everyone = torch.arange(4096)
    sums.count(everyone, torch.ones(4096))
    sums.add("next_token_entropy", everyone, torch.full((4096,), 0.1, dtype=torch.bfloat16))
    expected = float(torch.tensor(0.1, dtype=torch.bfloat16))
    assert float(sums.mean("next_token_entropy")) == pytest.approx(expected, rel=1e-14)


def test_instances_of_padding_only_are_refused() -> None:
    sums = Dataset(4).empty()
    with pytest.raises(ValueError, match="at least one real token"):
        sums.count(torch.tensor([0, 1]), torch.tensor([3, 0]))


@pytest.mark.parametrize("index", [-1, 4])
def test_indices_outside_the_dataset_are_refused(index: int) -> None:
    sums = Dataset(4).empty()
    with pytest.raises(ValueError, match=r"not all in \[0, 4\)"):
        sums.count(torch.tensor([index]), torch.tensor([3]))
    with pytest.raises(ValueError, match=r"not all in \[0, 4\)"):
        sums.add("next_token_entropy", torch.tensor([index]), torch.ones(1))


def test_values_of_another_shape_are_refused() -> None:
    sums = Dataset(4).empty()
    with pytest.raises(ValueError, match="expected \\(1, 2, 5\\)"):
        sums.add("coefficients", torch.tensor([0]), torch.ones(1, D_MLP))
    with pytest.raises(ValueError, match="expected \\(1, 5\\)"):
        sums.add("coefficients", torch.tensor([0]), torch.ones(1, D_MLP + 1), layer=0)


def test_sums_of_different_datasets_or_tables_do_not_merge() -> None:
    for other in (
        Dataset(5).empty(),
        GroupSums.empty(4, ["coefficients"], n_layers=N_LAYERS, d_mlp=D_MLP),
        GroupSums.empty(4, list(TABLES), n_layers=N_LAYERS, d_mlp=D_MLP + 1),
    ):
        with pytest.raises(ValueError, match="cannot merge"):
            Dataset(4).empty().merge(other)
        with pytest.raises(ValueError, match="cannot merge"):
            Dataset(4).empty().merge_tensors(other.to_tensors())


def test_unknown_tables_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown sums"):
        GroupSums.empty(4, ["coefs"], n_layers=1, d_mlp=1)


def test_groups_of_given_sizes_are_contiguous_and_travel() -> None:
    sizes = [3, 1, 6]
    sums = GroupSums.empty(10, ["next_token_entropy"], n_layers=1, d_mlp=1, sizes=sizes)
    for part in torch.randperm(10).split(3):
        piece = GroupSums.empty(10, ["next_token_entropy"], n_layers=1, d_mlp=1, sizes=sizes)
        piece.count(part, torch.ones_like(part))
        piece.add("next_token_entropy", part, part.double())
        sums.merge(GroupSums.from_tensors(piece.to_tensors()))
    assert sums.is_complete()
    assert sums.counts.tolist() == sizes
    assert sums.tables["next_token_entropy"].tolist() == [0 + 1 + 2, 3, 4 + 5 + 6 + 7 + 8 + 9]
    equal = GroupSums.empty(10, ["next_token_entropy"], n_layers=1, d_mlp=1)
    with pytest.raises(ValueError, match="cannot merge"):
        sums.merge(equal)
    with pytest.raises(ValueError, match="do not make 10"):
        GroupSums.empty(10, ["next_token_entropy"], n_layers=1, d_mlp=1, sizes=[3, 3])
