"""The reference cache: what its key covers, and that a damaged file is never believed."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from many_runs import column, execute, freeze
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from sage.model import loading, reference
from sage.model.forward import PairForward
from sage.model.logps import PairLogps
from sage.model.reference import compute, read_logps, write_logps
from sage.util.files import sha256, write_json


@pytest.fixture
def logps() -> PairLogps:
    return PairLogps(*torch.randn(4, 7))


def test_what_was_written_is_read(logps, tmp_path):
    file = tmp_path / "reference" / "a.safetensors"
    assert read_logps(file, 7) is None
    write_logps(file, logps)
    assert all(torch.equal(a, b) for a, b in zip(read_logps(file, 7), logps, strict=True))


@pytest.mark.parametrize("fault", ["truncated", "empty", "text", "flipped bit", "no checksum", "other pairs"])
def test_a_damaged_file_is_not_believed(logps, tmp_path, fault, capsys):
    file = tmp_path / "a.safetensors"
    write_logps(file, logps)
    content = file.read_bytes()
    if fault == "truncated":
        file.write_bytes(content[:-9])
    elif fault == "empty":
        file.write_bytes(b"")
    elif fault == "text":
        file.write_text("not found")
    elif fault == "flipped bit":
        file.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    elif fault == "no checksum":
        save_file(logps._asdict(), file)
    assert read_logps(file, 8 if fault == "other pairs" else 7) is None
    out = capsys.readouterr().out
    assert out.count("is damaged") == 1 and len(out.splitlines()) == 1


class Forward:
    """Gives each pair its index, and dies when it is asked for pair `dies`."""

    budget = 1

    def __init__(self, dies: int | None = None):
        self.engine, self.dies, self.asked = SimpleNamespace(rank=0, world_size=1), dies, []

    def all_logps(self, pairs, indices):
        if self.dies in indices:
            raise KeyboardInterrupt
        self.asked += indices.tolist()
        return PairLogps(*(torch.tensor(indices + 0.5 * k, dtype=torch.float32) for k in range(4)))


class Pairs:
    """`count` pairs of equal lengths."""

    def __init__(self, count: int, lengths: list[int]):
        self.table = np.tile(lengths, (count, 1))

    def __len__(self) -> int:
        return len(self.table)

    def lengths(self) -> np.ndarray:
        return self.table

    def by_prompt(self) -> np.ndarray:
        """The even pairs have one prompt, and the odd ones another."""
        return np.argsort(np.arange(len(self)) % 2, kind="stable")


@pytest.mark.parametrize("damage", [None, "last", "first"])
def test_a_killed_pass_goes_on_after_its_last_part(tmp_path, monkeypatch, damage):
    """Protects the hours of a pass over a large set, and its order. A damaged part is computed again."""
    monkeypatch.setattr(reference, "PART", 40)  # of one token each: parts of 4 pairs of 10 tokens
    pairs = Pairs(18, [2, 4, 4])
    with pytest.raises(KeyboardInterrupt):
        compute(Forward(dies=9), pairs, tmp_path / "parts", "test")
    parts = sorted((tmp_path / "parts").iterdir())
    assert len(parts) == 3
    if damage:
        parts[0 if damage == "first" else -1].write_bytes(b"")
    forward = Forward()
    found = compute(forward, pairs, tmp_path / "parts", "test")
    order = [*range(0, 18, 2), *range(1, 18, 2)]
    assert forward.asked == order[{None: 12, "last": 8, "first": 0}[damage] :]
    assert all(torch.equal(x, torch.arange(18) + 0.5 * k) for k, x in enumerate(found))


def test_numbers_of_a_whole_set_are_on_the_cpu_whatever_the_device(monkeypatch):
    """An evaluation subtracts them from a known reference, which is there. Fake tensors need no GPU."""

    engine = SimpleNamespace(
        device=torch.device("cuda"),
        policy=SimpleNamespace(group=SimpleNamespace(size=1, rank=0)),
    )
    monkeypatch.setattr(PairForward, "micro_batches", lambda *_: [])
    with FakeTensorMode():
        found = PairForward(engine, 64, "shared").all_logps(None, np.arange(3))  # pyright: ignore
    assert {values.device.type for values in found} == {"cpu"}


def test_a_small_pass_writes_no_part(tmp_path):
    assert len(compute(Forward(), Pairs(3, [1, 1, 1]), tmp_path / "parts", "test").chosen) == 3
    assert not (tmp_path / "parts").exists()


def test_a_pass_outlives_one_that_ends_first_and_removes_their_parts(monkeypatch, tmp_path):
    """Two runs of one cache may do the same pass. The first to end removes the parts of both."""

    def save(tensors, file, metadata):
        save_file(tensors, file, metadata)
        shutil.rmtree(tmp_path / "parts")

    monkeypatch.setattr(reference, "PART", 40)
    monkeypatch.setattr(reference, "save_file", save)
    assert len(compute(Forward(), Pairs(18, [2, 4, 4]), tmp_path / "parts", "test").chosen) == 18


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "modeling_own.py", "code/layers.py", "a/adapter_model.bin"]
)
def test_the_fingerprint_covers_whatever_decides_the_model(tmp_path, name):
    """An adapter in an old format, and code that comes with a model, change it like weights do."""
    for file in ("model.safetensors", "config.json", "modeling_own.py", "code/layers.py"):
        path = tmp_path / "model" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("one")
    adapter = tmp_path / "model" / "a"
    adapter.mkdir()
    (adapter / "adapter_model.bin").write_text("one")
    before = loading.fingerprint(str(tmp_path / "model"), str(adapter))
    assert loading.fingerprint(str(tmp_path / "model"), str(adapter)) == before
    (tmp_path / "model" / name).write_text("two")
    assert loading.fingerprint(str(tmp_path / "model"), str(adapter)) != before


@pytest.mark.parametrize("fault", [None, "pairs.jsonl", "manifest.json", "gone"])
def test_built_pairs_are_used_only_as_they_were_written(tmp_path, fault):
    from sage.commands.build_pairs import intact

    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"pair_id": "a"}\n' * 3)
    write_json(tmp_path / "manifest.json", {"checksum": sha256(pairs)})
    if fault == "gone":
        pairs.unlink()
    elif fault:
        (tmp_path / fault).write_text((tmp_path / fault).read_text()[:-5])
    assert intact(tmp_path) == (fault is None)


@pytest.mark.slow
def test_damaged_caches_are_rebuilt_and_a_changed_model_is_not_resumed(tiny_model, pair_file, tmp_path):
    """On two ranks, of which only the first reads files; then a resume after the model's folder changed."""
    from many_runs import ERROR_FILE, interrupted
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(tiny_model, tmp_path / "model")
    cache = tmp_path / "cache" / "reference"

    def run(name: str) -> Path:
        return freeze(
            tmp_path / name,
            *["model=hf", f"model.path={model}", f"data.path={pair_file}", "model.dtype=float32", "steps=2"],
            *[
                "batch_size=4",
                "data.max_length=130",
                "micro_batch_tokens=260",
                "save_every=1",
                "world_size=2",
                "+baseline=dpo",
            ],
            f"cache_dir={tmp_path / 'cache'}",
        )

    first = run("first")
    execute(2, [first])
    (file,) = cache.iterdir()
    written = file.read_bytes()
    file.write_bytes(written[: len(written) // 2])
    again = run("again")
    execute(2, [again])
    assert file.read_bytes() == written and column(again, "loss") == column(first, "loss")

    broken = interrupted(first, 1, tmp_path / "broken")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    execute(2, [broken])
    assert "model.path" in (broken / ERROR_FILE).read_text() and not (broken / "final").exists()
