# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The demo's results in Python
#
# What `ke-ray demo` leaves in `runs/demo` is Parquet, JSON and safetensors: pandas reads it without
# ke_ray. This notebook asks of it what [the demo, figure by figure](demo.md) shows. Start it where
# `runs/demo` is, or name the folder in `DEMO`.

# %%
import json
import os
from pathlib import Path

import pandas as pd
from safetensors.torch import load_file

from ke_ray.core.entropy import entropy_nats
from ke_ray.core.jackknife import paired_difference
from ke_ray.report import build_report
from ke_ray.results.sweep_folder import sweep_summary

demo = Path(os.environ.get("DEMO", "runs/demo"))

# %% [markdown]
# ## Knowledge entropy over pretraining
#
# `entropy.parquet` has a row for each checkpoint, corpus, measure and layer; the layer is null in
# the total. [All columns](results.md#scan).

# %%
entropy = pd.read_parquet(demo / "scan" / "entropy.parquet")
totals = entropy[entropy.layer.isna()].pivot(index="step", columns="measure", values="value")
totals[["knowledge_entropy", "attention_entropy", "next_token_entropy"]]

# %% [markdown]
# Where is the peak after the start, and how far below it does the series end?

# %%
curve = totals["knowledge_entropy"]
last = curve.index[-1]
peak = curve.iloc[1:].idxmax()
print(f"peak of {curve[peak]:.3f} nats at step {peak}, {curve[last]:.3f} nats at step {last}")

# %% [markdown]
# Both checkpoints read the same instances, so the error of the difference is not that of two
# independent values. The jackknife's replicates give [the paired one](science.md#error-bars).

# %%
manifest = json.loads((demo / "scan" / "manifest.json").read_text())
corpus, facts = next(iter(manifest["corpora"].items()))
replicates = pd.read_parquet(demo / "scan" / "replicates.parquet")
replicates = replicates[(replicates.measure == "knowledge_entropy") & replicates.layer.isna()]
replicates = replicates.pivot(index="group", columns="step", values="value")
difference, stderr = paired_difference(
    curve[peak], replicates[peak], curve[last], replicates[last], facts["group_sizes"]
)
print(f"from the peak to the end: {difference:+.4f} ± {stderr:.4f} nats on '{corpus}'")

# %% [markdown]
# ## From the coefficients themselves
#
# The mean absolute coefficients C̄ of every checkpoint are stored; the entropy is that of their
# shares. So the number above is recomputed in three lines, and they can be asked anything else.

# %%
names = entropy.drop_duplicates("step").set_index("step").checkpoint
mean = load_file(demo / "scan" / "coefficients" / f"{names[last]}.safetensors")
coefficients = mean["mean_abs_coefficients"].double()  # [n_layers, d_mlp]
recomputed = float(entropy_nats(coefficients).sum())
print(f"{recomputed:.4f} nats recomputed, {curve[last]:.4f} nats stored")

# %%
shares = coefficients / coefficients.sum(dim=-1, keepdim=True)
largest = shares.sort(dim=-1, descending=True).values.cumsum(dim=-1)
for layer, mass in enumerate(largest):
    half = int((mass < 0.5).sum()) + 1
    print(f"layer {layer}: {half} of {len(mass)} memories carry half of the mass")

# %% [markdown]
# ## A measure of one's own, from what is there
#
# How alike are the memories that two checkpoints use?

# %%
before = load_file(demo / "scan" / "coefficients" / f"{names[peak]}.safetensors")
before = before["mean_abs_coefficients"].double()
before = before / before.sum(dim=-1, keepdim=True)
overlap = (1 - 0.5 * (shares - before).abs().sum(dim=-1)).tolist()
print("overlap of the shares at the peak and at the end:", [round(value, 3) for value in overlap])

# %% [markdown]
# ## What was learned and what was lost
#
# One row for each run of the continual study, with A and F as fractions and their 95 % intervals
# ([how to read them](sweeps.md#reading-a-and-f)).

# %%
runs = pd.read_parquet(demo / "continual" / "runs.parquet")
columns = ["acquisition", "acquisition_low", "acquisition_high", "forgetting"]
runs.set_index("step")[columns]

# %% [markdown]
# ## The sweep
#
# Each factor against the checkpoint as it is (factor null).

# %%
trials = pd.json_normalize(sweep_summary(str(demo / "sweep")))
trials.set_index("parameters.resuscitation.factor")[["acquisition", "forgetting", "status"]]

# %% [markdown]
# ## One page of all figures
#
# `ke-ray report` in Python; it needs neither torch nor Ray.

# %%
build_report([demo], demo / "report.html")
