"""Time to the first step with many pairs, by the clock: `python benchmarks/many_pairs.py FOLDER [--pairs N]`.

It writes pairs of about 500 tokens and a model of one layer to FOLDER, which takes 9 GB for a million pairs.
The first `sage train` of one step reads and tokenises them. The others find them in the cache. The same runs
with a thousand pairs show what starting takes by itself. The loss needs no reference, so that no run waits
for log-probabilities of all pairs.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

MODEL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
}
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS_OF_A_PAIR = (80, 200, 210)  # prompt, chosen, rejected
WORDS_OF_A_SENTENCE = 10


def write_model(folder: Path, words: list[str]) -> None:
    """A random Llama and a byte-level BPE that has a token for each word."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [" ".join(words)] * 2,
        trainers.BpeTrainer(
            vocab_size=10_000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=special[1], pad_token=special[1], chat_template=CHATML
    )
    config = transformers.LlamaConfig(
        **MODEL, vocab_size=len(tokenizer), tie_word_embeddings=True, eos_token_id=1, pad_token_id=1
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_pairs(file: Path, count: int, words: list[str]) -> None:
    rng = random.Random(count)
    sentences = [" ".join(rng.choices(words, k=WORDS_OF_A_SENTENCE)) + "." for _ in range(10_000)]
    with file.with_suffix(".tmp").open("w") as rows:
        for _ in range(count):
            texts = (" ".join(rng.choices(sentences, k=n // WORDS_OF_A_SENTENCE)) for n in WORDS_OF_A_PAIR)
            rows.write(json.dumps(dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))) + "\n")
    file.with_suffix(".tmp").rename(file)


def first_step(folder: Path, pairs: Path) -> tuple[float, float]:
    """Start a run of one step, and return the seconds until its metrics are there, and its rank's largest
    private memory until then in GB.
    """
    run_dir, peak = folder / "run", 0
    shutil.rmtree(run_dir, ignore_errors=True)
    words = ["sage", "train", "model=hf", f"model.path={folder / 'model'}", f"cache_dir={folder / 'cache'}"]
    words += ["+baseline=dpo", "loss=simpo", "steps=1", "batch_size=4"]
    words += [f"data.path={pairs}", "data.max_length=1024", "data.eval_limit=8", f"hydra.run.dir={run_dir}"]
    began, metrics = time.perf_counter(), run_dir / "metrics.jsonl"
    with (folder / "output").open("w") as output:
        process = psutil.Popen(words, stdout=output, stderr=subprocess.STDOUT)
        while not (metrics.exists() and '"loss"' in metrics.read_text()):
            if process.poll() is not None:
                raise SystemExit((folder / "output").read_text())
            peak = max(peak, *map(private_bytes, ranks_of(process)))
            time.sleep(0.02)
        seconds = time.perf_counter() - began
        if process.wait():
            raise SystemExit((folder / "output").read_text())
    return seconds, peak / 1e9


def ranks_of(launcher: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in launcher.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found += [child] if "sage.worker" in child.cmdline() else []
    return found


def private_bytes(process: psutil.Process) -> int:
    """Memory that no mapped file backs: pages of a mapped file are shared, and the system can drop them."""
    with suppress(psutil.NoSuchProcess):
        memory = process.memory_info()
        return memory.rss - memory.shared
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--warm", type=int, default=3, help="warm runs of each size")
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    words = sorted({"".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 8))) for _ in range(2_000)})
    if not (folder / "model").exists():
        write_model(folder / "model", words)
    for count in (1_000, args.pairs):
        file = folder / f"pairs_{count}.jsonl"
        if not file.exists():
            write_pairs(file, count, words)
        for turn in range(1 + args.warm):
            seconds, memory = first_step(folder, file)
            row = {"pairs": count, "run": turn, "seconds": round(seconds, 1), "rank_gb": round(memory, 3)}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
