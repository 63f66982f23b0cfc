"""Names of other libraries that sage uses although they are private or may move. One assertion each.

A failure here says which upgrade broke sage, and where to look, before any training run does.
"""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
import transformers


def parameters(function) -> set[str]:
    return set(inspect.signature(function).parameters)


def test_torch():
    assert callable(torch._softmax_backward_data)  # model/attention
    assert isinstance(torch.cpu._is_avx512_bf16_supported(), bool)  # model/kernels/recompute
    assert callable(torch.ops.mkldnn._is_mkldnn_bf16_supported)  # model/kernels/recompute
    assert callable(torch.distributed.HashStore)  # model/engine: a group without a port
    assert callable(torch.serialization.add_safe_globals)  # model/engine: checkpoints
    assert callable(F.scaled_dot_product_attention)


def test_deepspeed():
    import deepspeed
    from deepspeed.ops.op_builder.builder import CUDAMismatchException, MissingCUDAException
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils import safe_get_full_grad  # tests/test_engine
    from deepspeed.utils.tensor_fragment import fragment_address

    import sage.model.engine  # noqa: F401  imports it quietly, and with our settings

    assert deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] is False
    assert issubclass(MissingCUDAException, Exception) and issubclass(CUDAMismatchException, Exception)
    assert all(
        map(callable, (DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address, safe_get_full_grad))
    )
    assert {
        "enabled",
        "check_grad_overflow",
        "immediate_grad_update",
    } <= DeepSpeedBF16Config.model_fields.keys()


@pytest.mark.parametrize(
    "name",
    [
        "_zero3_consolidated_16bit_state_dict",
        "get_global_grad_norm",
        "load_checkpoint",
        "save_checkpoint",
        "set_gradient_accumulation_boundary",
        "was_step_applied",
        "zero_optimization_partition_weights",
    ],
)
def test_deepspeed_engine(name):
    from deepspeed import DeepSpeedEngine

    import sage.model.engine  # noqa: F401

    assert callable(getattr(DeepSpeedEngine, name))


def test_deepspeeds_optimizers_name_decoupled_weight_decay_differently():
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    import sage.model.engine  # noqa: F401

    assert "adam_w_mode" in parameters(FusedAdam.__init__)
    assert "adamw_mode" in parameters(DeepSpeedCPUAdam.__init__)


def test_transformers():
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = transformers.LlamaForCausalLM(config)
    assert isinstance(model.config._attn_implementation, str)  # model/policy, model/loading
    assert callable(model.set_attn_implementation)
    assert model.base_model is model.model and isinstance(model.get_output_embeddings(), torch.nn.Linear)
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    assert any(callable(getattr(model, name, None)) for name in names)  # model/loading


def test_transformers_tokenizers_encode_in_one_place():
    assert callable(transformers.PreTrainedTokenizerFast._encode_plus)  # data/chat: a class may replace it


def test_transformers_reports_missing_unexpected_and_mismatched_weights(tiny_model):
    _, info = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, output_loading_info=True)
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= info.keys()  # model/loading


def test_peft():
    peft = pytest.importorskip("peft")
    for name in ("disable_adapter", "get_base_model", "merge_and_unload"):
        assert hasattr(peft.PeftModel, name) or hasattr(peft.tuners.lora.LoraModel, name), name
