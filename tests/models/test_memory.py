"""Scoring and loading where memory is short: allocations that fail, in processes of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import OlmoConfig, OlmoForCausalLM

from ke_ray.models.memory import is_out_of_memory

_START = """
import resource, sys, numpy, torch
from ke_ray.errors import KeRayError
from ke_ray.models.loading import load_model
from ke_ray.models.scoring import score_within_memory
torch.set_num_threads(1)

def leave(num_bytes):
    now = 4096 * int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (now + num_bytes, resource.RLIM_INFINITY))

def score(model, ids, batch_size):
    keys = dict(measures=("knowledge_entropy",), num_instances=len(ids))
    return score_within_memory(model, ids, None, batch_size=batch_size, **keys)

model = load_model(sys.argv[1])
ids = numpy.random.default_rng(0).integers(2, 128, (256, 64))
expected, _ = score(model, ids[:2], 1)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model of one layer, 52 MB of weights, 4 MB of coefficients per instance of 64 tokens."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    config = OlmoConfig(
        vocab_size=128,
        hidden_size=256,
        intermediate_size=16384,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
        eos_token_id=0,
        pad_token_id=1,
    )
    OlmoForCausalLM(config).save_pretrained(folder)
    return folder


def run(script, checkpoint):
    return subprocess.run(
        [sys.executable, "-c", _START + script, str(checkpoint)],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_batch_that_does_not_fit_is_halved_until_it_does_and_gives_the_same_sums(checkpoint):
    done = run(
        """
whole, size = score(model, ids, 4)
assert size == 4
leave(400_000_000)  # a batch of 256 needs 1 GB for each tensor of coefficients
sums, size = score(model, ids, 256)
assert 1 <= size < 256, size
for name, table in whole.tables.items():
    torch.testing.assert_close(sums.tables[name], table, rtol=1e-5, atol=1e-7)
print("smaller batch", size)
""",
        checkpoint,
    )
    assert "smaller batch" in done.stdout, done.stderr


@pytest.mark.parametrize("room_bytes", [8_000_000, 75_000_000])  # to map the file, to copy it
def test_a_model_that_does_not_fit_is_no_broken_checkpoint(checkpoint, room_bytes):
    done = run(
        f"""
leave({room_bytes})
try:
    load_model(sys.argv[1])
except KeRayError as error:
    print(type(error).__name__, error)
""",
        checkpoint,
    )
    assert done.stdout.startswith("DeviceMemoryError"), done.stdout + done.stderr
    assert "has 0.0516 GB of weights on disk, to be loaded as torch.float32" in done.stdout


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("shape '[2]' is invalid"), False),
        (torch.OutOfMemoryError("CUDA"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (MemoryError(), True),
    ],
)
def test_other_errors_are_not_taken_for_it(error, expected):
    assert is_out_of_memory(error) is expected
