"""What every sampler promises, for each of them; then what only the native one does."""

import gc
from dataclasses import replace
from itertools import chain

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.logits_process import TemperatureLogitsWarper

from grpo_lab.attention.probe import why_plain
from grpo_lab.batching import pad
from grpo_lab.policy.forward import completion_logps
from grpo_lab.sampling import Decoding, HfSampler, NativeSampler, Sampler, make_sampler
from grpo_lab.sampling.decoding import TellingSampler

FAMILIES = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2},  # absolute positions
    "gemma2": {
        "model_type": "gemma2",
        "attention": "eager",
        "head_dim": 8,
        "sliding_window": 4,  # shorter than the prompts
        "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 5.0,
    },
}
AS_ON_GPU = "native, as on a GPU"
SAMPLERS = {"native": NativeSampler, AS_ON_GPU: NativeSampler, "hf": HfSampler}
either = pytest.mark.parametrize("kind", SAMPLERS)


@pytest.fixture(autouse=True)
def _place(request):
    if hasattr(request.node, "callspec") and request.node.callspec.params.get("kind") == AS_ON_GPU:
        request.getfixturevalue("as_on_gpu")


def ids(groups):
    return [[completion.token_ids for completion in group.completions] for group in groups]


def completions(groups):
    return list(chain.from_iterable(group.completions for group in groups))


def ending_often(policy):
    """The policy with every eighth token declared an end of sequence, so that lengths differ."""
    extra = range(10, len(policy.tokenizer), 8)
    return replace(policy, eos_ids=(policy.eos_ids[0], *extra))


def watch(policy, tell):
    """Tell the shape [B, L] of the tokens that each forward pass computes."""
    why_plain(policy.model)  # tried now, so that the trial is not seen
    mlp = policy.model.model.layers[0].mlp
    mlp.register_forward_pre_hook(lambda _module, args: tell(tuple(args[0].shape[:2])))


@pytest.mark.parametrize("kind", ["native", "hf"])
def test_both_are_samplers_and_found_by_name(tiny_policy, kind):
    sampler = make_sampler(kind, tiny_policy, Decoding(4))
    assert type(sampler) is SAMPLERS[kind]
    assert isinstance(sampler, Sampler)
    assert type(make_sampler("auto", tiny_policy, Decoding(4))) is NativeSampler


@either
def test_every_example_gets_its_group_in_order(tiny_policy, make_examples, kind):
    examples = make_examples()
    groups = SAMPLERS[kind](tiny_policy, Decoding(5)).sample(examples, num_generations=3, seed=0)
    assert [group.example for group in groups] == examples
    assert [len(group.completions) for group in groups] == [3, 3, 3]
    assert len({completion.token_ids for completion in completions(groups)}) == 9


@either
def test_a_completion_ends_with_its_first_end_token_and_holds_no_padding(tiny_policy, make_examples, kind):
    policy = ending_often(tiny_policy)
    policy = replace(policy, pad_id=policy.eos_ids[0])  # the usual pad == eos
    groups = SAMPLERS[kind](policy, Decoding(12)).sample(make_examples(), num_generations=8, seed=1)
    ends = set()
    for completion in completions(groups):
        *body, last = completion.token_ids
        assert not set(body) & set(policy.eos_ids)
        assert completion.finished == (last in policy.eos_ids)
        assert completion.finished or len(completion.token_ids) == 12
        assert len(completion.sampler_logps) == len(completion.token_ids)
        ends |= {last} if completion.finished else {None}
    assert None in ends
    assert len(ends) >= 5  # the answers ended at many of the declared tokens


@either
def test_an_end_token_at_the_limit_finishes_and_anything_else_does_not(tiny_policy, make_examples, kind):
    everything = replace(tiny_policy, eos_ids=tuple(range(len(tiny_policy.tokenizer))))
    for policy, finished in ((everything, True), (replace(tiny_policy, eos_ids=(280,)), False)):
        groups = SAMPLERS[kind](policy, Decoding(1)).sample(make_examples(), num_generations=4, seed=0)
        assert {(len(c.token_ids), c.finished) for c in completions(groups)} == {(1, finished)}


@either
def test_text_has_no_special_tokens(tiny_policy, make_examples, kind):
    with torch.no_grad():  # all tokens are equally likely now, so that greedy takes the first, <|pad|>
        tiny_policy.model.lm_head.weight.zero_()
    sampler = SAMPLERS[kind](tiny_policy, Decoding(3, temperature=0.0))
    group = sampler.sample(make_examples()[:1], num_generations=1, seed=0)[0]
    assert [(c.token_ids, c.text) for c in group.completions] == [((0, 0, 0), "")]


@either
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_sampler_s_log_probs_are_the_trainer_s(make_policy, make_examples, kind, family, temperature):
    policy = ending_often(make_policy(**FAMILIES[family]))
    sampler = SAMPLERS[kind](policy, Decoding(10, temperature=temperature))
    batch = pad(sampler.sample(make_examples(), num_generations=4, seed=0), policy)
    trainer = completion_logps(policy, batch, temperature=temperature)
    torch.testing.assert_close(batch.sampler_logps, trainer, atol=1e-5, rtol=0)
    assert trainer[batch.completion_mask].lt(-0.1).any()


@either
@pytest.mark.parametrize(
    "filters", [{"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 20, "top_p": 0.7, "min_p": 0.1}]
)
def test_with_filters_the_log_probs_are_those_of_what_is_really_sampled(tiny_policy, make_examples, kind, filters):
    policy = ending_often(tiny_policy)
    groups = SAMPLERS[kind](policy, Decoding(6, temperature=0.8, **filters)).sample(
        make_examples(), num_generations=3, seed=0
    )
    warpers = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
    warp = LogitsProcessorList(
        [TemperatureLogitsWarper(0.8), *(warpers[name](value) for name, value in filters.items())]
    )
    for group in groups:
        for completion in group.completions:
            row = torch.tensor([[*group.example.prompt_ids, *completion.token_ids]])
            with torch.no_grad():
                logits = policy.model(input_ids=row).logits[0, len(group.example.prompt_ids) - 1 : -1]
            logps = warp(torch.zeros(len(logits), 1, dtype=torch.long), logits).log_softmax(-1)
            expected = [float(logps[t, token]) for t, token in enumerate(completion.token_ids)]
            torch.testing.assert_close(list(completion.sampler_logps), expected, atol=3e-5, rtol=0)


@either
def test_tokens_come_as_often_as_the_policy_says(tiny_policy, make_examples, kind):
    example = make_examples()[0]
    draws = 6000
    groups = SAMPLERS[kind](tiny_policy, Decoding(1, temperature=0.5)).sample([example], num_generations=draws, seed=0)
    counts = torch.tensor([c.token_ids[0] for c in completions(groups)]).bincount(minlength=283)
    with torch.no_grad():
        logits = tiny_policy.model(input_ids=torch.tensor([example.prompt_ids])).logits[0, -1]
    expected = draws * (logits / 0.5).softmax(-1)
    often = expected >= 20
    observed = torch.cat([counts[often], counts[~often].sum()[None]])
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    chi_squared = float(((observed - expected).square() / expected).sum())
    freedom = len(expected) - 1
    assert freedom >= 10
    assert chi_squared < freedom + 4 * (2 * freedom) ** 0.5


@either
def test_the_seed_decides_and_the_global_generator_is_left_alone(tiny_policy, make_examples, kind):
    sampler = SAMPLERS[kind](tiny_policy, Decoding(5))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = sampler.sample(make_examples(), num_generations=2, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert ids(sampler.sample(make_examples(), num_generations=2, seed=4)) == ids(first)
    assert ids(sampler.sample(make_examples(), num_generations=2, seed=5)) != ids(first)


@either
def test_a_group_s_noise_does_not_depend_on_the_other_groups(tiny_policy, make_examples, kind):
    policy = ending_often(tiny_policy)
    sampler = SAMPLERS[kind](policy, Decoding(8))
    one, two, three = make_examples()
    first = ids(sampler.sample([one, two, three], num_generations=4, seed=0))
    assert ids(sampler.sample([three, two], num_generations=4, seed=0))[1] == first[1]  # the same index
    assert ids(sampler.sample([two, two], num_generations=4, seed=0))[1] == first[1]
    twice = ids(sampler.sample([one, one], num_generations=4, seed=0))
    assert twice[0] == first[0]
    assert twice[1] != first[0]  # another index, other noise: a prompt that comes twice gets other answers


@either
@pytest.mark.parametrize("max_rows", [4, 5, 8, 11])
def test_max_rows_changes_nothing_but_the_rows_decoded_at_once(tiny_policy, make_examples, kind, max_rows):
    policy = ending_often(tiny_policy)
    free = SAMPLERS[kind](policy, Decoding(8)).sample(make_examples(), num_generations=4, seed=0)
    rows = []
    watch(policy, lambda shape: rows.append(shape[0]))
    bounded = SAMPLERS[kind](policy, Decoding(8, max_rows=max_rows)).sample(make_examples(), num_generations=4, seed=0)
    assert ids(bounded) == ids(free)
    assert max(rows) <= max_rows


@either
@pytest.mark.parametrize("max_rows", [1, 3])
def test_a_group_larger_than_max_rows_is_decoded_in_parts(tiny_policy, make_examples, kind, max_rows):
    rows = []
    watch(tiny_policy, lambda shape: rows.append(shape[0]))
    groups = SAMPLERS[kind](tiny_policy, Decoding(4, max_rows=max_rows)).sample(
        make_examples(), num_generations=5, seed=0
    )
    assert max(rows) == max_rows
    assert [len(group.completions) for group in groups] == [5, 5, 5]
    assert len({c.token_ids for c in completions(groups)}) == 15


@pytest.mark.parametrize("max_rows", [None, 5, 3])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_each_answer_is_told_once_as_it_ends(make_policy, make_examples, family, max_rows):
    """With shared prompts and with a copy in every row; also of the answers that the length limit ends."""
    policy = ending_often(make_policy(**FAMILIES[family]))
    assert (why_plain(policy.model) is None) == (family == "llama")
    sampler = NativeSampler(policy, Decoding(8, max_rows=max_rows))
    told = []
    groups = sampler.sample_telling(make_examples(), told.append, num_generations=4, seed=0)
    assert isinstance(sampler, TellingSampler)
    assert groups == sampler.sample(make_examples(), num_generations=4, seed=0)
    rows = completions(groups)
    assert sorted(row for ended in told for row in ended) == list(range(12))
    assert all(rows[row] is completion for ended in told for row, completion in ended.items())
    if max_rows is None:  # then all rows are as far as each other, and an answer of t tokens ends with the t-th
        assert len(told) == max(len(each.token_ids) for each in rows) == 8
        assert all(len(each.token_ids) == t for t, ended in enumerate(told, 1) for each in ended.values())
    assert len({each.finished for each in rows}) == 2


@either
def test_what_the_model_s_own_generation_config_asks_for_does_not_slip_in(tiny_policy, make_examples, kind):
    own = GenerationConfig(
        do_sample=True, temperature=0.3, top_k=2, top_p=0.4, min_p=0.5, repetition_penalty=1.8, min_new_tokens=4
    )
    before = own.to_dict()
    tiny_policy.model.generation_config = own
    groups = SAMPLERS[kind](tiny_policy, Decoding(8)).sample(make_examples(), num_generations=6, seed=0)
    batch = pad(groups, tiny_policy)
    torch.testing.assert_close(
        batch.sampler_logps, completion_logps(tiny_policy, batch, temperature=1.0), atol=1e-5, rtol=0
    )
    assert tiny_policy.model.generation_config is own
    assert own.to_dict() == before


@either
def test_greedy_takes_the_likeliest_token_each_time_and_has_no_log_probs_to_speak_of(tiny_policy, make_examples, kind):
    example = make_examples()[1]
    decoding = Decoding(6, temperature=0.7, top_k=3).greedy()
    group = SAMPLERS[kind](tiny_policy, decoding).sample([example], num_generations=2, seed=0)[0]
    row = list(example.prompt_ids)
    for _ in group.completions[0].token_ids:
        with torch.no_grad():
            row.append(int(tiny_policy.model(input_ids=torch.tensor([row])).logits[0, -1].argmax()))
    for completion in group.completions:
        assert completion.token_ids == tuple(row[len(example.prompt_ids) :])
        assert completion.sampler_logps == (0.0,) * len(completion.token_ids)


@either
def test_dropout_is_off_while_sampling(make_policy, make_examples, kind):
    policy = make_policy(attention_dropout=0.9)
    policy.model.train()
    batch = pad(SAMPLERS[kind](policy, Decoding(8)).sample(make_examples(), num_generations=2, seed=0), policy)
    assert not policy.model.training
    torch.testing.assert_close(batch.sampler_logps, completion_logps(policy, batch, temperature=1.0), atol=1e-5, rtol=0)


@either
def test_after_sync_the_new_weights_sample(make_policy, make_examples, kind):
    sampler = SAMPLERS[kind](make_policy(seed=0), Decoding(5))
    other = make_policy(seed=1)
    sampler.sync(other)
    batch = pad(sampler.sample(make_examples(), num_generations=2, seed=0), other)
    torch.testing.assert_close(batch.sampler_logps, completion_logps(other, batch, temperature=1.0), atol=1e-5, rtol=0)


@either
def test_checkpointing_does_not_drop_the_cache(make_policy, make_examples, kind):
    policy = make_policy(gradient_checkpointing=True)
    policy.model.train()
    batch = pad(SAMPLERS[kind](policy, Decoding(8)).sample(make_examples(), num_generations=2, seed=0), policy)
    torch.testing.assert_close(batch.sampler_logps, completion_logps(policy, batch, temperature=1.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_tensor_outlives_sampling_until_garbage_is_collected(make_policy, make_examples, family):
    """Keys and values in a cycle stay for many steps: a run's memory grew by them until the collector came."""
    sampler = NativeSampler(make_policy(**FAMILIES[family]), Decoding(8))
    sampler.sample(make_examples(), num_generations=2, seed=0)  # what is made once, at first use
    gc.collect()
    gc.disable()
    try:
        sampler.sample(make_examples(), num_generations=2, seed=1)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left = [found for found in gc.garbage if isinstance(found, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert left == []


@pytest.mark.parametrize("family", FAMILIES)
def test_native_greedy_equals_transformers_generate_token_for_token(make_policy, make_examples, family):
    policy = make_policy(**FAMILIES[family])
    examples = make_examples(("1+2=", "3", "33+44=46 c0;1+3=4 c0", "5+6=", "<think>"))
    decoding = Decoding(24, temperature=0.0)
    endless = completions(NativeSampler(policy, decoding).sample(examples, num_generations=1, seed=0))
    policy = replace(policy, eos_ids=(2, endless[0].token_ids[7], endless[2].token_ids[12]))  # so that some end early
    native = NativeSampler(policy, decoding).sample(examples, num_generations=1, seed=0)
    generated = HfSampler(policy, decoding).sample(examples, num_generations=1, seed=0)
    assert ids(native) == ids(generated)
    assert [c.finished for c in completions(native)] == [c.finished for c in completions(generated)]
    assert [c.text for c in completions(native)] == [c.text for c in completions(generated)]
    assert len({len(c.token_ids) for c in completions(native)}) > 1


def test_a_prompt_is_computed_once_and_finished_rows_leave_the_batch(tiny_policy, make_examples):
    policy = ending_often(tiny_policy)
    shapes = []
    watch(policy, shapes.append)
    groups = NativeSampler(policy, Decoding(12)).sample(make_examples(), num_generations=4, seed=1)
    lengths = [len(c.token_ids) for c in completions(groups)]
    prompt_tokens = sum(len(group.example.prompt_ids) for group in groups)
    # a row of n tokens is fed n - 1 of them: the first comes from the prompt's logits, the last is fed to no one
    fed = [(sum(length > t for length in lengths), 1) for t in range(1, max(lengths))]
    assert shapes == [(1, prompt_tokens), *fed]
    assert fed[-1][0] < 12


def test_no_examples_give_no_groups(tiny_policy):
    assert NativeSampler(tiny_policy, Decoding(4)).sample([], num_generations=4, seed=0) == []


def test_the_shared_and_the_plain_decoder_write_the_same(make_policy, make_examples):
    groups = []
    for attention in ("sdpa", "eager"):  # eager attention is decoded plainly
        policy = ending_often(make_policy(attention=attention))
        groups.append(NativeSampler(policy, Decoding(12)).sample(make_examples(), num_generations=8, seed=3))
        assert (why_plain(policy.model) is None) == (attention == "sdpa")
    assert ids(groups[0]) == ids(groups[1])


def test_a_slot_that_comes_free_is_taken_by_a_row_that_waits(tiny_policy, make_examples):
    policy = ending_often(tiny_policy)
    shapes = []
    watch(policy, shapes.append)
    groups = NativeSampler(policy, Decoding(12, max_rows=4)).sample(make_examples() * 4, num_generations=4, seed=1)
    lengths = [len(c.token_ids) for c in completions(groups)]
    steps = [rows for rows, width in shapes if width == 1]
    assert sum(steps) == sum(lengths) - len(lengths)  # no token is computed twice or for nothing
    in_turns = sum(max(lengths[i : i + 4]) - 1 for i in range(0, len(lengths), 4))
    assert len(steps) < 0.75 * in_turns
    prefilled = sum(width for _, width in shapes if width > 1)
    assert prefilled == sum(len(group.example.prompt_ids) for group in groups)
