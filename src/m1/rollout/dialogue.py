"""Conversations of many turns, in tokens with an engine or in messages with a chat model."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from m1.config.schema import SamplingConfig
from m1.data.tokenizer import Tokenizer
from m1.inference.engine import Engine, Request
from m1.rewards.code.chat_model import ChatModel, Message
from m1.types import Completion, M1Error

_CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class Trajectory:
    """All tokens of an episode as the policy saw and made them; nothing was encoded twice."""

    tokens: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    """True exactly for tokens that the policy sampled."""
    logprobs: tuple[float, ...]
    """Under the engine that sampled, before temperature and top-p; 0 outside the mask."""
    entropies: tuple[float, ...]
    """Of each sampled token's distribution, in nats; 0 outside the mask."""
    policy_versions: tuple[int, ...]
    """Of the weights that sampled each token; -1 outside the mask."""


@dataclass(frozen=True)
class Reply:
    """One turn of the model."""

    text: str
    is_cut: bool = False
    """Whether it ended for want of tokens or by repetition, not by itself."""


class Dialogue(Protocol):
    """One episode's conversation."""

    @property
    def num_tokens(self) -> int:
        """Length so far."""

    def observe(self, text: str) -> None:
        """Add what the environment says."""

    def trajectory(self) -> Trajectory | None:
        """Its tokens; None where only text is known."""


class Policy(Protocol):
    """Whoever answers: an engine with a tokenizer, or a chat model."""

    @property
    def max_new_tokens(self) -> int:
        """Most tokens of one reply."""

    def begin(self, prompt: str, *, key: str) -> Dialogue:
        """A new conversation; `key` names its random stream."""

    def reply(self, dialogues: Sequence[Dialogue]) -> list[Reply]:
        """One turn in each; added to them."""


@dataclass
class TokenDialogue:
    """A conversation whose context is a list of token ids that only grows.

    The next prompt is the last one, the sampled tokens, and the observation's tokens: text is never
    encoded again, so the trainer sees exactly what was sampled.
    """

    tokenizer: Tokenizer
    key: str
    tokens: list[int] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    num_turns: int = 0

    @property
    def num_tokens(self) -> int:
        """Length so far."""
        return len(self.tokens)

    def observe(self, text: str) -> None:
        """Add a turn of the user's and the assistant's tag."""
        t = self.tokenizer
        end = [] if not self.tokens or self.tokens[-1] == t.end else [t.end]
        self._given([*end, t.user, *t.encode(text), t.end, t.assistant])

    def sampled(self, completion: Completion) -> None:
        """Add what the policy sampled."""
        self.tokens += completion.tokens
        self.loss_mask += [True] * len(completion.tokens)
        self.logprobs += completion.logprobs
        self.entropies += completion.entropies
        self.versions += completion.policy_versions
        self.num_turns += 1

    def trajectory(self) -> Trajectory:
        """The tokens up to the last sampled one."""
        length = max((i + 1 for i, is_ours in enumerate(self.loss_mask) if is_ours), default=0)
        return Trajectory(
            tuple(self.tokens[:length]),
            tuple(self.loss_mask[:length]),
            tuple(self.logprobs[:length]),
            tuple(self.entropies[:length]),
            tuple(self.versions[:length]),
        )

    def _given(self, tokens: Sequence[int]) -> None:
        self.tokens += tokens
        self.loss_mask += [False] * len(tokens)
        self.logprobs += [0.0] * len(tokens)
        self.entropies += [0.0] * len(tokens)
        self.versions += [-1] * len(tokens)


class EnginePolicy:
    """An engine: all conversations of a call are sampled together."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, sampling: SamplingConfig, *, seed: int = 0
    ) -> None:
        self._engine, self._tokenizer, self._sampling = engine, tokenizer, sampling
        self._seed = seed

    @property
    def max_new_tokens(self) -> int:
        """Most tokens of one reply."""
        return self._sampling.max_new_tokens

    def begin(self, prompt: str, *, key: str) -> TokenDialogue:
        """A new conversation."""
        dialogue = TokenDialogue(self._tokenizer, key)
        dialogue.observe(prompt)
        return dialogue

    def reply(self, dialogues: Sequence[Dialogue]) -> list[Reply]:
        """One turn in each; the random stream depends on seed, key and turn alone."""
        ours = [d for d in dialogues if isinstance(d, TokenDialogue)]
        if len(ours) != len(dialogues):
            raise TypeError("EnginePolicy continues the conversations that it began")
        requests = [Request(tuple(d.tokens), (self._stream(d),)) for d in ours]
        replies = []
        for dialogue, (completion,) in zip(
            ours, self._engine.generate(requests, self._sampling), strict=True
        ):
            dialogue.sampled(completion)
            tokens = [t for t in completion.tokens if t != self._tokenizer.end]
            text = self._tokenizer.decode(tokens)
            replies.append(Reply(text, is_cut=completion.finish_reason != "stop"))
        return replies

    def _stream(self, dialogue: TokenDialogue) -> int:
        key = f"{self._seed}/{dialogue.key}/{dialogue.num_turns}".encode()
        return int.from_bytes(hashlib.sha256(key).digest()[:8], "little")


@dataclass
class MessageDialogue:
    """A conversation in messages."""

    messages: list[Message] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """A guess from the number of characters: a chat server does not tell beforehand."""
        return sum(len(m.content) for m in self.messages) // _CHARACTERS_PER_TOKEN

    def observe(self, text: str) -> None:
        """Add a message of the user's."""
        self.messages.append(Message("user", text))

    def trajectory(self) -> None:
        """Unknown."""
        return


class ChatPolicy:
    """Any chat model, such as one behind an OpenAI-compatible server."""

    def __init__(
        self, model: ChatModel, *, max_new_tokens: int = 4096, num_parallel: int = 8
    ) -> None:
        self._model, self._max_new_tokens, self._num_parallel = model, max_new_tokens, num_parallel

    @property
    def max_new_tokens(self) -> int:
        """Tokens that must be left for another turn; the server has limits of its own."""
        return self._max_new_tokens

    def begin(self, prompt: str, *, key: str) -> MessageDialogue:
        """A new conversation; its random stream is the server's."""
        return MessageDialogue([Message("user", prompt)])

    def reply(self, dialogues: Sequence[Dialogue]) -> list[Reply]:
        """One turn in each, several at once.

        Raises:
            M1Error: The server refuses.
        """

        def one(dialogue: Dialogue) -> Reply:
            if not isinstance(dialogue, MessageDialogue):
                raise M1Error("ChatPolicy continues the conversations that it began")
            text = self._model.complete(dialogue.messages)
            dialogue.messages.append(Message("assistant", text))
            return Reply(text)

        with ThreadPoolExecutor(self._num_parallel) as threads:
            return list(threads.map(one, dialogues))
