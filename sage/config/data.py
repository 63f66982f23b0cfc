"""The config groups that say what data is read: problems, preference pairs, and columns of either."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from sage.config.groups import key
from sage.config.keys import because


@dataclass
class Columns:
    """Maps our column names to the source's. null = the source uses our name, or has no such column."""

    def given(self) -> dict[str, str]:
        """Our name -> the source's, for the columns that the user mapped."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}


@dataclass
class ProblemColumns(Columns):
    problem_id: str | None = key(None, "the source's column of ids; without one, rows are numbered")
    prompt: str | None = key(None, "the source's column of problem texts; A+B joins two columns")
    answer: str | None = key(None, "the source's column of answers")
    solution: str | None = key(None, "the source's column of solutions, which pairing.chosen=gold uses")
    group: str | None = key(None, "the source's column of topics or levels; accuracy is also given per group")
    samples: str | None = key(
        None, "a column of how many responses to sample to each problem, instead of pairing.samples"
    )


@dataclass
class ResponseColumns(Columns):
    response: str | None = key(None, "the source's column of responses")
    answer: str | None = key(None, "the source's column of true answers")


@dataclass
class ProblemsConfig:
    path: str | None = key(
        None,
        "problems: JSONL, JSON, Parquet, an Arrow folder, or a hub name (OWNER/NAME:SUBSET); null = none",
    )
    split: str = key(
        "test", "split of a hub dataset or an Arrow DatasetDict; for a file, what its problems are for"
    )
    columns: ProblemColumns = field(default_factory=ProblemColumns)
    answer_from: str = key(
        "plain",
        "where the answer is in its column: after ####, in the last \\boxed{}, or the whole text",
        choices=("hash", "boxed", "plain"),
    )
    limit: int | None = key(None, "use only the first N problems", low=1)
    prompt: str = key(
        "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}.",
        "the prompt of each problem; {problem} is replaced by the problem's text",
    )


@dataclass
class ChatConfig:
    """How prompts become the text that the model reads. Every command has these keys."""

    chat_template: bool | str = key(
        True,
        "true = the tokenizer's chat template; false = plain text; else one of its named templates "
        "or a .jinja file",
    )
    template_arguments: dict[str, Any] = key(
        {}, "variables for the chat template, as in +data.template_arguments.enable_thinking=false"
    )


@dataclass
class PairColumns(Columns):
    """The source's column of each thing. "" = it has none, even if a column has our name."""

    pair_id: str | None = key(None, "ids; without one, rows are numbered")
    prompt: str | None = key(None, "prompts, text or messages; a.b is b inside the column a")
    chosen: str | None = key(None, "better responses")
    rejected: str | None = key(None, "worse responses")
    system: str | None = key(None, "texts of the system message")
    input: str | None = key(None, "texts that follow the prompt after a line break (Alpaca)")
    history: str | None = key(None, "earlier turns, a list of [user's text, assistant's text] (Alpaca)")
    started: str | None = key(None, "texts that begin the answer and that both responses continue (Step-DPO)")
    tools: str | None = key(None, "lists of tools for the chat template")
    chosen_reasoning: str | None = key(None, "the better responses' thoughts, where they are apart")
    rejected_reasoning: str | None = key(None, "the worse responses' thoughts, where they are apart")
    answer: str | None = key(None, "true answers, for data.answers")
    pass_rate: str | None = key(None, "pass rates, from 0 to 1")


@dataclass
class SourceConfig:
    """One of several sources of training pairs."""

    path: str = key(MISSING, "pairs of this source, in the same forms as data.path")
    split: str = key("train", "split of a hub dataset or an Arrow DatasetDict")
    limit: int | None = key(None, "use only the first N rows", low=1)
    weight: float | None = key(
        None,
        "this source's part of all pairs, relative to the other weights; pairs are drawn, and none is taken "
        "twice; null for all sources = all pairs",
        above=0,
    )
    columns: PairColumns = field(default_factory=PairColumns)


@dataclass
class DataConfig(ChatConfig):
    path: str | None = key(
        None,
        "training pairs: JSONL, JSON, Parquet, an Arrow folder, a hub name or pkg://; "
        "null = data.sources, or built from data.problems",
    )
    sources: dict[str, SourceConfig] = key({}, "several sources of training pairs, instead of data.path")
    problems: ProblemsConfig = field(default_factory=lambda: ProblemsConfig(split="train"))
    build: str = key(
        "missing",
        "missing = `sage train` builds the pairs of data.problems if cache_dir does not have them; "
        "never = it stops instead",
        choices=("missing", "never"),
    )
    split: str = key("train", "split of a hub dataset or an Arrow DatasetDict")
    eval_path: str | None = key(None, "held-out pairs, in the same formats as data.path")
    eval_share: float | None = key(
        None,
        "without eval_path: hold out the training pairs of about this share of the prompts, the same ones in "
        "every run",
        above=0,
        below=1,
    )
    eval_split: str = key("test", "split of the held-out pairs")
    scores: str | None = key(
        None, "run directory of `sage score-dataset`, whose reference log-probabilities are reused"
    )
    limit: int | None = key(None, "use only the first N training pairs", low=1)
    eval_limit: int | None = key(None, "use only the first N held-out pairs", low=1)
    columns: PairColumns = field(default_factory=PairColumns)
    max_bad: float = key(
        0.01, "largest share of bad rows; they are dropped and counted, and more are refused", low=0, high=1
    )
    answers: str | None = key(
        None,
        "verify both responses of pairs that have an answer; drop = drop pairs whose chosen is wrong "
        "or whose rejected is right; check = only count and list them",
        choices=(None, "check", "drop"),
    )
    max_length: int = key(
        2048, "pairs whose prompt + longer response have more tokens are dropped and counted", low=2
    )
    num_proc: int | None = key(None, "processes that tokenise; null = one per CPU core", low=1)
    packing: str = key(
        "auto",
        "shared: no padding, and text that prompts have in common is computed once; unshared: no padding; "
        "padded: one row per response; auto = shared if the model's attention allows it, else padded",
        choices=("auto", "shared", "unshared", "padded"),
    )

    @property
    def has_pairs(self) -> bool:
        """Whether there are training pairs, which need not be built first."""
        return self.path is not None or bool(self.sources)

    @property
    def has_held_out(self) -> bool:
        return self.eval_path is not None or self.eval_share is not None

    def ignored(self) -> dict[str, str]:
        """Keys without effect beside the others of this group, each with the reason."""
        ignored = {}
        if self.eval_path is not None:
            ignored |= because("since data.eval_path gives the held-out pairs", "data.eval_share")
        if not self.has_held_out:
            ignored |= because("since there are no held-out pairs", "data.eval_limit")
        if self.eval_path is None:
            ignored |= because("since there is no data.eval_path", "data.eval_split")
        for name, split in (("path", "split"), ("eval_path", "eval_split")):
            if Path(getattr(self, name) or "").expanduser().is_file():
                ignored |= because(f"since data.{name} is one file", f"data.{split}")
        if self.sources:
            unread = (f"data.{name}" for name in self.unread())
            ignored |= because("since data.sources has its own", *unread)
        return ignored

    def unread(self) -> list[str]:
        """Keys that are set for the training pairs, where data.sources has its own."""
        found = [name for name in ("split", "limit") if getattr(self, name) != getattr(DataConfig, name)]
        if self.eval_path is None and self.columns.given():
            found.append("columns")
        return found

    def title(self, held_out: bool = False) -> str:
        """What lines about the training pairs, or about the held-out ones, begin with."""
        if held_out and self.eval_path is None:
            return f"data.eval_share={self.eval_share}"
        return str(self.eval_path if held_out else self.path or "data.sources")
