"""What a measure is, and the declarations of those that ke_ray has.

A measure is a function of the mean over instances of one sum or several (`core.sums`,
`core.statistics`). Study files, figures and the table in ``docs/results.md`` derive from its
declaration; `core.measures` evaluates it and adds measures of your own.

Equations: arXiv 2410.01380. This module imports torch only when it evaluates, so that names and
units can be checked cheaply.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Literal

from ke_ray.core.intervention import INTERVENED, Intervention, intervention_named
from ke_ray.core.sums import Sum, is_pooled

if TYPE_CHECKING:
    from torch import Tensor

Need = str | Sum | Intervention


@dataclass(frozen=True, kw_only=True)
class Measure:
    """The declaration of a measure.

    Attributes:
        name: in study files and in `entropy.parquet`.
        title: for people, in figures and tables.
        doc: what the value of a layer is, in one line.
        unit: of the values, such as nats, memories or fraction.
        needs: the table of `GroupSums` that it is computed from, or several; a `Sum` of its own
            or an `Intervention` may stand among them.
        values: from the mean of each table over instances, float64 [n_layers, …], to the values
            [n_layers]; [] to [] where the table has no layers.
        total: over layers, the sum or the mean; 'only' where the table has no layers.
        parameter: the argument of `evaluate` that `values` takes beside the mean.
        is_smooth: whether the jackknife holds; a measure that is not smooth has no error.
        is_default: whether a scan evaluates it where its study names no measures.
        by_expert: whether `values` takes, last, the memories of each expert of these layers
            (`core.experts`). A scan of a mixture of experts evaluates such a measure by default.
        direction: which values are better, where that can be said.
        origin: the package and version that it is from; empty for ke_ray's own.
    """

    name: str
    title: str
    doc: str
    unit: str
    needs: Need | tuple[Need, ...]
    values: Callable[..., Tensor]
    total: Literal["sum", "mean", "only"]
    parameter: Literal["top_k_fraction", "dormant_threshold"] | None = None
    is_smooth: bool = True
    is_default: bool = True
    by_expert: bool = False
    direction: Literal["minimize", "maximize"] | None = None
    origin: str = ""

    @property
    def needs_all(self) -> tuple[Need, ...]:
        """What it needs, as a tuple."""
        return self.needs if isinstance(self.needs, tuple) else (self.needs,)

    @property
    def tables(self) -> tuple[str, ...]:
        """The tables that it needs, in the order in which `values` takes them."""
        return tuple(own if isinstance(own, str) else own.name for own in self.needs_all)

    @property
    def has_error(self) -> bool:
        """Whether its values have jackknife errors."""
        pooled = (is_pooled(o) if isinstance(o, str) else o.is_pooled for o in self.needs_all)
        return self.is_smooth and not any(pooled)


def _core(module: str, function: str) -> Callable[..., Tensor]:
    """A function of a module of this package, which is imported at the first call for torch."""

    def call(*arguments: object) -> Tensor:
        values: Tensor = getattr(import_module(f"ke_ray.core.{module}"), function)(*arguments)
        return values

    return call


def _unchanged(mean: Tensor) -> Tensor:
    return mean


_MOMENTS = Sum(
    name="hidden_moments",
    tap="hidden",
    of_instance=_core("geometry", "moments"),
    axes=("d_model+1", "d_model+1"),
    is_pooled=True,
)


BUILT_IN: tuple[Measure, ...] = (
    Measure(
        name="knowledge_entropy",
        title="Knowledge entropy",
        doc="−Σ p ln p, p = C̄ˡ/ΣC̄ˡ (Eq. 2)",
        unit="nats",
        needs="coefficients",
        values=_core("entropy", "entropy_nats"),
        total="sum",
    ),
    Measure(
        name="knowledge_entropy_relu",
        title="Knowledge entropy, ReLU variant",
        doc="the same for |ReLU(gate)·up| (A.2)",
        unit="nats",
        needs="coefficients_relu",
        values=_core("entropy", "entropy_nats"),
        total="sum",
        is_default=False,
    ),
    Measure(
        name="token_entropy",
        title="Entropy of single tokens",
        doc="Σ_t w_t H(p_t): entropy of one token's coefficients, tokens weighted by their "
        "share of ΣC̄ˡ",
        unit="nats",
        needs=("token_entropies", "coefficients"),
        values=_core("token_entropy", "token_entropy"),
        total="sum",
        is_default=False,
    ),
    Measure(
        name="memory_information",
        title="Information between token and memory",
        doc="I(token; memory) = `knowledge_entropy` − `token_entropy`: how far tokens draw on "
        "different memories",
        unit="nats",
        needs=("token_entropies", "coefficients"),
        values=_core("token_entropy", "memory_information"),
        total="sum",
        is_default=False,
    ),
    Measure(
        name="attention_entropy",
        title="Attention entropy",
        doc="entropy of causal attention rows (Eq. 3)",
        unit="nats",
        needs="attention_entropy",
        values=_unchanged,
        total="sum",
    ),
    Measure(
        name="next_token_entropy",
        title="Next-token entropy",
        doc="entropy of softmax(logits) (A.4)",
        unit="nats",
        needs="next_token_entropy",
        values=_unchanged,
        total="only",
    ),
    Measure(
        name="loss",
        title="Loss",
        doc="−ln p of the token that follows, mean over all predicted tokens of D",
        unit="nats",
        needs=("token_nats", "predictions"),
        values=_core("prediction", "loss"),
        total="only",
        is_default=False,
        direction="minimize",
    ),
    Measure(
        name="perplexity",
        title="Perplexity",
        doc="exp(`loss`)",
        unit="tokens",
        needs=("token_nats", "predictions"),
        values=_core("prediction", "perplexity"),
        total="only",
        is_default=False,
        direction="minimize",
    ),
    Measure(
        name="rank_me",
        title="Effective rank of hidden states (RankMe)",
        doc="exp(−Σ p ln p), p = σ/Σσ, σ the singular values of the final hidden states of "
        "all tokens",
        unit="dimensions",
        needs=_MOMENTS,
        values=_core("geometry", "rank_me"),
        total="only",
        is_default=False,
    ),
    Measure(
        name="alpha_req",
        title="Decay of the spectrum of hidden states (α-ReQ)",
        doc="−slope of ln λ_i over ln i, λ the eigenvalues of their covariance",
        unit="exponent",
        needs=_MOMENTS,
        values=_core("geometry", "alpha_req"),
        total="only",
        is_default=False,
    ),
    Measure(
        name="effective_memories",
        title="Effective number of memories",
        doc="exp(H), H = −Σ p ln p",
        unit="memories",
        needs="coefficients",
        values=_core("entropy", "effective_memories"),
        total="sum",
    ),
    Measure(
        name="participation_ratio",
        title="Participation ratio",
        doc="(Σp)²/Σp² / d_mlp",
        unit="fraction",
        needs="coefficients",
        values=_core("concentration", "participation_ratio"),
        total="mean",
    ),
    Measure(
        name="gini",
        title="Gini coefficient",
        doc="Gini coefficient of C̄ˡ",
        unit="fraction",
        needs="coefficients",
        values=_core("concentration", "gini"),
        total="mean",
    ),
    Measure(
        name="top_k_mass",
        title="Mass of the largest memories",
        doc="share of ΣC̄ˡ in the largest `top_k_fraction` (1 %) of memories",
        unit="fraction",
        needs="coefficients",
        values=_core("concentration", "top_k_mass"),
        total="mean",
        parameter="top_k_fraction",
    ),
    Measure(
        name="dormant_share",
        title="Dormant share",
        doc="share of memories with C̄ˡ ≤ `dormant_threshold` (0.1) · mean C̄ˡ",
        unit="fraction",
        needs="coefficients",
        values=_core("concentration", "dormant_share"),
        total="mean",
        parameter="dormant_threshold",
        is_smooth=False,
    ),
    Measure(
        name="routing_entropy",
        title="Routing entropy",
        doc="H(π), π the experts' shares of ΣC̄ˡ; 0 in a dense layer",
        unit="nats",
        needs="coefficients",
        values=_core("experts", "routing_entropy"),
        total="sum",
        is_default=False,
        by_expert=True,
    ),
    Measure(
        name="within_expert_entropy",
        title="Entropy within experts",
        doc="Σ π_e H_e = `knowledge_entropy` − `routing_entropy`",
        unit="nats",
        needs="coefficients",
        values=_core("experts", "within_expert_entropy"),
        total="sum",
        is_default=False,
        by_expert=True,
    ),
)

_PART_TITLES = {
    "all": "all weights",
    "ffn": "FFN weights",
    "attention": "attention weights",
    "embeddings": "embeddings and head",
}


def measure_named(name: str) -> Measure | None:
    """The measure of a name that holds a number; None for other names.

    ``rank_me_layer_8`` and ``alpha_req_layer_8`` are of the residual stream behind a layer,
    ``sensitivity_ffn_0.02`` and ``masking_least_0.1`` of a changed model.

    Raises:
        UserError: as `intervention_named`.
    """
    if match := re.fullmatch(r"(rank_me|alpha_req)_layer_(0|[1-9]\d{0,3})", name):
        whole = next(measure for measure in BUILT_IN if measure.name == match[1])
        layer = int(match[2])
        return replace(
            whole,
            name=name,
            title=f"{whole.title}, behind layer {layer}",
            doc=f"`{whole.name}` of the residual stream behind layer {layer}",
            needs=replace(_MOMENTS, name=f"hidden_moments_{layer}", layer=layer),
        )
    own = intervention_named(name)
    return None if own is None else _of_intervention(name, own)


def _of_intervention(name: str, own: Intervention) -> Measure:
    if own.kind == "noise":
        title = f"Sensitivity to noise on {_PART_TITLES[own.target]}, γ = {own.amount:g}"
        doc = "ΔL(γ) = E_ε[L(θ + γ σ_W ε)] − L(θ)"
    else:
        title = f"Rise of the loss without the {100 * own.amount:.6g} % {own.target} used memories"
        doc = "L(θ without those coefficients) − L(θ)"
    return Measure(
        name=name,
        title=title,
        doc=doc,
        unit="nats",
        needs=(own, INTERVENED),
        values=_core("prediction", "loss"),
        total="only",
        is_default=False,
    )
