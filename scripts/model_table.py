"""Which models of transformers sage can train, and how: build each in a tiny form, ask, and write
docs/models.md.

    python scripts/model_table.py docs/models.md            # about 30 minutes on one core
    python scripts/model_table.py docs/models.md TYPE ...   # make the rows of these types anew
    python scripts/model_table.py - TYPE ...                # only to the terminal

The oracle here is independent of sage: one text at a time through `model(input_ids).logits`, in float32.
"""

from __future__ import annotations

import copy
import logging
import multiprocessing
import os
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import datasets
import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sage.answering.agreement import find_decoder
from sage.answering.decoders import PlainGenerate
from sage.data.packing import collate
from sage.data.tokens import Pair, TokenizedPairs
from sage.model.policy import OWN, Policy
from sage.model.selfcheck import check_unwrapped, settle
from sage.util.errors import UserError, first_line
from sage.util.progress import console

VOCABULARY, LONGEST = 96, 96
SECONDS = 240  # for one model, on a busy machine
TOLERANCE = 1e-3  # nats per token, in float32
SCALE = 0.15  # standard deviation of the weights: an error shows
# Values for whatever field of a config has this name.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "embed_dim", "word_embed_proj_dim", "lru_width"), 32
    ),
    **dict.fromkeys(("hidden_size_global", "attention_hidden_size", "embedding_size", "dim"), 32),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim"), 48
    ),
    **dict.fromkeys(("ffn_hidden_size", "intermediate_size_mlp", "shared_intermediate_size"), 48),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "dense_intermediate_size"), 24
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("encoder_layers",), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "multi_query_group_num", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(
        ("head_dim", "attention_head_dim", "global_head_dim", "v_head_dim", "qk_nope_head_dim"), 8
    ),
    **dict.fromkeys(
        ("qk_rope_head_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8
    ),
    **dict.fromkeys(
        ("query_pre_attn_scalar", "swa_head_dim", "hidden_size_per_layer_input", "kv_channels"), 8
    ),
    **dict.fromkeys(("qk_head_dim",), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_k", "top_k_experts", "moe_topk"), 2
    ),
    **dict.fromkeys(("n_group", "num_expert_group", "num_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id"), 0),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "attention_window_size"), 16),
    **dict.fromkeys(("attention_chunk_size",), 32),
    **dict.fromkeys(("index_topk",), 16),
    **dict.fromkeys(("first_k_dense_replace",), 1),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 8),
    **dict.fromkeys(("mamba_d_ssm",), 64),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 8),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 16),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank"), 4),
    # What models do around their head: defaults of 1 would hide it.
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping"), 3.0),
    **dict.fromkeys(("logits_scaling", "lm_head_multiplier", "output_multiplier", "logit_scale"), 0.7),
    **dict.fromkeys(("image_size",), 28),
    **dict.fromkeys(("patch_size",), 14),
}


ABSENT = (
    "head_dim",
    "final_logit_softcapping",
    "num_key_value_heads",
    "num_experts_per_tok",
)  # some configs leave them to be derived
KINDS = ("layer_types", "layers_block_type", "mlp_layer_types")
# What the rules above do not fit.
SPECIAL: dict[str, dict[str, Any]] = {
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
    },
    "bamba": {"num_hidden_layers": 2, "attn_layer_indices": [1]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "hidden_size": 32, "expand": 2},
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "longcat_flash": {"zero_expert_num": 2, "expert_ffn_hidden_size": 24},
    "reformer": {"is_decoder": True},
    "xlm": {"emb_dim": 32},
    "rwkv": {"rescale_every": 1},  # 6 by default, in models of at least 12 layers
    "bert": {"is_decoder": True},
    "roberta": {"is_decoder": True},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "granitemoehybrid": {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16, "hybrid_layer_ids": [1]},
    "minimax_m3_vl_text": {
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "index_block_size": 8,
        "index_topk_blocks": 4,
    },
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "dory": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        **dict.fromkeys(("n_input_layers", "n_recurrent_layers", "n_output_layers"), 1),
    },
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
}


def shrink(config: Any) -> None:
    """Make a config tiny in place, its parts too."""
    for name, value in list(vars(config).items()):
        small = SMALL.get(name)
        if name == "num_key_value_heads" and hasattr(config, "kv_lora_rank"):
            small = SMALL["num_attention_heads"]  # latent attention has a key for every head
        if isinstance(value, transformers.PreTrainedConfig):
            shrink(value)
        elif small is not None and (
            (isinstance(value, (int, float, str)) and not isinstance(value, bool)) or name in ABSENT
        ):
            setattr(config, name, small)
        elif isinstance(value, list) and name in KINDS:
            kinds = list(dict.fromkeys(value))
            setattr(config, name, (kinds * 2)[: max(len(kinds), 2)])
    layers = [len(value) for name, value in vars(config).items() if name in KINDS and isinstance(value, list)]
    if layers:
        config.num_hidden_layers = max(layers)


def tiny_config(model_type: str) -> Any:
    config = CONFIG_MAPPING[model_type](**SPECIAL.get(model_type, {}))
    shrink(config)
    for name, value in SPECIAL.get(model_type, {}).items():
        setattr(config, name, value)
    return config


def tiny_model(config: Any) -> Any:
    """A model of random weights, large enough that an error shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
    size = sum(p.numel() for p in model.parameters())
    if size > 5e6:
        raise ValueError(f"its smallest form here has {size / 1e6:.0f}M weights")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator) * SCALE
        if parameter.ndim > 1:
            parameter.data.copy_(noise)
        else:
            parameter.data.add_(noise)
    return model


def some_pairs() -> TokenizedPairs:
    """Five pairs of unequal lengths, whose prompts begin alike."""
    generator = torch.Generator().manual_seed(1)

    def ids(n: int) -> list[int]:
        return torch.randint(2, VOCABULARY - 8, (n,), generator=generator).tolist()

    common = ids(9)
    sizes = [(3, 7, 12), (20, 9, 4), (1, 25, 30), (45, 12, 21), (8, 5, LONGEST - 17)]
    rows = [
        {
            "pair_id": str(i),
            "pass_rate": None,
            "prompt_ids": common + ids(p),
            "chosen_ids": ids(c),
            "rejected_ids": ids(r),
        }
        for i, (p, c, r) in enumerate(sizes)
    ]
    return TokenizedPairs(datasets.Dataset.from_list(rows), {}, "")


def texts_of(pairs: list[Pair]) -> list[tuple[list[int], list[int]]]:
    return [(p.prompt_ids, p.chosen_ids) for p in pairs] + [(p.prompt_ids, p.rejected_ids) for p in pairs]


def naive(model: nn.Module, text: tuple[list[int], list[int]]) -> Tensor:
    """Summed log-probability of a response: one text alone, by the model's own logits."""
    prompt, response = text
    ids = torch.tensor([prompt + response])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()


class Verdict(NamedTuple):
    """How sage computes a model, or why not; `wrong` where it disagrees with the oracle and did not say
    so."""

    way: str
    wrong: bool = False
    note: str = ""


def examine(model: Any, name: str, packing: str = "auto", gradients: bool = True) -> Verdict:
    """Let sage choose its way, then compare all pairs with the oracle, and `gradients` too."""
    pairs = some_pairs()
    rows = [pairs[i] for i in range(len(pairs))]
    with torch.no_grad():
        fresh = copy.deepcopy(model)  # sage asks the model first, as in a run
        try:
            truth = torch.stack([naive(fresh, text) for text in texts_of(rows)])
        except Exception as e:
            code = "its own code with peft's adapter" if hasattr(model, "peft_config") else "its own code"
            return Verdict("refused", note=f"{code} fails ({type(e).__name__}: {first_line(e)})")
    policy = Policy(model)
    engine = Asked(policy)
    try:
        with console.capture() as lines:
            known = check_unwrapped(policy, engine.device, [pairs], packing, name)
            layout = settle(engine, [pairs], packing, name, known)  # pyright: ignore[reportArgumentType]
    except UserError as e:
        return Verdict("refused", note=str(e).removeprefix(f"model.path={name}: "))
    batch = collate(rows, layout, pairs.common_prefix if layout == "shared" else 0)
    tokens = batch.response_tokens
    note = lines.get().replace("\n", " ").strip()
    way = ("packed" if layout != "padded" else "padded") + (", own logits" if policy.backend == OWN else "")
    out = policy(batch)
    error = ((torch.cat(out[:2]) - truth).abs() / tokens).max()
    if not error < TOLERANCE:
        return Verdict(way, True, f"{error:.2g} nats per token")
    if gradients:
        policy.use_attention(policy.attention)
        weights = [p for p in model.parameters() if p.requires_grad]
        ours = torch.autograd.grad((out.chosen - 2 * out.rejected).sum(), weights, allow_unused=True)
        policy.model.eval()
        if policy.ropes:
            policy.ropes.texts = None
        theirs = [torch.zeros_like(w) for w in weights]
        for i, text in enumerate(texts_of(rows)):
            if policy.ropes:
                policy.ropes.texts = [(slice(0, 1), slice(0, len(text[0]) + len(text[1])))]
            sign = 1.0 if i < len(rows) else -2.0
            for total, g in zip(
                theirs,
                torch.autograd.grad(sign * naive(model, text), weights, allow_unused=True),
                strict=True,
            ):
                if g is not None:
                    total += g
        scale = max(float(t.norm()) for t in theirs)
        off = (
            max(float((t - (0 if g is None else g)).norm()) for t, g in zip(theirs, ours, strict=True))
            / scale
        )
        if not off < 1e-2:
            return Verdict(way, True, f"gradients are off by {off:.2g}")
    return Verdict(way, note=note)


class Asked:
    """What `settle` needs of an engine, around a policy that keeps its gradients."""

    def __init__(self, policy: Policy):
        self.policy, self.device = policy, torch.device("cpu")

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.policy(*args, **options)


def adapted(model: Any) -> Any:
    """The model with an adapter on every linear layer, which is not the identity."""
    import peft

    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * SCALE)
    return model


def generation(model: Any) -> str:
    """How generation=hf runs the model: its check compares with the model's own `generate`."""
    pairs = some_pairs()
    prompts = [pairs[i].prompt_ids for i in range(len(pairs))]
    try:
        decoder, _ = find_decoder(model, prompts, 12, 4, 256)
    except UserError as e:
        return f"refused: {str(e).split('(', 1)[-1].rstrip(')')}"
    if not isinstance(decoder, PlainGenerate):
        return "batched"
    return "equal lengths" if decoder.batch_size > 1 else "one by one"


COLUMNS = ("type", "training", "LoRA", "generation", "why")


def row_of(model_type: str) -> tuple[str, ...]:
    """The row of one model type. Raises whatever building it raises."""
    config = tiny_config(model_type)
    full = examine(tiny_model(config), model_type)
    if full.way == "refused":
        return model_type, full.way, "", "", full.note
    try:
        adapter = examine(adapted(tiny_model(config)), model_type)
    except ValueError as e:  # peft refuses it, which `sage train` reports
        adapter = Verdict("refused", note=first_line(e))
    words = [f"WRONG: {v.way}, {v.note}" if v.wrong else v.way for v in (full, adapter)]
    note = full.note if not full.wrong else ""
    if adapter.way == "refused":
        note = f"{note} LoRA: {adapter.note}".strip()
    return model_type, *words, generation(tiny_model(config)), note


def in_child(model_type: str) -> tuple[str, ...]:
    """`row_of` in a process of its own, which may crash or take too long."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def work() -> None:
        try:
            row = row_of(model_type)
        except Exception as e:
            row = (model_type, "not built", "", "", f"{type(e).__name__}: {first_line(e)}")
        sender.send(row)

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    sender.close()
    try:
        if receiver.poll(SECONDS):
            return receiver.recv()
        return model_type, "not built", "", "", f"it takes more than {SECONDS} seconds"
    except EOFError:
        return model_type, "CRASHED", "", "", ""
    finally:
        child.kill()
        child.join()


ONE_RUN = "All rows come from one run of the script."
SEVERAL_RUNS = (
    "The rows of some types were generated again, so the rows come from several runs of the script."
)
HEADER = f"""# Models

Every run of `sage train` and `sage score-dataset` begins with a self-check (`sage/model/selfcheck.py`). It
takes a few shortened pairs of the run, and compares the log-probability of each response token with the
model's own logits, one text at a time. A path that disagrees is replaced by a slower one, and one line says
so:

- `packed`: pairs are packed into one row without padding, and the prompt is computed once. If packed rows
  disagree, rows are padded.
- `own logits`: the model's own full forward computes the logits. It replaces sage's head, which never keeps
  all logits, where a model transforms its logits in a way that the head does not know. It takes more
  memory.
- `refused`: the model's own code fails on a plain text, gives no finite gradients, changes its weights or
  sees later tokens, as an encoder does; or nothing agrees with it. The run ends with exit status 2 before any
  training. With LoRA, the cause may also lie in peft. It is named.

The table below is made by `scripts/model_table.py`. It builds a tiny form of each causal language model of
transformers {transformers.__version__} with random weights. It then compares summed log-probabilities and
gradients with plain autograd through `model(...).logits` in float32, for full training and for LoRA. The
check at the start of a run does not use this table. `generation` shows how `generation=hf` runs the model:
`batched` (a refilled batch), `equal lengths` (the model's own `generate`, on prompts of equal length) or
`one by one`.

SOURCE

A window in the tiny forms is 16 tokens and a chunk is 32, while texts have up to 96 tokens. A model with a
longer window or chunk than any text of a run may pack where the table says `padded`.
"""


def main(target: str, types: list[str]) -> None:
    rows = rows_of(Path(target).read_text(encoding="utf-8")) if types and target != "-" else {}
    for model_type in types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        rows[model_type] = in_child(model_type)
        print(*rows[model_type], sep=" | ", flush=True)
        if target != "-":
            source = SEVERAL_RUNS if types else ONE_RUN
            Path(target).write_text(page([rows[name] for name in sorted(rows)], source), encoding="utf-8")


def rows_of(page: str) -> dict[str, tuple[str, ...]]:
    """The rows of a page that `main` has written."""
    built, _, others = page.partition("## Not built")
    table = [line for line in built.splitlines() if line.startswith("| ")][2:]
    rows = [tuple(cell.strip() for cell in line[1:-1].split("|")) for line in table]
    for line in others.splitlines():
        if line.startswith("- `"):
            name, reason = line[3:].split("`: ", 1)
            rows.append((name, "not built", "", "", reason))
    return {row[0]: row for row in rows}


def plain(cell: str) -> str:
    """A cell of the table, with the words that every fallback repeats taken out."""
    cell = cell.replace(
        "rows are padded and prompts computed twice, since this model cannot pack", "cannot pack"
    )
    cell = cell.replace(
        "log-probabilities come from the model's own logits, which take more memory, since ", ""
    )
    return cell.replace("|", "/").replace("\n", " ")


def page(rows: list[tuple[str, ...]], source: str) -> str:
    built = [row for row in rows if row[1] != "not built"]
    cells = [COLUMNS, tuple("---" for _ in COLUMNS), *built]
    lines = ["| " + " | ".join(plain(cell) for cell in row) + " |" for row in cells]
    counts = Counter(row[1] for row in built)
    summary = ", ".join(f"{count} {way}" for way, count in counts.most_common())
    others = "\n".join(f"- `{row[0]}`: {row[4]}" for row in rows if row[1] == "not built")
    return (
        f"{HEADER.replace('SOURCE', source)}\n## {len(built)} types\n\nFull training: {summary}.\n\n"
        + "\n".join(lines)
        + f"\n\n## Not built\n\nThe script found no tiny form for these:\n\n{others}\n"
    )


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    main(sys.argv[1], sys.argv[2:])
