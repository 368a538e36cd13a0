"""``ke-ray data``."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

from checkpoint_site import Site


def test_data_is_listed_fetched_and_listed_as_here(ke_ray, tmp_path, reference_data: Path) -> None:
    name = "fictional_knowledge"
    shutil.copytree(reference_data / "data" / name, tmp_path / "site" / name)
    folder = ("--folder", tmp_path / "data")
    listed = ke_ray("data", "list", *folder)
    assert listed.code == 0
    assert "0 of 2" in listed.out
    assert "0 of 40" in listed.out
    with Site(tmp_path / "site") as site:
        threading.Thread(target=site.serve_forever, args=(0.05,), daemon=True).start()
        command = ("data", "fetch", name, *folder, "--mirror", site.url)
        done = ke_ray(*command)
        assert done.code == 0, done.err
        assert "Licence: Apache-2.0" in done.out
        assert "2 files in" in done.out
        assert "2 of them new." in done.out
        assert "0 of them new." in ke_ray(*command).out
        site.shutdown()
    assert "2 of 2" in ke_ray("data", "list", *folder).out


def test_a_name_that_is_not_published_is_wrong_input(ke_ray, tmp_path) -> None:
    result = ke_ray("data", "fetch", "c5", "--folder", tmp_path)
    assert result.code == 2
    assert "give one of pubmed, c4" in result.err
