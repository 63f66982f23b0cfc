"""A run that goes on from the export of a bfloat16 run loses nothing by its rounding."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forks import on_ranks
from many_runs import ERROR_FILE, do_all, execute, freeze, weights
from safetensors.torch import load_file, save_file

from sage.model import masters as module
from sage.util import checksums

ENGINES = ("zero0", "zero1", "zero2", "zero3")
NORM = "model.model.norm.weight"
LORA = ["+model/lora=default"]
STILL = ["optimizer.lr=0", "steps=1"]  # a run that changes no weight


def masters(folder: Path) -> dict[str, torch.Tensor]:
    return {
        k: v
        for file in sorted((folder / "float32").glob("*.safetensors"))
        for k, v in load_file(file).items()
    }


def in_small_parts(run_dirs: list[str]) -> None:
    module.PART = 20_000  # bytes
    do_all(run_dirs)


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def runs(request, tiny_model, pair_file, tmp_path_factory) -> dict[str, Path]:
    """Per engine a run of small steps, and from its export a run that changes nothing."""
    ranks, folder = request.param, tmp_path_factory.mktemp("masters")

    def prepare(name: str, model: Path, engine: str, *more: str) -> Path:
        return freeze(
            folder / name,
            *[
                "model=hf",
                f"model.path={model}",
                f"data.path={pair_file}",
                "+baseline=dpo",
                f"engine={engine}",
            ],
            *["batch_size=4", "data.max_length=256", "micro_batch_tokens=1024", "model.dtype=bfloat16"],
            *[f"world_size={ranks}", f"cache_dir={folder / 'cache'}", "export_float32=true", *more],
        )

    found = {e: prepare(e, tiny_model, e, "steps=3", "optimizer.lr=1e-5") for e in ENGINES}
    for e in ("zero0", "zero3"):
        found[f"adapter {e}"] = prepare(f"adapter_{e}", tiny_model, e, *LORA, "steps=3", "optimizer.lr=1e-3")
    on_ranks(ranks, in_small_parts, [str(run) for run in found.values()])
    rounded = shutil.copytree(found["zero0"] / "final", folder / "rounded_model")
    shutil.rmtree(rounded / "float32")  # which leaves a model like any other
    others = zip(ENGINES, (*ENGINES[1:], ENGINES[0]), strict=True)  # goes on with another engine
    after = {f"after {e}": prepare(f"after_{e}", found[e] / "final", other, *STILL) for e, other in others}
    after["rounded"] = prepare("rounded", rounded, "zero0", *STILL)
    for e, other in (("zero0", "zero3"), ("zero3", "zero0")):
        adapter = f"model.adapter_path={found[f'adapter {e}'] / 'final' / 'adapter'}"
        after[f"after adapter {e}"] = prepare(f"after_adapter_{e}", tiny_model, other, *LORA, adapter, *STILL)
    execute(ranks, list(after.values()))
    return found | after


@pytest.mark.parametrize("engine", ENGINES)
def test_float32_weights_go_from_run_to_run(runs, engine):
    """Protects small steps: in most weights they are smaller than half a step of bfloat16."""
    final, kept = weights(runs[engine] / "final"), masters(runs[engine] / "final")
    assert len(list((runs[engine] / "final" / "float32").glob("*.safetensors"))) > 3
    assert {name.removeprefix("model.") for name in kept} == set(final)
    unlike = 0
    for name, weight in final.items():
        value = kept[f"model.{name}"]
        assert value.dtype == torch.float32 and torch.equal(value.bfloat16(), weight)
        unlike += int((value != weight.float()).sum())
    assert unlike > 0.5 * sum(weight.numel() for weight in final.values())
    again = masters(runs[f"after {engine}"] / "final")
    assert again.keys() == kept.keys()
    assert all(torch.equal(again[name], value) for name, value in kept.items())


@pytest.mark.parametrize("engine", ["zero0", "zero3"])
def test_those_of_an_adapter_go_on_too(runs, engine):
    kept = masters(runs[f"adapter {engine}"] / "final" / "adapter")
    (file,) = (runs[f"adapter {engine}"] / "final" / "adapter").glob("*.safetensors")
    exported = load_file(file)
    assert len(kept) == len(exported)
    unlike = 0
    for name, value in kept.items():
        rounded = exported[name.removeprefix("model.").replace(".default", "")]
        assert torch.equal(value.bfloat16().float(), rounded)
        unlike += int((value != rounded).sum())
    assert unlike > 0.5 * sum(value.numel() for value in kept.values())
    again = masters(runs[f"after adapter {engine}"] / "final" / "adapter")
    assert again.keys() == kept.keys() and all(torch.equal(again[name], kept[name]) for name in kept)


def test_without_them_a_run_begins_with_rounded_weights(runs):
    """Shows that the test above can fail."""
    kept = masters(runs["rounded"] / "final")
    assert all(torch.equal(value, value.bfloat16().float()) for value in kept.values())


@pytest.fixture(scope="module")
def exported(tiny_model, pair_file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    run = freeze(
        folder / "run",
        *["model=hf", f"model.path={tiny_model}", f"data.path={pair_file}", "+baseline=dpo", "steps=1"],
        *["batch_size=4", "data.max_length=256", "micro_batch_tokens=1024", "model.dtype=bfloat16"],
        *[f"cache_dir={folder / 'cache'}", "export_float32=true"],
    )
    execute(1, [run])
    return run / "final"


def test_float32_weights_that_do_not_fit_are_refused(exported, pair_file, tmp_path):
    """Protects from training other weights than model.path holds."""

    def changed(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        kept = load_file(file)
        change(kept)
        save_file(kept, file)
        checksums.seal(file.parent)

    def other(file: Path) -> None:
        changed(file, lambda kept: kept[NORM].add_(1))

    def lacks(file: Path) -> None:
        changed(file, lambda kept: kept.pop(NORM))

    def damaged(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)

    def not_sealed(file: Path) -> None:
        (file.parent / checksums.CHECKSUMS_FILE).unlink()

    def emptied(file: Path) -> None:
        (file.parent / checksums.CHECKSUMS_FILE).write_text("")

    found = {}

    changes = [(change, "bfloat16") for change in (other, lacks, damaged, not_sealed, emptied)]
    for change, dtype in (*changes, (None, "float32")):
        name = change.__name__ if change else "float32"
        model = shutil.copytree(exported, tmp_path / f"model_{name}")
        (model / "float32" / "._00000.safetensors").write_text("what macOS leaves beside a file")
        if change:
            change(model / "float32" / "00000.safetensors")
        found[name] = freeze(
            tmp_path / name,
            *["model=hf", f"model.path={model}", f"data.path={pair_file}", "+baseline=dpo", *STILL],
            *["batch_size=4", "data.max_length=256", "micro_batch_tokens=1024", f"model.dtype={dtype}"],
            *[f"cache_dir={tmp_path / 'cache'}", "export_float32=true"],
        )
    execute(1, list(found.values()))
    said = {name: (run / ERROR_FILE).read_text() for name, run in found.items() if name != "float32"}
    assert f"holds other weights than the model ({NORM})" in said["other"]
    assert f"lacks weights of the model ({NORM})" in said["lacks"]
    assert "float32 is damaged (00000.safetensors)" in said["damaged"]
    assert all("float32 is damaged (checksums.json)" in said[name] for name in ("not_sealed", "emptied"))
    assert all("or begin with the rounded weights" in text for text in said.values())
    # A float32 run reads the export itself, and writes one that is exact.
    assert not (found["float32"] / ERROR_FILE).exists()
    final = weights(found["float32"] / "final")
    assert all(torch.equal(weight, final[name].bfloat16()) for name, weight in weights(exported).items())
    assert not (found["float32"] / "final" / "float32").exists()
