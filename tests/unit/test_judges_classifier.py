"""Classifiers as judges: each text scored as if alone, labels mapped, wrong folders refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, DebertaV2Config, DebertaV2ForSequenceClassification

from conftest import PAD, VOCAB, build_tokenizer
from repnoise.errors import ConfigError, ModelError
from repnoise.judges import Asked
from repnoise.judges.classifier import Classifier, Toxicity

ASKED = [Asked("Where is the blue stone?", "Under the third bridge."), Asked("Who sings?", "I'm sorry, I cannot help.")]


@pytest.fixture
def classifier(tmp_path: Path) -> Callable[..., str]:
    """A tiny random classifier on disk; returns its folder."""

    def make(kind: str = "deberta", **settings: Any) -> str:
        shape = {
            "vocab_size": VOCAB,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "max_position_embeddings": 64,
            "pad_token_id": PAD,
            "initializer_range": 0.5,
            **settings,
        }
        torch.manual_seed(0)
        model: Any
        if kind == "bert":
            model = BertForSequenceClassification(BertConfig(**shape))
        else:
            more = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0}
            model = DebertaV2ForSequenceClassification(DebertaV2Config(**{**shape, **more}))
        folder = tmp_path / kind
        model.eval().save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)
        return str(folder)

    return make


def reference(folder: str, text: str, kind: Any) -> torch.Tensor:
    """Softmax of one text alone, without padding."""
    model = kind.from_pretrained(folder).eval()
    ids = torch.tensor([build_tokenizer()(text)["input_ids"]])
    with torch.no_grad():
        return model(input_ids=ids).logits.softmax(1)[0]


@pytest.mark.parametrize(
    ("kind", "cls"), [("deberta", DebertaV2ForSequenceClassification), ("bert", BertForSequenceClassification)]
)
def test_classifier_scores_each_text_as_if_alone(classifier: Callable[..., str], kind: str, cls: Any) -> None:
    folder = classifier(kind)
    asked = [Asked("Q?", "word " + "xyz" * n) for n in (5, 1, 7, 3)] + [ASKED[1]]
    judge = Classifier(model=folder, labels={"LABEL_0": "harmful", "LABEL_1": "harmless"}, batch_size=2)
    given = judge.judge(asked)
    for each, found in zip(asked, given, strict=True):
        want = reference(folder, f"Question: {each.prompt}\nAnswer: {each.answer}", cls)[0]
        if each is asked[-1]:
            assert (found.label, found.score) == ("refuses", 0.0)
        else:
            assert found.score == pytest.approx(float(want), abs=1e-5)
            assert found.label == ("complies" if found.score >= 0.5 else "off-topic")
    assert len({round(found.score, 4) for found in given}) > 3  # the texts do matter
    low = Classifier(model=folder, labels={"0": "harmful", "1": "harmless"}, threshold=1e-9).judge(asked)
    assert [each.label for each in low] == ["complies"] * 4 + ["refuses"]


def test_the_mapping_decides_what_is_harm_and_toxicity_reads_the_answer_alone(classifier: Callable[..., str]) -> None:
    folder = classifier(id2label={0: "safe", 1: "bad", 2: "worse"}, label2id={"safe": 0, "bad": 1, "worse": 2})
    labels: dict[str | int, Any] = {"safe": "harmless", "bad": "harmful", "LABEL_2": "harmful"}
    want = reference(folder, "An answer.", DebertaV2ForSequenceClassification)
    judge = Toxicity(model=folder, labels=labels)
    one, other = judge.judge([Asked("p1", "An answer."), Asked("quite another prompt", "An answer.")])
    assert one.score == other.score == pytest.approx(float(want[1] + want[2]), abs=1e-5)
    turned = Toxicity(model=folder, labels={"0": "harmful", "1": "harmless", "2": "harmless"})
    assert turned.judge([Asked("p", "An answer.")])[0].score == pytest.approx(float(want[0]), abs=1e-5)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ({"toxic": "harmful", "LABEL_1": "harmless"}, "it has no label 'toxic'"),
        ({"LABEL_0": "harmful"}, "not mapped: LABEL_1"),
        ({"LABEL_0": "harmful", "0": "harmless", "1": "harmless"}, "'0' names label 0 a second time"),
        ({"LABEL_0": "harmful", "7": "harmless"}, "it has no label '7'"),
    ],
)
def test_labels_that_do_not_fit_are_one_error(classifier: Callable[..., str], labels: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Classifier(model=classifier(), labels=labels).judge(ASKED)
    assert said in str(caught.value)
    assert "0: LABEL_0, 1: LABEL_1" in str(caught.value)


def test_labels_that_do_not_exclude_each_other(classifier: Callable[..., str]) -> None:
    folder = classifier(problem_type="multi_label_classification", num_labels=3)
    labels: dict[str | int, Any] = {"0": "harmful", "1": "harmful", "2": "harmful"}
    model = DebertaV2ForSequenceClassification.from_pretrained(folder).eval()
    ids = torch.tensor([build_tokenizer()("An answer.")["input_ids"]])
    with torch.no_grad():
        want = float(model(input_ids=ids).logits.sigmoid().max())
    given = Toxicity(model=folder, labels=labels).judge([Asked("p", "An answer.")])
    assert given[0].score == pytest.approx(want, abs=1e-5)
    with pytest.raises(ConfigError, match="every text would score 1"):  # a softmax over harm alone
        Toxicity(model=folder, labels=labels, multi_label=False).judge(ASKED)


def test_one_logit_is_a_probability_and_a_regression_is_none(classifier: Callable[..., str]) -> None:
    folder = classifier(num_labels=1)
    given = Toxicity(model=folder, labels={"0": "harmful"}).judge([Asked("p", "An answer."), Asked("p", "Zzz xxx")])
    assert all(0 < each.score < 1 for each in given)
    assert given[0].score != given[1].score
    with pytest.raises(ConfigError, match="regression"):
        Toxicity(model=classifier("bert", num_labels=1, problem_type="regression"), labels={"0": "harmful"}).judge(
            ASKED
        )


def test_long_text_keeps_the_end_of_the_answer(
    classifier: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    judge = Classifier(model=classifier(), labels={"0": "harmful", "1": "harmless"}, max_length=20)
    with caplog.at_level(logging.WARNING):
        one, other, third = judge.judge(
            [
                Asked("A long prompt " * 9, "the very same end of it"),
                Asked("Another one " * 9, "the very same end of it"),
                Asked("A long prompt " * 9, "the very same end of if"),
            ]
        )
    assert one.score == other.score != third.score
    assert "3 of 3 texts of over 20 tokens lost their beginning" in caplog.text
    assert "very same" not in caplog.text
    longer = Classifier(model=judge.model, labels=judge.labels, max_length=4096)  # the model holds 64
    assert len(longer.judge([Asked("p", "long answer, many words " * 3 + "x y z")])) == 1


def test_wrong_classifier_folders(classifier: Callable[..., str], tmp_path: Path) -> None:
    labels: dict[str | int, Any] = {"0": "harmful", "1": "harmless"}
    with pytest.raises(ModelError, match="Could not load the classifier"):
        Classifier(model=str(tmp_path), labels=labels).judge(ASKED)
    folder = Path(classifier())
    model = DebertaV2ForSequenceClassification.from_pretrained(folder)
    model.deberta.save_pretrained(folder)  # without the head
    with pytest.raises(ModelError, match="lacks 4 of a classifier's weights"):
        Classifier(model=str(folder), labels=labels).judge(ASKED)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="Could not load the classifier"):  # a pickle
        Classifier(model=str(folder), labels=labels).judge(ASKED)


# ---- language model ----------------------------------------------------------------------------------------
