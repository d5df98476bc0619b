"""The recipe: everything that decides what a pipeline run computes, as one frozen pydantic model.

Importable without torch. One TOML file holds one recipe; `m1.config.loading` reads it. Each stage
sees only its own table and the ones named in `m1.config.stages`, so that a change re-runs exactly
the stages it can affect. A validator's message begins with the field it is about, so that the
loader can put the table's path before it.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Mistakes(ValueError):
    """What is wrong with one table, a text for each mistake."""

    def __init__(self, texts: Sequence[str]) -> None:
        super().__init__("; ".join(texts))
        self.texts = tuple(texts)


def _refuse(texts: Sequence[str]) -> None:
    """Raise `Mistakes` if there are any."""
    if texts:
        raise Mistakes(texts)


def _repeated(names: Iterable[str]) -> list[str]:
    """Names that occur more than once."""
    return [name for name, count in Counter(names).items() if count > 1]


class Config(BaseModel):
    """Base of every table: unknown keys are errors and values never change after loading.

    Infinite numbers are refused because the canonical JSON behind stage hashes cannot hold them.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        strict=False,
        allow_inf_nan=False,
    )


class StorageConfig(Config):
    """Where stages keep what they make. Not part of any stage hash."""

    root: str = "runs"
    """Folder, or `s3://bucket/prefix`. With S3, work happens under `scratch` and finished outputs
    are uploaded."""
    scratch: str = "runs"
    """Local folder for work in progress and downloaded inputs when `root` is on S3."""


class TrackingConfig(Config):
    """Where lineage is written. Not part of any stage hash."""

    uri: str | None = None
    """MLflow tracking URI; MLFLOW_TRACKING_URI wins; absent: a sqlite file in the run root."""
    experiment: str = "m1"
    """MLflow experiment name."""


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
            _refuse([f"uri is absent, but kind {self.kind!r} reads from one; add it"])
        if self.kind == "s3" and self.uri is not None and not self.uri.startswith("s3://"):
            _refuse([f"uri is {self.uri!r}, but kind 's3' needs s3://bucket/prefix; change one"])
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
    """Verifiable tasks from one reasoning-gym dataset, split disjointly."""

    name: str
    """Name in reports; by default the benchmark's name too."""
    dataset: str
    """reasoning-gym dataset."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of that dataset's configuration."""
    num_sft: NonNegativeInt = 0
    """Tasks with worked demonstrations for SFT."""
    worked_fraction: Fraction = 1.0
    """Share of the demonstrations that think step by step in the think and answer tags; the others
    are plain answers without tags, as ordinary question-answer data are."""
    num_rl: NonNegativeInt = 0
    """Tasks for RL."""
    num_heldout: NonNegativeInt = 0
    """Tasks for evaluation only."""


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
        _refuse(
            [
                f"tasks has several entries named {name!r}, but names select tasks; "
                "rename all but one"
                for name in _repeated(task.name for task in self.tasks)
            ]
        )
        return self


class MoeConfig(Config):
    """Mixture of experts in every layer: softmax, top-k, renormalise (paper: 32 experts, top-2)."""

    num_experts: PositiveInt
    """Experts per layer."""
    top_k: Annotated[int, Field(ge=2)] = 2
    """Experts per token; with one, its renormalised weight is 1 and the router learns nothing."""
    ffn_hidden_size: PositiveInt
    """Width of one expert's SwiGLU."""
    shared_ffn_hidden_size: NonNegativeInt = 0
    """Width of a shared expert; 0 for none."""
    aux_loss_coefficient: NonNegativeFloat = 0.01
    """Load-balancing loss (Text-01: 0.01; M1 lowers it)."""

    @model_validator(mode="after")
    def _top_k_fits(self) -> Self:
        if self.top_k > self.num_experts:
            _refuse(
                [
                    f"top_k is {self.top_k}, but num_experts is only {self.num_experts}; "
                    "lower top_k or add experts"
                ]
            )
        return self


class ParallelConfig(Config):
    """Layout over GPUs."""

    tensor: PositiveInt = 1
    """Tensor parallel ranks (sequence parallelism comes with it)."""
    pipeline: PositiveInt = 1
    """Pipeline stages."""
    expert: PositiveInt = 1
    """Expert parallel ranks."""
    context: PositiveInt = 1
    """Context parallel ranks."""
    data: PositiveInt = 1
    """Data parallel replicas."""


class ModelConfig(Config):
    """The hybrid model (Text-01 sec. 2; M1 keeps its architecture)."""

    num_layers: PositiveInt
    """Transformer layers."""
    hidden_size: PositiveInt
    """Residual width."""
    num_heads: PositiveInt
    """Query heads."""
    num_kv_heads: PositiveInt
    """Key and value heads of softmax layers (GQA)."""
    head_dim: PositiveInt
    """Dimensions per head."""
    rotary_dim: PositiveInt
    """First dimensions of each head that RoPE turns in softmax layers; the paper's 64 of 128."""
    rope_theta: PositiveFloat = 10_000.0
    """RoPE base."""
    lightning_per_softmax: NonNegativeInt = 7
    """Lightning layers before each softmax layer; 0 makes every layer softmax."""
    layer_pattern: tuple[Literal["lightning", "softmax"], ...] | None = None
    """Explicit kinds of layers, instead of `lightning_per_softmax`."""
    norm: Literal["post", "pre"] = "post"
    """`post`: the normalised input is the residual, scaled by alpha and beta (DeepNorm);
    `pre`: the usual one."""
    alpha: PositiveFloat | None = None
    """Residual scale; absent: (2 * num_layers) ** 0.25 for post-norm, 1 for pre-norm."""
    beta: PositiveFloat = 1.0
    """Branch scale."""
    norm_epsilon: PositiveFloat = 1e-5
    """RMSNorm epsilon."""
    lightning_norm_epsilon: PositiveFloat = 1e-6
    """RMSNorm epsilon inside lightning attention."""
    moe: MoeConfig | None = None
    """Experts; absent: a dense SwiGLU of width `ffn_hidden_size`."""
    ffn_hidden_size: PositiveInt | None = None
    """Width of the dense SwiGLU; required without `moe`."""
    tie_embeddings: bool = False
    """Whether the LM head shares the embedding's weight."""
    max_position: PositiveInt = 4096
    """Longest sequence the model is configured for, in tokens."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of initial weights."""
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    """Arithmetic of the trunk; LM head and router are always FP32 (paper sec. 3.2)."""
    vocab_size: PositiveInt | None = None
    """Vocabulary; absent: the tokenizer's, rounded up to a multiple of 64."""

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """Kind of each layer, "lightning" or "softmax"."""
        if self.layer_pattern is not None:
            return self.layer_pattern
        period = self.lightning_per_softmax + 1
        return tuple(
            "softmax" if layer % period == 0 else "lightning"
            for layer in range(1, self.num_layers + 1)
        )

    @property
    def residual_alpha(self) -> float:
        """Residual scale in force."""
        if self.alpha is not None:
            return self.alpha
        return (2 * self.num_layers) ** 0.25 if self.norm == "post" else 1.0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        texts = []
        if self.num_heads % self.num_kv_heads:
            texts.append(
                f"num_heads is {self.num_heads}, but must be a multiple of num_kv_heads "
                f"{self.num_kv_heads}; change one of them"
            )
        if self.rotary_dim > self.head_dim or self.rotary_dim % 2:
            texts.append(
                f"rotary_dim is {self.rotary_dim}, but must be even and at most head_dim "
                f"{self.head_dim}; change it"
            )
        if self.layer_pattern is not None and len(self.layer_pattern) != self.num_layers:
            texts.append(
                f"layer_pattern has {len(self.layer_pattern)} entries, but num_layers is "
                f"{self.num_layers}; make them equal"
            )
        if self.moe is None and self.ffn_hidden_size is None:
            texts.append(
                "ffn_hidden_size is absent, but a dense model needs it; "
                "add it or a [model.moe] table"
            )
        if self.moe is not None and self.ffn_hidden_size is not None:
            texts.append(
                f"ffn_hidden_size is {self.ffn_hidden_size}, but [model.moe] makes every layer a "
                "mixture; remove it and set moe.ffn_hidden_size"
            )
        _refuse(texts)
        return self


class OptimizerConfig(Config):
    """AdamW as the paper sets it for RL (sec. 3.2: gradients span 1e-18 to 1e-5)."""

    lr: PositiveFloat
    """Peak learning rate."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """First-moment decay."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Second-moment decay."""
    epsilon: PositiveFloat = 1e-15
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradient-norm clip."""


class ScheduleConfig(Config):
    """Warm-up, constant, then decay to `min_lr` (paper sec. 2.1: from 8e-5 to 8e-6)."""

    warmup_steps: NonNegativeInt = 0
    """Linear warm-up."""
    decay_fraction: Fraction = 0.0
    """Last share of the steps over which the rate falls; 0 keeps it constant."""
    min_lr: NonNegativeFloat = 0.0
    """Rate at the end of the decay."""
    decay_style: Literal["linear", "cosine"] = "cosine"
    """Shape of the decay."""


class TrainConfig(Config):
    """What pretraining and SFT share."""

    num_steps: PositiveInt
    """Optimizer steps."""
    global_batch_rows: PositiveInt
    """Packed rows per step."""
    micro_batch_rows: PositiveInt
    """Packed rows per forward and backward."""
    optimizer: OptimizerConfig
    """Optimizer."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning-rate schedule."""
    checkpoint_every_steps: PositiveInt = 100
    """Steps between resumable checkpoints."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints to keep."""
    eval_every_steps: PositiveInt = 100
    """Steps between held-out losses."""
    parallel: ParallelConfig = ParallelConfig()
    """Layout; a change of layout does not change what is learned, but does re-run the stage."""

    @model_validator(mode="after")
    def _micro_divides_global(self) -> Self:
        share = self.micro_batch_rows * self.parallel.data
        if self.global_batch_rows % share:
            _refuse(
                [
                    f"global_batch_rows is {self.global_batch_rows}, but must be a multiple of "
                    f"micro_batch_rows * parallel.data = {share}; change one of them"
                ]
            )
        return self


class PretrainConfig(TrainConfig):
    """The pretraining stage."""


class SftConfig(TrainConfig):
    """The SFT stage: loss on the assistant's tokens only."""


class SamplingConfig(Config):
    """How completions are sampled."""

    temperature: NonNegativeFloat = 1.0
    """Softmax temperature; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus mass."""
    max_new_tokens: PositiveInt = 64
    """Length limit of a completion."""


class RepetitionStopConfig(Config):
    """Early truncation by repetition (paper sec. 3.2: 3,000 consecutive tokens above 0.99)."""

    num_tokens: PositiveInt = 3000
    """Consecutive tokens."""
    probability: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """Probability that each must exceed."""


class LossConfig(Config):
    """Policy loss (paper Eq. 4-7)."""

    kind: Literal["cispo"] = "cispo"
    """Objective."""
    clip_eps_high: PositiveFloat = 4.0
    """Ceiling 1 + clip_eps_high of the importance weight (Eq. 5); unpublished in the paper."""
    clip_eps_low: PositiveFloat | None = None
    """Floor 1 - clip_eps_low; absent: no lower bound, as in the paper."""
    aggregation: Literal["token_mean", "prompt_mean"] = "token_mean"
    """`token_mean`: one mean over the batch's tokens; `prompt_mean`: Eq. 4 read literally, a token
    mean within each group, averaged over prompts."""


class RewardConfig(Config):
    """Weights of the reward's parts."""

    correctness: NonNegativeFloat = 1.0
    """Weight of a correct final answer."""
    format: NonNegativeFloat = 0.1
    """Weight of the think and answer tags in order, exactly once."""


class DynamicSamplingConfig(Config):
    """Keep groups whose accuracy, not shaped reward, is neither 0 nor 1 (DAPO, kept by M1)."""

    enabled: bool = True
    """Whether to filter."""
    max_extra_batches: NonNegativeInt = 2
    """Further generation batches allowed per step to fill the prompt batch."""


class RlConfig(Config):
    """The RL stage: CISPO with group-relative advantages (paper sec. 3)."""

    num_steps: PositiveInt
    """Generation batches."""
    prompts_per_step: PositiveInt
    """Groups per generation batch."""
    group_size: Annotated[int, Field(ge=1)]
    """Completions per prompt, G."""
    updates_per_step: PositiveInt = 4
    """Off-policy optimizer updates per generation batch (paper: 16)."""
    micro_batch_tokens: PositiveInt = 8192
    """Token bound of one packed forward and backward."""
    sampling: SamplingConfig = SamplingConfig()
    """Sampling of completions."""
    repetition_stop: RepetitionStopConfig = RepetitionStopConfig()
    """Early truncation."""
    reward: RewardConfig = RewardConfig()
    """Reward weights."""
    dynamic_sampling: DynamicSamplingConfig = DynamicSamplingConfig()
    """Group filter."""
    loss: LossConfig = LossConfig()
    """Objective."""
    optimizer: OptimizerConfig
    """Optimizer."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning-rate schedule over all updates."""
    checkpoint_every_steps: PositiveInt = 20
    """Steps between resumable checkpoints."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints to keep."""
    parallel: ParallelConfig = ParallelConfig()
    """Layout of the trainer."""

    @model_validator(mode="after")
    def _usable(self) -> Self:
        texts = []
        if self.group_size < 2:
            texts.append(
                f"group_size is {self.group_size}, but advantages need at least 2 completions per "
                "task; raise it"
            )
        if self.updates_per_step > self.prompts_per_step:
            texts.append(
                f"updates_per_step is {self.updates_per_step}, but a batch of "
                f"{self.prompts_per_step} prompts splits into at most that many mini-batches; "
                "lower it or raise prompts_per_step"
            )
        _refuse(texts)
        return self


class BenchmarkConfig(Config):
    """One held-out benchmark."""

    name: str
    """Name in the report."""
    task: str
    """Name of a `data.tasks` entry whose held-out tasks are used."""
    num_tasks: PositiveInt | None = None
    """Use only the first tasks; absent: all."""


class EvaluateConfig(Config):
    """The evaluation stage (paper sec. 6: temperature 1.0, top-p 0.95, mean of k samples)."""

    benchmarks: Annotated[tuple[BenchmarkConfig, ...], Field(min_length=1)]
    """Benchmarks."""
    num_samples: PositiveInt = 4
    """Completions per task, the k of mean@k and pass@k."""
    sampling: SamplingConfig = SamplingConfig(temperature=1.0, top_p=0.95)
    """Sampling."""
    num_bootstrap: Annotated[int, Field(ge=100)] = 2000
    """Bootstrap resamples over tasks."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Confidence level of the intervals."""

    @model_validator(mode="after")
    def _benchmark_names_differ(self) -> Self:
        _refuse(
            [
                f"benchmarks has several entries named {name!r}, but names label scores; "
                "rename all but one"
                for name in _repeated(benchmark.name for benchmark in self.benchmarks)
            ]
        )
        return self


class RegisterConfig(Config):
    """Export in Hugging Face format and registration in MLflow."""

    model_name: str = "m1"
    """Registered model."""
    alias: str = "champion"
    """Alias that points at the new version."""


class Recipe(Config):
    """One pipeline run."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,40}$")]
    """Name of the run; lower-case letters, digits, - and _."""
    seed: NonNegativeInt = 1
    """Seed of data splits, initial weights, batches and sampling."""
    image: str = "python:3.11"
    """Container image of the components in a cluster; pin it by digest there."""
    storage: StorageConfig = StorageConfig()
    """Artifact storage."""
    tracking: TrackingConfig = TrackingConfig()
    """Lineage store."""
    data: DataConfig
    """Data stage."""
    model: ModelConfig
    """Architecture."""
    pretrain: PretrainConfig
    """Pretraining stage."""
    sft: SftConfig | None = None
    """SFT stage; absent: RL starts from the pretrained model (the paper's zero-RL setting)."""
    rl: RlConfig | None = None
    """RL stage; absent: no RL."""
    evaluate: EvaluateConfig | None = None
    """Evaluation stage."""
    register_: RegisterConfig | None = Field(default=None, alias="register")
    """Registration stage."""

    @model_validator(mode="after")
    def _references_resolve(self) -> Self:
        tasks = {task.name: task for task in self.data.tasks}
        texts = []
        for index, benchmark in enumerate(self.evaluate.benchmarks if self.evaluate else ()):
            path = f"evaluate.benchmarks.{index}.task is {benchmark.task!r}"
            if benchmark.task not in tasks:
                known = ", ".join(sorted(tasks)) or "no entries"
                texts.append(f"{path}, but data.tasks has {known}; name one that exists")
            elif not tasks[benchmark.task].num_heldout:
                texts.append(f"{path}, but its num_heldout is 0; raise it or drop the benchmark")
        if self.rl is not None and not any(task.num_rl for task in self.data.tasks):
            texts.append(
                "rl is present, but no entry of data.tasks has num_rl > 0; add tasks for RL"
            )
        if self.sft is not None and not any(task.num_sft for task in self.data.tasks):
            texts.append(
                "sft is present, but no entry of data.tasks has num_sft > 0; add demonstrations"
            )
        _refuse(texts)
        return self
