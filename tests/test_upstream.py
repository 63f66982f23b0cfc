"""Names of other libraries that sage uses although they are private or may move. One assertion each.

A failure here says which upgrade broke sage, and where to look, before any training run does.
"""

from __future__ import annotations

import importlib.util
import inspect

import datasets
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import REPO
from hydra import compose, initialize_config_module
from hydra.conf import RuntimeConf
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException
from torch.nn.attention.flex_attention import create_block_mask
from transformers.utils.chat_template_utils import _compile_jinja_template

from sage.model.sharding import READ, is_split


def parameters(function) -> set[str]:
    return set(inspect.signature(function).parameters)


def test_torch():
    assert callable(torch.ops.aten._softmax_backward_data)  # model/attention
    assert "_compile" in parameters(create_block_mask)  # model/attention
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

    # Muon is imported before DeepSpeed asks for it, and its functions are as they are written.
    muon = deepspeed.runtime.zero.muon.original_muon.muon_update
    assert inspect.isfunction(muon) and not hasattr(muon, "_torchdynamo_orig_callable")
    assert deepspeed.runtime.compiler.compile() is torch.compile
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


def test_deepspeeds_names_of_what_a_shard_holds():
    from deepspeed.checkpoint import constants

    from sage.model import resharding

    assert constants.SINGLE_PARTITION_OF_FP32_GROUPS == resharding.WEIGHTS_12
    assert constants.BASE_OPTIMIZER_STATE == resharding.INNER_12
    assert constants.FP32_FLAT_GROUPS == resharding.WEIGHTS_3
    assert constants.OPTIMIZER_STATE_DICT == resharding.INNER_3


def test_deepspeeds_stage_3_is_made_ready_for_a_checkpoint():
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    assert callable(DeepSpeedZeroOptimizer_Stage3.checkpoint_event_prologue)  # model/engine
    assert callable(DeepSpeedZeroOptimizer_Stage3.checkpoint_event_epilogue)


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


def test_transformers_offloads_by_one_name():
    import transformers.modeling_utils as upstream

    if not hasattr(upstream, "save_on_cpu"):  # older ones cannot offload
        pytest.skip("this transformers does not offload")
    assert upstream.save_on_cpu is torch.autograd.graph.save_on_cpu  # model/memory replaces it
    assert "offload" in parameters(transformers.LlamaForCausalLM.activation_checkpointing_enable)


def test_deepspeeds_stage_3_gathers_what_is_marked_as_one():
    from deepspeed.runtime.zero.partitioned_param_coordinator import iter_params
    from deepspeed.utils import set_z3_leaf_module, z3_leaf_module

    module = torch.nn.Sequential(torch.nn.Linear(1, 1))
    set_z3_leaf_module(module, True)  # model/engine
    assert z3_leaf_module(module) and callable(iter_params) and "recurse" in parameters(iter_params)
    assert isinstance(module._forward_hooks, dict) and isinstance(module._forward_pre_hooks, dict)


def test_transformers_compiles_chat_templates_in_one_place():
    assert callable(_compile_jinja_template("{{ messages }}").render)  # data/chat
    assert _compile_jinja_template("{{ messages }}") is _compile_jinja_template("{{ messages }}")


def test_transformers_tokenizers_encode_in_one_place():
    assert callable(transformers.PreTrainedTokenizerFast._encode_plus)  # data/chat: a class may replace it


def test_transformers_reports_missing_unexpected_and_mismatched_weights(tiny_model):
    _, info = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, output_loading_info=True)
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= info.keys()  # model/loading


def test_transformers_marks_the_weights_that_it_has_read(tiny_model):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    assert all(getattr(p, READ) for p in model.parameters())  # model/sharding


def test_deepspeed_marks_the_weights_that_it_has_split():
    from deepspeed.runtime.zero.partition_parameters import is_zero_param

    weight = torch.nn.Parameter(torch.zeros(1))
    assert not is_zero_param(weight) and not is_split(weight)
    weight.ds_id = 0
    assert is_zero_param(weight) and is_split(weight)  # model/sharding


def test_transformers_attention_can_be_registered():
    for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
        assert parameters(interface.register) == {"key", "value"}  # model/attention


def test_transformers_dynamic_rope_forgets_a_long_text():
    """model/rope and answering/decoders make a short call to this end. Before 5.13 it did not forget."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    config = transformers.LlamaConfig(
        hidden_size=8, num_attention_heads=1, max_position_embeddings=4, rope_parameters=rope
    )
    module, x = LlamaRotaryEmbedding(config), torch.zeros(1, 1, 1)
    assert list(inspect.signature(module.forward).parameters)[:2] == ["x", "position_ids"]
    short, _, again = (module(x, torch.tensor([[0, last]]))[0] for last in (1, 9, 1))
    assert torch.equal(short, again)


def test_transformers_cache_is_made_of_layers_that_may_be_ours():
    from transformers.cache_utils import DynamicLayer

    cache = transformers.DynamicCache()
    cache.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), 0)
    (layer,) = cache.layers  # answering/decoders
    assert type(layer) is DynamicLayer and layer.is_initialized
    assert layer.keys.shape == layer.values.shape == (1, 1, 2, 4)  # [batch, heads, columns, size]
    assert layer.keys.device == layer.device
    assert "layers" in parameters(transformers.Cache.__init__)


def test_datasets_is_a_thin_cover_of_an_arrow_table(tmp_path):
    table = pa.table({"x": [1, 2]})
    data = datasets.Dataset(table)  # data/files, data/pairs
    assert data.data.table.equals(table)  # data/tokens
    assert "new_fingerprint" in parameters(datasets.Dataset.map)  # data/tokens
    with pa.ipc.new_stream(str(tmp_path / "x.arrow"), table.schema) as writer:  # data/tokens
        writer.write_table(table)
    assert datasets.Dataset.from_file(str(tmp_path / "x.arrow")).data.table.equals(table)


def test_datasets_finds_the_files_of_a_folder(tmp_path):
    (tmp_path / "test.jsonl").write_text('{"x": 1}\n')
    files = datasets.load_dataset_builder(str(tmp_path)).config.data_files  # data/source
    assert {split: list(map(str, names)) for split, names in files.items()} == {
        "test": [str(tmp_path / "test.jsonl")]
    }


def test_hydra_reads_one_override():
    override = OverridesParser.create().parse_override("+a.b='c=d'")  # cli, config/keys
    assert (override.key_or_group, override.value()) == ("a.b", "c=d")


def test_hydra_keeps_what_was_typed():
    import sage.config  # noqa: F401  registers the schemas

    with initialize_config_module("sage.conf", version_base="1.3"):
        composed = compose("train", ["seed=3", "hydra.verbose=false"], return_hydra_config=True)
    HydraConfig.instance().set_config(composed)
    hydra_config = HydraConfig.get()  # cli
    assert hydra_config.overrides.task == ["seed=3"]
    assert "hydra.verbose=false" in hydra_config.overrides.hydra
    assert "output_dir" in RuntimeConf.__dataclass_fields__


def test_hydra_names_the_key_that_it_refuses():
    import sage.config  # noqa: F401

    with (
        initialize_config_module("sage.conf", version_base="1.3"),
        pytest.raises(ConfigCompositionException) as refusal,
    ):
        compose("train", ["data.nonsense=1"])
    texts = f"{refusal.value} {refusal.value.__cause__}"  # cli reads the key out of these words
    assert "full_key: data.nonsense" in texts and "Could not override 'data.nonsense'" in texts


def test_every_dependency_has_a_lower_bound_and_ends_before_a_major_version():
    """What sage touches above may go away in a major release. `make lowest` tests the lower bounds."""
    spec = importlib.util.spec_from_file_location("lower_bounds", REPO / "scripts" / "lower_bounds.py")
    lower_bounds = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lower_bounds)
    project = lower_bounds.project(REPO / "pyproject.toml")
    shipped = lower_bounds.requirements(project, "lora", "vllm", "demo")
    assert {"torch", "transformers", "peft", "vllm", "gguf"} <= {requirement.name for requirement in shipped}
    for requirement in shipped:
        assert lower_bounds.bound(requirement, ">="), requirement
        upper = lower_bounds.bound(requirement, "<")
        assert upper and upper.isdecimal(), requirement


def test_peft():
    peft = pytest.importorskip("peft")
    for name in ("disable_adapter", "get_base_model", "merge_and_unload"):
        assert hasattr(peft.PeftModel, name) or hasattr(peft.tuners.lora.LoraModel, name), name
