"""Downstream tasks: lm-eval's prompts and answers, on local files, without a network."""

from __future__ import annotations

import json
import random
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ke_ray.core.acquisition import TaskScore, forgetting_interval
from ke_ray.errors import DataError
from ke_ray.evaluation.downstream import (
    TASK_METRICS,
    load_tasks,
    run_downstream,
)
from ke_ray.evaluation.lm import as_transformers_tokenizer, wrap_model

Build = Callable[..., Any]
LIMIT = 6


@pytest.fixture(scope="module")
def folder(reference_data: Path) -> Path:
    return reference_data / "data" / "downstream"


@pytest.fixture(scope="module")
def tokenizer(reference_data: Path) -> Any:
    from tokenizers import Tokenizer

    path = reference_data / "data" / "tokenizer" / "olmo_hf_tokenizer.json"
    return Tokenizer.from_file(str(path))


@pytest.fixture(scope="module")
def model(tiny_model: Build) -> Any:
    return tiny_model(
        "olmo", vocab_size=50304, max_position_embeddings=512, eos_token_id=50279, pad_token_id=1
    )


def hflm(model: Any, tokenizer: Any, **options: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=as_transformers_tokenizer(tokenizer, model), **options)


@pytest.fixture(scope="module")
def own_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "biographies.jsonl"
    towns = ["Port Vell", "Oslo", "Rome in Italy", "A"]
    lines = [
        {"context": f"Ada number {i} was born in", "choices": towns, "gold": i % 4, "id": i}
        for i in range(8)
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return path


def requests_of(tasks: dict[str, Any], limit: int) -> list[Any]:
    for task in tasks.values():
        task.build_all_requests(limit=limit, rank=0, world_size=1)
    return [instance for task in tasks.values() for instance in task.instances]


def test_answers_equal_hflm_item_by_item(
    model: Any, tokenizer: Any, folder: Path, own_file: Path
) -> None:
    tasks = load_tasks(tuple(TASK_METRICS), data_dir=folder, own_tasks={"bio": own_file})
    requests = requests_of(tasks, LIMIT)
    assert len(requests) > 20 * LIMIT
    theirs = hflm(model, tokenizer, batch_size=4).loglikelihood(requests, disable_tqdm=True)
    ours = wrap_model(model, tokenizer).loglikelihood(requests)
    np.testing.assert_allclose([a for a, _ in ours], [b for b, _ in theirs], atol=2e-4, rtol=1e-6)
    assert [a for _, a in ours] == [b for _, b in theirs]
    assert np.std([a for a, _ in ours]) > 1


def test_long_and_empty_contexts_are_treated_as_hflm_treats_them(
    model: Any, tokenizer: Any
) -> None:
    from lm_eval.api.instance import Instance

    long = "A long story about a small town by the sea. " * 100
    pairs = [
        ("", "Port Vell"), ("", " is"), (long, " the end"), (long, " the sea"), (long + "  ", "is"),
        ("Ada ", "was born"), ("Ada\n", "was born"), ("one", "two"), ("x " * 5, long[:2000]),
    ]  # fmt: skip
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs
    ]
    theirs = hflm(model, tokenizer, batch_size=2).loglikelihood(requests, disable_tqdm=True)
    ours = wrap_model(model, tokenizer).loglikelihood(requests)
    np.testing.assert_allclose([a for a, _ in ours], [b for b, _ in theirs], rtol=1e-5)


def test_results_equal_hflm_and_an_independent_calculation(
    model: Any, tokenizer: Any, folder: Path, own_file: Path
) -> None:
    options = {"data_dir": folder, "limit": LIMIT, "own_tasks": {"bio": own_file}}
    results = run_downstream(model, tokenizer, **options)
    theirs = run_downstream(model, tokenizer, language_model=hflm, **options)
    assert results == theirs
    assert [result.task for result in results] == [*TASK_METRICS, "bio"]
    assert [result.metric for result in results[:-1]] == list(TASK_METRICS.values())

    def total(context: str, continuation: str) -> float:
        start = len(tokenizer.encode(context).ids)
        ids = tokenizer.encode(context + continuation).ids
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double()
        table = torch.log_softmax(logits, -1)
        return sum(float(table[t - 1, ids[t]]) for t in range(start, len(ids)))

    def read(path: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text().splitlines()[:LIMIT]]

    by_task = {result.task: result for result in results}
    bio = [
        float(np.argmax([total(d["context"], " " + c) for c in d["choices"]]) == d["gold"])
        for d in read(own_file)
    ]
    assert by_task["bio"].items == tuple(bio)
    piqa = [
        float(
            np.argmax(
                [
                    total(f"Question: {d['goal']}\nAnswer:", " " + d[s]) / len(d[s])
                    for s in ("sol1", "sol2")
                ]
            )
            == d["label"]
        )
        for d in read(folder / "piqa" / "validation.jsonl")
    ]
    assert by_task["piqa"].items == tuple(piqa)
    for result in results:
        assert result.num_items == LIMIT
        assert result.value == pytest.approx(np.mean(result.items))
        stderr = np.std(result.items, ddof=1) / np.sqrt(LIMIT)
        assert result.stderr == pytest.approx(stderr)
    scores = [TaskScore(r.task, r.value, r.stderr, r.items) for r in results]
    assert forgetting_interval(scores, scores, num_resamples=20).value == 0


def test_local_prompts_are_those_of_lm_evals_own_tasks(folder: Path) -> None:
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    tasks = load_tasks(tuple(TASK_METRICS), data_dir=folder)
    root = Path(lm_eval.tasks.__file__).parent
    files = {
        "sciq": "sciq/sciq.yaml",
        "winogrande": "winogrande/default.yaml",
        "arc_easy": "arc/arc_easy.yaml",
        "piqa": "piqa/piqa.yaml",
        "hellaswag": "hellaswag/hellaswag.yaml",
        "openbookqa": "openbookqa/openbookqa.yaml",
    }
    for name, task in tasks.items():
        own = load_yaml(root / files[name])
        for key in ("doc_to_text", "doc_to_target", "doc_to_choice", "output_type"):
            assert getattr(task.config, key) == own[key], (name, key)
        assert {m["metric"] for m in task.config.metric_list} >= {TASK_METRICS[name]}
        assert task.config.num_fewshot == 0
    # What the definitions make of the first rows, written out.
    texts = {name: task.doc_to_text(task.eval_docs[0]) for name, task in tasks.items()}
    rows = {
        name: json.loads((folder / name / "validation.jsonl").read_text().split("\n")[0])
        for name in tasks
    }
    assert texts["arc_easy"] == f"Question: {rows['arc_easy']['question']}\nAnswer:"
    assert texts["piqa"] == f"Question: {rows['piqa']['goal']}\nAnswer:"
    assert texts["openbookqa"] == rows["openbookqa"]["question_stem"]
    support, question = rows["sciq"]["support"], rows["sciq"]["question"]
    assert texts["sciq"] == f"{support.lstrip()}\nQuestion: {question}\nAnswer:"
    assert texts["winogrande"] == int(rows["winogrande"]["answer"]) - 1
    label, context = rows["hellaswag"]["activity_label"], rows["hellaswag"]["ctx"]
    assert texts["hellaswag"] == f"{label}: {context}"


@pytest.mark.parametrize("is_clean", [True, False])
def test_hellaswag_gives_the_prompts_of_the_original(tmp_path: Path, is_clean: bool) -> None:
    from datasets import Dataset
    from lm_eval.tasks.hellaswag.utils import process_docs

    def clean(text: str) -> str:
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    original = {
        "activity_label": "Home and Garden",
        "ctx_a": "[header] How to dry shoes [title] Wipe them. [step] Use a towel.",
        "ctx_b": "then",
        "endings": ["[substeps] Use rubber. [title] Stop.", "run away.", "sleep  well.", "eat."],
        "label": "2",
    }
    (expected,) = process_docs(Dataset.from_list([original]))
    cleaned = {
        "activity_label": original["activity_label"],
        # The cleaned rows have no blank where a leading marker stood in the context.
        "ctx": clean(f"{original['ctx_a']} {str(original['ctx_b']).capitalize()}").lstrip(),
        "endings": [clean(ending) for ending in original["endings"]],
        "label": 2,
    }
    (tmp_path / "hellaswag").mkdir()
    (tmp_path / "hellaswag" / "validation.jsonl").write_text(
        json.dumps(cleaned if is_clean else {**original, "ctx": "[title] not read"})
    )
    task = load_tasks(["hellaswag"], data_dir=tmp_path)["hellaswag"]
    doc = task.eval_docs[0]
    assert task.doc_to_choice(doc) == expected["choices"]
    assert task.doc_to_target(doc) == expected["gold"]
    assert task.doc_to_text(doc) == expected["query"]


def test_no_network_no_random_numbers_no_output(
    model: Any,
    tokenizer: Any,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a network connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    model.train()
    run_downstream(model, tokenizer, ["sciq", "hellaswag"], data_dir=folder, limit=2)
    assert model.training
    model.eval()
    assert states == (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
    )
    assert capfd.readouterr() == ("", "")


def test_one_item_has_no_standard_error(model: Any, tokenizer: Any, own_file: Path) -> None:
    (result,) = run_downstream(model, tokenizer, [], limit=1, own_tasks={"bio": own_file})
    assert np.isnan(result.stderr)
    assert result.num_items == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ('{"context": "a", "choices": ["b", "c"]}', "line 2: 'gold' is missing"),
        ('{"context": "a", "choices": ["b", "c"], "gold": 2}', "line 2: 'gold' is 2.*0 to 1"),
        ('{"context": "a", "choices": ["b", "c"], "gold": -1}', "line 2: 'gold': .*given: -1"),
        ('{"context": "a", "choices": ["b", "c"], "gold": true}', "line 2: 'gold': .*given: True"),
        ('{"context": "a", "choices": ["b"], "gold": 0}', "line 2: 'choices': .*at least 2 items"),
        ('{"context": "a", "choices": ["b", 3], "gold": 0}', "line 2: 'choices.1': .*given: 3"),
        ('{"context": " ", "choices": ["b", "c"], "gold": 0}', "line 2: 'context': .*is empty"),
        ("[]", "line 2 holds list, expected a mapping"),
    ],
)
def test_the_item_at_fault_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"context": "a", "choices": ["b", "c"], "gold": 1}\n' + line)
    with pytest.raises(DataError, match=message):
        load_tasks([], own_tasks={"own": path})


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("sciq", {"support": 3}),
        ("openbookqa", {"choices": "none"}),
        ("arc_easy", {"answerKey": None}),
        ("winogrande", {"sentence": "no gap"}),
    ],
)
def test_local_rows_that_do_not_fit_their_task_are_one_message(
    tmp_path: Path, folder: Path, task: str, row: dict[str, Any]
) -> None:
    first = (folder / task / "validation.jsonl").read_text().split("\n")[0]
    (tmp_path / task).mkdir()
    (tmp_path / task / "validation.jsonl").write_text(json.dumps(json.loads(first) | row))
    with pytest.raises(DataError, match=f"data of {task} cannot be loaded") as caught:
        load_tasks([task], data_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_later_item_that_fits_no_prompt_is_named(
    model: Any, tokenizer: Any, tmp_path: Path, folder: Path
) -> None:
    lines = (folder / "winogrande" / "validation.jsonl").read_text().split("\n")[:3]
    lines[1] = json.dumps(json.loads(lines[1]) | {"sentence": "no gap"})
    (tmp_path / "winogrande").mkdir()
    (tmp_path / "winogrande" / "validation.jsonl").write_text("\n".join(lines))
    with pytest.raises(
        DataError, match="Item 2 of the data of winogrande does not fit .* remove it"
    ):
        run_downstream(model, tokenizer, ["winogrande"], data_dir=tmp_path)
    (result,) = run_downstream(model, tokenizer, ["winogrande"], data_dir=tmp_path, limit=1)
    assert result.num_items == 1


def test_wrong_names_and_folders_are_one_clear_message(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no downstream task 'hellaswg'. Did you mean 'hellaswag'\?"
    ):
        load_tasks(["hellaswg"])
    with pytest.raises(DataError, match="There is no .*piqa/validation.jsonl"):
        load_tasks(["piqa"], data_dir=tmp_path)
    with pytest.raises(DataError, match="each only once"):
        load_tasks(["piqa", "piqa"], data_dir=tmp_path)
    with pytest.raises(DataError, match="at least one"):
        load_tasks([])
    with pytest.raises(DataError, match="at least 1"):
        run_downstream(None, None, limit=0)


def test_importing_the_evaluation_modules_is_light() -> None:
    code = (
        "import sys, ke_ray.evaluation.downstream, ke_ray.evaluation.probes, "
        "ke_ray.evaluation.perplexity, ke_ray.data.facts, ke_ray.data.injection, "
        "ke_ray.data.probes; "
        "print([m for m in ('lm_eval', 'transformers', 'datasets', 'ray', 'mlflow', 'tokenizers') "
        "if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"
