"""Fixtures that most tests use: a tiny random model with a real tokenizer, and a few plausible pairs."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
# Tests start two ranks, and compare with references on the CPU. `make gpu` runs those that want a GPU.
if os.environ.get("SAGE_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch
import tqdm

# tqdm's monitor thread takes its lock now and then. A test that forks at that moment has a child that waits
# for the lock for ever.
tqdm.tqdm.monitor_interval = 0
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
REPO = Path(__file__).resolve().parent.parent
SHARED_DATA = REPO.parent / "shared" / "data"

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: a long file that came last would run while other processes idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection() -> None:
    gc.disable()  # while test files are imported: what they make stays


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def make_tokenizer():
    """A byte-level BPE of 320 tokens with a ChatML template. Its pad token is the end token, as is common."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["How many apples are left? The answer is 12. She sells 3 and buys 4."] * 4, trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHATML
    )


def make_pairs(n: int) -> list[dict]:
    rows = []
    for i in range(n):
        a, b = 3 + i % 7, 2 + i % 5
        rows.append(
            {
                "pair_id": f"p{i}",
                "prompt": f"Ann has {a} apples and buys {b}{' more' * (i % 3)}. How many apples?",
                "chosen": f"{a} + {b} = {a + b}. The answer is {a + b}." + " Right." * (i % 4),
                "rejected": f"{a} * {b} = {a * b}. The answer is {a * b + 1}.",
                "pass_rate": (i % 5) / 4,
            }
        )
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A Hugging Face folder: a two-layer Llama of random weights, tied head."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pair_file(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", make_pairs(40))


@pytest.fixture(scope="session")
def problem_file(tmp_path_factory) -> Path:
    """Twelve problems in GSM8K's form. The tiny model solves none, so chosen is the human solution."""
    rows = [
        {
            "question": f"Ann has {i} apples{' and pears' * (i % 3)}. How many?",
            "answer": f"She has <<{i}={i}>>{i}.\n#### {i}",
        }
        for i in range(12)
    ]
    return write_jsonl(tmp_path_factory.mktemp("problems") / "problems.jsonl", rows)


@pytest.fixture
def sage(monkeypatch, capsys):
    """Runs a command line in this process; returns its exit status, stdout and stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        from sage import cli

        monkeypatch.setattr(sys, "argv", ["sage", *words])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # so that what the command sets is taken back
        status = 0
        try:
            cli.main()
        except SystemExit as e:
            status = e.code if isinstance(e.code, int) else 0
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def train(sage, tiny_model, pair_file, tmp_path, monkeypatch):
    """`sage train` on the tiny model, with more overrides, and proof that no rank is started."""
    monkeypatch.setattr("sage.launch.start", lambda *_: pytest.fail("a rank was started"))

    def run(*overrides: str, flags: tuple[str, ...] = ()) -> tuple[int, str, str]:
        return sage(
            "train",
            *flags,
            "model=hf",
            f"model.path={tiny_model}",
            f"data.path={pair_file}",
            "steps=1",
            "batch_size=4",
            "data.max_length=256",
            "micro_batch_tokens=1024",
            f"cache_dir={tmp_path / 'cache'}",
            f"hydra.run.dir={tmp_path / 'run'}",
            *overrides,
        )

    return run


def refused(result: tuple[int, str, str], *parts: str) -> None:
    """One message on stderr that holds all parts, status 2, no traceback."""
    status, _, err = result
    assert status == 2, err
    assert err.startswith("error: ") and err.count("error: ") == 1, err
    assert "Traceback" not in err
    for part in parts:
        assert part in err, err
