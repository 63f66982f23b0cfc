"""sage.data.tokens: what the token ids of pairs must be."""

import json

import datasets
import numpy as np
import pyarrow as pa
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sage.data import picked, store
from sage.data import tokens as tokenized
from sage.data.chat import ChatFormat
from sage.data.columns import to_column, to_lists
from sage.data.pairs import read_pair_set
from sage.data.tokens import TokenizedPairs, tokenize_pairs
from sage.training.sources import doubtful
from sage.util.errors import UserError

PLAIN = {"prompt": "What is 2 + 2?", "chosen": "2 + 2 = 4", "rejected": "2 + 2 = 5"}
USER = {"role": "user", "content": "What is 2 + 2?"}
CONVERSATION = {
    "prompt": [USER],
    "chosen": [{"role": "assistant", "content": "4"}],
    "rejected": [{"role": "assistant", "content": "5"}],
}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="pairs.jsonl"):
        file = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(file)

    return write


def make_tokenizer(template=CHATML, bos=False, pad="<|im_end|>"):
    """A real byte-level BPE whose merges would happily join a prompt's
    last and a response's first letters."""
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


# ---------------------------------------------------------------- tokens


def test_columns_of_ids_keep_every_row():
    rows = [[1, 2], [], None, [3], [4, 5, 6], [2**31 - 1]]
    column = to_column(rows)
    assert column.type == pa.list_(pa.int32()) and column.to_pylist() == rows
    full = pa.chunked_array([to_column([row or [] for row in rows]), to_column([[7]]), to_column([])])
    for start in range(8):  # slices keep the whole of what they were cut from
        part = full.slice(start, 3)
        assert to_lists(part) == part.to_pylist()


def test_chat_ids_are_the_templates_own(tokenizer, write, tokenise):
    """Protects the prompt, up to the assistant's turn, and the response, to its end token."""
    pair = tokenise(read_pair_set(write(PLAIN)), tokenizer)[0]
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
    pair = tokenise(read_pair_set(path), tokenizer, chat_template=False)[0]
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
    pair = tokenise(read_pair_set(write({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"})), tokenizer)[0]
    assert tokenizer.decode(pair.chosen_ids) == expected


@pytest.mark.parametrize("chat_template", [True, False])
def test_end_tokens_inside_the_text(chat_template, tokenizer, write, tokenise):
    """Protects the text after a special token in a response, and data that already ends in eos."""
    path = write({"prompt": "q", "chosen": "a<|im_start|>b", "rejected": "c<|im_end|>"})
    pair = tokenise(read_pair_set(path), tokenizer, chat_template)[0]
    assert tokenizer.decode(pair.chosen_ids) == "a<|im_start|>b<|im_end|>"
    assert tokenizer.decode(pair.rejected_ids) == "c<|im_end|>"


@pytest.mark.parametrize("unknown", ["<unk>", "<end>"])
def test_characters_that_the_tokenizer_does_not_know_are_said(unknown, write, tokenise):
    """Protects from training on other texts than the file's: words become the unknown token, which may be
    the end token too.
    """
    words = {word: i for i, word in enumerate(["<end>", "<unk>", "1", "2", "3", "+"])}
    backend = Tokenizer(models.WordLevel(words, unk_token=unknown))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token=unknown)
    rows = [
        {"prompt": "1+2", "chosen": "3", "rejected": "2"},
        {"prompt": "1+2?", "chosen": "3", "rejected": "2"},
        {"prompt": "1+2", "chosen": "3x", "rejected": "2"},
    ]
    pairs = tokenise(read_pair_set(write(*rows)), tokenizer, chat_template=False)
    assert next(note for note in pairs.notes if "unknown token" in note).startswith("2 pairs: ")


def test_plain_prompt_keeps_begin_and_loses_end(write, tokenise):
    """Protects plain text from tokenizers that close every text: an eos between prompt and response."""
    tokenizer = make_tokenizer(template=None, bos=True)
    pair = tokenise(read_pair_set(write(PLAIN)), tokenizer, chat_template=False)[0]
    assert tokenizer.decode(pair.prompt_ids) == "<|bos|>" + PLAIN["prompt"]
    assert tokenizer.decode(pair.chosen_ids) == PLAIN["chosen"] + "<|im_end|>"


def test_mismatch_of_data_and_template(tokenizer, write, tokenise):
    """Protects from a chat flattened to text, and from a template that is missing,
    refuses or cannot end."""
    with pytest.raises(UserError, match=r"pair 1: .*data\.chat_template=true"):
        tokenise(read_pair_set(write(CONVERSATION)), tokenizer, chat_template=False)
    with pytest.raises(UserError, match=r"data\.chat_template=false"):
        tokenise(read_pair_set(write(PLAIN)), make_tokenizer(template=None))
    with pytest.raises(UserError, match=r"row 1 \(pair 1\): .*no system"):
        tokenise(read_pair_set(write(PLAIN)), make_tokenizer("{{ raise_exception('no system') }}"))
    endless = make_tokenizer()
    endless.eos_token = None
    with pytest.raises(UserError, match="no end token"):
        tokenise(read_pair_set(write(PLAIN)), endless)


def test_dropped_pairs_are_counted_never_cut(tokenizer, write, tokenise):
    """Protects trap 2, and the counts that the run reports."""
    rows = [PLAIN, {**PLAIN, "rejected": "5 " * 100}, {**PLAIN, "chosen": "4", "rejected": "4<|im_end|>"}]
    data = read_pair_set(write(*rows))
    whole = tokenise(data, tokenizer)
    assert whole.dropped == {"too_long": [], "same_tokens": ["3"]} and len(whole) == 2
    exact = int(whole.lengths()[0, 0] + whole.lengths()[0, 1:].max())
    fits = tokenise(data, tokenizer, max_length=exact)
    assert fits.dropped == {"too_long": ["2"], "same_tokens": ["3"]} and fits[0] == whole[0]
    with pytest.raises(UserError, match=rf"no pair is left of 3.*data\.max_length={exact - 20}"):
        tokenise(read_pair_set(write(*rows[:2], rows[1])), tokenizer, max_length=exact - 20)


def test_lengths(tokenizer, write, tokenise):
    """Protects the packer's only view of the data."""
    data = tokenise(read_pair_set(write(PLAIN, {**PLAIN, "rejected": "No idea"})), tokenizer)
    assert np.array_equal(data.lengths(), [[len(ids) for ids in data[i][2:]] for i in range(len(data))])
    assert data.lengths().dtype == np.int64


@pytest.mark.parametrize("heads", [(0, 0), (7, 7), (8, 8), (30, 30), (30, 9)])
def test_common_prefix(heads, monkeypatch):
    """The longest common beginning that leaves every prompt a token of its own, and none that
    is too short to pay."""
    monkeypatch.setattr("sage.data.picked.PREFIX_ROWS", 2)
    ids = list(range(100, 130))
    prompts = [ids[: heads[i % 2]] + [i, i, i] for i in range(5)]
    prompts.append(ids)  # one that is all prefix
    data = datasets.Dataset.from_dict(
        {"prompt_ids": prompts, "chosen_ids": [[1]] * 6, "rejected_ids": [[2]] * 6}
    )
    expected = min(*heads, 29)
    assert TokenizedPairs(data, {}, "").common_prefix == (expected if expected >= 8 else 0)


def test_keys_name_equal_texts_and_pairs_of_a_prompt_come_together():
    """Protects the planning of texts that stand in several pairs, also across the chunks of a file."""
    names = [([5], [1], [2]), ([6], [1], [3]), ([5], [3], [1]), ([7, 7], [2], [9]), ([6], [1, 1], [2])]
    columns = zip(*names, strict=True)
    ids = dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), map(list, columns), strict=True))
    parts = [datasets.Dataset.from_dict({k: v[i:j] for k, v in ids.items()}) for i, j in ((0, 2), (2, 5))]
    pairs = TokenizedPairs(datasets.concatenate_datasets(parts), {}, "")
    asked = np.array([3, 0, 4, 2, 1, 0])
    keys, flat = pairs.keys(asked), [text for i in asked for text in names[i]]
    assert keys.shape == (6, 3)
    equal = keys.ravel()[:, None] == keys.ravel()
    assert equal.tolist() == [[a == b for b in flat] for a in flat]
    assert pairs.by_prompt().tolist() == [0, 2, 1, 4, 3]


def test_held_out_pairs_that_are_training_pairs_are_counted(write, tokenise):
    pairs = [{**PLAIN, "pair_id": name, "chosen": f"It is {name}"} for name in "abcd"]
    tokenizer = make_tokenizer()
    training = tokenise(read_pair_set(write(*pairs[:3])), tokenizer)
    again = {**pairs[1], "pair_id": "under another id"}
    held_out = tokenise(read_pair_set(write(again, pairs[3], pairs[0], again)), tokenizer)
    assert held_out.also_in(training) == 3 and training.also_in(training) == 3
    assert training.also_in(tokenise(read_pair_set(write(pairs[3])), tokenizer)) == 0
    other = {**pairs[3], "pair_id": "e", "prompt": "Another question"}
    held_out = tokenise(read_pair_set(write(pairs[3], other)), tokenizer)  # another answer, another question
    assert held_out.prompts_also_in(training) == 1 and held_out.also_in(training) == 0


def test_cache_is_hit_and_keyed_by_what_matters(write, tokenise, monkeypatch, tmp_path):
    """Protects from stale ids, and from tokenising again when only the tokenizer's last call differs."""
    calls = []
    encode = tokenized.Encoder.__call__
    monkeypatch.setattr(tokenized.Encoder, "__call__", lambda *args: calls.append(1) or encode(*args))
    data, tokenizer = read_pair_set(write(PLAIN)), make_tokenizer()
    first = tokenise(data, tokenizer)
    tokenizer(["a", "b b b"], padding=True, truncation=True, max_length=2)
    again = tokenise(read_pair_set(write(PLAIN)), tokenizer)
    assert len(calls) == 1 and again.fingerprint == first.fingerprint and again[0] == first[0]
    assert again.dropped == first.dropped
    prints, splitting = {first.fingerprint}, make_tokenizer()
    splitting.split_special_tokens = True  # not a part of the tokenizer's JSON
    for changed in (
        tokenise(read_pair_set(write({**PLAIN, "chosen": "Four"})), tokenizer),
        tokenise(read_pair_set(write({**PLAIN, "pass_rate": 0.5})), tokenizer),
        tokenise(read_pair_set(write({**PLAIN, "pair_id": "other"})), tokenizer),
        tokenise(data, make_tokenizer(CHATML + " ")),
        tokenise(data, tokenizer, chat_template=False),
        tokenise(data, splitting),
    ):
        prints.add(changed.fingerprint)
    assert len(calls) == len(prints) == 7
    monkeypatch.setattr(tokenized, "source_digest", lambda _: "a later version")
    for same in (tokenise(data, tokenizer), tokenise(data, tokenizer, max_length=511)):
        assert same.fingerprint == first.fingerprint, "a run on these pairs may go on"
        assert same.rendering == first.rendering
    assert len(calls) == 9
    other = make_tokenizer(CHATML.replace("{%", "{% if tools %}TOOLS{% endif %}{%", 1))
    again = tokenise(data, other)
    assert again.fingerprint == first.fingerprint and again.rendering != first.rendering
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_parallel_and_serial_give_the_same(tokenizer, tokenise, write, monkeypatch, tmp_path):
    """Protects order, ids and fingerprint from the number of processes and chunks."""
    data = read_pair_set(write(*({**PLAIN, "chosen": f"It is {i}"} for i in range(40))))
    serial = tokenise(data, tokenizer)
    for file in (tmp_path / "cache").iterdir():
        file.unlink()
    monkeypatch.setattr(picked, "PARALLEL_FROM", 10)
    monkeypatch.setattr(picked, "BATCH", 7)
    monkeypatch.setattr(store, "BATCH_BYTES", 2000)
    parallel = tokenise(data, tokenizer, num_proc=2)
    assert parallel.fingerprint == serial.fingerprint
    assert parallel.data[:] == serial.data[:]


# ---------------------------------------------------------------- damaged caches, and what a model can take


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_a_damaged_cache_is_made_again(damage, write, tokenise, tmp_path, capsys):
    """Protects from ids that a full disk or a bad sector left behind: one line, and the right ids."""
    data, tokenizer = read_pair_set(write(PLAIN)), make_tokenizer()
    first = tokenise(data, tokenizer)[0]
    (file,) = (tmp_path / "cache").glob("pairs-*.arrow")
    content = file.read_bytes()
    ids = np.array(first.chosen_ids, dtype=np.int32).tobytes()
    assert ids in content
    changed = content.replace(ids, ids[4:] + ids[:4])
    file.write_bytes({"cut": content[: len(content) // 2], "changed": changed, "empty": b""}[damage])
    assert tokenise(data, tokenizer)[0] == first
    assert capsys.readouterr().out.count("is damaged") == 1
    assert tokenise(data, tokenizer)[0] == first and "damaged" not in capsys.readouterr().out


def with_config(tokenizer, folder, **keys):
    """The tokenizer as it is read from a model's folder."""
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"architectures": ["X"], **keys}))
    return PreTrainedTokenizerFast.from_pretrained(folder)


def test_tokens_without_an_embedding_are_refused(write, tokenise, tmp_path):
    """Protects from an index error inside the model; a token that no pair has may lack its embedding."""
    tokenizer = make_tokenizer()
    count = len(tokenizer)
    tokenizer.add_tokens([AddedToken("<|new2|>", special=True)])
    tokenizer = with_config(tokenizer, tmp_path / "model", model_type="llama", vocab_size=count)
    assert len(tokenise(read_pair_set(write(PLAIN)), tokenizer)) == 1
    path = write(PLAIN, {"prompt": "Say <|new2|>", "chosen": "4 <|new2|> a", "rejected": "5"})
    for _ in range(2):  # from the cache, too
        with pytest.raises(
            UserError, match=rf"row 2 \(pair 2\).*'<\|new2\|>' with id {count},.*below {count}"
        ):
            tokenise(read_pair_set(path), tokenizer)


@pytest.mark.parametrize("family", [{"model_type": "gpt2", "n_positions": 64}, {"model_type": "llama"}])
def test_pairs_beyond_the_models_positions_are_dropped(family, write, tokenise, tmp_path):
    """Protects from an index error, or from positions that the model never saw."""
    keys = {"max_position_embeddings": 64} if family["model_type"] == "llama" else {}
    tokenizer = with_config(make_tokenizer(), tmp_path / "model", vocab_size=400, **family, **keys)
    long = {"prompt": "word " * 60, "chosen": "a b c", "rejected": "d e f"}
    pairs = tokenise(read_pair_set(write(PLAIN, long)), tokenizer)
    assert len(pairs) == 1 and pairs.dropped["beyond_positions"] == ["2"] and not pairs.dropped["too_long"]
    with pytest.raises(UserError, match=r"no pair is left of 1.*max_length=512.*64 positions"):
        tokenise(read_pair_set(write(long)), tokenizer)


def test_scaled_positions_count(tmp_path):
    """A rope that was stretched reaches further than the config's number, which is
    sometimes the one before."""
    assert tokenized.model_limits("") == tokenized.model_limits(str(tmp_path)) == (None, None)
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    for positions in (64, 256):
        keys = {"max_position_embeddings": positions, "rope_parameters": rope, "vocab_size": 9}
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **keys}))
        assert tokenized.model_limits(str(tmp_path)) == (9, 256)


def test_repeated_and_contradicted_pairs_are_counted_for_the_user(write, tokenise):
    """Protects a run from learning a pair and its opposite without a word."""
    opposite = {**PLAIN, "chosen": PLAIN["rejected"], "rejected": PLAIN["chosen"]}
    rows = PLAIN, opposite, PLAIN, {**PLAIN, "prompt": "other"}
    pairs = tokenise(read_pair_set(write(*rows)), make_tokenizer())
    assert pairs.repeated() == (1, 3)
    assert [note.split()[1] for note in doubtful(pairs)] == ["1", "3"]


def test_a_share_of_bad_pairs_may_be_dropped(write, tmp_path):
    """Protects large public sets from one row that the template refuses, and small ones from losing many."""
    refuses = CHATML + "{% if 'no' in messages[0].content %}{{ raise_exception('not this') }}{% endif %}"
    data = read_pair_set(write(*[{**PLAIN, "prompt": f"q {i}"} for i in range(9)], {**PLAIN, "prompt": "no"}))
    options = {"chat": ChatFormat(), "max_length": 512, "num_proc": 1, "cache_dir": str(tmp_path)}
    pairs = tokenize_pairs(data, make_tokenizer(refuses), max_bad=0.1, **options)
    assert (
        len(pairs) == 9 and pairs.dropped["template_refuses"] == ["10"] and "not this" in pairs.details["10"]
    )
    with pytest.raises(UserError, match=r"1 of 10 pairs .*\n  row 10 \(pair 10\): .*not this"):
        tokenize_pairs(data, make_tokenizer(refuses), max_bad=0.05, **options)
