"""A run may begin with the optimizer's state of the run that trained its model, and with no other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from forks import on_ranks
from many_runs import ERROR_FILE, execute, freeze, interrupted
from safetensors.torch import load_file, save_file

from sage.config import OptimizerConfig
from sage.model.loading import fingerprint
from sage.training.optimizer_state import check_optimizer
from sage.training.setup import build_run
from sage.util.checksums import seal

LORA = ["+model/lora=default"]
RUNS = {
    "float32": ["engine=zero0", "model.dtype=float32"],
    **{
        engine: [f"engine={engine}", "model.dtype=bfloat16"]
        for engine in ("zero0", "zero1", "zero2", "zero3")
    },
    "adapter": ["engine=zero0", "model.dtype=bfloat16", *LORA],
    "adapter zero3": ["engine=zero3", "model.dtype=bfloat16", *LORA],
}


def states(run_dirs: list[str]) -> list[tuple[int, list[dict[str, torch.Tensor]]]]:
    """For each run, the step that it begins with, and this rank's moments and count of steps."""
    found = []
    for run_dir in run_dirs:
        run = build_run(Path(run_dir))
        optimizer = run.engine.optimizer
        adam = optimizer if run.engine.unwrapped else optimizer.optimizer
        kept = [{k: torch.as_tensor(v).clone() for k, v in state.items()} for state in adam.state.values()]
        found.append((run.state.step, kept))
    return found


@pytest.fixture(scope="module")
def given(tiny_model, pair_file, tmp_path_factory) -> list[str]:
    return [
        *["model=hf", f"model.path={tiny_model}", f"data.path={pair_file}", "+baseline=dpo"],
        *["batch_size=4", "data.max_length=256", "micro_batch_tokens=1024", "steps=3", "save_every=3"],
        *["optimizer.lr=1e-3", f"cache_dir={tmp_path_factory.mktemp('cache')}"],
    ]


def goes_on(run_dir: Path, adapter: bool = False) -> list[str]:
    """What makes another run go on from the end of this one."""
    final = run_dir / "final"
    if adapter:
        return [f"model.adapter_path={final}/adapter", f"optimizer.continue_from={final}/adapter/optimizer"]
    return [f"model.path={final}", f"optimizer.continue_from={final}/optimizer"]


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def runs(request, given, tmp_path_factory) -> dict[str, list]:
    """What each rank holds where a run of each kind has ended, and where two others begin with its policy."""
    ranks, folder = request.param, tmp_path_factory.mktemp("runs")

    def prepare(name: str, kind: str, *more: str) -> Path:
        return freeze(folder / name, *given, *RUNS[kind], f"world_size={ranks}", *more)

    found = {kind: prepare(kind, kind, "export_optimizer=true") for kind in RUNS}
    execute(ranks, list(found.values()))
    for kind in RUNS:
        on = goes_on(found[kind], "adapter" in kind)
        found[f"after {kind}"] = prepare(f"after {kind}", kind, *on)
        found[f"fresh {kind}"] = prepare(f"fresh {kind}", kind, on[0])
    each = on_ranks(ranks, states, [str(run) for run in found.values()])
    return {name: [rank[i] for rank in each] for i, name in enumerate(found)}


@pytest.mark.parametrize("kind", RUNS)
def test_moments_and_steps_go_on(runs, kind):
    """Equal to the last bit, under each ZeRO stage, for all weights and for adapters."""
    for (ended, before), (began, after), (_, fresh) in zip(
        runs[kind], runs[f"after {kind}"], runs[f"fresh {kind}"], strict=True
    ):
        assert (ended, began) == (3, 0) and len(before) == len(after) > 0
        for one, other in zip(before, after, strict=True):
            assert one.keys() == other.keys() == {"exp_avg", "exp_avg_sq", "step"}
            assert all(torch.equal(value, other[name]) for name, value in one.items())
            assert one["step"] > 2
        assert any(one["exp_avg"].any() for one in before)
        assert not any(one["exp_avg"].any() for one in fresh)


def export_where_it_begins(run_dir: Path) -> None:
    run = build_run(run_dir)
    run.export(run_dir / "final", to_go_on=True)


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_on_another_number_of_ranks(engine, given, tmp_path):
    """Also before the first step, when there are no moments: `select` may find the first policy best."""
    words = [*given, *RUNS[engine]]
    wide, idle = (
        freeze(tmp_path / name, *words, "world_size=2", "export_optimizer=true") for name in ("wide", "idle")
    )
    execute(2, [wide])
    on_ranks(2, export_where_it_begins, idle)
    after = [freeze(tmp_path / f"after {run.name}", *words, *goes_on(run)) for run in (wide, idle)]
    held = [at[0][1] for at in on_ranks(2, states, [str(wide)])]
    [[(_, alone), (_, still)]] = on_ranks(1, states, [str(run) for run in after])
    norms = [
        sum(float(state["exp_avg_sq"].double().sum()) for state in states)
        for states in ([state for rank in held for state in rank], alone)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-12) and norms[0] > 0
    assert {int(state["step"]) for state in alone} == {int(held[0][0]["step"])}
    assert not any(state["exp_avg"].any() for state in still)


def test_a_state_that_does_not_fit_is_refused(given, tmp_path):
    """Protects from training other weights than those of model.path, since the state holds weights, too."""
    short = [*given, "model.dtype=bfloat16", "engine=zero2"]
    run = freeze(tmp_path / "run", *short, "export_optimizer=true")
    execute(1, [run])
    final = goes_on(run)

    def changed(name: str, change) -> list[str]:
        folder = shutil.copytree(run / "final", tmp_path / f"model_{name}")
        change(folder)
        return [f"model.path={folder}", f"optimizer.continue_from={folder}/optimizer"]

    def other_weights(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"][0] += 1
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    def cut(folder: Path) -> None:
        (file,) = (folder / "optimizer" / "engine").glob("*optim_states.pt")
        file.write_bytes(file.read_bytes()[:-1])

    def sealed_though_cut(folder: Path) -> None:
        cut(folder)
        seal(folder / "optimizer")

    def foreign(folder: Path) -> None:
        (file,) = (folder / "optimizer" / "engine").glob("*optim_states.pt")
        torch.save({"optimizer_state_dict": Path("/")}, file)  # whatever is not a tensor may run code
        seal(folder / "optimizer")

    def older(folder: Path) -> None:
        (folder / "optimizer" / "optimizer.json").write_text('{"world_size": 1}')
        seal(folder / "optimizer")

    refused = {
        "gone": [*final, f"optimizer.continue_from={tmp_path}"],
        "checkpoint": [*final, f"optimizer.continue_from={run}/checkpoints/step_3"],
        "other weights": changed("other", other_weights),
        **{
            change.__name__: changed(change.__name__, change)
            for change in (cut, sealed_though_cut, foreign, older)
        },
        "stage": [*final, "engine=zero1"],
        "dtype": [*final, "model.dtype=float32"],
        "adapter": [*final, *LORA],
        "betas": [*final, "optimizer.betas=[0.9,0.99]"],
        "decay": [*final, "optimizer.weight_decay=0.1"],
        "clipping": [*final, "optimizer.max_grad_norm=0.1"],  # DeepSpeed would go on with the old one
    }
    found = {name: freeze(tmp_path / name, *short, *words) for name, words in refused.items()}
    execute(1, list(found.values()))
    said = {name: (folder / ERROR_FILE).read_text() for name, folder in found.items()}
    assert "there is no optimizer's state" in said["gone"] and "there is no" in said["checkpoint"]
    assert "belongs to other weights than those that this run begins with" in said["other weights"]
    assert "is damaged (engine/" in said["cut"]
    assert "another ZeRO stage: 2, and this run has 1" in said["stage"]
    assert "another dtype: bfloat16, and this run has float32" in said["dtype"]
    assert "another weights: " in said["adapter"]
    assert "another optimizer.betas: [0.9, 0.999], and this run has [0.9, 0.99]" in said["betas"]
    assert "another optimizer.weight_decay: 0.0, and this run has 0.1" in said["decay"]
    assert "another optimizer.max_grad_norm: 1.0, and this run has 0.1" in said["clipping"]
    assert all("was not written by sage" in said[name] for name in ("sealed_though_cut", "foreign"))
    assert "was written by another version of sage" in said["older"]
    assert not any((folder / "final").exists() for folder in found.values())
    assert not (found["gone"] / "metrics.jsonl").exists()


def test_any_folder_will_do(given, tmp_path, monkeypatch):
    """A link, brackets and ~ are no obstacle, and neither is a state for those who do not want it."""
    run = freeze(tmp_path / "run", *given, *RUNS["zero1"], "export_optimizer=true")
    execute(1, [run])
    final = shutil.copytree(run / "final", tmp_path / "a [1]" / "final")
    (tmp_path / "home").symlink_to(tmp_path / "a [1]")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    check_optimizer(OptimizerConfig(continue_from="~/final/optimizer"))
    state = f"optimizer.continue_from='{final}/optimizer'"
    again = freeze(tmp_path / "again [1]", *given, *RUNS["zero1"], f"model.path='{final}'", state)
    execute(1, [again])
    assert not (again / ERROR_FILE).exists() and (again / "final").is_dir()
    with_state = fingerprint(str(final), None)
    shutil.rmtree(final / "optimizer")
    assert fingerprint(str(final), None) == with_state
    resumed = interrupted(again, 3, tmp_path / "resumed [1]")
    execute(1, [resumed])
    assert not (resumed / ERROR_FILE).exists() and (resumed / "final").is_dir()
