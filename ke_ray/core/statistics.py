"""Sufficient statistics of a scan: sums over instances, kept per jackknife group.

    C̄ˡ = (1/N) Σ_n (1/T_n) Σ_t |C_ntˡ|        (Eq. 2 of arXiv 2410.01380; mean of instance means)

A scorer adds, for every instance, its mean over *real* tokens; everything reported is computed
from the merged sums. Sums and counts are kept apart and divided once, at the end.

    symbol        meaning
    N             instances of the dataset D, `num_instances`
    G             jackknife groups, contiguous in D, min(64, N) equal ones unless sizes are given
    n_layers      decoder layers
    d_mlp         memories (coefficients) of one layer, of the widest where layers differ
    n_experts     experts of one layer, shared ones included, of the layer with the most

    table               shape               sum over instances of the token mean of
    coefficients        [G, n_layers, d_mlp]  |C|
    coefficients_relu   [G, n_layers, d_mlp]  |ReLU variant of C|
    token_entropies     [G, n_layers]         mass Σ|C| of a token times its entropy (nats · mass)
    attention_entropy   [G, n_layers]         attention entropy averaged over heads (nats)
    next_token_entropy  [G]                   entropy of softmax(logits) (nats)
    token_nats          [G]                   −ln p of the tokens that follow, summed over tokens
    predictions         [G]                   their number, T_n − 1
    expert_load         [G, n_layers, n_experts]  1 where the token is routed to the expert

Measures bring sums of their own along (`core.sums`).

What lies beyond a layer's own memories, and a layer without a value, is NaN (`core.layers`).

Everything is float64: the whole signal of a series is about 0.4 nats of 144, and a sum in float64
of float32 means agrees to 1e-13 whatever the order, the batches or the split. An instance without
a real token has no token mean and is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ke_ray.core.jackknife import group_sizes
from ke_ray.core.layers import Layers
from ke_ray.core.sums import all_tables, is_pooled


@dataclass
class GroupSums:
    """An accumulator of sums and counts per jackknife group.

    Attributes:
        sizes: int64 [G] instances that each group has in the whole dataset D, of which any part
            may have been added; on the CPU.
        counts: int64 [G] instances added so far, on the CPU.
        num_tokens: int64 [G] real tokens of those instances, on the CPU.
        tables: float64 sums by name (module docstring), only those that are needed.
        layers: what layers lack, and how many memories each has.
    """

    sizes: Tensor
    counts: Tensor
    num_tokens: Tensor
    tables: dict[str, Tensor]
    layers: Layers

    @classmethod
    def empty(
        cls,
        num_instances: int,
        names: Sequence[str],
        *,
        n_layers: int = 1,
        d_mlp: int = 1,
        d_model: int = 1,
        layers: Layers | None = None,
        device: torch.device | str = "cpu",
        sizes: Sequence[int] | None = None,
    ) -> GroupSums:
        """Zero sums for a dataset of `num_instances` (the whole of D, not a shard).

        Args:
            names: which tables to keep, of `sums.all_tables`.
            n_layers, d_mlp: of a model whose layers are alike.
            d_model: width of the hidden states, for sums over them.
            layers: of any model, instead of these two.
            sizes: instances in each group, which are contiguous; None makes equal groups.
            device: where the tables are kept; counts stay on the CPU.

        Raises:
            ValueError: an unknown table, or a size below 1.
        """
        if num_instances < 1:
            raise ValueError(f"num_instances is {num_instances}; expected at least 1")
        known = all_tables()
        unknown = sorted(set(names) - set(known))
        if unknown:
            raise ValueError(f"unknown sums {unknown}; available are {list(known)}")
        group = torch.as_tensor(group_sizes(num_instances) if sizes is None else list(sizes))
        if int(group.sum()) != num_instances or int(group.min()) < 1:
            raise ValueError(f"groups of sizes {group.tolist()} do not make {num_instances}")
        num_groups = group.numel()
        layers = layers or Layers((d_mlp,) * n_layers)
        axes = {
            "n_layers": len(layers.d_mlp),
            "d_mlp": max(layers.d_mlp),
            "n_experts": max(map(len, layers.expert_sizes)),
            "d_model": d_model,
            "d_model+1": d_model + 1,
        }
        tables = {
            name: torch.zeros(
                (1 if is_pooled(name) else num_groups, *(axes[axis] for axis in own)),
                dtype=torch.float64,
                device=device,
            )
            for name, own in known.items()
            if name in names
        }
        for name, table in tables.items():
            for layer, width in enumerate(layers.d_mlp if "n_layers" in known[name] else ()):
                if layers.absence(name, layer):
                    table[:, layer] = torch.nan
                elif "d_mlp" in known[name]:
                    table[:, layer, width:] = torch.nan
        return cls(
            sizes=group,
            counts=torch.zeros(num_groups, dtype=torch.int64),
            num_tokens=torch.zeros(num_groups, dtype=torch.int64),
            tables=tables,
            layers=layers,
        )

    @property
    def num_instances(self) -> int:
        """N, instances of the whole dataset D."""
        return int(self.sizes.sum())

    @property
    def num_groups(self) -> int:
        """G."""
        return int(self.counts.numel())

    @property
    def total_instances(self) -> int:
        """Instances added so far."""
        return int(self.counts.sum())

    @property
    def total_tokens(self) -> int:
        """Real tokens of the instances added so far."""
        return int(self.num_tokens.sum())

    def is_complete(self) -> bool:
        """Whether every group holds as many instances as D has in it (each added once)."""
        return torch.equal(self.counts, self.sizes)

    def count(self, instances: Tensor, num_tokens: Tensor) -> None:
        """Count instances, once each, whose values `add` receives.

        Args:
            instances: int64 [B] indices in D, on the CPU.
            num_tokens: int64 [B] real tokens of each, at least 1.

        Raises:
            ValueError: an index outside D, or an instance without a real token.
        """
        self._check_indices(instances)
        if num_tokens.shape != instances.shape or bool((num_tokens < 1).any()):
            raise ValueError(
                "each instance needs at least one real token: an instance of padding only has no "
                f"token mean; got {num_tokens.tolist()} tokens"
            )
        groups = self._groups_of(instances)
        self.counts.index_add_(0, groups, torch.ones_like(groups))
        self.num_tokens.index_add_(0, groups, num_tokens.to("cpu", torch.int64))

    def add(self, name: str, instances: Tensor, values: Tensor, layer: int | None = None) -> None:
        """Add per-instance token means to one table.

        Args:
            name: the table.
            instances: int64 [B] indices in D, on the CPU (no device synchronisation is needed).
            values: [B, …] one row per instance; the table's shape without G, and without
                n_layers where `layer` is given. Any float dtype, any device.
            layer: add to this layer only.

        Raises:
            KeyError: the table is not kept.
            ValueError: the shape does not fit, or an index is outside D.
        """
        table = self.tables[name]
        target = table if layer is None else table[:, layer]
        if tuple(values.shape) != (instances.numel(), *target.shape[1:]):
            raise ValueError(
                f"values for {name!r} have shape {tuple(values.shape)}; expected "
                f"{(instances.numel(), *target.shape[1:])}"
            )
        self._check_indices(instances)
        groups = self._groups_of(instances)
        values = values.detach().to(target.device)
        # A batch touches one to three of 64 contiguous groups. A masked sum per group is
        # deterministic on every device; index_add_ on CUDA is not.
        for group in groups.unique().tolist():
            rows = (groups == group).nonzero()[:, 0].to(values.device)
            target[0 if is_pooled(name) else group] += values.index_select(0, rows).sum(
                dim=0, dtype=torch.float64
            )

    def merge(self, other: GroupSums) -> GroupSums:
        """Add another accumulator's sums and counts to this one, in place; returns self.

        Associative and commutative to rounding in float64.

        Raises:
            ValueError: the two are of different datasets, tables or shapes.
        """
        if not torch.equal(self.sizes, other.sizes) or {
            name: table.shape for name, table in self.tables.items()
        } != {name: table.shape for name, table in other.tables.items()}:
            raise ValueError(
                f"cannot merge sums of {_describe(other)} into sums of {_describe(self)}"
            )
        self.counts += other.counts
        self.num_tokens += other.num_tokens
        for name, table in self.tables.items():
            table += other.tables[name].to(table.device)
        return self

    def mean(self, name: str) -> Tensor:
        """Mean over all instances added: the table's shape without G, float64.

        NaN when no instance was added.
        """
        return self.tables[name].sum(dim=0) / self.total_instances

    def leave_one_out(self, name: str) -> Iterator[Tensor]:
        """Means without group g, for g = 0 … G−1; one at a time, so memory stays that of one.

        A pooled table has none.

        Yields:
            float64, shaped as `mean`; NaN for every value when group g holds all instances.
            Never negative: a rounded sum of non-negative values is at least each of them.
        """
        table = self.tables[name]
        total = table.sum(dim=0)
        num_instances = self.total_instances
        for group, count in enumerate(self.counts.tolist()):
            yield (total - table[group]) / (num_instances - count)

    def to_tensors(self) -> dict[str, Tensor]:
        """A flat dictionary for shipping or saving: only groups with instances, on the CPU.

        A work item covers few of the 64 groups, so this is far smaller than the tables.

        Returns:
            `sizes` int64 [G], `groups`, `counts`, `num_tokens` int64 [K],
            `sum.<table>` float64 [K, …], and the layers.
        """
        groups = self.counts.nonzero()[:, 0]
        flat = {
            "sizes": self.sizes,
            "groups": groups,
            "counts": self.counts[groups],
            "num_tokens": self.num_tokens[groups],
            **self.layers.to_tensors(),
        }
        for name, table in self.tables.items():
            part = table if is_pooled(name) else table[groups.to(table.device)]
            flat[f"sum.{name}"] = part.cpu().contiguous()
        return flat

    @classmethod
    def from_tensors(cls, flat: Mapping[str, Tensor]) -> GroupSums:
        """The inverse of `to_tensors`."""
        num_groups = flat["sizes"].numel()
        sums = cls(
            sizes=flat["sizes"].clone(),
            counts=torch.zeros(num_groups, dtype=torch.int64),
            num_tokens=torch.zeros(num_groups, dtype=torch.int64),
            tables={
                name: torch.zeros(
                    (1 if is_pooled(name) else num_groups, *flat[f"sum.{name}"].shape[1:]),
                    dtype=torch.float64,
                )
                for name in all_tables()
                if f"sum.{name}" in flat
            },
            layers=Layers.from_tensors(flat),
        )
        return sums.merge_tensors(flat)

    def merge_tensors(self, flat: Mapping[str, Tensor]) -> GroupSums:
        """`merge` straight from `to_tensors`' form, without building dense tables; returns self.

        Raises:
            ValueError: the two are of different datasets, tables or shapes.
        """
        own_shapes = {f"sum.{name}": tuple(table.shape[1:]) for name, table in self.tables.items()}
        other_shapes = {
            key: tuple(t.shape[1:]) for key, t in flat.items() if key.startswith("sum.")
        }
        if not torch.equal(flat["sizes"], self.sizes) or own_shapes != other_shapes:
            raise ValueError(
                f"cannot merge sums of {int(flat['sizes'].sum())} instances with tables "
                f"{other_shapes} into sums of {_describe(self)}"
            )
        groups = flat["groups"]
        self.counts[groups] += flat["counts"]
        self.num_tokens[groups] += flat["num_tokens"]
        for name, table in self.tables.items():
            rows = slice(None) if is_pooled(name) else groups.to(table.device)
            table[rows] += flat[f"sum.{name}"].to(table.device, torch.float64)
        return self

    def _groups_of(self, instances: Tensor) -> Tensor:
        return torch.bucketize(instances.to(torch.int64), self.sizes.cumsum(0), right=True)

    def _check_indices(self, instances: Tensor) -> None:
        if instances.numel() and not (
            int(instances.min()) >= 0 and int(instances.max()) < self.num_instances
        ):
            raise ValueError(
                f"instance indices {instances.tolist()} are not all in [0, {self.num_instances})"
            )


def _describe(sums: GroupSums) -> str:
    shapes = {name: tuple(table.shape[1:]) for name, table in sums.tables.items()}
    return f"{sums.num_instances} instances with tables {shapes}"
