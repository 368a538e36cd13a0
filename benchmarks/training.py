"""The training loop against a plain one and Hugging Face Trainer, as ratios of CPU time.

    python benchmarks/training.py [--json] [--rounds 10] [--threads 2] [--steps 2]

Shape: OLMo, 6 layers, d_model 384, d_mlp 1,536, 6 heads, vocabulary 16,384, T = 256, batch 4,
float32, random weights. Every contender makes a fresh optimizer and trains the same number of
steps on the same rows, AdamW in two groups, cosine schedule, gradient clipping.

    plain     a PyTorch loop written out below: forward, loss, backward, clip, step       (floor)
    ours      ke_ray.training.loop.train
    extras    ours with injection into every batch and the progress file
    trainer   transformers.Trainer                                                          (peer)
    hooks     what injection, progress file and points in MLflow (SQLite) do in ten steps, without
              the steps; hooks_each: with one write a point, as it was before

Speeds (tokens per CPU second) are the inverse of the times; ``ours_over_plain`` is ours' speed
over the plain loop's. On a GPU (``--device cuda``) model-FLOPs utilisation and memory are printed
as well, for the OLMo-1B shape in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# A waiting thread must not spin: its CPU time would count as work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from gpu_scoring import peak_flops
from interleaved import Ratio, ratio, run_rounds
from shape import OLMO_1B, SMALL

from ke_ray.data.injection import InjectionPlan
from ke_ray.engine.train.trainer import ProgressFile
from ke_ray.studies.parts import TrackingSettings
from ke_ray.studies.training import TrainingSettings
from ke_ray.tracking.tracker import TrackedRun, Tracker
from ke_ray.training.loop import Hooks, Progress, StepRecord, train
from ke_ray.training.parallel import Worker
from ke_ray.training.tracking import SEND_EVERY_S, log_progress

SEQUENCE, BATCH = 256, 4
LENGTH_GPU = 1024  # of continual learning, on OLMo-1B's shape


class Rows:
    """Random token rows."""

    def __init__(
        self, count: int, width: int = SEQUENCE, vocabulary: int = SMALL.vocabulary
    ) -> None:
        generator = np.random.default_rng(0)
        self.ids = generator.integers(2, vocabulary, (count, width))

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, indices: np.ndarray) -> np.ndarray:
        return self.ids[indices]

    def order(self, epoch: int) -> np.ndarray:
        return np.arange(len(self))


def make_keys(**changes: Any) -> TrainingSettings:
    values = {"output": "unused", "sequence_length": SEQUENCE, "global_batch_size": BATCH}
    return TrainingSettings.model_validate({**values, **changes})


def plain(model: Any, rows: Rows, steps: int) -> None:
    """What anyone would write; nothing shared with the loop."""
    decayed = [p for n, p in model.named_parameters() if "embed" not in n]
    others = [p for n, p in model.named_parameters() if "embed" in n]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=4e-4,
        betas=(0.9, 0.95),
        eps=1e-5,
    )
    model.train()
    for step in range(1, steps + 1):
        ids = torch.from_numpy(rows.ids[(step - 1) * BATCH : step * BATCH])
        for group in optimizer.param_groups:
            group["lr"] = 4e-4 * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, SMALL.vocabulary), ids[:, 1:].reshape(-1)
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()


def ours(model: Any, rows: Rows, steps: int, hooks: Hooks | None = None) -> None:
    train(model, rows, make_keys(), num_steps=steps, hooks=hooks)


def extras(model: Any, rows: Rows, steps: int, folder: str) -> None:
    texts = {row: np.full(40, 7, np.int64) for row in range(BATCH)}
    plan = InjectionPlan(
        dict.fromkeys(range(1, steps + 1), 1), {1: texts}, {1: ()}, BATCH, SEQUENCE
    )
    file = ProgressFile(str(Path(folder, "progress.json")))

    def show(progress: Progress) -> None:
        file.write(progress, next_injection=plan.next_injection(progress.record.step))

    def inject(step: int, first: int, batch: np.ndarray) -> np.ndarray:
        return plan.inject(batch, step, range(first, first + len(batch)))

    ours(model, rows, steps, Hooks(transform=inject, on_progress=show))


class HooksAlone:
    """Injection, progress file and MLflow points of steps that are not taken."""

    NUM_STEPS = 10

    def __init__(self, run: TrackedRun, folder: str, step_s: float) -> None:
        self._run, self._path, self._step = run, str(Path(folder, "progress.json")), 0
        # In a run a write takes along the points of SEND_EVERY_S; here no time passes.
        self.points_per_write = max(1, round(SEND_EVERY_S / step_s))
        texts = {row: np.full(40, 7, np.int64) for row in range(BATCH)}
        every = dict.fromkeys(range(1, 100_000), 1)
        self._plan = InjectionPlan(every, {1: texts}, {1: ()}, BATCH, SEQUENCE)
        self._batch = Rows(BATCH).ids

    def take(self, points_per_write: int) -> None:
        log = log_progress(self._run, 200)  # a point every step, the most there is
        for _ in range(self.NUM_STEPS):
            self._step += 1
            self._plan.inject(self._batch.copy(), self._step, range(BATCH))
            record = StepRecord(self._step, self._step * 1024, 5.0, 4e-4, 1.0, 900.0, 1.0)
            progress = Progress(record, 100_000, 1.0)
            ProgressFile(self._path).write(
                progress, next_injection=self._plan.next_injection(self._step)
            )
            log(progress)
            if self._step % points_per_write == 0:
                self._run.flush()


def trainer(model: Any, rows: Rows, steps: int, folder: str) -> None:
    from transformers import Trainer, TrainingArguments
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    data = [{"input_ids": row, "labels": row} for row in torch.from_numpy(rows.ids)]
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=4e-4,
        weight_decay=0.1,
        adam_beta2=0.95,
        adam_epsilon=1e-5,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()):
        Trainer(model=model, args=arguments, train_dataset=data).train()


def measure(rounds: int, steps: int) -> tuple[dict[str, Ratio], dict[str, float]]:
    """Ratios of speeds, and tokens per CPU second of each contender."""
    rows, model = Rows(BATCH * steps), SMALL.model()
    ours(model, rows, 1)
    started = time.perf_counter()
    ours(model, rows, steps)
    step_s = (time.perf_counter() - started) / steps
    with (
        tempfile.TemporaryDirectory() as folder,
        Tracker(TrackingSettings(uri=f"sqlite:///{folder}/mlflow.db")) as tracker,
    ):
        run = tracker.start_run("benchmark", key="benchmark", kind="pretrain")
        hooks = HooksAlone(run, folder, step_s)
        seconds = run_rounds(
            {
                "plain": lambda: plain(model, rows, steps),
                "ours": lambda: ours(model, rows, steps),
                "extras": lambda: extras(model, rows, steps, folder),
                "trainer": lambda: trainer(model, rows, steps, folder),
                "hooks": lambda: hooks.take(hooks.points_per_write),
                "hooks_each": lambda: hooks.take(1),
            },
            rounds,
            lambda text: print(text, file=sys.stderr),
        )
    step = [t / steps for t in seconds["ours"]]
    together, each = (
        [t / hooks.NUM_STEPS for t in seconds.pop(name)] for name in ("hooks", "hooks_each")
    )
    print(f"{hooks.points_per_write} points of MLflow in one write", file=sys.stderr)
    ratios = {
        "hooks_over_step": ratio(together, step, "< 0.01"),
        "hooks_each_over_step": ratio(each, step, "reported"),
        "ours_over_plain": ratio(seconds["plain"], seconds["ours"], ">= 0.97"),
        "ours_over_trainer": ratio(seconds["trainer"], seconds["ours"], "> 1"),
        "extras_over_ours": ratio(seconds["ours"], seconds["extras"], ">= 0.99"),
    }
    tokens = BATCH * SEQUENCE * steps
    speeds = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    return ratios, speeds


def measure_gpu(micro_batch_size: int, steps: int) -> dict[str, float]:
    """OLMo-1B shape, bfloat16 autocast, T 1,024: model-FLOPs utilisation and memory.

    Three forward passes' operations a step; the optimizer is not counted. The peak is measured.
    """
    model = OLMO_1B.model(tie_word_embeddings=True).to("cuda")
    batch = 4 * micro_batch_size
    keys = make_keys(
        sequence_length=LENGTH_GPU,
        global_batch_size=batch,
        micro_batch_size=micro_batch_size,
        precision="bfloat16",
        log_every=steps,
    )
    worker, rows = Worker(device="cuda:0"), Rows(batch * steps, LENGTH_GPU, OLMO_1B.vocabulary)
    train(model, rows, keys, num_steps=2, worker=worker)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    train(model, rows, keys, num_steps=steps, worker=worker)
    torch.cuda.synchronize()
    duration_s = time.perf_counter() - started
    products = OLMO_1B.body_flops_per_token + OLMO_1B.head_flops_per_token
    attention = OLMO_1B.attention_flops_per_token * LENGTH_GPU / OLMO_1B.length
    speed = batch * LENGTH_GPU * steps / duration_s
    return {
        "tokens_per_s": speed,
        "mfu": speed * 3 * (products + attention) / peak_flops("cuda", 8192),
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--micro-batch-size", type=int, default=16, help="on a GPU")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.device == "cuda":
        found = measure_gpu(options.micro_batch_size, options.steps)
        print(json.dumps({"ratios": {"mfu": found["mfu"]}, **found}))
        return
    started = time.perf_counter()
    ratios, speeds = measure(options.rounds, options.steps)
    for name, value in ratios.items():
        print(
            f"{name:20s} {value.median:6.3f}  ({value.low:.3f} to {value.high:.3f}, "
            f"{value.rounds} rounds)  target {value.target}"
        )
    for name, speed in speeds.items():
        print(f"{name:20s} {speed:8,.0f} tokens per CPU second")
    print(f"{time.perf_counter() - started:.0f} s on {platform.processor() or 'CPU'}")
    if options.json:
        print(
            json.dumps(
                {
                    "ratios": {name: value.as_json() for name, value in ratios.items()},
                    "tokens_per_cpu_s": speeds,
                    "torch": torch.__version__,
                    "threads": options.threads,
                }
            )
        )


if __name__ == "__main__":
    main()
