"""How far off are prompts that `balancer serve` counts without a tokenizer? booked / actual, by kind of text.

    python -m tests.bench.serve.estimate [--tokenizer tokenizer.json]

Texts are this machine's: English prose (documentation under /usr/share/doc), code (Python's own library) and Chinese
(what there is in UTF-8 under /usr/share and in Python's packages). Without a tokenizer of a model a byte-level BPE like
those of Llama 3 and Qwen is trained on the half of the files that is not measured: its ratios are those of such
tokenizers in kind, not in every digit. Needs the package tokenizers.
"""

from __future__ import annotations

import argparse
import random
import re
import site
import statistics
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from balancer.serve.tokens import Estimate

PROMPTS, LEARNED = 1_000, 300
VOCABULARY = 48_000
_MOST_BYTES = 12 << 20
_HAN = re.compile(r"[\u3400-\u9fff][\u3000-\u9fff\uff00-\uffef\w\s]*[\u3400-\u9fff\u3002]")


def texts(paths: Iterable[Path]) -> Iterator[str]:
    """Files that are UTF-8 and of some length, up to a bound."""
    left = _MOST_BYTES
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeError):
            continue
        if len(text) > 500:
            yield text
            left -= len(text)
        if left < 0:
            return


def kinds(rng: random.Random) -> dict[str, list[str]]:
    """Texts by kind, in random order."""
    library = Path(sysconfig.get_path("stdlib"))
    shared = Path("/usr/share")
    prose = [
        *shared.glob("doc/**/README*"), *shared.glob("doc/**/*.txt"), *shared.glob("doc/**/*.md"),
        *shared.glob("common-licenses/*"), *shared.glob("perl/**/*.pod"), *shared.glob("vim/**/doc/*.txt"),
    ]  # fmt: skip
    packages = [Path(folder) for folder in site.getsitepackages()]
    chinese = [
        *shared.glob("**/*zh*"), *library.glob("**/*zh*"),
        *(path for folder in packages for path in folder.glob("**/*zh*")),
    ]  # fmt: skip
    found = {
        "English prose": list(texts(sorted(set(prose)))),
        "code": list(texts(sorted(library.glob("*.py")) + sorted(library.glob("[a-l]*/*.py")))),
        "Chinese": [" ".join(runs) for text in texts(sorted(set(chinese))) if len(runs := _HAN.findall(text)) > 20],
    }
    for listed in found.values():
        rng.shuffle(listed)
    return found


def trained(samples: list[str]) -> Tokenizer:
    """A byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(samples, trainer)
    return tokenizer


def prompts(found: list[str], rng: random.Random) -> list[str]:
    """Pieces of texts, 100 to 20,000 characters, short ones more often."""
    made = []
    while len(made) < PROMPTS:
        text = rng.choice(found)
        size = min(len(text), int(100 * 200 ** rng.random()))
        start = rng.randrange(len(text) - size + 1)
        made.append(text[start : start + size])
    return made


def quantiles(ratios: list[float]) -> str:
    cuts = statistics.quantiles(ratios, n=20)
    return f"{cuts[0]:.2f} / {cuts[9]:.2f} / {cuts[18]:.2f}"


def booked_over_actual(estimate: Estimate, pairs: list[tuple[int, int]], learns: bool) -> list[float]:
    ratios = []
    for size, actual in pairs:
        ratios.append(estimate.tokens(size) / actual)
        if learns:
            estimate.learn(size, actual)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    found = kinds(rng)
    for kind, listed in found.items():
        print(f"{kind}: {len(listed)} texts, {sum(len(text.encode()) for text in listed) >> 10:,} KiB")
    if arguments.tokenizer:
        tokenizer = Tokenizer.from_file(arguments.tokenizer)
    else:
        tokenizer = trained([text for listed in found.values() for text in listed[::2]])
    pairs: dict[str, list[tuple[int, int]]] = {}
    for kind, listed in found.items():
        asked = prompts(listed[1::2] or listed, rng)
        encoded = tokenizer.encode_batch_fast(asked, add_special_tokens=False)
        pairs[kind] = [(len(text.encode()), len(one.ids)) for text, one in zip(asked, encoded, strict=True)]
    mixed = [pair for listed in pairs.values() for pair in listed]
    rng.shuffle(mixed)
    print("booked / actual, p5 / p50 / p95    at 4 bytes a token    settled on it    settled on all three")
    everything = Estimate()
    booked_over_actual(everything, mixed, learns=True)
    for kind, listed in [*pairs.items(), ("all three", mixed)]:
        first = booked_over_actual(Estimate(), listed, learns=False)
        own = booked_over_actual(Estimate(), listed, learns=True)[LEARNED:]
        shared = Estimate()
        shared.bytes_per_token = everything.bytes_per_token
        mean = sum(size for size, _ in listed) / sum(actual for _, actual in listed)
        print(
            f"{kind:16} {mean:.2f} bytes a token  {quantiles(first):>20} {quantiles(own):>20}"
            f" {quantiles(booked_over_actual(shared, listed, learns=False)):>20}"
        )


if __name__ == "__main__":
    main()
