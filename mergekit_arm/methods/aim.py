"""AIM: Activation-Informed Merging (arXiv 2502.02421), over any mergekit method.

The merged weight is pulled back towards the base along the input channels that the base
model's activations say matter:

    ā_j   = a_j / max_k a_k                      a_j: importance of input channel j
    W_aim = W + (W_m − W) · (1 − (1 − ω) ā_j)    W_m: what the wrapped method made
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from mergekit import merge_methods
from mergekit.merge_methods import BasePolicy, InputContract, MergeMethod, TensorGroup
from mergekit.merge_methods.base import ParameterSpec
from torch import Tensor

from mergekit_arm.errors import InputError
from mergekit_arm.methods import anchor
from mergekit_arm.methods.base import STATS, Found, OptOut, StatisticsMethod
from mergekit_arm.methods.parameters import MEASURED_ON, choice, number
from mergekit_arm.methods.planning import PlannedTensor
from mergekit_arm.statistics.kinds.importance import IMPORTANCE

IMPORTANCES = ("mean_abs", "rms")

# float32 working copies of a narrower weight stay in the cache, and small enough for the
# allocator to reuse: copies of 4 MiB come as fresh pages each time, at ten times the cost.
_CHUNK_ELEMENTS = 1 << 17


def gain(importance: Tensor, omega: float) -> Tensor:
    """Return 1 − (1 − ω) ā, the factor of every input channel, in ``importance``'s shape and dtype.

    ``importance`` and ω as ``relax`` takes them.
    """
    peak = importance.amax(-1, keepdim=True)
    return 1 - (1 - omega) * importance / torch.where(peak > 0, peak, 1)


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
    factors = gain(importance.to(device=merged.device, dtype=dtype), omega)
    shape = [1] * merged.ndim
    shape[input_axis] = factors.shape[-1]
    if factors.ndim == 2:
        shape[0] = factors.shape[0]
    factors = factors.reshape(shape)
    # lerp is exact at both ends: a gain of 1 is the merged weight, a gain of 0 the base's.
    if merged.dtype == dtype:
        return torch.lerp(base.to(dtype), merged, factors)
    result = torch.empty_like(merged)
    rows = max(1, _CHUNK_ELEMENTS * merged.shape[0] // max(merged.numel(), 1))
    for start in range(0, merged.shape[0], rows):
        chunk = slice(start, start + rows)
        result[chunk] = torch.lerp(
            base[chunk].to(dtype),
            merged[chunk].to(dtype),
            factors[chunk] if factors.shape[0] > 1 else factors,
        )
    return result


class ActivationInformedMerge(StatisticsMethod):
    """Any mergekit method, followed by AIM's relaxation towards the base model.

    Holds one tensor's inputs, as the wrapped method does, and the relaxed result. For methods
    that take no base, ``anchor.py`` says when the base enters the wrapped merge.
    """

    name = "aim"
    title = "AIM"
    url = "https://arxiv.org/abs/2502.02421"
    opt_out = OptOut("omega", 1, "left as merged")
    parameters = (
        number(
            "omega",
            0.4,
            *(0, 1),
            "ω: 1 leaves the merge as it is, 0 freezes the most active channel",
            hint="1 leaves the merge as it is",
        ),
        choice("importance", "mean_abs", IMPORTANCES, "mean_abs (the paper's) or rms"),
    )

    def __init__(self, inner: MergeMethod, name: str) -> None:
        """Wrap ``inner``, to be registered as ``name``.

        Raises:
            InputError: it cannot be wrapped; the message says why.
        """
        own = {parameter.name for parameter in self.parameters}
        if not isinstance(inner, StatisticsMethod):
            own |= {STATS, MEASURED_ON}
        clash = own & {parameter.name for parameter in inner.spec.parameters}
        if isinstance(inner, ActivationInformedMerge):
            raise InputError(f"{name}: {inner.spec.name} relaxes its merge already; use that")
        if clash:
            raise InputError(
                f"{name}: AIM cannot wrap {inner.spec.name}, which has a parameter "
                f"{min(clash)} of its own; merge with {inner.spec.name} first, then relax the "
                "result with aim"
            )
        self.inner = inner
        self._takes_base = inner.spec.contract.base in (BasePolicy.REQUIRED, BasePolicy.OPTIONAL)
        super().__init__(name)
        self.spec = dataclasses.replace(
            self.spec,
            pretty_name=f"AIM over {inner.spec.pretty_name or inner.spec.name}",
            contract=self._contract(),
            parameters=self._parameters(),
            optional_tensor_policy=inner.spec.optional_tensor_policy,
            uses_accelerator=inner.spec.uses_accelerator,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy a wrapped method that is registered by its name."""
        inner = self.inner.spec.name
        if any(method is self.inner for method in merge_methods.registered_methods()):
            return over_registered, (inner, self.spec.name)
        return type(self), (self.inner, self.spec.name)

    def __call__(
        self, groups: Sequence[TensorGroup], /, *, parameters: Any = None, **options: Any
    ) -> tuple[Tensor, ...]:
        """Merge in memory; the base enters a baseless merge where it is given values."""
        groups = tuple(groups)
        supplied = dict(parameters or {})
        if not self._takes_base and groups and groups[0].base is not None:
            ids = [entry.id for entry in groups[0].entries]
            supplied = anchor.fill_absent(self.inner.spec, ids, groups[0].base.id, supplied)
        merged: tuple[Tensor, ...] = super().__call__(groups, parameters=supplied, **options)
        return merged

    def needs(self, parameters: Mapping[str, Any], *, is_base: bool) -> bool:
        """ω = 1 leaves the merge as it is."""
        return is_base and parameters["omega"] != 1

    def read(self, found: Found, parameters: Mapping[str, Any]) -> Tensor:
        """Return the importance of the weight's input channels."""
        return IMPORTANCE.values(found.statistics, found.record, parameters["importance"])

    def check_inputs(
        self, input_ids: Sequence[Hashable], base_id: Hashable | None, group_name: str | None
    ) -> None:
        """Check the inputs' number and base, for the wrapped method too."""
        super().check_inputs(input_ids, base_id, group_name)
        if not self._takes_base:
            return
        if isinstance(self.inner, StatisticsMethod):
            self.inner.check_inputs(input_ids, base_id, group_name)
        else:
            self.inner.validate_inputs(input_ids, base_id, group_name=group_name)

    def check_planned(self, planned: PlannedTensor) -> None:
        """Check the statistics that AIM and the wrapped method read, and who takes part."""
        super().check_planned(planned)
        if isinstance(self.inner, StatisticsMethod):
            self.inner.check_planned(planned)
        if self._takes_base:
            return
        anchor.check_anchor(self.inner.spec, planned)
        ids = anchor.entering(
            self.inner.spec, list(planned.names), planned.base, planned.parameters
        )
        try:
            anchor.values_of(self.inner.spec, ids, planned.parameters)
            self.inner.validate_inputs(ids)
        except ValueError as error:
            raise InputError(f"{self.spec.name}: {error}") from error

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """Merge one output tensor and relax it.

        Raises:
            InputError: the statistics do not belong to the base's tensor, or lack it.
        """
        base = group.base
        assert base is not None  # the contract requires it
        merged = self._merge_inner(group, base.id, parameters)
        reading = self.find(group, base, parameters)
        if reading is None:
            return merged
        return relax(base.tensor, merged, reading.values, parameters["omega"], reading.input_axis)

    def _merge_inner(
        self, group: TensorGroup, base: Hashable, parameters: Mapping[str, Any]
    ) -> Tensor:
        spec = self.inner.spec
        own = {parameter.name: parameters[parameter.name] for parameter in spec.parameters}
        if not self._takes_base:
            ids = anchor.entering(spec, [entry.id for entry in group.entries], base, parameters)
            own = anchor.values_of(spec, ids, parameters)
            entries = [
                dataclasses.replace(entry, is_base=False)
                for entry in group.entries
                if entry.id in ids
            ]
            group = dataclasses.replace(group, entries=entries)
        merged: Tensor
        (merged,) = self.inner((group,), parameters=own)
        return merged

    def _parameters(self) -> tuple[ParameterSpec, ...]:
        inner = tuple(self.inner.spec.parameters)
        if not self._takes_base:
            inner = anchor.with_absent(inner)
        # A wrapped method of ours has activation_stats already, perhaps for every input.
        taken = {parameter.name for parameter in inner}
        return (*inner, *(one for one in self.spec.parameters if one.name not in taken))

    def _contract(self) -> InputContract:
        inner = self.inner.spec.contract
        if self._takes_base:
            return dataclasses.replace(inner, base=BasePolicy.REQUIRED)
        # Whether the base counts among the inner inputs is known once its parameters are.
        base_may_enter = bool(anchor.of_each_input(self.inner.spec))
        return InputContract(
            base=BasePolicy.REQUIRED,
            min_inputs=inner.min_inputs + (not base_may_enter),
            max_inputs=None if inner.max_inputs is None else inner.max_inputs + 1,
        )


def over_registered(inner: str, name: str) -> ActivationInformedMerge:
    """Wrap the method that is registered as ``inner``: what a pickle holds."""
    return ActivationInformedMerge(merge_methods.get(inner), name)
