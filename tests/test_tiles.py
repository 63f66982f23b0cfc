"""MLPs in tiles along the tokens: the same numbers and gradients as all tokens at once, in less memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from conftest import make_pairs, write_jsonl
from forks import on_ranks
from many_runs import ERROR_FILE, column, do_all, execute, freeze
from test_models import chosen
from test_policy import OPT, lora, pairs, tiny
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sage.data.packing import collate
from sage.model import tiles
from sage.model.policy import Policy
from sage.model.tilecheck import SMALL as CHECKED
from sage.model.tiles import Tiles, in_tiles_of, token_wise
from sage.util.errors import UserError

SMALL = 7  # tokens of a tile: no row here is a multiple of it


class MLP(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Mixing(MLP):
    """Its tokens look at their mean."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + x.mean(1, keepdim=True))


class InParts(MLP):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore
        out = super().forward(x)
        return out, out


class Attending(MLP):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x)


def gradients(policy: Policy, layout: str, prefix: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    policy.zero_grad()
    logps = policy(collate(pairs(prefix), layout, prefix))
    (logps.chosen - 2 * logps.rejected).sum().backward()
    found = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    return torch.cat([logps.chosen, logps.rejected]).detach(), found


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize(
    ("name", "layout"),
    [("llama_tied", "shared"), ("gemma2", "padded"), ("gpt2", "unshared"), ("mixtral", "shared")],
)
def test_numbers_and_gradients_are_those_of_all_tokens_at_once(name, layout, checkpointing):
    """Protects every weight's gradient, which adds up over tiles, also where layers are computed again."""
    plain, model = tiny(name), cast(Any, tiny(name))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    right, known = gradients(Policy(plain), layout)
    policy = Policy(model, tiled_mlp=True)
    assert len(policy.tiles) == 2
    with in_tiles_of(SMALL, policy.tiles):
        logps, found = gradients(policy, layout)
    assert torch.allclose(logps, right, rtol=1e-6, atol=1e-5)
    assert found.keys() == known.keys()
    for key, gradient in found.items():
        assert (gradient - known[key]).abs().max() < 2e-6 * known[key].abs().max(), key


def test_an_adapter_is_trained_alone(tiny_model):
    pytest.importorskip("peft")

    def policy(tiled: bool) -> Policy:
        found = Policy(lora(tiny_model, r=4), tiled_mlp=tiled)
        generator = torch.Generator().manual_seed(0)
        for key, weight in found.named_parameters():
            if "lora_B" in key:
                weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
        return found

    right, known = gradients(policy(False), "shared")
    ours = policy(True)
    with in_tiles_of(SMALL, ours.tiles):
        logps, found = gradients(ours, "shared")
    assert torch.allclose(logps, right, rtol=1e-6, atol=1e-5)
    assert found.keys() == known.keys() and all("lora_" in key for key in found)
    for key, gradient in found.items():
        assert (gradient - known[key]).abs().max() < 2e-6 * known[key].abs().max(), key


def test_weight_gradients_in_bfloat16_lose_nothing_by_many_tiles():
    """Protects the float32 sums: with ones in bfloat16, 512 tiles would cost several times the error."""
    torch.manual_seed(0)
    module, x, upstream = MLP(16), torch.randn(1, 2048, 16), torch.randn(1, 2048, 16) + 0.5
    errors = {}
    exact, half = copy.deepcopy(module).double(), module.bfloat16()
    for p, q in zip(exact.parameters(), half.parameters(), strict=True):
        p.data = q.data.double()
    (exact(x.bfloat16().double()) * upstream.bfloat16().double()).sum().backward()
    for way in ("whole", "tiled"):
        half.zero_grad()
        if way == "tiled":
            Tiles(half).tokens = 4
        half(x.bfloat16()).backward(upstream.bfloat16())
        errors[way] = max(
            float((q.grad.double() - p.grad).norm() / p.grad.norm())  # pyright: ignore
            for p, q in zip(exact.parameters(), half.parameters(), strict=True)
        )
    assert errors["tiled"] < 1.2 * errors["whole"] + 1e-3, errors


def test_dropout_draws_again_what_it_drew():
    """Protects adapters with dropout: a tile that is computed again must drop the same."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Dropout(0.5)).train()
    x, upstream = torch.randn(1, 20, 8), torch.randn(1, 20, 8)
    plain = module[0](x).detach()
    Tiles(module).tokens = SMALL
    out = module(x)
    torch.rand(3)  # others draw in between
    out.backward(upstream)
    dropped = upstream * (out.detach() / plain)
    assert torch.allclose(module[0].weight.grad, dropped[0].T @ x[0], rtol=1e-4, atol=1e-5)  # pyright: ignore


def test_no_activation_of_an_mlp_is_kept_and_none_is_computed_three_times():
    """Protects the memory that tiles are for, and the time of a checkpointed layer."""
    module, x = MLP(), torch.randn(1, 100, 8, requires_grad=True)
    passes: list[int] = []
    each = Tiles(module)
    each.tokens, whole = SMALL, each.whole

    def counted(tile: Tensor) -> Tensor:
        passes.append(tile.shape[1])
        return whole(tile)

    each.whole = counted
    kept: list[int] = []

    def pack(saved: Tensor) -> Tensor:
        kept.append(saved.numel())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        module(x).sum().backward()
    assert max(kept) <= x.numel() and max(passes) == SMALL and sum(passes) == 200
    passes.clear()
    out = checkpoint(lambda y: y + module(2 * y), x, use_reentrant=False)
    assert isinstance(out, Tensor)
    out.sum().backward()
    assert sum(passes) == 200


@pytest.mark.parametrize(
    ("module", "found"),
    [(MLP(), ["MLP"]), (Mixing(), []), (InParts(), []), (Attending(), []), (nn.Linear(8, 8), [])],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "",
)
def test_what_computes_each_token_by_itself(module, found):
    """No list of known models decides what is tiled. The trial needs no weights, so a plan finds the same."""
    model = nn.ModuleDict({"norm": nn.LayerNorm(8), "part": module})
    assert [type(m).__name__ for m in token_wise(model, 8)] == found
    assert [type(m).__name__ for m in token_wise(model.to("meta"), 8)] == found


def test_models_that_cannot_be_tiled_are_refused_by_name():
    opt: dict[str, Any] = OPT
    with pytest.raises(UserError, match=r"no part of OPTForCausalLM computes .* model\.tiled_mlp=false"):
        Policy(transformers.OPTForCausalLM(transformers.OPTConfig(**opt)), tiled_mlp=True)
    with pytest.raises(UserError, match=r"model\.tiled_mlp=true: the load-balancing loss"):
        Policy(tiny("mixtral"), router_coefficient=0.1, tiled_mlp=True)


def test_the_self_check_sees_a_module_that_mixes_many_tokens(capsys):
    """Protects against what the trial on three tokens does not see, such as experts of limited capacity."""
    policy = Policy(tiny("llama_tied"), tiled_mlp=True)
    chosen(policy)
    assert "computes 2 LlamaMLP in tiles of 4096 tokens" in capsys.readouterr().out
    for each in policy.tiles:
        whole = each.whole

        def mixes(x: Tensor, whole=whole) -> Tensor:
            return whole(x + 0.1 * x.mean(1, keepdim=True) if x.shape[:2] == (1, CHECKED) else x)

        each.whole = mixes
    with pytest.raises(
        UserError, match=r"model\.tiled_mlp=true does not work with .*2 LlamaMLP in tiles, it cha"
    ):
        chosen(policy)


RUNS = {
    "zero1": ["engine=zero1", "model.gradient_checkpointing=offload"],
    "zero2": ["engine=zero2", "data.packing=padded"],
    "zero3": ["engine=zero3", "reference=online"],
    "zero3_lora": ["engine=zero3", "+model/lora=default", "model.gradient_checkpointing=true"],
    "together": ["engine=zero3", "engine.sequence_parallel=2", "model.gradient_checkpointing=true"],
}


def with_small_tiles(run_dirs: list[str]) -> None:
    tiles.TILE = 40  # one to seven in a row of these runs
    do_all(run_dirs)


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory) -> Path:
    """Whole runs of two ranks in tiles, and of one rank without."""
    root = tmp_path_factory.mktemp("tiles")
    common = [
        *["model=hf", f"model.path={tiny_model}", "model.dtype=float32", "data.num_proc=1"],
        f"data.path={write_jsonl(root / 'pairs.jsonl', make_pairs(12))}",
        *["data.max_length=130", "micro_batch_tokens=260", "steps=2", "batch_size=5"],
        # Adam forgets the size of a gradient unless epsilon is about as large.
        *["optimizer.lr=1e-3", "optimizer.eps=1e-3", "scorer.candidates_per_pair=2"],
        "optimizer.implementation=torch",
    ]

    def run(name: str, *overrides: str) -> Path:
        return freeze(root / name, *common, *overrides, f"cache_dir={root / 'cache' / name}")

    execute(1, [run("plain"), run("plain_lora", "+model/lora=default")])
    two = ["world_size=2", "model.tiled_mlp=true"]
    tiled = [run(name, *two, *overrides) for name, overrides in RUNS.items()]
    on_ranks(2, with_small_tiles, [str(run_dir) for run_dir in tiled])
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_training_in_tiles_is_that_of_all_tokens_at_once(runs, name):
    """Protects the hooks of ZeRO, by which weights are gathered and gradients reduced: ranks have different
    numbers of tiles."""
    ours, theirs = runs / name, runs / ("plain_lora" if "lora" in name else "plain")
    assert not (ours / ERROR_FILE).exists(), (ours / ERROR_FILE).read_text()
    for metric in ("loss", "grad_norm", "logps/chosen", "rewards/margins"):
        assert column(ours, metric) == pytest.approx(column(theirs, metric), rel=1e-5, abs=1e-5), metric
