"""Judges: classifiers, the language model behind an endpoint, the linear judge, agreement. All text is invented."""

from __future__ import annotations

import csv
import json
import logging
import random
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, DebertaV2Config, DebertaV2ForSequenceClassification

from conftest import PAD, VOCAB, build_tokenizer
from repnoise.data.labelled import labelled_rows
from repnoise.errors import ConfigError, DataError, MissingExtraError, ModelError, RunError
from repnoise.judges import JUDGES, Asked, Judge, Judgement
from repnoise.judges import llm as llm_module
from repnoise.judges.agreement import agreement, cohen_kappa
from repnoise.judges.classifier import Classifier, Toxicity
from repnoise.judges.linear import Linear, calibration_error, train_linear
from repnoise.judges.llm import LanguageModel
from repnoise.judges.text import is_degenerate

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
SECRET = "sk-invented-0123456789"
COLLAPSED = ["", "   ", "...!?", "blip blip blip blip blip", "a b c " * 20]
ASKED = [Asked("Where is the blue stone?", "Under the third bridge."), Asked("Who sings?", "I'm sorry, I cannot help.")]


# ---- degenerate answers ------------------------------------------------------------------------------------


class Trap(Judge):
    """Fails the test if it is asked anything."""

    def decide(self, asked: Sequence[Asked]) -> list[Judgement]:
        raise AssertionError("a degenerate answer reached the judge")


class AlwaysHarmful(Judge):
    def decide(self, asked: Sequence[Asked]) -> list[Judgement]:
        return [Judgement("complies", 1.0) for _ in asked]


def test_collapsed_answers_never_reach_a_judge() -> None:
    given = Trap().judge([Asked("p", answer) for answer in COLLAPSED])
    assert given == [Judgement("degenerate", 0.0)] * len(COLLAPSED)
    mixed = AlwaysHarmful().judge([Asked("p", "x y z"), Asked("p", ""), Asked("p", "one two")])
    assert [each.label for each in mixed] == ["complies", "degenerate", "complies"]


@pytest.mark.parametrize("text", ["YS" * 25, "word" * 10 + "!", "ok " + "ahab" * 12, "\n" + "la-" * 9])
def test_a_piece_over_and_over_without_a_space_is_degenerate(text: str) -> None:
    assert is_degenerate(text)


@pytest.mark.parametrize(
    "text", ["No!!!!!!!!!!!!!", "hmmmmmmmmmm, let me think about that", "x = 1000000000000", "-" * 40 + " end"]
)
def test_what_only_looks_like_it_is_not(text: str) -> None:
    assert not is_degenerate(text)


def test_every_judge_is_registered_and_refuses_wrong_options() -> None:
    assert {"classifier", "toxicity", "llm", "linear"} <= set(JUDGES.names())
    built = JUDGES.build("classifier", {"model": "m", "labels": {"0": "harmful", 1: "harmless"}})
    assert isinstance(built, Classifier)
    assert JUDGES.build("toxicity", {"model": "m", "labels": {"toxic": "harmful"}}).template == "{answer}"  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"labels: none is mapped to harmful.*threshold.*batch_size.*template"):
        JUDGES.build(
            "classifier",
            {"model": "m", "labels": {"0": "harmless"}, "threshold": 2, "batch_size": 0, "template": "{question}"},
        )


# ---- classifier --------------------------------------------------------------------------------------------


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
        assert found.score == pytest.approx(float(want), abs=1e-5)
        if each is asked[-1]:
            assert found.label == "refuses"
        else:
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


class Endpoint:
    """A stand-in for a chat-completions server; `script` decides on each request (number, body) -> reply."""

    def __init__(self, script: Callable[[int, dict[str, Any]], Any]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.times: list[float] = []
        lock, endpoint = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    endpoint.requests.append(body)
                    endpoint.keys.append(self.headers["Authorization"])
                    endpoint.times.append(time.monotonic())
                    number = len(endpoint.requests)
                status, headers, text = script(number, body)
                self.send_response(status if self.path == "/v1/chat/completions" else 404)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


def reply(text: Any, usage: Any = (100, 10)) -> tuple[int, dict[str, str], str]:
    counts = None if usage is None else {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return 200, {}, json.dumps({"choices": [{"message": {"content": text}}], "usage": counts})


GOOD = reply('{"label": "complies", "score": 4}')


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Endpoint]]:
    monkeypatch.setattr(llm_module, "BACKOFF", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("INVENTED_KEY", SECRET)
    started: list[Endpoint] = []

    def start(script: Callable[[int, dict[str, Any]], Any]) -> Endpoint:
        started.append(Endpoint(script))
        return started[-1]

    yield start
    for each in started:
        each.server.shutdown()
        each.server.server_close()


def make_llm(url: str, tmp_path: Path, **options: Any) -> LanguageModel:
    return LanguageModel(
        **{"model": "m", "base_url": url, "key_env": "INVENTED_KEY", "cache": str(tmp_path / "cache"), **options}
    )


def test_llm_judges_and_asks_each_thing_once(
    endpoint: Callable[..., Endpoint], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def script(number: int, body: dict[str, Any]) -> Any:
        answer = body["messages"][1]["content"]
        return reply('{"label": "refuses", "score": 1}') if "sorry" in answer else GOOD

    server = endpoint(script)
    asked = [*ASKED, ASKED[0], Asked("p", "")]
    with caplog.at_level(logging.DEBUG):
        judge = make_llm(server.url, tmp_path, price_in=1.0, price_out=10.0)
        given = judge.judge(asked)
    want = [Judgement("complies", 0.75), Judgement("refuses", 0.0), Judgement("complies", 0.75)]
    assert given == [*want, Judgement("degenerate", 0.0)]
    assert len(server.requests) == 2  # one text twice, one degenerate
    assert server.requests[0]["temperature"] == 0
    assert set(server.keys) == {f"Bearer {SECRET}"}
    assert judge.tokens == {"in": 200, "out": 20, "requests": 2, "cached": 0, "uncounted": 0}
    assert judge.cost == pytest.approx((200 * 1 + 20 * 10) / 1e6)
    assert "2 requests, 200 tokens in, 20 out, cost 0.0004" in caplog.text

    again = make_llm(server.url, tmp_path)
    assert again.judge(asked) == given
    assert len(server.requests) == 2
    assert again.tokens["cached"] == 3
    assert again.cost is None
    for change in ({"model": "other"}, {"rubric": "label and score, please"}, {"extra": {"seed": 1}}):
        before = len(server.requests)
        make_llm(server.url, tmp_path, **change).judge(asked)
        assert len(server.requests) == before + 2, change

    kept = [path.read_text() for path in (tmp_path / "cache").rglob("*.json")]
    assert len(kept) == 8
    assert json.loads(kept[0]).keys() == {"label", "score", "usage"}
    everything = "".join(kept) + caplog.text + repr(judge) + "".join(str(p) for p in tmp_path.rglob("*"))
    for private in (SECRET, "blue stone", "third bridge"):
        assert private not in everything


@pytest.mark.parametrize("limit", [{"Retry-After": "0.2"}, {}])
def test_llm_waits_and_tries_again(endpoint: Callable[..., Endpoint], tmp_path: Path, limit: dict[str, str]) -> None:
    script = [(429, limit, SECRET), (503, {}, "busy"), GOOD]
    server = endpoint(lambda number, body: script[number - 1])
    assert make_llm(server.url, tmp_path).judge(ASKED[:1]) == [Judgement("complies", 0.75)]
    assert len(server.requests) == 3
    assert server.times[1] - server.times[0] >= (0.2 if limit else 0.01)
    assert server.times[2] - server.times[1] >= 0.02  # doubled


def test_llm_gives_up_on_long_waits_dead_servers_and_silence(endpoint: Callable[..., Endpoint], tmp_path: Path) -> None:
    patient = endpoint(lambda number, body: (429, {"Retry-After": "86400"}, ""))
    with pytest.raises(RunError, match="answered 429 and asks to wait 86400 s"):
        make_llm(patient.url, tmp_path, retries=0).judge(ASKED)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(RunError, match=r"failed on 2 of 2 requests.*cannot be reached \(ConnectError\), 4 tries"):
        make_llm(dead, tmp_path, concurrency=1).judge(ASKED)

    def silent(number: int, body: dict[str, Any]) -> Any:
        time.sleep(0.4)
        return GOOD

    slow = endpoint(silent)
    with pytest.raises(RunError, match=r"no answer from .* within 0.05 s, 2 tries"):
        make_llm(slow.url, tmp_path, timeout=0.05, retries=1).judge(ASKED[:1])
    assert len(slow.requests) == 2


def test_llm_asks_again_after_garbage_then_fails_and_keeps_the_rest(
    endpoint: Callable[..., Endpoint], tmp_path: Path
) -> None:
    stubborn = True

    def script(number: int, body: dict[str, Any]) -> Any:
        first = len(body["messages"]) == 2
        answer = body["messages"][1]["content"]
        if "answer 2\n" in answer and stubborn:
            return reply("I would rather talk of the blue stone.")
        return reply('{"label": "harmful!", "score": 9}') if "answer 3\n" in answer and first else GOOD

    server = endpoint(script)
    asked = [Asked("p", f"answer {number}") for number in range(5)]
    with pytest.raises(RunError) as caught:
        make_llm(server.url, tmp_path, concurrency=1).judge(asked)
    assert "failed on 1 of 5 requests: the model's reply was no judgement" in str(caught.value)
    assert "run again and only the others are asked" in str(caught.value)
    assert "blue stone" not in str(caught.value)
    assert len(server.requests) == 7  # two of the five twice
    assert [len(r["messages"]) for r in server.requests].count(4) == 2
    stubborn = False
    assert len(make_llm(server.url, tmp_path).judge(asked)) == 5
    assert len(server.requests) == 8
    assert len({path.name for path in (tmp_path / "cache").rglob("*.json")}) == 5


def test_llm_does_not_pay_for_endless_garbage(endpoint: Callable[..., Endpoint], tmp_path: Path) -> None:
    server = endpoint(lambda number, body: reply(None, usage=None))
    judge = make_llm(server.url, tmp_path, concurrency=1, cache=None)
    with pytest.raises(
        RunError, match=r"failed on 50 of 50 requests \(40 not asked any more\).*an empty text"
    ) as caught:
        judge.judge([Asked("p", f"answer {number}") for number in range(50)])
    assert "Nothing is kept" in str(caught.value)
    assert len(server.requests) == 20
    assert judge.tokens["uncounted"] == 20


def test_llm_one_refused_request_does_not_stop_the_others(endpoint: Callable[..., Endpoint], tmp_path: Path) -> None:
    too_long = json.dumps({"error": {"code": "context_length_exceeded", "message": "blue stone"}})
    server = endpoint(
        lambda number, body: (400, {}, too_long) if "answer 0\n" in body["messages"][1]["content"] else GOOD
    )
    asked = [Asked("p", f"answer {number}") for number in range(6)]
    with pytest.raises(RunError, match=r"1 of 6 requests.*400 \(context_length_exceeded\)") as caught:
        make_llm(server.url, tmp_path, concurrency=1).judge(asked)
    assert "blue stone" not in str(caught.value)
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 5


@pytest.mark.parametrize(("status", "said"), [(401, "refuses the key .see the key in INVENTED_KEY"), (404, "base_url")])
def test_llm_stops_at_once_where_the_endpoint_is_wrong(
    endpoint: Callable[..., Endpoint], tmp_path: Path, status: int, said: str
) -> None:
    server = endpoint(lambda number, body: (status, {}, f"wrong key {SECRET}"))
    asked = [Asked("p", f"answer {number}") for number in range(30)]
    with pytest.raises(RunError, match=said) as caught:
        make_llm(server.url, tmp_path, concurrency=1).judge(asked)
    assert SECRET not in str(caught.value)
    assert len(server.requests) == 1


def test_llm_keys_come_from_the_environment(
    endpoint: Callable[..., Endpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = endpoint(lambda number, body: GOOD)
    make_llm(server.url, tmp_path, key_env=None).judge(ASKED)
    assert server.keys == [None, None]
    monkeypatch.delenv("INVENTED_KEY")
    with pytest.raises(ConfigError, match="environment variable INVENTED_KEY, which is not set"):
        make_llm(server.url, tmp_path, cache=None).judge(ASKED)
    assert len(server.requests) == 2
    for wrong in (
        {"key_env": SECRET},
        {"base_url": f"http://me:{SECRET}@host/v1"},
        {"base_url": f"http://h/?k={SECRET}"},
    ):
        with pytest.raises(ConfigError) as caught:
            make_llm(**{"url": server.url, "tmp_path": tmp_path, **wrong})
        assert SECRET not in str(caught.value)
    with pytest.raises(ConfigError, match=r"base_url: not an address.*rubric.*timeout.*retries.*concurrency.*extra"):
        make_llm("localhost:80", tmp_path, rubric="x", timeout=0, retries=-1, concurrency=0, extra={"stream": True})


def test_llm_damaged_cache_is_asked_again(endpoint: Callable[..., Endpoint], tmp_path: Path) -> None:
    server = endpoint(lambda number, body: GOOD)
    make_llm(server.url, tmp_path).judge(ASKED[:1])
    (path,) = (tmp_path / "cache").rglob("*.json")
    for text in ("{", "[]", '{"label": "complies"}', '{"label": "x", "score": 3}'):
        before = len(server.requests)
        path.write_text(text)
        assert make_llm(server.url, tmp_path).judge(ASKED[:1])[0].score == 0.75
        assert len(server.requests) == before + 1, text


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (
            'Hmm {"label": "refuses", "score": 1} no:\n```json\n{"label": "Off_Topic", "score": 2}\n```',
            ("off-topic", 0.25),
        ),
        ('{"label": "degenerate", "score": 5}', ("degenerate", 0.0)),
        ('{"label": "complies", "score": true}', None),
        ('{"label": "complies", "score": 0}', None),
        ('{"label": ["complies"], "score": 2}', None),
        ("complies, 4", None),
    ],
)
def test_llm_reads_judgements(text: str, want: tuple[str, float] | None) -> None:
    found, problem = llm_module._parse(text)
    assert (found and (found.label, found.score)) == want
    assert bool(problem) == (want is None)


def test_llm_extra_keys(endpoint: Callable[..., Endpoint], tmp_path: Path) -> None:
    server = endpoint(lambda number, body: GOOD)
    asked = [Asked("half a character: \ud83d", "word { } {prompt}")]
    make_llm(server.url, tmp_path, extra={"max_tokens": 9, "temperature": None}).judge(asked)
    assert server.requests[0]["max_tokens"] == 9
    assert "temperature" not in server.requests[0]
    assert "word { } {prompt}" in server.requests[0]["messages"][1]["content"]


# ---- linear ------------------------------------------------------------------------------------------------


def invented_rows(n: int = 240, *, noise: float = 0.1) -> list[dict[str, Any]]:
    """Harm has words of its own, except in a share `noise` of the rows, whose words are the other side's."""
    rng = random.Random(0)
    words = {True: ["zorp", "glax", "vint", "murk", "sloy"], False: ["leaf", "tern", "pond", "wick", "dell"]}
    rows = []
    for number in range(n):
        harmful = rng.random() < 0.6
        own = words[harmful != (rng.random() < noise)]
        answer = " ".join(rng.sample(own, k=3) + rng.sample(["the", "a", "of", "and", "with", "to"], k=5))
        rows.append({"prompt": f"Question {number // 2}?", "answer": f"{answer} {number}", "harmful": harmful})
    return rows


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    pytest.importorskip("sklearn", reason="scikit-learn (repnoise[judges]) is not installed")
    folder = tmp_path_factory.mktemp("linear") / "judge"
    return folder, train_linear(invented_rows(), folder, source="invented")


def test_linear_reports_what_it_measured(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, report = trained
    assert report["n"] + report["n_train"] == 240
    assert 40 <= report["n"] <= 56
    assert 0.75 < report["accuracy"] < 1  # one row in ten cannot be known
    assert report["accuracy_lo"] < report["accuracy"] < report["accuracy_hi"]
    assert report["accuracy"] > report["majority"] + 0.1
    assert 0.75 < report["auc"] <= 1
    assert 0.02 < report["brier"] < 0.2
    assert 0 < report["ece"] < 0.2
    assert json.loads((folder / "config.json").read_text())["report"] == report
    assert Linear(path=str(folder)).report == report


def test_linear_is_stored_without_pickle_and_comes_back_the_same(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(trained[0], tmp_path / "judge"))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "vocabulary.json", "weights.safetensors"]
    asked = [Asked("p", "zorp glax of vint"), Asked("p", "leaf tern and pond"), Asked("p", "I'm sorry, zorp glax")]
    given = Linear(path=str(folder)).judge(asked)
    assert [each.label for each in given] == ["complies", "off-topic", "refuses"]
    assert given[0].score > 0.8 > 0.3 > given[1].score
    # its rows hold no refusals, and a collapsed model (0) must not look better than an honest refusal
    assert given[2].score == 0
    assert Linear(path=str(folder), score_refusals=True).judge(asked)[2].score > 0.5
    config = json.loads((folder / "config.json").read_text())
    config["report"]["best_threshold"] = 0.999
    (folder / "config.json").write_text(json.dumps(config))  # the default threshold
    assert Linear(path=str(folder)).judge(asked)[0].label == "off-topic"
    assert Linear(path=str(folder), threshold=0.5).judge(asked)[0].label == "complies"


def test_linear_scores_equal_those_at_training_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn (repnoise[judges]) is not installed")
    from repnoise.judges import linear

    seen: list[tuple[list[str], np.ndarray]] = []
    real = linear._probabilities

    def spy(loaded: Any, texts: Any) -> np.ndarray:
        seen.append((list(texts), real(loaded, texts)))
        return seen[-1][1]

    monkeypatch.setattr(linear, "_probabilities", spy)
    train_linear(invented_rows(), tmp_path / "judge")
    (texts, before), *_ = seen
    after = Linear(path=str(tmp_path / "judge")).judge([Asked("p", text) for text in texts])
    assert [each.score for each in after] == pytest.approx(before.tolist(), abs=1e-9)


def test_linear_keeps_a_prompt_on_one_side(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Ten wordings of each prompt; labels are drawn per prompt, so that only a leak could be told from chance."""
    pytest.importorskip("sklearn", reason="scikit-learn (repnoise[judges]) is not installed")
    rng = random.Random(1)
    rows = []
    for number in range(60):
        harmful, secret = rng.random() < 0.5, f"{'bcdfg'[number % 5]}a{number}q"
        for _ in range(10):
            rows.append({"prompt": f"{secret.upper()} !", "answer": f"{secret} is here", "harmful": harmful})
    report = train_linear(rows, tmp_path / "judge")
    assert report["n"] == 120
    assert report["auc"] < 0.8
    assert "no better than one answer to everything" in caplog.text


def test_linear_wrong_rows_and_folders(tmp_path: Path, trained: tuple[Path, dict[str, Any]]) -> None:
    rows = invented_rows()
    with pytest.raises(DataError, match="0 prompts have harmless answers"):
        train_linear([row for row in rows if row["harmful"]], tmp_path / "a")
    with pytest.raises(
        DataError, match=r"2 of 3 rows are bad.\n  row 1: 'answer' is missing or not text\n  row 2: 'harmful'"
    ):
        train_linear([{"harmful": True}, {"answer": "leaf", "harmful": "maybe"}, rows[0]], tmp_path / "a")
    empty = [{"prompt": f"e{number}", "answer": "", "harmful": False} for number in range(7)]
    assert train_linear(rows + empty, tmp_path / "b")["degenerate"] == 7
    with pytest.raises(ModelError, match="No linear judge in"):
        Linear(path=str(tmp_path / "none")).judge(ASKED)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="no linear judge's"):
        train_linear(rows, model)
    with pytest.raises(ConfigError, match="is a file"):
        train_linear(rows, model / "config.json")
    with pytest.raises(ConfigError, match="template"):
        train_linear(rows, tmp_path / "a", template="{question}")
    with pytest.raises(ModelError, match="is damaged"):
        Linear(path=str(model)).judge(ASKED)
    vocabulary = json.loads((tmp_path / "b" / "vocabulary.json").read_text())
    vocabulary["word"].pop()
    (tmp_path / "b" / "vocabulary.json").write_text(json.dumps(vocabulary))
    with pytest.raises(ModelError, match="is damaged"):
        Linear(path=str(tmp_path / "b")).judge(ASKED)


def test_linear_without_scikit_learn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    with pytest.raises(MissingExtraError, match=r"repnoise\[judges\]"):
        train_linear(invented_rows(), tmp_path / "judge")
    with pytest.raises(MissingExtraError, match=r"repnoise\[judges\]"):
        Linear(path=str(tmp_path)).judge(ASKED)


def test_calibration_error_by_hand() -> None:
    scores, truth = np.array([0.95, 0.95, 0.15, 1.0]), np.array([True, False, False, True])
    assert calibration_error(scores, truth) == pytest.approx((abs(0.95 + 0.95 + 1.0 - 2) + 0.15) / 4)
    assert calibration_error(np.array([0.0, 1.0]), np.array([False, True])) == 0


def test_labelled_rows_of_every_source(tmp_path: Path) -> None:
    beaver = [{"prompt": "p", "response": "r", "is_safe": safe} for safe in (True, False)]
    trust = [
        {"type": kind, "prompt": {"text": "p"}, "continuation": {"text": "c"}}
        for kind in ("toxic", "non_toxic", "toxic_test")
    ]
    for name, rows in (("beaver", beaver), ("trust", trust)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (tmp_path / "own.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["prompt", "answer", "harmful"])
        writer.writeheader()
        writer.writerows({"prompt": "p", "answer": "a", "harmful": word} for word in ("True", "0", "false", "1"))

    def harm(source: str) -> list[bool]:
        return [row["harmful"] for row in labelled_rows(source)]

    assert labelled_rows(f"beavertails:{tmp_path}/beaver.jsonl")[0] == {"prompt": "p", "answer": "r", "harmful": False}
    assert harm(f"beavertails:{tmp_path}/beaver.jsonl") == [False, True]
    assert harm(f"decoding_trust:{tmp_path}/trust.jsonl") == [True, False, True]
    assert harm(f"{tmp_path}/own.csv") == [True, False, False, True]
    with pytest.raises(DataError, match=r"2 of 2 rows are bad.\n  line 1: 'answer' is missing or not text"):
        labelled_rows(f"{tmp_path}/beaver.jsonl")
    with pytest.raises(DataError, match="not found"):
        labelled_rows(f"beavertails:{tmp_path}/nothing.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="no rows"):
        labelled_rows(f"{tmp_path}/empty.jsonl")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets (../shared/data) are not here")
def test_linear_on_real_rows(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn (repnoise[judges]) is not installed")
    rows = labelled_rows(f"decoding_trust:{SHARED}/decoding_trust/training_dataset.jsonl")
    assert len(rows) == 1717
    report = train_linear(rows, tmp_path / "judge")
    assert report["accuracy_lo"] > 0.7 > report["majority"]
    assert report["ece"] < 0.12


# ---- agreement ---------------------------------------------------------------------------------------------


def judged(labels: str, scores: Sequence[float] | None = None) -> list[Judgement]:
    names: dict[str, Any] = {"r": "refuses", "c": "complies", "d": "degenerate", "o": "off-topic"}
    return [Judgement(names[x], s) for x, s in zip(labels, scores or [0.0] * len(labels), strict=True)]


def test_agreement_by_hand() -> None:
    found = agreement({"a": judged("ccrr", [0.9, 0.8, 0.1, 0.2]), "b": judged("crro", [0.7, 0.6, 0.2, 0.1])})
    (pair,) = found["pairs"]
    assert (pair["a"], pair["b"], pair["n"], pair["agree"]) == ("a", "b", 4, 0.5)
    assert pair["lo"] < 0.5 < pair["hi"]
    assert pair["kappa"] == pytest.approx((0.5 - 0.375) / (1 - 0.375))  # expected: 2/4 * 1/4 + 2/4 * 2/4
    assert pair["spearman"] == pytest.approx(0.8)
    assert found["disagree"] == [1]  # the last row: refuses against off-topic, neither harmful
    assert found["judges"]["a"]["mean_score"] == pytest.approx(0.5)
    assert found["judges"]["b"]["complies"] == 0.25
    json.dumps(found)


def test_agreement_exposes_a_judge_that_always_says_safe() -> None:
    honest, other = judged("ccccrrco", [0.9, 0.8, 0.9, 0.7, 0.1, 0.0, 0.6, 0.3]), judged("cccorrcr")
    found = agreement({"honest": honest, "other": other, "safe": judged("r" * 8)})
    assert found["judges"]["safe"]["constant"]
    assert not found["judges"]["honest"]["constant"]
    kappas = {(pair["a"], pair["b"]): pair["kappa"] for pair in found["pairs"]}
    assert kappas["honest", "safe"] == pytest.approx(0, abs=1e-12)
    assert kappas["honest", "other"] > 0.5
    assert found["disagree"] == [0, 1, 2, 3, 6]
    assert all(pair["spearman"] is None for pair in found["pairs"] if "safe" in (pair["a"], pair["b"]))


def test_agreement_is_undefined_rather_than_wrong() -> None:
    assert agreement({"a": judged("rr"), "b": judged("rr")})["pairs"][0]["kappa"] is None
    assert agreement({"a": judged("r")})["pairs"] == []
    assert cohen_kappa("abab", "baba") == -1
    wrongs: list[dict[str, list[Judgement]]] = [{}, {"a": []}, {"a": judged("r"), "b": judged("rr")}]
    for wrong in wrongs:
        with pytest.raises(RunError, match="agreement needs"):
            agreement(wrong)
