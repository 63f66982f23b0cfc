"""Convert a GGUF file to a Hugging Face folder, once."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import shutil
from pathlib import Path

import torch
import transformers

from sage.model.folder import reason
from sage.util.errors import UserError
from sage.util.files import sha256, temporary_name, write_json
from sage.util.locks import locked
from sage.util.progress import console

CHECKSUMS = "checksums.json"  # of a converted model


def convert_gguf(path: str, cache_dir: str) -> str:
    """Convert a GGUF file to a Hugging Face folder in float32, once; later calls find it in the cache."""
    for module, package in (("gguf", "gguf"), ("accelerate", "accelerate")):
        if importlib.util.find_spec(module) is None:
            raise UserError(f"model.path={path} is a GGUF file: reading it needs `pip install {package}`")
    source = Path(path)
    versions = transformers.__version__, importlib.metadata.version("gguf"), sha256(Path(__file__))
    digest = hashlib.sha256(f"{sha256(source)} {versions}".encode()).hexdigest()[:16]
    target = Path(cache_dir).expanduser() / "models" / f"{source.stem}-{digest}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(Path(f"{target}.lock")):
        if target.is_dir() and not intact(target):
            console.print(f"{target} is damaged: {source.name} is converted again", markup=False)
            shutil.rmtree(target)
        if not target.is_dir():
            where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
            try:
                tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
                loaded = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
            except Exception as e:  # a file that is cut short is reported with many types
                raise UserError(f"model.path={path}: this GGUF file cannot be read: {reason(e)}") from e
            # save_pretrained refuses while the GGUF quantization config is attached.
            fields = loaded.config.to_dict()
            fields.pop("quantization_config", None)
            fields.pop("_name_or_path", None)
            model = type(loaded)(type(loaded.config)(**fields))
            model.load_state_dict(loaded.state_dict())
            model.generation_config = loaded.generation_config
            temporary = temporary_name(target)
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            write_json(temporary / CHECKSUMS, checksums(temporary))
            if target.is_dir():  # by another machine, where the cache is shared and has no locks
                shutil.rmtree(temporary)
            else:
                temporary.rename(target)
    return str(target)


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a converted model."""
    return {p.name: sha256(p) for p in sorted(folder.iterdir()) if p.is_file() and p.name != CHECKSUMS}


def intact(converted: Path) -> bool:
    """Whether a converted model is as it was written."""
    try:
        return json.loads((converted / CHECKSUMS).read_text()) == checksums(converted)
    except (OSError, ValueError):
        return False
