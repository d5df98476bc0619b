"""Tables of the data stage: sources, cleaning, deduplication, tokenizer, tasks."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from m1.config.base import (
    Config,
    Fraction,
    NonNegativeInt,
    PositiveInt,
    refuse,
    refuse_credentials,
    repeated,
)


class SourceConfig(Config):
    """One source of raw text."""

    name: str
    """Name in the data card."""
    kind: Literal["python_stdlib", "folder", "jsonl", "s3"]
    """`python_stdlib`: the running interpreter's own library sources; `folder`: files below `uri`;
    `jsonl`: one object a line; `s3`: objects (text or .jsonl) below an `s3://bucket/prefix`."""
    uri: str | None = None
    """Folder, file or prefix; not used by `python_stdlib`."""
    include: tuple[str, ...] = ("*.py", "*.md", "*.rst", "*.txt")
    """File name patterns for `folder` and `s3`."""
    text_field: str = "text"
    """Field with the text in JSONL objects."""
    max_documents: PositiveInt | None = None
    """Stop after this many documents, in sorted order."""

    @model_validator(mode="after")
    def _uri_fits_kind(self) -> Self:
        if self.kind != "python_stdlib" and self.uri is None:
            refuse([f"uri is absent, but kind {self.kind!r} reads from one; add it"])
        if self.kind == "s3" and self.uri is not None and not self.uri.startswith("s3://"):
            refuse([f"uri is {self.uri!r}, but kind 's3' needs s3://bucket/prefix; change one"])
        return self


class CleaningConfig(Config):
    """Heuristic cleaning of documents (paper sec. 2.1: high recall for mathematics and code)."""

    min_characters: PositiveInt = 200
    """Drop shorter documents."""
    max_characters: PositiveInt = 200_000
    """Drop longer documents (generated tables)."""
    max_mean_line_characters: PositiveInt = 120
    """Drop documents whose mean line is longer (minified code, data)."""
    min_alphabetic_fraction: Fraction = 0.4
    """Drop documents with fewer letters among their non-space characters."""


class DedupConfig(Config):
    """Exact deduplication by content digest, then MinHash LSH on word shingles."""

    num_permutations: Annotated[int, Field(ge=16)] = 64
    """MinHash permutations."""
    shingle_words: PositiveInt = 5
    """Words per shingle."""
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.7
    """Estimated Jaccard similarity from which a document is a near duplicate."""


class TokenizerConfig(Config):
    """Byte-level BPE trained on the corpus; digits are separate tokens."""

    vocab_size: Annotated[int, Field(ge=300)] = 1024
    """Entries, special tokens included."""
    path: str | None = None
    """Folder of an existing tokenizer to use instead of training one."""


class TaskSourceConfig(Config):
    """Verifiable tasks from one generator or one set, split disjointly."""

    name: str
    """Name in reports; by default the benchmark's name too."""
    dataset: str = ""
    """Generator: a reasoning-gym dataset, or `logic:<task>` for one of our own logic tasks."""
    uri: str | None = None
    """Set instead of a generator: folder, file, `s3://bucket/prefix` or `hub:owner/name`; a file of
    `m1 curate` where `layout` is absent. In an order of its own for each seed."""
    layout: str = "m1"
    """Of the set: `m1`, our JSONL or Parquet, or a name in `m1.data.tasks.layouts`."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of that dataset's configuration; `difficulty` of a logic task, 1 to 10 or a
    list of them, in turn."""
    num_sft: NonNegativeInt = 0
    """Tasks with demonstrations for SFT."""
    worked_fraction: Fraction = 1.0
    """Share of the demonstrations that think step by step in the think and answer tags; the others
    are plain answers without tags, as ordinary question-answer data are."""
    num_rl: NonNegativeInt = 0
    """Tasks for RL."""
    num_heldout: NonNegativeInt = 0
    """Tasks for evaluation only."""

    @model_validator(mode="after")
    def _has_one_origin(self) -> Self:
        if (self.uri is None) == (not self.dataset):
            has = "neither dataset nor uri" if self.uri is None else "both dataset and uri"
            refuse([f"{self.name!r} has {has}; name a generator or a set"])
        if self.uri is not None and (self.num_sft or self.parameters):
            refuse(
                [
                    f"{self.name!r} reads a set, which has no worked solutions and takes no "
                    "parameters; set num_sft to 0 and leave parameters out"
                ]
            )
        if self.uri is not None:
            refuse_credentials("uri", self.uri, "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        return self


class DataConfig(Config):
    """The data stage."""

    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    """Raw text sources, in order."""
    cleaning: CleaningConfig = CleaningConfig()
    """Cleaning rules."""
    dedup: DedupConfig = DedupConfig()
    """Deduplication."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """Tokenizer."""
    tasks: tuple[TaskSourceConfig, ...] = ()
    """Verifiable tasks."""
    heldout_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.02
    """Share of documents kept for the held-out loss."""
    sequence_length: Annotated[int, Field(ge=16)] = 256
    """Tokens per packed row, for pretraining and SFT."""

    @model_validator(mode="after")
    def _task_names_differ(self) -> Self:
        refuse(
            [
                f"tasks has several entries named {name!r}, but names select tasks; "
                "rename all but one"
                for name in repeated(task.name for task in self.tasks)
            ]
        )
        return self
