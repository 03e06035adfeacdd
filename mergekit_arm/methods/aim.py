"""AIM: Activation-Informed Merging (arXiv 2502.02421), over any mergekit method.

The merged weight is pulled back towards the base along the input channels that the base
model's activations say matter:

    ā_j   = a_j / max_k a_k                      a_j: importance of input channel j
    W_aim = W + (W_m − W) · (1 − (1 − ω) ā_j)    W_m: what the wrapped method made
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
from mergekit import merge_methods
from mergekit.merge_methods import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethod,
    MergeMethodSpec,
    ParameterScope,
    TensorGroup,
)
from mergekit.merge_methods.base import ParameterSpec
from torch import Tensor

from mergekit_arm.errors import InputError, did_you_mean
from mergekit_arm.methods.base import Plan, Remembered, check_planned
from mergekit_arm.methods.parameters import (
    choice,
    number,
    parameter_type,
    statistics_reference,
)
from mergekit_arm.statistics.format import LEFT_AS_MERGED, NO_TOKEN
from mergekit_arm.statistics.kinds.importance import IMPORTANCE
from mergekit_arm.statistics.read import open_statistics

LOG = logging.getLogger(__name__)

URL = "https://arxiv.org/abs/2502.02421"
PREFIX = "aim"
DEFAULT_OVER = "task_arithmetic"
IMPORTANCES = ("mean_abs", "rms")

# float32 working copies of a narrower weight stay in the cache, and small enough for the
# allocator to reuse: copies of 4 MiB come as fresh pages each time, at ten times the cost.
_CHUNK_ELEMENTS = 1 << 17


def relax(
    base: Tensor, merged: Tensor, importance: Tensor, omega: float, input_axis: int
) -> Tensor:
    """Return ``base + (merged − base) · (1 − (1 − ω) ā)``, broadcast along the input axis.

    Args:
        base: the base model's weight, any shape.
        merged: the merged weight, same shape, dtype and device.
        importance: ≥ 0, any scale: ``(in,)``, or ``(experts, in)`` for ``(experts, …)``
            weights, each row with a maximum of its own. An all-zero row changes nothing.
        omega: ω in [0, 1]; 1 returns ``merged`` exactly.
        input_axis: the axis of ``base`` that is the layer's input.

    Returns:
        A new tensor in ``merged``'s dtype. Arithmetic in float32 (float64 for float64).
        Holds the result and a small working copy.
    """
    dtype = torch.float64 if merged.dtype == torch.float64 else torch.float32
    importance = importance.to(device=merged.device, dtype=dtype)
    peak = importance.amax(-1, keepdim=True)
    gain = 1 - (1 - omega) * importance / torch.where(peak > 0, peak, 1)
    shape = [1] * merged.ndim
    shape[input_axis] = gain.shape[-1]
    if gain.ndim == 2:
        shape[0] = gain.shape[0]
    gain = gain.reshape(shape)
    # lerp is exact at both ends: a gain of 1 is the merged weight, a gain of 0 the base's.
    if merged.dtype == dtype:
        return torch.lerp(base.to(dtype), merged, gain)
    result = torch.empty_like(merged)
    rows = max(1, _CHUNK_ELEMENTS * merged.shape[0] // max(merged.numel(), 1))
    for start in range(0, merged.shape[0], rows):
        chunk = slice(start, start + rows)
        result[chunk] = torch.lerp(
            base[chunk].to(dtype),
            merged[chunk].to(dtype),
            gain[chunk] if gain.shape[0] > 1 else gain,
        )
    return result


class ActivationInformedMerge(GroupMergeMethod):  # type: ignore[misc]  # mergekit is untyped
    """Any mergekit method, followed by AIM's relaxation towards the base model.

    Holds one tensor's inputs, as the wrapped method does, and the relaxed result. For methods
    that take no base the base is AIM's anchor only and does not enter the wrapped merge.
    """

    def __init__(self, inner: MergeMethod, name: str | None = None) -> None:
        self.inner = inner
        self._takes_base = inner.spec.contract.base in (BasePolicy.REQUIRED, BasePolicy.OPTIONAL)
        self._remembered = Remembered()
        self._plan = Plan()
        title = inner.spec.pretty_name or inner.spec.name
        self.spec = MergeMethodSpec(
            name=name or f"{PREFIX}_{inner.spec.name}",
            pretty_name=f"AIM over {title}",
            reference_url=URL,
            parameters=(*self._inner_parameters(), *self._own_parameters()),
            contract=self._contract(),
            optional_tensor_policy=inner.spec.optional_tensor_policy,
            uses_accelerator=inner.spec.uses_accelerator,
        )

    def validate_inputs(
        self, input_ids: Any, base_id: Any = None, *, group_name: str | None = None
    ) -> None:
        """Check the inputs' number and base, and at planning time the base's statistics."""
        super().validate_inputs(input_ids, base_id, group_name=group_name)
        if self._takes_base:
            # A wrapped method of ours looks at its own statistics while mergekit plans.
            self.inner.validate_inputs(input_ids, base_id, group_name=group_name)
        self._plan.note(group_name)
        planned = self._remembered.take()
        if planned.get("omega", [1.0])[-1] != 1.0 and "activation_stats" in planned:
            statistics = open_statistics(planned["activation_stats"][-1])
            check_planned(statistics, base_id, group_name, input_ids)

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """Merge one output tensor and relax it.

        Raises:
            InputError: the statistics do not belong to the base's tensor, or lack it.
        """
        base = group.base
        assert base is not None  # the contract requires it
        own = {name: parameters.pop(name) for name in ("omega", "importance")}
        stats = parameters["activation_stats"]
        if not any(p.name == "activation_stats" for p in self.inner.spec.parameters):
            del parameters["activation_stats"]
        inner_group = group
        if not self._takes_base:
            inner_group = dataclasses.replace(group, entries=group.non_base)
        merged: Tensor
        (merged,) = self.inner((inner_group,), parameters=parameters)
        if own["omega"] == 1:
            return merged
        # Where the wrapped method has statistics for each input, the base's are AIM's.
        reference = stats if isinstance(stats, str) else stats[base.id]
        return self._relax(group, base.tensor, merged, reference, **own)

    def _relax(
        self,
        group: TensorGroup,
        base: Tensor,
        merged: Tensor,
        reference: str,
        *,
        omega: float,
        importance: str,
    ) -> Tensor:
        statistics = open_statistics(reference)
        output = group.metadata.name or ""
        name, record = statistics.matcher.find(
            output,
            base,
            permuted=group.metadata.vocabulary_axis is not None,
            renumbered=self._plan.renumbers(output, statistics),
        )
        if record.site is None:
            if record.reason == NO_TOKEN:
                LOG.warning("%s: %s: it is left as merged", name, record.reason)
            # Nothing to relax where the merge is the base, as for stored rotary frequencies.
            if record.reason in LEFT_AS_MERGED or torch.equal(merged, base.to(merged.dtype)):
                return merged
            raise InputError(
                f"{name}: activation_stats {reference} have no statistics for it "
                f"({record.reason}); to leave it as merged, set "
                f"omega: [{{filter: {name}, value: 1.0}}, {{value: {omega}}}]"
            )
        assert record.input_axis is not None
        values = IMPORTANCE.values(statistics, record, importance)
        return relax(base, merged, values, omega, record.input_axis)

    def _inner_parameters(self) -> tuple[ParameterSpec, ...]:
        if self._takes_base:
            return tuple(self.inner.spec.parameters)
        # The base is not an input of the wrapped merge and needs no weight there.
        return tuple(
            dataclasses.replace(parameter, scope=ParameterScope.NON_BASE)
            if parameter.scope == ParameterScope.INPUT
            else parameter
            for parameter in self.inner.spec.parameters
        )

    def _own_parameters(self) -> tuple[ParameterSpec, ...]:
        noting = self._remembered.noting
        taken = {parameter.name for parameter in self.inner.spec.parameters}
        omega = number("omega", 0, 1, hint="1 leaves the merge as it is")
        own = (
            ParameterSpec(
                "activation_stats",
                parameter_type(noting("activation_stats", statistics_reference)),
                ParameterScope.SHARED,
                default=None,  # refused by the validator, in one line
                description="Statistics of the base model: a directory or a Hub name",
            ),
            ParameterSpec(
                "omega",
                parameter_type(noting("omega", omega)),
                ParameterScope.SHARED,
                default=0.4,
                description="1 leaves the merge as it is, 0 freezes the most active channel",
            ),
            ParameterSpec(
                "importance",
                parameter_type(choice("importance", IMPORTANCES)),
                ParameterScope.SHARED,
                default="mean_abs",
                description="mean_abs (the paper's) or rms",
            ),
        )
        clash = taken & {"omega", "importance"}
        if clash:
            raise ValueError(f"{self.inner.spec.name} has parameters of AIM's own: {clash}")
        return tuple(parameter for parameter in own if parameter.name not in taken)

    def _contract(self) -> InputContract:
        inner = self.inner.spec.contract
        if self._takes_base:
            return dataclasses.replace(inner, base=BasePolicy.REQUIRED)
        return InputContract(
            base=BasePolicy.REQUIRED,
            min_inputs=inner.min_inputs + 1,
            max_inputs=None if inner.max_inputs is None else inner.max_inputs + 1,
            min_non_base=inner.min_inputs,
            max_non_base=inner.max_inputs,
        )


def register() -> None:
    """Register ``aim`` and ``aim_<name>`` for every method mergekit has.

    A method that is registered later gets its twin when that is first asked for: mergekit
    promises that ``register`` adds one method and no more.
    """
    registry = merge_methods.registry
    plain_get = registry.get
    if getattr(plain_get, "_wraps_with_aim", False):
        return
    for method in merge_methods.registered_methods():
        merge_methods.register(ActivationInformedMerge(method))
        if method.spec.name == DEFAULT_OVER:
            merge_methods.register(ActivationInformedMerge(method, PREFIX))

    # mergekit asks for the method of every tensor.
    found: set[str] = set()

    def get(name: str) -> MergeMethod:
        prefix, _, inner = name.partition("_")
        if prefix != PREFIX or name in found:
            return plain_get(name)
        known = {method.spec.name for method in merge_methods.registered_methods()}
        if name not in known:
            if inner not in known:
                raise InputError(f"no merge method {name!r}{did_you_mean(name, known)}")
            merge_methods.register(ActivationInformedMerge(plain_get(inner)))
        found.add(name)
        return plain_get(name)

    get._wraps_with_aim = True  # type: ignore[attr-defined]  # marks the wrapper
    registry.get = merge_methods.get = get
