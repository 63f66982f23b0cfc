"""Load models and tokenizers from a folder or the hub, with an adapter where the config asks for one."""

from __future__ import annotations

import hashlib
import inspect
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download

from sage.config import ModelConfig
from sage.data.source import resolve_path
from sage.model.adapters import add_adapter, inside_adapter
from sage.model.folder import check_adapter, check_weights_files, read_object, reason
from sage.model.gguf import convert_gguf
from sage.model.kernels import has_triton
from sage.model.kernels.recompute import bfloat16_in_hardware
from sage.util import ranks
from sage.util.errors import UserError, first_line, named
from sage.util.files import sha256
from sage.util.hub import reach_hub
from sage.util.progress import console

VOCABULARIES = ("tokenizer.json", "*.model", "*vocab*", "*.tiktoken")  # one of them is in every tokenizer
SHOWN = 8  # names of weights in an error message


def resolve_model(cfg: ModelConfig, cache_dir: str) -> str:
    """A local Hugging Face folder for `model.path`: converted (GGUF), downloaded (hub name), or as it is.

    Raises:
        UserError: nothing usable is there.
    """
    if cfg.adapter_path:
        check_adapter(cfg)
    path = resolve_path(cfg.path)
    if path.endswith(".gguf"):
        return convert_gguf(path, cache_dir)
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, "config.json")):
            raise UserError(
                f"model.path={cfg.path} is a folder without config.json, so not a Hugging Face model"
            )
        read_object(Path(path, "config.json"), f"model.path={cfg.path}")
        return path
    if os.path.exists(path) or path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(
            f"model.path={cfg.path}: no such model folder, and not a hub name of the form owner/name"
        )
    patterns = ["*.safetensors", "*.json", "tokenizer*", "*.jinja", "*.txt"]
    if cfg.trust_remote_code:
        patterns.append("*.py")
    reach_hub()
    try:
        return snapshot_download(path, revision=cfg.revision, allow_patterns=patterns)
    except Exception as e:
        raise UserError(
            f"model.path={cfg.path}: no such folder here, and the hub did not provide it: {first_line(e)}"
        ) from e


def load_tokenizer(folder: str, cfg: ModelConfig) -> transformers.PreTrainedTokenizerBase:
    """The model's tokenizer, with the chat template of its adapter if the adapter's folder has one.

    Raises:
        UserError: the folder has none that can be read, or it has no end token.
    """
    tokenizer = _read_tokenizer(folder, "model.path", cfg.path, cfg.trust_remote_code, cfg.revision)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.path={cfg.path}: its tokenizer has no end token, so no response could end: give it an "
            "eos_token in its tokenizer_config.json"
        )
    adapter = resolve_path(cfg.adapter_path) if cfg.adapter_path else ""
    if adapter and Path(adapter, "tokenizer_config.json").is_file():
        own = _read_tokenizer(adapter, "model.adapter_path", adapter, cfg.trust_remote_code)
        tokenizer.chat_template = own.chat_template or tokenizer.chat_template
    return tokenizer


def _read_tokenizer(
    folder: str, name: str, value: str, trust_remote_code: bool, revision: str | None = None
) -> transformers.PreTrainedTokenizerBase:
    try:  # a folder has no revision, and a hub name has one for `sage inspect`
        return transformers.AutoTokenizer.from_pretrained(
            folder, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as e:  # transformers reports files that are missing or broken with many types
        if not any(any(Path(folder).glob(pattern)) for pattern in VOCABULARIES):
            raise UserError(
                f"{name}={value}: the folder has no tokenizer (tokenizer.json): copy the files of the model "
                "that it was made from"
            ) from e
        raise UserError(f"{name}={value}: its tokenizer cannot be loaded: {reason(e)}") from e


def compute_dtype(cfg: ModelConfig, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device multiplies it in hardware. Other CPUs take ten times as long for
    it."""
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


def check_offload(cfg: ModelConfig, device: torch.device) -> None:
    """Say where offload does nothing."""
    if cfg.gradient_checkpointing == "offload" and device.type == "cpu":
        console.print(
            "model.gradient_checkpointing=offload: activations are in CPU memory here, so none are moved"
        )


def check_heads(folder: str, cfg: ModelConfig, ranks: int) -> None:
    """Refuse sequence parallelism over ranks that cannot share the model's attention heads equally."""
    heads = getattr(read_config(folder, cfg).get_text_config(), "num_attention_heads", None)
    if isinstance(heads, int) and heads % ranks:
        raise UserError(
            f"engine.sequence_parallel={ranks}: {ranks} ranks cannot share the {heads} attention heads of "
            f"model.path={cfg.path} equally: use a number that divides {heads}"
        )


def load_model(folder: str, cfg: ModelConfig, dtype: torch.dtype, seed: int) -> Any:
    """The causal language model, with its LoRA adapter where the config asks for one.

    The adapter's random init is seeded, so the initial policy is the same on every rank and after a resume.

    Raises:
        UserError: files are broken or lack weights, or the model cannot do what the config asks.
    """
    return prepared(load_base(folder, cfg, dtype), cfg, seed, offload=torch.cuda.is_available())


def prepared(model: Any, cfg: ModelConfig, seed: int, offload: bool) -> Any:
    """A model with the checkpointing and the adapter that the config asks for.

    `offload` says whether to follow a config that asks for it. On a CPU there is nothing to move.
    """
    if cfg.gradient_checkpointing:
        # transformers 5.24 renamed it.
        enable = (
            getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        )
        options = {"offload": True} if cfg.gradient_checkpointing == "offload" else {}
        if not options.keys() <= inspect.signature(enable).parameters.keys():
            raise UserError(
                f"model.gradient_checkpointing=offload: {type(model).__name__} of transformers "
                f"{transformers.__version__} cannot do it: set model.gradient_checkpointing=true"
            )
        try:
            enable({"use_reentrant": False}, **(options if offload else {}))
        except ValueError as e:
            raise UserError(
                f"model.gradient_checkpointing={str(cfg.gradient_checkpointing).lower()}: {first_line(e)}"
            ) from e
    return model if cfg.lora is None else add_adapter(model, cfg, seed)


def read_config(folder: str, cfg: ModelConfig, attention: str | None = None) -> Any:
    """The model's config, with this attention, by default transformers' own choice.

    A config.json can name implementations, too. Those are not used: transformers puts them before what it is
    asked for, and fetches compiled code from the hub for some.

    Raises:
        UserError: the config cannot be read, or the hub does not give it.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, revision=cfg.revision, trust_remote_code=cfg.trust_remote_code
        )
    except Exception as e:  # each config has its own checks of its values
        raise UserError(f"model.path={cfg.path}: its config cannot be read: {reason(e)}") from e
    config._attn_implementation, config._experts_implementation = attention, None
    return config


def load_base(folder: str, cfg: ModelConfig, dtype: torch.dtype) -> Any:
    """The model without adapter, with every weight from its files, and the attention that the config asks
    for."""
    check_weights_files(folder, f"model.path={cfg.path}")
    wanted = ("sdpa", "eager") if cfg.attention == "auto" else (cfg.attention,)
    refusal, loaded = None, None
    for implementation in wanted:
        config = read_config(folder, cfg, implementation)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)  # of missing weights: every load gives the same model
                loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                    folder,
                    config=config,
                    dtype=dtype,
                    use_safetensors=True,
                    trust_remote_code=cfg.trust_remote_code,
                    ignore_mismatched_sizes=True,  # `check_weights` names them all
                    output_loading_info=True,
                )
            break
        except Exception as e:  # transformers and safetensors report broken files with many types
            if implementation != wanted[-1] and isinstance(e, (ValueError, ImportError)):
                refusal = first_line(e).split(". ")[0]
                continue
            raise UserError(f"model.path={cfg.path} cannot be loaded: {reason(e)}") from e
    model, info = loaded
    if refusal:
        console.print(
            f"attention is {model.config._attn_implementation}, since transformers refuses sdpa ({refusal})"
        )
    if not cfg.allow_missing:
        check_weights(cfg, info)
    untie_config(model)
    return model


def untie_config(model: Any) -> None:
    """If the config ties the head to the embedding, and the files hold two different weights, transformers
    keeps both. Make the config say so: other tools would tie them in what is exported."""
    configs = (model.config, model.config.get_text_config())
    tying = [config for config in configs if getattr(config, "tie_word_embeddings", False)]
    if tying and getattr(model, "_tied_weights_keys", None):
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        if head is not None and head.weight is not embedding.weight:
            for config in tying:
                config.tie_word_embeddings = False


def check_weights(cfg: ModelConfig, info: dict[str, Any]) -> None:
    """Refuse a model whose files and code do not hold the same weights: the difference would be random or
    lost.

    Args:
        info: transformers' loading info. A head that is tied to the embedding is not among its missing keys.
    """
    faults = []
    for kind, text in (
        ("missing_keys", "missing from its files"),
        ("unexpected_keys", "in its files and not in the model"),
        ("mismatched_keys", "of another shape in its files"),
    ):
        names = sorted(key if isinstance(key, str) else str(key[0]) for key in info[kind])
        if names:
            faults.append(f"{len(names)} weights are {text} ({named(names, SHOWN)})")
    if faults:
        raise UserError(
            f"model.path={cfg.path}: {'; '.join(faults)}; get the whole model, or set "
            "model.allow_missing=true to begin with random values there"
        )


def router_coefficient(cfg: ModelConfig, model: Any) -> float:
    """The coefficient of the routers' load-balancing loss: our config's, else the model's own; 0 where it
    is off."""
    config = inside_adapter(model).config.get_text_config()
    routed = hasattr(config, "output_router_logits")
    if cfg.router_aux_coef is not None:
        if cfg.router_aux_coef and not routed:
            raise UserError(
                f"model.router_aux_coef={cfg.router_aux_coef}: model.path={cfg.path} has no routers"
            )
        return cfg.router_aux_coef
    return (
        float(getattr(config, "router_aux_loss_coef", 0.0)) if routed and config.output_router_logits else 0.0
    )


def weights_of(folder: str, model: ModelConfig) -> str:
    """The `fingerprint` of a model, which must be the same on every machine. Every rank calls this."""
    return ranks.agreed(
        lambda: fingerprint(folder, model.adapter_path), f"the files of model.path={model.path}"
    )


def fingerprint(folder: str, adapter_path: str | None) -> str:
    """Hash of everything that decides the initial policy: weights, configs, remote code, and the adapter's
    files.

    Reference log-probabilities and built pairs are keyed on it, and a resumed run checks it.
    """
    files = [Path(folder, "config.json"), *Path(folder).glob("*.safetensors"), *Path(folder).rglob("*.py")]
    if adapter_path:
        # peft reads several formats of weights.
        files += [file for file in Path(resolve_path(adapter_path)).iterdir() if file.is_file()]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.name} {sha256(file)}\n".encode())
    return digest.hexdigest()
