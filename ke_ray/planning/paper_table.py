"""The costs in ``docs/paper.md``, computed: ``python -m ke_ray.planning.paper_table``.

Scans are counted by the Hub, which ``HF_ENDPOINT`` may be a copy of.
"""

from __future__ import annotations

import re
from pathlib import Path

from ke_ray.config import load_study, read_yaml
from ke_ray.planning.cost import Cost, cost_of
from ke_ray.shipped import shipped_folder
from ke_ray.studies.continual import ContinualStudy
from ke_ray.studies.scan import ScanStudy
from ke_ray.studies.sweep import load_sweep

_PAGE = Path(__file__).parents[2] / "docs" / "paper.md"
# A row: what it is in the paper | `study` | command | cost | … (the first two and the third stay).
_ROW = re.compile(r"^(\|[^|]+\| `([\w/]+\.yaml)` \|[^|]+\|)[^|]*\|", flags=re.MULTILINE)


def with_costs(page: str) -> str:
    """The page with the cost of every row's study computed anew.

    Raises:
        UserError: a study does not exist, or its checkpoints cannot be listed.
    """
    costs: dict[str, Cost] = {}

    def filled(row: re.Match[str]) -> str:
        if row[2] not in costs:
            costs[row[2]] = _cost_of_file(str(shipped_folder("sweeps") / row[2]))
        return f"{row[1]} {costs[row[2]]} |"

    return _ROW.sub(filled, page)


def _cost_of_file(path: str) -> Cost:
    kind = read_yaml(path, "a study file").get("kind")
    if kind == "sweep":
        return cost_of(load_sweep(path))
    if kind == "continual":
        return cost_of(load_study(path, ContinualStudy))
    return cost_of(load_study(path, ScanStudy))


if __name__ == "__main__":
    _PAGE.write_text(with_costs(_PAGE.read_text()))
