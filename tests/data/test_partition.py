import pytest

from grpo_lab.data.partition import part
from grpo_lab.errors import RecipeError
from grpo_lab.recipe.schema import Partition, SftStage

ROWS = [{"text": f"t{n // 2}", "label": "rare" if n % 10 < 2 else "common"} for n in range(200)]  # texts come in pairs
PARTS = ("train", "validation", "test")


def parts(**settings):
    return {take: part(ROWS, Partition(take=take, **settings)) for take in PARTS}


def test_the_parts_hold_every_row_once_in_its_order():
    found = parts(validation=0.2, test=0.1)
    assert sorted(place for places in found.values() for place in places) == list(range(200))
    assert [len(found[take]) for take in PARTS] == [140, 40, 20]
    assert all(places == sorted(places) for places in found.values())


def test_stratified_parts_keep_every_value_s_share_exactly():
    for take, rare in zip(PARTS, (28, 8, 4), strict=True):  # 40 of 200 rows are rare: 70, 20 and 10 % of them
        places = parts(validation=0.2, test=0.1, stratify="label")[take]
        assert sum(ROWS[place]["label"] == "rare" for place in places) == rare


def test_rows_of_one_group_never_stand_in_two_parts():
    found = parts(validation=0.2, test=0.2, group="text", stratify="label")
    texts = [{ROWS[place]["text"] for place in found[take]} for take in PARTS]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 100


def test_the_seed_decides_and_nothing_else():
    assert parts() == parts()
    assert parts()["test"] != parts(seed=1)["test"]
    # another process, another order of sets and hashes: these are the rows, for good
    assert part(ROWS[:20], Partition(take="test", test=0.2)) == part(ROWS[:20], Partition(take="test", test=0.2))


def test_a_column_that_is_not_there_is_named():
    with pytest.raises(
        RecipeError, match='data.partition.stratify: column "labl" is not in the data; it has: text, label'
    ):
        part(ROWS, Partition(take="test", stratify="labl"))


def test_shares_must_leave_something_to_learn_from():
    with pytest.raises(ValueError, match="leave nothing for train"):
        Partition(take="train", validation=0.5, test=0.5)


def test_the_test_part_selects_no_model():
    data = {"source": "file", "path": "rows.jsonl", "prompt": "q", "completion": "a"}
    held_out = {**data, "partition": {"take": "test"}}
    stage = {
        "kind": "sft",
        "data": data,
        "batch_size": 2,
        "steps": 2,
        "optimizer": {"learning_rate": 0.1},
        "selection": {},
    }
    with pytest.raises(ValueError, match="is the test split, which selects no model"):
        SftStage.model_validate({**stage, "evaluation": {"data": held_out, "every": 1}})
    held_out["partition"] = {"take": "validation"}
    assert SftStage.model_validate({**stage, "evaluation": {"data": held_out, "every": 1}}).selection is not None
