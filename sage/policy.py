"""Load the policy, the reference and the tokenizer; the forward that gives response log-probabilities."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from sage import attention
from sage.config import ModelConfig, TrainConfig
from sage.errors import UserError
from sage.kernels import TokenStats, has_triton, token_stats
from sage.kernels.recompute import bfloat16_in_hardware
from sage.losses import LogitStats, PairLogps
from sage.packing import MicroBatch, collate
from sage.pairs import resolve_path
from sage.tokenized import Pair


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


class Head(nn.Module):
    """Statistics of labels from hidden states, without logits of the unscored positions.

    It owns the head's weight as a parameter of its own (the same object as the model's), so that ZeRO-3 gathers it for
    this module's forward and again before its backward.
    """

    def __init__(self, lm_head: nn.Module, config: transformers.PretrainedConfig, backend: str):
        super().__init__()
        if type(lm_head) is not nn.Linear:
            raise UserError(
                f"the model's head is a {type(lm_head).__name__}: adapters on the head are not supported"
            )
        self.weight, self.bias, self.backend = lm_head.weight, lm_head.bias, backend
        self.softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        # Cohere multiplies its logits by logit_scale, Granite divides them by logits_scaling.
        self.scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)

    def forward(self, hidden: Tensor, labels: Tensor, stats: tuple[str, ...]) -> TokenStats:
        return token_stats(
            hidden,
            self.weight,
            labels,
            bias=self.bias,
            softcap=self.softcap,
            scale=self.scale,
            stats=stats,
            backend=self.backend,
        )


class Policy(nn.Module):
    """The one module the engine wraps: micro-batch in, response log-probabilities out."""

    def __init__(self, model: Any, head: str = "auto"):
        super().__init__()
        self.model: Any = model
        self.head = Head(self.causal.get_output_embeddings(), self.causal.config, head)
        self.unpacked_attention = self.causal.config._attn_implementation

    @property
    def causal(self) -> Any:
        """The transformers model, inside its adapter where there is one."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def forward(self, batch: MicroBatch, reference: bool = False, logit: bool = False) -> Any:
        """PairLogps of a micro-batch of n pairs; with `logit`, (PairLogps, LogitStats).

        `reference` switches a freshly initialised adapter off, which gives back the initial model.
        """
        causal, arguments = self.causal, {}
        if batch.spans is None:
            causal.config._attn_implementation = self.unpacked_attention
        else:
            causal.config._attn_implementation = attention.IMPLEMENTATION
            arguments["packed_mask"] = attention.packed_mask(
                batch.prefix, batch.spans, batch.input_ids.shape[1], batch.input_ids.device
            )
        with self.model.disable_adapter() if reference else nullcontext():
            hidden = causal.base_model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                attention_mask=batch.attention_mask,
                use_cache=False,
                **arguments,
            ).last_hidden_state
        hidden = hidden.flatten(0, 1)[batch.positions]
        stats = self.head(hidden, batch.labels, ("logps", "sum_sq_probs") if logit else ("logps",))
        logps = PairLogps(*per_response(stats.logps, batch).chunk(2), *batch.response_tokens.chunk(2))
        if not logit:
            return logps
        squared_norms = per_response(1 - 2 * stats.logps.detach().exp() + stats.sum_sq_probs, batch)
        uncertainties = per_response(1 - stats.sum_sq_probs, batch)
        chosen_norm, rejected_norm = squared_norms.chunk(2)
        return logps, LogitStats(chosen_norm + rejected_norm, *uncertainties.chunk(2))


def per_response(values: Tensor, batch: MicroBatch) -> Tensor:
    """Sum [s] per-token values over each response, [2n].

    Every slot is written once, so this sum, unlike index_add, is deterministic on CUDA.
    """
    table = values.new_zeros(len(batch.response_tokens) * batch.longest).scatter(0, batch.slots, values)
    return table.view(-1, batch.longest).sum(1)


@torch.no_grad()
def can_pack(model: Any, causal: Any, max_length: int, device: torch.device) -> str | None:
    """None when the model reads a packed row as it reads padded ones, else why it does not.

    `model` is a Policy, or the engine around it; `causal` is the transformers model in it. Every rank calls this.
    """
    window = getattr(causal.config, "sliding_window", None)
    if window and max_length > window and getattr(causal.config, "use_sliding_window", True):
        return f"its attention window of {window} tokens is shorter than data.max_length={max_length}"
    if not causal._supports_attention_backend:
        return "its attention cannot be replaced"
    ids = (torch.arange(36) * 7919 % (causal.config.vocab_size - 1)).tolist()
    pairs = [
        Pair("", None, ids[:5], ids[5:12], ids[12:16]),
        Pair("", None, [*ids[:3], ids[16]], ids[17:26], ids[26:]),
    ]
    logps = []
    for layout, prefix in (("shared", 3), ("padded", 0)):
        try:
            logps.append(torch.cat(model(collate(pairs, layout, prefix).to(device))[:2]))
        except Exception as e:
            return f"it fails on a packed row ({type(e).__name__}: {str(e).splitlines()[0]})"
    packed, padded = logps
    # What leaks, or lies at a wrong place, moves a log-probability by whole nats; bfloat16 moves it by hundredths.
    if not torch.allclose(packed, padded, rtol=1e-2, atol=1e-2):
        return f"its log-probabilities change by up to {float((packed - padded).abs().max()):.3g} in a packed row"
    return None


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


def export(
    final: Path, weights: dict[str, Tensor], folder: str, cfg: TrainConfig, tokenizer: transformers.PreTrainedTokenizerBase
) -> None:  # fmt: skip
    """Write the policy as a Hugging Face folder, whole or not at all; an adapter is merged, and kept in adapter/ too.

    Args:
        weights: state of the Policy module on the CPU.
        folder: the initial model, whose architecture and generation config the export takes.
    """
    prefix = "model."
    state = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    temporary = final.with_name(".final.tmp")
    dtype = next(v.dtype for v in state.values() if v.is_floating_point())
    model = load_model(folder, cfg.model, dtype, cfg.seed)
    model.load_state_dict(state)
    if cfg.model.lora is not None:
        model.save_pretrained(temporary / "adapter")  # pyright: ignore
        model = model.merge_and_unload()  # pyright: ignore
    model.config.use_cache = True
    model.save_pretrained(temporary)  # pyright: ignore
    tokenizer.save_pretrained(temporary)
    if final.exists():  # a kill fell between this export and the summary, and the run's end was run again
        shutil.rmtree(final)
    temporary.rename(final)
