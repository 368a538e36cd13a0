"""The result folder of a training run that is measured while it goes on: a scan's.

Every measurement is a checkpoint ``stepN`` with a scan's rows, so that reports, comparisons and
tables read it. A run that resumes at step s goes on there: what it measured after s, before it was
stopped, is dropped and measured again.
"""

from __future__ import annotations

import contextvars
import uuid
import weakref
from contextlib import ExitStack
from typing import Any

from ke_ray import storage
from ke_ray.core.position import POSITION
from ke_ray.data.corpus import Corpus
from ke_ray.errors import ResultsError
from ke_ray.planning.scan_rounds import describe_corpus
from ke_ray.planning.scan_rows import EvaluatedTables, labelled
from ke_ray.results.manifest import new_manifest, read_manifest
from ke_ray.results.scan_folder import EXPERTS_SCHEMA, REPLICATES_SCHEMA, ScanFolder
from ke_ray.results.scan_identity import check_identity, merge_identities
from ke_ray.storage.ownership import claimed
from ke_ray.studies.own_measures import described

_OPEN: weakref.WeakValueDictionary[str, RunFolder] = weakref.WeakValueDictionary()
"""The folders that are open in this process, by absolute URI."""


class RunFolder:
    """The folder, claimed while the run goes on; for the worker that writes files.

    Args:
        uri: path or URI.
        corpus: D.
        measures: names.
        identity: what all measurements in the folder have in common.
        config: how it is measured, for readers.
        cost: the forecast.
        model: columns that tell the model: ``series`` and ``n_layers``.
    """

    def __init__(
        self,
        uri: str,
        corpus: Corpus,
        measures: tuple[str, ...],
        *,
        identity: dict[str, Any],
        config: dict[str, Any],
        cost: dict[str, Any],
        model: dict[str, Any],
    ) -> None:
        self.uri, self.corpus, self.model = uri, corpus, model
        self._manifest: dict[str, Any] = new_manifest("scan", config) | {
            "id": uuid.uuid4().hex,
            "identity": identity,
            "corpora": {corpus.name: describe_corpus(corpus)},
            "measures": list(measures),
            "own_measures": described(measures),
            "checkpoints": [],
            "cost": cost,
        }
        self._folder = ScanFolder(uri, self._manifest)
        self._claim = ExitStack()
        # A lock is held by a context of execution; cells of a notebook run in several.
        self._context = contextvars.copy_context()
        # A training that raises closes nothing: the folder is let go with this object, at the last.
        self.release = weakref.finalize(self, self._context.run, self._claim.close)

    def open(self, step: int) -> None:
        """Claim the folder for a run that has made this many steps.

        Raises:
            ResultsError: it holds another run, or another command is writing it.
            StorageError: it cannot be written.
        """
        key = storage.absolute(self.uri)
        if (before := _OPEN.get(key)) is not None:
            before.release()  # of a training in this process that raised
        self._context.run(self._claim.enter_context, claimed(self.uri, "scan"))
        try:
            self._continue(step)
        except BaseException:
            self.release()
            raise
        _OPEN[key] = self

    def _continue(self, step: int) -> None:
        later: list[str] = []
        if storage.exists(storage.join(self.uri, "manifest.json")):
            later = self._take_over(read_manifest(self.uri, "scan"), step)
        self._folder.consolidate(without=later)

    def _take_over(self, before: dict[str, Any], step: int) -> list[str]:
        """Continue what the folder has; return the checkpoints that come after this step."""
        if "cost" not in before:
            raise ResultsError(
                f"'{self.uri}' holds a scan, expected a training's measurements; choose another "
                "output folder."
            )
        names = list(before["identity"]["corpora"])
        if names != [self.corpus.name]:
            raise ResultsError(
                f"'{self.uri}' holds measurements on {', '.join(names)}, and this run's D is "
                f"{self.corpus.name}; give each D a folder of its own."
            )
        check_identity(self.uri, before["identity"], self._manifest["identity"])
        table = self._folder.entropy().select(["checkpoint", "step", "tokens"])
        steps = {row["checkpoint"]: row for row in table.to_pylist()}
        last = max((row["step"] for row in steps.values()), default=0)
        if last > step == 0:
            raise ResultsError(
                f"'{self.uri}' holds the measurements of another run, up to step {last:,}, and "
                "this one starts at step 0. Choose another output folder, or resume that run from "
                "its checkpoint."
            )
        self._manifest |= {
            "created_at": before["created_at"],
            "id": before["id"],
            "identity": merge_identities(before["identity"], self._manifest["identity"]),
            "measures": list(dict.fromkeys([*before["measures"], *self._manifest["measures"]])),
            "own_measures": before["own_measures"] | self._manifest["own_measures"],
        }
        for name, row in steps.items():
            if step > 0 and row["step"] <= step:
                self._list(name, row["step"], row["tokens"])
        return [name for name, row in steps.items() if step <= 0 or row["step"] > step]

    def _list(self, name: str, step: int, tokens: int) -> dict[str, Any]:
        """Enter a measurement into the manifest; return its position."""
        position = dict.fromkeys(POSITION) | {"step": step, "tokens": tokens}
        entry = {"name": name, "location": None, "revision": None, "commit": None, **position}
        self._manifest["checkpoints"].append(
            entry | {"weights_fingerprint": None, "size_bytes": None}
        )
        return position

    def write(self, step: int, tokens: int, result: EvaluatedTables | str) -> None:
        """Write one measurement, or why there is none; nothing of it is there after a kill, or all.

        Args:
            tokens: of training so far.
        """
        name, corpus = f"step{step}", self.corpus
        common = {
            "checkpoint": name,
            **self._list(name, step, tokens),
            "corpus": corpus.name,
            "data_sha256": corpus.sha256,
            **self.model,
        }
        if isinstance(result, str):
            self._folder.write_part(name, [{**common, "status": "failed", "error": result}])
        else:
            common |= {"num_instances": corpus.num_instances, "num_tokens": corpus.num_tokens}
            means, experts = result.coefficients, result.experts
            self._folder.write_part(
                name,
                [{**common, **row, "status": "ok"} for row in result.rows.to_pylist()],
                labelled(result.replicates, common, REPLICATES_SCHEMA),
                None if means is None else {corpus.name: means.numpy()},
                None if experts is None else labelled(experts, common, EXPERTS_SCHEMA),
            )
        self._folder.write_manifest()

    def close(self, status: str, share: float) -> None:
        """Merge what was written and let the folder go.

        Args:
            status: ``finished``, ``failed`` or ``interrupted``.
            share: of the time that measuring took.
        """
        try:
            self._manifest["status"] = status
            self._manifest["cost"]["share"] = share
            self._folder.consolidate(final=status == "finished")
        finally:
            self.release()
