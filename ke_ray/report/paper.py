"""Published results to lay over a study, where the study repeats the published one.

Kim et al. (arXiv 2410.01380 v3), Table 1: OLMo-1B continued on PubMed, 204,800 sequences of
1,024 tokens, acquisition A and forgetting F in per cent by starting step
(docs/science.md#published-results).
"""

from __future__ import annotations

import json

import pandas as pd

from ke_ray.report.sources import Result

__all__ = ["STEPS", "TABLE_1", "comparable"]

STEPS = (118_000, 369_000, 554_000, 738_000)
# setting -> (A, F) in % at STEPS
TABLE_1: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "baseline": ((25.2, 24.8, 21.4, 18.8), (10.5, 12.9, 17.0, 19.5)),
    "batch 2048": ((8.9, 7.8, 1.0, -92.2), (2.2, 3.5, 5.5, 44.9)),
    "lr 1e-3": ((17.3, 15.7, 10.7, 5.0), (16.7, 20.3, 23.0, 23.5)),
    "lr 1e-4": ((21.6, 23.0, 23.7, 22.6), (2.4, 3.2, 4.6, 7.3)),
    "3 epochs": ((28.8, 28.0, 25.9, 24.5), (14.8, 17.4, 20.1, 23.1)),
}
_TOKENS = 204_800 * 1024


def comparable(result: Result, frame: pd.DataFrame) -> tuple[str | None, str]:
    """(name of the published setting that the study repeats or None, the reason).

    A study repeats Table 1 when it starts from OLMo-1B at published stages, trains on PubMed text
    and sees 204,800 sequences of 1,024 tokens an epoch.
    """
    config = json.dumps(result.manifest.get("config", {})).lower()
    if "olmo-1b" not in config and "olmo_1b" not in config:
        return None, "the study does not start from OLMo-1B"
    near = frame["step"].map(lambda step: any(abs(step - at) < 2_000 for at in STEPS))
    if not len(frame) or not bool(near.any()):
        return None, "no start is one of the published stages (118k, 369k, 554k, 738k)"
    if "pubmed" not in config and not frame["corpus"].astype(str).str.contains("pubmed").any():
        return None, "the corpus is not PubMed"
    tokens = frame["num_tokens"].dropna() if "num_tokens" in frame else pd.Series(dtype=float)
    if tokens.empty or not (0.98 <= float(tokens.iloc[0]) / _TOKENS <= 3.06):
        return None, "the runs do not see 204,800 sequences of 1,024 tokens"
    return _setting(result, float(tokens.iloc[0])), "same model, stages, corpus and tokens"


def _setting(result: Result, tokens: float) -> str:
    config = result.manifest.get("config", {})
    text = json.dumps(config)
    if tokens > 2.5 * _TOKENS:
        return "3 epochs"
    if config.get("global_batch_size") == 2048:
        return "batch 2048"
    rate = config.get("optimizer", {}).get("learning_rate") if '"optimizer"' in text else None
    return {1e-3: "lr 1e-3", 1e-4: "lr 1e-4"}.get(rate or 0.0, "baseline")
