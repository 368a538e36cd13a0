"""Ready-made token ids: every file type, every mask, nothing beyond the rows asked."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save_file

from ke_ray.data.token_ids import compact, iter_token_ids, load_token_ids
from ke_ray.errors import DataError, UserError

RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 500, (40, 12))
MASK = (RNG.random((40, 12)) < 0.7).astype(np.int64)
MASK[:, 3] = 1


def load(source: object, n: int | None = None, t: int | None = None, **options: int):
    return load_token_ids(str(source), num_instances=n, sequence_length=t, **options)


def compacted_by_loop(ids: np.ndarray, mask: np.ndarray) -> tuple[list[list[int]], list[int]]:
    rows, lengths = [], []
    for row, real in zip(ids.tolist(), mask.tolist(), strict=True):
        kept = [token for token, is_real in zip(row, real, strict=True) if is_real]
        lengths.append(len(kept))
        rows.append(kept + [0] * (len(row) - len(kept)))
    return rows, lengths


@settings(max_examples=60, deadline=None)
@given(
    mask=hnp.arrays(bool, st.tuples(st.integers(1, 6), st.integers(1, 9))),
    dtype=st.sampled_from([np.int64, np.int32, np.uint16]),
)
def test_any_mask_is_compacted_to_the_front(mask: np.ndarray, dtype: type) -> None:
    mask[:, 0] |= ~mask.any(axis=1)
    ids = np.arange(1, mask.size + 1, dtype=dtype).reshape(mask.shape)
    rows, lengths = compact(ids, mask)
    assert rows.dtype == dtype
    assert (rows.tolist(), lengths.tolist()) == compacted_by_loop(ids, mask)


def test_left_and_right_padding_with_any_id_are_the_same() -> None:
    right, left = np.full((2, 5), 99), np.full((2, 5), 11)
    right[0, :3], right[1, :2] = [1, 2, 3], [4, 5]
    left[0, 2:], left[1, 3:] = [1, 2, 3], [4, 5]
    for ids, mask in ((right, right != 99), (left, left != 11)):
        rows, lengths = compact(ids, mask)
        assert rows.tolist() == [[1, 2, 3, 0, 0], [4, 5, 0, 0, 0]]
        assert lengths.tolist() == [3, 2]


def test_unusable_masks_are_refused() -> None:
    with pytest.raises(DataError, match="instance 8 has no real token"):
        compact(np.ones((2, 3), int), np.array([[1, 0, 0], [0, 0, 0]]), first_instance=7)
    with pytest.raises(DataError, match=r"shape \[2, 2\]"):
        compact(np.ones((2, 3), int), np.ones((2, 2)))
    with pytest.raises(DataError, match="other values than 0 and 1"):
        compact(np.ones((2, 3), int), np.full((2, 3), 2))


def write_all(folder: Path, ids: np.ndarray, mask: np.ndarray) -> dict[str, str]:
    save_file(
        {"input_ids": ids, "attention_mask": mask, "other": ids * 0}, folder / "a.safetensors"
    )
    table = {"input_ids": list(ids), "attention_mask": list(mask)}
    parquet.write_table(pyarrow.table(table), folder / "a.parquet", row_group_size=7)
    flat = pyarrow.FixedSizeListArray.from_arrays(ids.ravel(), ids.shape[1])
    flags = pyarrow.FixedSizeListArray.from_arrays(mask.astype(bool).ravel(), ids.shape[1])
    parquet.write_table(
        pyarrow.table({"input_ids": flat, "attention_mask": flags}), folder / "fixed.parquet"
    )
    return {name: str(folder / name) for name in ("a.safetensors", "a.parquet", "fixed.parquet")}


def test_every_file_type_gives_the_first_n_rows_in_order(tmp_path: Path) -> None:
    rows, lengths = compacted_by_loop(IDS, MASK)
    for source in write_all(tmp_path, IDS, MASK).values():
        ids, found = load(source, 17)
        assert ids.dtype == found.dtype == np.int32
        assert (ids.tolist(), found.tolist()) == (rows[:17], lengths[:17])
        assert load(source)[0].shape == (40, 12)
        cut, cut_lengths = load(source, 5, 4)
        assert cut.tolist() == [row[:4] for row in rows[:5]]
        assert cut_lengths.tolist() == [min(length, 4) for length in lengths[:5]]


def test_named_tensors_and_columns(tmp_path: Path) -> None:
    save_file({"ids": IDS, "mask": MASK}, tmp_path / "a.safetensors")
    rows, _ = compacted_by_loop(IDS, MASK)
    assert load(f"{tmp_path}/a.safetensors#ids,mask")[0].tolist() == rows
    assert load(f"{tmp_path}/a.safetensors#ids")[0].tolist() == IDS.tolist()
    with pytest.raises(DataError, match=r"no 'input_ids' \(it has: ids, mask\)"):
        load(tmp_path / "a.safetensors")
    with pytest.raises(DataError, match="no 'masks'"):
        load(f"{tmp_path}/a.safetensors#ids,masks")


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, ">i4"])
def test_npy_of_any_integer_type_and_order(tmp_path: Path, order: str, dtype: object) -> None:
    np.save(tmp_path / "a.npy", np.asarray(IDS, dtype, order=order))
    ids, lengths = load(tmp_path / "a.npy", 9)
    assert ids.tolist() == IDS[:9].tolist()
    assert lengths.tolist() == [12] * 9


def test_ragged_parquet_rows_need_no_mask(tmp_path: Path) -> None:
    rows = [[1, 2, 3], [4], [5, 6]]
    parquet.write_table(pyarrow.table({"input_ids": rows}), tmp_path / "a.parquet")
    ids, lengths = load(tmp_path / "a.parquet")
    assert ids.tolist() == [[1, 2, 3], [4, 0, 0], [5, 6, 0]]
    assert lengths.tolist() == [3, 1, 2]
    with pytest.raises(DataError, match="sequence length of 4 .* at most 3 tokens"):
        load(tmp_path / "a.parquet", 3, 4)


def test_a_folder_and_a_url(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", IDS[:25])
    np.save(tmp_path / "1.npy", IDS[25:])
    assert load(tmp_path, 30)[0].tolist() == IDS[:30].tolist()
    buffer = io.BytesIO()
    np.save(buffer, IDS)
    fsspec.filesystem("memory").pipe_file("/ids/a.npy", buffer.getvalue())
    assert load("memory://ids/a.npy", 3)[0].tolist() == IDS[:3].tolist()


def test_rows_come_in_blocks_of_bounded_size(tmp_path: Path) -> None:
    ids = np.arange(3000 * 4, dtype=np.int32).reshape(3000, 4)
    np.save(tmp_path / "a.npy", ids)
    save_file({"input_ids": ids}, tmp_path / "a.safetensors")
    for name in ("a.npy", "a.safetensors"):
        blocks = [b for b, _ in iter_token_ids(str(tmp_path / name), num_instances=None)]
        assert max(len(block) for block in blocks) <= 1024
        assert np.array_equal(np.concatenate(blocks), ids)


def test_the_problem_of_a_file_is_named(tmp_path: Path) -> None:
    np.save(tmp_path / "flat.npy", IDS[0])
    np.save(tmp_path / "float.npy", IDS.astype(np.float32))
    np.save(tmp_path / "good.npy", IDS)
    (tmp_path / "olmo.npy").write_bytes(IDS.astype("<u2").tobytes())
    (tmp_path / "cut.npy").write_bytes((tmp_path / "good.npy").read_bytes()[:-8])
    masked = IDS.copy()
    save_file({"input_ids": masked, "attention_mask": MASK * 0}, tmp_path / "none.safetensors")
    parquet.write_table(
        pyarrow.table({"input_ids": [[1, 2]], "attention_mask": [[1]]}), tmp_path / "short.parquet"
    )
    parquet.write_table(pyarrow.table({"input_ids": [[1, None]]}), tmp_path / "null.parquet")
    for name, message in {
        "flat.npy": r"shape \[12\]",
        "float.npy": "type float32",
        "olmo.npy": "no .npy header",
        "cut.npy": "cut off",
        "none.safetensors": "instance 0 has no real token",
        "short.parquet": "differ in length",
        "null.parquet": "empty \\(null\\) positions",
        "good.npy#x": "no named parts",
        "nothing.npy": "There is no",
    }.items():
        with pytest.raises(DataError, match=message):
            load(tmp_path / name)
    with pytest.raises(DataError, match="41 instances were requested, but .* holds 40"):
        load(tmp_path / "good.npy", 41)
    with pytest.raises(DataError, match="sequence length of 13 .* at most 12 tokens"):
        load(tmp_path / "good.npy", 2, 13)
    limit = int(IDS.max())
    row, position = np.argwhere(limit == IDS)[0]
    with pytest.raises(DataError, match=f"instance {row}, position {position} holds token id"):
        load(tmp_path / "good.npy", vocab_size=limit)


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("exploded"),))  # type: ignore[return-value]


def test_no_pickle_is_ever_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("object.npy", np.array([[_Bomb()]], dtype=object), allow_pickle=True)
    Path("raw.npy").write_bytes(pickle.dumps(_Bomb()))
    Path("raw.safetensors").write_bytes(pickle.dumps(_Bomb()))
    for name in ("object.npy", "raw.npy", "raw.safetensors"):
        with pytest.raises(DataError):
            load(name)
    assert not Path("exploded").exists()


def _safetensors_bytes(header: object, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "I64", "shape": [2, 2], "data_offsets": [0, 64]},  # beyond the file
        {"dtype": "I64", "shape": [2, 3], "data_offsets": [0, 32]},  # too few bytes
        {"dtype": "I64", "shape": [-2, -2], "data_offsets": [0, 32]},
        {"dtype": "I64", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 32]},
        {"dtype": "I64", "shape": 3, "data_offsets": [0, 32]},
        {"dtype": ["I64"], "shape": [2, 2], "data_offsets": [0, 32]},
        {"shape": [2, 2]},
        7,
    ],
)
def test_a_lying_safetensors_header_is_refused(tmp_path: Path, entry: object) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(_safetensors_bytes({"input_ids": entry}, b"\0" * 32))
    with pytest.raises(DataError):
        load(path)


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.sampled_from(["a.safetensors", "a.parquet", "a.npy"]),
    place=st.floats(0, 1),
    junk=st.binary(min_size=1, max_size=9),
    near_start=st.booleans(),
)
def test_fuzz_a_damaged_file_gives_ids_or_a_data_error(
    tmp_path: Path, name: str, place: float, junk: bytes, near_start: bool
) -> None:
    path = tmp_path / name
    if not (tmp_path / f"good-{name}").exists():
        write_all(tmp_path, IDS, MASK)
        np.save(tmp_path / "a.npy", IDS)
        path.rename(tmp_path / f"good-{name}")
    content = (tmp_path / f"good-{name}").read_bytes()
    at = int(place * (120 if near_start else len(content)))
    path.write_bytes(content[:at] + junk + content[at + len(junk) :])
    try:
        ids, lengths = load(path, vocab_size=1000)
    except UserError:
        return
    assert ids.min() >= 0
    assert ids.max() < 1000
    assert lengths.min() >= 1
