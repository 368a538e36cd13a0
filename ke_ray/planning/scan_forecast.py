"""The forecast of a scan: checkpoints, bytes, disk, hours. Nothing is fetched or written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import yaml

from ke_ray.checkpoints.fetch.cache import Store
from ke_ray.checkpoints.fetch.checkpoint import size_to_fetch
from ke_ray.checkpoints.reference import CheckpointRef
from ke_ray.core.measures import interventions_of, needs_usage, required_sums
from ke_ray.core.stopping import round_strides
from ke_ray.core.sums import OF_LOGITS
from ke_ray.errors import CheckpointError
from ke_ray.models.architectures import check_config, is_mixture, use_description
from ke_ray.models.configuration import read_config
from ke_ray.planning.scan import check_sources, model_bytes, select_checkpoints
from ke_ray.planning.scan_items import (
    BYTES_PER_S,
    CheckpointWork,
    CorpusWork,
    load_tokens,
    makespan,
    plan_items,
)
from ke_ray.planning.scan_precision import local_gpus, settle_precision
from ke_ray.planning.speed import H100_FLOPS_PER_S, measured_speed
from ke_ray.secrets import redact
from ke_ray.studies.scan import ScanStudy

#: GPUs to plan for, beside this machine.
_NUM_GPUS = (1, 8, 64)
#: All three entropies over a forward pass with LM head (benchmarks/README.md, Scoring).
_THREE_ENTROPIES = 1.28
#: Of the matrix products' speed that scoring reaches (assumed).
_EFFICIENCY = 0.6


def num_body_parameters(config: Any) -> int:
    """Weights of the decoder layers that a token is multiplied with, from the config alone.

    Attention 4·d² (fewer key and value heads counted), gated FFN 3·d·m, ungated 2·d·m; m of a
    mixture counts the experts that a token is routed to and the shared ones.
    """
    d_model, n_layers = config.hidden_size, config.num_hidden_layers
    names = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
    widths = (getattr(config, name, None) for name in names)
    d_mlp = next((width for width in widths if width), 4 * d_model)
    if is_mixture(config):
        size = getattr(config, "moe_intermediate_size", None) or d_mlp
        shared = (getattr(config, "n_shared_experts", None) or 0) * size
        shared = getattr(config, "shared_expert_intermediate_size", None) or shared
        d_mlp = config.num_experts_per_tok * size + shared
    if isinstance(d_mlp, list):  # one for each layer
        d_mlp = sum(d_mlp) / n_layers
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    attention = d_model * d_model * (2 + 2 * kv_heads / heads)
    matrices = 2 if check_config(config).gate is None else 3
    return int(n_layers * (attention + matrices * d_model * d_mlp))


def _flops_per_token(config: Any, study: ScanStudy) -> float:
    """Two operations a weight; entropies of attention and of the next token on top.

    Passes of changed models are over fewer instances, and count as that share of a pass over all.
    """
    tables = {"attention_entropy", *OF_LOGITS}.intersection(required_sums(study.measures))
    body = num_body_parameters(config)
    whole = body + config.hidden_size * config.vocab_size
    changed = num_changed_passes(study) * min(study.intervention_instances, study.num_instances)
    return 2.0 * (
        (whole * _THREE_ENTROPIES if tables else body) + whole * changed / study.num_instances
    )


def num_changed_passes(study: ScanStudy) -> int:
    """Passes over the instances of interventions, for one checkpoint and corpus.

    One of the model as it is, one for each draw of noise or mask, and one for the C̄ of masks.
    """
    own = interventions_of(study.measures)
    passes = sum(study.noise_seeds if each.kind == "noise" else 1 for each in own)
    return passes + 1 + needs_usage(study.measures) if own else 0


def _gpu_precision(study: ScanStudy) -> str:
    """In what GPUs that have it all form the study's products: a key of ``H100_FLOPS_PER_S``."""
    if study.dtype == "auto":
        return "bfloat16"
    if study.dtype == "float32" and study.matmul_precision != "highest":
        return "float32 with TF32"
    return study.dtype


def _by_dtype(flops: float) -> str:
    """Hours of scoring alone on one GPU in each precision.

    Args:
        flops: of the whole scan.
    """
    hours = {name: flops / (_EFFICIENCY * speed) / 3600 for name, speed in H100_FLOPS_PER_S.items()}
    shown = [f"{value:.3g} in {name}" for name, value in hours.items() if name != "float16"]
    return "hours of scoring on one H100 (60 % of its data sheet assumed): " + ", ".join(shown)


@dataclass(frozen=True)
class ScanForecast:
    """Counts of a scan, made beforehand.

    Attributes:
        study: with the measures that its model gets by default.
        refs: the checkpoints.
        sizes: bytes of each checkpoint, as far as they are known.
        num_fetched: checkpoints that are not on this machine.
        num_guessed: sizes taken to be that of another checkpoint.
        num_tokens: to score, over checkpoints and corpora.
        flops: operations per token; None where no checkpoint's config could be read.
        model_bytes: of the largest model; 0 where no size is known.
    """

    study: ScanStudy
    refs: list[CheckpointRef]
    sizes: list[int]
    num_fetched: int
    num_guessed: int
    num_tokens: int
    flops: float | None
    model_bytes: int

    @property
    def bytes_to_fetch(self) -> int | None:
        """None where a size is not known."""
        if not self.num_fetched:
            return 0
        return sum(self.sizes) if len(self.sizes) == self.num_fetched else None

    def hours_on_gpus(self, num_gpus: int) -> float | None:
        """Hours on so many H100s, by the engine's own plan; loads and fetches included."""
        if self.flops is None or not self.sizes:
            return None
        study, fetched = self.study, bool(self.num_fetched)
        corpora = tuple(
            CorpusWork(name, study.measures, study.num_instances, study.sequence_length)
            for name in study.data
        )
        works = [CheckpointWork(index, corpora) for index in range(len(self.sizes))]
        tokens_per_s = _EFFICIENCY * H100_FLOPS_PER_S[_gpu_precision(study)] / self.flops
        load_s = sum(self.sizes) / len(self.sizes) / _bytes_per_s(fetched)
        items = plan_items(works, num_gpus, load_tokens(gpu=True, fetched=fetched))
        return makespan(items, num_gpus, load_s * tokens_per_s) / tokens_per_s / 3600


def measure_scan(study: ScanStudy) -> ScanForecast:
    """Count; the source of the checkpoints is asked for names, sizes and one config.

    Raises:
        CheckpointSpecError: the selection names nothing.
    """
    use_description(study.architecture)
    refs = select_checkpoints(study.checkpoints)
    config = _first_config(refs)
    study = study.of_mixture() if config is not None and is_mixture(config) else study
    store = Store(study.cache_dir)
    fetched = [ref for ref in refs if not store.is_cached(ref)]
    to_fetch, num_guessed = _sizes(fetched)
    sizes = to_fetch if fetched else [ref.size_bytes or 0 for ref in refs]
    num_tokens = study.num_instances * study.sequence_length * len(study.data) * len(refs)
    flops = None if config is None else _flops_per_token(config, study)
    largest = model_bytes(refs, config, study.dtype)
    return ScanForecast(study, refs, sizes, len(fetched), num_guessed, num_tokens, flops, largest)


def _bytes_per_s(fetched: bool) -> float:
    return BYTES_PER_S["fetched" if fetched else "here"]


def _on_gpus(plan: ScanForecast) -> str:
    precision = _gpu_precision(plan.study)
    peak = H100_FLOPS_PER_S[precision]
    fetched = bool(plan.num_fetched)
    shown = []
    for number in _NUM_GPUS:
        hours = plan.hours_on_gpus(number)
        assert hours is not None
        shown.append(f"{hours:.3g} on {number} ({number * hours:.3g} GPU-hours)")
    return (
        f"hours on GPUs in {precision}, assumed to reach {_EFFICIENCY * peak / 1e12:.0f} "
        f"TFLOP/s (60 % of an H100's {peak / 1e12:.0f}) and to {'fetch' if fetched else 'load'} "
        f"{_bytes_per_s(fetched) / 1e6:,.0f} MB/s each: " + ", ".join(shown)
    )


def _first_config(refs: list[CheckpointRef]) -> Any:
    for ref in refs[:5]:
        try:
            return read_config(ref)
        except CheckpointError:
            continue
    return None


def _sizes(refs: list[CheckpointRef]) -> tuple[list[int], int]:
    """Bytes of each checkpoint, and how many of them are guessed.

    A list of URLs has no sizes. The checkpoints of a series are equally large, so the size of one
    stands for the others: 351 requests would take minutes.
    """
    sizes = [ref.size_bytes for ref in refs if ref.size_bytes is not None]
    unknown = [ref for ref in refs if ref.size_bytes is None]
    if not unknown:
        return sizes, 0
    size = size_to_fetch(unknown[0])
    return sizes + [size] * len(unknown) if size else sizes, len(unknown) - 1 if size else 0


def forecast(study: ScanStudy) -> str:
    """The plan of a scan as text: the resolved study, then the figures behind it."""
    check_sources(study)
    plan = measure_scan(study)
    study, refs, sizes = plan.study, plan.refs, plan.sizes
    lines = [
        yaml.safe_dump(
            redact(json.loads(study.model_dump_json(exclude_none=True))), sort_keys=False
        ),
        f"checkpoints: {len(refs)} ({sum(r.duplicate_of is not None for r in refs)} duplicates)",
        f"tokens to score: {plan.num_tokens:,} ({len(study.data)} corpora)",
    ]
    if passes := num_changed_passes(study):
        copy = f"up to {plan.model_bytes:,} bytes of" if plan.model_bytes else "up to a copy of"
        lines.append(
            f"interventions: {passes} more passes over "
            f"{min(study.intervention_instances, study.num_instances):,} instances of each corpus "
            f"per checkpoint, and {copy} original weights in the host memory of each scorer"
        )
    if study.has_wanted_precision:
        counts = ", ".join(map(str, round_strides(study.num_instances)))
        lines.append(
            "the numbers here are for all N instances; the wanted precision may need fewer: rounds "
            f"of up to {counts} instances, each of which loads every checkpoint anew"
        )
    if not plan.num_fetched:
        lines.append("bytes to fetch: 0 (all checkpoints are on this file system)")
    else:
        unknown = plan.num_fetched - len(sizes)
        guessed = f" ({plan.num_guessed} sizes taken to be that of another)"
        if unknown:
            lines.append(
                f"bytes to fetch: not known for {unknown} checkpoints (no server answered)"
            )
        if sizes:
            lines.append(f"bytes to fetch: {sum(sizes):,}{guessed if plan.num_guessed else ''}")
            # Fetched checkpoints stay until the budget needs their room.
            peak = min(study.cache_bytes or sum(sizes), sum(sizes))
            hint = "" if study.cache_bytes else " (all of them; --cache-bytes bounds it)"
            lines.append(f"peak disk per node: {peak:,} bytes{hint}")
    if plan.flops is None:
        lines.append("hours: not known (no checkpoint's config could be read)")
    else:
        # As it would be without other machines, on which `auto` may be something else.
        here = settle_precision(study.model_copy(update={"device": "auto"}), local_gpus)
        speed = measured_speed(here.dtype, products=here.matmul_precision)
        score_s = plan.flops * plan.num_tokens / (_EFFICIENCY * speed.flops_per_s)
        fetch_s = (sum(sizes) if plan.num_fetched else 0) / BYTES_PER_S["fetched"]
        lines.append(
            f"hours with one scorer on this machine's {speed.device}: scoring "
            f"{score_s / 3600:,.2f} ({speed}; 60 % of it assumed), "
            f"fetching {fetch_s / 3600:.2f} (100 MB/s assumed); the two overlap"
        )
        if sizes:
            lines.append(_on_gpus(plan))
        lines.append(_by_dtype(plan.flops * plan.num_tokens))
    return "\n".join(lines)
