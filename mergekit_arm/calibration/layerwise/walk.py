"""Walk through a model layer by layer, for models that do not fit into memory.

All blocks pass through one layer before the next layer's weights are read. The model's own
forward leads, on a few tokens: whenever it reaches a layer, that layer's weights are read, the
few tokens pass as they would in any forward, and all blocks follow before the weights are let
go. How the blocks must be handed to each layer (masks, positions, …) is recorded beforehand by
letting them through the model with every layer replaced by one that hands on what it gets.

That is right only where the forward is a plain chain: each layer takes what the one before it
returned, and nothing else that depends on it. So the few tokens are recorded in the same way,
and at every layer what was recorded must equal what really arrives, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_arm.calibration.inputs.coverage import Coverage
from mergekit_arm.calibration.inputs.discovery import DISCOVERY_TOKENS, discover
from mergekit_arm.calibration.inputs.readings import SitePlan
from mergekit_arm.calibration.layerwise.calls import Form, LayerCall, NotWalkable
from mergekit_arm.calibration.layerwise.chain import Chain
from mergekit_arm.calibration.layerwise.estimate import FirstLayer, estimate_by_layer
from mergekit_arm.calibration.layerwise.followers import Followers
from mergekit_arm.calibration.layerwise.hidden import HiddenStates, Key
from mergekit_arm.calibration.running.finishing import Finishing
from mergekit_arm.calibration.running.progress import Snapshot
from mergekit_arm.calibration.running.session import DryRun, Session
from mergekit_arm.calibration.sums.batches import Feeder, Span
from mergekit_arm.calibration.sums.hooks import without_logits
from mergekit_arm.calibration.sums.sites import Site, plan_sites
from mergekit_arm.calibration.sums.totals import MeasuredSite
from mergekit_arm.errors import first_line
from mergekit_arm.machine import Cost

_LEADER = "leader"


def measure_by_layer(
    chain: Chain, coverage: Coverage, device: torch.device, session: Session, *, budget: int
) -> list[MeasuredSite]:
    """Pass the session's corpus through ``chain``, whose weights are read layer by layer.

    Holds the weights of one layer, one batch of activations, the sums of one layer's sites, and
    hidden states of up to ``budget`` bytes; the rest of them lies in the session's progress
    directory. Each weight is read once. Returns the sites on the first process only.

    Raises:
        NotWalkable: the model's forward is no plain chain of layers.
        Failure: as ``measure`` does.
        DryRun: only the preflight was wanted.
    """
    walk = _Walk(chain, coverage, device, session, budget)
    session.beside = walk
    try:
        with without_logits(chain.model), torch.inference_mode(), chain.wired(), session.running():
            return walk.run()
    finally:
        session.beside = None


class _Walk:
    """The leader's way through the model, and what is measured on it."""

    def __init__(
        self, chain: Chain, coverage: Coverage, device: torch.device, session: Session, budget: int
    ) -> None:
        self._chain = chain
        self._coverage = coverage
        self._device = device
        self._session = session
        self._hidden = HiddenStates(session.progress, budget)
        samples = session.samples(chain.model)
        self._feeder = Feeder(session.corpus, samples, session.reports.say)
        self._leader = session.corpus.blocks[0][None, :DISCOVERY_TOKENS]
        self._leader_calls: list[LayerCall] = []
        self._arriving: Tensor | None = None
        """The hidden states with which the leader comes to the stage."""
        self._spans = session.spans()
        if session.options.dry_run:
            del self._spans[1:]
        self._followers = Followers(chain, self._hidden, self._feeder, device)
        self._called_before: set[nn.Module] = set()
        """Modules outside the layers that the leader has called on its way to the first."""
        self._before: set[str] = set()
        """Parameters that are read before the layers."""
        self._start = 0
        """Where the walk began: not at 0 if an earlier run had come further."""
        self._snapshot: Snapshot | None = None
        self._over: dict[str, Any] | None = None
        """Where all is measured: how many parts there are, and what the forward has shown."""
        self._finishing = Finishing(session, device, "walk")

    def run(self) -> list[MeasuredSite]:
        self._resume()
        if self._over:
            self._coverage.plan.recall(self._over["plan"])
            return self._finishing.sites(self._over["parts"])
        try:
            self._chain.run(self._leader, self._lead)
        except (
            RuntimeError
        ) as error:  # NotImplementedError, torch's own of a weight on meta, is one
            if "meta" not in str(error):
                raise
            # It was used without its module being called, which would have read it.
            raise NotWalkable(f"it uses weights outside its layers: {first_line(error)}") from error
        self._measure_behind()
        parts = len(self._chain) + 2
        if self._session.job.main:  # which alone writes
            self._over = {"parts": parts, "plan": self._coverage.plan.discovered()}
        self._session.after_last(self._position(), [])
        return self._finishing.sites(parts)

    def _lead(
        self, index: int, call: LayerCall, hidden: Tensor, forward: Callable[..., Any]
    ) -> Any:
        """Take the leader, and after it everybody, through layer ``index``."""
        chain = self._chain
        if index == 0:
            self._called_before = chain.called()
        if index < self._start:  # an earlier run has been here
            if index == self._start - 1:
                hidden = self._arriving = self._hidden.get((_LEADER, self._start)).to(self._device)
            return chain.form.wrap(hidden)
        chain.follows(index, self._followers.stage)
        if self._arriving is not None and not torch.equal(self._arriving, hidden):
            raise NotWalkable(f"layer {index} takes more than what the one before it returns")
        self._hidden.put((_LEADER, index), hidden)

        with Cost(self._device) as reading:
            size = chain.weights.load(chain.layer(index), inner=True)
        args, kwargs = call.fill(hidden)
        outputs: list[Any] = []
        layer = chain.model.get_submodule(chain.layer(index))
        if index == 0:
            chain.check_sharing(self._coverage.plan)
        plans = self._discover(
            layer,
            lambda name: name.startswith(f"{chain.layer(index)}."),
            lambda: outputs.append(forward(*args, **kwargs)),
        )
        if any(layer in plan.users for plan in plans):
            # Its forward is called without it, where nothing can be observed.
            raise NotWalkable(f"layer {index} multiplies weights itself")
        form = Form.of(outputs[0], hidden)
        if index == 0:
            chain.form = form
        if form != chain.form:
            raise NotWalkable(f"layer {index} does not return what the one before it does")
        if not self._followers.begun:
            self._begin()
        difference = self._leader_calls[index].difference(call)
        if difference is not None:
            raise NotWalkable(f"what layer {index} takes as {difference} depends on other layers")

        sites = self._sites(plans)

        def passed(cost: Cost | None) -> None:
            if index == 0 and cost:
                states = self._followers.bytes_of_first()
                first = FirstLayer(sites, cost, reading.seconds, size, states)
                self._session.preflight(
                    estimate_by_layer(first, chain, self._coverage, self._session)
                )
            self._passed(sites)

        self._followers.through_layer(forward, sites, passed)
        if self._session.options.dry_run:  # without a batch: another process says what there is
            raise DryRun
        chain.check_memory(index, call, hidden, forward, form.unwrap(outputs[0]))
        self._finishing.close(self._followers.stage + 1, sites, self._position())
        chain.weights.unload(chain.layer(index), inner=True)
        self._hidden.drop((_LEADER, index))
        self._arriving = form.unwrap(outputs[0])
        self._followers.stage, self._followers.done = index + 1, 0
        return outputs[0]

    def _begin(self) -> None:
        """Record how the leader and every batch come to the layers."""
        plan = self._coverage.plan
        self._before = set()
        for name, parameter in plan.parameters.items():
            # A tied embedding is read where the head is.
            known = plan.readings.get(name)
            layers = known.layers if known else [holder for holder, _ in parameter.holders]
            if not self._chain.holds(name) and not self._called_before.isdisjoint(layers):
                self._before.add(name)
        plans = self._discover(
            self._chain.model,
            self._before.__contains__,
            lambda: self._leader_calls.extend(self._chain.record(self._leader)[0]),
        )
        sites = plan_sites(self._chain.model, plans, self._session.options)
        self._followers.begin(
            self._spans,
            sites if not self._finishing.has(0) else [],
            resumed=(self._followers.stage, self._followers.done) != (0, 0),
        )
        self._finishing.close(0, sites, self._position())

    def _measure_behind(self) -> None:
        """Let every block through what follows the layers: the last norm, the head's input."""
        chain = self._chain
        if not chain.name:
            raise NotWalkable("its forward reaches no list of layers")
        chain.follows(len(chain), self._followers.stage)
        arriving = self._arriving
        assert arriving is not None
        self._hidden.put((_LEADER, self._followers.stage), arriving)
        if not self._followers.begun:
            self._begin()
        chain.blank_embeddings()
        plans = self._discover(
            chain.model,
            lambda name: not chain.holds(name) and name not in self._before,
            lambda: chain.leave(self._leader, arriving, lambda: None),
        )
        sites = self._sites(plans)
        self._followers.leave(sites, lambda _: self._passed(sites))
        self._finishing.close(self._followers.stage + 1, sites, self._position())

    def _passed(self, sites: list[Site]) -> None:
        """Report a batch, and save progress if it is time."""
        self._session.after_batch(*self._tokens(), self._position(), sites)

    def _sites(self, plans: list[SitePlan]) -> list[Site]:
        """Return the sites of the stage; none where an earlier run has finished it."""
        if self._finishing.has(self._followers.stage + 1):
            return []
        sites = plan_sites(self._chain.model, plans, self._session.options)
        if self._snapshot and self._followers.stage == self._start:
            self._snapshot.restore(sites)
        return sites

    def _discover(
        self, module: nn.Module, wanted: Callable[[str], bool], forward: Callable[[], None]
    ) -> list[SitePlan]:
        """Find the inputs of the ``wanted`` parameters in a pass of the leader."""
        discover(module, self._coverage.plan, forward, wanted)
        return self._coverage.plan.sites(list(filter(wanted, self._coverage.read_parameters)))

    def _resume(self) -> None:
        self._snapshot = self._session.resume()
        over = self._snapshot.position.get("over") if self._snapshot else None
        # What the first process has goes for all.
        self._over = json.loads(self._session.job.gather("over", json.dumps(over))[0])
        if self._snapshot is None:
            self._hidden.adopt([])
            return
        position = self._snapshot.position
        self._coverage.plan.recall(position["plan"])
        self._followers.stage = self._start = position["stage"]
        self._followers.done = position["done"]
        self._chain.form = Form(**position["form"])
        self._spans = [Span(*pair) for pair in position["spans"]]
        self._feeder.limit = position["limit"]
        self._hidden.adopt((name, passed) for name, passed in position["hidden"])

    def _position(self) -> dict[str, Any]:
        return {
            "stage": self._followers.stage,
            "done": self._followers.done,
            "form": asdict(self._chain.form),
            "spans": [[span.first, span.count] for span in self._followers.spans()],
            "limit": self._feeder.limit,
            "hidden": self._needed(),
            "plan": self._coverage.plan.discovered(),
            "over": self._over,
        }

    def persist(self) -> None:
        """Put the hidden states on the disk that progress about to be saved refers to."""
        self._hidden.persist(self._needed())

    def settle(self) -> None:
        """Remove those that only earlier progress referred to."""
        self._hidden.settle(self._needed())

    def _needed(self) -> list[Key]:
        """Return the hidden states without which the walk cannot go on from here."""
        if self._over:
            return []
        behind = self._followers.stage == len(self._chain)
        return [(_LEADER, self._followers.stage), *self._followers.needed(behind=behind)]

    def _tokens(self) -> tuple[int, int]:
        """Return tokens done and tokens in all; each layer is an equal share of every token."""
        everything = self._session.tokens(self._spans)
        here = self._session.tokens(self._followers.spans()[: self._followers.done])
        passed = self._followers.stage * everything + here
        return min(passed // len(self._chain), everything), everything
