"""sage inspect: pairs exactly as training will see them, from the tokenizer alone."""

from __future__ import annotations

import json
import sys

import pytest
from conftest import make_pairs, write_jsonl
from templates import family

from sage import cli, config
from sage.commands.inspect import inspect
from sage.data.chat import ChatFormat, response_ends
from sage.data.display import foreign_markup, shown, texts_of, warnings_of
from sage.data.tokens import Pair
from sage.util.errors import UserError

LONG = " ".join(["two and two is four"] * 9)
ROWS = [
    {"pair_id": "plain", "prompt": "What is 2 + 2?", "chosen": "4", "rejected": "5"},
    {"pair_id": "alike", "prompt": "What is 2 + 2?", "chosen": LONG + " 4", "rejected": LONG + " 5"},
    {"pair_id": "markup", "prompt": "q [INST]", "chosen": "a<|im_start|>b", "rejected": "c d"},
    {
        "pair_id": "twice",
        "prompt": "q",
        "chosen": "<think>\na<think>b</think>c",
        "rejected": "<think>x</think>y",
    },
    {"pair_id": "end", "prompt": "q", "chosen": "<think>\na b", "rejected": "<think>\na b<|im_end|>"},
    {"pair_id": "long", "prompt": "q", "chosen": "a", "rejected": "b" * 4000},
]


@pytest.fixture
def folder(tmp_path):
    """A tokenizer, and nothing else: no config.json, no weights."""
    family("qwen3").save_pretrained(tmp_path / "tokenizer")
    return tmp_path


def run(folder, capsys, *overrides, rows=ROWS):
    from hydra import compose, initialize_config_module

    path = write_jsonl(folder / "pairs.jsonl", rows)
    with initialize_config_module("sage.conf", version_base="1.3"):
        words = [
            "model=hf",
            f"model.path={folder / 'tokenizer'}",
            f"data.path={path}",
            f"cache_dir={folder / 'cache'}",
        ]
        cfg = config.load(compose("inspect", [*words, *overrides]))
    assert isinstance(cfg, config.InspectConfig)
    inspect(cfg)
    return capsys.readouterr().out


def test_shows_pairs_dropped_rows_and_warnings(folder, capsys):
    out = run(folder, capsys, "data.max_length=400")
    assert "<|im_start|>assistant\n<think>\n\n</think>\n\n" in out and "4<|im_end|>" in out
    assert "1 too_long" in out
    for name in ("alike", "markup"):
        assert any(line.startswith("warning:") and line.endswith(name) for line in out.splitlines()), name
    assert "a thought is opened twice: twice" in out
    assert "markup of a chat template in it: markup" in out


def test_pairs_that_others_repeat_or_contradict(folder, capsys):
    """Training on a pair and its opposite teaches nothing, and no other number shows it."""
    first = {"prompt": "What is 2 + 2?", "chosen": "4", "rejected": "5"}
    opposite = {"prompt": "What is 2 + 2?", "chosen": "5", "rejected": "4"}
    other = {"prompt": "What is 2 + 3?", "chosen": "5", "rejected": "4"}
    rows = [{**row, "pair_id": f"p{i}"} for i, row in enumerate((first, opposite, first, other))]
    out = run(folder, capsys, rows=rows)
    assert "2 pairs: another pair has the same prompt and the same responses: p0, p2" in out
    assert "3 pairs: another pair has chosen and rejected exchanged: p0, p1, p2" in out


def test_wrong_labels_are_listed_or_dropped_as_in_training(folder, capsys):
    """Protects `exactly as training will see them`: data.answers=drop leaves pairs out of training."""
    rows = [
        {"pair_id": "good", "prompt": "What is 2 + 2?", "chosen": "It is 4.", "rejected": "It is 5."},
        {"pair_id": "both", "prompt": "What is 2 + 2? [INST]", "chosen": "It is 5.", "rejected": "It is 4."},
        {"pair_id": "right", "prompt": "What is 2 + 2?", "chosen": "It is 4.", "rejected": "So it is 4."},
    ]
    rows = [row | {"answer": "4"} for row in rows]
    words = ["+data.columns.answer=answer", f"json={folder / 'out.jsonl'}"]
    out = run(folder, capsys, "data.answers=check", *words, rows=rows).splitlines()
    assert "warning: 1 pairs: the chosen response's answer is wrong: both" in out
    assert "warning: 2 pairs: the rejected response's answer is right: both, right" in out
    assert any("2 pairs are kept" in line for line in out)

    out = run(folder, capsys, "data.answers=drop", *words, rows=rows).splitlines()
    assert any(line.startswith("1 pairs, lengths") for line in out) and "dropped: 2" in out
    assert not any(line.startswith("warning") for line in out)
    found = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [(row["pair_id"], row.get("reason")) for row in found[:1]] == [("good", None)]
    assert {(row["pair_id"], row["reason"], row["row"]) for row in found[1:]} == {
        ("both", "wrong_chosen", 2),
        ("right", "right_rejected", 3),
    }
    with pytest.raises(UserError, match="leaves no pair"):
        run(folder, capsys, "data.answers=drop", *words, rows=rows[1:])


def test_json_has_every_pair_and_every_dropped_row(folder, capsys):
    """Protects programs that read it: texts and ids belong together, and nothing is missing."""
    file, tokenizer = folder / "out.jsonl", family("qwen3")
    run(folder, capsys, "data.max_length=400", f"json={file}", "show=0")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["pair_id"] for row in rows} == {row["pair_id"] for row in ROWS}
    pairs = [row for row in rows if "prompt_ids" in row]
    for row in pairs:
        for part in ("prompt", "chosen", "rejected"):
            assert tokenizer.decode(row[f"{part}_ids"]) == row[f"{part}_text"]
    dropped = {row["pair_id"]: row for row in rows if "prompt_ids" not in row}
    assert dropped["long"]["reason"] == "too_long" and dropped["long"]["row"] == 6
    assert pairs[0]["chosen_text"] == "4<|im_end|>"


def test_texts_keep_the_spaces_that_some_tokenizers_drop():
    tokenizer = family("llama 2")
    ids = tokenizer("[INST] q [/INST]", add_special_tokens=False)["input_ids"]
    answer = tokenizer("[INST] q [/INST] a b", add_special_tokens=False)["input_ids"][len(ids) :]
    (_, chosen, _), *_ = texts_of([Pair("1", None, ids, answer, answer)], tokenizer)
    assert chosen == " a b"


def test_a_pair_is_shown_with_its_special_tokens_marked():
    tokenizer = family("chatml")
    ends = response_ends(tokenizer, ChatFormat())
    ids = [
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in ("<|im_start|>q", "a<|im_end|>", "b")
    ]
    text = shown(Pair("7", None, *ids), tokenizer, ends)
    assert "rejected (1 tokens, cut off: no end token)" in text.plain and "chosen (2 tokens)" in text.plain
    marked = {text.plain[span.start : span.end] for span in text.spans if "reverse" in str(span.style)}
    assert marked == {"<|im_start|>", "<|im_end|>"}
    short = shown(Pair("7", None, ids[0] * 50, ids[1], ids[2]), tokenizer, ends, width=20)
    assert len(short.plain) < 160 and short.plain.count("...") == 1


def test_warnings_against_hand_made_pairs():
    ends, marks = {1}, {1, 2}

    def warned(chosen, rejected, texts=("p", "c", "r")):
        return warnings_of(
            Pair("1", None, [5], chosen, rejected), texts, ends, marks, foreign_markup(["<|im_end|>"])
        )

    assert warned([7, 8, 1], [9, 8, 1]) == []
    assert warned([7, 2, 1], [9, 8, 1]) == ["template_in_response"]
    assert warned([7, 1], [9, 1], ("p", "4</s><|im_end|>", "r<|im_end|>")) == ["template_in_response"]
    assert warned([7, 1], [9, 1], ("p", "4<|im_end|>", "r<|im_end|>")) == []
    assert warned([7, 1], [7]) == ["only_the_end_differs"]
    assert warned([*range(10, 20), 1], [*range(10, 20), 5, 1]) == ["begin_alike"]
    assert warned([7, 1], [8] * 7) == ["one_much_longer"]
    assert warned([7, 1], [9, 1], ("x <think>\n", "<think>a", "b")) == ["thought_opened_twice"]
    assert warned([7, 1], [9, 1], ("x", "<think>a</think><think>b</think>", "b")) == []


def test_the_command_leaves_no_folder_and_needs_no_model(folder, monkeypatch, capfd):
    """In the launcher's own process; a config error exits with 2."""
    monkeypatch.chdir(folder)
    words = ["model=hf", f"model.path={folder / 'tokenizer'}", f"cache_dir={folder / 'cache'}"]
    path = write_jsonl(folder / "pairs.jsonl", make_pairs(4))
    monkeypatch.setattr(sys, "argv", ["sage", "inspect", *words, f"data.path={path}"])
    cli.main()
    assert "4 pairs, lengths in tokens" in capfd.readouterr().out
    monkeypatch.setattr(sys, "argv", ["sage", "inspect", *words])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 2 and "data.path is not set" in capfd.readouterr().err
    assert sorted(p.name for p in folder.iterdir()) == ["cache", "pairs.jsonl", "tokenizer"]
