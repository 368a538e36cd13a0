"""What ``auto`` is in a scan's precision, and that a folder never holds two of them."""

from __future__ import annotations

import pytest

from ke_ray.errors import ResultsError
from ke_ray.planning.scan import prepare_scan
from ke_ray.planning.scan_precision import settle_precision


def never_asked() -> bool | None:
    raise AssertionError("GPUs were looked for")


@pytest.mark.parametrize(
    ("device", "gpus", "dtype", "products"),
    [
        ("auto", True, "bfloat16", "high"),
        ("auto", False, "float32", "highest"),  # GPUs without units for either
        ("auto", None, "float32", "highest"),
        ("cuda", None, "bfloat16", "high"),  # GPUs that come later
        ("cuda", False, "float32", "highest"),
    ],
)
def test_auto_is_what_the_devices_have(scan_study, device, gpus, dtype, products):
    study = scan_study(device=device, dtype="auto", matmul_precision="auto")
    settled = settle_precision(study, lambda: gpus)
    assert (settled.dtype, settled.matmul_precision) == (dtype, "highest")
    plain = settle_precision(study.model_copy(update={"dtype": "float32"}), lambda: gpus)
    assert (plain.dtype, plain.matmul_precision) == ("float32", products)


def test_gpus_are_looked_for_only_where_the_answer_matters(scan_study):
    study = scan_study(dtype="bfloat16", matmul_precision="high")
    assert settle_precision(study, never_asked) is study
    on_cpus = scan_study(dtype="auto", matmul_precision="auto", device="cpu")
    settled = settle_precision(on_cpus, never_asked)
    assert (settled.dtype, settled.matmul_precision) == ("float32", "highest")


def test_identity_and_manifest_hold_what_auto_became(scan_study):
    setup = prepare_scan(scan_study(dtype="auto"), lambda: True)
    assert setup.study.dtype == "bfloat16"
    assert setup.folder.manifest["identity"]["dtype"] == "bfloat16"
    assert setup.folder.manifest["config"]["dtype"] == "bfloat16"


def test_a_folder_begun_on_gpus_is_not_continued_on_cpus_unawares(scan_study):
    prepare_scan(scan_study(dtype="auto"), lambda: True).folder.write_manifest()
    message = r"results with dtype bfloat16.*has float32 \(auto.*--set dtype=bfloat16"
    with pytest.raises(ResultsError, match=message):
        prepare_scan(scan_study(dtype="auto"), lambda: None)
    continued = prepare_scan(scan_study(dtype="bfloat16"), never_asked)
    assert continued.folder.manifest["identity"]["dtype"] == "bfloat16"


def test_products_in_tf32_are_another_result_and_highest_ones_are_as_before(scan_study):
    setup = prepare_scan(scan_study())
    assert "matmul_precision" not in setup.folder.manifest["identity"]
    setup.folder.write_manifest()
    prepare_scan(scan_study(matmul_precision="auto"), lambda: None)
    with pytest.raises(ResultsError, match=r"matmul_precision highest.*has high \(auto"):
        prepare_scan(scan_study(matmul_precision="auto"), lambda: True)
    with pytest.raises(ResultsError, match=r"matmul_precision highest, this run has high:"):
        prepare_scan(scan_study(matmul_precision="high"))
