"""The forecast of continual learning: runs, tokens, bytes, hours. Nothing is fetched or written."""

from __future__ import annotations

import json
import re

import yaml

from ke_ray import storage
from ke_ray.checkpoints.find.catalog import list_checkpoints
from ke_ray.errors import KeRayError
from ke_ray.models.architectures import use_description
from ke_ray.models.loading import load_config
from ke_ray.planning.evaluation_forecast import evaluation_cost
from ke_ray.planning.scan_forecast import num_body_parameters
from ke_ray.planning.speed import H100_FLOPS_PER_S, measured_speed
from ke_ray.secrets import redact
from ke_ray.studies.continual import ContinualStudy
from ke_ray.training.runs import list_runs

#: Of the matrix products' speed that training as a whole reaches (assumed).
EFFICIENCY = 0.4
#: Published checkpoints are float32 where nothing tells their size (assumed).
BYTES_PER_PARAMETER = 4
_SIZE_IN_NAME = re.compile(r"(?<![0-9.])(\d+(?:\.\d+)?)([bBmM])(?![a-zA-Z])")


def num_tokens(study: ContinualStudy) -> int | None:
    """Training tokens of one run; None where ``corpus.num_instances`` is not given."""
    if study.corpus.num_instances is None:
        return None
    steps = study.epochs * (study.corpus.num_instances // study.global_batch_size)
    return steps * study.global_batch_size * study.sequence_length


def num_parameters(study: ContinualStudy) -> tuple[float | None, str]:
    """(weights in matrix products, where the number is from): a local config, or the name."""
    spec = study.starts.spec
    use_description(study.architecture)
    if storage.is_local(spec) and storage.exists(spec):
        try:
            config = load_config(list_checkpoints(spec)[-1])
        except KeRayError:
            return None, "no checkpoint could be read"
        head = config.hidden_size * config.vocab_size
        return float(num_body_parameters(config) + head), "the checkpoint's config"
    parameters = parameters_by_name(spec)
    if parameters is None:
        return None, f"'{spec}' is not here and its name gives no size"
    return parameters, f"the name '{spec}'"


def parameters_by_name(name: str) -> float | None:
    """The number in ``OLMo-1B`` or ``pythia-160m``; None where a name has none."""
    size = _SIZE_IN_NAME.search(name)
    if size is None:
        return None
    return float(size.group(1)) * (1e9 if size.group(2) in "bB" else 1e6)


def bytes_of_starts(study: ContinualStudy, num_starts: int | None) -> int | None:
    """Bytes of starting checkpoints by the size in their name, without the network.

    0 where they are on this machine, None where nothing tells.
    """
    spec = study.starts.spec
    if storage.is_local(spec) and storage.exists(spec):
        return 0
    parameters, _ = num_parameters(study)
    if parameters is None or num_starts is None:
        return None
    return int(num_starts * parameters * BYTES_PER_PARAMETER)


def training_hours(parameters: float, tokens: int, flops_per_s: float) -> float:
    """6 operations a weight and token, at ``EFFICIENCY`` of the speed of matrix products."""
    return 6 * parameters * tokens / (EFFICIENCY * flops_per_s) / 3600


def measured_tokens_per_s(output: str) -> float | None:
    """From runs that this folder has already."""
    folder = storage.join(output, "runs")
    tokens = seconds = 0.0
    for name in storage.list_dir(folder):
        path = storage.join(folder, name, "run.json")
        row = storage.read_json(path).get("row", {}) if storage.exists(path) else {}
        if row.get("status") == "ok" and row.get("duration_s"):
            tokens, seconds = tokens + row["num_tokens"], seconds + row["duration_s"]
    return tokens / seconds if seconds else None


def hours_text(study: ContinualStudy, output: str, tokens: int | None, runs: str) -> str:
    """The lines on tokens and hours of all runs.

    Args:
        tokens: of training, over all runs.
        runs: what the runs are called.
    """
    if tokens is None:
        return "training tokens: not known (corpus.num_instances is not given)\nhours: not known"
    counted = f"training tokens: about {tokens:,} in all\n"
    measured = measured_tokens_per_s(output)
    if measured is not None:
        hours = tokens / measured / 3600
        return counted + (
            f"hours: {_number(hours)} of {runs} one after another ({measured:,.0f} tokens/s in the "
            f"{runs} that are finished, evaluations included)"
        )
    parameters, source = num_parameters(study)
    if parameters is None:
        return counted + f"hours: not known ({source})"
    speed = measured_speed(study.precision, study.use_gpu)
    peak = H100_FLOPS_PER_S[study.precision]
    here, there = (training_hours(parameters, tokens, flops) for flops in (speed.flops_per_s, peak))
    return counted + (
        f"hours: {_number(here)} on this machine's {speed.device} ({speed}), "
        f"{_number(there)} on one H100 in {study.precision} "
        f"({peak / 1e12:.0f} TFLOP/s, assumed), {runs} one after another; {EFFICIENCY:.0%} of "
        f"either assumed, {parameters / 1e6:,.1f}M weights by {source}; evaluation comes on top"
    )


def _number(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.3g}"


def forecast(study: ContinualStudy) -> str:
    """The plan as text: the resolved study, then the runs and the figures."""
    specs = list_runs(study)
    values = json.loads(study.model_dump_json(exclude_none=True))
    lines = [yaml.safe_dump(redact(values), sort_keys=False), f"runs: {len(specs)}"]
    lines += [f"  {spec.name}" for spec in specs]
    starts = {spec.ref.name: spec.ref for spec in specs if not spec.ref.is_local}
    sizes = [ref.size_bytes for ref in starts.values()]
    if all(size is not None for size in sizes):
        text = f"{sum(size or 0 for size in sizes):,}"
    else:
        about = bytes_of_starts(study, len(starts))
        text = "not known" if about is None else f"about {about:,} (by the name of the model)"
    lines.append(f"bytes to fetch: {text} ({len(starts)} checkpoints)")
    tokens = num_tokens(study)
    total = None if tokens is None else tokens * len(specs)
    lines.append(hours_text(study, study.output, total, "runs"))
    if tokens:
        lines.append(str(evaluation_cost(study, tokens)))
    return "\n".join(lines)
