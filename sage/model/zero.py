"""What DeepSpeed is asked for."""

from __future__ import annotations

from typing import Any

import torch

from sage.config import EngineConfig

BUCKET = 500_000_000  # elements of the buffer through which gradients are reduced, at most


def deepspeed_config(
    engine: EngineConfig, dtype: torch.dtype, max_grad_norm: float, trainable: int = BUCKET
) -> dict[str, Any]:
    """`trainable` is how many elements are trained."""
    half = dtype == torch.bfloat16
    # In stage 0 DeepSpeed cannot accumulate bfloat16 gradients in float32. Stage 1 can, for the same weights
    # and in less memory.
    stage = max(engine.zero_stage, 1) if half else engine.zero_stage
    # CUDA allocates the whole bucket, and an adapter fills little of one.
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": min(trainable, BUCKET)}
    if engine.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    config = {
        "train_micro_batch_size_per_gpu": 1,  # the loop owns batches and accumulation
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": half, "check_grad_overflow": True, "immediate_grad_update": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 2**31,
    }
    if half and stage == 1:
        # Ranks exchange gradients once a step, so this costs little. Stages 2 and 3 exchange those of every
        # micro-batch: in bfloat16, since such rounding errors do not build up.
        config["communication_data_type"] = "fp32"
    return config
