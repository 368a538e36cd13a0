"""What a scan's curve is known to, and how many instances a wanted precision needs."""

from __future__ import annotations

import math

import numpy as np

from ke_ray.core.stopping import CurvePrecision
from ke_ray.report import series
from ke_ray.report.sources import Result


def precision_sentence(scan: Result, corpus: str) -> str | None:
    """What paired error the knowledge-entropy curve has, and what N a wanted one needs.

    The wanted error is that of the scan's study, else one per cent of the largest change. None
    where no error is known.
    """
    change = series.paired_change(scan, "knowledge_entropy", corpus)
    has_number = "num_instances" in series.about_corpus(scan, corpus)
    if len(change) < 2 or not has_number or not np.isfinite(change["stderr"]).all():
        return None
    precision = CurvePrecision(float(np.ptp(change["value"])), float(change["stderr"].max()))
    if not precision.change or not precision.error:
        return None
    config = scan.manifest.get("config")
    config = config if isinstance(config, dict) else {}
    absolute, share = config.get("stderr_nats"), config.get("precision") or 0.01
    wanted = precision.wanted_error(share=share, absolute=absolute)
    label = f"{absolute:g} nats" if absolute else f"{100 * share:g} %"
    num_instances = int(series.about_corpus(scan, corpus)["num_instances"])
    needed = max(2, math.ceil(precision.instances_needed(num_instances, wanted)))
    return (
        f"knowledge_entropy: largest paired s.e. {precision.error:.2g} nats, "
        f"{100 * precision.error / precision.change:.2g} % of the largest change, with N = "
        f"{num_instances:,}; {label} needs N of about {needed:,}."
    )
