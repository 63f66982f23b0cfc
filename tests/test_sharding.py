"""ZeRO-3: weights are split over the ranks as they are read, and exported without gathering the model."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from forks import on_ranks
from many_runs import freeze

DTYPES = ("float32", "bfloat16")
ADAPTERS = {  # whose loading reads or sets weights of the model
    "dora": {"use_dora": True},
    "bias": {"bias": "all"},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "tokens": {"trainable_token_indices": [5, 7]},
}
MODELS = ("tied", "untied", "biased", "experts")


def measure(folder: Path) -> dict[str, dict]:
    """Per model and dtype, what differs between a sharded policy and a whole one. Every rank calls this."""
    import torch

    from sage import config
    from sage.config import EngineConfig, OptimizerConfig
    from sage.model import export as exporting
    from sage.model import loading
    from sage.model.adapters import needs_whole_model
    from sage.model.engine import build_optimizer, gathered, init_distributed, split_weights
    from sage.model.export import export, export_sharded, splits_into_layers
    from sage.model.policy import Policy
    from sage.model.sharding import is_split, load_sharded, own_part
    from sage.util import ranks

    init_distributed()
    exporting.SMALLEST = 1  # so that tiny models fill several files
    found = {}
    for run in sorted(path for path in folder.iterdir() if (path / "config.yaml").exists()):
        cfg = config.load(run)
        dtype, source = getattr(torch, cfg.model.dtype), cfg.model.path

        def read(cfg=cfg, dtype=dtype, source=source):
            model = loading.load_model(source, cfg.model, dtype, 0)
            generator = torch.Generator().manual_seed(1)
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.data = torch.randn(weight.shape, generator=generator).to(weight.dtype) * 1e-3
            return model

        late: list[str] = []

        def read_and_look(read=read, late=late):
            model = read()
            late += [n for n, p in model.named_parameters() if not is_split(p) and "lora_" not in n]
            return model

        whole = read()
        split = partial(split_weights, engine=EngineConfig(zero_stage=3), dtype=dtype)
        sharded = load_sharded(read_and_look, split, dtype, at_once=needs_whole_model(cfg.model))
        differ, part, total, state = [], 0, 0, {}
        ours = dict(sharded.named_parameters(remove_duplicate=False))
        for name, weight in whole.named_parameters(remove_duplicate=False):
            with gathered([ours[name]]):
                if not torch.equal(ours[name].data, weight.data.to(dtype)):
                    differ.append(name)
            state[f"model.{name}"] = weight.data.to(dtype)
        for weight in sharded.parameters():
            part, total = part + own_part(weight).numel(), total + weight.ds_numel
        buffers = dict(sharded.named_buffers())
        differ += [n for n, b in whole.named_buffers() if not torch.equal(buffers[n], b)]

        decay = OptimizerConfig(weight_decay=0.1, implementation="torch")
        optimizers = [build_optimizer(list(m.parameters()), decay, False) for m in (sharded, whole)]
        groups = [[(g["weight_decay"], len(g["params"])) for g in o.param_groups] for o in optimizers]

        policy = Policy(sharded)
        policy.set_mode(True)  # as after a step with gradient checkpointing
        tokenizer = loading.load_tokenizer(source, cfg.model)
        if by_layers := splits_into_layers(policy):
            export_sharded(run / "sharded", policy, cfg, tokenizer)
        if ranks.rank() == 0:
            export(run / "whole", state, source, cfg, tokenizer)
        ranks.barrier()
        again = [p.numel() for p in sharded.parameters() if p.numel()]
        parts = ranks.gather(part)
        found[run.name] = {
            "differ": differ,
            "groups": groups,
            "late": late,
            "by_layers": by_layers,
            "parts": parts,
            "total": total,
            "still_gathered": again,
        }
    return found


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory) -> Path:
    import peft
    import torch
    import transformers

    root = tmp_path_factory.mktemp("sharding")
    for name in (*MODELS[1:], "positions", "two_heads"):
        model = shutil.copytree(tiny_model, root / f"model_{name}")
        (model / "model.safetensors").unlink()
        torch.manual_seed(1)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
        sizes = {
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": False,
        }
        if name == "experts":
            config = transformers.Qwen3MoeConfig(
                **sizes, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8
            )
        elif name == "positions":
            config = transformers.PegasusConfig(
                vocab_size=len(tokenizer),
                d_model=32,
                max_position_embeddings=256,
                **{f"{part}_{key}": 2 for part in ("encoder", "decoder") for key in ("layers", "ffn_dim")},
                **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
            )
        elif name == "biased":  # its head shares the embedding and has a bias of its own
            config = transformers.PhiConfig(**sizes | {"tie_word_embeddings": True}, embd_pdrop=0.1)
        else:
            config = transformers.LlamaConfig(**sizes)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(model)
        if name == "two_heads":  # the config ties the head, and the files hold one of its own
            text = (model / "config.json").read_text().replace('embeddings": false', 'embeddings": true')
            (model / "config.json").write_text(text)
    for name, options in ADAPTERS.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(root / "model_untied")
        peft.get_peft_model(
            model, peft.LoraConfig(**{"target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options)
        ).save_pretrained(root / f"adapter_{name}")
    for name, source, more in [
        ("positions", root / "model_positions", []),
        ("two_heads", root / "model_two_heads", []),
        *(
            (n, root / "model_untied", ["+model/lora=default", f"model.adapter_path={root}/adapter_{n}"])
            for n in ADAPTERS
        ),
    ]:
        freeze(
            root / name,
            *["model=hf", f"model.path={source}", "data.path=none.jsonl", "steps=1", *more],
            *["model.dtype=float32", "data.max_length=130", "micro_batch_tokens=260"],
        )
    for name in MODELS:
        source = tiny_model if name == "tied" else root / f"model_{name}"
        for dtype in DTYPES:
            freeze(
                root / f"{name}-{dtype}",
                *["model=hf", f"model.path={source}", "data.path=none.jsonl", "steps=1"],
                *[f"model.dtype={dtype}", "data.max_length=130", "micro_batch_tokens=260"],
            )
            if name != "experts":
                freeze(
                    root / f"{name}-lora-{dtype}",
                    *["model=hf", f"model.path={source}", "data.path=none.jsonl", "steps=1"],
                    *[f"model.dtype={dtype}", "data.max_length=130", "micro_batch_tokens=260"],
                    "+model/lora=default",
                    *(["model.lora.targets=[q_proj,embed_tokens]"] if name == "untied" else []),
                )
    return root


@pytest.fixture(scope="module")
def found(folder) -> dict[str, dict]:
    return on_ranks(2, measure, folder)[0]


def content(path: Path) -> dict:
    from safetensors.torch import load_file

    return {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}


RUNS = [
    f"{m}{lora}-{d}"
    for m in MODELS
    for lora in ("", "-lora")
    for d in DTYPES
    if (m, lora) != ("experts", "-lora")
]


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_a_sharded_model_is_the_whole_one_split_as_it_is_read(found, run):
    """Bit for bit, also where experts are stacked on the way, weights are tied, and an adapter is added."""
    assert found[run]["differ"] == []
    assert found[run]["late"] == []  # split only after the whole model had been read
    assert sum(found[run]["parts"]) == found[run]["total"]
    ours, right = found[run]["groups"]
    assert ours == right and len(right) == 2  # weight decay goes by the shape of the whole weight
    assert max(found[run]["parts"]) < 0.52 * found[run]["total"]


def test_an_adapter_is_merged_for_an_export_and_not_in_the_policy():
    """On one rank in float32 best/ would otherwise leave the adapter's change in the base, and training would
    go on from there."""
    import peft
    import torch

    from sage.model.export import merged_weights

    config = peft.LoraConfig(target_modules=["0"], init_lora_weights=False)
    layer = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config).base_model.model[0]
    before = {name: weight.clone() for name, weight in layer.state_dict().items()}
    merged = merged_weights("layer", layer, set())
    assert all(weight.equal(before[name]) for name, weight in layer.state_dict().items())
    assert not merged["layer.weight"].equal(before["base_layer.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("run", ["positions", "two_heads", *ADAPTERS])
def test_what_needs_whole_weights_is_split_after_it_has_been_read(found, folder, run):
    """A model that looks at a weight it has read, one whose tied weights differ in its files, and adapters
    that change or look at weights of the model."""
    assert found[run]["differ"] == [] and found[run]["late"]
    assert max(found[run]["parts"]) < 0.52 * found[run]["total"]
    assert found[run]["by_layers"] == (run != "tokens")  # peft moves the embedding to another name
    if run != "tokens":
        mine, right = content(folder / run / "sharded"), content(folder / run / "whole")
        assert mine.keys() == right.keys()
        assert all((mine[k] - right[k]).abs().max() < 1e-6 for k in right)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sharded", "whole"])
def test_an_exported_head_of_its_own_is_not_tied_by_the_config(found, folder, how):
    """Protects tools that believe the config: they would put the embedding in the head's place."""
    run = folder / "two_heads" / how
    head, embedding = (content(run)[name] for name in ("lm_head.weight", "model.embed_tokens.weight"))
    config = json.loads((run / "config.json").read_text())
    assert not head.equal(embedding) and not config["tie_word_embeddings"]


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_a_sharded_export_is_that_of_the_whole_model(found, folder, run):
    """Several files, one after another, hold what one file would: names, values, config and adapter."""
    ours, theirs = folder / run / "sharded", folder / run / "whole"
    index = json.loads((ours / "model.safetensors.index.json").read_text())
    for part in ("", "adapter") if "lora" in run else ("",):
        mine, right = content(ours / part), content(theirs / part)
        assert mine.keys() == right.keys()
        assert all(mine[k].dtype == right[k].dtype and mine[k].equal(right[k]) for k in right)
    assert index["weight_map"].keys() == content(ours).keys()
    assert all((ours / name).is_file() for name in index["weight_map"].values())
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (ours / name).read_text() == (theirs / name).read_text(), name
    assert found[run]["still_gathered"] == []
    names = {p.relative_to(theirs) for p in theirs.rglob("*") if p.suffix != ".safetensors"}
    assert names < {p.relative_to(ours) for p in ours.rglob("*")}
