"""Long documents of a table of labelled sentences: most sentences of each, but not all, have the document's label.

    resonance train --task text-classification --data sentences.tsv --output-dir runs/sentences
    python examples/long_documents.py held-out.tsv long.tsv --sentences 800
    resonance predict runs/sentences long.tsv

A classifier of sentences is asked far beyond the lengths that it was trained on. A document of 800 sentences of 20
tokens has 16,000; were it read only in part, the answer would be no better than of a few sentences.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np

from resonance_nn.data import DataError
from resonance_nn.data.tables import label_of, read_table, text_of
from resonance_nn.files import atomic_path


def documents(
    sentences: dict[str, list[str]], count: int, length: int, share: float, rng: np.random.Generator
) -> list[tuple[str, str]]:
    """(text, label), the labels by turns: of ``length`` sentences drawn with replacement, ``share`` have the label, and
    the others any other, in a random order."""
    labels, made = sorted(sentences), []
    for i in range(count):
        label = labels[i % len(labels)]
        own = round(share * length)
        others = [text for name in labels if name != label for text in sentences[name]]
        chosen = [*rng.choice(sentences[label], own), *rng.choice(others, length - own)]
        rng.shuffle(chosen)
        made.append((" ".join(chosen), label))
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help=".tsv, .csv or .jsonl with text and label")
    parser.add_argument("output", type=Path, help="table to write, .tsv")
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--sentences", type=int, default=800, help="in each document")
    parser.add_argument("--share", type=float, default=0.6, help="of its sentences that have its label")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sentences: dict[str, list[str]] = defaultdict(list)
    try:
        for number, row in enumerate(read_table(str(options.table), ("text", "label")), 1):
            where = f"{options.table}: row {number}"
            sentences[label_of(row["label"], where)].append(" ".join(text_of(row, "text", where).split()))
    except DataError as error:
        parser.error(str(error))
    if len(sentences) < 2:
        parser.error(f"{options.table}: has {len(sentences)} label; it must have two or more")
    for name, value, right in (
        ("--documents", options.documents, options.documents >= 1),
        ("--sentences", options.sentences, options.sentences >= 1),
        ("--share", options.share, 0 < options.share <= 1),
    ):
        if not right:
            parser.error(f"{name} {value}: must be {'in (0, 1]' if name == '--share' else '≥ 1'}")
    rng = np.random.default_rng(options.seed)
    made = documents(sentences, options.documents, options.sentences, options.share, rng)
    with atomic_path(options.output) as path:
        path.write_text("".join(f"{a}\t{b}\n" for a, b in [("text", "label"), *made]), encoding="utf-8")
    print(f"{options.output}: {len(made)} documents of {options.sentences} sentences")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
