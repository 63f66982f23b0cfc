"""Write a trained policy as a Hugging Face folder."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from sage.config import TrainConfig
from sage.data.chat import ChatFormat, response_ends, training_end
from sage.data.templates import exported_templates
from sage.model.engine import gathered
from sage.model.loading import load_model
from sage.model.policy import Policy
from sage.model.sharding import size_of
from sage.util import ranks
from sage.util.files import replace_folder, write_json

SMALLEST = 2**28  # bytes of a file of weights, where there are several
INDEX, ADAPTER = "model.safetensors.index.json", "adapter"


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
        order_names(model)
        model.save_pretrained(temporary / ADAPTER, save_embedding_layers=False)  # pyright: ignore
        model = model.merge_and_unload().to(dtype)  # pyright: ignore
    model.config.use_cache = True
    model.config.dtype = dtype
    model.save_pretrained(temporary)  # pyright: ignore
    _finish(temporary, final, cfg, tokenizer)


def _finish(
    temporary: Path, final: Path, cfg: TrainConfig, tokenizer: transformers.PreTrainedTokenizerBase
) -> None:
    """Add what is not weights, and give the folder its name."""
    chat = ChatFormat.of(cfg.data)
    _name_ends(temporary / "generation_config.json", tokenizer, chat)
    saved = copy.copy(tokenizer)
    saved.chat_template = exported_templates(tokenizer, chat)
    for folder_of_weights in (temporary, temporary / ADAPTER):
        if folder_of_weights.is_dir():
            saved.save_pretrained(folder_of_weights)
    replace_folder(temporary, final)


def export_sharded(
    final: Path, policy: Policy, cfg: TrainConfig, tokenizer: transformers.PreTrainedTokenizerBase
) -> None:
    """`export` of a policy whose weights are split over the ranks. Every rank calls this; rank 0 writes.

    Rank 0 holds one file's weights at a time: as much as its own part of the model (SMALLEST at least), and
    one layer.
    """
    temporary = final.with_name(f".{final.name}.tmp")
    main, causal = ranks.rank() == 0, policy.causal
    if main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    size = sum(size_of(p) * p.element_size() for p in causal.parameters())
    limit = max(size // ranks.world_size(), SMALLEST)
    pending: dict[str, Tensor] = {}
    written: set[nn.Parameter] = set()  # a weight that is tied has one name in the files, its first
    files: list[list[str]] = []  # the tensors' names in each file written

    def flush() -> None:
        if pending:
            files.append(_write_part(temporary, len(files), causal, pending))
            pending.clear()

    with as_published(policy):
        for layer in layers_of(causal):
            with gathered(p for module in layer.values() for p in parameters_of(module)):
                if not main:
                    continue
                weights, whole = dict[str, Tensor](), 0
                for name, module in layer.items():
                    new = set(base_parameters(module)) - written
                    weights |= merged_weights(name, module, new)
                    whole += sum(map(size_of, new))
                    written |= new
                assert sum(weight.numel() for weight in weights.values()) >= whole, list(layer)
                held, more = (sum(w.nbytes for w in group.values()) for group in (pending, weights))
                if held and held + more > limit:
                    flush()
                pending.update({name: weight.to("cpu", copy=True) for name, weight in weights.items()})
                del weights
        if main:
            flush()
    adapter = adapter_weights(policy) if cfg.model.lora is not None else None
    if not main:
        return
    if adapter is not None:
        order_names(policy.model)
        policy.model.save_pretrained(temporary / ADAPTER, state_dict=adapter, save_embedding_layers=False)
    _join_parts(temporary, files)
    _finish(temporary, final, cfg, tokenizer)


def splits_into_layers(policy: Policy) -> bool:
    """Whether `export_sharded` can write this policy: not with peft's adapters of whole modules or of single
    tokens (which hold an `original_module`), or of single weights (of experts)."""
    return not any(
        hasattr(m, "original_module") or hasattr(m, "parameter_name") for m in policy.causal.modules()
    )


@contextmanager
def as_published(policy: Policy) -> Iterator[None]:
    """The model's config is as in a folder, not as in training, for a while."""
    policy.set_mode(False)  # in training mode the config's dropouts are 0
    causal = policy.causal
    kept, causal.config = causal.config, copy.deepcopy(causal.config)
    causal.config.use_cache = True
    try:
        yield
    finally:
        causal.config = kept


def layers_of(causal: nn.Module) -> Iterator[dict[str, nn.Module]]:
    """The modules that hold weights, by name, layer by layer. A tied weight's module comes once.

    An adapted layer is one module. What transformers converts when it reads or writes files lies within a
    layer.
    """
    layer: dict[str, nn.Module] = {}
    number, seen = "", set[int]()
    adapted: str | None = None
    for name, module in causal.named_modules():
        if adapted and name.startswith(adapted):
            continue
        adapted = f"{name}." if hasattr(module, "get_base_layer") else None
        own = [*parameters_of(module), *module.buffers(recurse=False)]
        if not own or all(id(weight) in seen for weight in own):
            continue
        seen.update(map(id, own))
        parts = name.split(".")
        place = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        current = name if place is None else ".".join(parts[: place + 1])
        if layer and current != number:
            yield layer
            layer = {}
        number, layer[name] = current, module
    yield layer


def parameters_of(module: nn.Module) -> list[nn.Parameter]:
    """A module's own weights; those of its adapter belong to an adapted layer."""
    return list(module.parameters(recurse=hasattr(module, "get_base_layer")))


def base_parameters(module: Any) -> list[nn.Parameter]:
    """A module's own weights, without those of an adapter."""
    adapted = hasattr(module, "get_base_layer")
    return list((module.get_base_layer() if adapted else module).parameters(recurse=adapted))


def merged_weights(name: str, module: Any, new: set[nn.Parameter]) -> dict[str, Tensor]:
    """The `new` weights of a module that is whole on this rank, and its buffers; an adapter is merged in
    float32, as in `export`."""
    if not hasattr(module, "get_base_layer"):
        # Not `module._parameters | ...`: DeepSpeed's own class of dict loses all that it holds by that.
        hidden = module._non_persistent_buffers_set
        own: dict[str, Tensor] = {k: w for k, w in module.named_parameters(recurse=False) if w in new}
        own |= {key: buffer for key, buffer in module.named_buffers(recurse=False) if key not in hidden}
        return {f"{name}.{key}": weight.data for key, weight in own.items()}
    kept = {weight: weight.data for weight in module.parameters()}
    base = module.get_base_layer()
    try:
        for weight, data in kept.items():
            weight.data = data.to(torch.float32, copy=True)  # on one rank, data may be the policy's own part
        module.merge()
        module.merged_adapters.clear()
        return {f"{name}.{k}": w.data.to(kept[w].dtype) for k, w in base.named_parameters()}
    finally:
        for weight, data in kept.items():
            weight.data = data


def adapter_weights(policy: Policy) -> dict[str, Tensor]:
    """The trainable weights under peft's names, in float32; empty on other ranks than 0. Every rank calls
    this."""
    found: dict[str, Tensor] = {}
    for name, weight in policy.model.named_parameters():
        if weight.requires_grad:
            with gathered([weight]):
                if ranks.rank() == 0:
                    found[name] = weight.data.float().to("cpu", copy=True)
    return found


def order_names(model: Any) -> None:
    """Give an adapter's sets of names an order, so that its files are the same in every process."""
    for config in model.peft_config.values():
        for field, value in vars(config).items():
            if isinstance(value, set):
                setattr(config, field, sorted(value))


def _write_part(temporary: Path, number: int, causal: Any, weights: dict[str, Tensor]) -> list[str]:
    """Write some of the weights as a file, as transformers would name and convert them. Returns the names."""
    folder = temporary / f"part{number}"
    causal.save_pretrained(folder, state_dict=weights, max_shard_size="1000TB")
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as content:
        names = list(content.keys())
    file.rename(temporary / f"part{number}.safetensors")
    for other in folder.iterdir():
        other.replace(temporary / other.name)
    folder.rmdir()
    return names


def _join_parts(temporary: Path, files: list[list[str]]) -> None:
    """Name the files as transformers does, and write their index."""
    if len(files) == 1:
        (temporary / "part0.safetensors").rename(temporary / "model.safetensors")
        return
    weight_map, size = {}, 0
    for number, names in enumerate(files):
        name = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        file = (temporary / f"part{number}.safetensors").rename(temporary / name)
        size += file.stat().st_size
        weight_map |= dict.fromkeys(names, name)
    write_json(temporary / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


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
