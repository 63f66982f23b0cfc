"""Load models and tokenizers: from a folder, a GGUF file or the hub, with an adapter where the config asks for one."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from huggingface_hub import snapshot_download
from torch import nn

from sage.config import ModelConfig
from sage.data.source import resolve_path
from sage.model.kernels import has_triton
from sage.model.kernels.recompute import bfloat16_in_hardware
from sage.util.errors import UserError


def resolve_model(cfg: ModelConfig, cache_dir: str) -> str:
    """A local Hugging Face folder for `model.path`: converted (GGUF), downloaded (hub name), or as it is.

    Raises:
        UserError: nothing usable is there.
    """
    path = resolve_path(cfg.path)
    if path.endswith(".gguf"):
        return convert_gguf(path, cache_dir)
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, "config.json")):
            raise UserError(
                f"model.path={cfg.path} is a folder without config.json, so not a Hugging Face model"
            )
        return path
    if os.path.exists(path) or path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(
            f"model.path={cfg.path}: no such model folder, and not a hub name of the form owner/name"
        )
    patterns = ["*.safetensors", "*.json", "tokenizer*", "*.jinja", "*.txt"]
    if cfg.trust_remote_code:
        patterns.append("*.py")
    try:
        return snapshot_download(path, revision=cfg.revision, allow_patterns=patterns)
    except Exception as e:
        raise UserError(f"model.path={cfg.path} cannot be had from the hub: {e}".splitlines()[0]) from e


def convert_gguf(path: str, cache_dir: str) -> str:
    """Convert a GGUF file to a Hugging Face folder in float32, once; later calls find it in the cache."""
    for module, package in (("gguf", "gguf"), ("accelerate", "accelerate")):
        if importlib.util.find_spec(module) is None:
            raise UserError(f"model.path={path} is a GGUF file: reading it needs `pip install {package}`")
    source = Path(path)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    target = Path(cache_dir).expanduser() / "models" / f"{source.stem}-{digest}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
            tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
            loaded = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
            # save_pretrained refuses while the GGUF quantization config is attached.
            fields = loaded.config.to_dict()
            fields.pop("quantization_config", None)
            fields.pop("_name_or_path", None)
            model = type(loaded)(type(loaded.config)(**fields))
            model.load_state_dict(loaded.state_dict())
            model.generation_config = loaded.generation_config
            temporary = target.with_suffix(".tmp")
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            temporary.rename(target)
    return str(target)


def load_tokenizer(folder: str, cfg: ModelConfig) -> transformers.PreTrainedTokenizerBase:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=cfg.trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.path={cfg.path}: its tokenizer has no end token (eos_token)")
    return tokenizer


def compute_dtype(cfg: ModelConfig, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device multiplies it in hardware: on other CPUs it is ten times slower."""
    if cfg.dtype != "auto":
        return getattr(torch, cfg.dtype)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if bfloat16_in_hardware() else torch.float32


def check_head(cfg: ModelConfig, device: torch.device) -> None:
    if cfg.head == "triton" and not (device.type == "cuda" and has_triton()):
        lacks = (
            "Triton, which is not installed" if device.type == "cuda" else f"CUDA, and this is {device.type}"
        )
        raise UserError(f"model.head=triton needs {lacks}: set model.head=auto")


def load_model(folder: str, cfg: ModelConfig, dtype: torch.dtype, seed: int) -> Any:
    """The causal language model, with its LoRA adapter where the config asks for one, dropout off.

    The adapter's random init is seeded, so the initial policy is the same on every rank and on resume.
    """
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=cfg.attention,
            use_safetensors=True,
            trust_remote_code=cfg.trust_remote_code,
        )
    except (OSError, ValueError, ImportError) as e:
        raise UserError(f"model.path={cfg.path} cannot be loaded: {str(e).splitlines()[0]}") from e
    if cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    for module in model.modules():  # dropout would make policy and reference differ at step 0
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # pyright: ignore
    if cfg.lora is None:
        return model
    try:
        import peft
    except ImportError as e:
        raise UserError("model.lora needs peft: pip install 'sage-align[lora]'") from e
    torch.manual_seed(seed)
    if cfg.adapter_path:
        adapted = peft.PeftModel.from_pretrained(model, resolve_path(cfg.adapter_path), is_trainable=True)
    else:
        targets = "all-linear" if cfg.lora.targets == ["all-linear"] else cfg.lora.targets
        config = peft.LoraConfig(
            r=cfg.lora.r,
            lora_alpha=cfg.lora.alpha,  # pyright: ignore[reportArgumentType]
            lora_dropout=cfg.lora.dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )
        try:
            adapted = peft.get_peft_model(model, config)
        except ValueError as e:
            raise UserError(f"model.lora.targets={cfg.lora.targets}: {str(e).splitlines()[0]}") from e
    if cfg.gradient_checkpointing:
        model.enable_input_require_grads()
    return adapted


def fingerprint(folder: str, adapter_path: str | None) -> str:
    """Hash of the weights and configs that make the initial policy: reference log-probabilities are keyed on it."""
    digest = hashlib.sha256()
    for root in (folder, resolve_path(adapter_path)) if adapter_path else (folder,):
        for file in sorted(Path(root).iterdir()):
            if file.suffix == ".safetensors" or file.name in ("config.json", "adapter_config.json"):
                digest.update(file.name.encode())
                with open(file, "rb") as f:
                    while chunk := f.read(1 << 24):
                        digest.update(chunk)
    return digest.hexdigest()
