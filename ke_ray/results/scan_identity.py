"""Which results may stand in one scan folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ke_ray.errors import ResultsError

#: What an identity says of each corpus, and of measures that are not ke_ray's own or intervene.
_BY_NAME = ("corpora", "sampling", "groups", "own_measures", "interventions")


def check_identity(folder: str, stored: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse to mix results that cannot be compared.

    Identities hold what changes a result (dtype, measure version, settings of measures) and, under
    ``corpora``, ``sampling`` and ``groups``, the data hash of each corpus, how its instances were
    drawn and how they form jackknife groups; ``own_measures`` says where measures come from that
    are not ke_ray's own, and ``interventions`` what those by intervention are taken over. New
    corpora and measures may be added; nothing may differ. A folder without ``sampling`` and
    ``groups`` has the first instances of its sources, in equal groups.

    Raises:
        ResultsError: names the first difference.
    """
    for key in sorted({*stored, *current} - set(_BY_NAME)):
        if stored.get(key) != current.get(key):
            raise ResultsError(
                f"'{folder}' holds results with {key} = {stored.get(key)!r}, this run has "
                f"{current.get(key)!r}: they cannot be mixed. Choose another output folder, or "
                "repeat the earlier settings."
            )
    for name, origin in current.get("own_measures", {}).items():
        before = stored.get("own_measures", {}).get(name, origin)
        if before != origin:
            raise ResultsError(
                f"'{folder}' holds results of the measure '{name}' as declared in {before:.19}…, "
                f"this run's is in {origin:.19}…: they cannot be mixed. Give the changed measure "
                "another name, or choose another output folder."
            )
    for name, extent in current.get("interventions", {}).items():
        before = stored.get("interventions", {}).get(name, extent)
        if before != extent:
            raise ResultsError(
                f"'{folder}' holds results of the measure '{name}' over {before}, this run's are "
                f"over {extent}: they cannot be mixed. Repeat the earlier intervention_instances "
                "and noise_seeds, or choose another output folder."
            )
    for name, sha256 in current["corpora"].items():
        if name not in stored["corpora"]:
            continue
        before = stored["corpora"][name]
        old, new = (keys.get("sampling", {}).get(name, "first") for keys in (stored, current))
        if new == "spread" and old != "spread":
            raise ResultsError(
                f"'{folder}' holds results of the first instances of corpus '{name}', this run "
                "draws instances spread over the whole source, which have smaller and truer "
                "errors: they cannot be mixed. Choose another output folder, or continue with "
                "'sampling: first' (--sampling first)."
            )
        old, new = (keys.get("groups", {}).get(name, "equal") for keys in (stored, current))
        if before == sha256 and old != new:
            raise ResultsError(
                f"'{folder}' holds results of corpus '{name}' with groups that are {old}, this "
                f"run's are {new}: their errors cannot be paired. Choose another output "
                "folder."
            )
        if before != sha256:
            raise ResultsError(
                f"'{folder}' holds results of corpus '{name}' with data_sha256 {before[:12]}…, "
                f"this run's corpus '{name}' has {sha256[:12]}…: other documents, tokenizer, "
                "number of instances, sequence length or sampling. Choose another output folder "
                "or another corpus name."
            )


def merge_identities(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of a folder with the corpora of both; the rest is the same."""
    merged = {**one, **other}
    for key in _BY_NAME:
        if key in merged:
            merged[key] = {**one.get(key, {}), **other.get(key, {})}
    return merged
