"""Byte-level BPE with digits as single tokens: training, and a fast reader that resists injection.

The folder is a Hugging Face tokenizer. `Tokenizer` reads it without `transformers`, and never makes
a special token from text: "<|end|>" in a document or a prompt is encoded as plain characters.
"""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from m1.storage import atomic_write
from m1.types import M1Error

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|pad|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
)
# There are tags for two roles: what the system and tools say stands in the user's turns.
CHAT_TEMPLATE = (
    "{%- if tools -%}"
    "{{- '<|user|>You may call these tools, one JSON object a line:\\n' -}}"
    "{%- for tool in tools -%}{{- tool | tojson + '\\n' -}}{%- endfor -%}"
    "{{- 'To call some, answer with <tool_calls>, a line of "
    '{\\"name\\": ..., \\"arguments\\": {...}} for each, and </tool_calls>.<|end|>\' -}}'
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message.role in ['user', 'system'] -%}"
    "{{- '<|user|>' + message.content + '<|end|>' -}}"
    "{%- elif message.role == 'tool' -%}"
    "{{- '<|user|><tool_response>' + message.content + '</tool_response><|end|>' -}}"
    "{%- elif message.role == 'assistant' -%}"
    "{{- '<|assistant|>' + (message.content or '') -}}"
    "{%- if message.tool_calls -%}"
    "{{- '<tool_calls>' -}}"
    "{%- for call in message.tool_calls -%}"
    "{{- '\\n{\"name\": ' + (call.function.name | tojson) -}}"
    "{{- ', \"arguments\": ' + (call.function.arguments | tojson) + '}' -}}"
    "{%- endfor -%}"
    "{{- '\\n</tool_calls>' -}}"
    "{%- endif -%}"
    "{{- '<|end|>' -}}"
    "{%- else -%}"
    "{{- raise_exception('roles are system, user, assistant and tool, not ' + message.role) -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, folder: Path) -> None:
    """Train on `texts` and write a Hugging Face tokenizer folder; same texts, same bytes."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    _write(folder, tokenizer.to_str(pretty=True))


def _write(folder: Path, tokenizer_json: str) -> None:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    atomic_write(folder / "tokenizer.json", tokenizer_json.encode())
    atomic_write(folder / "tokenizer_config.json", json.dumps(config, indent=2).encode())


def adopt_tokenizer(source: Path, folder: Path, renames: Mapping[str, str]) -> None:
    """Give another model's tokenizer the special tokens of our chat format, and our template.

    Its own special tokens are renamed, so ids and the rows of the embedding stay what they are;
    what a renamed token meant to the model, training has to change.

    Args:
        source: Folder of a Hugging Face fast tokenizer.
        folder: Where the new one is written.
        renames: Name of one of its special tokens to one of `SPECIAL_TOKENS`.

    Raises:
        M1Error: A name is not among its special tokens or ours, one of ours would be missing, there
            twice, or a plain token too; nothing is written then.
    """
    data = json.loads(tokenizer_json(source).read_text(encoding="utf-8"))
    vocabulary = data["model"]["vocab"]
    if not isinstance(vocabulary, dict):
        kind = data["model"].get("type", "unknown")
        raise M1Error(f"the tokenizer in {source} is of kind {kind}; only BPE ones can be adopted")
    added = {token["content"]: token for token in data["added_tokens"] if token["special"]}
    plain = {token["content"] for token in data["added_tokens"]} | vocabulary.keys()
    plain -= added.keys()
    unknown = [name for name in renames if name not in added]
    foreign = [name for name in renames.values() if name not in SPECIAL_TOKENS]
    kept = [name for name in SPECIAL_TOKENS if name in added and name not in renames]
    have = [*kept, *renames.values()]
    problems = []
    if unknown:
        problems.append(f"{' '.join(unknown)} cannot be renamed: no special tokens of it")
    if foreign:
        problems.append(f"{' '.join(foreign)} are no special tokens of ours")
    if missing := [name for name in SPECIAL_TOKENS if name not in have]:
        problems.append(f"{' '.join(missing)} would be missing; rename a token to each")
    if twice := sorted({name for name in have if have.count(name) > 1}):
        problems.append(f"{' '.join(twice)} would be there twice")
    if taken := [name for name in SPECIAL_TOKENS if name in plain]:
        mend = 'mark them "special": true in its added_tokens'
        problems.append(f"{' '.join(taken)} are plain tokens of it; {mend}")
    if problems:
        free = [name for name in added if name not in renames and name not in kept]
        problems.append(f"its special tokens are {' '.join(free) or 'all taken'}")
        raise M1Error(f"the tokenizer in {source} cannot be adopted: " + "; ".join(problems))
    for name, ours in renames.items():
        added[name]["content"] = ours
    data["model"]["vocab"] = {renames.get(name, name): i for name, i in vocabulary.items()}
    _write(folder, json.dumps(data, ensure_ascii=False))
    Tokenizer(folder)


def tokenizer_json(folder: Path) -> Path:
    """The file of a fast tokenizer.

    Raises:
        M1Error: The folder has none.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise M1Error(
            f"{folder} has no tokenizer.json; give the folder of a Hugging Face fast tokenizer"
        )
    return path


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy an existing tokenizer folder after checking that it can serve."""
    Tokenizer(source)
    folder.mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


class Tokenizer:
    """Text to token ids and back; ids of the special tokens are attributes."""

    def __init__(self, folder: Path) -> None:
        text = tokenizer_json(folder).read_text(encoding="utf-8")
        self._tokenizer = tokenizers.Tokenizer.from_str(text)
        # Despite its name the flag means: encode their spelling in text as plain characters.
        self._tokenizer.encode_special_tokens = True
        found = {token: self._tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
        ids = {token: number for token, number in found.items() if number is not None}
        missing = [token for token in SPECIAL_TOKENS if token not in ids]
        if missing:
            raise M1Error(
                f"the tokenizer in {folder} lacks {' '.join(missing)}; rename special tokens of "
                "it to these with `m1 tokenizer`, or leave out data.tokenizer.path to train one"
            )
        self._special = frozenset(ids.values())
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        self.end_of_text: int = ids["<|endoftext|>"]
        self.pad: int = ids["<|pad|>"]
        self.user: int = ids["<|user|>"]
        self.assistant: int = ids["<|assistant|>"]
        self.end: int = ids["<|end|>"]
        self.think_open: int = ids["<think>"]
        self.think_close: int = ids["</think>"]
        self.answer_open: int = ids["<answer>"]
        self.answer_close: int = ids["</answer>"]
        injected = [token for token in SPECIAL_TOKENS if self._special & {*self.encode(token)}]
        if injected:
            raise M1Error(
                f"the tokenizer in {folder} makes special tokens from text ({' '.join(injected)}), "
                'so prompts could forge turns; mark them "special": true in its added_tokens'
            )

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, never special ones, nothing added."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        batch = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of `ids`; special tokens appear by name unless skipped."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=skip_special)
        return text
