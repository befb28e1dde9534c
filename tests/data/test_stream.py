import pytest

from grpo_lab.data.stream import AHEAD, Mapped, MappedStream, PromptStream, Stream
from grpo_lab.errors import RecipeError


class Source:
    """Counts how often it is opened and how many items were read from it."""

    def __init__(self, items):
        self.items, self.opened, self.read = items, 0, 0

    def __call__(self):
        self.opened += 1
        for item in self.items:
            self.read += 1
            yield item


def test_every_item_comes_once_per_epoch_also_where_batches_cross_epochs():
    prompts = PromptStream(range(10), 4, seed=3)
    seen = [item for step in range(10) for item in prompts.at(step)]

    assert [sorted(seen[start : start + 10]) for start in range(0, 40, 10)] == [list(range(10))] * 4


def test_a_step_is_a_pure_function_of_seed_and_step():
    forwards = [PromptStream(range(50), 8, seed=1).at(step) for step in range(20)]
    one = PromptStream(range(50), 8, seed=1)
    backwards = [one.at(step) for step in reversed(range(20))][::-1]

    assert forwards == backwards


def test_epochs_and_seeds_have_orders_of_their_own():
    assert PromptStream(range(100), 100, seed=0).at(0) != PromptStream(range(100), 100, seed=0).at(1)
    assert PromptStream(range(100), 100, seed=0).at(0) != PromptStream(range(100), 100, seed=1).at(0)


def test_without_shuffling_items_come_in_their_order():
    assert PromptStream("abcde", 3, seed=0, shuffle=False).at(1) == ["d", "e", "a"]


def test_fewer_items_than_a_step_needs_is_an_error():
    with pytest.raises(RecipeError, match="^data: a step needs 8 prompts, the data has 5$"):
        PromptStream(range(5), 8, seed=0)


def test_no_items_at_all_is_an_error():
    with pytest.raises(RecipeError, match="^data: a step needs 1 prompts, the data has 0$"):
        PromptStream([], 1, seed=0)


def test_a_stream_is_read_in_order_and_wraps_at_its_end():
    prompts = PromptStream(Stream(Source("abcde")), 3, seed=0)

    assert ["".join(prompts.at(step)) for step in range(4)] == ["abc", "dea", "bcd", "eab"]


def test_a_stream_resumed_at_a_later_step_gives_the_same_rows():
    through = PromptStream(Stream(Source("abcde")), 3, seed=0)
    expected = [through.at(step) for step in range(9)]

    assert [PromptStream(Stream(Source("abcde")), 3, seed=0).at(step) for step in range(9)] == expected


def test_a_stream_with_fewer_items_than_a_step_needs_is_an_error_every_time():
    prompts = PromptStream(Stream(Source("abcde")), 8, seed=0)

    for _ in range(2):
        with pytest.raises(RecipeError, match="^data: a step needs 8 prompts, the data has 5$"):
            prompts.at(0)


def test_reading_forward_opens_the_source_once_and_holds_nothing_back():
    source = Source(range(1000))
    stream = Stream(source)

    assert [stream[index] for index in (0, 1, 5, 6)] == [0, 1, 5, 6]
    assert (source.opened, source.read, stream.length) == (1, 7, None)


def test_an_earlier_item_opens_the_source_again():
    source = Source("abc")
    stream = Stream(source)

    assert [stream[2], stream[0], stream[1], stream[1]] == ["c", "a", "b", "b"]
    assert source.opened == 3


def test_a_stream_knows_its_length_after_its_end():
    stream = Stream(Source("abc"))
    with pytest.raises(IndexError):
        stream[7]

    assert (stream.length, stream[2]) == (3, "c")


def test_an_error_while_reading_is_not_taken_for_the_end():
    def broken():
        yield "a"
        raise RecipeError("x.jsonl:2: not JSON")

    stream = Stream(broken)
    assert stream[0] == "a"
    for _ in range(2):
        with pytest.raises(RecipeError):
            stream[1]
    assert (stream.length, stream[0]) == (None, "a")


def test_passing_over_items_does_not_convert_them():
    converted = []
    stream = MappedStream(Stream(Source("abcdef")), lambda index, item: converted.append(index) or item.upper())

    assert (stream[4], converted) == ("E", [4])


def test_mapped_items_are_computed_when_asked_for():
    squares = Mapped(lambda index: index * index, 5)

    assert (list(squares), squares[3], squares[-1], squares[1:3]) == ([0, 1, 4, 9, 16], 9, 16, [1, 4])
    with pytest.raises(IndexError):
        squares[5]


def test_going_through_mapped_items_prepares_them_in_runs():
    seen = []
    items = Mapped(lambda index: seen.append(index) or index, 2 * AHEAD + 3, ahead=seen.append)

    assert list(items) == list(range(2 * AHEAD + 3))
    runs = [range(AHEAD), range(AHEAD, 2 * AHEAD), range(2 * AHEAD, 2 * AHEAD + 3)]
    assert seen == [each for run in runs for each in (run, *run)]
    items[AHEAD]
    assert seen[-1] == AHEAD, "one item alone prepares nothing"


LENGTHS = [(7 * place) % 41 + 1 for place in range(103)]


def grouped(batch_size=8, seed=3):
    return PromptStream(range(len(LENGTHS)), batch_size, seed=seed, lengths=LENGTHS)


def test_by_length_every_epoch_still_holds_every_item_once():
    stream = grouped()
    seen = [item for step in range(3 * 13) for item in stream.at(step)]
    for epoch in range(3):
        assert sorted(seen[epoch * 103 : (epoch + 1) * 103]) == list(range(103))


def test_by_length_a_step_is_a_function_of_the_step():
    forwards = [grouped().at(step) for step in range(30)]
    stream = grouped()
    assert [stream.at(step) for step in reversed(range(30))] == forwards[::-1]
    assert [grouped(seed=4).at(step) for step in range(30)] != forwards


def test_by_length_a_step_holds_items_of_similar_length():
    def spread(stream):
        within = [step for step in range(36) if (step * 8) // 103 == (step * 8 + 7) // 103]  # not over an epoch's end
        batches = [[LENGTHS[item] for item in stream.at(step)] for step in within]
        return sum(max(batch) - min(batch) for batch in batches) / len(batches)

    plain = PromptStream(range(len(LENGTHS)), 8, seed=3)
    assert spread(grouped()) < spread(plain) / 5


def test_by_length_what_meets_in_a_step_changes_with_the_epoch():
    stream = grouped()
    first = {frozenset(stream.at(step)) for step in range(12)}
    later = {frozenset(stream.at(step)) for step in range(14, 25)}
    assert len(first & later) < 6
    means = [sum(LENGTHS[item] for item in stream.at(step)) for step in range(12)]
    assert means != sorted(means)
    assert means != sorted(means, reverse=True)
