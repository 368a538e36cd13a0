"""The page about callbacks, run as it stands, with a tiny model under the name of the page's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from ke_ray.report.sources import find_results
from ke_ray.results.scan_folder import ScanFolder

PAGE = Path(__file__).parents[2] / "docs" / "callbacks.md"


def write_stand_ins() -> None:
    """A model, its tokenizer and texts in the current folder, where transformers looks first."""
    words = [f"w{number}" for number in range(61)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained("EleutherAI/pythia-70m")
    config = GPTNeoXConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    GPTNeoXForCausalLM(config).save_pretrained("EleutherAI/pythia-70m")
    for name, num_rows in (("d.txt", 8), ("train.txt", 8 * 12)):
        text = " ".join(words[(7 * i + i // 5) % 61] for i in range(num_rows * 128))
        Path(name).write_text(text)


def test_the_examples_run_and_leave_folders_that_reports_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_stand_ins()
    page = PAGE.read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": "page"}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    folders = [f"runs/{name}" for name in ("trainer", "lightning", "loop")]
    steps = {
        name: sorted(set(ScanFolder.open(name).entropy()["step"].to_pylist())) for name in folders
    }
    # Three epochs of twelve steps; the plain loop makes one.
    assert steps == {folders[0]: [0, 34], folders[1]: [0, 34], folders[2]: [0]}
    (forecast,) = re.findall(r"^```text\n(.*?)\n```", page, re.MULTILINE | re.DOTALL)
    assert forecast in capsys.readouterr().err
    assert [result.kind for result in find_results(folders)] == ["scan"] * 3
