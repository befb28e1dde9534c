import os
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

from grpo_lab.recipe.schema import RewardTerm
from grpo_lab.scoring import bind, discover
from grpo_lab.types import Completion, Example, Group

REGISTRY = discover()
adversarial = pytest.param
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "so", "film", "what"]


def group(*texts, prompt="what film"):
    return Group(Example("p1", prompt, (1,), {}), tuple(Completion(text, (1,), True) for text in texts))


def make(folder, *, labels=("negative", "positive"), pad=True, headless=False, words=WORDS):
    """A tiny classifier with random weights and a vocabulary of words."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=32, **special, **({"pad_token": "[PAD]"} if pad else {})
    )
    fast.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={name: index for index, name in enumerate(labels)},
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.5)
    (BertModel(config) if headless else model).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("classifier"))


def score(*texts, prompt="what film", **options):
    return REGISTRY.get("classifier").function(group(*texts, prompt=prompt), **options)


def test_it_is_the_models_own_probability(folder):
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(torch.tensor([[2, 6, 4, 3]])).logits[0]  # [CLS] so good [SEP]
    assert score("so good", model=folder, label="positive") == pytest.approx([logits.softmax(-1)[1].item()], abs=1e-6)
    assert score("so good", model=folder, label=1, output="logit") == pytest.approx([logits[1].item()], abs=1e-6)
    both = [score("so good", model=folder, label=name)[0] for name in ("positive", "negative")]
    assert sum(both) == pytest.approx(1.0)


TEXTS = ("good", "so bad bad film", "", "good " * 20, "never seen", "\x00\u202e\ud83d")


@pytest.mark.parametrize(
    "text, read_as",
    [
        adversarial("good [SEP] bad", "good ( SEP ) bad", id="a-separator"),
        adversarial("[CLS] good", "( CLS ) good", id="a-second-beginning"),
        adversarial("[PAD] [PAD] good", "( PAD ) ( PAD ) good", id="padding"),
        adversarial("[S[SEP]EP] good", "( S ( SEP ) EP ) good", id="one-in-another"),
        adversarial("[UNK]", "( UNK )", id="the-unknown-word"),
        adversarial(" \n\tgood\n ", "good", id="white-space"),
        adversarial("GOOD", "never", id="a-word-it-does-not-know"),
        adversarial("g\u200bood", "never never never", id="a-character-nobody-sees"),
        adversarial("good\ud83d", "good ?", id="half-a-character"),
        adversarial("good " * 200_000, "good " * 30, id="a-megabyte-of-praise"),
    ],
)
def test_what_a_completion_spells_out_is_text_and_nothing_else(folder, text, read_as):
    options = {"model": folder, "label": "positive"}
    assert score(text, **options) == pytest.approx(score(read_as, **options), abs=1e-6)


def test_neither_batches_nor_siblings_nor_padding_change_a_score(folder):
    alone = [score(text, model=folder, label="positive")[0] for text in TEXTS]
    assert len({round(value, 4) for value in alone}) >= 5  # the scores differ, or this would prove nothing
    for batch_size in (1, 2, 4, 16):
        assert score(*TEXTS, model=folder, label="positive", batch_size=batch_size) == pytest.approx(alone, abs=1e-6)
    assert score(*TEXTS[::-1], model=folder, label="positive") == pytest.approx(alone[::-1], abs=1e-6)


def test_what_is_cut_does_not_count(folder):
    whole, longer, other = "good " * 6, "good " * 6 + "bad " * 6, "bad " * 6 + "good " * 6
    options = {"model": folder, "label": "positive", "max_tokens": 8}  # six words between [CLS] and [SEP]
    assert score(longer, **options) == score(whole, **options)
    assert score(other, cut="start", **options) == score(whole, **options)
    assert score(other, **options) != score(whole, **options)
    assert score("good " * 500, model=folder, label="positive")[0] > 0  # past the model's own 32 positions


def test_the_prompt_is_read_if_asked_for(folder):
    options = {"model": folder, "label": "positive"}
    assert score("good", prompt="what", **options) == score("good", prompt="film", **options)
    assert score("good", prompt="what", with_prompt=True, **options) != score(
        "good", prompt="film", with_prompt=True, **options
    )


def test_a_tokenizer_that_cannot_pad_scores_one_by_one(folder, tmp_path):
    unpadded = make(tmp_path / "unpadded", pad=False)
    found = score("good", "so bad film", model=unpadded, label="positive")
    assert found == pytest.approx(score("good", "so bad film", model=folder, label="positive"), abs=1e-6)


def test_one_output_needs_no_label_and_is_a_sigmoid(tmp_path):
    reward_model = make(tmp_path / "reward-model", labels=("score",))
    [logit] = score("good", model=reward_model, output="logit")
    assert score("good", model=reward_model) == pytest.approx([torch.tensor(logit).sigmoid().item()])


def test_loading_draws_none_of_the_runs_random_numbers(tmp_path):
    folder = make(tmp_path / "fresh")
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    score("good", model=folder, label=1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("label", [None, "POSITIVE", 2, -1])
def test_an_unknown_label_is_an_error_that_names_the_labels(folder, label):
    with pytest.raises(ValueError, match=r"the model's labels are negative, positive \(or 0 to 1\)"):
        score("good", model=folder, label=label)


def test_a_model_whose_head_was_never_trained_is_refused(tmp_path):
    headless = make(tmp_path / "headless", headless=True)
    with pytest.raises(ValueError, match="no trained classifier: it has no weights for classifier.bias"):
        score("good", model=headless, label=1)


def test_a_model_that_is_not_there_is_an_error_of_the_reward_and_not_a_zero():
    terms = [RewardTerm(name="classifier", options={"model": "/no/such/folder", "label": 1})]
    scores = bind(terms, REGISTRY).score([group("a", "b")])
    assert scores.status["classifier"] == (("error", "error"),)
    assert "/no/such/folder" in scores.reasons["classifier"]
    with pytest.raises(ValueError, match="needs the option model"):
        score("good")


def test_pickled_weights_are_refused(folder, tmp_path):
    pickled = tmp_path / "pickled"
    make(pickled)
    (pickled / "model.safetensors").unlink()
    torch.save(BertForSequenceClassification.from_pretrained(folder).state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(OSError):
        score("good", model=str(pickled), label=1)


DATA = Path(os.environ.get("GRPO_LAB_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.mark.skipif(not (DATA / "uci_sentiment").is_dir(), reason=f"no real data in {DATA}; set GRPO_LAB_DATA")
def test_real_reviews_get_the_models_own_probabilities(tmp_path):
    lines = (DATA / "uci_sentiment" / "amazon_cells_labelled.txt").read_text().split("\n")
    texts = [" ".join(re.findall(r"[a-z]+", line.rsplit("\t", 1)[0].lower())) for line in lines[:100]]
    words = [*WORDS[:4], *dict.fromkeys(word for text in texts for word in text.split())]
    folder = make(tmp_path / "reviews", words=words)
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    values = score(*texts, model=folder, label="positive", batch_size=32)
    own = []
    with torch.inference_mode():
        for text in texts:
            ids = [2, *(words.index(word) for word in text.split())][:31] + [3]
            own.append(model(torch.tensor([ids])).logits.softmax(-1)[0, 1].item())
    assert values == pytest.approx(own, abs=1e-6)
    assert max(values) - min(values) > 0.2
