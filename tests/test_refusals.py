"""Damaged, foreign and missing files, and places that cannot be written: one message each."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from conftest import refused
from filelock import Timeout
from safetensors.torch import load_file, save_file

from sage import config, launch
from sage.config import LoraConfig, ModelConfig
from sage.model import gguf, loading
from sage.util import locks
from sage.util.errors import UserError, refusal


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()


def lacking_a_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.zeros(1)}, folder / "model-1-of-2.safetensors")


WEIGHTS = {
    "cut short": (
        lambda d: cut(d / "model.safetensors"),
        ["model.safetensors is damaged", "download it again"],
    ),
    "huge header": (
        lambda d: (d / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}"),
        ["model.safetensors is damaged"],
    ),
    "pointer": (
        lambda d: (d / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        ["model.safetensors is damaged", "git lfs pull"],
    ),
    "none": (lambda d: (d / "model.safetensors").unlink(), ["no weights"]),
    "a shard": (lacking_a_shard, ["1 of 2 files", "model-2-of-2.safetensors"]),
    "pickled": (pickled, ["pytorch_model.bin", "convert them once", "model.path=NEW"]),
}


@pytest.mark.parametrize("fault", WEIGHTS)
def test_a_model_folder_that_is_not_whole(train, tiny_model, tmp_path, fault):
    edit, parts = WEIGHTS[fault]
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    edit(folder)
    refused(train(f"model.path={folder}"), f"model.path={folder}", *parts)
    assert not (tmp_path / "run").exists()


def test_two_commands_that_start_in_the_same_second(train, tmp_path, monkeypatch):
    """They have the same default folder. The second one wrote its config there before the first one's ranks
    had read theirs, and these then did another run, with exit status 0."""
    folder, tried = tmp_path / "run", []

    def start(_world_size: int, run_dir: Path) -> None:
        before, other = (run_dir / "config.yaml").read_text(), config.load(run_dir)
        assert isinstance(other, config.TrainConfig)
        other.seed = 7
        with pytest.raises(UserError, match=r"in use by another `sage` command.*hydra\.run\.dir=FOLDER"):
            launch.run(other, run_dir)
        with pytest.raises(UserError, match="in use by another `sage` command"):
            launch.resume(run_dir)
        assert (run_dir / "config.yaml").read_text() == before
        tried.append(run_dir)

    monkeypatch.setattr("sage.launch.start", start)
    assert train()[0] == 0 and tried == [folder]
    assert train()[0] == 0  # nobody holds it any more, and no run has begun there


def without_tokenizer(folder: Path) -> None:
    for file in [*folder.glob("token*"), *folder.glob("*.jinja")]:
        file.unlink()


OTHER_FILES = {
    "no tokenizer": (without_tokenizer, ["no tokenizer", "tokenizer.json"]),
    "broken tokenizer": (
        lambda d: (d / "tokenizer.json").write_text("{"),
        ["its tokenizer cannot be loaded"],
    ),
    "broken config": (lambda d: (d / "config.json").write_text("{"), ["config.json cannot be read"]),
    "config of a list": (
        lambda d: (d / "config.json").write_text("[]"),
        ["config.json holds no JSON object"],
    ),
}


@pytest.mark.parametrize("fault", OTHER_FILES)
def test_tokenizers_and_configs_that_cannot_be_read(tiny_model, tmp_path, fault):
    edit, parts = OTHER_FILES[fault]
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    edit(folder)
    cfg = ModelConfig(path=str(folder))
    with pytest.raises(UserError) as caught:
        loading.load_tokenizer(loading.resolve_model(cfg, str(tmp_path)), cfg)
    assert all(part in str(caught.value) for part in [f"model.path={folder}", *parts]), caught.value


# --- adapters


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory) -> Path:
    """A LoRA adapter with r=4 of the tiny model."""
    import peft
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapter") / "r4"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, settings).save_pretrained(folder)
    return folder


ADAPTERS = {
    "missing": (shutil.rmtree, ["no such folder"]),
    "not an adapter": (lambda d: (d / "adapter_config.json").unlink(), ["not a peft adapter"]),
    "broken config": (lambda d: (d / "adapter_config.json").write_text("{"), ["cannot be read"]),
    "another kind": (lambda d: edit_json(d / "adapter_config.json", peft_type="IA3"), ["IA3", "LORA"]),
    "without weights": (lambda d: (d / "adapter_model.safetensors").unlink(), ["adapter_model.safetensors"]),
    "cut short": (lambda d: cut(d / "adapter_model.safetensors"), ["is damaged or not whole"]),
}


@pytest.mark.parametrize("fault", ADAPTERS)
def test_what_is_not_an_adapter(train, adapter, tmp_path, fault):
    edit, parts = ADAPTERS[fault]
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    edit(folder)
    refused(train("+model/lora=default", f"model.adapter_path={folder}"), f"adapter_path={folder}", *parts)


def renamed(old: str, new: str):
    def edit(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file({name.replace(old, new): w for name, w in load_file(file).items()}, file)

    return edit


STRANGERS = {
    "other modules": lambda d: edit_json(d / "adapter_config.json", target_modules=["c_attn"]),
    "another size": lambda d: edit_json(d / "adapter_config.json", r=8),
    # peft itself says nothing about these two, and trains fresh weights in place of the missing ones.
    "fewer layers": lambda d: edit_json(
        d / "adapter_config.json", target_modules=["q_proj", "v_proj", "o_proj"]
    ),
    "more layers": renamed("layers.1", "layers.7"),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_an_adapter_of_another_model(tiny_model, adapter, tmp_path, stranger):
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    STRANGERS[stranger](folder)
    cfg = ModelConfig(path=str(tiny_model), lora=LoraConfig(), adapter_path=str(folder))
    with pytest.raises(UserError, match="adapter_path"):
        loading.load_model(str(tiny_model), cfg, torch.float32, seed=0)


def test_the_frozen_config_tells_the_adapters_own_settings(train, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("sage.launch.start", lambda *_: None)
    given = ("+model/lora=default", f"model.adapter_path={adapter}")
    refused(train(*given, "model.lora.r=16"), "model.lora.r=16", "has its own")
    status, _, err = train(*given)
    assert status == 0, err
    frozen = config.load(tmp_path / "run")
    assert isinstance(frozen, config.TrainConfig)
    assert frozen.model.lora == LoraConfig(r=4, alpha=8.0, dropout=0.0, targets=["q_proj", "v_proj"])
    # So they must not look like other settings to a job that is requeued.
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    status, _, err = train(*given, "resume=auto")
    assert status == 0, err


def test_the_tokenizer_of_a_hub_model_is_that_of_its_revision(monkeypatch):
    """Protects `sage inspect` and `sage plan`, which do not download the model, from another tokenizer."""
    asked = []

    def from_pretrained(name: str, **options: object) -> SimpleNamespace:
        asked.append((name, options["revision"]))
        return SimpleNamespace(eos_token_id=0)

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", from_pretrained)
    loading.load_tokenizer("owner/name", ModelConfig(path="owner/name", revision="v2"))
    assert asked == [("owner/name", "v2")]


# --- places


@pytest.mark.parametrize("key", ["cache_dir", "hydra.run.dir"])
@pytest.mark.parametrize("place", ["file", "file/inside", "/proc/none"])
def test_places_that_cannot_be_written(train, tmp_path, key, place):
    (tmp_path / "file").touch()
    folder = tmp_path / place
    refused(train(f"{key}={folder}"), str(folder))


@pytest.mark.parametrize("key", ["cache_dir", "hydra.run.dir"])
def test_a_place_whose_name_is_not_utf8(train, tmp_path, key):
    """Such a name is legal, but Arrow fails on it at the first step."""
    name = os.fsdecode(bytes(tmp_path) + b"/\xff")
    refused(train(f'{key}="{name}"'), key, "is not UTF-8")


def test_a_user_without_a_home_folder(train, monkeypatch):
    """Containers run with numbers of users that no passwd file names."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    refused(train('cache_dir="~/cache"'), "set HOME", "cache_dir=FOLDER")


def test_a_damaged_conversion_is_noticed(tiny_model, tmp_path):
    """A converted model is trained on as it is, so a changed byte in it would change the run."""
    folder = tmp_path / "converted"
    shutil.copytree(tiny_model, folder)
    assert not gguf.intact(folder)  # there are no checksums
    (folder / gguf.CHECKSUMS).write_text(json.dumps(gguf.checksums(folder)))
    assert gguf.intact(folder)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert not gguf.intact(folder)


def test_a_broken_gguf_file(tmp_path):
    pytest.importorskip("gguf")
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF\x03")
    with pytest.raises(UserError, match="this GGUF file cannot be read"):
        loading.resolve_model(ModelConfig(path=str(file)), str(tmp_path))


def test_memory_and_files_of_the_system():
    assert "Permission denied" in str(refusal(PermissionError(errno.EACCES, "Permission denied", "/a/b")))
    for code, remedy in {
        errno.EMFILE: "ulimit -n",
        errno.ENOSPC: "make room",
        errno.EFBIG: "ulimit -f",
        errno.EAGAIN: "ulimit -u",  # of a process that cannot be started; it names no file
        errno.ENOMEM: "micro_batch_tokens",
    }.items():
        assert remedy in str(refusal(OSError(code, os.strerror(code))))
    for code in (errno.EMFILE, errno.ENOSPC):
        assert str(refusal(OSError(code, os.strerror(code), "/a/b"))).startswith("/a/b cannot be used")
    assert "ulimit -u" in str(refusal(RuntimeError("can't start new thread")))
    assert "micro_batch_tokens" in str(refusal(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")))
    assert refusal(RuntimeError("a bug")) is None and refusal(OSError("a bug")) is None


# --- locks


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    """A second holder on this machine is still noticed, and a run that has ended does not count as alive."""
    real, bare = fcntl.flock, tmp_path / "bare"
    bare.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def flock(descriptor, operation):
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        if os.readlink(f"/proc/self/fd/{number}").startswith(str(bare)):
            raise OSError(errno.ENOLCK, "No locks available")
        return real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    held = locks.lock(bare / ".rank0.lock", timeout=0)
    assert "no locks" in capsys.readouterr().out
    with pytest.raises(Timeout):
        locks.lock(bare / ".rank0.lock", timeout=0)
    assert locks.alive(bare)
    held.release()
    assert not locks.alive(bare)
    locks.lock(bare / ".rank0.lock", timeout=0).release()


# --- the hub, and what a platform sets


def test_a_hub_that_does_not_answer_is_asked_once(train, monkeypatch):
    """The hub's libraries would retry for 24 seconds for every name."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    started = time.monotonic()
    refused(train("data.path=nobody/nothing"), "nobody/nothing", "the hub")
    with pytest.raises(UserError, match="no such folder here"):
        loading.resolve_model(ModelConfig(path="nobody/nothing"), "unused")
    assert time.monotonic() - started < 10


def test_ranks_that_a_platform_names_are_ignored(train, monkeypatch):
    seen = []
    monkeypatch.setattr("sage.launch.start", lambda *_: seen.append(dict(os.environ)))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "3")
    status, _, err = train()
    assert status == 0, err
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} & seen[0].keys()


def test_torchrun_does_not_start_sage(train, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    refused(train(), "torchrun", "world_size=N", "start=false")
