"""OLMo's order: ids in, exact tokens out, and no byte more than requested, over real HTTP."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import yaml

from ke_ray.data.corpus import build_corpus
from ke_ray.data.olmo_order import (
    OlmoSource,
    iter_instances,
    read_instances,
    read_olmo_source,
    rebuild_order,
)
from ke_ray.errors import ConfigError, DataError, UserError

CHUNK = 16
TOKENS_OF_PARTS = (5 * CHUNK + 3, 2 * CHUNK, CHUNK - 1, 4 * CHUNK + 15)


def make_parts(folder: Path) -> tuple[list[str], np.ndarray]:
    """Raw uint16 files, and the instances that a loop from the definition finds in them."""
    rng = np.random.default_rng(0)
    paths, instances = [], []
    for number, count in enumerate(TOKENS_OF_PARTS):
        tokens = rng.integers(0, 60_000, count, dtype=np.uint16)
        path = folder / f"part-{number}.npy"
        path.write_bytes(tokens.astype("<u2").tobytes())
        paths.append(str(path))
        instances += [tokens[i * CHUNK : (i + 1) * CHUNK] for i in range(count // CHUNK)]
    return paths, np.array(instances)


def make_source(parts: list[str], **options: object) -> OlmoSource:
    return OlmoSource(parts=tuple(parts), chunk=CHUNK, **options)


def test_last_partial_chunks_are_dropped_and_ids_run_through_the_parts(tmp_path: Path) -> None:
    parts, instances = make_parts(tmp_path)
    assert len(read_instances(make_source(parts), num_instances=None)[0]) == len(instances) == 11
    tokens, ids = read_instances(
        make_source(parts, instances=(10, 0, 4, 5, 6, 7, 0)), num_instances=None
    )
    assert ids.tolist() == [10, 0, 4, 5, 6, 7, 0]
    assert np.array_equal(tokens, instances[ids])


def test_the_rebuilt_order_is_numpys_shuffle_of_uint32(tmp_path: Path) -> None:
    parts, instances = make_parts(tmp_path)
    expected = np.arange(11, dtype=np.uint32)
    np.random.Generator(np.random.PCG64(6198 + 2)).shuffle(expected)
    source = make_source(parts, epoch=2)
    assert read_instances(source, num_instances=None)[1].tolist() == expected.tolist()
    tokens, ids = read_instances(source, num_instances=6)
    assert ids.tolist() == expected[:6].tolist()
    assert np.array_equal(tokens, instances[expected[:6]])
    assert not np.array_equal(rebuild_order(11), rebuild_order(11, epoch=1))


def test_the_rebuilt_order_stays_what_it_is() -> None:
    """Recorded values: a NumPy that shuffles differently must not pass unseen."""
    assert rebuild_order(10).tolist() == RECORDED_ORDER


RECORDED_ORDER = [2, 4, 7, 3, 8, 9, 0, 6, 1, 5]


def test_an_order_file_is_read_from_first_on(tmp_path: Path) -> None:
    parts, instances = make_parts(tmp_path)
    order = np.array([3, 9, 0, 10, 1, 2, 4], "<u4")
    (tmp_path / "order.npy").write_bytes(order.tobytes())
    source = make_source(parts, order=str(tmp_path / "order.npy"), first=2)
    tokens, ids = read_instances(source, num_instances=3)
    assert ids.tolist() == [0, 10, 1]
    assert np.array_equal(tokens, instances[ids])
    assert read_instances(source, num_instances=None)[1].tolist() == [0, 10, 1, 2, 4]
    with pytest.raises(DataError, match="6 instances .* holds 5 from position 2"):
        read_instances(source, num_instances=6)


def test_a_corpus_keeps_instance_ids(tmp_path: Path) -> None:
    _, instances = make_parts(tmp_path)
    path = tmp_path / "olmo.yaml"
    path.write_text(yaml.safe_dump({"olmo": {"parts": [f"{tmp_path}/part-*"], "chunk": CHUNK}}))
    assert read_olmo_source(str(path)) == make_source([f"{tmp_path}/part-*"])
    order = rebuild_order(11)
    corpus = build_corpus("o", str(path), num_instances=4, sequence_length=None, vocab_size=60_000)
    assert corpus.instance_ids is not None
    assert corpus.instance_ids.tolist() == order[:4].tolist()
    assert np.array_equal(corpus.input_ids, instances[order[:4]])
    short = build_corpus("o", str(path), num_instances=4, sequence_length=5)
    assert np.array_equal(short.input_ids, instances[order[:4], :5])
    with pytest.raises(DataError, match="vocabulary of 3 entries"):
        build_corpus("o", str(path), num_instances=4, sequence_length=None, vocab_size=3)
    with pytest.raises(DataError, match="1 instance of 1 to 16"):
        build_corpus("o", str(path), num_instances=4, sequence_length=17)
    with pytest.raises(DataError, match="12 instances .* holds 11 from position 0"):
        build_corpus("o", str(path), num_instances=12, sequence_length=None)


def test_an_order_that_does_not_belong_to_the_parts_is_refused(tmp_path: Path) -> None:
    parts, _ = make_parts(tmp_path)
    with pytest.raises(DataError, match="names instance 11, but the parts hold 11"):
        read_instances(make_source(parts, instances=(1, 11)), num_instances=None)
    with pytest.raises(DataError, match="There is no"):
        read_instances(make_source([*parts, f"{tmp_path}/nothing.npy"]), num_instances=1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"parts": ["a"], "ordre": "b"}, "unknown key 'olmo.ordre'. Did you mean 'order'"),
        ({"order": "b"}, "'olmo.parts' is missing"),
        ({"parts": []}, "'olmo.parts': .*at least 1 item"),
        ({"parts": "a"}, "'olmo.parts': .*given: 'a'"),
        ({"parts": ["a"], "order": 3}, "'olmo.order': .*string.*given: 3"),
        ({"parts": ["a"], "seed": "x"}, "'olmo.seed': .*integer.*given: 'x'"),
        ({"parts": ["a"], "epoch": True}, "'olmo.epoch': .*integer.*given: True"),
        ({"parts": ["a"], "first": -1}, "'olmo.first': .*equal to 0.*given: -1"),
        ({"parts": ["a"], "chunk": 0}, "'olmo.chunk': .*equal to 1.*given: 0"),
        ({"parts": ["a"], "instances": [1, "a"]}, "'olmo.instances.1': .*integer.*given: 'a'"),
        ([], "'olmo'"),
    ],
)
def test_a_wrong_description_is_refused(tmp_path: Path, values: object, message: str) -> None:
    path = tmp_path / "olmo.yaml"
    path.write_text(yaml.safe_dump({"olmo": values}))
    with pytest.raises(DataError, match=message):
        read_olmo_source(str(path))


def test_what_is_no_yaml_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "olmo.yaml"
    for content in (b"\xff\xfe\0", b"olmo: [", b"a: &a [x]\nolmo: *a"):
        path.write_bytes(content)
        with pytest.raises(UserError):
            read_olmo_source(str(path))
    path.write_text("olmo: [")
    with pytest.raises(ConfigError, match=r"line \d is not valid YAML"):
        read_olmo_source(str(path))


@dataclass
class Served:
    """A folder behind a real HTTP server, and the requests that it got."""

    url: str
    body_bytes: int = 0
    failures_left: int = 0
    requests: list[str] = field(default_factory=list)


def serve(folder: Path, *, with_ranges: bool) -> Iterator[Served]:
    served = Served("")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            path = folder / self.path.lstrip("/")
            if not path.is_file():
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data, status = path.read_bytes(), 200
            requested = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            whole = len(data)
            self_range = ""
            if requested and with_ranges:
                start, end = int(requested[1]), min(int(requested[2]) + 1, whole)
                data, status = data[start:end], 206
                self_range = f"bytes {start}-{end - 1}/{whole}"
            if with_body and served.failures_left:
                served.failures_left -= 1
                data, status, self_range = b"", 503, ""
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            if with_ranges:
                self.send_header("Accept-Ranges", "bytes")
            if self_range:
                self.send_header("Content-Range", self_range)
            self.end_headers()
            if with_body:
                served.body_bytes += len(data)
                served.requests.append(f"{self.path} {self.headers.get('Range', '')}")
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield served
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def range_server(tmp_path: Path) -> Iterator[Served]:
    yield from serve(tmp_path, with_ranges=True)


@pytest.fixture
def plain_server(tmp_path: Path) -> Iterator[Served]:
    yield from serve(tmp_path, with_ranges=False)


def test_only_the_requested_bytes_travel_over_http(tmp_path: Path, range_server: Served) -> None:
    _, instances = make_parts(tmp_path)
    order = np.random.default_rng(1).permutation(11).astype("<u4")
    (tmp_path / "order.bin").write_bytes(order.tobytes())
    source = make_source(
        [f"{range_server.url}/part-{n}.npy" for n in range(len(TOKENS_OF_PARTS))],
        order=f"{range_server.url}/order.bin",
        first=2,
    )
    tokens, ids = read_instances(source, num_instances=5)
    assert ids.tolist() == order[2:7].tolist()
    assert np.array_equal(tokens, instances[ids])
    assert range_server.body_bytes == 5 * CHUNK * 2 + 5 * 4
    assert all("bytes=" in request for request in range_server.requests)


def test_blocks_read_as_they_are_wanted(tmp_path: Path, range_server: Served, monkeypatch) -> None:
    monkeypatch.setattr("ke_ray.data.olmo_order._MAX_RANGES", 2)
    _, instances = make_parts(tmp_path)
    source = make_source([f"{range_server.url}/part-0.npy"], instances=(4, 1, 3))
    blocks = iter_instances(source, num_instances=None)
    tokens, ids = next(blocks)
    assert np.array_equal(tokens, instances[[4, 1]])
    assert ids.tolist() == [4, 1]
    assert range_server.body_bytes == 2 * CHUNK * 2
    assert np.array_equal(next(blocks)[0], instances[[3]])


def test_a_server_without_ranges_is_refused_after_one_file(
    tmp_path: Path, plain_server: Served
) -> None:
    make_parts(tmp_path)
    source = make_source([f"{plain_server.url}/part-0.npy"], instances=(4, 1, 3))
    with pytest.raises(DataError, match="does not serve ranges"):
        read_instances(source, num_instances=None)
    assert len(plain_server.requests) == 1


def test_a_server_that_fails_twice_gets_a_third_request(
    tmp_path: Path, range_server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ke_ray.data.olmo_order._PAUSES_S", (0.0, 0.01, 0.02))
    _, instances = make_parts(tmp_path)
    source = make_source([f"{range_server.url}/part-0.npy"], instances=(4, 1, 3))
    range_server.failures_left = 2
    assert np.array_equal(read_instances(source, num_instances=None)[0], instances[[4, 1, 3]])
    range_server.failures_left = 3
    with pytest.raises(DataError, match="503"):
        read_instances(source, num_instances=None)


def test_a_missing_file_on_a_server_is_reported(range_server: Served) -> None:
    with pytest.raises(DataError, match="does not exist or cannot be reached"):
        read_instances(make_source([f"{range_server.url}/part-0.npy"]), num_instances=1)
