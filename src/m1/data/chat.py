"""The chat format in tokens, equal to the tokenizer's own template for text without special tokens.

`<|user|>{prompt}<|end|><|assistant|><think>{think}</think><answer>{answer}</answer><|end|>`
"""

from m1.data.tokenizer import Tokenizer


def render_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Tokens up to and including the assistant tag, ready for sampling."""
    return [tokenizer.user, *tokenizer.encode(prompt), tokenizer.end, tokenizer.assistant]


def render_demonstration(
    tokenizer: Tokenizer, prompt: str, think: str, answer: str
) -> tuple[list[int], list[bool]]:
    """Tokens of a worked example and its loss mask.

    The mask marks target tokens: true exactly after the assistant tag, `<|end|>` included.
    """
    reply = [
        tokenizer.think_open,
        *tokenizer.encode(think),
        tokenizer.think_close,
        tokenizer.answer_open,
        *tokenizer.encode(answer),
        tokenizer.answer_close,
        tokenizer.end,
    ]
    return _with_mask(render_prompt(tokenizer, prompt), reply)


def render_plain_answer(
    tokenizer: Tokenizer, prompt: str, answer: str
) -> tuple[list[int], list[bool]]:
    """Tokens and loss mask of an answer without thinking and without tags."""
    return _with_mask(render_prompt(tokenizer, prompt), [*tokenizer.encode(answer), tokenizer.end])


def _with_mask(start: list[int], reply: list[int]) -> tuple[list[int], list[bool]]:
    return start + reply, [False] * len(start) + [True] * len(reply)
