"""The precision of float32 products: set for a block, and never that of what ke_ray sums itself."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ke_ray.core.precision import matmul_precision
from ke_ray.models.scoring import score_instances


def test_the_setting_is_put_back_after_an_error() -> None:
    before = torch.get_float32_matmul_precision()
    seen = []
    with suppress(ZeroDivisionError), matmul_precision("high"):
        seen.append(torch.get_float32_matmul_precision())
        seen.append(str(1 // 0))
    assert seen == ["high"]
    assert torch.get_float32_matmul_precision() == before


class Products(TorchDispatchMode):
    """Notes each operation with the precision of products in force."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, str]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.add((func.__name__.partition(".")[0], torch.get_float32_matmul_precision()))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("family", "measure", "own"),
    [
        ("olmo", "attention_entropy", "_scaled_dot_product_flash_attention_for_cpu"),
        ("gemma2", "attention_entropy", "matmul"),  # soft-capped rows
        ("olmoe", "knowledge_entropy", "matmul"),  # of each expert
    ],
)
def test_what_ke_ray_sums_is_exact_whatever_the_models_products_are(
    tiny_decoder, family: str, measure: str, own: str
) -> None:
    """TF32 would bias it; the model's own products keep the precision of the study."""
    model, ids = tiny_decoder(family), np.arange(3, 19).reshape(2, 8)
    with Products() as products, matmul_precision("high"):
        score_instances(model, ids, measures=[measure], num_instances=2)
    assert (own, "highest") in products.seen
    assert (own, "high") not in products.seen
    assert ("linear", "high") in products.seen
