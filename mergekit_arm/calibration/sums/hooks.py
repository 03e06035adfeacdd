"""Hooks on a model that feed its sites, and the head that multiplies nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mergekit_arm.calibration.inputs.products import Product, ProductMode
from mergekit_arm.calibration.sums.batches import Batch
from mergekit_arm.calibration.sums.sites import Site
from mergekit_arm.errors import Failure


class NotFinite(Failure):
    """An activation is a NaN or an infinity: this model cannot be measured as it is."""


class Collector:
    """Hooks on a model that feed its sites, for the duration of ``with``."""

    def __init__(self, sites: list[Site]) -> None:
        self.sites = sites
        self.batch: Batch | None = None
        """What is under way; between batches nothing is measured."""
        self._handles: list[Any] = []

    def __enter__(self) -> Collector:
        plans = {id(site.plan): site.plan for site in self.sites}
        by_plan: dict[int, list[Site]] = defaultdict(list)
        for site in self.sites:
            by_plan[id(site.plan)].append(site)
        users: dict[nn.Module, dict[str, list[Site]]] = defaultdict(dict)
        for key, plan in plans.items():
            for layer in plan.layers:
                self._handles.append(
                    layer.register_forward_pre_hook(self._hook(by_plan[key]), with_kwargs=True)
                )
            for user in plan.users:
                users[user][plan.readings[0].parameter] = by_plan[key]
        for user, sites in users.items():
            enter, leave = self._product_hooks(sites)
            self._handles.append(user.register_forward_pre_hook(enter))
            self._handles.append(user.register_forward_hook(leave, always_call=True))
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def resume(self, batch: Batch) -> None:
        """Measure, as of ``batch``."""
        self.batch = batch

    def pause(self) -> None:
        """Measure nothing until there is another batch."""
        self.batch = None

    def check(self) -> None:
        """Stop at the first site whose input held a NaN or an infinity.

        Costs one synchronisation, so it is called once a batch.

        Raises:
            NotFinite: naming the weight that reads the bad input.
        """
        seen = [site for site in self.sites if site.observers]
        sums: dict[torch.device, list[tuple[Site, Tensor]]] = {}
        for site in seen:
            for observer in site.observers.values():
                total = observer.checksum()
                sums.setdefault(total.device, []).append((site, total))
        for pairs in sums.values():
            finite = torch.isfinite(torch.stack([total for _, total in pairs])).tolist()
            for (site, _), good in zip(pairs, finite, strict=True):
                if not good:
                    raise NotFinite(
                        f"NaN or infinity in the input of {site.plan.readings[0].parameter}: "
                        "the model or the dtype is broken; try --dtype float32"
                    )

    def _hook(
        self, sites: list[Site]
    ) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        plan = sites[0].plan

        def observe(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = plan.inputs(args, kwargs)
            if x is None or self.batch is None:
                return
            if len(sites) == 1:
                sites[0].update(x, self.batch)
            else:  # a norm for each head
                for head, site in enumerate(sites):
                    site.update(x.select(-2, head), self.batch)

        return observe

    def _product_hooks(
        self, sites: Mapping[str, list[Site]]
    ) -> tuple[Callable[..., None], Callable[..., None]]:
        """Return hooks that watch the products with a module's weights while it runs."""
        active: list[ExitStack] = []

        def weights() -> Iterator[tuple[str, Tensor]]:
            for name, (site, *_) in sites.items():
                module, own_name = site.plan.readings[0].holder
                weight = module._parameters[own_name]
                if weight is not None:
                    yield name, weight

        def observe(product: Product) -> None:
            if self.batch is not None:
                sites[product.parameter][product.expert or 0].update(product.x, self.batch)

        def lost(name: str) -> None:
            raise Failure(
                f"{name} is multiplied in another way than at the first tokens: its input "
                "cannot be measured in full"
            )

        def enter(*_: object) -> None:
            active.append(ExitStack())
            active[-1].enter_context(ProductMode(weights, observe, lost))

        def leave(*_: object) -> None:
            active.pop().close()

        return enter, leave


@contextmanager
def without_logits(model: PreTrainedModel) -> Iterator[None]:
    """Let the output head return one channel of its input instead of multiplying it.

    The head's input is measured all the same, and the largest product of a small model is
    never computed. Whatever a model does between its last layer and its head still happens,
    which calling the decoder alone would miss.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    forward = head.forward
    head.forward = _no_logits
    try:
        yield
    finally:
        # An instance attribute hid the class's method; only a hook of another library's own
        # (accelerate) leaves one behind that must be put back.
        del head.forward
        if head.forward != forward:
            head.forward = forward


def _no_logits(x: Tensor, *_: object, **__: object) -> Tensor:
    # One wide, so that whatever a model does to its logits still broadcasts.
    return x[..., :1]
