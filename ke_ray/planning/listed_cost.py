"""Rough costs of shipped studies for their list, in an instant and without the network.

Training and sweeps: of the whole study. Scans: of one checkpoint, because their number takes the
network to know; ``--dry-run`` counts them.
"""

from __future__ import annotations

from ke_ray.config import load_study
from ke_ray.planning.cost import cost_of
from ke_ray.planning.scan_items import BYTES_PER_S
from ke_ray.planning.speed import H100_FLOPS_PER_S
from ke_ray.planning.training_forecast import BYTES_PER_PARAMETER, parameters_by_name
from ke_ray.shipped import ShippedFile
from ke_ray.studies.continual import ContinualStudy
from ke_ray.studies.scan import ScanStudy
from ke_ray.studies.sweep import load_sweep

#: Repositories whose names say nothing of the number of parameters, or something else: parameters,
#: and those of them that are used for a token (docs/series.md).
_PARAMETERS = {
    "LLM360/Amber": (7e9, 7e9),
    "allenai/OLMoE-1B-7B-0924": (7e9, 1e9),
    "BabyLM-community/babylm-baseline-100m-gpt2": (124e6, 124e6),  # 100m words
    "catherinearnett/B-GPT_en_nl_simultaneous": (125e6, 125e6),
    "pico-lm/pico-decoder-tiny": (11e6, 11e6),
}
_EFFICIENCY = 0.6  # of an H100's matrix products that scoring reaches (assumed, as in --dry-run)


def listed_cost(file: ShippedFile) -> tuple[float | None, float | None]:
    """(bytes to fetch, hours on one H100); None where nothing tells, 0 bytes of a pretraining."""
    path = str(file.path)
    if file.kind == "pretrain":
        return 0, None
    if file.kind == "scan":
        return _of_one_checkpoint(load_study(path, ScanStudy))
    study = load_sweep(path) if file.kind == "sweep" else load_study(path, ContinualStudy)
    cost = cost_of(study)
    return cost.bytes_to_fetch, cost.h100_hours


def _of_one_checkpoint(study: ScanStudy) -> tuple[float | None, float | None]:
    repository = study.checkpoints.spec.partition("@")[0]
    by_name = parameters_by_name(repository) or parameters_by_name(study.name or "")
    parameters, used = _PARAMETERS.get(repository, (by_name, by_name))
    if parameters is None or used is None:
        return None, None
    size = parameters * BYTES_PER_PARAMETER
    tokens = study.num_instances * study.sequence_length * len(study.data)
    peak = H100_FLOPS_PER_S.get(study.dtype, H100_FLOPS_PER_S["bfloat16"])
    score_s = 2 * used * tokens / (_EFFICIENCY * peak)
    return size, max(score_s, size / BYTES_PER_S["fetched"]) / 3600  # the two overlap
