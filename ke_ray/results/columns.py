"""Columns of all result tables, declared once.

Parquet schemas, sweep objectives, MLflow's metric names, titles in tables and figures, and the
tables of ``docs/results.md`` derive from here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow

from ke_ray.results.column import Column, Direction

_CHECKPOINT = Column("checkpoint", "string", "name of the checkpoint, unique in the folder")
_STEP = Column(
    "step",
    "int64",
    "pretraining step; null where no name gives it; in some series each stage starts again",
    "steps",
)
_TOKENS = Column("tokens", "int64", "pretraining tokens so far, over all stages", "tokens")
_WORDS = Column("words", "int64", "words of pretraining text so far, where the name counts words")
_STAGE = Column("stage", "int64", "number of the stage of pretraining, where the name has one")
_STAGE_LABEL = Column("stage_label", "string", "the stage as the name has it")
_BRANCH = Column("branch", "string", "of runs from one checkpoint: which, where the name says it")
#: Where a checkpoint stands (``ke_ray.core.position.POSITION``).
_POSITION = (
    *(_STEP, _TOKENS, _WORDS, _STAGE, _STAGE_LABEL),
    Column("seed", "string", "seed of pretraining, where a name has one"),
    _BRANCH,
)
_RUN = Column("run", "string", "name of the training run")
_UPDATE = Column("step", "int64", "updates so far", "steps")
_SETTING = Column("setting", "string", "`once` or `paraphrase`")
_LEVEL = Column("level", "string", "`memorization`, `semantic` or `compositional`")
_LAYER = Column("layer", "int32", "0 … L−1; null for the total")
_STATUS = Column("status", "string", "`ok` or `failed`")
_ERROR = Column("error", "string", "why it failed")
_SUMMED_LOGPROB = Column(
    "logprob_summed", "float64", "log probability of the target, summed over its tokens", "nats"
)


def _result(
    name: str,
    doc: str,
    unit: str,
    title: str,
    direction: Direction | None = None,
    needs: str | None = None,
) -> Column:
    """A number that a run ends with."""
    return Column(name, "float64", doc, unit, title, direction, needs)


def _interval(name: str, *about: Any) -> tuple[Column, Column, Column]:
    """A number that a run ends with and the ends of its 95 % interval."""
    column = _result(name, *about)
    low = Column(f"{name}_low", "float64", "low end of its 95 % interval", column.unit)
    high = Column(f"{name}_high", "float64", "high end of its 95 % interval", column.unit)
    return column, low, high


_ENTROPY = (
    _CHECKPOINT,
    *_POSITION,
    Column("revision", "string", "revision on the Hub"),
    Column("corpus", "string", "name given by `--data NAME=…`"),
    _LAYER,
    Column("measure", "string", "see below"),
    Column("value", "float64", "the measure, in `unit`; null where `reason` says why"),
    Column("stderr", "float64", "jackknife error over up to 64 groups of instances"),
    Column("unit", "string", "of the measure: `nats`, `memories`, `fraction`, …"),
    Column("num_instances", "int64", "instances that the value is over", "instances"),
    Column("num_tokens", "int64", "real tokens that the value is over", "tokens"),
    Column("weights_sha256", "string", "canonical: equal for all layouts of the same weights"),
    Column("series", "string", "architecture and sizes; checkpoints of one make a curve"),
    Column("n_layers", "int32", "layers L"),
    Column("d_mlp", "int32", "memories of the layer; of a total, of each layer, null if unequal"),
    Column("data_sha256", "string", "fingerprint of the real token ids"),
    Column("reason", "string", "why the measure has no meaning at the layer; null where it has"),
    Column("duplicate_of", "string", "earliest checkpoint with the same weights"),
    _STATUS,
    Column("error", "string", "why it failed; such a checkpoint has one row per corpus"),
)

_REPLICATES = (
    _CHECKPOINT,
    *_POSITION,
    Column("corpus", "string", "name of the corpus"),
    _LAYER,
    Column("measure", "string", "see below"),
    Column("group", "int32", "the jackknife group that is left out"),
    Column("value", "float64", "the measure without that group"),
)

_EXPERTS = (
    _CHECKPOINT,
    *_POSITION,
    Column("corpus", "string", "name of the corpus"),
    Column("layer", "int32", "0 … L−1"),
    Column("expert", "int32", "0 … E−1, and the shared expert after them; 0 in a dense layer"),
    Column("num_memories", "int32", "memories of the expert; C̄ˡ has them in this order"),
    Column("load", "float64", "share of tokens routed to the expert; 1 where all are", "fraction"),
    Column("mass", "float64", "π_e, its share of ΣC̄ˡ", "fraction"),
    Column("entropy_nats", "float64", "H_e; null where no token was routed to it", "nats"),
)

_WEIGHTS = (
    _CHECKPOINT,
    *_POSITION,
    Column("layer", "int32", "0 … L−1"),
    Column("part", "string", "`ffn` or `attention`"),
    Column("matrix", "string", "name within the layer, such as `mlp.down_proj`"),
    Column("num_rows", "int64", "as stored"),
    Column("num_columns", "int64", "as stored"),
    Column("frobenius_norm", "float64", "√(Σσ²)", "", "Frobenius norm"),
    Column("spectral_norm", "float64", "σ₁", "", "Spectral norm"),
    Column(
        "condition_number",
        "float64",
        "σ₁/σ_n, n the smaller size; null where rounding decides it",
        "",
        "Condition number",
    ),
    Column("stable_rank", "float64", "Σσ²/σ₁²", "", "Stable rank"),
    Column("per", "float64", "exp(H(σ/Σσ))/n", "fraction", "PER"),
    Column(
        "distance_from_first",
        "float64",
        "Frobenius norm of the change since the first checkpoint of the run; null there",
        "",
        "Distance from the first",
    ),
    Column(
        "distance_from_previous",
        "float64",
        "the same since the checkpoint before",
        "",
        "Distance from the previous",
    ),
    Column("first_checkpoint", "string", "what `distance_from_first` is from"),
    Column("previous_checkpoint", "string", "what `distance_from_previous` is from"),
    _STATUS,
    Column("error", "string", "why it failed; such a checkpoint has one row"),
)

_COMPARISON = (
    Column("from_checkpoint", "string", "the earlier of two checkpoints, or of the first folder"),
    Column("from_step", "int64", "its pretraining step", "steps"),
    Column("from_corpus", "string", "the corpus that it was scored on"),
    Column("to_checkpoint", "string", "the later of the two, or of the second folder"),
    Column("to_step", "int64", "its pretraining step", "steps"),
    Column("to_corpus", "string", "the corpus that it was scored on"),
    Column("layer", "int32", "0 … L−1; null for the mean over layers"),
    Column("js_distance", "float64", "root of the divergence", "√nats", "Jensen–Shannon distance"),
    Column("cosine", "float64", "of the two C̄", "", "Cosine"),
    Column("rank_correlation", "float64", "Spearman's ρ of the two C̄", "", "Rank correlation"),
    Column(
        "top_overlap",
        "float64",
        "share of the 1 % most used memories that both have",
        "fraction",
        "Overlap of the top 1 %",
    ),
)

_RELATION = (
    Column(
        "measure",
        "string",
        "of the starts, in total over layers; of weights `ffn_` or `attention_` and a column of "
        "`weights.parquet`, mean over matrices",
    ),
    Column("outcome", "string", "`acquisition`, `forgetting`, `knowledge_change` (ΔK), …"),
    Column("corpus", "string", "that the measure was taken on"),
    Column("kind", "string", "`pearson`, or `spearman` (ranks within a series)"),
    Column("fixed", "string", "what is held fixed: empty, `step`, or `step, loss`"),
    Column("num_starts", "int64", "points: distinct starts, each the mean over seeds and studies"),
    Column("num_series", "int64", "pretraining runs, each with its own intercept"),
    Column("r", "float64", "correlation; null where too few points are left"),
    Column(
        "low",
        "float64",
        "low end of its 95 % interval (Fisher's); null below two degrees of freedom",
    ),
    Column("high", "float64", "high end of that interval"),
    Column("p", "float64", "two-sided, t test"),
    Column("p_holm", "float64", "adjusted for all measures and outcomes of this kind (Holm)"),
)

_RESUSCITATION = (
    _CHECKPOINT,
    Column("corpus", "string", "name of the corpus"),
    *_POSITION,
    _LAYER,
    Column("before_nats", "float64", "knowledge entropy of the given C̄", "nats"),
    Column("predicted_nats", "float64", "of u · C̄, the inputs of every layer held fixed", "nats"),
    Column("measured_nats", "float64", "of this scan", "nats"),
    Column("ratio", "float64", "resuscitation ratio", "fraction"),
    Column("factor", "float64", "amplifying factor"),
    Column("control", "string", "null for Algorithm 1"),
    Column("coefficients", "string", "where C̄ came from"),
    Column("coefficients_verified", "bool_", "whether they are of the very weights"),
)

_TRAIN = (
    _RUN,
    _UPDATE,
    Column("num_tokens", "int64", "tokens so far", "tokens"),
    Column("loss", "float64", "mean over the batch", "nats per token"),
    Column("learning_rate", "float64", "of this update"),
    Column("grad_norm", "float64", "global L2 norm before clipping"),
    Column("tokens_per_s", "float64", "", "tokens/s"),
    Column("elapsed_s", "float64", "since the run started", "s"),
)

_RUNS = (
    _RUN,
    Column("checkpoint", "string", "the start"),
    Column("step", "int64", "pretraining step of the start", "steps"),
    Column("tokens", "int64", "pretraining tokens of the start, over all stages", "tokens"),
    _WORDS,
    _STAGE,
    _STAGE_LABEL,
    Column("pretraining_seed", "string", "seed of pretraining, where a name has one"),
    _BRANCH,
    Column("seed", "int64", "of the rows drawn and their order"),
    Column("corpus", "string", "name of the training corpus"),
    Column("resuscitation_ratio", "float64", "null: not resuscitated"),
    Column("amplifying_factor", "float64", "null: not resuscitated"),
    Column("control", "string", "null for Algorithm 1"),
    _STATUS,
    _ERROR,
    *_interval(
        "acquisition",
        "A = (K after − K before) / |K before|",
        "fraction",
        "Acquisition A",
        "maximize",
        "injection",
    ),
    _result(
        "acquisition_summed",
        "A of log probabilities summed over target tokens",
        "fraction",
        "",
        "maximize",
        "injection",
    ),
    *_interval(
        "forgetting",
        "F = (P before − P after) / P before",
        "fraction",
        "Forgetting F",
        "minimize",
        "downstream",
    ),
    *_interval(
        "acquisition_vs_original",
        "A against the start before resuscitation",
        "fraction",
        "A against the original start",
        "maximize",
        "injection",
    ),
    *_interval(
        "forgetting_vs_original",
        "F against the start before resuscitation",
        "fraction",
        "F against the original start",
        "minimize",
        "downstream",
    ),
    Column("probe_logprob_original", "float64", "K before resuscitation", "nats per target token"),
    Column("probe_logprob_before", "float64", "K", "nats per target token", "K before"),
    _result(
        "probe_logprob_after", "K", "nats per target token", "K after", "maximize", "injection"
    ),
    Column("downstream_original", "float64", "P before resuscitation", "fraction"),
    Column("downstream_before", "float64", "P, mean accuracy", "fraction", "P before"),
    _result(
        "downstream_after", "P, mean accuracy", "fraction", "P after", "maximize", "downstream"
    ),
    Column("perplexity_before", "float64", "of held-out text", "", "Held-out perplexity before"),
    _result(
        "perplexity_after",
        "of held-out text",
        "",
        "Held-out perplexity after",
        "minimize",
        "held_out",
    ),
    Column("knowledge_entropy_original_nats", "float64", "before resuscitation", "nats"),
    _result(
        "knowledge_entropy_predicted_nats",
        "of the resuscitated start",
        "nats",
        "Knowledge entropy predicted",
    ),
    _result(
        "knowledge_entropy_before_nats",
        "of the start as it is trained",
        "nats",
        "Knowledge entropy before",
        "maximize",
        "entropy",
    ),
    _result(
        "knowledge_entropy_after_nats",
        "of the trained model",
        "nats",
        "Knowledge entropy after",
        "maximize",
        "entropy",
    ),
    Column(
        "measured",
        "string",
        "JSON: measure of `entropy.measures` → its value (over layers) of the trained model",
    ),
    Column("num_steps", "int64", "updates", "steps"),
    Column("num_tokens", "int64", "tokens trained on", "tokens"),
    Column("duration_s", "float64", "", "s"),
    Column("final_checkpoint", "string", "folder of the trained model"),
    Column("mlflow_run_id", "string"),
)

_CHANGE = _result(
    "knowledge_entropy_change_nats",
    "after − before",
    "nats",
    "Change of knowledge entropy",
    "maximize",
    "entropy",
)

#: The columns of ``trials.parquet`` before and after one column per swept key.
TRIAL_KEYS = (
    Column("trial_id", "string"),
    Column("point", "int64", "number of the setting"),
    Column("status", "string", "`ok`, `failed`, or `stopped` by a scheduler"),
    _ERROR,
)

TRIAL_RESULTS = (
    *(column for column in _RUNS if column.name not in ("run", "status", "error")),
    _CHANGE,
    Column("stopped_at_step", "int64", "of a stopped trial", "steps"),
    Column("acquisition_at_stop", "float64", "of a stopped trial, by its probes", "fraction"),
)

_SETTINGS = (
    Column("point", "int64", "number of the setting"),
    Column("params", "string", "its swept keys, as JSON"),
    Column("metric", "string", "an objective of the sweep"),
    Column("direction", "string", "`maximize` or `minimize`"),
    Column("value", "float64", "mean over the finished trials"),
    Column("low", "float64", "low end of its 95 % interval over seeds"),
    Column("high", "float64", "high end of its 95 % interval over seeds"),
    Column("num_ok", "int64", "finished trials"),
    Column("num_failed", "int64", "failed trials"),
    Column("on_front", "bool_", "whether no other setting is better in all objectives"),
)

#: File stem → its columns, in order. A sweep's trials also have one column per swept key.
TABLES: Mapping[str, tuple[Column, ...]] = {
    "entropy": _ENTROPY,
    "replicates": _REPLICATES,
    "experts": _EXPERTS,
    "weights": _WEIGHTS,
    "comparison": _COMPARISON,
    "relation": _RELATION,
    "resuscitation": _RESUSCITATION,
    "train": _TRAIN,
    "runs": _RUNS,
    "probes": (
        _RUN,
        _UPDATE,
        _SETTING,
        _LEVEL,
        Column("num_probes", "int64"),
        Column("logprob_per_token", "float64", "mean per target token", "nats"),
        _SUMMED_LOGPROB,
    ),
    "probe_items": (
        _RUN,
        _UPDATE,
        _SETTING,
        Column("instance", "int64", "the fact"),
        _LEVEL,
        Column("probe", "int64", "number of the probe within its level"),
        Column("num_target_tokens", "int64", "", "tokens"),
        _SUMMED_LOGPROB,
    ),
    "injections": (
        _RUN,
        _UPDATE,
        Column("row", "int64", "of the global batch"),
        _SETTING,
        Column("instance", "int64", "the fact"),
        Column("version", "int64", "0: the original, k: its k-th paraphrase"),
        Column("num_tokens", "int64", "", "tokens"),
    ),
    "dynamics": (
        _RUN,
        _SETTING,
        _LEVEL,
        Column("injection", "int64", "from 1"),
        Column("step", "int64", "of the injection", "steps"),
        Column("num_paragraphs", "int64"),
        Column("baseline_step", "int64", "of the probe before the injection", "steps"),
        Column("lam_step", "int64", "of the local acquisition maximum", "steps"),
        *_interval("effectivity", "ℓ at the maximum − ℓ before", "nats", "Effectivity"),
        Column("decay", "float64", "slope of retainability over ln(lag)"),
    ),
    "retainability": (
        _RUN,
        _SETTING,
        _LEVEL,
        Column("injection", "int64", "from 1"),
        Column("lag", "int64", "steps after the local acquisition maximum", "steps"),
        Column("retainability", "float64", "what is left of the gain", "", "Retainability"),
    ),
    "downstream": (
        _RUN,
        Column("when", "string", "`before`, `after` or `original`"),
        Column("task", "string"),
        Column("metric", "string", "`acc` or `acc_norm`"),
        Column("value", "float64", "accuracy", "fraction"),
        Column("stderr", "float64", "its standard error", "fraction"),
        Column("num_items", "int64"),
    ),
    "perplexity": (
        _RUN,
        Column("when", "string", "`before`, `after` or `original`"),
        Column("corpus", "string", "name of the held-out text"),
        Column("perplexity", "float64"),
        Column("nats_per_token", "float64", "", "nats"),
        Column("num_tokens", "int64", "predicted tokens", "tokens"),
    ),
    "measures": (
        _RUN,
        Column("when", "string", "`before`, `after` or `original`"),
        Column("corpus", "string", "name of the text, `entropy`"),
        _LAYER,
        Column("measure", "string", "of `entropy.measures`"),
        Column("value", "float64", "null where the layer has none"),
        Column("stderr", "float64", "jackknife error; null where there is none"),
        Column("unit", "string"),
    ),
    "trials": (*TRIAL_KEYS, *TRIAL_RESULTS),
    "settings": _SETTINGS,
}

#: Tables of a training run, which all have a column ``run``.
RUN_TABLES = tuple(name for name, columns in TABLES.items() if columns[0] is _RUN)

#: Objectives of sweeps: name → column.
OBJECTIVES: Mapping[str, Column] = {
    column.name: column for column in (*_RUNS, _CHANGE) if column.direction and column.needs
}


def with_branch(table: pyarrow.Table) -> pyarrow.Table:
    """A table of an earlier version, whose branches were numbers of ingredients, as it is now."""
    if "ingredient" not in table.column_names or "branch" in table.column_names:
        return table
    numbers = table["ingredient"].to_pylist()
    branches = [None if number is None else f"ingredient{number:.0f}" for number in numbers]
    return table.append_column("branch", pyarrow.array(branches, pyarrow.string()))


def names(table: str) -> tuple[str, ...]:
    """The columns of a table, in order."""
    return tuple(column.name for column in TABLES[table])


def schema(columns: str | Iterable[Column]) -> pyarrow.Schema:
    """The Parquet schema of a table, or of columns."""
    if isinstance(columns, str):
        columns = TABLES[columns]
    return pyarrow.schema([(column.name, getattr(pyarrow, column.type)()) for column in columns])


def to_table(name: str, rows: Iterable[Mapping[str, Any]]) -> pyarrow.Table:
    """Rows as a table with the schema of ``name``; missing values are null.

    Raises:
        KeyError: a row holds a column that the table does not have.
    """
    rows = [dict(row) for row in rows]
    unknown = {key for row in rows for key in row}.difference(names(name))
    if unknown:
        raise KeyError(f"table '{name}' has no column '{min(unknown)}'")
    return pyarrow.Table.from_pylist(rows, schema=schema(name))
