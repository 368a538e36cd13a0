"""A thousand mutated studies, overrides and job files for each kind: a study or one message."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutation import mutated

from ke_ray.cli.options import parse_resuscitate, read_study
from ke_ray.config import load_study
from ke_ray.errors import ConfigError, UserError
from ke_ray.studies.continual import ContinualStudy
from ke_ray.studies.jobs import load_job, runtime_env_of
from ke_ray.studies.scan import ScanStudy
from ke_ray.studies.sweep import load_sweep
from ke_ray.studies.training import PretrainStudy

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "sweeps"
PLANTED = "hunter2-planted-secret"

THOUSAND = settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))

Load = Callable[[str, list[str]], Any]
KINDS: dict[str, tuple[Path, Load]] = {
    "scan": (STUDIES / "olmo_1b.yaml", lambda p, o: load_study(p, ScanStudy, o)),
    "pretrain": (STUDIES / "demo_pretrain.yaml", lambda p, o: load_study(p, PretrainStudy, o)),
    "continual": (STUDIES / "olmo_1b_pubmed.yaml", lambda p, o: load_study(p, ContinualStudy, o)),
    "sweep": (STUDIES / "demo.yaml", load_sweep),
    "job": (ROOT / "jobs" / "scan.yaml", lambda p, o: load_job(p, o, {"HF_TOKEN": PLANTED})),
}

SNIPPETS = st.sampled_from(
    [
        *(b"[", b"]", b"{", b"}", b": ", b"- ", b"\n", b"\t", b"'", b'"', b"#", b"|", b">", b"%"),
        *(b"&a ", b"*a", b"<<: *a", b"null", b"true", b"-1", b"0", b"1e999", b".nan", b".inf"),
        *(
            b"9" * 5000,
            b"!!python/object:os.system",
            b"!!binary aGk=",
            b"\0",
            b"\xff",
            b"\xed\xa0\x80",
        ),
        *(b'"\\ud83d"', b"[" * 3000, b"- " * 3000, b"2001-01-01", b"0x1F", b"? [a]\n: b", b"~"),
        *(
            b"kind: scan\n",
            b"space: {a: 1}\n",
            b"../..",
            b"999999999999",
            b"1:30:00",
            b"{a: {b: c}}",
        ),
    ]
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["", "..", "\0", "first", "tpe", "all", "1e-3", "\ud800", "x" * 3000]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


def peak_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def loaded_or_refused(call: Callable[[], object]) -> None:
    before = peak_kib()
    try:
        call()
    except UserError as error:
        assert str(error)
        assert len(str(error)) < 20_000
        assert not any(ord(c) < 32 and c not in "\t\n" for c in str(error))
        assert PLANTED not in str(error)
    assert peak_kib() - before < 128 * 1024


def paths_of(values: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The key paths of nested mappings."""
    found = []
    for key, value in values.items():
        found.append((*prefix, key))
        if isinstance(value, dict):
            found += paths_of(value, (*prefix, key))
    return found


@pytest.mark.parametrize("kind", KINDS)
@THOUSAND
@given(data=st.data())
def test_fuzz_studies(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    """Damaged text, and any value under any key: what no check expects."""
    original, load = KINDS[kind]
    if data.draw(st.booleans()):
        content = data.draw(mutated(original.read_bytes(), SNIPPETS))
    else:
        values = yaml.load(original.read_bytes(), Loader=yaml.CSafeLoader)
        if isinstance(values.get("base"), str):
            values["base"] = str(original.parent / values["base"])
        *parents, last = data.draw(st.sampled_from(paths_of(values)))
        place = values
        for key in parents:
            place = place[key]
        if data.draw(st.booleans()):
            place[last] = data.draw(VALUES)
        else:
            place[data.draw(st.text(max_size=5))] = place.pop(last)
        content = json.dumps(values).encode()  # JSON is YAML
    path = tmp_path / original.name  # a base study is not beside it: that too is one message
    path.write_bytes(content)
    loaded_or_refused(lambda: load(str(path), []))
    assert [p.name for p in tmp_path.iterdir()] == [original.name], "something was written"


KEYS = st.sampled_from(
    [
        *(
            "kind",
            "output",
            "checkpoints.spec",
            "data.x",
            "num_instances",
            "measures",
            "mlflow.uri",
        ),
        *("resuscitation", "resuscitation.ratio", "base.seeds", "space.seed", "points", "a.b.c"),
        *("base.base.base", "objectives", "optimizer.betas", "checkpoints.steps", "env.HF_TOKEN"),
        *(".", "..", "a.", ".a", "", "=", " ", "kind.x", "\0", "x" * 500, "data.\ud800"),
    ]
)


@THOUSAND
@given(
    kind=st.sampled_from(sorted(KINDS)),
    overrides=st.lists(
        st.tuples(
            KEYS | st.text(max_size=8),
            st.text(max_size=12)
            | SNIPPETS.map(lambda b: b.decode("latin-1"))
            | VALUES.map(lambda v: json.dumps(v, default=str)),
        ).map("=".join)
        | st.text(max_size=10),
        min_size=1,
        max_size=3,
    ),
)
def test_fuzz_overrides(kind: str, overrides: list[str]) -> None:
    original, load = KINDS[kind]
    loaded_or_refused(lambda: load(str(original), overrides))


@THOUSAND
@given(
    text=st.lists(
        st.sampled_from(["ratio", "factor", "control", "=", ",", "0.5", "2", "random", "[", "a.b"])
        | st.text(max_size=4),
        max_size=9,
    ).map("".join)
)
def test_fuzz_the_resuscitate_option(text: str) -> None:
    given = {"checkpoints.spec": "x", "data": {"x": "y"}, "output": "o"}

    def parse() -> None:
        values = given | {"resuscitation": parse_resuscitate(text)}
        read_study(None, ScanStudy, values, None, "ke-ray scan")

    loaded_or_refused(parse)


@THOUSAND
@given(data=st.data())
def test_fuzz_runtime_environments(tmp_path: Path, data: st.DataObject) -> None:
    (tmp_path / "job.yaml").write_text(
        "kind: job\nentrypoint: 'true'\nruntime_env: runtime_env.yaml\n"
    )
    job = load_job(str(tmp_path / "job.yaml"), [], {})
    content = data.draw(mutated((ROOT / "jobs" / "runtime_env.yaml").read_bytes(), SNIPPETS))
    (tmp_path / "runtime_env.yaml").write_bytes(content)
    loaded_or_refused(lambda: runtime_env_of(job, {"MLFLOW_TRACKING_PASSWORD": PLANTED}))


def test_a_secret_in_a_broken_job_is_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    for text in (f"env: {{HF_TOKEN: {PLANTED}}}", f"entrypoint: 'curl https://a:{PLANTED}@host'"):
        path.write_text(f"kind: job\nentrypoint: 'true'\n{text}\n")
        with pytest.raises(ConfigError) as caught:
            load_job(str(path), [], {"HF_TOKEN": PLANTED})
        assert PLANTED not in str(caught.value)
