"""The config: options list their fields, unknown keys and bad values are refused everywhere, advice works."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
from typing import Any

import pytest
from conftest import REPO
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_class
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sage import config
from sage.advice import quoted
from sage.config import LoraConfig, ModelConfig, TrainConfig
from sage.util.errors import UserError

CONF = REPO / "conf"
# A run that is complete, so that one bad override is all that is wrong.
PAIRS = ("data.path=pairs.jsonl", "steps=1")


def composed(*overrides: str, command: str = "train") -> Any:
    with initialize_config_module("sage.conf", version_base="1.3"):
        return compose(command.replace("-", "_"), [*overrides])


def load(*overrides: str, command: str = "train") -> Any:
    """The config as a command line gives it, with the checks of what the user typed."""
    return config.load(composed(*overrides, command=command), overrides)


def content(group: str, option: str) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.load(CONF / group / f"{option}.yaml"))  # pyright: ignore


# --- options and the classes behind them

WITH_TARGET = [
    (group, option)
    for group, options in config.groups().items()
    for option in options
    if group in ("loss", "scorer", "curriculum", "generation")
]
# One option of each group in the schema lists all keys; the schema supplies them to the others.
LISTED = {
    ("model", "hf"): ModelConfig,
    ("model/lora", "default"): LoraConfig,
    ("data", "pairs"): config.DataConfig,
    ("optimizer", "adamw"): config.OptimizerConfig,
    ("engine", "zero0"): config.EngineConfig,
    ("tracking", "none"): config.TrackingConfig,
}


@pytest.mark.parametrize("group, option", WITH_TARGET)
def test_options_of_classes_list_all_fields_with_the_same_defaults(group, option):
    """So that each can be set without +, and a class built in a test is the class that an option names."""
    listed = content(group, option)
    cls = get_class(listed.pop("_target_"))
    fields = [f for f in dataclasses.fields(cls) if f.init]
    defaults = {f.name: f.default for f in fields}
    assert listed == defaults


@pytest.mark.parametrize("group, option", LISTED)
def test_one_option_of_each_group_lists_all_keys_with_the_same_defaults(group, option):
    defaults = OmegaConf.to_container(OmegaConf.structured(LISTED[group, option]))
    assert content(group, option) == defaults


def test_every_key_of_every_option_can_be_set_without_plus():
    """A key is in the composed config of each option, so Hydra lets an override change it."""
    schema_keys = {
        key
        for key in config.known_keys(TrainConfig)
        if ".NAME" not in key and not key.startswith("model.lora.")
    }
    with_target = ("loss.", "scorer.", "curriculum.", "generation.")
    expected = {key for key in schema_keys if not key.startswith(with_target)}
    cfg = composed()
    assert not [key for key in expected if not _present(cfg, key)]
    for name in content("benchmark", "math500")["math500"]:
        assert _present(composed("+benchmark=math500"), f"benchmark.math500.{name}")


def _present(cfg: Any, key: str) -> bool:
    for name in key.split("."):
        if cfg is None or name not in cfg:
            return False
        cfg = None if OmegaConf.is_missing(cfg, name) else cfg[name]
    return True


# --- unknown keys

UNKNOWN = {
    "+data.nonsense=1": ["data.nonsense", "data has "],
    "+optimizer.learning_rate=1e-3": ["optimizer.learning_rate", "optimizer has lr, betas"],
    "++optimizer.lrr=1": ["'optimizer.lr'"],
    "+data.colums.prompt=q": ["data.colums", "'data.columns'"],
    "+data.columns.promt=q": ["data.columns.promt", "'data.columns.prompt'"],
    "+lr=1": ["'optimizer.lr'"],
    "++x=1": ["unknown config key 'x'"],
    "+a.b.c=1": ["unknown config key 'a'"],
    "+loss.bta=1": ["loss.bta", "'loss.beta'"],
    "+loss._partial_=true": ["loss._partial_"],
    "+generation.batchsize=1": ["'generation.batch_size'"],
    "+benchmark.gsm8k.lmit=1": ["benchmark.gsm8k.lmit", "'benchmark.gsm8k.limit'"],
}


@pytest.mark.parametrize("override", UNKNOWN)
def test_unknown_keys_are_refused_however_they_are_written(override):
    with pytest.raises(UserError) as caught:
        load(*PAIRS, "+benchmark=gsm8k", override)
    assert all(part in str(caught.value) for part in UNKNOWN[override]), caught.value


# --- values

BAD_VALUES = {
    "epochs=0": "epochs=0.0: must be greater than 0",
    "optimizer.betas=[0.9,0.99,0.999]": "optimizer.betas=[0.9, 0.99, 0.999]: must have 2 values",
    "optimizer.betas=[0.9,1]": "optimizer.betas=1.0: must be less than 1",
    "optimizer.lr=nan": "optimizer.lr=nan: must be a finite number",
    "optimizer.lr=inf": "optimizer.lr=inf: must be a finite number",
    "sampling.max_new_tokens=0": "sampling.max_new_tokens=0: must be at least 1",
    "generation.batch_size=0": "generation.batch_size=0: must be at least 1",
    "benchmark.gsm8k.limit=0": "benchmark.gsm8k.limit=0: must be at least 1",
    "benchmark.gsm8k.path=null": "benchmark.gsm8k.path",
    "benchmark.gsm8k.prompt=x": "benchmark.gsm8k.prompt",
    "loss.beta=nan": "loss.beta=nan: must be a finite number",
    "loss.beta=0": "loss.beta=0",
    "loss.beta=null": "loss.beta",
    "data.eval_path=None": "write data.eval_path=null",
    "data.packing=None": "write data.packing=null",
    "name=1_000": "write 'name=\"1_000\"'",
    "model.revision=12e4567": 'model.revision="12e4567"',
    "model.adapter_path=x": "+model/lora=default",
}


@pytest.mark.parametrize("override", BAD_VALUES)
def test_values_are_checked_wherever_they_are(override):
    with pytest.raises(UserError) as caught:
        load(
            "data.path=pairs.jsonl",
            *([] if "epochs" in override else ["steps=1"]),
            "+benchmark=gsm8k",
            override,
        )
    assert BAD_VALUES[override] in str(caught.value)


FOREIGN = (
    "subprocess.call",
    "subprocess.Popen",
    "os.system",
    "sage.config.ModelConfig",
    "no_such.Class",
    "x",
)


@pytest.mark.parametrize("group", ["loss", "scorer", "curriculum", "generation"])
@pytest.mark.parametrize("target", FOREIGN)
def test_a_class_of_another_kind_is_refused_before_it_is_built(group, target):
    """A run folder from elsewhere must not start programs."""
    cfg = composed(*PAIRS)
    OmegaConf.set_struct(cfg, False)
    cfg[group] = {"_target_": target}
    with pytest.raises(UserError, match=re.escape(f"{group}._target_={target}")):
        config.load(cfg)


def test_hooks_must_be_hooks():
    given = [*PAIRS, "+hooks.mine._target_=subprocess.Popen"]
    with pytest.raises(UserError, match=r"hooks\.mine\._target_=subprocess\.Popen"):
        load(*given)
    load(*PAIRS, "+hooks.mine._target_=sage.training.hooks.Hook")


def test_an_option_cannot_hold_a_class():
    with pytest.raises(UserError, match=r"scorer\.margin"):
        load(*PAIRS, "scorer=loss", "scorer.margin={_target_:subprocess.call,args:[ls]}")


# --- keys that a command ignores

IGNORED = [
    ("score-dataset", "steps=3"),
    ("score-dataset", "optimizer.lr=1e-4"),
    ("score-dataset", "curriculum=sage"),
    ("score-dataset", "data.eval_limit=3"),
    ("build-pairs", "batch_size=3"),
    ("build-pairs", "data.max_length=64"),
    ("build-pairs", "loss=ipo"),
    ("eval", "model.head=tiled"),
    ("train", "pairing.samples=2"),
    ("train", "sampling.top_p=0.5"),
    ("train", "model.revision=main"),
    ("train", "benchmark_limit=3"),
    ("train", "tracking.project=mine"),
    ("eval", "sampling.top_p=0.5"),
    ("score-dataset", "scorer.candidates_per_pair=4"),
    ("score-dataset", "scorer.max_nan=0"),
    ("score-dataset", "scorer.drop_curvature=0.2"),
    ("score-dataset", "loss.nll_weight=1"),
    ("rounds", "optimizer.min_lr_ratio=0.5"),
    ("rounds", "tracking.project=mine"),
    ("rounds", "data.answers=drop"),
]


def test_options_of_further_scorers_without_effect_are_refused():
    words = ["+experiment=arithmetic", "top=0.5", "+scorer@scorers.logit=sage_logit"]
    load(*words, "scorer.drop_curvature=0.2", "scorers.logit.damping=1", command="score-dataset")
    for override in ("scorers.logit.drop_curvature=0.2", "scorers.logit.temperature=1"):
        with pytest.raises(UserError, match=f"{override}.* has no effect on `sage score-dataset`"):
            load(*words, override, command="score-dataset")


def test_rounds_that_evaluate_nothing_in_training_refuse_how_often():
    """A round's training answers a benchmark only if `select` names it."""
    words = ["+experiment=arithmetic", "data.eval_path=null", "+benchmark=arithmetic"]
    load(*words, "pairing.samples=4", "benchmark_limit=9", command="rounds")
    with pytest.raises(UserError, match="eval_every has no effect on `sage rounds`"):
        load(*words, "eval_every=5", command="rounds")
    load(*words, "eval_every=5", "select=benchmark/arithmetic/accuracy", command="rounds")


def test_a_file_has_no_splits(tmp_path):
    (tmp_path / "pairs.jsonl").touch()
    with pytest.raises(UserError, match=r"data\.split has no effect .* since data\.path is one file"):
        load(f"data.path={tmp_path / 'pairs.jsonl'}", "steps=1", "data.split=test")


@pytest.mark.parametrize("command, override", IGNORED)
def test_an_override_without_effect_is_refused(command, override):
    """An experiment that is shared between commands still composes, with the same keys."""
    shared = [] if command == "eval" else ["+experiment=arithmetic"]
    load(*shared, command=command)
    key = re.split("=", override)[0]
    with pytest.raises(UserError, match=f"{key} has no effect on `sage {command}`"):
        load(*shared, override, command=command)


@pytest.mark.parametrize(
    "override", [r'sampling.stop=["\n"]', r"benchmark.gsm8k.prompt='{problem}\nAnswer:'"]
)
def test_escapes_that_hydra_does_not_read_are_refused(override):
    """Protects prompts and stop texts from a backslash and an n in place of a line break."""
    with pytest.raises(UserError, match="read as a backslash and a letter"):
        load("+experiment=gsm8k", override)
    load("+experiment=gsm8k", override.replace(r"\n", "\n"))
    load("+experiment=gsm8k", r"benchmark.gsm8k.prompt='{problem} in $\nu$ and \text{m}'")


def test_texts_of_a_list_that_hydra_alters_are_refused():
    with pytest.raises(UserError, match="True is no text here"):
        load("+experiment=gsm8k", "sampling.stop=[true]")
    with pytest.raises(UserError, match=r"1000\.0 is no text here"):
        load("+experiment=gsm8k", "sampling.stop=[x,1e3]")
    assert load("+experiment=gsm8k", "sampling.stop=['true']").sampling.stop == ["true"]


@pytest.mark.parametrize("command", ["eval", "build-pairs"])
def test_a_new_adapter_is_refused_where_nothing_is_trained(command):
    """Protects from the base model's answers in place of an adapter's whose path was forgotten."""
    with pytest.raises(UserError, match=r"model\.lora has no effect .* give model\.adapter_path"):
        load("model=arithmetic", "+model/lora=default", command=command)


def test_problems_to_train_on_are_those_of_the_training_split():
    """Protects test problems: the split of benchmarks is another default."""
    cfg = load(
        "+experiment=arithmetic", "data.path=null", "data.problems.path=OWNER/NAME", "+benchmark=svamp"
    )
    assert cfg.data.problems.split == "train" and cfg.benchmark["svamp"].split == "test"


def test_an_option_that_the_experiment_overrules_is_refused():
    """Protects what was asked for: Hydra lets an experiment's own keys win over an option that was typed."""
    for options, key in (
        (["model=qwen2.5-0.5b"], "model.path=Qwen/Qwen2.5-0.5B-Instruct"),
        (["data=hh"], "data.path=Anthropic/hh-rlhf"),
        (["data=gsm8k"], "data.path=null"),
    ):
        with pytest.raises(UserError, match=f"sets {key}.* add {key}"):
            load("+experiment=tulu3_dpo", *options)
        load("+experiment=tulu3_dpo", *options, key)
    load("+experiment=tulu3_dpo", "model=hf", "engine=zero0", "loss=simpo")


@pytest.mark.parametrize("experiment", sorted(file.stem for file in (CONF / "experiment").glob("*.yaml")))
def test_every_loss_keeps_its_constants_in_every_experiment(experiment):
    """Protects `loss=simpo`, whose beta is twenty times DPO's, from a beta in the experiment."""
    for loss in sorted(file.stem for file in (CONF / "loss").glob("*.yaml")):
        cfg = composed(f"+experiment={experiment}", f"loss={loss}")
        assert OmegaConf.to_container(cfg.loss) == content("loss", loss)


def test_compositions_share_no_config():
    """Hydra's store of schemas is one for all of them, so that `--help` need not copy it."""
    with initialize_config_module("sage.conf", version_base="1.3"):
        before = compose("train")
        compose("train", ["batch_size=7"]).optimizer.lr = 0.5
        assert compose("train") == before


def test_what_an_experiment_sets_is_not_refused():
    config.load(composed("+experiment=arithmetic", "steps=3", command="score-dataset"))


@pytest.mark.parametrize("scorer", ["loss", "random_from_pool"])
def test_an_experiment_may_choose_the_scorer_of_score_dataset(scorer, tmp_path):
    """score_dataset.yaml chooses its scorer beside groups.yaml's groups; an override there would win."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        f"# @package _global_\ndefaults:\n  - override /scorer: {scorer}\nname: mine\n"
    )
    with initialize_config_module("sage.conf", version_base="1.3"):
        assert "Sage" in compose("score_dataset")["scorer"]["_target_"]
        cfg = compose("score_dataset", [f"hydra.searchpath=[file://{tmp_path}]", "+experiment=mine"])
    assert cfg["scorer"]["_target_"] == content("scorer", scorer)["_target_"]


# --- frozen configs


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="\\${}'\" :#ab\n", max_size=12))
def test_any_text_survives_freezing(text):
    """`${` in a resolved value is text; OmegaConf would read it as an interpolation."""
    written = OmegaConf.create(config.frozen.escaped({"prompt": text}))
    read = OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(written)))
    assert OmegaConf.create(read).prompt == text


def test_a_literal_interpolation_survives_freezing(tmp_path):
    cfg = load("data=gsm8k", "steps=1", r"data.problems.prompt='\${x} {problem}'")
    assert cfg.data.problems.prompt == "${x} {problem}"
    config.freeze(cfg, tmp_path)
    assert config.load(tmp_path) == cfg


# --- the program's own advice

ADVISED = re.compile(r"(?<![\w./])(\+?[a-z]\w*(?:[./@][\w{}]+)*)=([\w./\-\[\],]+|FILE\b)")


def advice() -> list[str]:
    """key=value in the messages of all UserErrors in sage, with an example where a value is computed."""
    found = set()
    for file in sorted((REPO / "sage").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not (
                isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("UserError", "ValueError")
            ):
                continue
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    found |= {f"{key}={value.rstrip('.,')}" for key, value in ADVISED.findall(part.value)}
    return sorted(found)


def test_advice_is_found_in_the_source():
    assert {"data.path=FILE", "+model/lora=default", "data.packing=padded"} <= set(advice())


@pytest.mark.parametrize("override", advice())
def test_advice_composes_as_it_is_written(override):
    """An error that says what to write must not lead to the next error."""
    key = override.lstrip("+").partition("=")[0]
    base = {"benchmark": "eval", "samples": "eval", "generation": "eval", "round": "rounds"}.get(
        key.split(".")[0], "train"
    )
    if re.search(r"\b[A-Z]+\b(?!\.)", override.partition("=")[2]) and not override.endswith("FILE"):
        return  # NAME stands for an option
    options = {"curriculum": ["curriculum=static_filter"], "scorer": ["scorer=sage"], "loss": ["loss=cdpo"]}
    lora = ["+model/lora=default"] if key.startswith("model.lora.") else []
    composed(*options.get(key.split(".")[0], []) * ("." in key), *lora, override, command=base)


NAMED = ["data.problems.path=FILE", "scorer.max_nan=0.2", "loss.label_smoothing=0.1", "generation.chunk=4"]


def test_advice_that_an_option_must_have():
    composed(*NAMED, "scorer=sage", "loss=cdpo")
    cfg = load("benchmark=math500", "benchmark.math500.columns.answer=solution", command="eval")
    assert cfg.benchmark["math500"].columns.answer == "solution"


# --- quotes


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab/.=()é~ ,{}[]&;#'\"\\", min_size=1, max_size=12))
def test_the_quoted_form_is_read_as_the_value_that_was_typed(value):
    """Shell and Hydra both: what `sage` says to write has to mean what the user typed."""
    form = quoted(f"data.path={value}")
    if form is None:
        return
    (argument,) = shlex.split(form)
    read = OverridesParser.create().parse_override(argument).value()
    assert read == value.strip("\"'")


@pytest.mark.parametrize("overrides", [[], ["+baseline=dpo"], ["curriculum=static_filter"]], ids=" ".join)
def test_a_curriculum_is_not_built_before_the_pairs_are_there(overrides):
    """Protects every run: a curriculum needs what is known of the pairs, so only its options are checked."""
    load(*PAIRS, *overrides)
