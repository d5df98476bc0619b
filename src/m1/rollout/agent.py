"""Episodes in which a model mends a repository: prompt, command, observation, and again.

The history is linear: nothing is dropped or rewritten. Episodes advance together, turn by turn, so
that the engine samples for all of them at once while their commands run side by side.
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from m1.rollout.actions import (
    INSTRUCTIONS,
    ActionError,
    Command,
    Edit,
    apply_edit,
    parse_action,
    shorten,
)
from m1.rollout.dialogue import Dialogue, Policy, Trajectory
from m1.sandbox.base import Backend, Limits, Sandbox, SandboxError, SandboxGone, printable
from m1.sandbox.farm.exploits import Exploit, find_exploits
from m1.swe.instance import Instance
from m1.swe.store import EnvironmentStore
from m1.swe.suite import LIMITS, SITE, TREE, VARIABLES, layers_of

_MAX_PATCH_BYTES = 4 << 20
_MAX_FILE_BYTES = 4 << 20
_DIFF = """
git() { command git -c safe.directory='*' -c core.quotePath=false "$@"; }
git add -A -- . ':(exclude,glob)**/__pycache__/**' ':(exclude,glob)**/.pytest_cache/**' &&
git diff --cached --no-renames --no-color --no-ext-diff HEAD
"""


@dataclass(frozen=True)
class AgentConfig:
    """Budgets of one episode."""

    max_turns: int = 40
    max_tokens: int = 32_768
    """Of the whole conversation; an episode ends when another reply might not fit."""
    max_seconds: float = 1800.0
    """Wall time, the model's share included."""
    command_seconds: float = 60.0
    max_observation_characters: int = 8_000
    num_parallel: int = 8
    """Commands that run at once."""


@dataclass(frozen=True)
class AgentTurn:
    """One exchange."""

    reply: str
    observation: str
    exit_code: int | None
    """Of the command; None for edits and answers without an action."""
    seconds: float
    """Of the command or edit."""


@dataclass(frozen=True)
class Episode:
    """What an agent did with an instance."""

    instance_id: str
    patch: str
    """Its tree against the given one, at the end."""
    stop_reason: str
    """`submitted`, `turns`, `tokens`, `seconds` or `infra`."""
    turns: tuple[AgentTurn, ...]
    trajectory: Trajectory | None
    """Tokens for training; None with a chat model."""
    num_tokens: int
    seconds: float
    infra_error: str | None = None
    """What failed on our side; the episode must then be masked."""
    exploits: tuple[Exploit, ...] = ()
    """Signs that it went for the reward: in its commands, edits and patch."""


@dataclass
class _Running:
    """An episode under way."""

    instance: Instance
    dialogue: Dialogue
    sandbox: Sandbox | None
    started: float
    turns: list[AgentTurn] = field(default_factory=list)
    actions: list[str] = field(default_factory=list)
    stop_reason: str = ""
    patch: str = ""
    infra_error: str | None = None


def run_episodes(
    policy: Policy,
    instances: Sequence[Instance],
    store: EnvironmentStore,
    backend: Backend,
    config: AgentConfig | None = None,
    *,
    limits: Limits = LIMITS,
) -> list[Episode]:
    """One episode for each entry, all at once; an instance may come several times.

    An episode whose sandbox fails ends with `infra_error`; the others go on.

    Raises:
        M1Error: The engine or server refuses, or an environment is not in the store.
    """
    config = config or AgentConfig()
    limits = replace(limits, wall_seconds=config.command_seconds)
    with ThreadPoolExecutor(config.num_parallel) as threads:
        running = [
            _Running(
                instance,
                policy.begin(first_prompt(instance), key=f"{instance.instance_id}/{number}"),
                None,
                time.monotonic(),
            )
            for number, instance in enumerate(instances)
        ]
        try:
            list(threads.map(lambda e: _open(e, store, backend, limits), running))
            while active := [e for e in running if _goes_on(e, policy, config)]:
                replies = policy.reply([e.dialogue for e in active])
                list(
                    threads.map(
                        lambda pair: _act(pair[0], pair[1].text, pair[1].is_cut, config),
                        zip(active, replies, strict=True),
                    )
                )
            list(threads.map(_finish, running))
        finally:
            for episode in running:
                if episode.sandbox is not None:
                    episode.sandbox.close()
    return [_result(episode) for episode in running]


def first_prompt(instance: Instance) -> str:
    """What the model is told at first."""
    return f"{INSTRUCTIONS}\nThe fault:\n\n{instance.problem_statement}"


def _open(episode: _Running, store: EnvironmentStore, backend: Backend, limits: Limits) -> None:
    layers = layers_of(episode.instance.environment, store, backend)
    try:
        episode.sandbox = backend.open(layers, limits=limits)
    except SandboxError as error:
        _fail(episode, error)


def _goes_on(episode: _Running, policy: Policy, config: AgentConfig) -> bool:
    if not episode.stop_reason:
        if len(episode.turns) >= config.max_turns:
            episode.stop_reason = "turns"
        elif episode.dialogue.num_tokens + policy.max_new_tokens > config.max_tokens:
            episode.stop_reason = "tokens"
        elif time.monotonic() - episode.started > config.max_seconds:
            episode.stop_reason = "seconds"
    return not episode.stop_reason


def _act(episode: _Running, reply: str, is_cut: bool, config: AgentConfig) -> None:
    """Carry out a reply and add what came of it."""
    assert episode.sandbox is not None
    started = time.monotonic()
    exit_code: int | None = None
    try:
        action = parse_action(reply)
        episode.actions.append(_as_text(action))
        if isinstance(action, Command) and action.is_submission:
            episode.stop_reason = "submitted"
            observation = ""
        elif isinstance(action, Command):
            exit_code, observation = _execute(episode.sandbox, episode.instance, action)
        else:
            observation = _edit(episode.sandbox, action)
    except ActionError as error:
        observation = f"Not done: {error}."
        if is_cut:
            observation += " Your answer was cut off; be shorter."
    except SandboxError as error:
        _fail(episode, error)
        return
    observation = shorten(observation, config.max_observation_characters)
    seconds = round(time.monotonic() - started, 3)
    episode.turns.append(AgentTurn(reply, observation, exit_code, seconds))
    if not episode.stop_reason:
        episode.dialogue.observe(observation)


def _execute(sandbox: Sandbox, instance: Instance, command: Command) -> tuple[int, str]:
    done = sandbox.exec(["bash", "-c", command.text], environment=_variables(instance), folder=TREE)
    said = printable(done.stdout) + (printable(done.stderr) if done.stderr else "")
    note = f"exit status {done.exit_code}"
    if done.stopped_by:
        note += f", stopped by its limit: {done.stopped_by}"
    return done.exit_code, f"{said.rstrip()}\n[{note}]".lstrip()


def _variables(instance: Instance) -> dict[str, str]:
    paths = [SITE, *(f"{TREE}/{part}" for part in instance.environment.python_path)]
    return {**VARIABLES, "PYTHONPATH": ":".join(paths), "GIT_PAGER": "cat", "PAGER": "cat"}


def _edit(sandbox: Sandbox, edit: Edit) -> str:
    path = f"{TREE}/{edit.path}"
    try:
        source = sandbox.read_file(path, max_bytes=_MAX_FILE_BYTES).decode("utf-8")
    except UnicodeDecodeError:
        raise ActionError(f"{edit.path} is no text") from None
    except SandboxGone:
        raise
    except SandboxError as error:
        if edit.old:
            raise ActionError(f"{edit.path} cannot be read: {error}") from None
        source = ""
    data = apply_edit(source, edit).encode()
    try:
        sandbox.write_file(path, data)
    except SandboxGone:
        raise
    except SandboxError as error:
        raise ActionError(f"{edit.path} cannot be written: {error}") from None
    return f"{edit.path} is changed."


def _finish(episode: _Running) -> None:
    """Read the patch, whatever ended the episode."""
    if episode.sandbox is None or episode.infra_error:
        return
    try:
        done = episode.sandbox.exec(
            ["bash", "-c", _DIFF],
            environment={**VARIABLES, "GIT_CONFIG_GLOBAL": "/dev/null"},
            folder=TREE,
        )
    except SandboxError as error:
        _fail(episode, error)
        return
    if done.exit_code == 0 and len(done.stdout) <= _MAX_PATCH_BYTES:
        episode.patch = done.stdout.decode("utf-8", "surrogateescape")


def _fail(episode: _Running, error: SandboxError) -> None:
    episode.stop_reason, episode.infra_error = "infra", f"{type(error).__name__}: {error}"


def _result(episode: _Running) -> Episode:
    return Episode(
        instance_id=episode.instance.instance_id,
        patch=episode.patch,
        stop_reason=episode.stop_reason,
        turns=tuple(episode.turns),
        trajectory=episode.dialogue.trajectory(),
        num_tokens=episode.dialogue.num_tokens,
        seconds=round(time.monotonic() - episode.started, 3),
        infra_error=episode.infra_error,
        exploits=signs(episode.instance, episode.patch, episode.actions),
    )


def signs(instance: Instance, patch: str, actions: Sequence[str] = ()) -> tuple[Exploit, ...]:
    """Signs of going for the reward in what an agent did.

    Lines that the gold patch adds too are none, nor are files of the runner that it changes itself.

    Args:
        instance: What it worked on.
        patch: The change it left.
        actions: Its commands and edits, one text each.
    """
    named = (test.partition("::")[0] for test in (*instance.fail_to_pass, *instance.pass_to_pass))
    tests = sorted({*instance.environment.test_files, *named})
    lines = instance.patch.splitlines()
    added = {line for line in lines if line.startswith("+") and not line.startswith("+++ ")}
    others = "\n".join("+" if line in added else line for line in patch.splitlines())
    natural = {s.where for s in find_exploits([], instance.patch, protected=tests)}
    found = find_exploits(actions, others, protected=tests)
    return tuple(s for s in found if s.evidence != s.where or s.where not in natural)


def _as_text(action: Command | Edit) -> str:
    """A command as it is; an edit as the redirection that it amounts to."""
    return action.text if isinstance(action, Command) else f"cat > {action.path}"
