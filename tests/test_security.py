"""Foreign files cannot run programs. Each is tried with a payload that writes a marker file."""

from __future__ import annotations

import json
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make_pairs, make_tokenizer
from safetensors.torch import load_file

from sage import config
from sage.config import DataConfig, LoraConfig, ModelConfig, build
from sage.data import chat as chat_module
from sage.data.chat import ChatFormat, Renderer
from sage.data.pairs import load_data
from sage.data.tokens import model_limits
from sage.model import loading
from sage.model.memory import shell
from sage.model.reference import read_logps
from sage.training.base import open_model
from sage.training.hooks import Hook
from sage.util.errors import UserError


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    """A file that must not exist when the test ends."""
    file = tmp_path / "marker"
    pickle.loads(pickle.dumps(Payload(file)))
    assert file.exists()  # the payload works
    file.unlink()
    yield file
    assert not file.exists()


@pytest.fixture
def model(tiny_model, tmp_path):
    folder = tmp_path / "foreign"
    shutil.copytree(tiny_model, folder)
    return folder


def open_all(folder: Path, cache: Path, **options) -> None:
    """Everything that a run does with a model folder before it trains."""
    cfg = ModelConfig(path=str(folder), **options)
    model_limits(str(folder))
    base = open_model(cfg, torch.device("cpu"), 0, str(cache))
    base.identity()
    base.load()


# --- model folders and adapters


def test_pickled_weights(model, marker, tmp_path):
    torch.save({"a": Payload(marker)}, model / "pytorch_model.bin")
    torch.save({"a": Payload(marker)}, model / "optimizer.pt")
    open_all(model, tmp_path)  # there are safetensors: the pickles are not touched
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match="convert them once"):
        open_all(model, tmp_path)


def test_code_of_a_model_folder(model, marker, tmp_path):
    (model / "mine.py").write_text(f"open({str(marker)!r}, 'w')\nclass Mine: pass\n")
    maps = {
        "config.json": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"},
        "tokenizer_config.json": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]},
    }
    for name, auto_map in maps.items():
        file = model / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": auto_map}))
    open_all(model, tmp_path)  # transformers knows this type, so its own code is used
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "mine"}))
    started = time.monotonic()
    with pytest.raises(UserError, match="trust_remote_code=true"):
        open_all(model, tmp_path)
    assert time.monotonic() - started < 10  # nobody is asked, and nothing waits for an answer


def test_kernels_that_a_config_names(model, tmp_path, monkeypatch):
    """transformers would fetch compiled code from the hub, in place of the attention that we ask for."""
    monkeypatch.setattr("transformers.integrations.hub_kernels.get_kernel", lambda *_, **__: pytest.fail())
    monkeypatch.setattr("transformers.integrations.hub_kernels.is_kernels_available", lambda: True)
    file = model / "config.json"
    own = json.loads(file.read_text())
    for kernel in ("kernels-community/flash-attn2", "eager"):
        names = {"attn_implementation": kernel, "experts_implementation": "sonicmoe"}
        file.write_text(json.dumps(own | names | {f"_{key}": value for key, value in names.items()}))
        cfg = ModelConfig(path=str(model), attention="sdpa")
        for loaded in (
            loading.load_base(str(model), cfg, torch.float32),
            shell(str(model), cfg, torch.float32).model,
        ):
            assert loaded.config._attn_implementation == "sdpa"
            assert loaded.config._experts_implementation in (None, "eager", "grouped_mm")


def test_adapters(model, marker, tmp_path, monkeypatch):
    import peft
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "adapter"
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), settings).save_pretrained(folder)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    file = folder / "adapter_config.json"
    whole = json.loads(file.read_text())
    options = {"lora": LoraConfig(), "adapter_path": str(folder)}

    mapping = {"base_model_class": "Mine", "parent_library": "evil"}
    file.write_text(json.dumps(whole | {"auto_mapping": mapping, "base_model_name_or_path": str(folder)}))
    open_all(model, tmp_path, **options)  # peft reads these only where it has to find the model itself
    file.write_text(json.dumps(whole | {"megatron_config": {"a": 1}, "megatron_core": "evil"}))
    with pytest.raises(UserError, match="Megatron"):
        open_all(model, tmp_path, **options)
    file.write_text(json.dumps(whole))
    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights) | {"a": Payload(marker)}, folder / "adapter_model.bin")
    weights.unlink()
    with pytest.raises(UserError, match="adapter_path"):
        open_all(model, tmp_path, **options)


# --- run folders


@dataclass
class Holder(Hook):
    """A user's class with an option of any content."""

    content: Any = None


TARGETS = ["loss", "scorer", "curriculum", "generation", "hooks.mine"]


@pytest.mark.parametrize("key", TARGETS)
def test_targets_are_checked_where_they_are_built(key, marker):
    """A class is checked by what builds it, too, and only the class that `_target_` names is built."""
    group = key.split(".")[0]
    for target in (
        "subprocess.Popen",
        "pathlib.Path.touch",
        "webbrowser.BackgroundBrowser",
        "zipfile.ZipFile",
    ):
        with pytest.raises(UserError, match="_target_="):
            build(key, {"_target_": target, "args": ["touch", str(marker)]}, group)


def test_what_an_option_holds_is_not_built(marker):
    nested = {"_target_": "subprocess.Popen", "args": ["touch", str(marker)]}
    hook = build("hooks.mine", {"_target_": "test_security.Holder", "content": nested}, "hooks")
    assert hook.content == nested


def test_yaml_of_a_run_folder(marker, tmp_path):
    for tag in ("python/object/apply:os.system", "python/object/new:os.system"):
        (tmp_path / "config.yaml").write_text(f"command: train\nname: !!{tag} ['touch {marker}']\n")
        with pytest.raises(UserError, match=r"config\.yaml"):
            config.load(tmp_path)


def test_a_run_folders_config(train, marker, tmp_path, monkeypatch):
    """Hydra's interpolations reach the environment only, and are text in a frozen config."""
    monkeypatch.setattr("sage.launch.start", lambda *_: None)
    assert train()[0] == 0
    file = tmp_path / "run" / "config.yaml"
    content = yaml.safe_load(file.read_text())
    content["hooks"] = {"mine": {"_target_": "os.system", "command": f"touch {marker}"}}
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=r"hooks\.mine\._target_=os\.system"):
        config.load(tmp_path / "run")


def test_a_run_folder_reads_nothing_of_the_environment(train, tmp_path, monkeypatch):
    """A secret could leave the machine as the name of a model or of a W&B project."""
    monkeypatch.setattr("sage.launch.start", lambda *_: None)
    monkeypatch.setenv("SECRET", "s3cret")
    assert (
        train("name='${literal}'".replace("$", "\\$"))[0] == 0
    )  # text in a frozen config, which stays readable
    file = tmp_path / "run" / "config.yaml"
    assert config.load(tmp_path / "run").name == "${literal}"
    whole = yaml.safe_load(file.read_text())
    tracking = whole["tracking"] | {"project": "a${oc.env:SECRET}"}
    for change in ({"name": "${oc.env:SECRET}"}, {"tracking": tracking}):
        file.write_text(yaml.safe_dump(whole | change))
        with pytest.raises(UserError, match=r"not a config that sage wrote.*oc\.env:SECRET"):
            config.load(tmp_path / "run")


@pytest.mark.parametrize("content", [b"5", b"- 1", b"\x00\xff", b"a: &a [*a]", b"text", b""])
def test_a_run_folders_config_that_is_none(content, tmp_path):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match="not a config that sage wrote"):
        config.load(tmp_path)


# --- data and caches


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "arrow", "csv"])
def test_pair_files_that_are_pickles(suffix, marker, tmp_path):
    file = tmp_path / f"pairs.{suffix}"
    file.write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(UserError, match="pairs"):
        load_data(DataConfig(path=str(file)), None)


@pytest.mark.parametrize("depth", [100, 101, 600, 950, 100_000])
def test_rows_that_are_nested_deeply(depth, tmp_path):
    """Python's JSON reads hundreds of levels, of which code that recurses, such as a template, fails."""
    value = "[" * (depth - 1) + "]" * (depth - 1)
    row = json.dumps(make_pairs(1)[0])[:-1] + f', "other": {value}}}\n'
    calls = [{"role": "assistant", "content": "", "tool_calls": "VALUE"}]
    tools = json.dumps({**make_pairs(1)[0], "chosen": calls}).replace('"VALUE"', value)
    for number, text in enumerate((row, tools)):
        file = tmp_path / f"{number}.jsonl"
        file.write_text(text)
        if depth == 100 and text == row:
            assert len(load_data(DataConfig(path=str(file)), None).pairs) == 1
        else:
            with pytest.raises(UserError, match="nested too deeply"):
                load_data(DataConfig(path=str(file)), None)


def test_a_dataset_folder_with_a_script(marker, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "rows.py").write_text(f"open({str(marker)!r}, 'w')\n")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_pairs(4)))
    try:
        assert len(load_data(DataConfig(path=str(folder)), None).pairs) == 4
    except UserError as e:
        assert str(folder) in str(e)


def test_caches_that_are_pickles(marker, tmp_path):
    file = tmp_path / "reference.safetensors"
    file.write_bytes(pickle.dumps(Payload(marker)))
    assert read_logps(file, 3) is None
    torch.save({"chosen": Payload(marker)}, file)
    assert read_logps(file, 3) is None


def test_ranks_import_nothing_from_the_folder_they_start_in(marker, tmp_path):
    if sys.version_info < (3, 11):
        pytest.skip("Python 3.10 has no such switch")
    from sage.util.processes import ENVIRONMENT

    (tmp_path / "yaml.py").write_text(f"open({str(marker)!r}, 'w')\n")
    command = [sys.executable, "-c", "import yaml; print(yaml.__file__)"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert "site-packages" in done.stdout


# --- chat templates

ESCAPES = [
    "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "{{ self.__init__.__globals__.__builtins__.open('MARKER', 'w') }}",
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('MARKER', 'w') }}",
    "{{ strftime_now.__globals__.__builtins__.open('MARKER', 'w') }}",
    "{% set x = messages|attr('__class__') %}{{ x.__mro__ }}",
    "{{ '%s'.__format__.__self__.__class__ }}{{ namespace.__init__.__globals__ }}",
    "{% include 'MARKER' %}",
    "{{ messages.append('x') }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_cannot_escape(template, marker):
    template = template.replace("MARKER", str(marker))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    try:
        text = Renderer(tokenizer, ChatFormat()).render([{"role": "user", "content": "a"}])
        assert "<class" not in text and "<built-in" not in text and "<function" not in text
    except UserError as e:
        assert "refuses the conversation" in str(e)


ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x",
    "{% macro f(n) %}{% for i in range(99) %}{{ f(n - 1) if n }}{% endfor %}{% endmacro %}{{ f(9) }}",
]


@pytest.mark.parametrize("template", ENDLESS)
def test_a_template_cannot_hang_a_run(template, monkeypatch):
    monkeypatch.setattr(chat_module, "LIMIT", 0.3)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    renderer = Renderer(tokenizer, ChatFormat())
    started = time.monotonic()
    for _ in range(1000):  # pairs
        with pytest.raises(UserError, match="does not end"):
            renderer.render([{"role": "user", "content": "a"}])
    assert time.monotonic() - started < 10


GREEDY = [
    "{{ 'a' * 10**10 }}",
    "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% for i in range(99999) %}{{ 'a' * 10**8 }}{% endfor %}",
    "{{ range(99999) | list * 10**6 }}",
    "{{ '%9999999999d' % 1 }}",
]


@pytest.mark.parametrize("template", GREEDY)
def test_a_template_cannot_take_all_memory(template):
    """The refusal comes before the memory is taken, and the process has what it had before."""
    limit, peak = resource.getrlimit(resource.RLIMIT_AS), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match="takes over 1 GB of memory"):
        Renderer(tokenizer, ChatFormat()).render([{"role": "user", "content": "a"}])
    assert resource.getrlimit(resource.RLIMIT_AS) == limit
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 1.3 * 2**20  # KB


def test_the_memory_limit_counts_what_a_forked_process_has_itself():
    """Tokenising forks after the first rendering, and each forked process then grows by itself."""
    code = (
        "import mmap, os\nfrom sage.util.limits import memory_limit\n"
        "with memory_limit(1 << 30): pass\n"
        "if os.fork(): raise SystemExit(os.waitstatus_to_exitcode(os.wait()[1]))\n"
        "more = mmap.mmap(-1, 2 << 30)\n"  # takes addresses, not memory
        "with memory_limit(1 << 30): bytes(1 << 28)\n"
        "try:\n"
        "    with memory_limit(1 << 30): bytes(1 << 31)\n"
        "except MemoryError: os._exit(0)\n"
        "os._exit(1)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_call_into_c_that_does_not_end_ends_the_process():
    """No handler of Python's runs during such a call. The launcher says what the signal means."""
    code = (
        "from sage.util.limits import cpu_limit\na, b = [1], [1]\n"
        "for _ in range(60): a, b = [a, a], [b, b]\n"
        "with cpu_limit(0.05): [a] == [b]"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60)
    assert done.returncode == -signal.SIGPROF


def test_a_big_range_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for i in range(10**9) %}x{% endfor %}"
    with pytest.raises(UserError, match="refuses the conversation"):
        Renderer(tokenizer, ChatFormat()).render([{"role": "user", "content": "a"}])


def test_loading_says_nothing_ran(model, marker, tmp_path):
    """The whole folder is opened once more, beside every kind of foreign file at once."""
    for name in ("training_args.bin", "scheduler.pt", "rng_state.pth", "custom_generate.py", "modeling_x.py"):
        (model / name).write_bytes(pickle.dumps(Payload(marker)))
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(f"open({str(marker)!r}, 'w')\n")
    open_all(model, tmp_path)
    assert loading.load_tokenizer(str(model), ModelConfig(path=str(model))).eos_token_id is not None
