"""What both engines must do alike: the same prompts to the same tokens, whole groups, the same names, one learning rule.

The toy task: write tokens from one eighth of the vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_lab.data.chat import encode_chat, render_prompt
from grpo_lab.data.stream import PromptStream
from grpo_lab.engines import native
from grpo_lab.engines.learner import Learner
from grpo_lab.errors import NumericError, RewardError
from grpo_lab.policy.forward import PolicyForward, frozen_copy
from grpo_lab.policy.load import write_policy
from grpo_lab.recipe.schema import GrpoStage, Model
from grpo_lab.sampling import make_sampler
from grpo_lab.sampling.decoding import Decoding
from grpo_lab.scoring import BoundTerm, RewardSet
from grpo_lab.scoring.mark import read_reward
from grpo_lab.stages.grpo import refreshing
from grpo_lab.stages.running import reporting
from grpo_lab.types import Example, Policy, StepEnd

ENGINES = ["native", "trl"]
# TRL does not measure these
ONLY_NATIVE = {"lab/ratio_mean", "lab/sampler_gap"}


def share_of_fives(completion):
    return sum(token % 8 == 5 for token in completion.token_ids) / len(completion.token_ids)


def length(completion):
    return float(len(completion.token_ids))


def answers(end):
    return [completion.token_ids for group in end.groups for completion in group.completions]


@dataclass
class Toy:
    """A stage on a toy task with its policy, run by one of the engines; `seen` are the rows the policy learnt from."""

    stage: GrpoStage
    policy: Policy
    examples: list[Example]
    rewards: RewardSet
    folder: Any
    ends: list[StepEnd] = field(default_factory=list)
    seen: list[tuple[int, ...]] = field(default_factory=list)

    def run(self, *, watch: Callable[[StepEnd], None] = lambda end: None) -> "Toy":
        def report(end: StepEnd) -> None:
            self.ends.append(end)
            watch(end)

        prompts = PromptStream(self.examples, self.stage.prompts_per_step, seed=0)
        {"native": self._native, "trl": self._trl}[self.stage.engine](prompts, report)
        return self

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.policy.model.state_dict().items()}

    def _remember_batch(self, module, args) -> None:
        (batch,) = args
        for row, prompt in enumerate(batch.prompt_index.tolist()):
            ids = (
                batch.prompt_ids[prompt][batch.prompt_mask[prompt]],
                batch.completion_ids[row][batch.completion_mask[row]],
            )
            self.seen += [tuple(torch.cat(ids).tolist())] if torch.is_grad_enabled() else []

    def _remember_rows(self, module, args, kwargs) -> None:
        if torch.is_grad_enabled():
            rows = zip(kwargs["input_ids"].tolist(), kwargs["attention_mask"].bool().tolist(), strict=True)
            self.seen += [tuple(i for i, real in zip(ids, mask, strict=True) if real) for ids, mask in rows]

    def _native(self, prompts, report) -> None:
        stage, beta = self.stage, self.stage.algorithm.beta
        updates = stage.algorithm.num_iterations * stage.algorithm.num_minibatches
        forward = PolicyForward(
            self.policy.model,
            temperature=stage.sampling.temperature,
            entropy_gradient=stage.algorithm.entropy_bonus > 0,
        )
        forward.register_forward_pre_hook(self._remember_batch)
        parts = native.Parts(
            name="toy",
            stage=stage,
            seed=0,
            policy=self.policy,
            reference=frozen_copy(self.policy) if beta > 0 else None,
            prompts=prompts,
            sampler=make_sampler(stage.sampling.backend, self.policy, Decoding.of(stage.sampling)),
            rewards=self.rewards,
            learner=Learner(
                forward, stage.optimizer, total_steps=stage.steps * updates, micro_batch_size=stage.micro_batch_size
            ),
            folder=self.folder,
        )
        refresh = refreshing(stage.algorithm.reference_refresh, self.policy, parts.reference)
        native.train(parts, start=0, report=reporting(report, refresh))

    def _trl(self, prompts, report) -> None:
        from grpo_lab.engines import trl

        stage, backend = self.stage, self.stage.sampling.backend
        write_policy(self.policy, self.folder / "start")
        parts = trl.TrlParts(
            name="toy",
            stage=stage,
            seed=0,
            policy=self.policy,
            reference=str(self.folder / "start") if stage.algorithm.beta > 0 else None,
            prompts=prompts,
            sampler=None if backend == "auto" else make_sampler(backend, self.policy, Decoding.of(stage.sampling)),
            rewards=self.rewards,
            folder=self.folder,
        )
        model = Model(path=str(self.folder / "start"))
        hook = self.policy.model.register_forward_pre_hook(self._remember_rows, with_kwargs=True)
        trl.train(parts, model, output=self.folder / "trl", resume_from=None, report=report, callbacks=[])
        hook.remove()


@pytest.fixture
def toy(make_policy, make_examples, tmp_path):
    """Builds a toy for an engine; each has a policy with the same weights."""
    number = count()

    def build(engine, *, rewards=(share_of_fives,), weights=None, examples=None, steps=2, model=None, **changes):
        optimizer = changes.pop("optimizer", {})
        sampling = changes.pop("sampling", {})
        algorithm = {"beta": 0.0, **changes.pop("algorithm", {})}
        weights = weights or [1.0] * len(rewards)
        stage = GrpoStage(
            kind="grpo",
            engine=engine,
            data={"source": "task", "path": "addition", "prompt": "prompt"},
            steps=steps,
            optimizer={"learning_rate": 0.01, **optimizer},
            sampling={"num_generations": 4, "max_completion_length": 5, **sampling},
            rewards=[{"name": f.__name__, "weight": w} for f, w in zip(rewards, weights, strict=True)],
            algorithm=algorithm,
            **{"prompts_per_step": 4, "micro_batch_size": 8, **changes},
        )
        terms = [
            BoundTerm(read_reward(f, name=f.__name__, source="test"), f.__name__, weight=w)
            for f, w in zip(rewards, weights, strict=True)
        ]
        folder = tmp_path / f"{engine}-{next(number)}"
        folder.mkdir()
        plain = make_examples([f"{a}+{b}=" for a in range(3) for b in range(3)])
        policy = make_policy(hidden_size=16, num_hidden_layers=1, **(model or {}))
        return Toy(stage, policy, examples or plain, RewardSet(tuple(terms)), folder)

    return build


@pytest.fixture
def chats(tokenizer):
    """Chat prompts; some messages have keys that others lack."""
    conversations = [
        ({"role": "user", "content": "1+2="},),
        ({"role": "system", "content": "add"}, {"role": "user", "content": "33+44=", "name": "x"}),
        ({"role": "user", "content": "5"}, {"role": "assistant", "content": "5"}, {"role": "user", "content": "+1="}),
        ({"role": "user", "content": "12+34="},),
    ]
    texts = [render_prompt(tokenizer, messages) for messages in conversations]
    return [
        Example(f"c{i}", text, encode_chat(tokenizer, text), {}, messages)
        for i, (text, messages) in enumerate(zip(texts, conversations, strict=True))
    ]


@pytest.mark.parametrize("backend", ["auto", "native", "hf"])
@pytest.mark.parametrize("kind", ["chat", "plain"])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_policy_learns_from_exactly_the_prompt_ids_and_completions_of_its_groups(toy, chats, engine, kind, backend):
    run = toy(engine, examples=chats if kind == "chat" else None, sampling={"backend": backend}).run()
    expected = [
        group.example.prompt_ids + completion.token_ids
        for end in run.ends
        for group in end.groups
        for completion in group.completions
    ]
    assert sorted(run.seen) == sorted(expected)


@pytest.mark.parametrize("settings", [{}, {"num_iterations": 2, "num_minibatches": 2}, {"num_minibatches": 4}])
@pytest.mark.parametrize("engine", ENGINES)
def test_each_step_has_whole_groups_of_the_stream_s_prompts_in_its_order(toy, engine, settings):
    run = toy(engine, steps=3, algorithm=settings, micro_batch_size=3).run()
    stream = PromptStream(run.examples, 4, seed=0)
    assert [(end.step, end.num_steps) for end in run.ends] == [(1, 3), (2, 3), (3, 3)]
    for step, end in enumerate(run.ends):
        assert [group.example for group in end.groups] == stream.at(step)
        assert [len(group.completions) for group in end.groups] == [4] * 4
        expected = [[share_of_fives(completion) for completion in group.completions] for group in end.groups]
        torch.testing.assert_close(end.scores.total, torch.tensor(expected))
        for group in end.groups:
            for completion in group.completions:
                assert completion.finished == (completion.token_ids[-1] in run.policy.eos_ids)
                assert completion.finished or len(completion.token_ids) == 5
                assert completion.text == run.policy.tokenizer.decode(completion.token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("backend", ["auto", "native"])
def test_both_engines_report_the_same_metrics_but_for_a_stated_few(toy, backend):
    settings = {"algorithm": {"beta": 0.04}, "sampling": {"backend": backend}, "rewards": (share_of_fives, length)}
    names = [set(toy(engine, **settings).run().ends[1].metrics) for engine in ENGINES]
    assert names[0] - names[1] == ONLY_NATIVE
    assert names[1] - names[0] == set()
    timing = [set(toy(engine, **settings).run().ends[1].timing) for engine in ENGINES]
    assert timing[0] == timing[1]


def with_many_ends(toy: Toy) -> Toy:
    """One token in four ends an answer, so that some are cut off and some are not."""
    toy.policy = replace(toy.policy, eos_ids=(*toy.policy.eos_ids, *range(10, 280, 4)))
    return toy


@pytest.mark.parametrize(
    "algorithm",
    [
        {"beta": 0.04, "num_iterations": 3},
        {"preset": "dapo", "sampling_attempts": 1, "overlong_buffer": 0, "num_iterations": 3},
        {"preset": "cispo", "beta": 0.1, "num_iterations": 3, "epsilon_high": 1.02},
        {"preset": "gspo", "num_iterations": 3},
    ],
    ids=["grpo", "dapo", "cispo", "gspo"],
)
def test_every_metric_has_the_same_value_in_both_engines(toy, algorithm):
    """In one micro-batch: TRL's are means over micro-batches. Ratios of whole completions it counts by completion."""
    settings = {
        "algorithm": algorithm,
        "rewards": (share_of_fives, length),
        "sampling": {"backend": "native", "temperature": 0.9},
        "optimizer": {"name": "sgd", "learning_rate": 0.5},
        "micro_batch_size": None,
    }
    ours, theirs = (with_many_ends(toy(engine, **settings)).run().ends for engine in ENGINES)
    for mine, other in zip(ours, theirs, strict=True):
        assert other.metrics.keys() ^ mine.metrics.keys() == ONLY_NATIVE
        shared = other.metrics.keys()
        assert {"loss", "grad_norm", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean"} <= shared
        assert ("kl" in shared) == (algorithm.get("beta", 0) > 0)
        by_completion = {name for name in shared if name.startswith("clip_ratio") and algorithm.get("preset") == "gspo"}
        for name in shared - by_completion:
            assert other.metrics[name] == pytest.approx(mine.metrics[name], rel=1e-4, abs=1e-6), name
        assert mine.metrics["clip_ratio/region_mean"] > 0  # there is something to agree on


LEARNING = {
    "grpo": {},
    "KL, two iterations": {"beta": 0.04, "num_iterations": 2},
    "dr_grpo": {"preset": "dr_grpo"},
    "token reduction": {"reduction": "token"},
    "sequence ratio, two iterations": {"preset": "gspo", "num_iterations": 2},
    "cispo, two iterations": {"preset": "cispo", "num_iterations": 2},
    "sapo, two iterations": {"preset": "sapo", "num_iterations": 2},
    "gdpo": {"preset": "gdpo"},
    "trl_default with KL": {"preset": "trl_default", "beta": 0.1, "num_iterations": 2},
    "batch scale": {"advantage_scale": "batch"},
    "entropy bonus": {"entropy_bonus": 0.05, "one_pass": True},
    "top entropy": {"top_entropy_quantile": 0.4, "one_pass": True},
    "truncated masked": {"mask_truncated_completions": True},
    "truncated masked, token reduction": {"mask_truncated_completions": True, "reduction": "token"},
    "dapo without resampling": {"preset": "dapo", "sampling_attempts": 1, "overlong_buffer": 0, "num_iterations": 2},
    "moving reference": {"beta": 0.5, "num_iterations": 2, "reference_refresh": {"every": 1, "alpha": 0.5}},
}


@pytest.mark.parametrize("algorithm", LEARNING.values(), ids=LEARNING.keys())
def test_with_one_sampler_both_engines_learn_the_same_weights(toy, algorithm):
    """SGD, so that rounding is not divided by a small second moment. Draws are functions of the step in both.

    What TRL takes per micro-batch is compared in one pass.
    """
    rows = None if algorithm.get("one_pass") else 4
    algorithm = {key: value for key, value in algorithm.items() if key != "one_pass"}
    settings = {
        "steps": 3,
        "rewards": (share_of_fives, length),
        "weights": [1.0, -0.2],
        "algorithm": algorithm,
        "sampling": {"backend": "native", "temperature": 0.9},
        "optimizer": {"name": "sgd", "learning_rate": 0.3, "momentum": 0.5, "schedule": "cosine", "warmup_steps": 1},
        "micro_batch_size": rows,
    }
    ours, theirs = (toy(engine, **settings) for engine in ENGINES)
    ours, theirs = with_many_ends(ours), with_many_ends(theirs)
    before = ours.weights()
    ours.run(), theirs.run()
    for mine, other in zip(ours.ends, theirs.ends, strict=True):
        assert answers(other) == answers(mine)
        for name in ("reward", "reward_std", "learning_rate", "frac_reward_zero_std", "completions/mean_length"):
            assert other.metrics[name] == pytest.approx(mine.metrics[name], rel=1e-9), name
        assert other.metrics["grad_norm"] == pytest.approx(mine.metrics["grad_norm"], rel=1e-4, abs=1e-7)
        assert other.metrics["loss"] == pytest.approx(mine.metrics["loss"], abs=1e-6)
    after = ours.weights()
    assert max(float((after[name] - before[name]).abs().max()) for name in after) > 1e-3  # something was learnt
    for name, tensor in theirs.weights().items():
        torch.testing.assert_close(tensor, after[name], rtol=0, atol=2e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_at_the_first_step_the_policy_is_its_own_reference(toy, engine):
    run = toy(
        engine, algorithm={"beta": 0.04}, model={"attention_dropout": 0.2}, optimizer={"learning_rate": 0.05}
    ).run()
    assert run.ends[0].metrics["kl"] == pytest.approx(0, abs=1e-6)
    assert run.ends[0].metrics["loss"] == pytest.approx(0, abs=1e-6)
    assert run.ends[1].metrics["kl"] > 1e-4


@pytest.mark.parametrize("engine", ENGINES)
def test_what_a_run_leaves_loads_with_transformers_and_is_what_was_trained(toy_recipe, tmp_path, cli, engine):
    keys = [f"stages.grpo.{key}" for key in (f"engine={engine}", "steps=2", "evaluation=null", "checkpoint.every=2")]
    assert cli("train", toy_recipe, *keys, "stages.warm_start.steps=1", "--output-dir", tmp_path, "--quiet").code == 0
    stage = tmp_path / "toy" / "grpo"
    final = AutoModelForCausalLM.from_pretrained(stage / "final")
    (checkpoint,) = (stage / "checkpoints").glob("*/model.safetensors")
    weights = load_file(checkpoint)
    restored = AutoModelForCausalLM.from_config(final.config)
    missing, unknown = restored.load_state_dict(weights, strict=False)
    assert (set(missing) <= {"lm_head.weight"}, unknown) == (True, [])  # tied to the embeddings
    prompt = [{"role": "user", "content": "1+2="}]
    tokenizer = AutoTokenizer.from_pretrained(stage / "final")
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    logits = [model.eval()(**ids).logits for model in (final, restored)]
    assert torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("backend", ["auto", "native"])
@pytest.mark.parametrize("engine", ENGINES)
def test_reward_rises_on_a_toy_task(toy, engine, backend):
    settings = {"prompts_per_step": 4, "micro_batch_size": 16, "sampling": {"num_generations": 8, "backend": backend}}
    rewards = [end.metrics["reward"] for end in toy(engine, steps=20, **settings).run().ends]
    assert sum(rewards[:3]) / 3 < 0.25
    assert sum(rewards[-3:]) / 3 > 0.5


@pytest.mark.parametrize("engine", ENGINES)
def test_a_failed_reward_leaves_its_group_s_baseline_and_is_counted(toy, engine):
    calls = count()

    def sometimes(completion):
        if next(calls) % 8 == 3:
            raise ValueError("no")
        return share_of_fives(completion)

    # a second reward that never fails: the failed completion must lose that one, too
    run = toy(engine, rewards=(sometimes, length), steps=2).run()
    for end in run.ends:
        assert end.metrics["lab/unscored"] == 2 / 16
        assert end.metrics["lab/failed/sometimes"] == 2 / 16
        assert end.scores.total[[0, 2], 3].isnan().all()
        assert end.scores.status["sometimes"][0][3] == "error"
        assert end.metrics["reward"] == pytest.approx(float(end.scores.total.double().nanmean()))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_reward_that_always_fails_stops_the_run_before_anything_is_learnt(toy, engine):
    def broken(completion):
        raise ValueError("no")

    run = toy(engine, rewards=(broken,))
    before = run.weights()
    with pytest.raises(RewardError, match='reward "broken": 16 of 16 completions') as error:
        run.run()
    assert error.value.exit_code == 5
    assert (run.folder / "failed_completions.json").exists()
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.weights().items())


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_that_are_not_finite_change_no_weight_and_stop_the_run_at_the_third(toy, engine):
    run = toy(engine, steps=5, optimizer={"weight_decay": 0.1})
    before = run.weights()
    weight = next(parameter for parameter in run.policy.model.parameters() if parameter.requires_grad)
    weight.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(NumericError) as error:
        run.run()
    assert error.value.exit_code == 6
    assert [end.metrics["lab/skipped_updates"] for end in run.ends] == [1, 1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.weights().items())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_constant_reward_moves_nothing(toy, engine):
    def constant(completion):
        return 1.0

    run = toy(engine, rewards=(constant,), optimizer={"weight_decay": 0.1})
    before = run.weights()
    run.run()
    assert [end.metrics["frac_reward_zero_std"] for end in run.ends] == [1, 1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.weights().items())
