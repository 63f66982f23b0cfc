"""DeepSpeed: the only file that imports it.

The loop owns gradient accumulation (the number of micro-batches varies from step to step), the learning rate and the
loss scale; DeepSpeed owns sharding, gradient reduction, clipping, master weights and the optimizer's state.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

# Checkpoints are data: nothing in them is executed, whatever flag a library passes to torch.load.
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
os.environ.setdefault("DS_ACCELERATOR", "cuda" if __import__("torch").cuda.is_available() else "cpu")

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor, nn

from sage.config import EngineConfig, OptimizerConfig
from sage.util.errors import UserError

T = TypeVar("T")
# DeepSpeed would compile a shared-memory all-reduce for CPU ranks, 40 seconds of a newcomer's first run; gloo serves.
deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
torch.serialization.add_safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address])
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def init_distributed() -> torch.device:
    """Join the process group (gloo on CPU, nccl on CUDA) and name this rank's device.

    A rank that no launcher started is a world of its own.

    Raises:
        UserError: this machine has fewer GPUs than ranks.
    """
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"world_size asks for more ranks than this machine's {torch.cuda.device_count()} GPUs"
            )
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    else:
        device = torch.device("cpu")
    backend = "nccl" if device.type == "cuda" else "gloo"
    if os.environ["WORLD_SIZE"] == "1" and not dist.is_initialized():
        # In memory: a free port that was looked up may be another's by the time it is listened on.
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    deepspeed.init_distributed(backend, verbose=False)
    return device


def build_optimizer(
    parameters: list[nn.Parameter], cfg: OptimizerConfig, offload: bool
) -> torch.optim.Optimizer:
    """AdamW: DeepSpeed's CPU one under offload and fused one on CUDA where they build, torch's otherwise.

    Weight decay leaves norms and biases alone.
    The loop gives the learning rate with every step; it is zero here so that DeepSpeed's trial step decays no weight.
    """
    options: dict[str, Any] = {"lr": 0.0, "betas": tuple(cfg.betas), "eps": cfg.eps}
    groups: list[dict[str, Any]] = [{"params": parameters, "weight_decay": cfg.weight_decay}]
    if cfg.weight_decay and (vectors := [p for p in parameters if p.ndim < 2]):
        groups[0]["params"] = [p for p in parameters if p.ndim >= 2]
        groups.append({"params": vectors, "weight_decay": 0.0})
    if cfg.implementation == "auto" and (offload or parameters[0].is_cuda):
        from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

        with suppress(Exception):  # without a compiler or CUDA toolkit, building it fails in many ways
            return (DeepSpeedCPUAdam if offload else FusedAdam)(groups, adamw_mode=True, **options)  # pyright: ignore
    return torch.optim.AdamW(groups, fused=True, **options)


class Ranks:
    """This rank's place among the others, and what they say to each other."""

    def __init__(self, device: torch.device):
        self.device = device

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        values = values.to(self.device)
        dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """One small Python object from every rank, in order, on every rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        dist.barrier()


class Frozen(Ranks):
    """A model that is only asked; `sharded` keeps a part of its weights on each rank, as ZeRO stage 3 does."""

    def __init__(self, policy: nn.Module, sharded: bool, dtype: torch.dtype, device: torch.device):
        super().__init__(device)
        for parameter in policy.parameters():
            parameter.requires_grad_(False)
        self.policy: Any = policy.to(device)
        self.model: Any = self.policy
        if sharded:
            config = deepspeed_config(EngineConfig(zero_stage=3), dtype, max_grad_norm=0.0)
            self.model = deepspeed.initialize(model=self.policy, config=config, dist_init_required=False)[0]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


class Engine(Ranks):
    """A policy under ZeRO, with the calls the loop needs."""

    def __init__(
        self,
        policy: nn.Module,
        engine: EngineConfig,
        optimizer: OptimizerConfig,
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__(device)
        self.dtype = dtype
        self.policy = policy.to(device)
        trainable = [p for p in policy.parameters() if p.requires_grad]
        self.max_grad_norm = optimizer.max_grad_norm
        # Without master weights and shards DeepSpeed wraps no optimizer, and then tells no gradient norm.
        self.unwrapped = trainable if engine.zero_stage == 0 and dtype == torch.float32 else None
        self.optimizer: Any
        self.deepspeed, self.optimizer, *_ = deepspeed.initialize(
            model=self.policy,
            model_parameters=trainable,  # pyright: ignore
            optimizer=build_optimizer(trainable, optimizer, engine.offload),
            config=deepspeed_config(engine, dtype, 0.0 if self.unwrapped else self.max_grad_norm),
            dist_init_required=False,
        )
        if engine.zero_stage == 0 and dtype == torch.bfloat16:
            # DeepSpeed took a step with zero gradients to allocate the state, and Adam's bias correction counts it.
            self.optimizer.state.clear()
            for group in self.optimizer.param_groups:
                group.pop("step", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.deepspeed(*args, **kwargs)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add this micro-batch's gradient; `last` marks the step's final micro-batch, on all ranks together.

        `loss` is this rank's share of the global mean. DeepSpeed averages gradients over ranks, we want their sum.
        """
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(loss * self.world_size)

    def step(self, lr: float) -> float:
        """Clip, update and zero the gradients; returns the global gradient norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.unwrapped:
            norm = nn.utils.clip_grad_norm_(self.unwrapped, self.max_grad_norm or torch.inf)
            self.deepspeed.step()
            return float(norm)
        self.deepspeed.step()
        return float(self.deepspeed.get_global_grad_norm())  # pyright: ignore

    def save(self, folder: Path) -> None:
        self.deepspeed.save_checkpoint(str(folder), tag="engine", save_latest=False)

    def load(self, folder: Path) -> None:
        loaded, _ = self.deepspeed.load_checkpoint(str(folder), tag="engine")
        if loaded is None:
            raise UserError(f"{folder}: the engine's state cannot be loaded")

    def full_state_dict(self) -> dict[str, Tensor] | None:
        """All weights of the policy on the CPU, gathered from shards; None on ranks other than 0."""
        if self.deepspeed.zero_optimization_partition_weights():
            return self.deepspeed._zero3_consolidated_16bit_state_dict()
        return {k: v.cpu() for k, v in self.policy.state_dict().items()} if self.rank == 0 else None


def deepspeed_config(engine: EngineConfig, dtype: torch.dtype, max_grad_norm: float) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        if engine.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if engine.zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return {
        "train_micro_batch_size_per_gpu": 1,  # the loop owns batches and accumulation
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "steps_per_print": 2**31,
    }
