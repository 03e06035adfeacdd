"""The forward loop: every token block through the model, its inputs into the sites."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from transformers import PreTrainedModel

from mergekit_arm.calibration.collect import Batch, Collector, Site, Statistic, without_logits
from mergekit_arm.calibration.corpus import Corpus
from mergekit_arm.calibration.coverage import Coverage
from mergekit_arm.calibration.options import CalibrationOptions
from mergekit_arm.calibration.records import site_name
from mergekit_arm.calibration.sample import TokenSample
from mergekit_arm.calibration.sites import SitePlan, share_sites
from mergekit_arm.statistics.observers import Importance
from mergekit_arm.statistics.subspace import Subspace

Progress = Callable[[int, int], None]
"""Called after every batch with tokens done and tokens in all."""

_DISCOVERY_TOKENS = 16
_TOKENS_PER_BATCH = 4096


def measure(
    model: PreTrainedModel,
    coverage: Coverage,
    corpus: Corpus,
    options: CalibrationOptions,
    progress: Progress | None = None,
) -> tuple[list[Site], float]:
    """Pass ``corpus`` through ``model``; return the sites and the seconds it took.

    Holds one batch of activations and the sums of every site.

    Raises:
        Failure: a NaN or an infinity in an activation.
    """
    device = model.device
    first = corpus.blocks[0][None, :_DISCOVERY_TOKENS].to(device)
    with without_logits(model), torch.inference_mode():
        plans = share_sites(
            {name: coverage.readings[name] for name in coverage.read_parameters},
            lambda: model(input_ids=first) and None,
        )
        sites = plan_sites(model, plans, options)
        sample = TokenSample(
            [len(block) for block in corpus.blocks],
            options.subspace_tokens,
            seed=options.seed,
            skip_first=options.skip_first,
        )
        batch_size = options.batch_size or max(1, _TOKENS_PER_BATCH // len(corpus.blocks[-1]))
        done = blocks = 0
        started = time.perf_counter()
        with Collector(sites) as collector:
            for ids in corpus.batches(batch_size):
                collector.batch = Batch(ids.numel(), sample.rows(blocks, len(ids)))
                model(input_ids=ids.to(device))
                collector.check()
                blocks += len(ids)
                done += ids.numel()
                if progress:
                    progress(done, corpus.tokens)
        return sites, time.perf_counter() - started


def plan_sites(
    model: PreTrainedModel, plans: list[SitePlan], options: CalibrationOptions
) -> list[Site]:
    """Decide what is measured at each site.

    Subspaces only where a matrix other than the output head reads: nothing else is rotated.
    """
    every = {
        "importance": Statistic(Importance),
        "subspace": Statistic(
            partial(Subspace, rank=options.rank, energy=options.energy, seed=options.seed),
            sampled=True,
            matrices_only=True,
        ),
    }
    head = model.get_output_embeddings()
    sites = []
    for plan in plans:
        rotated = any(
            reading.matrix and not any(layer is head for layer in reading.layers)
            for reading in plan.readings
        )
        chosen = {
            name: every[name]
            for name in options.statistics
            if rotated or not every[name].matrices_only
        }
        sites.append(Site(site_name(plan), plan, chosen))
    return sites
