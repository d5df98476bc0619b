"""The last stage: export of the final model for Hugging Face and its registration in MLflow."""

import shutil
from pathlib import Path

from m1.config.layout import padded_vocab
from m1.config.schema import Recipe
from m1.config.stages import model_stages
from m1.data.tokenizer import Tokenizer
from m1.model import checkpoint
from m1.model.build import build_model
from m1.model.hf import export_hf, require_representable
from m1.model.parallel import initialize
from m1.stage import StageContext, StageOutput
from m1.tracking.lineage import tracking_uri
from m1.tracking.registration import register_model


def register(context: StageContext, recipe: Recipe) -> StageOutput:
    """Export the last trained checkpoint with its tokenizer and point the alias at it."""
    config = recipe.register_
    assert config is not None
    require_representable(recipe.model)
    initialize(seed=recipe.seed)
    final = model_stages(context.inputs)[-1]
    tokenizer_folder = context.path_of("data") / "tokenizer"
    tokenizer = Tokenizer(tokenizer_folder)
    model = build_model(
        recipe.model, vocab_size=padded_vocab(recipe.model, tokenizer.vocab_size), seed=recipe.seed
    )
    checkpoint.load_weights(context.path_of(final) / "checkpoint", model)
    shutil.rmtree(context.output, ignore_errors=True)
    folder = context.output / "hf"
    export_hf(model, recipe.model, folder, eos_token_id=tokenizer.end, pad_token_id=tokenizer.pad)
    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    uri = f"{context.output_uri}/hf"
    local = Path(recipe.storage.scratch if uri.startswith("s3://") else recipe.storage.root)
    version = register_model(
        uri=tracking_uri(recipe.tracking, local),
        model_name=config.model_name,
        source_uri=uri,
        alias=config.alias,
        model_id=context.inputs[final].metadata.get("model_id"),
        run_id=context.run.run_id,
        tags={"stage_hash": context.stage_hash},
    )
    return StageOutput(
        metadata={
            "model_name": config.model_name,
            "version": version,
            "alias": config.alias,
            "source_stage": final,
            "hf_uri": uri,
        }
    )
