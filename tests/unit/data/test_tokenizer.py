import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from m1.data.tokenizer import (
    SPECIAL_TOKENS,
    Tokenizer,
    adopt_tokenizer,
    copy_tokenizer,
    train_tokenizer,
)
from m1.types import M1Error


def special_ids(tokenizer):
    names = "end_of_text pad user assistant end think_open think_close answer_open answer_close"
    return [getattr(tokenizer, name) for name in names.split()]


def test_vocabulary_has_the_asked_size_with_special_tokens_first(tokenizer):
    assert tokenizer.vocab_size == 400
    assert special_ids(tokenizer) == list(range(9))
    assert tokenizer.decode(special_ids(tokenizer)) == "".join(SPECIAL_TOKENS)
    assert tokenizer.decode(special_ids(tokenizer), skip_special=True) == ""


@given(st.text(max_size=200))
def test_decoding_restores_every_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_digit_is_one_token(tokenizer):
    assert len(tokenizer.encode("20251984")) == 8
    assert tokenizer.encode("33") == 2 * tokenizer.encode("3")
    # A space stays apart, so that a number reads the same at every place.
    assert tokenizer.encode(" 33")[-2:] == tokenizer.encode("33")


@settings(max_examples=200)
@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, " ", "a", "<", "|", "end", ">", "think", "\n"])))
def test_text_never_becomes_a_special_token(tokenizer, parts):
    text = "".join(parts)
    ids = tokenizer.encode(text)
    assert not set(ids) & set(special_ids(tokenizer))
    assert tokenizer.decode(ids) == text


def test_special_tokens_in_training_text_are_not_learned_as_text(tmp_path, make_prose):
    texts = [make_prose(1) + "".join(SPECIAL_TOKENS) * 200]
    train_tokenizer(texts, vocab_size=400, folder=tmp_path)
    tokenizer = Tokenizer(tmp_path)
    ids = tokenizer.encode("".join(SPECIAL_TOKENS))
    assert not set(ids) & set(special_ids(tokenizer))


def test_batches_equal_single_texts(tokenizer, make_prose):
    texts = [make_prose(seed) for seed in range(5)] + ["", "<|end|> 12"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_training_is_deterministic_across_processes(tmp_path, tokenizer_folder, make_prose):
    (tmp_path / "texts.json").write_text(json.dumps([make_prose(seed) for seed in range(30)]))
    code = (
        "import json, sys; from pathlib import Path\n"
        "from m1.data.tokenizer import train_tokenizer\n"
        "texts = json.loads((Path(sys.argv[1]) / 'texts.json').read_text())\n"
        "train_tokenizer(texts, vocab_size=400, folder=Path(sys.argv[1]))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (tokenizer_folder / name).read_bytes()


def test_transformers_loads_the_folder_with_equal_ids(tokenizer, tokenizer_folder, make_prose):
    theirs = AutoTokenizer.from_pretrained(tokenizer_folder)
    assert (theirs.eos_token, theirs.pad_token, theirs.bos_token) == ("<|end|>", "<|pad|>", None)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.end, tokenizer.pad)
    text = make_prose(99) + " 12 + 34"
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text
    assert len(theirs) == tokenizer.vocab_size


def test_importing_the_reader_needs_neither_transformers_nor_torch():
    code = "import sys, m1.data.chat; print({'torch', 'transformers'} & set(sys.modules))"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "set()"


def test_an_existing_tokenizer_is_copied(tmp_path, tokenizer_folder):
    copy_tokenizer(tokenizer_folder, tmp_path / "copy")
    names = ["tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == names


def changed_tokenizer(source: Path, target: Path, change) -> Path:
    content = json.loads((source / "tokenizer.json").read_text())
    change(content)
    (target / "tokenizer.json").write_text(json.dumps(content))
    return target


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(M1Error, match=r"no tokenizer\.json"):
        Tokenizer(tmp_path)


def test_a_tokenizer_without_our_special_tokens_is_refused(tmp_path, tokenizer_folder):
    def remove(content):
        content["added_tokens"] = [row for row in content["added_tokens"] if row["id"] != 5]
        content["model"]["vocab"]["think"] = content["model"]["vocab"].pop("<think>")

    with pytest.raises(M1Error, match="lacks <think>; rename"):
        Tokenizer(changed_tokenizer(tokenizer_folder, tmp_path, remove))


def test_a_tokenizer_that_text_could_inject_into_is_refused(tmp_path, tokenizer_folder):
    def unmark(content):
        content["added_tokens"][4]["special"] = False

    with pytest.raises(M1Error, match=r"makes special tokens from text \(<\|end\|>\)"):
        Tokenizer(changed_tokenizer(tokenizer_folder, tmp_path, unmark))


@pytest.fixture
def foreign(tmp_path):
    """A tokenizer of another family: digits apart, seven special tokens of its own."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<unused{n}>" for n in range(7))]
    made.train_from_iterator(["a plain text"], trainers.BpeTrainer(special_tokens=special))
    folder = tmp_path / "foreign"
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    return folder


RENAMES = {
    "<|im_end|>": "<|end|>",
    **{f"<unused{n}>": name for n, name in enumerate(SPECIAL_TOKENS[1:4])},
    **{f"<unused{n + 3}>": name for n, name in enumerate(SPECIAL_TOKENS[5:])},
}


def test_an_adopted_tokenizer_keeps_its_ids_and_gets_our_names(foreign, tmp_path):
    adopt_tokenizer(foreign, tmp_path / "ours", RENAMES)
    before = AutoTokenizer.from_pretrained(foreign)
    after = Tokenizer(tmp_path / "ours")
    assert after.encode("a plain text") == before.encode("a plain text")
    assert after.vocab_size == len(before)
    assert after.end == before.convert_tokens_to_ids("<|im_end|>")
    assert after.end_of_text == before.convert_tokens_to_ids("<|endoftext|>")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "ours")
    turns = theirs.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert turns == "<|user|>a<|end|>"


def test_special_tokens_can_change_places(foreign, tmp_path):
    adopt_tokenizer(foreign, tmp_path / "ours", RENAMES)
    swapped = {"<|user|>": "<|end|>", "<|end|>": "<|user|>"}
    adopt_tokenizer(tmp_path / "ours", tmp_path / "swapped", swapped)
    before, after = Tokenizer(tmp_path / "ours"), Tokenizer(tmp_path / "swapped")
    assert (after.user, after.end) == (before.end, before.user)
    assert after.vocab_size == before.vocab_size


def test_a_plain_token_of_our_name_and_another_kind_of_tokenizer_are_refused(foreign, tmp_path):
    path = foreign / "tokenizer.json"
    content = json.loads(path.read_text())
    (row,) = [row for row in content["added_tokens"] if row["content"] == "<unused3>"]
    row.update(content="<think>", special=False)
    content["model"]["vocab"]["<think>"] = content["model"]["vocab"].pop("<unused3>")
    path.write_text(json.dumps(content))
    with pytest.raises(M1Error, match='<think> are plain tokens of it; mark them "special": true'):
        adopt_tokenizer(foreign, tmp_path / "ours", RENAMES)
    content["model"].update(type="Unigram", vocab=[["a", 0.0]])
    path.write_text(json.dumps(content))
    with pytest.raises(M1Error, match="of kind Unigram; only BPE"):
        adopt_tokenizer(foreign, tmp_path / "ours", RENAMES)
    assert not (tmp_path / "ours").exists()


def test_renames_that_do_not_fit_are_refused_all_at_once(foreign, tmp_path):
    renames = {**RENAMES, "<absent>": "<|pad|>", "<|im_start|>": "<|system|>"}
    renames.pop("<unused6>")
    with pytest.raises(M1Error) as caught:
        adopt_tokenizer(foreign, tmp_path / "ours", renames)
    message = str(caught.value)
    assert "<absent> cannot be renamed" in message
    assert "<|system|> are no special tokens of ours" in message
    assert "</answer> would be missing" in message
    assert "<|pad|> would be there twice" in message
    assert "its special tokens are <unused6>" in message
    assert not (tmp_path / "ours").exists()
