"""Results in a terminal: headline tables with sparklines, and plain rows for scripts."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ke_ray.report import runs, series
from ke_ray.report.precision import precision_sentence
from ke_ray.report.sources import Result, find_results
from ke_ray.secrets import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_BLOCKS = "▁▂▃▄▅▆▇█"
_TEXT_WIDTH = 8  # of a column of text, at least
_NO_RESULTS = (
    "No results in {paths}. Make some with 'ke-ray scan CHECKPOINTS --data DATA --output DIR', or "
    "a whole set with 'ke-ray demo' (it writes runs/demo)."
)


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """Values as block characters from their minimum to their maximum; '·' where unknown.

    Longer series are thinned evenly to ``width`` characters, both ends kept.
    """
    array = np.asarray(values, dtype=float)
    if len(array) > width:
        array = array[np.linspace(0, len(array) - 1, width).round().astype(int)]
    finite = array[np.isfinite(array)]
    if not len(finite):
        return "·" * len(array)
    low, span = finite.min(), float(np.ptp(finite))
    return "".join(
        "·"
        if not math.isfinite(value)
        else _BLOCKS[3 if span == 0 else min(7, int((value - low) / span * 8))]
        for value in array
    )


def headline_rows(paths: Sequence[str | os.PathLike[str]]) -> list[dict[str, Any]]:
    """Flat rows of plain values: one a checkpoint and corpus, run, trial or pretraining.

    Every row has ``kind``, ``result`` (its folder), ``status`` and ``error``. A scan's row has the
    model-wide value of each measure under its name and its jackknife error under
    ``<measure>_stderr``; runs and trials have the columns of their tables. Unknown is None.

    Raises:
        UserError: a path does not exist.
    """
    rows: list[dict[str, Any]] = []
    for result in find_results(paths):
        rows.extend({"kind": result.kind, "result": result.path, **row} for row in _rows(result))
    return rows


def _rows(result: Result) -> list[dict[str, Any]]:
    if result.kind == "scan":
        return _scan_rows(result)
    if result.kind == "pretrain":
        return _pretrain_rows(result)
    return _plain(result.table("runs" if result.kind == "continual" else "trials"))


def _scan_rows(scan: Result) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for corpus in series.corpora(scan):
        frame = series.checkpoints(scan).drop(columns="x")
        frame["corpus"] = corpus
        frame["status"] = "ok"
        frame["error"] = None
        for measure in dict.fromkeys([*series.measures(scan), *series.absent(scan)]):
            columns = series.totals(scan, measure, corpus)[["checkpoint", "value", "stderr"]]
            renamed = columns.rename(columns={"value": measure, "stderr": f"{measure}_stderr"})
            frame = frame.merge(renamed, on="checkpoint", how="left")
        rows.extend(_plain(frame))
    return rows + [{**row, "status": "failed"} for row in _plain(series.failed(scan))]


def _pretrain_rows(result: Result) -> list[dict[str, Any]]:
    table = result.table("train")
    if table.empty or "loss" not in table:
        return []
    rows = []
    for run, part in table.groupby("run") if "run" in table else [("", table)]:
        part = part.sort_values("step")
        last = part.iloc[-1]
        rows.append(
            {
                "run": run,
                "num_steps": last["step"],
                "num_tokens": last.get("num_tokens"),
                "loss_first": part["loss"].iloc[0],
                "loss_last": last["loss"],
                "status": "ok",
                "error": None,
            }
        )
    return _plain(pd.DataFrame(rows))


def _plain(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of Python numbers, strings and None; whole floats (steps, seeds) become integers."""
    return [
        {str(name): _scalar(value, str(name)) for name, value in row.items()}
        for row in frame.to_dict("records")
    ]


def _scalar(value: Any, name: str) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or value is pd.NA or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, float) and name in {"step", "seed", "num_steps", "num_tokens"}:
        return int(value)
    return value


def rows_as_json(rows: Sequence[dict[str, Any]]) -> str:
    """A JSON list, indented."""
    return json.dumps(list(rows), indent=2, allow_nan=False, default=str)


def rows_as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """CSV with the union of all columns; unknown values are empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def print_results(
    paths: Sequence[str | os.PathLike[str]], console: Console | None = None
) -> list[Result]:
    """Print the headline table of every result at or below the paths.

    Returns:
        The results that were found, for a caller that also wants an exit code.

    Raises:
        UserError: a path does not exist.
    """
    from rich.console import Console

    console = console or Console()
    results = find_results(paths)
    if not results:
        console.print(
            _NO_RESULTS.format(paths=", ".join(os.fspath(path) for path in paths)), markup=False
        )
    for result in results:
        _print_one(result, console)
    return results


def _print_one(result: Result, console: Console) -> None:
    from rich.text import Text

    console.print(Text.assemble((result.kind, "bold"), " ", (printable(result.path), "cyan")))
    for note in result.notes:
        console.print(Text(f"  note: {note}", style="yellow"))
    if result.kind == "scan":
        _print_scan(result, console)
    elif result.kind == "pretrain":
        _print_pretrain(result, console)
    else:
        _print_runs(result, console)
    console.print()


def _table(columns: Sequence[str]) -> Table:
    """A table whose first column is text, the rest numbers; ``_print_table`` cuts nothing off."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for number, name in enumerate(columns):
        table.add_column(
            name,
            justify="right" if number else "left",
            overflow="fold",
            no_wrap=name not in ("setting", "run", "start"),
        )
    return table


def _print_table(table: Table, console: Console) -> None:
    """Print a table; where its numbers are wider than the terminal, they go on in a line below."""
    needed = sum(
        max(console.measure(cell).maximum for cell in (column.header, *column.cells))
        if column.no_wrap
        else _TEXT_WIDTH
        for column in table.columns
    )
    if needed + 2 * len(table.columns) + 2 > console.width:
        for column in table.columns:
            column.no_wrap = False
    console.print(table)


def _add_row(table: Table, *cells: str) -> None:
    from rich.text import Text

    table.add_row(*(Text(cell) for cell in cells))  # a text alone would be read as markup


def _print_scan(scan: Result, console: Console) -> None:
    from rich.text import Text

    curves = [
        (label, curve, corpus)
        for label, curve in series.curves(scan)
        for corpus in series.corpora(curve)
    ]
    for label, curve, corpus in curves:
        order = series.checkpoints(curve)
        table = _table(["measure", "first", "last", "change ± paired s.e.", "checkpoints"])
        for measure in series.measures(curve):
            line = series.totals(curve, measure, corpus)
            if line.empty:
                continue
            change = series.paired_change(curve, measure, corpus).iloc[-1]
            _add_row(
                table,
                measure,
                _number(line["value"].iloc[0]),
                _number(line["value"].iloc[-1]),
                f"{_signed(change['value'])}{_error(change['stderr'])}",
                sparkline(line["value"].to_list(), 16),
            )
        bound = series.ceiling(curve)
        if label:
            console.print(Text(f"  {label}"))
        console.print(
            Text(
                f"  corpus {corpus}: {len(order)} checkpoints, "
                f"{_span(order['checkpoint'])}" + (f"; {bound}" if bound else "")
            )
        )
        if caution := series.caution(scan, corpus):
            console.print(Text(f"  {caution}"))
        _print_table(table, console)
        if sentence := precision_sentence(curve, corpus):
            console.print(Text(f"  {sentence}"))
        if corpus == series.corpora(curve)[-1]:
            for sentence in series.absent(curve).values():
                console.print(Text(f"  {sentence}"))
    failed = series.failed(scan)
    for _, row in failed.iterrows():
        console.print(Text(f"  failed: {row['checkpoint']}: {row['error']}", style="red"))


def _span(names: pd.Series) -> str:
    return f"{names.iloc[0]} … {names.iloc[-1]}" if len(names) > 1 else str(names.iloc[0])


def _print_runs(result: Result, console: Console) -> None:
    from rich.text import Text

    frame, failed = runs.good_runs(result), runs.failed_runs(result)
    if frame.empty and failed.empty:
        console.print("  nothing has finished yet")
        return
    frame = frame.assign(setting=runs.setting_names(result, frame))
    with_setting = frame["setting"].nunique() > 1
    probes = result.table("probes")
    columns = ["start", "setting", "n", "A % [95 %]", "F % [95 %]", "H before", "H after", "K path"]
    hidden = {"setting"} if not with_setting else set()
    hidden |= {"K path"} if probes.empty else set()
    if with_setting:
        hidden |= {"K path", "H before", *({"start"} if frame["x"].nunique() == 1 else ())}
    table = _table([name for name in columns if name not in hidden])
    for (_, setting), part in frame.groupby(["x", "setting"], sort=True):
        first = part.iloc[0]
        cells = {
            "start": _whole(first["step"]) if math.isfinite(first["step"]) else first["checkpoint"],
            "setting": str(setting),
            "n": str(len(part)),
            "A % [95 %]": _interval(part, "acquisition"),
            "F % [95 %]": _interval(part, "forgetting"),
            "H before": _number(part["knowledge_entropy_before_nats"].mean()),
            "H after": _number(part["knowledge_entropy_after_nats"].mean()),
            "K path": "",
        }
        if "K path" not in hidden:
            own = probes[probes["run"].isin(part["run"])]
            path = own.groupby("step")["logprob_per_token"].mean().to_list()
            cells["K path"] = sparkline(path, 6)
        _add_row(table, *(cells[name] for name in columns if name not in hidden))
    console.print(
        "  A acquisition, F forgetting: mean over n runs; H knowledge entropy in nats",
        markup=False,
    )
    _print_table(table, console)
    for _, row in failed.iterrows():
        name = row[runs.run_key(result)]
        reason = f": {row['error']}" if row["error"] else ""
        console.print(Text(f"  {row['status']}: {name}{reason}", style="red"))


def _print_pretrain(result: Result, console: Console) -> None:
    table = _table(["run", "steps", "tokens", "first loss", "last loss", "loss"])
    frame = result.table("train")
    for row in _pretrain_rows(result):
        own = frame[frame["run"] == row["run"]] if "run" in frame else frame
        _add_row(
            table,
            str(row["run"]),
            _whole(row["num_steps"]),
            _whole(row["num_tokens"]),
            _number(row["loss_first"]),
            _number(row["loss_last"]),
            sparkline(own.sort_values("step")["loss"].to_list(), 16),
        )
    _print_table(table, console)


def _whole(value: Any) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{int(value):,}"


def _number(value: Any) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.5g}"


def _signed(value: Any) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:+.4g}"


def _error(stderr: float) -> str:
    return f" ± {stderr:.2g}" if math.isfinite(stderr) else ""


def _interval(part: pd.DataFrame, name: str) -> str:
    """``+12.3 [10.1, 14.2]``, in per cent (see ``runs.aggregate``)."""
    summary = runs.aggregate(part, ["variant"], name)
    if summary.empty:
        return "–"
    value, low, high = (float(summary[end].iloc[0]) for end in ("value", "low", "high"))
    has_interval = math.isfinite(low) and math.isfinite(high)
    return f"{value:+.1f}" + (f" [{low:.1f}, {high:.1f}]" if has_interval else "")
