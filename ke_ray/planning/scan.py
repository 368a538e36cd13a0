"""The plan of a scan, made before Ray starts.

Everything that can be wrong with a request is noticed here, before anything is written: the SPEC,
the data, the tokenizer, the identity of the output folder.
"""

from __future__ import annotations

import itertools
import logging
import time
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from ke_ray import storage
from ke_ray.checkpoints.find.catalog import list_checkpoints
from ke_ray.checkpoints.reference import CheckpointRef, position
from ke_ray.core.measures import needing_head
from ke_ray.data.corpus import Corpus, build_corpus, source_kind
from ke_ray.data.hub_dataset import check_hub_source
from ke_ray.data.tokenizer import load_tokenizer
from ke_ray.errors import (
    CheckpointError,
    DataError,
    ResultsError,
    UnsupportedArchitectureError,
)
from ke_ray.models.architectures import is_mixture, lacks_head, use_description
from ke_ray.models.configuration import read_outline
from ke_ray.planning.scan_identity import scan_identity
from ke_ray.planning.scan_items import CheckpointWork
from ke_ray.planning.scan_precision import Gpus, check_precision, local_gpus, settle_precision
from ke_ray.planning.scan_rounds import (
    current_round,
    describe_corpus,
    missing_works,
    next_round,
)
from ke_ray.results import ScanFolder, new_manifest, read_manifest
from ke_ray.results.scan_identity import check_identity, merge_identities
from ke_ray.secrets import redact
from ke_ray.storage.ownership import check_claim
from ke_ray.studies.own_measures import described as described_measures
from ke_ray.studies.parts import CheckpointSelection
from ke_ray.studies.scan import ScanStudy

log = logging.getLogger(__name__)

_CONFIGS_READ = 20
_ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass
class ScanSetup:
    """A scan that is ready to run.

    Attributes:
        refs: all checkpoints of the SPEC, in training order.
        whole: all N instances of the corpora, by name.
        corpora: those to score now: all, or those of the current round of a wanted precision.
        folder: the output folder with its manifest (not yet written).
        works: what is missing, one entry per checkpoint that is not finished.
        num_skipped: checkpoints that were finished already.
        model_bytes: of the largest model in the dtype it is scored in; 0 where no size is known.
        earlier: the manifest's entries of checkpoints of earlier scans into this folder, by name.
        changed: checkpoints whose results in the folder are of other weights, in order.
        duration_s: how long the set-up took.
    """

    study: ScanStudy
    refs: list[CheckpointRef]
    whole: dict[str, Corpus]
    corpora: dict[str, Corpus]
    folder: ScanFolder
    works: list[CheckpointWork]
    num_skipped: int
    model_bytes: int
    earlier: dict[str, dict[str, Any]]
    changed: list[str]
    duration_s: float = 0.0

    @property
    def steps_rise(self) -> bool:
        """Whether the steps that are known rise along the listing, so that one axis fits them."""
        steps = [ref.step for ref in self.refs if ref.step is not None and not ref.duplicate_of]
        return all(a < b for a, b in itertools.pairwise(steps))

    def checkpoint_entries(self) -> list[dict[str, Any]]:
        """The manifest's list: checkpoints of earlier runs into this folder, and these."""
        entries = dict(self.earlier)
        for ref in self.refs:
            entry = _entry(ref)
            # A listing without fingerprints (a bare URL, no network) takes nothing away.
            earlier = self.earlier.get(ref.name, {}).get("weights_fingerprint")
            entry["weights_fingerprint"] = entry["weights_fingerprint"] or earlier
            entries[ref.name] = entry
        return list(entries.values())


def select_checkpoints(selection: CheckpointSelection) -> list[CheckpointRef]:
    """The checkpoints of a study's ``checkpoints`` group, in training order."""
    return list_checkpoints(selection.spec, **selection.options())


def check_sources(study: ScanStudy) -> None:
    """Refuse data that can never be read before checkpoints are listed.

    Raises:
        DataError: names a source that works.
    """
    for source in study.data.values():
        check_hub_source(source)


def prepare_scan(given: ScanStudy, gpus: Gpus = local_gpus) -> ScanSetup:
    """List, pack and compare with what the output folder has.

    A command claims the folder (``storage.ownership``) before, and until it has run the scan.

    Args:
        given: the study.
        gpus: what GPUs the scan has; asked last, and only where the study's precision is ``auto``.

    Raises:
        CheckpointSpecError, DataError, ResultsError, StorageError: see there; nothing is written.
    """
    started = time.monotonic()
    check_claim(given.output, "scan")
    check_sources(given)
    use_description(given.architecture)
    refs = select_checkpoints(given.checkpoints)
    config, ref = _first_config(refs, given)
    given = _without_head(given.of_mixture() if is_mixture(config) else given, config, ref)
    _check_series(given, refs, config, ref)
    whole = _build_corpora(given, config, ref)
    study = settle_precision(given, gpus)
    identity = scan_identity(study, whole)
    folder, earlier, described = _open_output(given, study, identity)
    changed = _changed_weights(study.output, earlier, refs)
    setup = ScanSetup(
        study,
        refs,
        whole,
        {},
        folder,
        [],
        0,
        model_bytes(refs, config, study.dtype),
        earlier,
        changed,
    )
    _enter_round(setup, current_round(study, whole, described))
    if not setup.works:
        go_on(setup)
    folder.manifest["checkpoints"] = setup.checkpoint_entries()
    storage.check_writable(study.output)
    setup.duration_s = time.monotonic() - started
    return setup


def go_on(setup: ScanSetup, failed: Collection[str] = ()) -> bool:
    """Enter the next round of a wanted precision that has work; False where the scan is over.

    Args:
        failed: checkpoints to leave as they are.
    """
    while corpora := next_round(setup.study, setup.whole, setup.corpora, setup.folder):
        _enter_round(setup, corpora)
        setup.works = [work for work in setup.works if setup.refs[work.index].name not in failed]
        if setup.works:
            return True
    return False


def _enter_round(setup: ScanSetup, corpora: dict[str, Corpus]) -> None:
    """Set what is to be scored, and have the manifest say so."""
    study, folder = setup.study, setup.folder
    instances = {name: corpus.sha256 for name, corpus in corpora.items()}
    finished = folder.finished(instances if study.has_wanted_precision else None)
    finished = {key: names for key, names in finished.items() if key[0] not in setup.changed}
    setup.corpora = corpora
    setup.works = list(missing_works(study, setup.refs, corpora, finished))
    setup.num_skipped = len(setup.refs) - len(setup.works)
    described = {name: describe_corpus(corpus) for name, corpus in corpora.items()}
    folder.manifest["corpora"] = folder.manifest["corpora"] | described


def _without_head(study: ScanStudy, config: Any, ref: CheckpointRef | None) -> ScanStudy:
    """The study for checkpoints without language-model head: no next-token entropy by default.

    Raises:
        UnsupportedArchitectureError: the study itself names a measure that needs the head.
    """
    lacking = needing_head(study.measures)
    if ref is None or not lacking or not lacks_head(config):
        return study
    names = " and ".join(lacking)
    problem = (
        f"'{ref.label}' is a base model without language-model head (its config names "
        f"{', '.join(config.architectures)}), so it has no {names}"
    )
    if "measures" in study.model_fields_set:
        raise UnsupportedArchitectureError(
            f"{problem}. Leave {names} out of the measures, or give checkpoints that "
            "AutoModelForCausalLM saved."
        )
    log.warning("%s; the other default measures are scored.", problem)
    measures = tuple(name for name in study.measures if name not in lacking)
    return study.model_copy(update={"measures": measures})


def _open_output(
    given: ScanStudy, study: ScanStudy, identity: dict[str, Any]
) -> tuple[ScanFolder, dict[str, dict[str, Any]], dict[str, Any]]:
    """The output folder, and of earlier scans into it the checkpoints and corpora by name."""
    manifest = new_manifest("scan", study.model_dump(mode="json")) | {"id": uuid.uuid4().hex}
    own = described_measures(study.measures)
    if not storage.exists(storage.join(study.output, "manifest.json")):
        manifest |= {"identity": identity, "corpora": {}, "measures": list(study.measures)}
        manifest |= {"own_measures": own} if own else {}
        return ScanFolder(study.output, manifest), {}, {}
    before = read_manifest(study.output, "scan")
    check_precision(study.output, before["identity"], given, study)
    check_identity(study.output, before["identity"], identity)
    merged = merge_identities(before["identity"], identity)
    manifest |= {
        "created_at": before["created_at"],
        "id": before.get("id", manifest["id"]),
        "identity": merged,
        "corpora": before["corpora"],
        "measures": list(dict.fromkeys([*before["measures"], *study.measures])),
    }
    if own := {**before.get("own_measures", {}), **own}:
        manifest["own_measures"] = own
    earlier = {entry["name"]: entry for entry in before.get("checkpoints", [])}
    return ScanFolder(study.output, manifest), earlier, before["corpora"]


def _changed_weights(
    output: str, earlier: dict[str, dict[str, Any]], refs: Sequence[CheckpointRef]
) -> list[str]:
    """Compare checkpoints with those of the same name in the folder.

    Same weight files, or files at the same location that cannot be compared: finished work stands.
    Other files at the same location: returned, to be done again from scratch. Another location and
    not the same files: refused.
    """
    changed = []
    for ref in refs:
        entry = earlier.get(ref.name)
        if entry is None:
            continue
        before, given = entry["weights_fingerprint"], ref.weights_fingerprint
        if before is not None and before == given:
            continue
        if (entry["location"], entry["revision"]) != (redact(ref.location), ref.revision):
            raise ResultsError(
                f"'{output}' holds results of a checkpoint '{ref.name}' from {entry['location']}, "
                f"this scan has one of that name from {ref.label}: other weights under one name. "
                "Choose another output folder."
            )
        if before is not None and given is not None:
            changed.append(ref.name)
    return changed


def _entry(ref: CheckpointRef) -> dict[str, Any]:
    return {
        "name": ref.name,
        "location": redact(ref.location),
        "revision": ref.revision,
        "commit": ref.commit,
        **position(ref),
        "weights_fingerprint": ref.weights_fingerprint,
        "size_bytes": ref.size_bytes,
    }


def model_bytes(refs: Sequence[CheckpointRef], config: Any, dtype: str) -> int:
    """Of the largest model in the dtype it is scored in (auto: float32); 0 where none is known."""
    stored = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or "float32"
    stored_item_bytes = _ITEM_BYTES.get(str(stored).removeprefix("torch."), 4)
    largest = max((ref.size_bytes or 0 for ref in refs), default=0)
    return largest * _ITEM_BYTES.get(dtype, 4) // stored_item_bytes


def _build_corpora(study: ScanStudy, config: Any, ref: CheckpointRef | None) -> dict[str, Corpus]:
    vocab_size = getattr(config, "vocab_size", None)
    if ref is not None:
        _check_positions(study, config, ref)
    eos_token_id = study.eos_token_id
    if eos_token_id is None:
        eos_token_id = getattr(config, "eos_token_id", None)
        if isinstance(eos_token_id, list):
            eos_token_id = eos_token_id[0] if eos_token_id else None
    tokenizer = None
    corpora = {}
    for name, source in study.data.items():
        if tokenizer is None and source_kind(source) == "documents":
            tokenizer = _tokenizer(study, ref)
        corpora[name] = build_corpus(
            name,
            source,
            num_instances=study.num_instances,
            sequence_length=study.sequence_length,
            tokenizer=tokenizer,
            eos_token_id=eos_token_id,
            vocab_size=vocab_size,
            sampling=study.sampling,
        )
    return corpora


def _first_config(
    refs: Sequence[CheckpointRef], study: ScanStudy
) -> tuple[Any, CheckpointRef | None]:
    """The config of the first checkpoint that can be scored; others become failed rows.

    Raises:
        CheckpointError: none can be read, and documents need an end-of-text id or tokenizer of it.
        UnsupportedArchitectureError: there are configs, and none can be scored.
    """
    refused: UnsupportedArchitectureError | None = None
    broken: CheckpointError | None = None
    for ref in refs[:_CONFIGS_READ]:
        try:
            return read_outline(ref), ref
        except UnsupportedArchitectureError as error:
            refused = refused or error
        except CheckpointError as error:
            broken = broken or error
    if refused is not None:
        raise refused
    needed = study.eos_token_id is None or study.tokenizer is None
    if (
        broken is not None
        and needed
        and any(source_kind(source) == "documents" for source in study.data.values())
    ):
        raise broken
    return None, None


def _check_series(
    study: ScanStudy, refs: Sequence[CheckpointRef], config: Any, first: CheckpointRef | None
) -> None:
    """Every series reads the same token ids: refuse those that cannot, warn of other vocabularies.

    Raises:
        DataError: a series has fewer positions than the instances are long.
    """
    if len({ref.series for ref in refs}) < 2:
        return
    for ref in {ref.series: ref for ref in reversed(refs)}.values():
        try:
            own = read_outline(ref)
        except (CheckpointError, UnsupportedArchitectureError):
            continue  # its rows will say so
        _check_positions(study, own, ref)
        vocab_size, own_size = getattr(config, "vocab_size", None), own.vocab_size
        if first is not None and own_size != vocab_size:
            log.warning(
                "'%s' has a vocabulary of %s, '%s' one of %s, but all are scored on the same token "
                "ids. If their tokenizers differ, scan each series by itself.",
                *(first.label, vocab_size, ref.label, own_size),
            )


def _check_positions(study: ScanStudy, config: Any, ref: CheckpointRef) -> None:
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and study.sequence_length > positions:
        raise DataError(
            f"sequence_length is {study.sequence_length}, but '{ref.label}' has {positions} "
            f"positions; lower sequence_length to {positions} or less."
        )


def _tokenizer(study: ScanStudy, ref: CheckpointRef | None) -> Tokenizer:
    if study.tokenizer is not None:
        return load_tokenizer(study.tokenizer)
    source = None
    if ref is not None:
        source = ref.repo or (ref.location if ref.format == "hf" else None)
    if source is None or (
        storage.is_local(source)
        and storage.local_path(source).is_dir()
        and not storage.exists(storage.join(source, "tokenizer.json"))
    ):
        raise DataError(
            "The data are documents and the checkpoints bring no tokenizer.json; give one with "
            "--tokenizer (a tokenizer.json, a folder, or a Hub repo). AutoTokenizer."
            "from_pretrained(FOLDER).save_pretrained(FOLDER) makes one of other tokenizer files."
        )
    if ref and ref.repo and ref.revision:
        source = f"{source}@{ref.revision}" + (f":{ref.subfolder}" if ref.subfolder else "")
    return load_tokenizer(source)
