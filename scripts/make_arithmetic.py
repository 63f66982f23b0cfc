"""Makes the arithmetic task (sage/assets/arithmetic): a small model with bad habits, problems and its pairs.

python scripts/make_arithmetic.py sage/assets/arithmetic

The model learns chained additions and subtractions, written out step by step. About 40% of its solutions to
learn from are wrong: where a step carries or borrows, the writer may forget it. How often he forgets depends
on the two units digits. So the model is confidently wrong in some places, and sometimes wrong in others. Its
own samples are checked against the true answers and become preference pairs. This takes minutes on one core.
On another machine or PyTorch the last bits of the weights differ, and so do the pairs.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from rich.progress import track
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 0
PROBLEMS = {"train": 2500, "validation": 500, "test": 500}
HABITS = (0.05, 0.4, 0.9)  # how often a carry or borrow is forgotten, by the units digits that meet
STEPS, BATCH, LR = 800, 64, 2e-3
TERMS = 3
SAMPLES = 8  # responses to a problem
PAIRS = 2  # the most that one problem gives
END, ANSWER = "<end>", "#### "
TOKENS = [END, ANSWER, *"0123456789+-=\n"]
# A conversation of one turn is the bare text, so that prompts read alike with and without the template.
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)

Terms = tuple[int, ...]  # of a sum; the first is positive
Habits = dict[tuple[int, int], float]


def problems(rng: random.Random) -> Iterator[Terms]:
    """Yield three two-digit terms, without end. Totals stay in 30..199, so a wrong one is never negative."""
    while True:
        terms = [rng.randrange(30, 100)]
        while len(terms) < TERMS:
            term = rng.choice((-1, 1)) * rng.randrange(10, 100)
            if 30 <= sum(terms) + term < 200:
                terms.append(term)
        yield tuple(terms)


def prompt(terms: Terms) -> str:
    return f"{terms[0]}" + "".join(f"{term:+}" for term in terms[1:]) + "="


def make_habits(rng: random.Random) -> Habits:
    """For every two units digits that carry (u, v) or borrow (u, -v): how often that is forgotten."""
    meet = [(u, v) for u in range(10) for v in range(-9, 10) if not 0 <= u + v < 10]
    return {units: rng.choice(HABITS) for units in meet}


def solution(terms: Terms, habits: Habits, rng: random.Random) -> str:
    """Step by step, each step going on from the total that was written, right or wrong."""
    total, text = terms[0], ""
    for term in terms[1:]:
        sign = 1 if term > 0 else -1
        forgets = rng.random() < habits.get((total % 10, sign * (abs(term) % 10)), 0)
        result = total + term - 10 * sign * forgets
        text += f"{total}{term:+}={result}\n"
        total = result
    return f"{text}{ANSWER}{total}"


def is_right(terms: Terms, response: str) -> bool:
    return response.rpartition(ANSWER)[2] == str(sum(terms))


def make_pairs(terms: Terms, responses: list[str], name: str, rng: random.Random) -> Iterator[dict]:
    """Wrong responses, no two alike, each against a right one. None when all are right, or all wrong."""
    right = [text for text in responses if is_right(terms, text)]
    wrong = sorted(set(responses) - set(right))
    for i, rejected in enumerate(rng.sample(wrong, min(PAIRS, len(wrong))) if right else []):
        yield {
            "pair_id": f"{name}-{i}",
            "prompt": prompt(terms),
            "chosen": rng.choice(right),
            "rejected": rejected,
            "pass_rate": len(right) / len(responses),
            "answer": str(sum(terms)),
        }


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; `#### ` and the end have one each."""
    ids = {token: i for i, token in enumerate(TOKENS)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # pyright: ignore
    tokenizer.decoder = decoders.Fuse()  # pyright: ignore
    tokenizer.add_tokens([AddedToken(ANSWER, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, padding_side="left", chat_template=TEMPLATE
    )


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(TOKENS),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=TOKENS.index(END),
            pad_token_id=TOKENS.index(END),
        )
    )


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: Iterator[tuple[str, str]]
) -> None:
    """Next-token prediction of the responses, each batch of fresh problems."""
    optimizer = torch.optim.AdamW(model.parameters(), LR, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, STEPS, pct_start=0.05)
    for _ in track(range(STEPS), "training"):
        batch = list(islice(texts, BATCH))
        rows = [torch.tensor(tokenizer(head + tail + END)["input_ids"]) for head, tail in batch]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
        for row, (head, _tail) in zip(labels, batch, strict=True):
            row[: len(head)] = -100  # a prompt has a token a character
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def answer(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, asked: list[Terms], samples: int
) -> list[list[str]]:
    """`samples` sampled responses to each problem; greedy where it is 1."""
    found: list[list[str]] = []
    for start in track(range(0, len(asked), 128), "answering"):
        batch = tokenizer(
            [prompt(terms) for terms in asked[start : start + 128]], padding=True, return_tensors="pt"
        )
        how = (
            {"do_sample": True, "num_return_sequences": samples, "top_k": 0}
            if samples > 1
            else {"do_sample": False}
        )
        ids = model.generate(**batch, max_new_tokens=64, **how)  # pyright: ignore
        ids = ids[:, batch["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        found += [texts[i : i + samples] for i in range(0, len(texts), samples)]
    return found


def write(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{file.name}: {len(rows)} rows, {file.stat().st_size:,} bytes")


def main(output: Path) -> None:
    torch.set_num_threads(1)  # the order of sums, and with it every bit, depends on it
    output.mkdir(parents=True, exist_ok=True)
    rng = random.Random(SEED)
    # A dict, because it keeps the order and drops the second of two alike: no problem is in two splits.
    distinct = list(dict.fromkeys(islice(problems(rng), 2 * sum(PROBLEMS.values()))))
    splits = {name: [distinct.pop() for _ in range(count)] for name, count in PROBLEMS.items()}
    held_out = {*splits["validation"], *splits["test"]}
    habits = make_habits(rng)
    texts = (
        (prompt(terms), solution(terms, habits, rng)) for terms in problems(rng) if terms not in held_out
    )

    tokenizer = make_tokenizer()
    model = make_model()
    train(model, tokenizer, texts)
    model.bfloat16().save_pretrained(output)
    tokenizer.save_pretrained(output)
    model.float()  # samples come from the weights as they were saved

    for name, asked in splits.items():
        names = [f"{name}-{i:04d}" for i in range(len(asked))]
        write(
            output / f"problems_{name}.jsonl",
            [
                {"problem_id": problem_id, "prompt": prompt(terms), "answer": str(sum(terms))}
                for problem_id, terms in zip(names, asked, strict=True)
            ],
        )
        answers = answer(model, tokenizer, asked, SAMPLES)
        pairs = [pair for row in zip(asked, answers, names, strict=True) for pair in make_pairs(*row, rng)]
        write(
            output / f"pairs_{name}.jsonl", [pair for pair in pairs if pair["rejected"]]
        )  # a sample may be empty
        greedy = [texts[0] for texts in answer(model, tokenizer, asked, 1)]
        accuracy = sum(map(is_right, asked, greedy)) / len(asked)
        print(f"{name}: greedy accuracy {accuracy:.3f}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
