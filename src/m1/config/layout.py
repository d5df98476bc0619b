"""What follows from the tables alone: the layout over GPUs, its mistakes, the vocabulary."""

from m1.config.model_tables import ModelConfig
from m1.config.training_tables import ParallelConfig
from m1.types import M1Error


def layout_mistakes(model: ModelConfig, parallel: ParallelConfig) -> list[str]:
    """What keeps `model` from being laid out as `parallel` says; each text begins with a field."""
    texts = []
    for name, count in (("num_heads", model.num_heads), ("num_kv_heads", model.num_kv_heads)):
        if count % parallel.tensor:
            texts.append(
                f"tensor is {parallel.tensor}, but must divide model.{name} {count}; "
                "change one of them"
            )
    if model.moe is None and parallel.expert > 1:
        texts.append(
            f"expert is {parallel.expert}, but the model is dense; set it to 1 or add [model.moe]"
        )
    if model.moe is not None and model.moe.num_experts % parallel.expert:
        texts.append(
            f"expert is {parallel.expert}, but must divide model.moe.num_experts "
            f"{model.moe.num_experts}; change one of them"
        )
    width = model.moe.ffn_hidden_size if model.moe else (model.ffn_hidden_size or 0)
    ranks = parallel.expert_tensor_size if model.moe else parallel.tensor
    if width % ranks:
        field = "expert_tensor" if model.moe else "tensor"
        texts.append(
            f"{field} is {ranks}, but must divide the feed-forward width {width}; "
            "change one of them"
        )
    return texts + _stage_mistakes(model, parallel)


def _stage_mistakes(model: ModelConfig, parallel: ParallelConfig) -> list[str]:
    if parallel.pipeline_layers is not None:
        total = sum(parallel.pipeline_layers)
        if total != model.num_layers:
            return [
                f"pipeline_layers sums to {total}, but model.num_layers is {model.num_layers}; "
                "make them equal"
            ]
    elif parallel.pipeline > model.num_layers:
        return [
            f"pipeline is {parallel.pipeline}, but model.num_layers is {model.num_layers}, which "
            "leaves stages empty; lower it"
        ]
    elif model.num_layers % parallel.pipeline:
        return [
            f"pipeline is {parallel.pipeline}, but must divide model.num_layers "
            f"{model.num_layers}; change one of them, or say each stage's share in "
            "pipeline_layers"
        ]
    return []


def stage_layers(model: ModelConfig, parallel: ParallelConfig) -> list[range]:
    """Layers (from 0) of each pipeline stage, in order."""
    shares = (
        parallel.pipeline_layers or (model.num_layers // parallel.pipeline,) * parallel.pipeline
    )
    starts = [sum(shares[:i]) for i in range(len(shares))]
    return [range(start, start + share) for start, share in zip(starts, shares, strict=True)]


def padded_vocab(model: ModelConfig, tokenizer_size: int) -> int:
    """Rows of the embedding: as configured, or the tokenizer's size rounded up to 64."""
    if model.vocab_size is None:
        return -(-tokenizer_size // 64) * 64
    if model.vocab_size < tokenizer_size:
        raise M1Error(
            f"model.vocab_size is {model.vocab_size}, but the tokenizer has {tokenizer_size} "
            "entries; raise it, or leave it out to take the tokenizer's size"
        )
    return model.vocab_size
