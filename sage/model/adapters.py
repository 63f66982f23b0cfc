"""LoRA adapters: a fresh one, or one from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from sage.config import ModelConfig
from sage.data.source import resolve_path
from sage.model.folder import check_adapter, reason
from sage.util.errors import UserError, first_line, named


def add_adapter(model: Any, cfg: ModelConfig, seed: int) -> Any:
    """The model with the adapter that the config asks for: that of `model.adapter_path`, or a fresh one.

    Its random init is seeded, so the initial policy is the same on every rank and after a resume.

    Raises:
        UserError: the model cannot take the adapter.
    """
    assert cfg.lora is not None
    try:
        import peft
    except ImportError as e:
        raise UserError("model.lora needs peft: pip install 'sage-align[lora]'") from e
    torch.manual_seed(seed)
    if cfg.adapter_path:
        return load_adapter(model, cfg)
    targets = "all-linear" if cfg.lora.targets == ["all-linear"] else cfg.lora.targets
    config = peft.LoraConfig(
        r=cfg.lora.r,
        lora_alpha=cfg.lora.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=cfg.lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        return peft.get_peft_model(model, config)
    except ValueError as e:
        raise UserError(f"model.lora.targets={cfg.lora.targets}: {first_line(e)}") from e


def inside_adapter(model: Any) -> Any:
    """The transformers model inside its adapter, whose layers it holds; the model itself if it has none."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def needs_whole_model(cfg: ModelConfig) -> bool:
    """Whether peft reads or sets the model's own weights when it adds the adapter, so that they must be whole
    on each rank until then."""
    if not cfg.adapter_path:
        return False
    config, weights = check_adapter(cfg), Path(resolve_path(cfg.adapter_path), "adapter_model.safetensors")
    if config.get("use_dora") or config.get("trainable_token_indices") or config.get("bias") != "none":
        return True
    if config.get("init_lora_weights") not in (None, True, False, "gaussian") or not weights.is_file():
        return True
    with safe_open(weights, "np") as content:
        names = list(content.keys())
    return any("base_layer" in name for name in names)


def load_adapter(model: Any, cfg: ModelConfig) -> Any:
    """The model with the adapter of `model.adapter_path`, all of whose weights have found their places.

    Raises:
        UserError: the adapter was made for another model.
    """
    import peft

    check_adapter(cfg)
    folder = resolve_path(str(cfg.adapter_path))
    try:
        adapted = peft.PeftModel.from_pretrained(model, folder, is_trainable=True)
        saved = peft.load_peft_weights(folder, device="cpu")
    except Exception as e:  # peft reports what does not fit with many types
        raise UserError(
            f"model.adapter_path={cfg.adapter_path} does not fit model.path={cfg.path}: {reason(e)}"
        ) from e
    own = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    for names, fault in (
        (own.keys() - saved.keys(), "lacks weights for this model"),
        (
            {name for name in saved if "lora_" in name} - own.keys(),
            "has weights for layers that this model lacks",
        ),
    ):
        if names:
            raise UserError(
                f"model.adapter_path={cfg.adapter_path} {fault} (model.path={cfg.path}): "
                f"{named(sorted(names))}. Give the model that it was trained on"
            )
    if getattr(adapted.active_peft_config, "layer_replication", None):
        raise UserError(
            f"model.adapter_path={cfg.adapter_path} repeats layers (layer_replication), and a model with "
            "repeated layers cannot be exported"
        )
    return adapted
