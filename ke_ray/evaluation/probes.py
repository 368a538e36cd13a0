"""Log probability of probe targets, by level and setting.

    ℓ(p; θ) = ln P(target | context)         summed over the target's tokens, or per token

K, acquisition and forgetting are computed from these in ``ke_ray.core.acquisition``: they use ℓ per
target token, and average over the probes of a paragraph first (docs/science.md#acquisition).

Departure from the published code: it divides the summed log probability by the length of the
padded batch, so its values depend on the batching; these do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ke_ray.core.acquisition import paragraph_means
from ke_ray.data.probes import Probe
from ke_ray.errors import DataError
from ke_ray.evaluation.forward import max_positions, plain_model
from ke_ray.evaluation.prefix_tree import Span
from ke_ray.evaluation.sharing import Workers
from ke_ray.evaluation.spans import score_spans


@dataclass(frozen=True)
class ProbeScores:
    """Scores of probes, in the order they were given.

    Attributes:
        probes: the scored probes.
        logprob_summed: float64 [n_probes], nats.
        num_target_tokens: int64 [n_probes].
    """

    probes: tuple[Probe, ...]
    logprob_summed: npt.NDArray[np.float64]
    num_target_tokens: npt.NDArray[np.int64]

    @property
    def logprob_per_token(self) -> npt.NDArray[np.float64]:
        """float64 [n_probes], nats per target token: the ℓ of K and A."""
        return self.logprob_summed / self.num_target_tokens

    def paragraphs(self) -> tuple[list[tuple[str, int]], npt.NDArray[np.float64]]:
        """((setting, instance) of each paragraph, its mean ℓ per token [n_paragraphs]).

        The settings are the strata, the values the paragraph means of
        ``core.acquisition.acquisition_interval``.
        """
        labels = [(probe.setting, probe.instance) for probe in self.probes]
        paragraphs, values = paragraph_means(self.logprob_per_token, labels)
        return [label for label in paragraphs if isinstance(label, tuple)], values

    def by_level(self) -> list[dict[str, Any]]:
        """Rows of ``probes.parquet``: setting, level, num_probes, logprob_per_token (mean over
        the probes), logprob_summed (likewise)."""
        groups: dict[tuple[str, str], list[int]] = {}
        for index, probe in enumerate(self.probes):
            groups.setdefault((probe.setting, probe.level), []).append(index)
        per_token = self.logprob_per_token
        return [
            {
                "setting": setting,
                "level": level,
                "num_probes": len(members),
                "logprob_per_token": float(per_token[members].mean()),
                "logprob_summed": float(self.logprob_summed[members].mean()),
            }
            for (setting, level), members in groups.items()
        ]

    def items(self) -> list[dict[str, Any]]:
        """Rows of ``probe_items.parquet``, one per probe: setting, instance, level, probe,
        num_target_tokens, logprob_summed."""
        return [
            {
                "setting": probe.setting,
                "instance": probe.instance,
                "level": probe.level,
                "probe": probe.probe,
                "num_target_tokens": int(tokens),
                "logprob_summed": float(value),
            }
            for probe, tokens, value in zip(
                self.probes, self.num_target_tokens, self.logprob_summed, strict=True
            )
        ]


def score_probes(
    model: Any,
    probes: Sequence[Probe],
    *,
    batch_tokens: int | None = None,
    workers: Workers | None = None,
) -> ProbeScores:
    """Score probes with a model in memory, in as few passes as memory allows.

    Args:
        model: a causal language model of transformers; its mode (train, eval) is restored.
        probes: as ``ke_ray.data.probes.build_probes`` gives them.
        batch_tokens, workers: as ``score_spans``.

    Raises:
        DataError: no probes, or a probe longer than the model takes (named).
    """
    if not probes:
        raise DataError("There are no probes to score; give facts that have some.")
    limit = max_positions(plain_model(model))
    for probe in probes:
        length = len(probe.context_ids) + len(probe.target_ids) - 1
        if limit is not None and length > limit:
            raise DataError(
                f"The {probe.name} has {length} tokens, and the model takes {limit}; shorten its "
                "context."
            )
    spans = [Span(probe.context_ids, probe.target_ids) for probe in probes]
    scores = score_spans(model, spans, batch_tokens=batch_tokens, workers=workers)
    return ProbeScores(tuple(probes), scores.logprob_summed, scores.num_target_tokens)
