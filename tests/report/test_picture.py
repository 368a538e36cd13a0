"""The picture of a scan: drawn without a browser, from what the files hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import synthetic
from PIL import Image

from ke_ray.errors import ResultsError, UserError
from ke_ray.report.charts.theme import PALETTES
from ke_ray.report.picture import picture

PALETTE = PALETTES["light"]


def _coloured(path: Path, colour: str) -> int:
    """Pixels of exactly this colour."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.asarray(Image.open(path).convert("RGB")) == wanted).all(-1).sum())


def test_each_corpus_is_drawn_in_its_colour(scan_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "picture.png"
    assert picture(scan_folder, target) == str(target)
    assert Image.open(target).width > 1200
    assert _coloured(target, PALETTE[0]) > 300
    assert _coloured(target, PALETTE[1]) > 300
    assert _coloured(target, PALETTE[2]) == 0


def test_the_parent_folder_will_do_when_it_holds_one_scan(
    scan_folder: Path, tmp_path: Path
) -> None:
    picture(scan_folder, tmp_path / "a.png")
    picture(scan_folder.parent, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_only_measures_that_were_scored_get_a_panel(tmp_path: Path) -> None:
    full = synthetic.make_scan(tmp_path / "full", steps=[0, 5], corpora=("a",))
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(full / "entropy.parquet")
    pq.write_table(
        table.filter(pc.equal(table["measure"], "knowledge_entropy")), full / "entropy.parquet"
    )
    picture(full, tmp_path / "one.png")
    assert Image.open(tmp_path / "one.png").width < 600


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no"):
        picture(tmp_path / "nowhere", tmp_path / "x.png")
    with pytest.raises(ResultsError, match="holds 0 scans"):
        picture(tmp_path, tmp_path / "x.png")
    broken = synthetic.make_scan(tmp_path / "broken", steps=[], failed=("step3",))
    with pytest.raises(ResultsError, match="no scored checkpoint"):
        picture(broken, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_the_report_imports_neither_torch_nor_ray_nor_mlflow(
    scan_folder: Path, tmp_path: Path
) -> None:
    code = (
        "import sys; from ke_ray.report.picture import picture; "
        f"picture({str(scan_folder)!r}, {str(tmp_path / 'p.png')!r}); "
        "bad = {'torch', 'ray', 'mlflow', 'transformers'} & set(sys.modules); "
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
