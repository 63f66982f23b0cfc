"""DeepSpeed: no other file imports it.

The loop owns gradient accumulation (the number of micro-batches differs from step to step) and the learning
rate. DeepSpeed owns sharding, gradient reduction, clipping, master weights and the optimizer's state.
"""

from __future__ import annotations

import gc
import io
import logging
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any
from unittest.mock import patch

# Checkpoints are data: nothing in them is executed, whatever flag a library passes to torch.load.
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
os.environ.setdefault("DS_ACCELERATOR", "cuda" if __import__("torch").cuda.is_available() else "cpu")

import deepspeed
import torch
from deepspeed.ops.op_builder.builder import CUDAMismatchException, MissingCUDAException
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import set_z3_leaf_module
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor, nn

from sage.config import EngineConfig, OptimizerConfig
from sage.model.resharding import reshard_groups, reshard_parameters, share
from sage.model.sharding import check_weights, is_split, shape_of, size_of
from sage.model.tiles import tiled
from sage.model.zero import deepspeed_config
from sage.util import ranks
from sage.util.errors import UserError, describe
from sage.util.files import without_wildcards
from sage.util.progress import console

# DeepSpeed asks whether the optimizer is Muon. To compile Muon's functions for that takes over a second.
with patch("deepspeed.runtime.compiler.compile", lambda *_, **__: lambda function: function):
    import deepspeed.runtime.zero.muon.muon_optimizer
# For CPU ranks DeepSpeed would compile a shared-memory all-reduce, which adds 40 seconds to the first run.
# gloo is good enough.
deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
torch.serialization.add_safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address])
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# What compiling one of DeepSpeed's optimizers raises without a compiler, ninja or the right CUDA toolkit.
CANNOT_BUILD = (
    CalledProcessError,
    CUDAMismatchException,
    ImportError,
    MissingCUDAException,
    OSError,
    RuntimeError,
)


def init_distributed() -> torch.device:
    """Join the process group (gloo on CPU, nccl on CUDA) and return this rank's device.

    A rank that no launcher started becomes a world of one.

    Raises:
        UserError: this machine has fewer GPUs than ranks.
    """
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if torch.cuda.is_available():
        if ranks.local_rank() >= torch.cuda.device_count():
            raise UserError(
                f"world_size asks for more ranks than this machine's {torch.cuda.device_count()} GPUs"
            )
        torch.cuda.set_device(ranks.local_rank())
        device = torch.device("cuda", ranks.local_rank())
    else:
        device = torch.device("cpu")
    on_gpu = device.type == "cuda"
    backend = "nccl" if on_gpu else "gloo"
    ranks.join(backend, device if on_gpu else None)
    deepspeed.init_distributed(backend, verbose=False)
    return device


def build_optimizer(
    parameters: list[nn.Parameter], cfg: OptimizerConfig, offload: bool
) -> torch.optim.Optimizer:
    """AdamW: DeepSpeed's CPU Adam under offload and its fused Adam on CUDA if they build, else torch's.

    Norms and biases get no weight decay. The learning rate is zero here: the loop sets it in every step.
    """
    options: dict[str, Any] = {"lr": 0.0, "betas": tuple(cfg.betas), "eps": cfg.eps}
    groups: list[dict[str, Any]] = [{"params": parameters, "weight_decay": cfg.weight_decay}]
    if cfg.weight_decay and (vectors := [p for p in parameters if len(shape_of(p)) < 2]):
        groups[0]["params"] = [p for p in parameters if len(shape_of(p)) >= 2]
        groups.append({"params": vectors, "weight_decay": 0.0})
    if cfg.implementation == "auto" and (offload or parameters[0].is_cuda):
        optimizer, reason = None, ""
        try:
            optimizer = _deepspeed_adam(groups, offload, options)
        except CANNOT_BUILD as e:
            reason = describe(e)
        if not (failed := [r for r in ranks.gather(reason) if r]) and optimizer is not None:
            return optimizer
        console.print(
            f"DeepSpeed's Adam does not build here ({failed[0]}): using torch's AdamW, which is slower"
        )
    return torch.optim.AdamW(groups, fused=True, **options)


def _deepspeed_adam(groups: list[dict[str, Any]], offload: bool, options: dict[str, Any]) -> Any:
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    name = "CPU Adam" if offload else "fused Adam"
    console.print(
        f"loading DeepSpeed's {name}: the first time on a machine it is compiled, which takes minutes"
    )
    if offload:
        return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    return FusedAdam(groups, adam_w_mode=True, **options)


def split_weights(module: nn.Module, engine: EngineConfig, dtype: torch.dtype) -> None:
    """Split the weights of a module over the ranks, as stage 3 does, but not those that are split already."""
    deepspeed.zero.Init(module=module, config_dict_or_path=deepspeed_config(engine, dtype, 0.0), dtype=dtype)


def gathered(weights: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
    """These weights, whole on every rank for a while. Every rank enters it. Changes are lost at its end."""
    return deepspeed.zero.GatheredParameters(list(weights))


def master_weight(weight: nn.Parameter) -> Tensor:
    """The float32 weight behind a trained bfloat16 one, whole on every rank. Every rank calls this."""
    return deepspeed.utils.safe_get_full_fp32_param(weight)  # pyright: ignore


def set_master_weight(weight: nn.Parameter, value: Tensor) -> None:
    """Set the float32 weight behind a trained bfloat16 one to `value`, which is whole."""
    if not is_split(weight):
        deepspeed.utils.safe_set_full_fp32_param(weight, value)
        return
    size = deepspeed.utils.safe_get_local_fp32_param(weight).numel()
    part = share([value.flatten()], value.numel(), size, ranks.rank())
    deepspeed.utils.safe_set_local_fp32_param(weight, part)


@contextmanager
def tiles_gathered_once(policy: nn.Module) -> Iterator[None]:
    """Let the stage 3 that starts meanwhile gather the weights of a tiled module where it is called.

    It would gather those of each of its parts for each tile, and ranks have different numbers of tiles.
    """
    modules = tiled(policy)
    parts = [part for module in modules for part in module.modules() if part is not module]
    hooks = [found for part in parts for found in (part._forward_pre_hooks, part._forward_hooks)]
    before = [dict(found) for found in hooks]
    yield
    for found, own in zip(hooks, before, strict=True):
        found.clear()
        found.update(own)
    for module in modules:
        set_z3_leaf_module(module, True)


class Frozen:
    """A model for forward passes only; `sharded` splits its weights over the ranks, as ZeRO stage 3 does."""

    def __init__(self, policy: nn.Module, sharded: bool, dtype: torch.dtype, device: torch.device):
        self.device = device
        check_weights(policy)
        for parameter in policy.parameters():
            parameter.requires_grad_(False)
        self.policy: Any = policy.to(device)
        self.model: Any = self.policy
        if sharded:
            config = deepspeed_config(EngineConfig(zero_stage=3), dtype, max_grad_norm=0.0)
            with tiles_gathered_once(policy):
                self.model, *_ = deepspeed.initialize(model=policy, config=config, dist_init_required=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def close(self) -> None:
        """Let go of the model, so that its memory can be used."""
        if self.model is not self.policy:
            self.model.destroy()
        self.model = self.policy = None
        gc.collect()  # DeepSpeed's hooks and the model refer to each other
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class Engine:
    """A policy under ZeRO, with the calls that the loop needs."""

    def __init__(
        self,
        policy: nn.Module,
        engine: EngineConfig,
        optimizer: OptimizerConfig,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.device = device
        check_weights(policy)
        self.dtype = dtype
        self.policy = policy.to(device)
        trainable = [p for p in policy.parameters() if p.requires_grad]
        self.partly_frozen = len(trainable) < len(list(policy.parameters()))
        self.max_grad_norm = optimizer.max_grad_norm
        # Without master weights and shards DeepSpeed does not wrap the optimizer. It then reports no norm and
        # applies any update, so clipping and checking are up to us.
        self.unwrapped = trainable if engine.zero_stage == 0 and dtype == torch.float32 else None
        adam = build_optimizer(trainable, optimizer, engine.offload)
        self.optimizer_class = type(adam).__name__
        # The elements of each parameter, per optimizer group.
        self.numels = [[size_of(p) for p in g["params"]] for g in adam.param_groups]
        self.optimizer: Any  # DeepSpeed's wrapper around it
        clip = 0.0 if self.unwrapped else self.max_grad_norm
        config = deepspeed_config(engine, dtype, clip, sum(map(sum, self.numels)))
        # DeepSpeed prints its memory use, whatever the log level.
        with redirect_stdout(io.StringIO()), tiles_gathered_once(policy):
            self.deepspeed, self.optimizer, *_ = deepspeed.initialize(
                model=self.policy,
                model_parameters=trainable,  # pyright: ignore
                optimizer=adam,
                config=config,
                dist_init_required=False,
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.deepspeed(*args, **kwargs)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add this micro-batch's gradient to the step's, in float32.

        Every rank calls this equally often, with `last` in the same call: it marks the step's final
        micro-batch. `loss` is this rank's share of the global mean. DeepSpeed averages gradients over ranks;
        we want their sum.
        """
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(loss * ranks.world_size())

    def step(self, lr: float) -> float:
        """Clip, update and zero the gradients. Returns the global gradient norm before clipping.

        If that norm is not finite, weights and optimizer state stay as they are, on all ranks.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.unwrapped:
            norm = float(nn.utils.clip_grad_norm_(self.unwrapped, self.max_grad_norm or torch.inf))
            if math.isfinite(norm):
                self.deepspeed.step()
            else:
                self.deepspeed.zero_grad()
            return norm
        self.deepspeed.step()
        norm = float(self.deepspeed.get_global_grad_norm())  # pyright: ignore
        assert math.isfinite(norm) == self.deepspeed.was_step_applied()
        return norm

    def save(self, folder: Path) -> None:
        """Write weights, master weights and the optimizer's state, but not an adapter's frozen base."""
        # A sharded weight has no elements here.
        frozen = {p.data_ptr() for p in self.policy.parameters() if p.numel() and not p.requires_grad}

        def drop_frozen(module: nn.Module, weights: dict[str, Tensor], *_: Any) -> None:
            for name in [name for name, weight in weights.items() if weight.data_ptr() in frozen]:
                del weights[name]

        # DeepSpeed leaves frozen parameters out, but not the second name of a tied one, which is the largest.
        hook = self.policy.register_state_dict_post_hook(drop_frozen)
        self.deepspeed.save_checkpoint(
            str(folder), tag="engine", save_latest=False, exclude_frozen_parameters=self.partly_frozen
        )
        hook.remove()

    def load(self, folder: Path, world_size: int) -> None:
        """Read what `save` wrote, on `world_size` ranks."""
        if world_size == ranks.world_size() or self.unwrapped:  # else nothing is sharded
            return self._load(folder)
        shards = [self._shard(folder, rank) for rank in range(world_size)]
        if self.deepspeed.zero_optimization_partition_weights():
            numels = [n for group in self.numels for n in group]
            now = self.optimizer.state_dict()
            shard = reshard_parameters(shards, numels, now, ranks.rank(), ranks.world_size())
            self.optimizer.checkpoint_event_prologue()  # as load_checkpoint does
            self.optimizer.load_state_dict([shard] * ranks.world_size())
            self.optimizer.checkpoint_event_epilogue()
            return
        self._load(folder, load_optimizer_states=False)  # the weights, which each rank holds whole
        sizes = [group["params"][0].numel() for group in self.optimizer.param_groups]
        shard = reshard_groups(shards, [sum(group) for group in self.numels], sizes, ranks.rank())
        with redirect_stdout(io.StringIO()):
            self.optimizer.load_state_dict([shard] * ranks.world_size(), load_from_fp32_weights=True)

    def _load(self, folder: Path, **options: bool) -> None:
        with redirect_stdout(io.StringIO()), without_wildcards(folder) as plain:
            loaded, _ = self.deepspeed.load_checkpoint(
                str(plain), tag="engine", load_module_strict=not self.partly_frozen, **options
            )
        if loaded is None:
            raise UserError(f"{folder}: the engine's state cannot be loaded")

    def _shard(self, folder: Path, rank: int) -> dict[str, Any]:
        found = list((folder / "engine").glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))
        if len(found) != 1:
            raise UserError(f"{folder}: the optimizer's state of rank {rank} is not there")
        return torch.load(found[0], map_location="cpu", mmap=True, weights_only=True)["optimizer_state_dict"]

    def full_state_dict(self) -> dict[str, Tensor] | None:
        """All weights of the policy on the CPU, gathered from shards; None on ranks other than 0."""
        if self.deepspeed.zero_optimization_partition_weights():
            return self.deepspeed._zero3_consolidated_16bit_state_dict()
        return {k: v.cpu() for k, v in self.policy.state_dict().items()} if ranks.rank() == 0 else None
