"""The recipe: everything that decides what a pipeline run computes, as one frozen pydantic model.

Importable without torch. One TOML file holds one recipe; `m1.config.loading` reads it. Each stage
sees only its own table and the ones named in `m1.config.stages`, so that a change re-runs exactly
the stages it can affect. A validator's message begins with the field it is about, so that the
loader can put the table's path before it. The tables are in `data_tables`, `model_tables`,
`training_tables` and `rl_tables`; the rest of the code imports them from here.
"""

from typing import Annotated, Self

from pydantic import Field, model_validator

from m1.config.base import (
    Config,
    Mistakes,
    NonNegativeInt,
    PositiveInt,
    refuse,
    refuse_credentials,
    repeated,
)
from m1.config.data_tables import (
    CleaningConfig,
    DataConfig,
    DedupConfig,
    SourceConfig,
    TaskSourceConfig,
    TokenizerConfig,
)
from m1.config.layout import layout_mistakes
from m1.config.model_tables import (
    BranchScales,
    ModelConfig,
    MoeConfig,
    ResidualConfig,
)
from m1.config.resource_tables import CiConfig, ResourcesConfig, resource_mistakes
from m1.config.rl_course_tables import (
    CurriculumConfig,
    CurriculumSourceConfig,
    DifficultyConfig,
    GateConfig,
    LengthStageConfig,
    TraceConfig,
    WeightPoint,
)
from m1.config.rl_tables import (
    AdvantageConfig,
    AlarmConfig,
    DynamicSamplingConfig,
    LossConfig,
    RewardConfig,
    RewardServiceConfig,
    RolloutConfig,
)
from m1.config.sandbox_tables import SWE, EpisodesConfig, PairConfig, SandboxConfig
from m1.config.training_tables import (
    OptimizerConfig,
    ParallelConfig,
    PretrainConfig,
    RepetitionStopConfig,
    RlConfig,
    SamplingConfig,
    ScheduleConfig,
    SftConfig,
    TrainConfig,
)

__all__ = [
    "AdvantageConfig",
    "AlarmConfig",
    "BenchmarkConfig",
    "BranchScales",
    "CiConfig",
    "CleaningConfig",
    "Config",
    "CurriculumConfig",
    "CurriculumSourceConfig",
    "DataConfig",
    "DedupConfig",
    "DifficultyConfig",
    "DynamicSamplingConfig",
    "EpisodesConfig",
    "EvaluateConfig",
    "GateConfig",
    "LengthStageConfig",
    "LossConfig",
    "Mistakes",
    "ModelConfig",
    "MoeConfig",
    "OptimizerConfig",
    "PairConfig",
    "ParallelConfig",
    "PretrainConfig",
    "Recipe",
    "RegisterConfig",
    "RepetitionStopConfig",
    "ResidualConfig",
    "ResourcesConfig",
    "RewardConfig",
    "RewardServiceConfig",
    "RlConfig",
    "RolloutConfig",
    "SamplingConfig",
    "SandboxConfig",
    "ScheduleConfig",
    "SftConfig",
    "SourceConfig",
    "StorageConfig",
    "TaskSourceConfig",
    "TokenizerConfig",
    "TraceConfig",
    "TrackingConfig",
    "TrainConfig",
    "WeightPoint",
]


class StorageConfig(Config):
    """Where stages keep what they make. Not part of any stage hash."""

    root: str = "runs"
    """Folder, or `s3://bucket/prefix`. With S3, work happens under `scratch`; checkpoints are
    uploaded as they are made, and outputs when they are finished."""
    scratch: str = "runs"
    """Local folder for work in progress and downloaded inputs when `root` is on S3."""

    @property
    def work_folder(self) -> str:
        """Where stages work: `scratch` beside S3, else `root`."""
        return self.scratch if self.root.startswith("s3://") else self.root

    @model_validator(mode="after")
    def _hold_no_secret(self) -> Self:
        refuse_credentials("root", self.root, "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        return self


class TrackingConfig(Config):
    """Where lineage is written. Not part of any stage hash."""

    uri: str | None = None
    """MLflow tracking URI; MLFLOW_TRACKING_URI wins; absent: a sqlite file in the run root."""
    experiment: str = "m1"
    """MLflow experiment name."""

    @model_validator(mode="after")
    def _hold_no_secret(self) -> Self:
        ways = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        refuse_credentials("uri", self.uri, ways)
        return self


class BenchmarkConfig(Config):
    """One held-out benchmark."""

    name: str
    """Name in the report."""
    task: str
    """Name of a `data.tasks` entry whose held-out tasks are used; or `swe`, unless an entry has
    that name: software engineering tasks that `sandbox.num_heldout` keeps."""
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
    episodes: EpisodesConfig = EpisodesConfig()
    """Of benchmarks whose task is `swe`."""

    @model_validator(mode="after")
    def _benchmark_names_differ(self) -> Self:
        refuse(
            [
                f"benchmarks has several entries named {name!r}, but names label scores; "
                "rename all but one"
                for name in repeated(benchmark.name for benchmark in self.benchmarks)
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
    resources: ResourcesConfig = ResourcesConfig()
    """What stages ask of a cluster."""
    ci: CiConfig = CiConfig()
    """Continuous integration."""
    data: DataConfig
    """Data stage."""
    sandbox: SandboxConfig | None = None
    """Environments for software engineering tasks; absent: none."""
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
            if benchmark.task == SWE and SWE not in tasks:
                if self.sandbox is None or not self.sandbox.num_heldout:
                    texts.append(
                        f"{path}, but sandbox.num_heldout is 0 or [sandbox] absent; set it, or "
                        "drop the benchmark"
                    )
            elif benchmark.task not in tasks:
                known = ", ".join(sorted(tasks)) or "no entries"
                texts.append(f"{path}, but data.tasks has {known}; name one that exists")
            elif not tasks[benchmark.task].num_heldout:
                texts.append(f"{path}, but its num_heldout is 0; raise it or drop the benchmark")
        for name in ("pretrain", "sft", "rl"):
            stage = getattr(self, name)
            if stage is not None:
                texts += [
                    f"{name}.parallel.{text}"
                    for text in layout_mistakes(self.model, stage.parallel)
                ]
        texts += resource_mistakes(
            self.resources, self._world_sizes(), work_folder=self.storage.work_folder
        )
        if self.rl is not None and not any(task.num_rl for task in self.data.tasks):
            texts.append(
                "rl is present, but no entry of data.tasks has num_rl > 0; add tasks for RL"
            )
        if self.sft is not None and not any(task.num_sft for task in self.data.tasks):
            texts.append(
                "sft is present, but no entry of data.tasks has num_sft > 0; add demonstrations"
            )
        if self.rl is not None and self.rl.episodes is not None and self.sandbox is None:
            texts.append(
                "rl.episodes is present, but [sandbox] is absent, whose tasks they are of; add it"
            )
        if self.rl is not None:
            texts += self._rl_source_mistakes(self.rl)
            texts += self._replay_mistakes(self.rl)
            if self.resources.rollout is not None and "cluster" not in self.rl.rollout.urls:
                texts.append(
                    "resources.rollout makes inference servers, but rl.rollout.urls does not name "
                    "them; set it to ['cluster'] or remove the table"
                )
        refuse(texts)
        return self

    def _world_sizes(self) -> dict[str, int]:
        """Processes of each stage with a parallel layout, by its kind."""
        stages = {"pretrain": self.pretrain, "sft": self.sft, "rl": self.rl}
        return {n: s.parallel.world_size for n, s in stages.items() if s is not None}

    def _replay_mistakes(self, rl: RlConfig) -> list[str]:
        if rl.routing_replay == "off" or self.model.moe is not None:
            return []
        return [
            f"rl.routing_replay is {rl.routing_replay!r}, but model.moe is absent, so there is no "
            "routing; set it to 'off'"
        ]

    def _rl_source_mistakes(self, rl: RlConfig) -> list[str]:
        """Names of task sources in the rl table that are none."""
        known = {task.name for task in self.data.tasks if task.num_rl}
        known |= {SWE} if rl.episodes is not None else set()
        named = [
            (f"rl.curriculum.sources.{i}.source", source.source)
            for i, source in enumerate(rl.curriculum.sources)
        ]
        named += [
            (f"rl.lengths.{i}.keep_fraction", name)
            for i, length in enumerate(rl.lengths)
            for name in length.keep_fraction
        ]
        return [
            f"{path} names {name!r}, but data.tasks has tasks for RL from "
            f"{', '.join(sorted(known)) or 'none'}; name one of them"
            for path, name in named
            if name not in known
        ]
