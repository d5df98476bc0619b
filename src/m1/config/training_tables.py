"""Tables of the training stages: layout, optimizer, schedule, pretraining, SFT, RL."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from m1.config.base import (
    Config,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    refuse,
)
from m1.config.rl_course_tables import (
    CurriculumConfig,
    GateConfig,
    LengthStageConfig,
    TraceConfig,
    length_mistakes,
)
from m1.config.rl_tables import (
    DEFAULT_ALARMS,
    AdvantageConfig,
    AlarmConfig,
    DynamicSamplingConfig,
    LossConfig,
    RewardConfig,
    RewardServiceConfig,
    RolloutConfig,
)
from m1.config.sandbox_tables import EpisodesConfig, episode_mistakes


class ParallelConfig(Config):
    """Layout over GPUs: tensor * pipeline * context * data of them.

    Experts are spread over the same GPUs in a way of their own: expert * expert_tensor must divide
    tensor * context * data.
    """

    tensor: PositiveInt = 1
    """Tensor parallel ranks (sequence parallelism comes with it)."""
    pipeline: PositiveInt = 1
    """Pipeline stages."""
    pipeline_layers: tuple[PositiveInt, ...] | None = None
    """Layers of each pipeline stage, where they are not equal."""
    expert: PositiveInt = 1
    """Expert parallel ranks."""
    expert_tensor: PositiveInt | None = None
    """Tensor parallel ranks inside each expert; absent: 1 with expert parallel ranks, else
    `tensor`."""
    context: PositiveInt = 1
    """Context parallel ranks."""
    data: PositiveInt = 1
    """Data parallel replicas."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass: none; those of the gated norm after
    lightning attention and, with Transformer Engine, of the experts' SwiGLU; or every layer's."""

    @property
    def expert_tensor_size(self) -> int:
        """Tensor parallel ranks inside each expert, in force."""
        if self.expert_tensor is not None:
            return self.expert_tensor
        return self.tensor if self.expert == 1 else 1

    @property
    def world_size(self) -> int:
        """Processes of the layout, one a GPU."""
        return self.tensor * self.pipeline * self.context * self.data

    @model_validator(mode="after")
    def _experts_fit(self) -> Self:
        ranks = self.tensor * self.context * self.data
        if ranks % (self.expert * self.expert_tensor_size):
            refuse(
                [
                    f"expert is {self.expert} and expert_tensor {self.expert_tensor_size}, but "
                    f"their product must divide tensor * context * data = {ranks}; change one of "
                    "them"
                ]
            )
        if self.expert == 1 and self.expert_tensor_size != self.tensor:
            refuse(
                [
                    f"expert_tensor is {self.expert_tensor}, but without expert parallel ranks it "
                    f"must equal tensor, {self.tensor}: megatron-core would not add up the "
                    "gradients of the experts' copies; leave it out, or raise expert"
                ]
            )
        if self.pipeline_layers is not None and len(self.pipeline_layers) != self.pipeline:
            refuse(
                [
                    f"pipeline_layers has {len(self.pipeline_layers)} entries, but pipeline is "
                    f"{self.pipeline}; make them equal"
                ]
            )
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
    async_save: bool = False
    """Whether training goes on while a checkpoint is written from a copy in the CPU's memory."""
    eval_every_steps: PositiveInt = 100
    """Steps between held-out losses."""
    parallel: ParallelConfig = ParallelConfig()
    """Layout; a change of layout does not change what is learned, but does re-run the stage."""

    @model_validator(mode="after")
    def _micro_divides_global(self) -> Self:
        share = self.micro_batch_rows * self.parallel.data
        if self.global_batch_rows % share:
            refuse(
                [
                    f"global_batch_rows is {self.global_batch_rows}, but must be a multiple of "
                    f"micro_batch_rows * parallel.data = {share}; change one of them"
                ]
            )
        return self


class PretrainConfig(TrainConfig):
    """The pretraining stage."""

    num_steps: NonNegativeInt
    """Optimizer steps; 0 hands `start` on as it is."""
    start: str | None = None
    """Folder of a checkpoint to continue from, also `s3://bucket/folder`, as `m1 convert` and every
    training stage write it (the paper continues from MiniMax-Text-01); its path is part of the
    stage hash, its content is not. Absent: random weights."""

    @model_validator(mode="after")
    def _has_weights(self) -> Self:
        if self.num_steps == 0 and self.start is None:
            refuse(
                [
                    "num_steps is 0, but there is no start, so later stages would get random "
                    "weights; raise num_steps or name a checkpoint in start"
                ]
            )
        return self


class SftConfig(TrainConfig):
    """The SFT stage: loss on the assistant's tokens only."""


class SamplingConfig(Config):
    """How completions are sampled."""

    temperature: NonNegativeFloat = 1.0
    """Softmax temperature; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus mass."""
    top_k: NonNegativeInt = 0
    """Most likely tokens to choose from; 0 for all."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Least probability relative to the most likely token's."""
    max_new_tokens: PositiveInt = 64
    """Length limit of a completion."""


class RepetitionStopConfig(Config):
    """Early truncation by repetition (paper sec. 3.2: 3,000 consecutive tokens above 0.99)."""

    num_tokens: PositiveInt = 3000
    """Consecutive tokens."""
    probability: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """Probability that each must exceed."""


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
    advantage: AdvantageConfig = AdvantageConfig()
    """Advantages."""
    loss: LossConfig = LossConfig()
    """Objective."""
    rollout: RolloutConfig = RolloutConfig()
    """Who samples."""
    routing_replay: Literal["off", "rollout"] = "off"
    """Which experts of an MoE compute a sampled token in the trainer: its router's own choice, or
    those that computed it when it was sampled (R3), with the trainer's own weights of them."""
    reward_service: RewardServiceConfig = RewardServiceConfig()
    """Verifiers in processes of their own."""
    skip_grad_norm: PositiveFloat | None = None
    """Updates whose gradient norm, before it is clipped, exceeds this are left out; those with a
    norm that is not finite always are."""
    alarms: tuple[AlarmConfig, ...] = DEFAULT_ALARMS
    """Bounds of monitors; given ones replace the defaults."""
    max_bad_steps: PositiveInt = 3
    """Steps in a row without an update, for whatever reason, before the stage stops."""
    optimizer: OptimizerConfig
    """Optimizer."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning-rate schedule over all updates."""
    checkpoint_every_steps: PositiveInt = 20
    """Steps between resumable checkpoints."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints to keep."""
    async_save: bool = False
    """Whether training goes on while a checkpoint is written from a copy in the CPU's memory."""
    parallel: ParallelConfig = ParallelConfig()
    """Layout of the trainer."""
    lengths: tuple[LengthStageConfig, ...] = ()
    """Stages of longer thinking, each a pipeline stage of its own; absent: one stage, `rl`."""
    gate: GateConfig = GateConfig()
    """When a length stage ends; not used without `lengths`."""
    curriculum: CurriculumConfig = CurriculumConfig()
    """Which tasks come when."""
    episodes: EpisodesConfig | None = None
    """Also train on software engineering tasks, which the sandbox stage makes; absent: not."""
    traces: TraceConfig = TraceConfig()
    """Files of rollouts, and samples of them in MLflow."""

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
        texts += length_mistakes(self.lengths)
        if self.episodes is not None:
            texts += episode_mistakes(
                lengths=bool(self.lengths),
                routing_replay=self.routing_replay != "off",
                rollout=self.rollout.has_workers or self.rollout.mode == "async",
                parallel=self.parallel.world_size > 1,
            )
        lag = self.rollout.max_policy_lag
        if self.rollout.mode == "async" and lag is not None and lag < self.updates_per_step:
            texts.append(
                f"rollout.max_policy_lag is {lag}, but one batch makes {self.updates_per_step} "
                "updates, so whatever was sampled meanwhile would be too old; raise it to at least "
                "updates_per_step"
            )
        penalised = self.reward.overlong_tokens
        if penalised is not None and penalised > self.sampling.max_new_tokens:
            texts.append(
                f"reward.overlong_tokens is {penalised}, but completions have at most "
                f"{self.sampling.max_new_tokens} tokens; lower it"
            )
        refuse(texts)
        return self
