"""Probes and downstream tasks against floors and peers, as ratios of CPU time.

    python benchmarks/evaluation.py [--json] [--rounds 10] [--threads 2] [--limit 6]

Shape: OLMo, 8 layers, d_model 512, d_mlp 2,048, 8 heads, vocabulary 50,304, random weights; the
OLMo tokenizer. Texts come from the reference data ($KE_RAY_REFERENCE_DATA, default ../shared).

Probes: all probes of some paragraphs of Fictional Knowledge.
    probes    ours: rows that short sequences share, LM head on target positions
    single    one probe at a time, logits everywhere                                (peer)
    forward   one full batch without padding: as many tokens as the probes really have, at their
              mean length, LM head on as many positions as there are target tokens  (floor)
    logits    the same batch with logits everywhere

Downstream: the first items of the six tasks, all in one call and each task in its own.
    ours      ke_ray.evaluation.lm
    hflm      lm-eval's HFLM at its best batch size, found first                    (peer)
The ideal beside each task's ratio counts floating-point operations: HFLM's real tokens, body and
LM head on each, over ours: contexts once, LM head on target positions. With ``--device cuda``
probes alone, in wall-clock time.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# A waiting thread must not spin: its CPU time would count as work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from interleaved import Ratio, clock_of, ratio, run_rounds
from shape import MIDDLE

from ke_ray.data.facts import FactSet, load_facts
from ke_ray.data.probes import Probe, build_probes
from ke_ray.evaluation.downstream import TASK_METRICS, load_tasks
from ke_ray.evaluation.lm import as_transformers_tokenizer, wrap_model
from ke_ray.evaluation.prefix_tree import Span, build_trees
from ke_ray.evaluation.probes import score_probes

BATCH_SIZES = (1, 2, 4, 8, 16, 64)
TOGETHER = "six_together"


def reference_data() -> Path:
    root = Path(os.environ.get("KE_RAY_REFERENCE_DATA", "../shared")).resolve() / "data"
    if not (root / "downstream").is_dir():
        raise SystemExit(f"no reference data in {root}; set KE_RAY_REFERENCE_DATA")
    return root


def load_probes(root: Path, tokenizer: Any, paragraphs: int) -> list[Probe]:
    facts = load_facts(root / "fictional_knowledge" / "paraphrase70.json", "paraphrase")
    return build_probes([FactSet("paraphrase", facts.facts[:paragraphs])], tokenizer)


def measure_probes(
    model: Any, probes: Sequence[Probe], rounds: int, say: Any
) -> tuple[dict[str, Ratio], dict[str, Any]]:
    on_cpu = model.device.type == "cpu"
    lengths = [len(p.context_ids) + len(p.target_ids) - 1 for p in probes]
    num_targets = sum(len(p.target_ids) for p in probes)
    width = round(sum(lengths) / len(lengths))
    height = round(sum(lengths) / width)
    batch = torch.randint(2, MIDDLE.vocabulary, (height, width), device=model.device)

    @torch.inference_mode()
    def single() -> float:
        total = 0.0
        for probe in probes:
            ids = torch.tensor([[*probe.context_ids, *probe.target_ids]], device=model.device)
            logits = model(ids[:, :-1], use_cache=False).logits[0, len(probe.context_ids) - 1 :]
            table = torch.log_softmax(logits.float(), -1)
            total += float(table.gather(1, ids[0, len(probe.context_ids) :, None]).sum())
        return total

    @torch.inference_mode()
    def forward() -> None:
        hidden = model.base_model(batch, use_cache=False).last_hidden_state
        model.lm_head(hidden.flatten(0, 1)[:num_targets])

    @torch.inference_mode()
    def logits() -> None:
        model(batch, use_cache=False)

    scores = score_probes(model, probes)
    difference = abs(float(scores.logprob_summed.sum()) - single()) / len(probes)
    seconds = run_rounds(
        {
            "probes": lambda: score_probes(model, probes),
            "single": single,
            "forward": forward,
            "logits": logits,
        },
        rounds,
        lambda text: say(f"probes: {text}"),
        clock_of(model.device),
    )
    return {
        "probes.single_over_ours": ratio(
            seconds["single"], seconds["probes"], ">= 2" if on_cpu else ">= 10"
        ),
        "probes.ours_over_full_batch": ratio(seconds["probes"], seconds["forward"], "<= 1.15"),
        "probes.ours_over_full_logits": ratio(seconds["probes"], seconds["logits"], "reported"),
    }, {
        "num_probes": len(probes),
        "real_tokens": sum(lengths),
        "computed_tokens": computed_tokens([Span(p.context_ids, p.target_ids) for p in probes])[0],
        "batch": [height, width],
        "mean_difference_nats": difference,
        "seconds": seconds,
    }


def computed_tokens(spans: Sequence[Span]) -> tuple[int, int]:
    """Tokens through the body and positions through the LM head, without padding."""
    trees = build_trees(spans)
    return sum(len(tree.tokens) for tree in trees), sum(len(tree.reads) for tree in trees)


class Recorder:
    """Keeps the token spans that our language model would score."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def __call__(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        self.spans = [Span(context, target) for _, context, target in requests]
        return [(0.0, False)] * len(requests)


def ideal_ratio(model: Any, tokenizer: Any, requests: list[Any]) -> float:
    """Operations of HFLM (each distinct input once, LM head everywhere) over ours."""
    lm = wrap_model(model, tokenizer)
    recorder = Recorder()
    lm._loglikelihood_tokens = recorder
    lm.loglikelihood(requests)
    theirs = sum(len(ids) for ids in {(*s.context_ids, *s.target_ids[:-1]) for s in recorder.spans})
    nodes, reads = computed_tokens(recorder.spans)
    body, head = MIDDLE.body_flops_per_token, MIDDLE.head_flops_per_token
    return theirs * (body + head) / (nodes * body + reads * head)


def measure_downstream(
    model: Any, tokenizer: Any, root: Path, limit: int, rounds: int, say: Any
) -> tuple[dict[str, Ratio], dict[str, Any]]:
    from lm_eval.models.huggingface import HFLM

    tokenizer = as_transformers_tokenizer(tokenizer, model)
    tasks = load_tasks(tuple(TASK_METRICS), data_dir=root / "downstream")
    requests = {}
    for name, task in tasks.items():
        task.build_all_requests(limit=limit, rank=0, world_size=1)
        requests[name] = list(task.instances)
    together = [request for items in requests.values() for request in items]

    tuning: dict[int, float] = {}
    for size in BATCH_SIZES:
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size)
        start = time.process_time()
        answers = lm.loglikelihood(together, disable_tqdm=True)
        tuning[size] = time.process_time() - start
        say(f"hflm, batch {size}: {tuning[size]:.1f} s of CPU")
    best = min(tuning, key=lambda size: tuning[size])
    hflm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=best)
    ours = wrap_model(model, tokenizer)
    difference = max(
        abs(a - b) for (a, _), (b, _) in zip(ours.loglikelihood(together), answers, strict=True)
    )

    # The six in one call, as lm-eval makes it, and each task in a call of its own.
    contenders: dict[str, Any] = {}
    for name, items in {TOGETHER: together, **requests}.items():
        contenders[f"ours.{name}"] = lambda items=items: ours.loglikelihood(items)
        contenders[f"hflm.{name}"] = lambda items=items: hflm.loglikelihood(
            items, disable_tqdm=True
        )
    seconds = run_rounds(contenders, rounds, lambda text: say(f"downstream: {text}"))
    ratios, ideals = {}, {}
    for name, items in {TOGETHER: together, **requests}.items():
        target = ">= 1.7" if name == TOGETHER else "reported"
        ratios[f"downstream.{name}.hflm_over_ours"] = ratio(
            seconds[f"hflm.{name}"], seconds[f"ours.{name}"], target
        )
        ideals[name] = ideal_ratio(model, tokenizer, items)
    return ratios, {
        "items_per_task": limit,
        "num_requests": len(together),
        "hflm_batch_size": best,
        "hflm_cpu_seconds_by_batch_size": tuning,
        "ideal": ideals,
        "largest_difference_nats": difference,
        "cpu_seconds": seconds,
    }


def machine() -> dict[str, str]:
    import lm_eval
    import transformers

    info = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in info if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lm_eval": lm_eval.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--rounds", type=int, default=10, help="interleaved rounds")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--device", default="cpu", help="a GPU: probes only, wall-clock time")
    parser.add_argument("--limit", type=int, default=6, help="items of each task")
    parser.add_argument("--paragraphs", type=int, default=4, help="paragraphs of 15 probes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    from tokenizers import Tokenizer

    root = reference_data()
    tokenizer = Tokenizer.from_file(str(root / "tokenizer" / "olmo_hf_tokenizer.json"))
    model = MIDDLE.model(eos_token_id=50279).to(options.device)
    probes = load_probes(root, tokenizer, options.paragraphs)
    ratios, probe_notes = measure_probes(model, probes, options.rounds, say)
    task_notes: dict[str, Any] = {"ideal": {}}
    if options.device == "cpu":
        found, task_notes = measure_downstream(
            model, tokenizer, root, options.limit, options.rounds, say
        )
        ratios |= found
    for name, value in ratios.items():
        task = name.removeprefix("downstream.").removesuffix(".hflm_over_ours")
        ideal = task_notes["ideal"].get(task)
        beside = f"  ideal {ideal:.2f}" if ideal else ""
        print(
            f"{name:40s} {value.median:6.3f}  [{value.low:.3f}, {value.high:.3f}]  "
            f"{value.target}{beside}"
        )
    print(
        f"probes: {probe_notes['num_probes']}, {probe_notes['real_tokens']} tokens, "
        f"{probe_notes['computed_tokens']} computed"
    )
    if options.device == "cpu":
        print(
            f"HFLM's best batch size: {task_notes['hflm_batch_size']}; answers differ by at most "
            f"{task_notes['largest_difference_nats']:.1e} nats"
        )
    if options.json:
        result = {
            "ratios": {name: value.as_json() for name, value in ratios.items()},
            "probes": probe_notes,
            "downstream": task_notes,
            "machine": machine(),
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
