"""Folders of training tools, as those tools write them, load as the model that was trained."""

from __future__ import annotations

import dataclasses
import functools
import json
import pickle
import shutil
import socket
import subprocess
import sys
import tracemalloc
import types
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from transformers import PreTrainedModel, Trainer, TrainingArguments

from ke_ray.checkpoints.find.catalog import list_checkpoints
from ke_ray.checkpoints.formats.fingerprint import tensors_sha256, weights_sha256
from ke_ray.checkpoints.formats.tool_names import TABLES, NameTable
from ke_ray.checkpoints.formats.weights import open_weights
from ke_ray.errors import CheckpointError, CheckpointSpecError
from ke_ray.models.loading import load_model
from ke_ray.models.saving import save_model
from ke_ray.training.checkpoint import States, TrainingState
from ke_ray.training.parallel import Worker


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


def with_config(model: PreTrainedModel, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("attribute", ["model", "net"])
@pytest.mark.parametrize("beside", [True, False])
def test_lightnings_files(tmp_path: Path, tiny_decoder, attribute: str, beside: bool) -> None:
    """As Lightning writes them: names start with the attribute of the LightningModule."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    models = [tiny_decoder("llama", seed=seed, tie_word_embeddings=True) for seed in range(2)]
    for step, model in zip((100, 20), models, strict=True):
        state = {f"{attribute}.{name}": t for name, t in model.state_dict().items()}
        torch.save(
            {
                "epoch": 0, "global_step": step, "pytorch-lightning_version": "2.5.0",
                "state_dict": state, "optimizer_states": [{"state": {0: {"step": 1.0}}}],
                "hyper_parameters": {"lr": 0.1}, "loops": {}, "callbacks": {"a": {"b": "c"}},
            },
            folder / f"epoch=0-step={step}.ckpt",
        )  # fmt: skip
    with pytest.raises(CheckpointSpecError, match=r"Lightning.*config\.json of.*beside it"):
        list_checkpoints(str(folder))
    with_config(models[0], folder if beside else folder.parent)
    refs = list_checkpoints(str(folder))
    assert [ref.step for ref in refs] == [20, 100]
    assert [ref.format for ref in refs] == ["lightning"] * 2
    assert refs == list_checkpoints(f"{folder}/*.ckpt")
    assert refs[:1] == list_checkpoints(str(folder / "epoch=0-step=20.ckpt"))
    assert refs[0].size_bytes is not None
    for ref, model in zip(refs, reversed(models), strict=True):
        assert_same(load_model(ref), model)
        assert weights_sha256(ref) == tensors_sha256(model.state_dict())
    # Another name and another note of the same weights.
    last = torch.load(refs[0].location) | {"callbacks": {"a": {"b": "another"}}}
    torch.save(last, folder / "last.ckpt")
    assert [ref.duplicate_of for ref in list_checkpoints(str(folder))] == [None, None, refs[0].name]


def test_lightnings_objects_are_refused(tmp_path: Path, tiny_decoder) -> None:
    folder = with_config(tiny_decoder("llama"), tmp_path)
    torch.save({"state_dict": {}, "hyper_parameters": tmp_path}, folder / "step=1.ckpt")
    with pytest.raises(CheckpointError, match="hyper_parameters are the usual cause"):
        load_model(folder / "step=1.ckpt")


class NanochatBlock(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.attn, self.mlp = nn.Module(), nn.Module()
        kv_width = width // heads * kv_heads
        for name, rows in (("c_q", width), ("c_k", kv_width), ("c_v", kv_width), ("c_proj", width)):
            setattr(self.attn, name, nn.Linear(width, rows, bias=False))
        self.mlp.c_fc = nn.Linear(width, 4 * width, bias=False)
        self.mlp.c_proj = nn.Linear(4 * width, width, bias=False)


class Nanochat(nn.Module):
    """nanochat's equations (RoPE, then unweighted QK-norm; ReLU²; logits 15 tanh(x / 15))."""

    def __init__(self, vocab: int, width: int, layers: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.d_head = heads, kv_heads, width // heads
        blocks = [NanochatBlock(width, heads, kv_heads) for _ in range(layers)]
        self.transformer = nn.ModuleDict(
            {"wte": nn.Embedding(vocab, width), "h": nn.ModuleList(blocks)}
        )
        self.lm_head = nn.Linear(width, vocab, bias=False)

    @staticmethod
    def norm(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        half = self.d_head // 2
        frequency = 10_000.0 ** (-torch.arange(half) / half)
        angle = torch.arange(x.shape[0])[:, None, None] * frequency
        first, second = x[..., :half], x[..., half:]
        turned = (first * angle.cos() + second * angle.sin(),
                  second * angle.cos() - first * angle.sin())  # fmt: skip
        return torch.cat(turned, -1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        n = len(ids)
        x = self.norm(self.transformer["wte"](ids))
        for block in self.transformer["h"]:
            y = self.norm(x)
            q = self.norm(self.rotated(block.attn.c_q(y).view(n, self.heads, self.d_head)))
            k = self.norm(self.rotated(block.attn.c_k(y).view(n, self.kv_heads, self.d_head)))
            v = block.attn.c_v(y).view(n, self.kv_heads, self.d_head)
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q, k) / self.d_head**0.5
            scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
            mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
            x = x + block.attn.c_proj(mixed.reshape(n, -1))
            x = x + block.mlp.c_proj(block.mlp.c_fc(self.norm(x)).relu().square())
        return 15 * torch.tanh(self.lm_head(self.norm(x)) / 15)


@pytest.fixture
def nanochat(tmp_path: Path) -> tuple[Path, Nanochat]:
    """``d2/`` with two steps as nanochat writes them."""
    folder = tmp_path / "d2"
    folder.mkdir()
    for step in (20, 1000):
        torch.manual_seed(step)
        model = Nanochat(97, 32, 2, 4, 2)
        sizes = {"sequence_len": 64, "vocab_size": 97, "n_layer": 2, "n_head": 4}
        meta = {"step": step, "model_config": {**sizes, "n_kv_head": 2, "n_embd": 32}}
        state = {f"_orig_mod.{name}": value for name, value in model.state_dict().items()}
        torch.save(state, folder / f"model_{step:06d}.pt")
        (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta))
        torch.save({"state": {}}, folder / f"optim_{step:06d}_rank0.pt")
    return folder, model.eval()


@torch.no_grad()
def test_nanochats_files_compute_what_nanochat_computes(nanochat: tuple[Path, Nanochat]) -> None:
    folder, model = nanochat
    refs = list_checkpoints(str(folder))
    assert [(ref.step, ref.format) for ref in refs] == [(20, "nanochat"), (1000, "nanochat")]
    assert refs == list_checkpoints(f"{folder}/model_*.pt")
    ids = torch.arange(17) % 11
    logits = load_model(refs[1])(ids[None]).logits[0]
    torch.testing.assert_close(logits, model(ids), rtol=1e-5, atol=1e-5)
    assert weights_sha256(refs[0]) != weights_sha256(refs[1])


def test_equal_weights_in_nanochats_files_are_flagged(nanochat: tuple[Path, Nanochat]) -> None:
    folder, _ = nanochat
    shutil.copyfile(folder / "meta_000020.json", folder / "meta_000030.json")
    torch.save(torch.load(folder / "model_000020.pt"), folder / "model_000030.pt")
    original = (folder / "model_000020.pt").read_bytes()
    assert original != (folder / "model_000030.pt").read_bytes()  # which holds its name
    refs = list_checkpoints(str(folder))
    assert [ref.duplicate_of for ref in refs] == [None, refs[0].name, None]


def test_nanochats_other_variants_are_refused_by_name(nanochat: tuple[Path, Nanochat]) -> None:
    folder, _ = nanochat
    path, meta_path = folder / "model_001000.pt", folder / "meta_001000.json"
    torch.save(torch.load(path) | {"_orig_mod.resid_lambdas": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"'resid_lambdas', which ke_ray's table of nanochat"):
        load_model(path)
    meta = json.loads(meta_path.read_text())
    meta["model_config"]["window_pattern"] = "SSSL"
    meta_path.write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match="no counterpart of window_pattern='SSSL'"):
        load_model(path)
    meta_path.unlink()
    with pytest.raises(CheckpointError, match="it is a nanochat.*with its meta_"):
        load_model(path)


def test_states_of_ke_rays_own_pretraining(tmp_path: Path, tiny_decoder) -> None:
    """A state has no configuration: it is that of the run's checkpoints."""
    models = [tiny_decoder("llama", seed=seed) for seed in range(3)]
    save_model(models[0], tmp_path / "checkpoints" / "step0")
    for step, model in enumerate(models):
        optimizer = torch.optim.AdamW(model.parameters())
        with closing(States(str(tmp_path / "state"), Worker(), identity="x", keep=3)) as states:
            states.save(TrainingState(step=step), model, optimizer)
    refs = list_checkpoints(str(tmp_path / "state"))
    assert [ref.step for ref in refs] == [0, 1, 2]
    for ref, model in zip(refs, models, strict=True):
        assert_same(load_model(ref), model)
        assert weights_sha256(ref) == tensors_sha256(model.state_dict())


def in_pieces(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Written by two processes, each of which holds half of the rows of every tensor."""
    code = (
        "import sys, torch, torch.distributed as d, torch.distributed.checkpoint as dcp\n"
        "from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh\n"
        "rank, port, source, target = sys.argv[1:]\n"
        "store = d.TCPStore('127.0.0.1', int(port), 2, rank == '0')\n"
        "d.init_process_group('gloo', store=store, rank=int(rank), world_size=2)\n"
        "mesh = init_device_mesh('cpu', (2,))\n"
        "whole = torch.load(source)\n"
        "state = {n: distribute_tensor(t, mesh, [Shard(0)]) for n, t in whole.items()}\n"
        "dcp.save(state, checkpoint_id=target)\n"
        "d.destroy_process_group()\n"
    )
    source = folder.with_suffix(".pt")
    torch.save(tensors, source)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), port, str(source), str(folder)])
        for rank in range(2)
    ]
    assert [process.wait(300) for process in processes] == [0, 0]


def test_distributed_pieces_are_put_together(tmp_path: Path, tiny_decoder) -> None:
    """Accelerate's FSDP folder: the model's own names under ``model.``, rows in two files."""
    model = tiny_decoder("llama", seed=3, tie_word_embeddings=False).to(torch.bfloat16)
    folder = with_config(model, tmp_path / "checkpoint-10")
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    in_pieces(state, folder / "pytorch_model_fsdp_0")
    assert len(list(folder.rglob("*.distcp"))) == 2
    (ref,) = list_checkpoints(str(tmp_path))
    assert (ref.step, ref.format) == (10, "dcp")
    assert_same(load_model(ref), model)
    assert weights_sha256(ref) == tensors_sha256(model.state_dict())


def as_olmo_core_names_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OLMo-core has a class of its own for where a piece lies."""
    module = types.ModuleType("olmo_core.distributed.checkpoint.filesystem")
    fields = ("relative_path", "offset", "length")
    own = dataclasses.make_dataclass("_StorageInfo", fields)
    own.__module__ = module.__name__
    metadata = FileSystemReader(path.parent).read_metadata()
    metadata.storage_data = {
        index: own(info.relative_path, info.offset, info.length)
        for index, info in metadata.storage_data.items()
    }
    with monkeypatch.context() as patch:
        module._StorageInfo = own
        packages = module.__name__.split(".")
        for end in range(1, len(packages)):
            name = ".".join(packages[:end])
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, module.__name__, module)
        path.write_bytes(pickle.dumps(metadata))


def test_olmo_cores_folder(tmp_path: Path, tiny_decoder, monkeypatch) -> None:
    model = tiny_decoder("olmo2", seed=4)
    table = next(table for table in TABLES if table.tool == "OLMo-core")
    own = dict(tool_names(model, table))
    folder = tmp_path / "run" / "step1000"
    state = {"model": own, "optim": {"state": {"x": {"exp_avg": torch.zeros(3)}}, "step": 4}}
    dcp.save(state, checkpoint_id=folder / "model_and_optim")
    as_olmo_core_names_it(folder / "model_and_optim" / ".metadata", monkeypatch)
    (folder / "config.json").write_text('{"model": {"_CLASS_": "olmo_core.TransformerConfig"}}')
    (folder / ".metadata.json").write_text("{}")
    with pytest.raises(CheckpointSpecError, match=r"OLMo-core.*config\.json of.*one folder up"):
        list_checkpoints(str(folder))
    with_config(model, folder.parent)
    (ref,) = list_checkpoints(str(folder.parent))
    assert (ref.step, ref.format) == (1000, "dcp")
    assert_same(load_model(ref), model)
    # The same weights beside another optimizer, and other weights.
    state["optim"] = {"state": {"x": {"exp_avg": torch.ones(3)}}, "step": 5}
    dcp.save(state, checkpoint_id=folder.parent / "step2000" / "model_and_optim")
    state["model"] = {name: tensor + 1 for name, tensor in own.items()}
    dcp.save(state, checkpoint_id=folder.parent / "step3000" / "model_and_optim")
    flagged = [r.duplicate_of for r in list_checkpoints(str(folder.parent))]
    assert flagged == [None, "step1000", None]


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "model."])
def test_torchtitans_folder_with_rows_in_metas_order(
    tmp_path: Path, tiny_decoder, prefix: str
) -> None:
    model = tiny_decoder("llama", seed=5, mlp_bias=False, attention_bias=False)
    table = next(table for table in TABLES if table.tool == "torchtitan")
    own = {}
    for name, tensor in tool_names(model, table):
        if name.endswith((".wq.weight", ".wk.weight")):
            pairs = [
                head * 8 + part * 4 + j
                for head in range(len(tensor) // 8) for j in range(4) for part in range(2)
            ]  # fmt: skip
            tensor = tensor[pairs]
        own[prefix + name] = tensor
    folder = with_config(model, tmp_path) / "step-100"
    dcp.save({**own, "optimizer": {"x": torch.ones(2)}, "train_state": {"step": torch.tensor(1)}},
             checkpoint_id=folder)  # fmt: skip
    (ref,) = list_checkpoints(str(tmp_path))
    assert ref.step == 100
    assert_same(load_model(ref), model)
    with_config(tiny_decoder("qwen2"), folder)
    with pytest.raises(CheckpointError, match="configuration of a Llama.*'qwen2'"):
        load_model(ref)


def tool_names(model: PreTrainedModel, table: NameTable) -> Iterator[tuple[str, torch.Tensor]]:
    state = model.state_dict()
    for own, hf in reversed(table.names):  # of two names of one tensor the first counts
        for i in range(model.config.num_hidden_layers if "{i}" in own else 1):
            if (tensor := state.pop(hf.format(i=i), None)) is not None:
                yield own.format(i=i), tensor
    assert not state


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_distributed_folder_that_would_run_code_is_refused(
    tmp_path: Path, tiny_decoder, protocol: int
) -> None:
    folder = with_config(tiny_decoder("llama"), tmp_path / "step1")
    dcp.save({"model": {"a": torch.ones(2)}}, checkpoint_id=folder)
    mark = tmp_path / "executed"
    metadata = FileSystemReader(folder).read_metadata()
    metadata.planner_data = Bomb(mark)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata, protocol))
    with pytest.raises(CheckpointError, match=r"refused and nothing.*dcp_to_torch") as caught:
        load_model(folder)
    assert "it names" in str(caught.value)
    assert not mark.exists()
    pickle.loads((folder / ".metadata").read_bytes())  # noqa: S301 (it is ours)
    assert mark.exists(), "the bomb does not work"


def test_an_index_in_a_pickle_takes_no_memory(tmp_path: Path, tiny_decoder) -> None:
    folder = with_config(tiny_decoder("llama"), tmp_path / "step1")
    # LONG_BINPUT, for which the unpickler in C makes room for twice as many objects.
    (folder / ".metadata").write_bytes(b"\x80\x04Nr" + (2**24).to_bytes(4, "little") + b".")
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="not the metadata of a distributed checkpoint"):
            load_model(folder)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(position=st.floats(0, 1), junk=st.binary(max_size=12), keep=st.booleans())
def test_any_bytes_of_metadata_are_tensors_or_one_clear_error(
    tmp_path: Path, tiny_decoder, position: float, junk: bytes, keep: bool
) -> None:
    folder = tmp_path / "whole"
    if not folder.exists():
        with_config(tiny_decoder("llama"), folder)
        dcp.save({"model": {"norm.weight": torch.ones(2)}}, checkpoint_id=folder)
    content = (folder / ".metadata").read_bytes()
    cut = int(position * len(content))
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken, dirs_exist_ok=True)
    rest = content[cut + len(junk) :] if keep else b""
    (broken / ".metadata").write_bytes(content[:cut] + junk + rest)
    try:
        weights = open_weights(broken)
        assert all(weights[name].shape == weights.shape(name) for name in weights)
    except CheckpointError:
        pass


@pytest.mark.parametrize("written_by", ["pickle", "torch.save"])
def test_a_piece_that_would_run_code_is_refused(
    tmp_path: Path, tiny_decoder, written_by: str
) -> None:
    folder = with_config(tiny_decoder("llama"), tmp_path / "step1")
    dcp.save({"model": {"norm.weight": torch.ones(2)}}, checkpoint_id=folder)
    mark = tmp_path / "executed"
    metadata = FileSystemReader(folder).read_metadata()
    (info,) = metadata.storage_data.values()
    with (folder / info.relative_path).open("wb") as file:
        if written_by == "pickle":
            pickle.dump(Bomb(mark), file)
        else:
            torch.save(Bomb(mark), file)
        info.offset, info.length = 0, file.tell()
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"cannot read 'model\.norm\.weight'"):
        open_weights(folder)["model.norm.weight"]
    assert not mark.exists()


@pytest.mark.parametrize("damage", ["metadata", "file", "shape", "path"])
def test_a_damaged_distributed_folder_is_one_clear_error(
    tmp_path: Path, tiny_decoder, damage: str
) -> None:
    model = tiny_decoder("llama", seed=6)
    folder = with_config(model, tmp_path / "step1")
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder)
    metadata = FileSystemReader(folder).read_metadata()
    if damage == "metadata":
        content = (folder / ".metadata").read_bytes()
        (folder / ".metadata").write_bytes(content[: len(content) // 2])
    elif damage == "file":
        next(folder.glob("*.distcp")).write_bytes(b"")
    elif damage == "shape":
        entry = metadata.state_dict_metadata["model.model.norm.weight"]
        entry.size = torch.Size([64])
    else:
        next(iter(metadata.storage_data.values())).relative_path = "../x.distcp"
    if damage in ("shape", "path"):
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"step1"):
        load_model(folder)
