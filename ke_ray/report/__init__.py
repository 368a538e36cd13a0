"""Pictures, tables and pages made from result files alone (no torch, no Ray, no MLflow).

sources            find and read result folders, tolerant of age, damage and unfinished work
series, runs       a scan's series, a study's runs, as charts need them
charts             what the figures are; paper, correlation: numbers beside them
page, build        the HTML report; picture: a PNG without a browser; terminal: tables
screenshots        the README's pictures of the report and the dashboard
"""

from __future__ import annotations

import os
from collections.abc import Sequence

__all__ = ["build_report", "print_results"]


def build_report(
    results: Sequence[str | os.PathLike[str]], output_html: str | os.PathLike[str]
) -> str:
    """See `ke_ray.report.build.build_report`."""
    from ke_ray.report.build import build_report as build

    return build(results, output_html)


def print_results(paths: Sequence[str | os.PathLike[str]]) -> None:
    """See `ke_ray.report.terminal.print_results`."""
    from ke_ray.report.terminal import print_results as show

    show(paths)
