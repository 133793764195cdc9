"""The loaders of PRISM and Community Alignment on rows written for them in the released schemas."""

import csv
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train

PERSON = {
    "age": "18-24 years old", "gender": "Female", "education": "Vocational", "employment_status": "Student",
    "ethnicity": {"self_described": "x", "categorised": "Asian", "simplified": "Asian"},
    "location": {"special_region": "Europe"},
}  # fmt: skip


def utterance(
    conversation: str, turn: int, response: str, chosen: bool, user: str = "user0", **changes: object
) -> dict:
    return {
        "utterance_id": "ut0", "interaction_id": "int9", "conversation_id": conversation, "user_id": user, "turn": turn,
        "within_turn_id": 0, "conversation_type": "values guided", "user_prompt": f"{conversation} asks {turn}",
        "model_response": response, "model_name": "m", "model_provider": "p", "score": 50, "if_chosen": chosen,
        "included_in_balanced_subset": True,
    } | changes  # fmt: skip


def write_prism(path: Path, utterances: list[dict], people: dict[str, dict] | None = None) -> str:
    path.mkdir(exist_ok=True)
    people = {"user0": PERSON} if people is None else people
    (path / "utterances.jsonl").write_text("\n".join(map(json.dumps, utterances)))
    (path / "survey.jsonl").write_text("\n".join(json.dumps({"user_id": u} | p) for u, p in people.items()))
    return str(path)


def used(rows: train.datasets.Dataset) -> list[dict]:
    return [row for row in rows if row["dropped"] is None]


def reasons(rows: train.datasets.Dataset) -> dict[str, int]:
    return dict(Counter(reason for reason in rows["dropped"] if reason))


def test_prism_pairs_history_and_attributes(tmp_path):
    data = write_prism(
        tmp_path,
        [
            utterance("c1", 1, "late chosen", True),  # files need not follow the order of turns
            utterance("c1", 0, "worse", False),
            utterance("c1", 0, "best", True),
            utterance("c1", 0, "worst", False),
            utterance("c1", 1, "late other", False),
        ],
    )
    first, second, late = used(train.read_preferences("prism", data))
    assert first["prompt"] == "\n\nHuman: c1 asks 0\n\nAssistant:"
    assert {first["rejected"], second["rejected"]} == {" worse", " worst"}
    assert first["chosen"] == second["chosen"] == " best"
    assert first["choice_set"] == second["choice_set"] != late["choice_set"]
    assert late["prompt"] == "\n\nHuman: c1 asks 0\n\nAssistant: best\n\nHuman: c1 asks 1\n\nAssistant:"
    assert (late["chosen"], late["rejected"], late["turn"]) == (" late chosen", " late other", 1)
    assert {name: late[name] for name in ("annotator", "conversation", *train.PRISM_ATTRIBUTES)} == {
        "annotator": "user0", "conversation": "c1", "conversation_type": "values guided", "age": "18-24 years old",
        "gender": "Female", "education": "Vocational", "employment_status": "Student", "ethnicity": "Asian",
        "region": "Europe",
    }  # fmt: skip


def test_prism_identical_later_responses_are_no_comparison_but_stay_in_the_history(tmp_path):
    turns = [utterance("c1", 0, "a", True), utterance("c1", 0, "b", False)]
    turns += [utterance("c1", 1, "same", True), utterance("c1", 1, "same", True)]
    turns += [utterance("c1", 2, "x", True), utterance("c1", 2, "y", False)]
    rows = train.read_preferences("prism", write_prism(tmp_path, turns))
    assert reasons(rows) == {"more than one chosen response": 2}
    assert used(rows)[1]["prompt"].endswith("Assistant: same\n\nHuman: c1 asks 2\n\nAssistant:")


def test_prism_rows_that_are_not_comparisons_are_counted(tmp_path):
    rows = [
        utterance("c1", 0, "a", False), utterance("c1", 0, "b", False),  # none chosen: later turns hang in the air
        utterance("c1", 1, "a", True), utterance("c1", 1, "b", False),
        utterance("c2", 0, "EMPTY STRING", True), utterance("c2", 0, "b", False),
        utterance("c3", 1, "a", True), utterance("c3", 1, "b", False),  # turn 0 was never downloaded
        utterance("c4", 0, "a", True), utterance("c4", 0, "b", False, user_prompt="another"),
        utterance("c5", 0, "a", True), utterance("c5", 0, "a", False),
        utterance("c6", 0, None, True), utterance("c6", 0, "b", "yes"), utterance("c6", "0", "b", True),
        utterance("c7", 0, "alone", True),
    ]  # fmt: skip
    loaded = train.read_preferences("prism", write_prism(tmp_path, rows))
    assert not used(loaded)
    assert reasons(loaded) == {
        "no chosen response": 2, "an earlier turn is missing": 4, "empty response": 1, "identical responses": 1,
        "candidates of one turn disagree on the prompt or the user": 2, "field of another type": 3,
    }  # fmt: skip


def test_prism_pairing_one_draws_one_other_and_not_by_position(tmp_path):
    rows = []
    for i in range(200):
        rows += [utterance(f"c{i}", 0, f"other {k}", False) for k in range(3)] + [utterance(f"c{i}", 0, "best", True)]
    loaded = train.read_preferences("prism", write_prism(tmp_path, rows), pairing="one")
    drawn = Counter(row["rejected"] for row in used(loaded))
    assert sum(drawn.values()) == 200
    assert min(drawn.values()) > 40  # each of three, 67 expected, four standard deviations
    assert reasons(loaded) == {"not drawn (--pairing one)": 400}


def test_prism_errors_name_the_row_and_the_remedy(tmp_path):
    rows = [utterance("c1", 0, "a", True, user="user7"), utterance("c1", 0, "b", False, user="user7")]
    with pytest.raises(train.UserError, match=r"utterances.jsonl, line 1: user7 is not in .*survey.jsonl"):
        train.read_preferences("prism", write_prism(tmp_path, rows))
    with pytest.raises(train.UserError, match=r"line 1: no column user_prompt: is this PRISM's"):
        train.read_preferences(
            "prism", write_prism(tmp_path, [{k: v for k, v in rows[0].items() if k != "user_prompt"}])
        )
    (tmp_path / "survey.jsonl").unlink()
    with pytest.raises(train.UserError, match=r"holds no utterances.jsonl and survey.jsonl: pass a whole copy"):
        train.read_preferences("prism", str(tmp_path))


texts = st.one_of(st.none(), st.integers(), st.sampled_from(["", " ", "EMPTY STRING", "a", "b", "é\n\nHuman: x"]))
malformed = st.fixed_dictionaries(
    {
        "conversation_id": st.sampled_from(["c1", "c2", None]),
        "turn": st.one_of(st.integers(-1, 3), st.none(), st.booleans()),
        "user_id": st.sampled_from(["user0", "user1"]),
        "user_prompt": texts,
        "model_response": texts,
        "if_chosen": st.one_of(st.booleans(), st.none()),
    }
)


@settings(max_examples=200, deadline=None)
@given(st.lists(malformed, max_size=12), st.sampled_from(["all", "one"]))
def test_every_prism_utterance_is_used_or_counted(tmp_path_factory, utterances, pairing):
    path = tmp_path_factory.getbasetemp() / "malformed"
    files = write_prism(path, [u | {"conversation_type": None} for u in utterances], {"user0": {}, "user1": {}})
    rows = list(train.read_prism([f"{files}/utterances.jsonl", f"{files}/survey.jsonl"], pairing))
    good = [row for row in rows if row["dropped"] is None]
    # An utterance is the chosen one of its turn, or has a row of its own; a turn with a chosen one alone has no row.
    turns = {row["choice_set"] for row in good}
    alone = len(utterances) - len(rows) - len(turns)
    types = {**train.PRISM_TYPES, "if_chosen": bool}
    sound = [u for u in utterances if all(type(u[name]) is kind for name, kind in types.items())]
    sizes = Counter((u["conversation_id"], u["turn"]) for u in sound)
    assert 0 <= alone <= sum(n == 1 for n in sizes.values())
    assert all(train.unusable(row) is None or isinstance(train.unusable(row), str) for row in good)


# --- Community Alignment

CA_COLUMNS = ["conversation_id", "assigned_lang", "annotator_id"]
for _turn in train.CA_TURNS:
    CA_COLUMNS += [f"{_turn}_turn_prompt", f"{_turn}_turn_responses"]
    CA_COLUMNS += [f"{_turn}_turn_response_{x}" for x in "abcd"]
    CA_COLUMNS += [f"{_turn}_turn_preferred_response", f"{_turn}_turn_feedback"]
CA_COLUMNS += [
    *train.CA_ATTRIBUTES,
    "is_pregenerated_first_prompt",
    "in_balanced_subset",
    "in_balanced_subset_10",
    "wave",
]


def ca_turn(turn: str, prompt: str, responses: list[str], preferred: str) -> dict[str, str]:
    row = {f"{turn}_turn_response_{x}": text for x, text in zip("abcd", responses, strict=True)}
    return row | {f"{turn}_turn_prompt": prompt, f"{turn}_turn_preferred_response": preferred}


def ca_row(*turns: dict[str, str], **values: str) -> dict[str, str]:
    row = {"conversation_id": "k1", "assigned_lang": "en", "annotator_id": "a1", "annotator_age": "18-34"}
    for turn in turns:
        row |= turn
    return row | values


def write_ca(path: Path, rows: list[dict[str, str]], name: str = "community_alignment.csv") -> str:
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    with open(path / name, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, CA_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


FIRST = ca_turn("first", 'why,\n"so"?', ["A\n\na", "B", "C", "D"], "response_b")


def test_community_alignment_turns_choice_sets_and_attributes(tmp_path):
    second = ca_turn("second", "and?", ["E", "F", "F", ""], "response_a")
    data = write_ca(
        tmp_path,
        [ca_row(FIRST, second), ca_row(FIRST | {"first_turn_preferred_response": "response_d"}, annotator_id="a2")],
    )
    rows = train.read_preferences("community-alignment", data)
    pairs = used(rows)
    assert [(p["chosen"], p["rejected"]) for p in pairs] == [
        (" B", " A\n\na"), (" B", " C"), (" B", " D"), (" E", " F"), (" E", " F"),
        (" D", " A\n\na"), (" D", " B"), (" D", " C"),
    ]  # fmt: skip
    assert pairs[0]["prompt"] == '\n\nHuman: why,\n"so"?\n\nAssistant:'
    assert pairs[3]["prompt"] == '\n\nHuman: why,\n"so"?\n\nAssistant: B\n\nHuman: and?\n\nAssistant:'
    assert pairs[0]["choice_set"] == pairs[5]["choice_set"] != pairs[3]["choice_set"]
    assert (pairs[0]["annotator"], pairs[5]["annotator"]) == ("a1", "a2")
    assert (pairs[0]["annotator_age"], pairs[0]["annotator_gender"]) == ("18-34", None)
    assert not reasons(rows)


def test_community_alignment_counts_what_it_does_not_use(tmp_path):
    rows = [
        ca_row(FIRST, assigned_lang="pt"),
        ca_row(FIRST | {"first_turn_preferred_response": ""}),
        ca_row(FIRST | {"first_turn_preferred_response": "response_e"}),
        ca_row(FIRST | {"first_turn_prompt": " "}),
        ca_row(ca_turn("first", "p", ["A", "", "", ""], "response_a")),
        ca_row(ca_turn("first", "p", ["A", "A ", "", ""], "response_a")),
    ]
    loaded = train.read_preferences("community-alignment", write_ca(tmp_path, rows))
    assert reasons(loaded) == {
        "language is not en": 1, "no preference stated": 1, "the preferred response is not given": 1,
        "no first prompt": 1, "no other response": 1, "identical responses": 1,
    }  # fmt: skip
    assert len(used(train.read_preferences("community-alignment", str(tmp_path), language="pt"))) == 3
    assert len(used(train.read_preferences("community-alignment", str(tmp_path), language="all"))) == 3


def test_community_alignment_of_version_1_0(tmp_path):
    write_ca(tmp_path, [ca_row(FIRST)] * 2, "data/full_community_alignment.csv")
    data = write_ca(tmp_path, [ca_row(FIRST)], "data/filtered_community_alignment.csv")
    assert len(used(train.read_preferences("community-alignment", data))) == 3


def test_community_alignment_errors(tmp_path):
    with pytest.raises(train.UserError, match=r"holds no community_alignment\.csv or data/filtered"):
        train.read_preferences("community-alignment", str(tmp_path))
    (tmp_path / "community_alignment.csv").write_text("conversation_id,annotator_id\n1,2\n")
    with pytest.raises(train.UserError, match="lacks the column assigned_lang: is this the Community Alignment CSV"):
        train.read_preferences("community-alignment", str(tmp_path))
    data = write_ca(tmp_path, [ca_row(FIRST)] * 3)
    whole = (tmp_path / "community_alignment.csv").read_text()
    (tmp_path / "community_alignment.csv").write_text(whole[: len(whole) - 6])
    with pytest.raises(train.UserError, match="row 3: not as many fields as columns: quote its commas, or fetch"):
        train.read_preferences("community-alignment", data)


cells = st.sampled_from(["", " ", "A", "B", "response_a", "response_d", "response_z", 'x\n,"y"'])
ca_rows = st.fixed_dictionaries(dict.fromkeys(CA_COLUMNS, cells))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example])
@given(st.lists(ca_rows, min_size=1, max_size=4))
def test_every_community_alignment_row_is_used_or_counted(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "ca"
    write_ca(path, [row | {"conversation_id": str(i), "assigned_lang": "en"} for i, row in enumerate(rows)])
    loaded = list(train.read_community_alignment([str(path / "community_alignment.csv")], "all", "en"))
    unseen = len(rows) - len({row["conversation"] for row in loaded if row["dropped"] is None})
    assert unseen <= sum(row["dropped"] is not None for row in loaded)


# --- splits


def test_annotators_and_openings_are_in_one_split_each(tmp_path):
    rows, people = [], {}
    for user in range(40):
        people[f"user{user}"] = PERSON
        for k in range(5):
            # Every fifth opening is one that many users share.
            prompt = "shared opening" if k == 0 else f"{user} {k}"
            rows += [
                utterance(f"c{user}-{k}", 0, text, text == "a", f"user{user}", user_prompt=prompt)
                for text in ("a", "b")
            ]
    splits, summary = train.split_preferences(train.read_preferences("prism", write_prism(tmp_path, rows, people)))
    for column in ("annotator", "prompt"):
        seen = [set(splits[name][column]) for name in train.SPLITS]
        assert all(seen)
        assert sum(map(len, seen)) == len(set.union(*seen)), column
    assert summary["rows"] == {"train": 160, "validation": 16, "test": 16}
    assert summary["rows_dropped"] == {
        "test row whose opening is also in train": 4, "validation row whose opening is also in train": 4,
    }  # fmt: skip
    assert summary["split"] == "carved 80/10/10 by annotator, seed 0"
    again, _ = train.split_preferences(train.read_preferences("prism", str(tmp_path)), seed=1)
    assert set(again["test"]["annotator"]) != set(splits["test"]["annotator"])


def test_votes_on_one_choice_set_stay_together_without_annotators(tmp_path):
    rows = [
        ca_row(FIRST | {"first_turn_prompt": f"p{i}"}, annotator_id="", conversation_id=f"{i}-{j}")
        for i in range(30)
        for j in range(3)
    ]
    splits, summary = train.split_preferences(train.read_preferences("community-alignment", write_ca(tmp_path, rows)))
    seen = [set(splits[name]["choice_set"]) for name in train.SPLITS]
    assert [len(s) for s in seen] == [24, 3, 3]
    assert summary["rows"] == {"train": 216, "validation": 27, "test": 27}


def test_an_annotator_column_of_another_name(tmp_path):
    lines = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b", "worker": f"w{i % 20}"} for i in range(100)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = train.load_preferences(str(tmp_path / "own.jsonl"), "test", annotator_column="worker")
    assert len(set(rows["annotator"])) == 2
    assert "worker" not in rows.column_names
    with pytest.raises(train.UserError, match=r"lacks the column rater \(found: prompt, chosen, rejected, worker\)"):
        train.load_preferences(str(tmp_path / "own.jsonl"), "test", annotator_column="rater")
