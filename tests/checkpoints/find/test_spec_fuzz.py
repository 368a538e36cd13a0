"""A thousand mutated checkpoint specs, lists and native configurations: refs or one message."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutation import mutated

from ke_ray.checkpoints.find.catalog import list_checkpoints
from ke_ray.checkpoints.find.csv_list import parse_csv_list
from ke_ray.checkpoints.find.names import parse_checkpoint_name
from ke_ray.checkpoints.formats.olmo_config import NativeConfig, parse_native_config
from ke_ray.errors import CheckpointError, CheckpointSpecError, UserError
from ke_ray.storage import slug

THOUSAND = settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))

PIECES = st.sampled_from(
    [
        *(
            "series",
            "step5",
            "step5-unsharded",
            "/",
            "//",
            "..",
            ".",
            "~",
            "*",
            "**",
            "?",
            "[",
            "]",
        ),
        *("hf://", "file://", "local://", "memory://", "http://127.0.0.1:9/", "http://[", "s3:/"),
        *("@", "#", ":", "%00", "%2e", "\0", "\n", " ", "é", "\ud800", "x" * 300, ".csv", "a.csv"),
        *("user:pw@", "{a,b}", "$HOME", "`id`", "-", "::", "zip://", "simplecache::"),
    ]
)
SPECS = st.lists(PIECES, max_size=6).map("".join) | st.text(max_size=30)
OPTIONS = st.none() | st.sampled_from(["*", "[", "step*", "!", "\0"]) | st.text(max_size=8)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two checkpoints, to be the working folder."""
    folder = tmp_path_factory.mktemp("specs")
    for name in ("step5", "step7"):
        (folder / "series" / name).mkdir(parents=True)
        (folder / "series" / name / "config.json").write_text("{}")
        (folder / "series" / name / "model.safetensors").write_bytes(b"x" * 9)
    (folder / "a.csv").write_text("step,url\n5,series/step5\n")
    return folder


@THOUSAND
@given(
    spec=SPECS,
    revisions=OPTIONS,
    steps=st.none() | st.sampled_from([":", "5", "5:", ":5", "9:1", "1:2:3"]) | st.text(max_size=6),
    every=st.none() | st.integers(-2, 3),
    limit=st.none() | st.integers(-2, 3),
)
def test_fuzz_specs(place: Path, spec, revisions, steps, every, limit) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        # A Hub that refuses at once: no call leaves this machine.
        patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        patch.setenv("HF_HUB_OFFLINE", "1")
        try:
            refs = list_checkpoints(
                spec,
                revisions=revisions,
                steps=steps,
                every=every,
                limit=limit,
                endpoint="http://127.0.0.1:9",
            )
        except UserError as error:
            assert str(error)
            assert len(str(error)) < 5000
            assert "://user:pw@" not in str(error)
            return
    assert refs
    assert len({ref.name.casefold() for ref in refs}) == len(refs)
    assert all(ref.name == slug(ref.name) for ref in refs)


CSV_SNIPPETS = st.sampled_from([b'"', b",", b"\n", b"\r", b"\0", b"-1", b"9" * 30, b"\xff", b"1e3"])
CSV = b"Step,Checkpoint Directory,Ingredient\n1000,https://host/run/step1000-unsharded/,1\n2,b/c,\n"


@THOUSAND
@given(content=mutated(CSV, CSV_SNIPPETS))
def test_fuzz_lists(content: bytes) -> None:
    try:
        rows = parse_csv_list(content, base="/base", origin="list.csv")
    except CheckpointSpecError as error:
        assert "list.csv" in str(error)
        return
    for row in rows:
        assert row.location
        assert row.step is None or row.step >= 0


@THOUSAND
@given(
    name=st.text(max_size=60)
    | st.lists(PIECES, max_size=5).map("".join)
    | st.from_regex(
        r"(stage[0-9]{0,20}-)?(ingredient[0-9]*-)?step[0-9]{0,30}(-tokens[0-9.]{0,12}[KMBT]?)?"
    )
)
def test_fuzz_names(name: str) -> None:
    said = parse_checkpoint_name(name)
    assert all(v is None or 0 <= v < 10**24 for v in (said.step, said.tokens, said.stage))


NATIVE = NativeConfig(
    model_type="olmo2", d_model=16, n_heads=4, n_kv_heads=2, n_layers=2, d_mlp=32, vocab_size=50,
    max_sequence_length=64, rope_theta=10000.0, norm_eps=1e-5, tied=True, eos_token_id=0,
    pad_token_id=1,
).to_yaml().encode()  # fmt: skip
SNIPPETS = st.sampled_from(
    (
        *(
            b"[",
            b"{",
            b"&a ",
            b"*a",
            b": ",
            b"\n",
            b"\t",
            b"null",
            b"true",
            b"-1",
            b"1e999",
            b".nan",
        ),
        *(
            b"9" * 400,
            b"!!python/object/apply:os.system",
            b"\0",
            b"\xff",
            b"[[[[[[[[" * 20,
            b"model:",
        ),
        *(b"0x1F", b"1_0", b"2001-01-01", b"<<: {a: 1}", b"? [a]\n: b"),
    )
)


@THOUSAND
@given(content=mutated(NATIVE, SNIPPETS))
def test_fuzz_native_configurations(content: bytes) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        config = parse_native_config(content.decode("utf-8", "surrogateescape"))
    except (CheckpointError, UserError) as error:
        assert str(error)
        assert len(str(error)) < 3000
        return
    finally:
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 64 * 1024, f"{grown} KiB more"
    assert config.d_model > 0
    assert config.d_kv > 0
    config.to_transformers()
