"""The science as plain numerics: tensors in, tensors or frozen dataclasses out.

No files, no logging, no state beyond accumulators. Import the module that holds what is needed;
this package imports nothing by itself, and ``measures``, ``jackknife``, ``acquisition``,
``dynamics`` and ``position`` need no torch until they are handed a tensor.

    statistics      sums over instances per jackknife group: add, merge, ship, divide once
    entropy         knowledge entropy of mean coefficients, effective number of memories
    concentration   participation ratio, Gini, top-k mass, dormant share
    attention       attention entropy without the T × T matrix
    prediction      next-token-prediction entropy, streamed over the vocabulary head
    jackknife       groups of instances, weighted delete-a-group errors, paired differences
    measures        the table of measures and their evaluation from merged sums
    resuscitation   Algorithm 1: which rows of the up projection are scaled by how much
    intervals       Student's of a mean, Wilson's of a share
    acquisition     knowledge K, acquisition A, forgetting F and their bootstrap intervals
    dynamics        effectivity, retainability and decay of injected knowledge
    position        where in which training run a checkpoint stands: step, tokens, stage, seed

Symbols, sources and departures of all of them: docs/science.md.
"""
