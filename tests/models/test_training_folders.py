"""Folders of training tools, as those tools write them, load as the model that was trained."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

from ke_ray.checkpoints.find.catalog import list_checkpoints
from ke_ray.checkpoints.formats.fingerprint import tensors_sha256, weights_sha256
from ke_ray.models.loading import load_model


def assert_same(model: PreTrainedModel, trained: PreTrainedModel) -> None:
    """Equal parameters, of which the loaded ones are float32."""
    own, expected = dict(model.named_parameters()), dict(trained.named_parameters())
    assert own.keys() == expected.keys()
    for name, parameter in own.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, expected[name].float()), name


@pytest.mark.parametrize("tied", [True, False])
def test_a_trainers_sharded_bf16_folder(tmp_path: Path, tiny_decoder, tied: bool) -> None:
    model = tiny_decoder("llama", seed=1, tie_word_embeddings=tied).to(torch.bfloat16)
    # The Trainer takes shards of 50 GB, which tiny models do not fill.
    model.save_pretrained = functools.partial(model.save_pretrained, max_shard_size="10KB")
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=2, save_steps=1, learning_rate=0.1,
        per_device_train_batch_size=1, use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": torch.arange(9), "labels": torch.arange(9)}] * 2
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    first, second, final = list_checkpoints(str(tmp_path / "out"))
    assert [first.step, second.step, final.step] == [1, 2, 2]
    folder = Path(second.location)
    assert (folder / "optimizer.pt").is_file()
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    assert_same(load_model(folder), model)
    assert weights_sha256(folder) == tensors_sha256(model.state_dict())
    assert weights_sha256(first.location) != weights_sha256(folder)
    assert final.duplicate_of == second.name
    assert second.size_bytes is not None
    assert second.size_bytes < sum(path.stat().st_size for path in folder.iterdir()) / 1.5


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("zip_archive", [True, False])
def test_pickled_bf16_shards(tmp_path: Path, tiny_decoder, tied: bool, zip_archive: bool) -> None:
    """As transformers wrote them before safetensors: a tied head is stored in another shard."""
    model = tiny_decoder("llama", seed=2, tie_word_embeddings=tied).to(torch.bfloat16)
    model.config.save_pretrained(tmp_path)
    tensors = list(model.state_dict().items())
    weight_map = {}
    for number, part in enumerate((tensors[:7], tensors[7:]), start=1):
        name = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save(dict(part), tmp_path / name, _use_new_zipfile_serialization=zip_archive)
        weight_map |= dict.fromkeys(dict(part), name)
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_same(load_model(tmp_path), model)
    assert weights_sha256(tmp_path) == tensors_sha256(model.state_dict())
