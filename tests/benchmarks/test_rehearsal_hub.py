"""The weight files that the rehearsal's stand-in makes while it sends them."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import rehearsal_hub
import torch
from rehearsal_hub import checkpoint_files, generating_hub
from safetensors.torch import load_file
from shape import Shape

from ke_ray.models.loading import load_model


def test_a_checkpoint_that_is_made_while_it_is_sent_is_a_real_one(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(rehearsal_hub, "MAX_SHARD_BYTES", 200_000)
    config = Shape(2, 64, 128, 4, 512, 64).config(tie_word_embeddings=False)
    config.architectures = ["OlmoForCausalLM"]
    files = checkpoint_files(config, seed=3)
    assert len(files) > 1
    with generating_hub(tmp_path / "hub") as hub:
        hub.add("org/model", "step1", config, files)
        (folder,) = (hub.root / "org/model").iterdir()
        for name, file in files.items():
            url = f"{hub.url}/org/model/resolve/step1/{name}"
            whole = urllib.request.urlopen(url).read()
            assert len(whole) == file.size_bytes
            for start, end in ((0, 1), (3, 5000), (file.size_bytes - 7, file.size_bytes)):
                request = urllib.request.Request(url, headers={"Range": f"bytes={start}-{end - 1}"})
                assert urllib.request.urlopen(request).read() == whole[start:end]
            (folder / name).write_bytes(whole)
    model = load_model(folder, dtype=torch.float32, device="cpu")
    assert sum(p.numel() * 4 for p in model.parameters()) <= sum(
        f.size_bytes for f in files.values()
    )
    stored = {k: v for name in files for k, v in load_file(folder / name).items()}
    assert stored.keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, stored[key])
    assert 0.01 < stored["lm_head.weight"].std() < 0.03
