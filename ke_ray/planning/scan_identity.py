"""Identity of a scan's results: what two scans must have in common to stand in one folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ke_ray.core.measures import MEASURE_VERSION, interventions_of
from ke_ray.data.corpus import Corpus
from ke_ray.secrets import redact
from ke_ray.studies.identity import affects_result
from ke_ray.studies.own_measures import origins
from ke_ray.studies.scan import ScanStudy

#: Keys that the corpora's hashes, sampling and groups stand for in a scan's identity, and those of
#: which a folder may hold several values.
_BY_CONTENT = (
    *("data", "num_instances", "sequence_length", "sampling", "tokenizer", "eos_token_id"),
    *("kind", "checkpoints", "measures", "own_measures"),
    *("intervention_instances", "noise_seeds"),
)
#: Keys that folders begun before do not have; at their defaults they are left out.
_ADDED_LATER = ("matmul_precision", "precision", "stderr_nats")


def scan_identity(study: ScanStudy, corpora: Mapping[str, Corpus]) -> dict[str, Any]:
    """What changes a result, compared by ``results.scan_identity.check_identity``.

    Unlike other studies', whose folders hold one study each: a scan's folder may get more
    checkpoints, corpora and measures. Corpora count by their content, and so do measures that are
    not ke_ray's own; measures by intervention count with their instances and draws.

    Args:
        study: without ``auto`` in its precision.
    """
    assert "auto" not in (study.dtype, study.matmul_precision)
    own, changes = origins(study.measures), _interventions(study)
    return {
        **({"own_measures": own} if own else {}),
        **({"interventions": changes} if changes else {}),
        "measure_version": MEASURE_VERSION,
        **_settings(study),
        "resuscitation": _resuscitation(study, corpora),
        "architecture": study.architecture and study.architecture.described(),
        "corpora": {name: corpus.sha256 for name, corpus in corpora.items()},
        "sampling": {name: corpus.sampling for name, corpus in corpora.items()},
        "groups": {name: corpus.grouping for name, corpus in corpora.items()},
    }


def _interventions(study: ScanStudy) -> dict[str, str]:
    """What each measure by intervention is taken over."""
    texts = {}
    for name in study.measures:
        kinds = {own.kind for own in interventions_of(name)}
        if kinds:
            draws = f", {study.noise_seeds} draws" if "noise" in kinds else ""
            texts[name] = f"{study.intervention_instances} instances{draws}"
    return texts


def _settings(study: ScanStudy) -> dict[str, Any]:
    """Values of the keys that affect results in other ways than through the corpora's content."""
    return {
        name: getattr(study, name)
        for name, field in type(study).model_fields.items()
        if affects_result(field)
        and name not in _BY_CONTENT
        and not (name in _ADDED_LATER and getattr(study, name) == field.default)
    }


def _resuscitation(study: ScanStudy, corpora: Mapping[str, Corpus]) -> dict[str, Any] | None:
    """The settings, with the source of C̄: the first corpus where they name none."""
    settings = study.resuscitation
    if settings is None:
        return None
    values: dict[str, Any] = redact(settings.model_dump())
    if settings.coefficients is None and settings.control != "attention_temperature":
        values["coefficients"] = f"measured on {next(iter(corpora.values())).sha256}"
    return values
