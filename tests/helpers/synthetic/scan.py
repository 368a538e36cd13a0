"""A scan folder: measures, leave-one-out values and coefficients of simulated models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from safetensors.numpy import save_file

from synthetic.files import manifest, write

UNITS = {
    "knowledge_entropy": "nats",
    "attention_entropy": "nats",
    "next_token_entropy": "nats",
    "effective_memories": "memories",
    "participation_ratio": "fraction",
    "gini": "fraction",
    "top_k_mass": "fraction",
    "dormant_share": "fraction",
}
SUMMED = {"knowledge_entropy", "attention_entropy", "effective_memories"}


def layer_measures(mean: np.ndarray) -> dict[str, np.ndarray]:
    """Measures of mean coefficients [..., n_layers, d_mlp], each [..., n_layers]."""
    p = mean / mean.sum(-1, keepdims=True)
    m = p.shape[-1]
    entropy = -(p * np.log(p)).sum(-1)
    ordered = np.sort(p, -1)
    rank = np.arange(1, m + 1)
    return {
        "knowledge_entropy": entropy,
        "effective_memories": np.exp(entropy),
        "participation_ratio": 1.0 / (p**2).sum(-1) / m,
        "gini": (2 * (rank * ordered).sum(-1) - (m + 1)) / m,
        "top_k_mass": ordered[..., -max(1, m // 100) :].sum(-1),
        "dormant_share": (p * m <= 0.1).mean(-1),
    }


def make_scan(
    folder: Path,
    *,
    steps: list[int] | None = None,
    n_layers: int = 4,
    d_mlp: int = 64,
    corpora: tuple[str, ...] = ("biographies", "held_out"),
    num_instances: int = 70,
    seed: int = 0,
    failed: tuple[str, ...] = (),
    data_salt: str = "",
) -> Path:
    """A scan folder; ``failed`` names extra checkpoints that could not be loaded."""
    rng = np.random.default_rng(seed)
    steps = steps if steps is not None else [0, 10, 20, 40, 80, 160, 320, 640]
    groups = min(64, num_instances)
    sizes = np.bincount(np.arange(num_instances) * groups // num_instances, minlength=groups)
    rows: list[dict] = []
    replicates: list[dict] = []
    (folder / "coefficients").mkdir(parents=True, exist_ok=True)
    scale = rng.normal(size=(n_layers, d_mlp))
    noise = {c: 0.05 * rng.normal(size=(groups, n_layers, d_mlp)) for c in corpora}
    for place, step in enumerate(steps):
        spread = 0.4 + 0.8 * place / max(1, len(steps) - 1) * np.linspace(0.6, 1.2, n_layers)
        for number, corpus in enumerate(corpora):
            mean = np.exp(
                scale * (spread + 0.05 * number)[:, None] + noise[corpus]
            )  # [G, n_layers, d_mlp]
            pooled = np.average(mean, axis=0, weights=sizes)
            left_out = (pooled * num_instances - mean * sizes[:, None, None]) / (
                num_instances - sizes
            )[:, None, None]
            values = layer_measures(pooled)
            loo = layer_measures(left_out)
            attention = 3.0 - 0.1 * place + 0.02 * rng.normal(size=(groups, n_layers))
            for name, per_group in (("attention_entropy", attention),):
                values[name] = np.average(per_group, axis=0, weights=sizes)
                loo[name] = _left_out(per_group, sizes)
            next_token = 5.0 - 0.3 * place + 0.02 * rng.normal(size=(groups, 1))
            common = {
                "checkpoint": f"step{step}",
                "step": step,
                "revision": None,
                "corpus": corpus,
                "num_instances": num_instances,
                "num_tokens": num_instances * 128,
                "weights_sha256": f"{step:064x}",
                "data_sha256": f"{abs(hash_of(corpus + data_salt)):064x}",
                "duplicate_of": None,
                "status": "ok",
                "error": None,
            }
            for measure, value in values.items():
                combine = np.sum if measure in SUMMED else np.mean
                total, total_loo = combine(value), combine(loo[measure], axis=-1)
                _emit(rows, replicates, common, measure, None, total, total_loo, sizes)
                for layer in range(n_layers):
                    _emit(
                        rows,
                        replicates,
                        common,
                        measure,
                        layer,
                        value[layer],
                        loo[measure][:, layer],
                        sizes,
                    )
            total = np.average(next_token[:, 0], weights=sizes)
            _emit(
                rows,
                replicates,
                common,
                "next_token_entropy",
                None,
                total,
                _left_out(next_token, sizes)[:, 0],
                sizes,
            )
            suffix = "" if number == 0 else f"@{corpus}"
            save_file(
                {"mean_abs_coefficients": pooled.astype(np.float32)},
                folder / "coefficients" / f"step{step}{suffix}.safetensors",
            )
    rows += [
        {
            "checkpoint": name,
            "step": None,
            "corpus": corpora[0],
            "status": "failed",
            "error": f"{name}: the file model.safetensors is truncated",
        }
        for name in failed
    ]
    write(folder / "entropy.parquet", rows, ENTROPY_SCHEMA)
    write(folder / "replicates.parquet", replicates, REPLICATES_SCHEMA)
    manifest(
        folder,
        "scan",
        n_layers=n_layers,
        d_mlp=d_mlp,
        measures=list(UNITS),
        top_k_fraction=0.01,
        dormant_threshold=0.1,
        identity={"corpora": {c: f"{abs(hash_of(c + data_salt)):064x}" for c in corpora}},
        corpora={
            corpus: {
                "source": f"{corpus}.jsonl",
                "sha256": f"{abs(hash_of(corpus + data_salt)):064x}",
                "num_instances": num_instances,
                "sequence_length": 128,
                "num_tokens": num_instances * 128,
            }
            for corpus in corpora
        },
    )
    return folder


ENTROPY_SCHEMA = pa.schema(
    [
        ("checkpoint", pa.string()),
        ("step", pa.int64()),
        ("revision", pa.string()),
        ("corpus", pa.string()),
        ("layer", pa.int32()),
        ("measure", pa.string()),
        ("value", pa.float64()),
        ("stderr", pa.float64()),
        ("unit", pa.string()),
        ("num_instances", pa.int64()),
        ("num_tokens", pa.int64()),
        ("weights_sha256", pa.string()),
        ("data_sha256", pa.string()),
        ("duplicate_of", pa.string()),
        ("status", pa.string()),
        ("error", pa.string()),
    ]
)
REPLICATES_SCHEMA = pa.schema(
    [
        ("checkpoint", pa.string()),
        ("step", pa.int64()),
        ("corpus", pa.string()),
        ("layer", pa.int32()),
        ("measure", pa.string()),
        ("group", pa.int32()),
        ("value", pa.float64()),
    ]
)


def hash_of(text: str) -> int:
    return int.from_bytes(text.encode()[:24], "big")


def _left_out(per_group: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    total = (per_group * sizes[:, None]).sum(0)
    return (total - per_group * sizes[:, None]) / (sizes.sum() - sizes)[:, None]


def _emit(rows, replicates, common, measure, layer, value, left_out, sizes) -> None:
    groups = len(sizes)
    h = sizes.sum() / sizes
    centre = groups * value - ((1 - 1 / h) * left_out).sum()
    pseudo = h * value - (h - 1) * left_out
    stderr = np.sqrt(((pseudo - centre) ** 2 / (h - 1)).sum() / groups)
    rows.append(
        common
        | {
            "layer": layer,
            "measure": measure,
            "value": float(value),
            "stderr": None if measure == "dormant_share" else float(stderr),
            "unit": UNITS[measure],
        }
    )
    if measure == "dormant_share":  # a count of memories has no error
        return
    replicates.extend(
        {
            "checkpoint": common["checkpoint"],
            "step": common["step"],
            "corpus": common["corpus"],
            "layer": layer,
            "measure": measure,
            "group": group,
            "value": float(left_out[group]),
        }
        for group in range(groups)
    )
