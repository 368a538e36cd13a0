"""A corpus packed on Ray against the single-process path: speed per core, and the driver's memory.

    python benchmarks/packing.py [--json] [--tokens 100_000_000]

The corpus is Dolma's text where reference data is present ($KE_RAY_REFERENCE_DATA/data), else
generated biographies, over and over, as plain JSON lines. Each way runs in a process of its own,
one after the other, so a quiet machine is needed: wall seconds from the first to the last byte,
Ray's start left out. Ray's way has a second round, that cuts rows, on top; with two cores it should
take half as long. The driver's memory is its peak above what it held when Ray had started,
for a tenth of the tokens and for all: it should not grow.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from growth import forget_peak, resident

EOS, SEQUENCE_LENGTH, CHARACTERS_PER_TOKEN = 0, 1024, 4.4


def texts() -> Iterator[str]:
    from ke_ray.data.biographies import iter_biographies, make_people
    from ke_ray.data.documents import iter_documents

    data = Path(os.environ.get("KE_RAY_REFERENCE_DATA", "../shared")) / "data"
    if (data / "dolma_sample").is_dir():
        return (text for text, _ in iter_documents(str(data / "dolma_sample")))
    return (document["text"] for document in iter_biographies(make_people(2000, seed=0), 4, seed=1))


def write_corpus(path: Path, num_tokens: int) -> None:
    """Documents of about so many tokens."""
    left = num_tokens * CHARACTERS_PER_TOKEN
    lines = [json.dumps({"text": text}) + "\n" for text in islice(texts(), 20_000)]
    with path.open("w") as file:
        for line in cycle(lines):
            file.write(line)
            left -= len(line)
            if left < 0:
                return


def save_own_tokenizer(folder: Path) -> None:
    from ke_ray.data.tokenizer import save_tokenizer, train_bpe

    some = list(islice(texts(), 500))
    save_tokenizer(train_bpe(some, 8192), str(folder), eos_token_id=EOS)


def alone(source: Path, folder: Path) -> dict[str, Any]:
    from ke_ray.data.tokenizer import load_tokenizer
    from ke_ray.data.training_set import prepare_training_set

    started = time.monotonic()
    rows = prepare_training_set(
        str(source),
        folder / "alone",
        sequence_length=SEQUENCE_LENGTH,
        tokenizer=load_tokenizer(str(folder / "tokenizer")),
        eos_token_id=EOS,
    )
    return {"seconds": time.monotonic() - started, "num_tokens": rows.num_tokens}


def on_ray(source: Path, folder: Path, num_cpus: int) -> dict[str, Any]:
    from ke_ray.engine.cluster.session import ray_session
    from ke_ray.engine.data.pack import pack_corpus

    with ray_session(num_cpus=num_cpus):
        before = resident("VmRSS")
        forget_peak()
        started = time.monotonic()
        packed = pack_corpus(
            str(source),
            str(folder / f"packed-{num_cpus}-{source.stem}"),
            tokenizer=str(folder / "tokenizer"),
            eos_token_id=EOS,
            sequence_length=SEQUENCE_LENGTH,
        )
        seconds = time.monotonic() - started
        grown = resident("VmHWM") - before
    return {"seconds": seconds, "num_tokens": packed["num_tokens"], "driver_bytes": grown}


def in_own_process(folder: Path, source: Path, num_cpus: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--child", str(num_cpus), str(source), str(folder)],
        env=os.environ | {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "true"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--tokens", type=lambda text: int(text.replace("_", "")), default=10**8)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        num_cpus, source, folder = arguments.child
        way = on_ray if int(num_cpus) else alone
        more = (int(num_cpus),) if int(num_cpus) else ()
        print(json.dumps(way(Path(source), Path(folder), *more)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_own_tokenizer(folder / "tokenizer")
        small, large = folder / "tenth.jsonl", folder / "all.jsonl"
        write_corpus(small, arguments.tokens // 10)
        write_corpus(large, arguments.tokens)
        result = {
            "alone": in_own_process(folder, large, 0),
            "ray, 1 core": in_own_process(folder, large, 1),
            "ray, 2 cores": in_own_process(folder, large, 2),
            "ray, 2 cores, a tenth": in_own_process(folder, small, 2),
        }
    base = result["alone"]["num_tokens"] / result["alone"]["seconds"]
    for way, found in result.items():
        speed = found["num_tokens"] / found["seconds"]
        text = f"{way}: {found['num_tokens']:,} tokens, {speed:,.0f} a second, {speed / base:.2f}"
        if "driver_bytes" in found:
            text += f", driver + {found['driver_bytes'] / 1e6:.0f} MB"
        print(text)
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
