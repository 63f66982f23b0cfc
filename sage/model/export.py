"""Write a trained policy as a Hugging Face folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import transformers
from torch import Tensor

from sage.config import TrainConfig
from sage.model.loading import load_model


def export(
    final: Path,
    weights: dict[str, Tensor],
    folder: str,
    cfg: TrainConfig,
    tokenizer: transformers.PreTrainedTokenizerBase,
) -> None:
    """Write the policy as a Hugging Face folder, whole or not at all.

    An adapter is merged in float32, and also kept in adapter/. All weights are cast to the model's dtype
    once, at the end, so a small change of a weight survives wherever that dtype can hold it.

    Args:
        weights: state of the Policy module on the CPU.
        folder: the initial model, whose architecture and generation config the export takes over.
    """
    prefix = "model."
    state = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    temporary = final.with_name(".final.tmp")
    dtype = next(v.dtype for v in state.values() if v.is_floating_point())
    merged = torch.float32 if cfg.model.lora is not None else dtype
    model = load_model(folder, cfg.model, merged, cfg.seed)
    model.load_state_dict(state)
    if cfg.model.lora is not None:
        model.save_pretrained(temporary / "adapter")  # pyright: ignore
        model = model.merge_and_unload().to(dtype)  # pyright: ignore
    model.config.use_cache = True
    model.config.dtype = dtype
    model.save_pretrained(temporary)  # pyright: ignore
    tokenizer.save_pretrained(temporary)
    if final.exists():  # a kill fell between this export and the summary, and the run's end was run again
        shutil.rmtree(final)
    temporary.rename(final)
