"""How close a translation is to a gold one, by shared word sequences."""

from typing import Any, Literal

from grpo_lab.scoring import reward
from grpo_lab.text_metrics import bleu as metric
from grpo_lab.text_metrics import gold_texts
from grpo_lab.types import Completion


@reward(range=(0.0, 1.0))
def bleu(completion: Completion, *, answer: Any, tokens: Literal["13a", "intl", "char", "zh", "none"] = "13a") -> float:
    """Sentence BLEU against the gold texts, from 0 to 1: sacrebleu's, smoothed, with effective order.

    The column `answer` is a text or a list of texts. `tokens` is sacrebleu's tokenizer: "13a" for languages with
    spaces, "intl" for their unicode punctuation, "zh" for Chinese, "char" for every character. Short texts score
    coarsely; `chrf` is smoother. Report corpus BLEU when evaluating: it is not the mean of this.
    """
    return metric(completion.text, gold_texts(answer), tokens=tokens)
