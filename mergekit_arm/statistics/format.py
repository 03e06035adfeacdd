"""The schema of ``activation_stats.json``, format 1; ``FORMAT.md`` beside it says it in words."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue

FORMAT_VERSION = 1
METADATA_FILE = "activation_stats.json"

EMBEDDING = "embedding"
BIAS = "bias"
CONVOLUTION = "convolution kernel"
ELEMENTWISE = "no matrix: acts on each element"
BUFFER = "buffer: not trained"
NOT_FLOATING = "no floating-point tensor"
NEVER_USED = "never used on this data"
NO_TOKEN = "expert that saw no token"
NOT_LOADED = "not a parameter of the model that transformers loads"
NOT_THERE = "not in the importance matrix"

LEFT_AS_MERGED = frozenset(
    {EMBEDDING, BIAS, CONVOLUTION, ELEMENTWISE, BUFFER, NOT_FLOATING, NO_TOKEN}
)
"""Reasons that are part of the methods' definition; any other needs the user's consent."""

EXPERTS = "experts"
"""Why a site of experts has no subspace: all of theirs would be a hundred times the others'."""

ONE_EXPERT = re.compile(r"(?P<experts>(?:^|.*\.)experts)\.\d+(?=\.|$)")
"""Matches the name of one expert of many where each is a module of its own."""


Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""A SHA-256 in hexadecimal digits."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelRecord(_Strict):
    """The measured model."""

    reference: str
    """As the user wrote it, in mergekit's grammar."""
    revision: str | None = None
    """Commit hash on the Hub; none for a local directory."""
    architecture: str
    content_hash: str
    """Over every weight's name, shape, dtype and probe."""


class MixtureRecord(_Strict):
    """What one of several data sets gave."""

    dataset: str
    weight: float
    split: str | None = None
    column: str
    sequences: int
    tokens: int


class DataRecord(_Strict):
    """The calibration data and how it was cut."""

    dataset: str
    subset: str | None = None
    split: str | None = None
    part: str | None = None
    """Such as 2/4, where only a part of the rows was used."""
    column: str
    template_hash: str | None = None
    """Of the chat template, where rows were chats."""
    tokenizer_hash: str | None = None
    """None where rows held ready token ids."""
    seed: int | None = None
    """None where directories of several seeds were added."""
    sequence_length: int | None = None
    """None where rows held ready token ids of their own lengths."""
    sequences: Count
    tokens: Count
    content_hash: str
    """Over the token ids that were measured."""
    max_tokens_per_row: int | None = None
    """Where it was chosen; otherwise one sequence of a text, and all of a row of token ids."""
    recipe: str | None = None
    """Such as "aim": how texts became sequences, where not by default."""
    tokenizer: str | None = None
    """Whose tokenizer was used, where it was not the model's own."""
    mixture: list[MixtureRecord] | None = None
    """What each data set gave, where there were several."""


class SettingsRecord(_Strict):
    """Settings of the run that change its numbers."""

    statistics: list[str]
    """Names of the kinds that were measured."""
    dtype: str
    """Of the forward passes."""
    device: str
    min_expert_tokens: Count = 0
    """What experts saw of fewer tokens is not used."""
    rank: Annotated[int, Field(ge=1)] | None = None
    """Columns of a subspace's sketch that were asked for; none: the default of each width."""
    energy: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the second moment that subspaces were asked to hold, where they were measured."""
    subspace_tokens: Count | None = None
    """Tokens in the sample that subspaces saw, at most."""
    skip_first: Count = 0
    """First tokens of every sequence that are not in the sample."""
    kinds: dict[str, dict[str, JsonValue]] | None = None
    """Settings of every other kind, by its name."""


class SiteRecord(_Strict):
    """One measured input."""

    width: Annotated[int, Field(ge=1)]
    tokens: Count | Annotated[list[Count], Field(min_length=1)]
    """Rows seen: one count, or one for each expert."""
    subspace: Count | None = None
    """Stored dimensions of the dominant subspace, where it was measured."""
    energy: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the second moment that they hold; less than the setting where no more are stored."""
    no_subspace: str | None = None
    """Why a subspace was not measured here although the run measured subspaces."""
    kinds: dict[str, dict[str, JsonValue]] | None = None
    """What every other kind records of the site, by its name."""


class WeightRecord(_Strict):
    """One tensor of the checkpoint: measured at a site, or listed with the reason why not."""

    shape: list[Count]
    dtype: str
    probe: Count
    """Row of the tensor ``probes``."""
    site: str | None = None
    input_axis: Count | None = None
    row: Count | None = None
    """Row of the site's statistics that belongs to this weight (one expert of many)."""
    reason: str | None = None
    """Why there is no site."""


class Metadata(_Strict):
    """All of ``activation_stats.json``."""

    format_version: Annotated[int, Field(ge=1)] = FORMAT_VERSION
    digest: Digest | None = None
    """Of all the rest; see ``digest.py``. On a line that can be removed."""
    model: ModelRecord
    data: DataRecord
    settings: SettingsRecord
    versions: dict[str, str]
    sites: dict[str, SiteRecord] = Field(min_length=1)
    weights: dict[str, WeightRecord] = Field(min_length=1)
    """Every tensor of the checkpoint that has elements, those of integers too."""
    converted: dict[str, WeightRecord] = {}
    """Tensors that transformers and mergekit make from several of ``weights``: fused experts."""
    aliases: dict[str, str] = {}
    """Other names by which a merge may ask for one of the above."""
    digests: dict[str, Digest] | None = None
    """Of every stored tensor, by its name; none in directories that were written before."""

    def experts(self) -> dict[str, int]:
        """Return the tokens that every expert of the model saw, by the expert's name."""
        found: dict[str, int] = {
            one[0]: 0
            for name, weight in self.weights.items()
            if weight.reason == NO_TOKEN and (one := ONE_EXPERT.match(name))
        }
        stacked = {w.site for w in self.weights.values() if w.row is not None or len(w.shape) == 3}
        for name, site in self.sites.items():
            if name in stacked and isinstance(site.tokens, list):
                module = name.rpartition(".")[0]
                own = ONE_EXPERT.match(name)
                for index, tokens in enumerate(site.tokens):
                    expert = own[0] if own else f"{module}[{index}]"
                    found[expert] = min(tokens, found.get(expert, tokens))
        return found
