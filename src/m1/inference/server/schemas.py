"""What clients may send. Unknown fields are refused, as silence would be taken for effect."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from m1.inference.params import MAX_TOP_LOGPROBS

MAX_COMPLETIONS = 128
"""Completions of one prompt."""
MAX_PROMPTS = 256
MAX_STOPS = 16

Stops = (
    Annotated[str, Field(min_length=1)]
    | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_STOPS)]
)
Token = Annotated[int, Field(ge=0)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Request):
    """What a stream holds besides."""

    include_usage: bool = False
    include_obfuscation: bool = False
    """Accepted; nothing is obfuscated."""


class SamplingFields(_Request):
    """What completions and chats share."""

    model: str | None = None
    """Name of the model; absent: the one that is served."""
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = 0
    """0 and -1 are all tokens."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    n: Annotated[int, Field(ge=1, le=MAX_COMPLETIONS)] = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Stops | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=MAX_STOPS)] = []
    """Besides the tokens that always end a turn."""
    ignore_eos: bool = False
    """Whether those do not."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    """Add `token_ids`, `prompt_token_ids` and `policy_versions` to what comes back."""
    return_tokens_as_token_ids: bool = False
    """Name tokens "token_id:N" in log-probabilities, as vLLM does."""
    user: str | None = None
    frequency_penalty: Literal[0] | None = None
    """Accepted where they do nothing."""
    presence_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None


class CompletionRequest(SamplingFields):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[list[Token]], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    """Texts, or token ids."""
    max_tokens: Annotated[int, Field(ge=1)] = 16
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: Literal[False] = False
    best_of: Literal[1] | None = None
    suffix: None = None


class ChatMessage(BaseModel):
    """One message; what else it holds reaches the chat template."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: str | list[dict[str, Any]] | None = None


class ChatRequest(SamplingFields):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Absent: as many as the model has positions for."""
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=MAX_STOPS * 8)] = []
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None


class GenerateRequest(_Request):
    """POST /generate: tokens in, tokens out, for reinforcement learning."""

    prompt_tokens: Annotated[list[Token], Field(min_length=1)]
    seeds: Annotated[
        list[Annotated[int, Field(ge=0, lt=2**64)]],
        Field(min_length=1, max_length=MAX_COMPLETIONS),
    ]
    """One completion each."""
    max_new_tokens: Annotated[int, Field(ge=1)]
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    stop_tokens: Annotated[list[Token], Field(max_length=MAX_STOPS)]
    repetition_num_tokens: Annotated[int, Field(ge=1)] = 3000
    repetition_probability: Annotated[float, Field(gt=0, lt=1)] = 0.99


class WeightsRequest(_Request):
    """POST /weights."""

    uri: Annotated[str, Field(min_length=1)]
    """See `m1.inference.weights`."""
    version: Annotated[int, Field(ge=0)]
    recompute: bool = False
    """Whether running completions' states are made again from the new weights."""
