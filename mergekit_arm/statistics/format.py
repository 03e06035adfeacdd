"""The schema of ``activation_stats.json``, format 1."""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict, Field

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

LEFT_AS_MERGED = frozenset(
    {EMBEDDING, BIAS, CONVOLUTION, ELEMENTWISE, BUFFER, NOT_FLOATING, NO_TOKEN}
)
"""Reasons that are part of the methods' definition; any other needs the user's consent."""

EXPERTS = "experts"
"""Why a site of experts has no subspace: all of theirs would be a hundred times the others'."""

ONE_EXPERT = re.compile(r"(?P<experts>(?:^|.*\.)experts)\.\d+(?=\.|$)")
"""Matches the name of one expert of many where each is a module of its own."""


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
    seed: int
    sequence_length: int | None = None
    """None where rows held ready token ids of their own lengths."""
    sequences: int
    tokens: int
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
    dtype: str
    device: str
    min_expert_tokens: int = 0
    """Experts that saw fewer tokens are left as merged."""
    rank: int | None = None
    energy: float | None = None
    subspace_tokens: int | None = None
    skip_first: int = 0


class SiteRecord(_Strict):
    """One measured input."""

    width: int
    tokens: int | list[int]
    """Rows seen: one count, or one for each expert."""
    subspace: int | None = None
    """Stored dimensions of the dominant subspace, where it was measured."""
    energy: float | None = None
    """Share of the second moment that they hold; below the setting where the rank was too small."""
    no_subspace: str | None = None
    """Why a subspace was not measured here although the run measured subspaces."""


class WeightRecord(_Strict):
    """One floating-point tensor of the checkpoint: measured at a site, or listed with a reason."""

    shape: list[int]
    dtype: str
    probe: int
    """Row of the tensor ``probes``."""
    site: str | None = None
    input_axis: int | None = None
    row: int | None = None
    """Row of the site's statistics that belongs to this weight (one expert of many)."""
    reason: str | None = None
    """Why there is no site."""


class Metadata(_Strict):
    """All of ``activation_stats.json``."""

    format_version: int = FORMAT_VERSION
    model: ModelRecord
    data: DataRecord
    settings: SettingsRecord
    versions: dict[str, str]
    sites: dict[str, SiteRecord] = Field(min_length=1)
    weights: dict[str, WeightRecord] = Field(min_length=1)
    """Every floating-point tensor of the checkpoint."""
    converted: dict[str, WeightRecord] = {}
    """Tensors that transformers and mergekit make from several of ``weights``: fused experts."""
    aliases: dict[str, str] = {}
    """Other names by which a merge may ask for one of the above."""

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
