"""The engine around a toy module: which gradient a step applies, and that a broken step changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from forks import on_ranks
from many_runs import ERROR_FILE, execute, freeze

VARIANTS = [
    (stage, offload, dtype)
    for dtype in ("float32", "bfloat16")
    for stage, offload in ((0, False), (1, False), (2, False), (3, False), (1, True), (2, True), (3, True))
]


def name(stage: int, offload: bool, dtype: str) -> str:
    return f"zero{stage}{'_offload' if offload else ''}-{dtype}"


def measure(many: int) -> dict[str, dict]:
    """Per variant: its gradient's relative error and norm, and what a refused step changed. On rank 0.

    Variants in bfloat16 add up `many` micro-batches.
    """
    import tempfile

    import torch
    from deepspeed.utils import safe_get_full_grad
    from torch import nn

    from sage.config import EngineConfig, OptimizerConfig
    from sage.model.engine import Engine, init_distributed
    from sage.util import ranks

    def bits(value: torch.Tensor) -> torch.Tensor:
        """The padding at a shard's end is whatever was in memory, so it may be NaN, which equals nothing."""
        return value.flatten().view(torch.uint8)

    device = init_distributed()

    def toy(dtype: torch.dtype) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.LayerNorm(64), nn.Linear(64, 1)).to(dtype)

    def tensors(value, path: str):
        if isinstance(value, torch.Tensor):
            yield path, value
        elif isinstance(value, (dict, list, tuple)):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                yield from tensors(item, f"{path}/{key}")

    def everything(engine: Engine) -> dict[str, torch.Tensor]:
        """Weights, master weights and optimizer state of all ranks, as a checkpoint holds them."""
        folder = Path(ranks.broadcast(tempfile.mkdtemp()))
        engine.save(folder)
        ranks.barrier()
        files = sorted(folder.rglob("*.pt"))
        assert files
        return {k: v for f in files for k, v in tensors(torch.load(f, weights_only=True), f.name)}

    def gradient(plain: nn.Module, batches: list[torch.Tensor]) -> list[torch.Tensor]:
        """Of the mean over micro-batches, added up in float64."""
        parameters = [*plain.parameters()]
        total = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
        for batch in batches:
            for x in batch.to(parameters[0].dtype):
                loss = plain(x).float().sum() / len(batches)
                for t, g in zip(total, torch.autograd.grad(loss, parameters), strict=True):
                    t += g.double()
        return total

    found, wanted = {}, {}
    for stage, offload, kind in VARIANTS:
        dtype = getattr(torch, kind)
        optimizer = OptimizerConfig(max_grad_norm=1.0, implementation="torch", weight_decay=0.1)
        engine = Engine(toy(dtype), EngineConfig(stage, offload), optimizer, dtype, device)
        micro_batches = many if dtype == torch.bfloat16 else 4
        inputs = torch.Generator().manual_seed(1)
        batches = [torch.randn(ranks.world_size(), 4, 64, generator=inputs) for _ in range(micro_batches)]
        for i, batch in enumerate(batches):
            loss = engine(batch[ranks.rank()].to(dtype)).float().sum() / micro_batches
            engine.backward(loss, i == micro_batches - 1)
        if kind not in wanted:
            wanted[kind] = gradient(toy(dtype), batches)
        want = wanted[kind]
        got = [safe_get_full_grad(p).double() for p in engine.policy.parameters()]
        squares = [sum(float(x.square().sum()) for x in xs) for xs in (want, got)]
        error = sum(float((g - w).square().sum()) for g, w in zip(got, want, strict=True))
        norm = engine.step(1e-2)

        before = everything(engine)
        for i in range(2):
            broken = i == 0 and ranks.rank() == ranks.world_size() - 1
            engine.backward(
                engine(torch.ones(4, 64, dtype=dtype)).float().sum() * (torch.nan if broken else 1), i == 1
            )
        refused = engine.step(1e-2)
        after = everything(engine)
        changed = [k for k in before if not torch.equal(bits(before[k]), bits(after[k]))]
        found[name(stage, offload, kind)] = {
            "error": (error / squares[0]) ** 0.5,
            "norm": norm / squares[0] ** 0.5,
            "refused": repr(refused),
            "kinds": sorted(
                {kind for key in before for kind in ("exp_avg", "weight", "step") if kind in key}
            ),
            "keys_differ": before.keys() != after.keys(),
            "changed": changed,
        }
    return found


@pytest.fixture(scope="module")
def one() -> dict[str, dict]:
    return on_ranks(1, measure, 128)[0]


@pytest.fixture(scope="module")
def two() -> dict[str, dict]:
    return on_ranks(2, measure, 8)[0]


each = pytest.mark.parametrize("variant", [name(*v) for v in VARIANTS])


@pytest.mark.slow
@each
def test_gradients_accumulate_in_float32(one, two, variant):
    """128 bfloat16 micro-batches whose gradients agree: a sum in bfloat16 stops growing."""
    assert one[variant]["error"] < 1e-5 and abs(one[variant]["norm"] - 1) < 1e-5
    # Stages 2 and 3 exchange each micro-batch's gradient in bfloat16, but do not add up in it.
    exchanged = variant.endswith("bfloat16") and ("zero2" in variant or "zero3" in variant)
    assert two[variant]["error"] < (2e-3 if exchanged else 1e-5)


@pytest.mark.slow
@each
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing(one, two, variant, world_size):
    """One micro-batch of the last rank is NaN: weights and optimizer state of all ranks stay bit for bit."""
    found = (one if world_size == 1 else two)[variant]
    assert found["refused"] in ("nan", "inf")
    assert found["changed"] == [] and not found["keys_differ"]
    assert "exp_avg" in found["kinds"]  # the checkpoint that is compared does hold the optimizer's state


@pytest.mark.slow
def test_a_broken_model_is_blamed_before_the_first_step(tiny_model, pair_file, tmp_path):
    """Not the learning rate: weights that are NaN, and finite weights whose forward pass overflows."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    runs = {}
    for fault, value in (("weights", torch.nan), ("forward", 3e38)):
        folder = shutil.copytree(tiny_model, tmp_path / fault)
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"][:] = value
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        for reference in ("cached", "online"):
            runs[f"{fault}-{reference}"] = freeze(
                tmp_path / "runs" / f"{fault}-{reference}",
                *[
                    "model=hf",
                    f"model.path={folder}",
                    f"data.path={pair_file}",
                    "model.dtype=float32",
                    "steps=2",
                    "+baseline=dpo",
                ],
                *["batch_size=4", "data.max_length=130", "micro_batch_tokens=260", f"reference={reference}"],
                *[f"cache_dir={tmp_path / 'cache'}", "data.packing=padded"],
            )
    execute(1, list(runs.values()))
    for name, run in runs.items():
        message = (run / ERROR_FILE).read_text()
        assert (
            "the model itself" in message or "its own logits" in message
        ) and "optimizer.lr" not in message, name
        assert ("model.norm.weight" if name.startswith("weights") else "p") in message, name
        assert not (run / "checkpoints").exists()
    assert not list((tmp_path / "cache" / "reference").glob("*"))  # nothing broken is kept for later runs
