"""Several sources of pairs in one run, and held-out pairs that are split off by their prompts."""

from __future__ import annotations

import json

import pytest
from conftest import make_pairs, make_tokenizer, refused, write_jsonl
from many_runs import column, execute, freeze, interrupted

from sage.config import DataConfig, PairColumns, SourceConfig
from sage.config.checks import check_sources
from sage.data.chat import ChatFormat
from sage.data.pairs import load_data
from sage.data.tokens import tokenize_pairs
from sage.util.errors import UserError


@pytest.fixture
def files(tmp_path):
    """Two sources: `big` with 60 pairs of 30 prompts, `small` with 20 pairs that have no ids of their own."""
    big = [{**row, "prompt": f"Task {i // 2}"} for i, row in enumerate(make_pairs(60))]
    small = [
        {"question": f"Question {i}", "chosen": f"Answer {i}. " * 3, "rejected": "No."} for i in range(20)
    ]
    return write_jsonl(tmp_path / "big.jsonl", big), write_jsonl(tmp_path / "small.jsonl", small)


@pytest.fixture
def sources(files):
    """A config of both, with these keys of each."""

    def make(big=None, small=None, **keys) -> DataConfig:
        columns = PairColumns(prompt="question")
        return DataConfig(
            sources={
                "big": SourceConfig(str(files[0]), **(big or {})),
                "small": SourceConfig(str(files[1]), columns=columns, **(small or {})),
            },
            **keys,
        )

    return make


def ids(data: DataConfig, held_out: bool = False, cache=None) -> list[str]:
    return load_data(data, cache and str(cache), held_out).pairs["pair_id"][:]


@pytest.mark.parametrize("cached", [False, True])
def test_sources_follow_one_another_and_keep_their_ids(sources, cached, tmp_path):
    found = ids(sources(small={"limit": 5}), cache=tmp_path / "cache" if cached else None)
    assert found == [f"big/p{i}" for i in range(60)] + [f"small/{i}" for i in range(1, 6)]
    rows = load_data(sources(), None).pairs
    assert rows[60]["prompt"] == json.dumps("Question 0") and rows[60]["row"] == 1


def test_weights_give_the_largest_set_in_these_proportions(sources):
    names = ids(sources(big={"weight": 1}, small={"weight": 2}))
    assert sum(name.startswith("small/") for name in names) == 20 and len(names) == 30
    names = ids(sources(big={"weight": 6.0}, small={"weight": 0.5}))
    assert sum(name.startswith("big/") for name in names) == 60 and len(names) == 65
    assert len({*names}) == 65
    again = ids(sources(big={"weight": 6.0}, small={"weight": 0.5}))
    assert names == again
    small = [name for name in names if name.startswith("small/")]
    assert small != [f"small/{i}" for i in range(1, 6)], "drawn, not the first ones"
    limited = load_data(sources(big={"weight": 1, "limit": 10}, small={"weight": 1}), None)
    assert limited.count == 20 and limited.notes == [
        "small: 10 of 20 pairs are drawn, by the weights",
    ]


def test_a_weight_that_leaves_a_source_no_pair_is_refused(sources):
    """One pair of it would be another proportion than asked for."""
    with pytest.raises(UserError, match=r"data\.sources\.small\.weight=0\.001.* none of its 20 pairs"):
        load_data(sources(big={"weight": 1}, small={"weight": 0.001}), None)


def test_the_draw_of_a_source_does_not_move_with_the_others_names(sources):
    one = sources(big={"weight": 1}, small={"weight": 1})
    other = sources(big={"weight": 1}, small={"weight": 1})
    other.sources = {"another": other.sources["small"], "big": other.sources["big"]}
    big = [name for name in ids(one) if name.startswith("big/")]
    assert len(big) == 20 and big == [name for name in ids(other) if name.startswith("big/")]


def test_bad_rows_are_named_by_key_file_and_row(sources, files):
    files[1].write_text(files[1].read_text() + '{"question": "x", "chosen": "y"}\n')
    with pytest.raises(UserError, match=r"data\.sources\.small: .*1 of 21 rows are bad.*small\.jsonl:21: "):
        try:
            load_data(sources(), None)
        except UserError as e:
            raise UserError(str(e).replace("\n", " ")) from e
    found = load_data(sources(max_bad=0.1), None)
    assert [row.pair_id for row in found.dropped] == ["small/21"] and found.count == 80
    data = sources()
    data.sources["small"].columns = PairColumns()
    with pytest.raises(UserError, match=r"data\.sources\.small: .* data\.sources\.small\.columns\.prompt="):
        load_data(data, None)


def test_equal_pairs_of_two_sources_are_counted(sources, tmp_path):
    data = sources()
    data.sources["copy"] = SourceConfig(data.sources["big"].path, limit=7)
    pairs = tokenize_pairs(
        load_data(data, None),
        make_tokenizer(),
        chat=ChatFormat.of(data),
        max_length=300,
        num_proc=1,
        cache_dir=str(tmp_path),
    )
    assert pairs.repeated() == (7, 0) and len(pairs) == 87


# --- held-out pairs by prompt


def prompts(data: DataConfig, held_out: bool) -> set[str]:
    return {*load_data(data, None, held_out).pairs["prompt"][:]}


def test_no_prompt_is_on_both_sides_and_no_pair_is_lost(sources):
    data = sources(eval_share=0.3)
    assert not prompts(data, True) & prompts(data, False)
    assert sorted(ids(data, True) + ids(data)) == sorted(ids(sources()))
    assert 0.1 < len(prompts(data, True)) / 50 < 0.5
    assert load_data(data, None).notes[-1].endswith("pairs are held out, by data.eval_share=0.3")
    data.eval_limit = 3
    assert ids(data, True) == ids(sources(eval_share=0.3), True)[:3]
    assert ids(data) == ids(sources(eval_share=0.3))


def test_the_same_prompts_are_held_out_whatever_else_there_is(sources):
    """Rounds ask other problems each time. A problem that was held out once must not be trained on later."""
    whole = sources(eval_share=0.3)
    alone = DataConfig(path=whole.sources["big"].path, limit=31, eval_share=0.3)
    assert prompts(alone, True) <= prompts(whole, True)
    assert prompts(alone, False) <= prompts(whole, False)


def test_a_problem_is_the_users_last_message(tmp_path):
    """The same problem under another system text, or with a started answer, must not be on the other side."""
    rows = []
    for i in range(40):
        response = {"chosen": "Right.", "rejected": "Wrong."}
        user = {"role": "user", "content": f"Problem {i}"}
        rows += [
            {"prompt": f"problem  {i}\n", **response},
            {"prompt": [user], **response},
            {"prompt": [{"role": "system", "content": "Think."}, user], **response},
            {"prompt": [user, {"role": "assistant", "content": f"First, {i}."}], **response},
            {"prompt": f"Proble\uff4d {i}\u200b", **response},  # a full-width m, and a space of no width
        ]
    data = DataConfig(path=str(write_jsonl(tmp_path / "rows.jsonl", rows)), eval_share=0.25)
    sides = [{(int(name) - 1) // 5 for name in ids(data, held_out)} for held_out in (True, False)]
    assert not sides[0] & sides[1] and len(sides[0]) + len(sides[1]) == 40


def test_a_share_that_leaves_a_side_empty_is_refused(tmp_path):
    path = str(write_jsonl(tmp_path / "one.jsonl", [make_pairs(1)[0], {**make_pairs(1)[0], "chosen": "x"}]))
    with pytest.raises(UserError, match=r"data\.eval_share=0\.5 .* holds out (all|none)"):
        load_data(DataConfig(path=path, eval_share=0.5), None)


def test_answers_are_checked_on_what_is_left(sources, files):
    """A selection of a selection: `without` must look at the pairs that are left, not at all of the file."""
    data = sources(eval_share=0.3)
    source = load_data(data, None)
    first, *others = ids(data)
    assert source.without([first]).pairs["pair_id"][:] == others
    assert source.without([first]).without([others[0]]).pairs["pair_id"][:] == others[1:]


# --- the command line


def mixture(files, more: str = "") -> str:
    columns = "columns: {prompt: question}"
    return f"+data.sources={{big: {{path: {files[0]}}}, small: {{path: {files[1]}, {columns}{more}}}}}"


def test_mixtures_are_refused_by_key(train, files):
    refused(train(mixture(files)), "data.path=", "data.sources are both set")
    alone = ("data.path=null", mixture(files))
    refused(train("data.path=null", mixture(files, ", weight: 1")), "data.sources.big.weight is not set")
    refused(
        train("data.path=null", mixture(files, ", wieght: 1")), "did you mean 'data.sources.small.weight'"
    )
    refused(train("data.path=null", mixture(files, ", weight: 0")), "data.sources.small.weight=0.0")
    refused(train(*alone, "data.limit=3"), "data.limit has no effect", "data.sources has its own")
    refused(train(*alone, "data.columns.prompt=x"), "data.columns.prompt has no effect")
    by_an_option = ("data=step_dpo_full", "data.path=null", mixture(files))
    refused(train(*by_an_option), "data.columns is set", "data.sources.NAME.columns", "add data=pairs")
    refused(train(*alone, "data.eval_path=x", "data.eval_share=0.1"), "data.eval_share has no effect")
    refused(
        train("data.path=null", f"+data.sources.big.path={files[0]}"), "'+data.sources={NAME: {path: FILE}"
    )
    refused(train("data.path=null", f"+data.sources={{a/b: {{path: {files[0]}}}}}"), "the name 'a/b'")
    refused(
        train("data.path=null", "+data.sources={big: {path: gone.jsonl}}"), "data.sources.big: gone.jsonl"
    )


def test_inspect_counts_by_source(sage, files, tiny_model, tmp_path):
    with files[1].open("a") as out:
        out.writelines(
            json.dumps({"question": f"{i}?", "chosen": "long " * 90, "rejected": "No."}) + "\n"
            for i in range(5)
        )
    words = ["inspect", "model=hf", f"model.path={tiny_model}", mixture(files, ", limit: 25"), "show=0"]
    words += [f"cache_dir={tmp_path}", "data.max_length=128", "data.eval_share=0.2", f"json={tmp_path / 'x'}"]
    status, out, err = sage(*words)
    assert status == 0, err
    rows = [json.loads(line) for line in (tmp_path / "x").read_text().splitlines()]
    kept = [row["pair_id"] for row in rows if "reason" not in row]
    counts = [sum(name.startswith(source) for name in kept) for source in ("big/", "small/")]
    assert f"pairs by source: {counts[0]} big, {counts[1]} small" in out and 0 < counts[1] <= 20
    assert "pairs are held out" in out and "too_long: rows small/2" in out


def test_a_source_has_its_own_keys_and_a_plain_name(sources):
    """What an experiment sets for data.path must not be dropped without a word, and top/NAME is a file."""
    check_sources(sources(columns=PairColumns(prompt="question"), eval_path="x"))
    for keys in ({"limit": 3}, {"split": "train_prefs"}, {"columns": PairColumns(prompt="question")}):
        (name,) = keys
        with pytest.raises(UserError, match=rf"data\.{name} is set.*data\.sources\.NAME\.{name} .*and add "):
            check_sources(sources(**keys))
    for name in ("..", ".", "-x", "a b", ""):
        with pytest.raises(UserError, match="may hold only letters"):
            check_sources(DataConfig(sources={name: SourceConfig("x")}))


@pytest.mark.slow
def test_a_run_counts_by_source_resumes_exactly_and_scores_write_their_own_rows(files, tiny_model, tmp_path):
    common = [
        *("model=hf", f"model.path={tiny_model}", "batch_size=4", "data.max_length=256"),
        *("micro_batch_tokens=1024", f"cache_dir={tmp_path / 'cache'}", "data.eval_share=0.2"),
        mixture(files, ", weight: 1").replace(f"{files[0]}}}", f"{files[0]}, weight: 2}}"),
    ]
    whole = freeze(tmp_path / "whole", *common, "steps=4", "save_every=2", "seed=3")
    scored = freeze(tmp_path / "scored", *common, "top=0.5", command="score-dataset")
    execute(1, [whole, scored])
    summary = json.loads((whole / "summary.json").read_text())
    assert sum(summary["sources"].values()) == summary["train_pairs"]
    assert summary["sources"]["big"] > summary["sources"]["small"] > 0
    assert summary["after"]["eval/pairs"] + summary["train_pairs"] == 60
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    shares = [line for line in lines if "sources/big" in line]
    assert [line["step"] for line in shares] == [1, 2, 3, 4]
    assert all(line["sources/big"] + line["sources/small"] == 1 for line in shares)
    originals = {file.stem: {*file.read_text().splitlines()} for file in files}
    tops = {file.stem: file.read_text().splitlines() for file in (scored / "top").iterdir()}
    assert tops.keys() == originals.keys() and all({*tops[name]} <= originals[name] for name in tops)
    assert sum(map(len, tops.values())) == round(summary["train_pairs"] * 0.5)

    resumed = interrupted(whole, 2, tmp_path / "resumed")
    execute(1, [resumed])
    assert column(resumed, "loss") == column(whole, "loss")
    assert json.loads((resumed / "summary.json").read_text())["sources"] == summary["sources"]
    assert not (resumed / "error.txt").exists()
