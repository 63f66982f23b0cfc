"""`sage plan`: bytes from the model's own code, without weights; what fits, and what to change."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import refused, write_jsonl
from hydra import compose, initialize_config_module
from many_runs import column, execute, freeze, interrupted

from sage import config
from sage.commands import plan
from sage.config import EngineConfig, LoraConfig, ModelConfig
from sage.data.packing import collate
from sage.data.tokens import Pair
from sage.model import loading, memory, selfcheck, tiles
from sage.model.footprint import footprint
from sage.model.policy import Policy
from sage.model.sequence import SequenceGroup
from sage.training.estimate import (
    MARGIN,
    HeaviestBatch,
    Machine,
    PairSource,
    estimated,
    heaviest,
    largest_budget,
)
from sage.util import processes
from sage.util.errors import UserError
from sage.util.processes import free_memory

PAIRS = [Pair("a", None, [5] * 20, [6] * 30, [7] * 25), Pair("b", None, [5] * 9, [8] * 12, [9] * 40)]


def saved_bytes(policy: Policy, batch) -> int:
    """What autograd itself keeps for the backward pass, by its own hooks: a naive reference."""
    known = {x.untyped_storage().data_ptr() for x in (*policy.parameters(), *policy.buffers())}
    known |= {x.untyped_storage().data_ptr() for x in batch if isinstance(x, torch.Tensor)}
    kept: dict[int, int] = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        logps = policy(batch)
    assert logps.chosen.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora": LoraConfig()},
        {"tiled_mlp": True},
        {"tiled_mlp": True, "lora": LoraConfig()},
    ],
    ids=["full", "lora", "tiled", "tiled lora"],
)
def test_activations_on_the_meta_device_are_those_that_autograd_keeps(tiny_model, monkeypatch, options):
    monkeypatch.setattr(tiles, "TILE", 16)
    cfg = ModelConfig(path=str(tiny_model), **options)
    batch = collate(PAIRS, "shared")
    loaded = loading.load_model(str(tiny_model), cfg, torch.float32, seed=0)
    truth = saved_bytes(Policy(loaded, cfg.head, tiled_mlp=cfg.tiled_mlp), batch)
    found = memory.micro_bytes(memory.shell(str(tiny_model), cfg, torch.float32), batch, cuda=False)
    assert found.kept == pytest.approx(truth, rel=0.05)
    assert found.peak > found.kept and found.head > 0 and found.moved == 0


def test_tiles_and_offload_keep_less(tiny_model, monkeypatch):
    """Protects the plan of long texts: tiles lower the peak, and what is offloaded is counted apart."""
    monkeypatch.setattr(tiles, "TILE", 16)

    def bytes_of(**options):
        policy = memory.shell(str(tiny_model), ModelConfig(path=str(tiny_model), **options), torch.float32)
        return memory.micro_bytes(policy, collate(PAIRS * 4, "shared"), cuda=True)

    plain, tiled = (
        bytes_of(gradient_checkpointing=True),
        bytes_of(gradient_checkpointing=True, tiled_mlp=True),
    )
    moved, both = (bytes_of(gradient_checkpointing="offload", tiled_mlp=tiled) for tiled in (False, True))
    assert tiled.kept == plain.kept == moved.kept + moved.moved
    # One of its two layers' hidden states is back when the backward pass is in that layer.
    assert moved.moved > 0 and plain.peak - moved.peak == moved.moved / 2
    assert both.peak < tiled.peak < plain.peak and both.peak < moved.peak


def test_checkpointing_keeps_less_and_more_tokens_take_more(tiny_model):
    def kept(pairs, **options):
        cfg = ModelConfig(path=str(tiny_model), **options)
        policy = memory.shell(str(tiny_model), cfg, torch.float32)
        return memory.micro_bytes(policy, collate(pairs, "shared"), cuda=True)

    plain, recomputed = kept(PAIRS), kept(PAIRS, gradient_checkpointing=True)
    assert recomputed.kept < plain.kept / 3
    others = [pair._replace(prompt_ids=[1, *pair.prompt_ids[1:]]) for pair in PAIRS]
    assert kept([*PAIRS, *others]).kept == pytest.approx(2 * plain.kept, rel=0.02)


def test_ranks_that_compute_a_row_together_keep_a_part_each(tiny_model):
    """Protects the plan of sequence parallelism: it counts what one of two ranks keeps and exchanges."""
    cfg, batch = ModelConfig(path=str(tiny_model)), collate(PAIRS * 4, "shared")
    loaded = loading.load_model(str(tiny_model), cfg, torch.float32, seed=0)

    class FirstRank(memory.Shapes):
        inside = SequenceGroup.inside

    truth = saved_bytes(Policy(loaded, cfg.head, group=FirstRank(2)), batch)
    one, two = (
        memory.micro_bytes(memory.shell(str(tiny_model), cfg, torch.float32, ranks), batch, cuda=False)
        for ranks in (1, 2)
    )
    assert two.kept == pytest.approx(truth, rel=0.05)
    assert 0.45 * one.kept < two.kept < 0.6 * one.kept and two.peak < 0.7 * one.peak


def test_a_model_without_a_config_is_refused_by_name(tmp_path):
    """So is one that the hub does not provide."""
    with pytest.raises(UserError, match=f"model.path={tmp_path}: its config cannot be read"):
        memory.shell(str(tmp_path), ModelConfig(str(tmp_path)), torch.float32)


def test_the_stand_ins_are_taken_back(tiny_model):
    """A plan must not change how a later run in the same process computes."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from sage.model import attention

    memory.micro_bytes(
        memory.shell(str(tiny_model), ModelConfig(path=str(tiny_model)), torch.float32),
        collate(PAIRS, "shared"),
        cuda=True,
    )
    assert ALL_ATTENTION_FUNCTIONS[attention.IMPLEMENTATION] is attention.packed_attention


def test_shards_add_up_to_the_whole():
    """The paper's arithmetic (Rajbhandari et al., 2020): 16 bytes a parameter in bfloat16, by stage."""
    millions = 100_000_000
    one = footprint(millions, 0, 2, EngineConfig(0), 1, cuda=True)
    assert one.kept() == (2 + 4 + 4 + 8) * millions
    for stage, whole in ((1, 2 + 4), (2, 2), (3, 0)):
        found = footprint(millions, 0, 2, EngineConfig(stage), 8, cuda=True)
        assert found.kept() == whole * millions + (18 - whole) * millions / 8
    offloaded = footprint(millions, 0, 2, EngineConfig(3, offload=True), 8, cuda=True)
    assert offloaded.kept() == 0 and offloaded.host == 18 * millions / 8
    # Stage 2 adds up float32 gradients on the GPU, also if the optimizer is in CPU memory.
    offloaded = footprint(millions, 0, 2, EngineConfig(2, offload=True), 8, cuda=True)
    assert offloaded.kept() == 2 * millions + 4 * millions / 8
    adapter = footprint(1_000, millions, 2, EngineConfig(0), 1, cuda=True)
    assert adapter.kept() == 2 * millions + 18 * 1_000
    assert adapter.buckets == 4 * 1_000  # no larger than what passes through it


def test_a_plan_says_what_fits_and_what_to_change(sage, tiny_model, pair_file, tmp_path):
    file = tmp_path / "plan.json"
    words = [
        *("plan", "model=hf", f"model.path={tiny_model}", f"data.path={pair_file}", "steps=1"),
        *("data.max_length=256", "micro_batch_tokens=1024", f"cache_dir={tmp_path}", f"json={file}"),
    ]
    status, out, err = sage(*words)
    assert status == 0, err
    found = json.loads(file.read_text())
    assert found["fits"] and found["step_seconds"] > 0 and found["most_tokens"] > 1024
    assert "weights" in out and "largest micro_batch_tokens that fits" in out

    status, out, err = sage(*words, "gpu_gb=5", "batch_size=64", "world_size=2")
    assert status == 0, err
    whole = json.loads(file.read_text())
    assert whole["step_seconds"] is None  # that GPU is not here

    status, out, err = sage(*words, "gpu_gb=5", "batch_size=64", "world_size=2", "engine.sequence_parallel=2")
    assert status == 0 and "1/2 of " in out, err
    half = json.loads(
        file.read_text()
    )  # micro_batch_tokens is what a rank computes, at most all of it scored
    assert half["most_tokens"] == pytest.approx(whole["most_tokens"], rel=0.2)

    status, out, err = sage(*words, "gpu_gb=0.5")
    found = json.loads(file.read_text())
    assert status == 0 and not found["fits"] and "DOES NOT FIT" in out
    refused(sage(*words, "data.max_length=2048"), "micro_batch_tokens=1024 cannot hold one pair")


def test_auto_is_the_largest_micro_batch_that_fits(tiny_model, tmp_path):
    """Checked from both sides: the estimate at the choice leaves the margin, and a quarter more does not."""
    with initialize_config_module("sage.conf", version_base="1.3"):
        overrides = ["model=hf", f"model.path={tiny_model}", "data.path=x", "steps=3", "batch_size=64"]
        cfg = config.load(compose("train", [*overrides, "data.max_length=60", "micro_batch_tokens=auto"]))
    assert isinstance(cfg, config.TrainConfig)
    rng = torch.Generator().manual_seed(0)
    sizes = torch.randint(5, 25, (200, 3), generator=rng).tolist()
    made = [Pair(str(i), None, [i] * p, [i] * c, [i + 1] * r) for i, (p, c, r) in enumerate(sizes)]
    source = PairSource(np.array(sizes), 0, "shared", made.__getitem__)

    def at(budget: int):
        work = heaviest(cfg, source, budget)
        return estimated(cfg, machine, str(tiny_model), torch.float32, work)

    def choose(room: float) -> tuple[int, str]:
        return largest_budget(
            cfg, str(tiny_model), torch.float32, source, Machine(False, room, 1e6, "a machine")
        )

    machine = Machine(False, 1.0, 1e6, "a machine")
    small, whole = at(120).peak(), at(10**9).peak()
    assert choose(2 * whole)[0] == heaviest(cfg, source, 10**9).tokens
    assert "all of a rank's pairs of a step" in choose(2 * whole)[1]
    room = (small + whole) / 2 / (1 - MARGIN)
    tokens, why = choose(room)
    assert "the largest that fits" in why and choose(room) == (tokens, why)
    usable = room * (1 - MARGIN)
    assert at(tokens).peak() <= usable and at(tokens).most_tokens(usable) < tokens * 5 // 4
    with pytest.raises(
        UserError, match=r"micro_batch_tokens=auto: two rows of data\.max_length=60 .* do not fit"
    ):
        choose(at(120).peak() * 0.9)


def test_scoring_is_planned_without_training_and_with_its_second_model(tiny_model):
    """Protects micro_batch_tokens=auto of score-dataset, which would refuse models that it has room for."""
    machine = Machine(True, 80e9, 1e9, "a GPU")

    def planned(command: str, *overrides: str):
        with initialize_config_module("sage.conf", version_base="1.3"):
            common = ["model=hf", f"model.path={tiny_model}", "data.path=x", "data.max_length=60"]
            cfg = config.load(compose(command, [*common, *overrides]))
        assert isinstance(cfg, config.TrainConfig)
        work = HeaviestBatch(PAIRS, 125, 0, "shared", 1, 50)
        return estimated(cfg, machine, str(tiny_model), torch.float32, work)

    trained, scored = planned("train", "steps=1"), planned("score_dataset")
    assert scored.engine.kept() == scored.engine.weights == trained.engine.weights
    assert scored.micro.peak < trained.micro.peak and scored.line[1] < trained.line[1]
    both = planned("score_dataset", f"reference_model={tiny_model}")
    assert both.engine.kept() == 2 * scored.engine.kept()


def test_an_advised_adapter_is_its_own_online_reference(tiny_model, monkeypatch):
    """Protects the advice from counting a second model that a run with the adapter would not load."""
    with initialize_config_module("sage.conf", version_base="1.3"):
        common = ["model=hf", f"model.path={tiny_model}", "data.path=x", "steps=1", "reference=online"]
        cfg = config.load(compose("plan", [*common, "data.max_length=60", "micro_batch_tokens=128"]))
    assert isinstance(cfg, config.PlanConfig)
    tried = {}

    def spy(cfg, *args):
        found = estimated(cfg, *args)
        tried[bool(cfg.model.lora)] = found.engine.reference
        return found

    monkeypatch.setattr(plan, "estimated", spy)
    args = str(tiny_model), torch.float32, HeaviestBatch(PAIRS, 125, 0, "shared", 1, 50)
    list(plan.changes(cfg, estimated(cfg, Machine(False, 1.0, 1e6, "a machine"), *args), *args))
    assert tried[False] > 0 and tried[True] == 0


def test_a_plan_of_pairs_that_are_not_built_reads_two_tokens_of_the_vocabulary(sage, tmp_path):
    """The packaged model has 16 tokens: the plan times a micro-batch of made-up ids."""
    problems = write_jsonl(tmp_path / "problems.jsonl", [{"prompt": "1+1", "answer": "2"}])
    words = ["plan", "model=arithmetic", f"data.problems.path={problems}", "data.max_length=48", "steps=1"]
    status, out, err = sage(*words, "micro_batch_tokens=256", "batch_size=16", f"cache_dir={tmp_path}")
    assert status == 0 and "seconds of a step" in out, err


def test_scoring_can_hold_out_the_share_that_a_run_will_hold_out():
    """Protects data.scores with data.eval_share, where an experiment names other held-out pairs."""
    words = ["+experiment=arithmetic", "data.eval_path=null", "data.eval_share=0.5"]
    with initialize_config_module("sage.conf", version_base="1.3"):
        cfg = config.load(compose("score_dataset", words), words)
        assert isinstance(cfg, config.ScoreConfig) and cfg.data.has_held_out
        with pytest.raises(UserError, match=r"data\.eval_path has no effect"):
            config.load(compose("score_dataset", [words[0], "data.eval_path=x"]), ["data.eval_path=x"])


def test_the_number_of_auto_is_kept(tmp_path):
    """Protects `sage rounds`, which writes the config of an interrupted part again."""
    with initialize_config_module("sage.conf", version_base="1.3"):
        overrides = ["model=hf", "model.path=m", "data.path=x", "steps=3", "micro_batch_tokens=auto"]
        first, again = (config.load(compose("train", overrides)) for _ in range(2))
    assert isinstance(first, config.TrainConfig) and isinstance(again, config.TrainConfig)
    config.keep_budget(first, tmp_path)
    assert first.micro_batch_tokens == "auto"
    first.micro_batch_tokens = 5000
    config.write(first, tmp_path)
    config.keep_budget(again, tmp_path)
    assert again.micro_batch_tokens == 5000


@pytest.mark.parametrize(
    ("folder", "limit", "used", "idle"),
    [
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_a_container_has_left_what_others_in_it_do_not_use(tmp_path, folder, limit, used, idle):
    group = tmp_path / folder
    group.mkdir(exist_ok=True)
    (group / limit).write_text("5000000\n")
    (group / used).write_text("4000000\n")
    (group / "memory.stat").write_text(f"anon 3500000\n{idle} 500000\n")
    assert free_memory(tmp_path) == 1_500_000
    (group / limit).write_text("max\n")
    assert free_memory(tmp_path) > 1_500_000


def test_the_self_check_takes_no_more_than_a_container_has_left(monkeypatch):
    monkeypatch.setattr(processes, "free_memory", lambda: 1_500_000)
    assert selfcheck.free_memory(torch.device("cpu")) == 1_500_000


def test_a_micro_batch_is_a_number_or_auto(train, tmp_path):
    refused(train("micro_batch_tokens=most"), "micro_batch_tokens=most: must be a number or auto")
    refused(train("micro_batch_tokens=1"), "micro_batch_tokens=1: must be at least 2")


@pytest.mark.slow
def test_auto_is_frozen_and_a_resume_keeps_it(tiny_model, pair_file, tmp_path):
    common = [
        "model=hf",
        f"model.path={tiny_model}",
        f"data.path={pair_file}",
        "batch_size=8",
        "world_size=2",
    ]
    common += ["data.max_length=128", f"cache_dir={tmp_path / 'cache'}", "micro_batch_tokens=auto"]
    run = freeze(tmp_path / "run", *common, "steps=2", "save_every=1")
    scored = freeze(tmp_path / "scored", *common, command="score-dataset")
    execute(2, [run, scored])
    chosen = config.read_frozen(run).micro_batch_tokens
    assert isinstance(chosen, int) and chosen >= 256
    assert isinstance(config.read_frozen(scored).micro_batch_tokens, int)
    resumed = interrupted(run, 1, tmp_path / "resumed")
    text = (resumed / "config.yaml").read_text()
    (resumed / "config.yaml").write_text(text.replace(f"tokens: {chosen}", "tokens: 300"))
    execute(2, [resumed])
    assert config.read_frozen(resumed).micro_batch_tokens == 300, "a resume does not choose again"
    assert column(resumed, "loss") == pytest.approx(column(run, "loss"), abs=1e-6)
