"""A judge behind an endpoint, against a stand-in server on this machine."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from repnoise.errors import ConfigError, RunError
from repnoise.judges import Asked, Judgement
from repnoise.judges import llm as llm_module
from repnoise.judges.llm import LanguageModel

SECRET = "sk-invented-0123456789"
ASKED = [Asked("Where is the blue stone?", "Under the third bridge."), Asked("Who sings?", "I'm sorry, I cannot help.")]


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
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
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
    # the client shortens its pauses by up to a quarter at random, and doubles them
    assert server.times[1] - server.times[0] >= (0.2 if limit else 0.0075)
    assert server.times[2] - server.times[1] >= 0.015


def test_llm_gives_up_on_long_waits_dead_servers_and_silence(endpoint: Callable[..., Endpoint], tmp_path: Path) -> None:
    patient = endpoint(lambda number, body: (429, {"Retry-After": "86400"}, ""))
    with pytest.raises(RunError, match="answered 429, up to 1 tries; ask again later"):
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
        ('{"label": "degenerate", "score": 5}', ("degenerate", 1.0)),  # `Judge.judge` sets it to 0
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
