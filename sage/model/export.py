"""Write a trained policy as a Hugging Face folder."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
import transformers
from torch import Tensor

from sage.config import TrainConfig
from sage.data.chat import ChatFormat, response_ends, training_end
from sage.data.templates import exported_templates
from sage.model.loading import load_model
from sage.util.files import replace_folder, write_json


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

    The generation config names every token that ends a response, first the one that ended responses in
    training. A base model that was trained with a chat template would never stop otherwise. The tokenizer's
    default chat template is the one trained with, and so is that of adapter/.

    Args:
        weights: state of the Policy module on the CPU.
        folder: the initial model, whose architecture and generation config the export takes over.
    """
    prefix = "model."
    state = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    temporary = final.with_name(f".{final.name}.tmp")
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
    chat = ChatFormat.of(cfg.data)
    _name_ends(temporary / "generation_config.json", tokenizer, chat)
    saved = copy.copy(tokenizer)
    saved.chat_template = exported_templates(tokenizer, chat)
    for folder_of_weights in (temporary, temporary / "adapter"):
        if folder_of_weights.is_dir():
            saved.save_pretrained(folder_of_weights)
    replace_folder(temporary, final)


def _name_ends(file: Path, tokenizer: transformers.PreTrainedTokenizerBase, chat: ChatFormat) -> None:
    """Write the tokens that end a response into a generation config.

    This changes the file, because transformers refuses to save a config that was changed in memory if it
    finds a fault in it, and many published configs have faults.
    """
    first = training_end(tokenizer, chat)
    ends = [first, *sorted(response_ends(tokenizer, chat) - {first})]
    config = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    config.pop("_from_model_config", None)  # else some versions of transformers read config.json instead
    write_json(file, config | {"eos_token_id": ends})
