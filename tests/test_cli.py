"""The command: options compose and load, bad input ends in one message and status 2, completion answers."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO, make_pairs, refused, write_jsonl
from forks import Forked, Started, be_command
from hydra import compose, initialize_config_module
from hydra.utils import get_method
from omegaconf import OmegaConf

from sage import cli, config, worker
from sage.util.errors import UserError
from sage.util.output import Outliving

CONF = REPO / "conf"
OPTIONS = sorted(
    (file.parent.relative_to(CONF).as_posix(), file.stem)
    for file in CONF.rglob("*.yaml")
    if file.parent != CONF
)
OPTIONAL = ("experiment", "baseline", "model/lora")  # groups that are added with +


# --- every option


@pytest.mark.parametrize("group, option", OPTIONS, ids=lambda value: value.replace("/", ":"))
def test_every_option_composes_and_loads(group, option):
    command = "eval" if group == "benchmark" else "train"
    sign = "+" if group in OPTIONAL else ""
    overrides = [f"{sign}{group}={option}"]
    if command == "train":
        overrides += ["data.path=pairs.jsonl", "epochs=null", "steps=1"]
    overrides += {
        ("model", "hf"): ["model.path=folder"],
        ("scorer", "rho"): ["scorer.margins_from=file"],
        ("scorer", "medium_influence"): ["scorer.margins_from=file"],
    }.get((group, option), [])
    with initialize_config_module("sage.conf", version_base="1.3"):
        cfg = config.load(compose(command, overrides))
    assert cfg.command == command


@pytest.mark.parametrize("name", [option for group, option in OPTIONS if group == "experiment"])
def test_every_experiment_is_complete_but_for_its_pairs(name):
    overrides = [f"+experiment={name}"] + ([] if name == "demo" else ["data.path=pairs.jsonl"])
    with initialize_config_module("sage.conf", version_base="1.3"):
        cfg = config.load(compose("train", overrides))
    assert cfg.name == name
    if name.endswith("_8gpu"):
        assert cfg.world_size == 8 and cfg.engine.zero_stage >= 2


def test_a_frozen_config_reads_back_the_same(tmp_path):
    with initialize_config_module("sage.conf", version_base="1.3"):
        cfg = config.load(compose("train", ["+experiment=gsm8k_qwen2.5-7b_1gpu", "data.path=pairs.jsonl"]))
    config.freeze(cfg, tmp_path)
    assert config.load(tmp_path) == cfg


def test_every_command_has_its_config_and_a_job_in_the_ranks():
    """A command word is one key in three tables and the name of a YAML; here they cannot drift apart."""
    assert set(config.SCHEMAS) == set(cli.COMMANDS) - {"resume", "report"}
    in_ranks = {word for word, schema in config.SCHEMAS.items() if issubclass(schema, config.RunConfig)}
    assert set(worker.JOBS) == in_ranks - {"inspect", "plan", "rounds"}  # these have no ranks of their own
    for job in worker.JOBS.values():
        assert callable(get_method(job))
    for word in config.SCHEMAS:
        with initialize_config_module("sage.conf", version_base="1.3"):
            composed = compose(word.replace("-", "_"))
        assert composed.command == word and OmegaConf.get_type(composed) is config.SCHEMAS[word]


def test_a_config_of_another_command_is_refused(train):
    refused(train("command=eval"), "command=eval", "train")


def test_a_frozen_config_that_sage_did_not_write_is_refused(tmp_path):
    for text in ("command: nope\n", "- a list\n", "steps: 1\n", "a: [\n"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(UserError, match=r"config\.yaml is not a config that sage wrote"):
            config.load(tmp_path)


# --- help


def test_help(sage):
    status, out, _ = sage("train", "--help")
    assert status == 0
    assert "loss: cdpo, dpo, dpo_norm, dpop, hinge, ipo, omni_dpo, robust, simpo" in out
    assert "micro_batch_tokens" in out
    assert sage("--help")[0] == 0 and "resume RUN_DIR" in sage("--help")[1]
    assert sage()[0] == 2


def test_cfg_job_prints_the_config_and_runs_nothing(train, tmp_path):
    status, out, _ = train("loss=ipo", flags=("--cfg", "job"))
    assert status == 0
    assert "_target_: sage.losses.IPO" in out and "steps: 1" in out
    assert not (tmp_path / "run").exists()


def test_values_of_hydras_options_are_not_taken_for_overrides(sage, train, tmp_path):
    refused(train("loss=dpoo", flags=("--cfg", "job")), "no loss 'dpoo'", "dpo")
    refused(train("loss=dpoo", flags=("-cd", str(tmp_path))), "no loss 'dpoo'", "dpo")


def test_flags_may_stand_between_overrides(train, tmp_path):
    status, out, err = train("--cfg", "job", "loss=ipo")
    assert status == 0 and "_target_: sage.losses.IPO" in out, err
    assert not (tmp_path / "run").exists()


def test_the_version(sage):
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", sage("--version")[1])


def test_resume_usage(sage, tmp_path):
    status, out, _ = sage("resume")
    assert status == 2 and "usage: sage resume RUN_DIR" in out
    assert sage("resume", "--help")[0] == 0
    for option in ("ranks=2", "steps=0", "world_size=two", "start=no"):
        assert sage("resume", str(tmp_path), option)[0] == 2
    refused(sage("resume", str(tmp_path)), str(tmp_path), "config.yaml")


def test_options_of_the_users_own_folder(train, tmp_path):
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / "mine.yaml").write_text("_target_: sage.losses.DPO\nbeta: 0.3\nnll_weight: 0.0\n")
    status, out, err = train("loss=mine", flags=("-cd", str(tmp_path), "--cfg", "job"))
    assert status == 0, err
    assert "beta: 0.3" in out


def test_options_of_the_users_own_folder_are_what_runs_or_refused(train, tmp_path):
    """Protects from our option of the same name, which Hydra finds first, and from an experiment's keys."""
    own = tmp_path / "own"
    for file, text in {
        "optimizer/mine.yaml": "lr: 1e-3\nschedule: linear\n",
        "experiment/mine.yaml": "# @package _global_\nname: mine\noptimizer:\n  lr: 1e-5\n",
    }.items():
        (own / file).parent.mkdir(parents=True)
        (own / file).write_text(text)
    folder = ("-cd", str(own))
    overruled = train("+experiment=mine", "optimizer=mine", flags=folder)
    refused(overruled, "optimizer=mine sets optimizer.lr=0.001", "add optimizer.lr=0.001")
    (own / "loss").mkdir()
    (own / "loss" / "dpo.yaml").write_text("_target_: sage.losses.DPO\nbeta: 0.7\n")
    refused(train(flags=folder), "dpo.yaml: sage has an option of this name", "rename yours")


def test_resume_auto_needs_the_folder_of_its_mode(sage, tmp_path, monkeypatch):
    """Protects a requeued job from starting anew in another folder each time."""
    monkeypatch.chdir(tmp_path)
    single = sage("train", "+experiment=arithmetic", "resume=auto", "hydra.sweep.dir=x")
    refused(single, "add hydra.run.dir=FOLDER")
    _, _, err = sage("train", "-m", "+experiment=arithmetic", "seed=0,1", "hydra.run.dir=x")
    assert "write hydra.sweep.dir=FOLDER" in " ".join(err.split())


# --- bad input

BAD_OVERRIDES = {
    "unknown key": (["optimizer.lrr=1"], ["optimizer.lrr", "did you mean 'optimizer.lr'"]),
    "unknown top-level key": (["step=1"], ["'step'", "did you mean 'steps'"]),
    "key of another scorer": (["scorer=uniform", "scorer.damping=3"], ["another option of scorer"]),
    "several files in one path": (["data.path=a.jsonl,b.jsonl"], ["data.path", "data.sources"]),
    "an empty stop text": (["+benchmark=gsm8k", "sampling.stop=['']"], ["sampling.stop", "empty text"]),
    "unknown key of the loss": (["loss.bta=1"], ["loss.bta", "did you mean 'loss.beta'"]),
    "added key of the loss": (["+loss.bta=1"], ["loss.bta"]),
    "wrong type": (["batch_size=many"], ["batch_size", "many"]),
    "wrong type in the loss": (["loss.beta=high"], ["loss.beta", "high"]),
    "wrong value": (["optimizer.schedule=cosin"], ["optimizer.schedule=cosin", "cosine, linear, constant"]),
    "out of range": (["optimizer.lr=-1"], ["optimizer.lr=-1", "at least 0"]),
    "unknown option": (["loss=dpoo"], ["loss", "dpoo", "did you mean 'dpo'"]),
    "unknown group": (["los=dpo"], ["los"]),
    "unknown experiment": (["+experiment=dem"], ["experiment", "'dem'", "did you mean 'demo'"]),
    "not an override": (["steps"], ["'steps'", "key=value"]),
    "no key": (["=3"], ["'=3'", "key=value"]),
    "group without a plus": (["benchmark=gsm8k"], ["write +benchmark=gsm8k"]),
    "experiment without a plus": (["experiment=demo"], ["write +experiment=demo"]),
    "adapter without a plus": (["model/lora=default"], ["write +model/lora=default"]),
    "key of an adapter that is not there": (["model.lora.r=8"], ["+model/lora=default"]),
    "free key without a plus": (
        ["data.template_arguments.thinking=true"],
        ["write +data.template_arguments.thinking="],
    ),
    "group with a superfluous plus": (["+loss=ipo"], ["write loss=ipo, without the +"]),
    "key with a superfluous plus": (["+optimizer.lr=1"], ["write optimizer.lr=1, without the +"]),
    "number for a group": (["loss=5"], ["config group", "loss=dpo"]),
    "unknown key of Hydra": (["+hydra.run.dirr=x"], ["hydra.run.dirr", "--cfg hydra"]),
    "None for a number": (["data.limit=None"], ["write data.limit=null"]),
    "value with a bracket": (["data.path=/tmp/a(1).jsonl"], ["write 'data.path=\"/tmp/a(1).jsonl\"'"]),
    "value with an equals sign": (["data.path=a=b.jsonl"], ["write 'data.path=\"a=b.jsonl\"'"]),
    "value with a letter beyond ASCII": (["data.path=é.jsonl"], ["write 'data.path=\"é.jsonl\"'"]),
    "value with a tilde": (["data.path=~/a.jsonl"], ["write 'data.path=\"~/a.jsonl\"'"]),
    "value with a comma": (["data.path=a,b.jsonl"], ["needs -m", "'data.path=\"a,b.jsonl\"'"]),
    "key without effect": (["pairing.samples=2"], ["pairing.samples has no effect on `sage train`"]),
    "interpolation of nothing": (["name=${nope}"], ["nope"]),
    "experiment without pairs or problems": (
        ["data.path=null"],
        ["data.path=FILE", "data.problems.path=FILE"],
    ),
    "missing value": (["data.path=???"], ["data.path"]),
    "steps and epochs": (["epochs=1"], ["steps", "epochs"]),
    "micro-batch below a pair": (["micro_batch_tokens=500"], ["micro_batch_tokens=500", "512"]),
    "more ranks than pairs": (["world_size=8"], ["batch_size=4", "world_size=8"]),
    "offload without ZeRO": (["engine.offload=true"], ["engine.offload", "zero_stage"]),
    "hook without a class": (["+hooks.mine.every=3"], ["hooks.mine", "give hooks.mine._target_"]),
    "class that is not there": (["scorer._target_=sage.scorers.Nope"], ["scorer._target_=sage.scorers.Nope"]),
    "missing model": (["model.path=/no/such/model"], ["model.path=/no/such/model"]),
    "missing package": (["model.path=pkg://no_such_package/x.gguf"], ["no_such_package"]),
    "missing file": (["data.path=/no/such/pairs.jsonl"], ["/no/such/pairs.jsonl", "no such file"]),
    "missing benchmark": (
        ["+benchmark=gsm8k", "benchmark.gsm8k.path=/no/such.jsonl"],
        ["/no/such.jsonl", "no such file"],
    ),
    "missing held-out file": (["data.eval_path=/no/such.jsonl"], ["/no/such.jsonl", "no such file"]),
}


@pytest.mark.parametrize("name", BAD_OVERRIDES)
def test_bad_overrides_are_refused(train, tmp_path, name):
    overrides, parts = BAD_OVERRIDES[name]
    refused(train(*overrides), *parts)
    assert not (tmp_path / "run").exists()  # Hydra had made it


GOOD = make_pairs(3)
BAD_ROWS = {
    "missing response": ([GOOD[0], {**GOOD[1], "chosen": None}], ["pairs.jsonl:2", "chosen is missing"]),
    "empty response": ([{**GOOD[1], "rejected": " "}], ["pairs.jsonl:1", "rejected is empty"]),
    "equal responses": (
        [{**GOOD[0], "chosen": "x", "rejected": "x"}],
        ["pairs.jsonl:1", "chosen and rejected are the same"],
    ),
    "missing column": (
        [{"prompt": "p", "chosen": "c"}],
        ["pairs.jsonl", "no column 'rejected'", "prompt, chosen", "data.columns"],
    ),
    "no rows": ([], ["pairs.jsonl", "no rows"]),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_refused(train, tmp_path, name):
    rows, parts = BAD_ROWS[name]
    file = write_jsonl(tmp_path / "pairs.jsonl", rows)
    refused(train(f"data.path={file}"), *parts)


def test_a_malformed_line_is_refused_by_file_and_line(train, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join([json.dumps(GOOD[0]), "{'prompt': ", json.dumps(GOOD[2])]))
    refused(train(f"data.path={file}"), f"{file}:2", "not valid JSON")


def test_more_ranks_than_gpus_are_refused(train, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    refused(train("world_size=4"), "world_size=4", "2 GPUs")


def test_an_unknown_command_is_refused(sage):
    refused(sage("trian"), "'trian'", "did you mean 'train'", "resume")


def test_a_run_directory_in_use_is_refused_and_left_as_it_is(train, tmp_path):
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints" / "step_1").mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "checkpoints/step_1/train_state.pt"):
        (run_dir / name).write_text(f"the user's {name}\n")
    before = {p.relative_to(run_dir): p.is_file() and p.read_bytes() for p in run_dir.rglob("*")}
    refused(train(), str(run_dir), "already holds a run", "sage resume")
    assert {p.relative_to(run_dir): p.is_file() and p.read_bytes() for p in run_dir.rglob("*")} == before


def test_debug_shows_the_traceback(train, monkeypatch):
    monkeypatch.setenv("SAGE_DEBUG", "1")
    status, _, err = train("steps=0")
    assert status == 2
    assert "Traceback" in err and "steps=0" in err


def test_a_sweep_stops_at_bad_input_with_one_message(train, tmp_path):
    sweep = (f"hydra.sweep.dir={tmp_path / 'sweep'}", "optimizer.lr=-1,1e-6")
    refused(train(*sweep, flags=("-m",)), "optimizer.lr=-1")


@pytest.mark.slow
def test_the_installed_command_refuses_bad_input_as_well(tmp_path):
    program = Path(sys.executable).with_name("sage")
    result = subprocess.run(
        [program, "train", "+experiment=gsm8k", "data.problems.path=none.jsonl"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    refused((result.returncode, result.stdout, result.stderr), "data.path=FILE")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


# --- readers that leave


def test_a_stream_outlives_its_reader():
    """After the first write that finds no reader, later ones go nowhere, without an error."""
    reading, writing = os.pipe()
    stream = io.TextIOWrapper(Outliving(writing, "w", closefd=False), write_through=True)
    os.close(reading)
    for _ in range(2):
        stream.write("a line\n")
    assert os.fstat(writing).st_rdev == os.stat(os.devnull).st_rdev
    os.close(writing)


def test_a_stream_outlives_its_terminal_and_a_full_disk():
    """A lost terminal has an error of its own (EIO). A full disk loses what it refuses, and no more."""
    ours, terminal = os.openpty()
    os.close(ours)
    for opened in (terminal, os.open("/dev/full", os.O_WRONLY)):
        before = os.fstat(opened).st_rdev
        with io.TextIOWrapper(Outliving(opened, "w", closefd=False), write_through=True) as stream:
            for _ in range(2):
                stream.write("a line\n")
        nowhere = os.fstat(opened).st_rdev == os.stat(os.devnull).st_rdev
        assert nowhere == (opened == terminal) and (nowhere or before == os.fstat(opened).st_rdev)
        os.close(opened)


def test_a_pipe_that_does_not_block_gets_everything():
    """Some programs leave such a pipe to those that they start."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with io.BufferedWriter(Outliving(writing, "w")) as stream:
        reader = subprocess.Popen(["wc", "-c"], stdin=reading, stdout=subprocess.PIPE)
        stream.write(b"x" * 1_000_000)
    os.close(reading)
    assert reader.communicate()[0].split() == [b"1000000"]


def test_standard_streams_that_are_closed_or_cannot_show_a_character(tmp_path):
    """A file that is opened later must not get the number of a closed stream, and with it what is printed."""
    program = (
        "import os, sys; from sage.util.output import outlive_reader; outlive_reader(); print('\\u2501')\n"
        "assert os.open(os.devnull, os.O_RDONLY) > 2 and all(map(os.get_inheritable, range(3)))\n"
        "sys.stdout.flush()"
    )
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(program)}"
    for streams in ("<&- >&- 2>&-", "<&-", ">&-", f">{tmp_path}/out 2>&-"):
        assert subprocess.run(["bash", "-c", f"{command} {streams}"], check=False).returncode == 0, streams
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", program], env=ascii_only, capture_output=True, check=True)
    assert done.stdout == b"\\u2501\n"


@pytest.mark.slow
@pytest.mark.parametrize("words", [["train", "--help"], ["train", "--cfg", "job", "+experiment=demo"]])
def test_a_command_ends_quietly_when_its_reader_leaves(words, tmp_path):
    program = Path(sys.executable).with_name("sage")
    line = f"{shlex.quote(str(program))} {' '.join(words)} | true; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def leave_after_a_line(words: list[str]) -> None:
    """Read one line of what a command writes."""
    reading, writing = os.pipe()

    def write() -> None:
        for number in (1, 2):
            os.dup2(writing, number)
        be_command(words, ranks=1)

    process = Forked(write, keep=[writing])
    os.close(writing)
    with open(reading) as lines:
        assert lines.readline()
    sys.exit(process.wait())


@pytest.mark.slow
def test_a_training_run_goes_on_when_its_reader_leaves(tiny_model, pair_file, tmp_path):
    words = [
        "train",
        "model=hf",
        f"model.path={tiny_model}",
        f"data.path={pair_file}",
        "steps=2",
        "batch_size=4",
        "data.max_length=256",
        "micro_batch_tokens=1024",
        f"cache_dir={tmp_path / 'cache'}",
        f"hydra.run.dir={tmp_path / 'run'}",
    ]
    status, said = Started(leave_after_a_line, words).end()
    assert status == 0, said
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2


# --- completion

BASH = """
eval "$(sage train --shell-completion install=bash)"
complete -p sage > /dev/null || exit 9
for line; do
    COMP_LINE="$line"; COMP_POINT=${#line}; words=($line)
    COMP_CWORD=$(( ${#words[@]} - 1 )); [[ "$line" == *" " ]] && COMP_CWORD=${#words[@]}
    COMPREPLY=()
    hydra_bash_completion
    echo "${COMPREPLY[@]}"
done
"""
COMPLETED = {
    "sage ": set(cli.COMMANDS),
    "sage tr": {"train"},
    "sage train loss=d": {"loss=dpo", "loss=dpo_norm", "loss=dpop"},
    "sage train +experiment=de": {"+experiment=demo"},
    "sage train -m engine=zero3 optimizer.l": {"optimizer.lr="},
    "sage resume ru": set(),
}


@pytest.mark.slow
def test_bash_completion_as_documented(tmp_path):
    assert 'eval "$(sage train --shell-completion install=bash)"' in (REPO / "docs" / "cli.md").read_text()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "-c", BASH, "bash", *COMPLETED],
        env={**os.environ, "PATH": path},
        cwd=tmp_path,  # a word without an answer completes to a file
        capture_output=True,
        text=True,
        check=True,
    )
    found = [set(line.split()) for line in result.stdout.splitlines()]
    assert dict(zip(COMPLETED, found, strict=True)) == COMPLETED
    assert result.stderr == ""


def test_completion_query(sage, monkeypatch):
    monkeypatch.setenv("COMP_LINE", "sage train tracking=")
    assert sage("-sc", "query=bash")[1].split() == [
        "tracking=none",
        "tracking=tensorboard",
        "tracking=wandb",
    ]
    monkeypatch.setenv("COMP_LINE", "sage train what ever +experiment=nope ste")
    assert sage("-sc", "query=bash") == (0, "", "")
