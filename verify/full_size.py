"""PRISM and Community Alignment at full size, generated in their exact schema: counts, time and memory of the loaders.

    python -m verify.full_size prism DIRECTORY
    python -m verify.full_size community-alignment DIRECTORY

The numbers of conversations, turns, candidates, double choices and missing preferences are those of the released data
(PRISM: 68,371 utterances; Community Alignment v1.1: 90,256 rows); the texts are random words of similar length.
"""

import argparse
import csv
import json
import random
import resource
import sys
import time
from collections import Counter
from pathlib import Path

import train

WORDS = "the of a preference people answer because value work country family think law free question better".split()


def words(rng: random.Random, mean: int) -> str:
    return " ".join(rng.choices(WORDS, k=max(2, int(rng.expovariate(1 / mean)))))


def generate_prism(directory: Path) -> dict[str, int]:
    """8,011 conversations of 1,396 users; first turns of 4, 3, 2 and 1 candidates; 19,161 later turns of 2.

    265 of the later turns have the same text twice, both marked as chosen.
    """
    rng = random.Random(0)
    first_turns = [4] * 6220 + [3] * 1608 + [2] * 162 + [1] * 21
    rng.shuffle(first_turns)
    later = Counter(rng.choices(range(len(first_turns)), k=19_161))
    equal = set(rng.sample(range(19_161), 265))
    count = number = 0
    with open(directory / "utterances.jsonl", "w") as f:
        for conversation, candidates in enumerate(first_turns):
            for turn in range(1 + later[conversation]):
                size = candidates if turn == 0 else 2
                both = turn > 0 and number in equal
                number += turn > 0
                texts = [f"{words(rng, 60)} {i}" for i in range(size)]
                prompt = f"{words(rng, 12)} {conversation}"
                best = rng.randrange(size)
                for i in range(size):
                    row = {
                        "utterance_id": f"ut{count}",
                        "interaction_id": f"int{conversation}-{turn}",
                        "conversation_id": f"c{conversation}",
                        "user_id": f"user{conversation % 1396}",
                        "turn": turn,
                        "within_turn_id": i,
                        "conversation_type": ("unguided", "values guided", "controversy guided")[conversation % 3],
                        "user_prompt": prompt,
                        "model_response": texts[0] if both else texts[i],
                        "model_name": "m",
                        "model_provider": "p",
                        "score": rng.randint(1, 100),
                        "if_chosen": both or i == best,
                        "included_in_balanced_subset": True,
                    }
                    f.write(json.dumps(row) + "\n")
                    count += 1
    with open(directory / "survey.jsonl", "w") as f:
        for user in range(1500):
            person = {"user_id": f"user{user}", "age": "18-24 years old", "gender": "Male", "education": "Vocational"}
            person |= {"employment_status": "Student"}
            nested = {"ethnicity": {"simplified": "White"}, "location": {"special_region": "UK"}}
            f.write(json.dumps(person | nested) + "\n")
    return {"utterances": 68_371, "pairs, all": 40_934, "pairs, one": 26_886}


def generate_community_alignment(directory: Path) -> dict[str, int]:
    """90,256 conversations of 3,603 annotators in five languages, with 1 to 4 turns as in the released data."""
    rng = random.Random(0)
    columns = ["conversation_id", "assigned_lang", "annotator_id"]
    for turn in train.CA_TURNS:
        columns += [f"{turn}_turn_prompt", f"{turn}_turn_responses", *(f"{turn}_turn_response_{x}" for x in "abcd")]
        columns += [f"{turn}_turn_preferred_response", f"{turn}_turn_feedback"]
    columns += [
        *train.CA_ATTRIBUTES,
        "is_pregenerated_first_prompt",
        "in_balanced_subset",
        "in_balanced_subset_10",
        "wave",
    ]
    turns = [1] * 6457 + [2] * 42_616 + [3] * 21_415 + [4] * 19_768
    languages = ["en"] * 30_856 + ["pt"] * 16_123 + ["it"] * 14_705 + ["fr"] * 14_394 + ["hi"] * 14_178
    rng.shuffle(turns)
    rng.shuffle(languages)
    pregenerated = [f"{words(rng, 15)} {i}" for i in range(2000)]
    texts = [words(rng, 110) for _ in range(5000)]
    pairs = english = 0
    with open(directory / "community_alignment.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, columns, restval="")
        writer.writeheader()
        for number, (count, language) in enumerate(zip(turns, languages, strict=True)):
            row = {"conversation_id": str(number), "assigned_lang": language, "annotator_id": str(number % 3603)}
            row |= dict.fromkeys(train.CA_ATTRIBUTES, f"group {number % 7}")
            for turn in train.CA_TURNS[:count]:
                shared = turn == "first" and rng.random() < 0.69
                row[f"{turn}_turn_prompt"] = rng.choice(pregenerated) if shared else f"{words(rng, 15)} {number}"
                for x in "abcd":
                    row[f"{turn}_turn_response_{x}"] = f"{rng.choice(texts)}\n{x}"
                row[f"{turn}_turn_responses"] = "\n".join(row[f"{turn}_turn_response_{x}"] for x in "abcd")
                row[f"{turn}_turn_preferred_response"] = f"response_{rng.choice('abcd')}"
                pairs += 3
                english += 3 * (language == "en")
            writer.writerow(row)
    return {"rows": 90_256, "pairs, all languages": pairs, "pairs, en": english}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=["prism", "community-alignment"])
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    train.quiet_libraries()
    generate = generate_prism if args.dataset == "prism" else generate_community_alignment
    print("expected:", generate(args.directory))
    size = sum(p.stat().st_size for p in args.directory.iterdir() if p.is_file())
    for pairing in ("all", "one"):
        began = time.perf_counter()
        rows = train.read_preferences(args.dataset, str(args.directory), pairing=pairing)
        splits, summary = train.split_preferences(rows)
        loaded = time.perf_counter() - began
        pairs = sum(reason is None for reason in rows["dropped"])
        some = train.sample(splits["train"], 55_000, 0)
        _, counts = train.tokenize(some, train.byte_tokenizer(), 128, 64)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"pairing {pairing}: {pairs:,} pairs from {size / 2**20:,.0f} MiB; {summary}")
        print(
            f"  loaded, split in {loaded:.0f} s; {counts['pairs']:,} tokenised by {time.perf_counter() - began:.0f} s"
        )
        print(f"  peak memory {peak:.1f} GiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
