"""A source is read once. Later runs, and the other ranks, find what was read by the identity of its files."""

import json
import re
import subprocess
import sys

import pytest

from sage.data import reader, store
from sage.data.pairs import load_pair_set, read_pair_set
from sage.util.errors import UserError

ROWS = [{"prompt": f"Question {i}?", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(30)]


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def content(found):
    return found.pairs[:], found.dropped, found.notes, found.content, found.count, found.answers


def test_a_second_run_reads_no_row(tmp_path, monkeypatch):
    path, cache = (
        write(tmp_path / "pairs.jsonl", [*ROWS, ROWS[0] | {"chosen": "no 0"}]),
        str(tmp_path / "cache"),
    )
    first = load_pair_set(path, cache)
    assert content(first) == content(read_pair_set(path)) and len(first.dropped) == 1
    with monkeypatch.context() as patch:
        patch.setattr(reader.Reader, "rows", lambda self: pytest.fail("rows are read again"))
        assert content(load_pair_set(path, cache)) == content(first)
    # Same size, and as good as the same time.
    write(tmp_path / "pairs.jsonl", [{**ROWS[0], "chosen": "yes 9"}, *ROWS[1:], ROWS[0] | {"chosen": "no 0"}])
    again = load_pair_set(path, cache)
    assert again.pairs["chosen"][0] == '"yes 9"' and again.content != first.content
    assert load_pair_set(path, cache, limit=3).count == 3


@pytest.mark.parametrize("damaged", ["texts", "notes", "keys"])
def test_damaged_texts_are_read_again(damaged, tmp_path, capsys):
    path, cache = write(tmp_path / "pairs.jsonl", ROWS), tmp_path / "cache"
    first = content(load_pair_set(path, str(cache)))
    (file,) = cache.glob("*.arrow" if damaged == "texts" else "*.json")
    old = file.read_bytes()
    change = {"texts": (b"yes 7", b"yes 8"), "notes": (b": 30", b": 31"), "keys": (b"checksum", b"chacksum")}
    file.write_bytes(old.replace(*change[damaged]))
    assert file.read_bytes() != old
    assert content(load_pair_set(path, str(cache))) == first
    assert capsys.readouterr().out.count("is damaged") == 1
    assert content(load_pair_set(path, str(cache))) == first and "damaged" not in capsys.readouterr().out


def test_a_source_that_is_refused_leaves_nothing(tmp_path):
    path, cache = write(tmp_path / "pairs.jsonl", [*ROWS, {"prompt": "q"}]), tmp_path / "cache"
    for _ in range(2):
        with pytest.raises(UserError, match=r"1 of 31 rows are bad.*\n.*:31: chosen is missing"):
            load_pair_set(path, str(cache))
    assert not [*cache.glob("*.arrow"), *cache.glob("*.tmp"), *cache.glob("*.json")]


def test_a_full_disk_is_named(tmp_path):
    """`sage inspect` on a file system without room: the message names the file, and no part of it stays."""
    path = write(tmp_path / "pairs.jsonl", ROWS * 20)
    program = (
        "import resource, signal, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from sage.data.pairs import load_pair_set; from sage.util.errors import refusal\n"
        "try: load_pair_set(*sys.argv[1:])\n"
        "except OSError as error: print(refusal(error))"
    )
    command = [sys.executable, "-c", program, path, str(tmp_path / "cache")]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(r"texts-\w+.arrow cannot be used: .*File too large", out)
    assert not [*(tmp_path / "cache").glob("*.arrow"), *(tmp_path / "cache").glob(".*.tmp")]


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path, cache = write(tmp_path / "pairs.jsonl", ROWS), tmp_path / "cache"
    pair = reader.Reader.pair

    def grows(self, row):
        with open(path, "a") as out:
            out.write("\n")
        return pair(self, row)

    monkeypatch.setattr(reader.Reader, "pair", grows)
    with pytest.raises(UserError, match="was changed while it was read"):
        load_pair_set(path, str(cache))
    assert not [*cache.glob("*.arrow"), *cache.glob("*.json")]


SAYS = [{"role": "assistant", "content": "a"}]
SOURCES = {
    "a column that only later rows have": [*ROWS[:9], *({**row, "answer": "4"} for row in ROWS[9:])],
    "a column that only later rows fill": [
        *({**row, "system_prompt": None} for row in ROWS[:9]),
        {**ROWS[9], "system_prompt": "Be brief"},
    ],
    "responses that repeat the prompt, but not all": [
        *({**row, "chosen": row["prompt"] + " y", "rejected": row["prompt"] + " n"} for row in ROWS[:9]),
        ROWS[9],
    ],
    "a row that gives no pair, among responses that repeat the prompt": [
        *({**row, "chosen": row["prompt"] + " y", "rejected": row["prompt"] + " n"} for row in ROWS[:9]),
        {**ROWS[9], "rejected": ""},
    ],
    "responses that repeat the prompt": [
        {**row, "chosen": row["prompt"] + " y", "rejected": row["prompt"] + " n"} for row in ROWS
    ],
    "a prompt under another name, later": [
        *({"chosen": "a b c", "rejected": "a b d"} for _ in range(5)),
        {"q": "why", "chosen": "a b c", "rejected": "a b d"},
    ],
    "no responses at first": [*({"prompt": "q"} for _ in range(5)), *ROWS],
    "another format, later": [
        {"instruction": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "x", **ROWS[0]},
    ],
}


@pytest.mark.parametrize("name", SOURCES)
def test_the_first_rows_do_not_decide(name, tmp_path, monkeypatch):
    """A source is planned from its first rows. Later rows that say otherwise must count as much."""
    path, outcomes = write(tmp_path / "pairs.jsonl", SOURCES[name]), []
    for head in (1, 3, 1000):
        monkeypatch.setattr(reader, "HEAD", head)
        monkeypatch.setattr(reader, "BATCH", 4)
        try:
            outcomes.append(content(read_pair_set(path, max_bad=0.5)))
        except UserError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_large_batches_hold_the_same_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "BATCH", 4)
    monkeypatch.setattr(store, "BATCH_BYTES", 1000)
    path = write(tmp_path / "pairs.jsonl", ROWS)
    found = load_pair_set(path, str(tmp_path / "cache"))
    assert found.pairs["row"][:] == list(range(1, 31)) and found.pairs.data["row"].num_chunks > 1
