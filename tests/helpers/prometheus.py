"""The Grafana dashboards' queries, and a real Prometheus that answers them."""

from __future__ import annotations

import json
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

DASHBOARDS = sorted(Path(__file__).parents[2].glob("dashboards/grafana/*.json"))
ABSENT = "Prometheus is absent (apt-get install --no-install-recommends prometheus)"


def panels(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["panels"]


def variables(path: Path) -> dict[str, tuple[str, str]]:
    """Name → (selector of series, label) of the variables whose values Prometheus lists."""
    return {
        variable["name"]: re.fullmatch(
            r"label_values\((.+), (\w+)\)", variable["definition"]
        ).groups()
        for variable in json.loads(path.read_text())["templating"]["list"]
        if variable["type"] == "query"
    }


def queries(path: Path) -> list[tuple[str, str, str]]:
    """(title, expression, legend) of every panel and variable."""
    return [
        *(
            (panel["title"], target["expr"], target["legendFormat"])
            for panel in panels(path)
            for target in panel["targets"]
        ),
        *(
            (name, selector, f"{{{{{label}}}}}")
            for name, (selector, label) in variables(path).items()
        ),
    ]


def promtool(*arguments: object) -> str:
    """What ``promtool`` says of files that it finds nothing wrong with."""
    done = subprocess.run(
        ["promtool", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@dataclass
class Prometheus:
    """A server, and the moment from which it watches."""

    url: str
    started: float

    def _get(self, path: str, **parameters: Any) -> Any:
        answer = requests.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def label_values(self, selector: str, label: str) -> list[str]:
        """As Grafana finds the values of a variable."""
        parameters = {"match[]": selector, "start": self.started, "end": time.time()}
        return self._get(f"label/{label}/values", **parameters)

    def history(self, expression: str) -> list[tuple[dict[str, str], list[float]]]:
        """(labels, values second by second) of each series of an expression, from the start on."""
        span = {"start": self.started, "end": time.time(), "step": 1}
        series = self._get("query_range", query=expression, **span)["result"]
        return [(one["metric"], [float(value) for _, value in one["values"]]) for one in series]

    def last(self, expression: str) -> float | None:
        """The value now of an expression that has one; None where there is none."""
        result = self._get("query", query=expression)["result"]
        return float(result[0]["value"][1]) if result else None


def watch_closely(settings: str) -> str:
    """The configuration that Ray's head writes, ten times as fast: for runs of seconds."""
    text, number = re.subn(r"(?<=_interval: )10s", "1s", settings)
    assert number == 2, settings
    return text
