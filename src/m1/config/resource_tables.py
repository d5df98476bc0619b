"""Table `[resources]`: what each stage asks of a cluster. No part of any stage hash."""

from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from m1.config.base import Config, NonNegativeInt, PositiveFloat, PositiveInt, refuse, repeated

Quantity = Annotated[
    str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|[kMGTP]i?)?$", coerce_numbers_to_str=True)
]
"""An amount as Kubernetes writes it: 500m, 8, 64Gi."""
DnsName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]
EnvironmentName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
KINDS = ("data", "sandbox", "pretrain", "sft", "rl", "evaluate", "register")
"""Kinds of stages."""
WITH_LAYOUT = ("pretrain", "sft", "rl")
"""Kinds of stages with a parallel layout."""
WITH_SANDBOXES = ("rl", "evaluate")
"""Kinds of stages that run programs nobody trusts."""
LauncherName = Literal["torchrun", "trainjob"]


class TolerationConfig(Config):
    """A taint that pods of the stage stand."""

    key: str | None = None
    """Key of the taint; absent: every taint, with operator Exists."""
    operator: Literal["Equal", "Exists"] = "Exists"
    """Exists asks for the key only, Equal also for the value."""
    value: str | None = None
    """Value of the taint."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint; absent: every one."""

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if (self.operator == "Equal") != (self.value is not None):
            refuse(
                [
                    f"operator is {self.operator!r} and value is {self.value!r}, but Equal needs a "
                    "value and Exists takes none; change one of them"
                ]
            )
        if self.key is None and self.operator == "Equal":
            refuse(["key is absent, which needs operator 'Exists'; name the taint's key"])
        return self


class VolumeConfig(Config):
    """A PersistentVolumeClaim that exists."""

    claim: DnsName
    """Name of the claim, in the namespace of the run."""
    path: Annotated[str, Field(pattern=r"^/.+")]
    """Where it is mounted."""
    sub_path: str | None = None
    """Folder of the volume that is mounted; absent: all of it."""
    is_shared: bool = False
    """Whether pods on several nodes can mount it at once (ReadWriteMany)."""


class SecretConfig(Config):
    """A Secret that exists, by name; its values never pass through recipes or pipelines."""

    name: DnsName
    """Name of the Secret."""
    environment: Annotated[dict[str, EnvironmentName], Field(min_length=1)]
    """Environment variable for each key of the Secret: {accesskey = "AWS_ACCESS_KEY_ID"}."""


class StageResources(Config):
    """What the pods of a stage ask for."""

    cpu: Quantity | None = None
    """Processors, as request and as limit."""
    memory: Quantity | None = None
    """Main memory, as request and as limit."""
    accelerator: str = "nvidia.com/gpu"
    """Resource name of the accelerator."""
    num_accelerators: NonNegativeInt = 0
    """Accelerators of each pod."""
    shared_memory: Quantity | None = None
    """Size of /dev/shm, in memory; absent: the container runtime's 64 MiB."""
    node_selector: dict[str, str] = Field(default={})
    """Labels that a node must have."""
    tolerations: tuple[TolerationConfig, ...] = ()
    """Taints that are stood."""
    volumes: tuple[VolumeConfig, ...] = ()
    """Claims to mount."""
    secrets: tuple[SecretConfig, ...] = ()
    """Secrets as environment variables."""
    environment: dict[EnvironmentName, str] = Field(default={})
    """Further environment variables, nothing secret: they stand in the compiled pipeline."""
    timeout_seconds: PositiveInt | None = None
    """After which the stage's pod or TrainJob is ended as failed; absent: never."""
    retries: NonNegativeInt = 0
    """Further attempts after a failure; a stage goes on from its checkpoint."""
    retry_backoff_seconds: PositiveInt = 30
    """Wait before the first of them."""
    retry_backoff_factor: PositiveFloat = 2.0
    """Growth of that wait."""
    retry_backoff_max_seconds: PositiveInt = 3600
    """Longest wait."""
    cache: bool = True
    """Whether KFP may hand on an earlier task's result. Without it the stage starts, and still
    finds its own finished work."""
    cache_key: Annotated[str, Field(min_length=1)] | None = None
    """Replaces KFP's own key, which covers parameters, inputs and image; a result that belongs to
    another recipe is refused by the stage that gets it. Needs a KFP server that
    honours it, as its main branch does since July 2026."""
    launcher: LauncherName = "torchrun"
    """Who starts the stage's processes: `torchrun` in the component's own pod, or a `trainjob` of
    Kubeflow Trainer, whose pods get what is asked for here."""
    num_nodes: PositiveInt = 1
    """Pods of the TrainJob; the stage's parallel layout is spread evenly over them."""


class TrainerConfig(Config):
    """How TrainJobs run."""

    runtime: DnsName = "m1-torch"
    """Name of the runtime, which the platform owns: gang scheduling and RDMA are set there. The
    default is that of manifests/base/trainer."""
    runtime_kind: Literal["ClusterTrainingRuntime", "TrainingRuntime"] = "ClusterTrainingRuntime"
    """Kind of the runtime."""
    queue: str | None = None
    """LocalQueue of Kueue, which starts the job when its quota allows; absent: at once."""
    namespace: DnsName | None = None
    """Where jobs are made; absent: the namespace of the run."""
    poll_seconds: PositiveFloat = 5.0
    """Between two looks at a job."""
    start_seconds: PositiveFloat = 86_400.0
    """Until its first pod runs, after which the stage fails; waiting in a queue counts."""


class RolloutDeploymentConfig(Config):
    """Inference servers of the rl stage, made before it and torn down after it."""

    min_replicas: PositiveInt = 1
    """Servers that must be ready before the stage starts."""
    max_replicas: PositiveInt = 1
    """Most servers that the autoscaler makes."""
    queue_target: PositiveInt = 64
    """Completions queued or running (`m1_pending_completions`) that the autoscaler aims at for each
    server."""
    port: Annotated[int, Field(ge=1024, le=65535)] = 8000
    """Port of the servers."""
    source: str = ""
    """What they serve first, a checkpoint or model folder that the pods can read."""
    options: tuple[str, ...] = ()
    """Further arguments of `m1 serve`."""
    resources: StageResources = StageResources()
    """Of each server."""
    start_seconds: PositiveFloat = 1800.0
    """Until `min_replicas` are ready, after which the stage fails."""

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> Self:
        texts = []
        if self.max_replicas < self.min_replicas:
            texts.append(
                f"max_replicas is {self.max_replicas}, but min_replicas is {self.min_replicas}; "
                "raise it"
            )
        if not self.source:
            texts.append("source is empty, but servers start with some weights; name a checkpoint")
        refuse(texts)
        return self


class SandboxCheckConfig(Config):
    """Where the rl and evaluate stages' sandboxes run in the cluster."""

    namespace: DnsName = "m1-sandbox"
    """Namespace with a policy that denies all traffic."""
    image: str = "localhost/python:1"
    """Image of the sandbox that is opened before each of these stages starts in the cluster."""
    runtime_class: str | None = None
    """RuntimeClass of gVisor or Kata."""


class ResourcesConfig(Config):
    """What a cluster gives; read by `m1 submit` and by stages that run there."""

    default: StageResources = StageResources()
    """Of every stage; a stage's own table replaces single values of it."""
    data: StageResources | None = None
    """Of the data stage."""
    sandbox: StageResources | None = None
    """Of the sandbox stage."""
    pretrain: StageResources | None = None
    """Of the pretrain stage."""
    sft: StageResources | None = None
    """Of the sft stage."""
    rl: StageResources | None = None
    """Of the rl stages."""
    evaluate: StageResources | None = None
    """Of the evaluate stage."""
    register_: StageResources | None = Field(default=None, alias="register")
    """Of the register stage."""
    trainer: TrainerConfig = TrainerConfig()
    """TrainJobs."""
    rollout: RolloutDeploymentConfig | None = None
    """Inference servers of the rl stage; absent: none are made."""
    sandboxes: SandboxCheckConfig | None = None
    """Sandboxes in the cluster; absent: none are looked for."""
    ttl_seconds: PositiveInt | None = None
    """How long a finished run's workflow is kept; absent: the platform's."""
    deadline_seconds: PositiveInt | None = None
    """After which a run is ended; absent: never."""

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, given: Any) -> Any:
        """Complete stages' tables, so that one written out in full is read as the same."""
        default = given.get("default") if isinstance(given, dict) else None
        if not isinstance(default, dict):
            return given
        own = {kind: given[kind] for kind in KINDS if isinstance(given.get(kind), dict)}
        return given | {kind: default | table for kind, table in own.items()}

    def of(self, kind: str) -> StageResources:
        """What a stage of a kind asks for: its own table or the default one; also `default`."""
        own: StageResources | None = getattr(self, "register_" if kind == "register" else kind)
        return self.default if own is None else own

    def launcher(self, kind: str) -> LauncherName:
        """Who starts a stage's processes; stages without a parallel layout have one process."""
        return self.of(kind).launcher if kind in WITH_LAYOUT else "torchrun"

    def makes_objects(self, kind: str) -> bool:
        """Whether a stage of a kind makes objects in the cluster, which a run tears down."""
        return self.launcher(kind) == "trainjob" or (kind == "rl" and self.rollout is not None)


class CiConfig(Config):
    """What continuous integration does with a recipe. No part of any stage hash."""

    submit: bool = False
    """Whether a merge that changes the recipe's content submits it."""


def resource_mistakes(
    resources: ResourcesConfig, world_sizes: Mapping[str, int], *, work_folder: str
) -> list[str]:
    """What cannot work of a recipe's resources; each text begins with a field.

    Args:
        resources: The table.
        world_sizes: Processes of each stage's parallel layout, by its kind.
        work_folder: Where stages work.
    """
    texts = []
    for kind, processes in world_sizes.items():
        mistakes = _stage_mistakes(resources.of(kind), processes, work_folder)
        texts += [f"resources.{kind}.{text}" for text in mistakes]
    return texts


def _stage_mistakes(asked: StageResources, processes: int, work_folder: str) -> Iterator[str]:
    for name in repeated([volume.path for volume in asked.volumes]):
        yield f"volumes has several entries at {name}; mount each elsewhere"
    if asked.launcher == "torchrun":
        if asked.num_nodes > 1:
            yield (
                f"num_nodes is {asked.num_nodes}, but torchrun starts processes in one pod; set "
                "launcher to 'trainjob'"
            )
        return
    if processes % asked.num_nodes:
        yield (
            f"num_nodes is {asked.num_nodes}, but must divide the layout's {processes} processes; "
            "change one of them"
        )
    elif asked.num_accelerators and asked.num_accelerators < processes // asked.num_nodes:
        yield (
            f"num_accelerators is {asked.num_accelerators}, but each of {asked.num_nodes} nodes "
            f"has {processes // asked.num_nodes} processes; raise it"
        )
    shared = [PurePosixPath(volume.path) for volume in asked.volumes if volume.is_shared]
    if not any(PurePosixPath(work_folder).is_relative_to(path) for path in shared):
        yield (
            f"launcher is 'trainjob', whose pods and the component share the folder of work, but "
            f"{work_folder!r} (storage) lies on no volume with is_shared; mount one above it"
        )
