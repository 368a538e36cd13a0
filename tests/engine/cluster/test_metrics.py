"""The dashboards ask for metrics and labels that a running study really exports."""

from __future__ import annotations

import re
import shutil
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus import ABSENT, DASHBOARDS, panels, promtool, queries, variables
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES
from tiny_studies import tiny_pretrain
from tiny_sweep import tiny_sweep

from ke_ray.engine.cluster import metrics
from ke_ray.engine.cluster.metrics import METRICS, ScanMeter
from ke_ray.engine.sweep.run import run_sweep
from ke_ray.outcomes import Display, ScanOutcome
from ke_ray.planning.sweep import prepare_sweep
from ke_ray.tracking.tracker import open_tracker
from ke_ray.training.loop import Progress, StepRecord
from ke_ray.training.snapshot import Snapshot

#: As Prometheus names them: Ray's prefix, and _total for counters.
EXPORTED = {
    f"ray_{name}" + "_total" * (metric.kind == "counter"): metric
    for name, metric in METRICS.items()
}
RAYS_OWN = {f"ray_{name}": gauge for name, gauge in METRICS_GAUGES.items()}


def asked() -> dict[str, set[str]]:
    """Metric → labels, over all queries of all dashboards; Ray's own among them."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in DASHBOARDS:
        for _, expression, legend in queries(path):
            labels = set(re.findall(r"{{(\w+)}}", legend))
            for inside in re.findall(r"by \(([\w, ]+)\)", expression):
                labels |= set(inside.split(", "))
            for name, selector in re.findall(r"\b(ray_\w+)(?:{([^}]*)})?", expression):
                found[name] |= labels | set(re.findall(r"(\w+)=~?", selector))
    return found


def test_dashboards_show_every_metric_by_labels_that_it_has() -> None:
    assert len(DASHBOARDS) == 2
    names = {name: labels for name, labels in asked().items() if name not in RAYS_OWN}
    assert names.keys() == EXPORTED.keys()
    for name, labels in names.items():
        assert labels <= set(EXPORTED[name].tags), name


def test_both_dashboards_show_the_same_of_the_nodes() -> None:
    shown = [
        {panel["title"]: panel["targets"] for panel in panels(path) if "Ray's own" in str(panel)}
        for path in DASHBOARDS
    ]
    assert shown[0] == shown[1]
    assert {"GPU use", "GPU memory in use", "Memory in use", "Network"} == shown[0].keys()
    for name, labels in asked().items():
        if name in RAYS_OWN:
            tags = RAYS_OWN[name]._view.columns
            assert labels <= {*tags, "instance"}, "Prometheus adds the last"


def test_prometheus_reads_every_query(tmp_path: Path) -> None:
    """Those of GPUs too, which the tests' nodes have none of."""
    if shutil.which("promtool") is None:
        pytest.skip(ABSENT)
    rules = [
        {"record": f"query{number}", "expr": expression.replace("$__rate_interval", "1m")}
        for number, (_, expression, _) in enumerate(q for p in DASHBOARDS for q in queries(p))
    ]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboards", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", path)


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboards_can_be_imported(path: Path) -> None:
    shown = panels(path)
    assert len({panel["id"] for panel in shown}) == len(shown)
    cells: set[tuple[int, int]] = set()
    for panel in shown:
        assert panel["datasource"]["uid"] == "${datasource}"
        assert all(t["datasource"]["uid"] == "${datasource}" for t in panel["targets"])
        place = panel["gridPos"]
        covered = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not covered & cells, f"{panel['title']} overlaps another panel"
        assert max(x for x, _ in covered) < 24
        cells |= covered
    used = {name for _, e, _ in queries(path) for name in re.findall(r"\$(\w+)", e)}
    assert used - {"__rate_interval"} <= variables(path).keys()


def test_the_idle_share_is_that_of_the_last_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("ke_ray.engine.cluster.metrics.time.monotonic", lambda: now)
    meter = ScanMeter(Display(), ScanOutcome(""), "s", [])
    meter.tick(0, 0.0, num_scorers=2)
    now += 10
    assert meter._idle_share(5.0) == pytest.approx(1 - 5 / 20)
    now += 50
    assert meter._idle_share(105.0) == pytest.approx(1 - 105 / 120)
    now += 40  # the first forty seconds are forgotten; nothing was scored since
    assert meter._idle_share(105.0) == pytest.approx(1 - 100 / 180)
    assert meter._idle_share(10_000.0) == 0.0


def test_a_training_run_is_metered_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[tuple[str, float, dict[str, str]]] = []
    monkeypatch.setattr(
        metrics, "record", lambda name, value, **t: recorded.append((name, value, t))
    )
    shown: list[Any] = []
    study = tiny_pretrain(Path("runs/metered"))
    meter = metrics.TrainingMeter(
        study, "r", lambda p, **more: shown.append((p, more)), lambda *found: shown.append(found)
    )
    found = Snapshot(paragraphs=[-1.0, -3.0, -8.0], settings=["once", "once", "paraphrase"])
    meter.probes(0, found)
    for step in (3, 4, 5):  # of a run that goes on after its second step
        progress = Progress(StepRecord(step, 100 * step, 1.0 / step, 0.1, 1.0, 50.0, 2.0), 5, 1.0)
        meter(progress, next_injection=None)
    assert len(shown) == 4
    values: dict[str, list[float]] = defaultdict(list)
    for name, value, tags in recorded:
        assert (tags["study"], tags["run"]) == ("metered", "r")
        values[name.removeprefix("ke_ray_") + tags.get("setting", "")].append(value)
    assert sum(values["training_tokens"]) == 300
    assert values["training_loss_nats"] == [1 / 3, 1 / 5], "a moment later: left out; the end: not"
    assert set(values["probe_knowledge_natsonce"]) == {-2.0}
    assert set(values["probe_knowledge_natsparaphrase"]) == {-8.0}


Series = dict[tuple[str, str], dict[frozenset[tuple[str, str]], float]]


@contextmanager
def scraped() -> Iterator[Series]:
    """Ask the node's endpoint twice a second; (metric, study) → labels → last value seen."""
    import ray

    (node,) = [node for node in ray.nodes() if node["Alive"]]
    url = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
    seen: Series = defaultdict(dict)
    ended = threading.Event()

    def scrape() -> None:
        while not ended.wait(0.5):
            text = urllib.request.urlopen(url, timeout=10).read().decode()
            for name, inside, value in re.findall(r"^(ray_ke_ray_\w+){(.*)} (\S+)$", text, re.M):
                labels = dict(re.findall(r'(\w+)="([^"]*)"', inside))
                seen[name, labels["study"]][frozenset(labels.items())] = float(value)

    thread = threading.Thread(target=scrape, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def totals(seen: Series) -> dict[tuple[str, str], float]:
    """Sums over all labels; each metric reaches the endpoint at a moment of its own."""
    return {key: sum(series.values()) for key, series in list(seen.items())}


@pytest.mark.ray
def test_a_running_study_exports_all_that_the_dashboards_ask(
    scan: Any, scan_study: Any, tmp_path: Path, pretrained: Path, ray_cluster: None
) -> None:
    keys = {"injection": {"count": 2}, "resuscitation": None}
    study = tiny_sweep(tmp_path / "watched", pretrained, base=keys, space=None, objectives=None)
    wanted = {
        (name, "watched_scan" if name.startswith("ray_ke_ray_scan") else "watched"): labels
        for name, labels in asked().items()
        if name in EXPORTED
    }
    with scraped() as seen, open_tracker(study.mlflow) as tracker:
        (row,) = run_sweep(prepare_sweep(study), tracker).rows
        assert scan(scan_study(name="watched_scan")).exit_code == 0
        expected = {
            ("ray_ke_ray_scan_tokens_total", "watched_scan"): 4.0 * 70 * 24,
            ("ray_ke_ray_scan_checkpoints_total", "watched_scan"): 4.0,
            ("ray_ke_ray_scan_loads_total", "watched_scan"): 4.0,
            ("ray_ke_ray_training_tokens_total", "watched"): row["num_tokens"],
            ("ray_ke_ray_sweep_trials_total", "watched"): 1.0,
        }
        late = time.monotonic() + 60
        while time.monotonic() < late and not (
            wanted.keys() <= seen.keys() and expected.items() <= totals(seen).items()
        ):
            time.sleep(0.5)
    for key, labels in wanted.items():
        for series in seen.get(key, {frozenset(): 0.0}):
            assert labels <= {label for label, _ in series}, key
    found = totals(seen)
    assert {key: found.get(key) for key in expected} == expected
