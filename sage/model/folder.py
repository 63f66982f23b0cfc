"""What the folders of a model and of an adapter must hold, checked before anything is loaded.

Nothing here imports torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sage.config import LoraConfig, ModelConfig
from sage.data.source import resolve_path
from sage.util.errors import UserError, first_line, named

ADAPTER_CONFIG = "adapter_config.json"
INDEX = "model.safetensors.index.json"
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")
LFS_POINTER = b"version https://git-lfs"


def read_object(file: Path, key: str) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        UserError: it cannot be read.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{key}: {file.name} cannot be read: {_why(file, e)}") from e
    if not isinstance(content, dict):
        raise UserError(f"{key}: {file.name} holds no JSON object")
    return content


def check_weights_files(folder: str, key: str) -> None:
    """Refuse a model folder whose weights are missing, cut short, or pickled. Reads headers only.

    `key` is the config's key and value that name the folder.

    Raises:
        UserError: names the file, and says how to get a whole one.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if (index := Path(folder, INDEX)).is_file():
        listed = read_object(index, key).get("weight_map")
        names = sorted(set(map(str, listed.values()))) if isinstance(listed, dict) else []
        if missing := [name for name in names if not Path(folder, name).is_file()]:
            raise UserError(
                f"{key}: {len(missing)} of {len(names)} files of its weights are missing ({named(missing)}): "
                "download them"
            )
    if not files:
        other = sorted(p.name for p in Path(folder).iterdir() if p.suffix in OTHER_WEIGHTS)
        if Path(folder, "final").is_dir():
            raise UserError(f"{key}: this is a run's folder: its model is in {folder}/final")
        if not other:
            raise UserError(f"{key}: the folder has no weights (*.safetensors): download the whole model")
        convert = "; ".join(
            f"t.{name}.from_pretrained('{folder}').save_pretrained('NEW')"
            for name in ("AutoModelForCausalLM", "AutoTokenizer")
        )
        raise UserError(
            f"{key}: its weights are in {named(other)}, not in safetensors files, and reading pickles can "
            "run programs. If you trust them, convert them once and give model.path=NEW: "
            f'python -c "import transformers as t; {convert}"'
        )
    for file in files:
        check_safetensors(file, key)


def check_safetensors(file: Path, key: str) -> None:
    """Refuse a safetensors file that is damaged or cut short. Reads its header only."""
    try:
        with safe_open(file, "np"):
            pass
    except (SafetensorError, OSError) as e:
        raise UserError(
            f"{key}: {file.name} is damaged or not whole ({_why(file, e)}): download it again"
        ) from e


def check_adapter(cfg: ModelConfig) -> dict[str, Any]:
    """The config of the adapter at `model.adapter_path`, once its files are known to be there and whole.

    Raises:
        UserError: there is no adapter, or none that `sage` trains.
    """
    assert cfg.adapter_path is not None
    key, folder = f"model.adapter_path={cfg.adapter_path}", Path(resolve_path(cfg.adapter_path))
    if not folder.is_dir():
        raise UserError(f"{key}: no such folder; an adapter of the hub must be downloaded first")
    if not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"{key}: the folder has no {ADAPTER_CONFIG}, so it is not a peft adapter")
    config = read_object(folder / ADAPTER_CONFIG, key)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{key}: its peft_type is {config.get('peft_type')}, and sage trains LORA only")
    if config.get("megatron_config"):  # peft would import the module that it names
        raise UserError(f"{key}: it is an adapter of Megatron layers, which sage does not train")
    weights = folder / "adapter_model.safetensors"
    if weights.is_file():
        check_safetensors(weights, key)
    elif not weights.with_suffix(".bin").is_file():
        raise UserError(f"{key}: the folder has no {weights.name}")
    return config


def lora_of(adapter: dict[str, Any]) -> LoraConfig:
    """The settings of an adapter, as `model.lora` names them."""
    targets = adapter.get("target_modules") or []
    return LoraConfig(
        r=adapter.get("r", LoraConfig.r),
        alpha=float(adapter.get("lora_alpha", LoraConfig.alpha)),
        dropout=float(adapter.get("lora_dropout", LoraConfig.dropout)),
        targets=[targets] if isinstance(targets, str) else sorted(targets),
    )


def _why(file: Path, error: Exception) -> str:
    """Why a file cannot be read; a clone without Git LFS leaves pointers in place of files."""
    try:
        with file.open("rb") as content:
            if content.read(len(LFS_POINTER)) == LFS_POINTER:
                return "it is a Git LFS pointer: run `git lfs pull`"
    except OSError:
        pass
    return first_line(error)


def reason(error: Exception) -> str:
    """Why transformers cannot load something, with what to do where it needs code from the folder."""
    if "trust_remote_code" in str(error):
        return (
            "it needs Python code that its folder ships. Read that code, and if you trust it, set "
            "model.trust_remote_code=true"
        )
    if "Unrecognized configuration class" in str(error):
        return "transformers has no causal language model of its type; sage trains no other kind"
    return " ".join(str(error).split())[:400] or type(error).__name__
