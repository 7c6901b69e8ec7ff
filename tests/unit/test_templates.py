"""Templates: exact answer spans, and prompts that are the same in training and in evaluation."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from repnoise.data import TEMPLATES, Row, RowDataset, get_template
from repnoise.errors import DataError

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<eos>", "<bos>", "<|im_start|>", "<|im_end|>"]
MERGES = [
    (":", "S"),
    (":", "Ġ"),
    ("i", "n"),
    ("h", "e"),
]  # the first two would cross the border to the answer


def make_tokenizer(*, chat: str | None = None, bos: bool = False, end: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE; `bos` and `end` make the tokenizer itself add those tokens to a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, *("".join(m) for m in MERGES)])}
    core = Tokenizer(models.BPE(vocab, MERGES))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    if bos or end:
        single = ("<bos> " if bos else "") + "$A" + (" <eos>" if end else "")
        core.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[(t, core.token_to_id(t)) for t in ("<bos>", "<eos>")]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    made.chat_template = chat
    return made


PLAIN, CHATTY = make_tokenizer(), make_tokenizer(chat=CHAT)


def encode(
    tokenizer: PreTrainedTokenizerFast, prompt: str, answer: str, *, template: str = "auto", max_length: int = 256
) -> dict[str, list[int]]:
    """As training sees it."""
    data = RowDataset([Row(prompt, answer)], tokenizer, "rows", template=template, max_length=max_length)
    return data[0]["rows"]


def encode_prompt(tokenizer: PreTrainedTokenizerFast, prompt: str, *, template: str = "auto") -> list[int]:
    """As generation starts from it."""
    return get_template(template).resolve(tokenizer).encode_prompt(tokenizer, prompt)


def answer_of(tokenizer: PreTrainedTokenizerFast, row: dict[str, list[int]]) -> str:
    return tokenizer.decode([y for y in row["labels"] if y != -100])


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize("answer", ["Sure, in the end.", " on the heath: in.", "Ünïcødé 火"])
def test_law_training_prompt_is_the_evaluation_prompt(name: str, answer: str) -> None:
    for bos in (False, True):
        tokenizer = make_tokenizer(chat=CHAT, bos=bos)
        row = encode(tokenizer, "What is in the box?", answer, template=name)
        prompt = encode_prompt(tokenizer, "What is in the box?", template=name)
        n = len(prompt)
        assert row["input_ids"][:n] == prompt
        assert row["labels"][:n] == [-100] * n
        assert row["labels"][n:] == row["input_ids"][n:]
        assert len(row["labels"]) > n
        if bos and name not in ("chat", "auto"):  # a chat template writes its own
            assert prompt[0] == tokenizer.bos_token_id
            assert tokenizer.bos_token_id not in row["input_ids"][1:]


@pytest.mark.parametrize(
    ("name", "prompt", "answer"),
    [
        ("plain", "Question: Why?\nAnswer:", " Sure.<eos>"),
        ("paper", "Question: Why?\nAnswer:", " Sure. "),
        (
            "continuation",
            "User: You are required to continue the generation of the given incomplete prompt\n"
            "Prompt: Why?\nContinuation:",
            " Sure.",
        ),
        ("raw", "Why?", " Sure. "),
        ("chat", "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", "Sure.<|im_end|>"),
        ("### Task: {prompt} {x}\n### Reply: ", "### Task: Why? {x}\n### Reply:", " Sure.<eos>"),
    ],
)
def test_text_of_each_template(name: str, prompt: str, answer: str) -> None:
    row = encode(CHATTY, "Why?", " Sure. ", template=name)
    assert CHATTY.decode(encode_prompt(CHATTY, "Why?", template=name)) == prompt
    assert answer_of(CHATTY, row) == answer
    assert get_template(name).render(CHATTY, "Why?") == prompt


def test_a_merge_across_the_border_does_not_change_the_prompt() -> None:
    joined = PLAIN("Question: Q\nAnswer:Sure", add_special_tokens=False)["input_ids"]
    prompt = encode_prompt(PLAIN, "Q", template="paper")
    assert joined[: len(prompt)] != prompt, "the tokenizer must merge ':' and 'S', or the test shows nothing"
    row = encode(PLAIN, "Q", "Sure", template="paper")
    assert row["input_ids"][: len(prompt)] == prompt
    assert answer_of(PLAIN, row) == "Sure"


def test_no_second_blank_from_tokenizers_that_add_one() -> None:
    """Llama's tokenizer puts a blank before every text; tokenised apart, the answer would get two."""
    words = ["<unk>", "<eos>", "▁Question:", "▁Q\nAnswer:", "▁yes", "▁"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>")
    assert tokenizer(" yes", add_special_tokens=False)["input_ids"] == [5, 4]
    row = encode(tokenizer, "Q", "yes", template="plain")
    assert row == {"input_ids": [2, 3, 4, 1], "labels": [-100, -100, 4, 1]}


def test_auto_follows_the_tokenizer() -> None:
    auto = get_template("auto")
    assert auto.resolve(CHATTY).name == "chat"
    assert auto.resolve(PLAIN).name == "plain"
    for tokenizer, name in ((CHATTY, "chat"), (PLAIN, "plain")):
        assert encode(tokenizer, "Q", "A") == encode(tokenizer, "Q", "A", template=name)
        assert encode_prompt(tokenizer, "Q") == encode_prompt(tokenizer, "Q", template=name)


def test_an_end_token_of_the_tokenizer_never_ends_the_prompt() -> None:
    tokenizer = make_tokenizer(bos=True, end=True)
    assert tokenizer("x")["input_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in encode_prompt(tokenizer, "Q", template="plain")
    assert encode(tokenizer, "Q", "A", template="plain")["input_ids"].count(tokenizer.eos_token_id) == 1


def test_chat_turn_without_a_mark_gets_the_end_token() -> None:
    tokenizer = make_tokenizer(
        chat="{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert answer_of(tokenizer, encode(tokenizer, "Q", "A")) == " A<eos>"


@pytest.mark.parametrize(
    ("chat", "words"),
    [
        (CHAT.replace("assistant\n", "assistant\n<think>\n"), "renders the prompt differently"),
        (CHAT.replace("{{ m['content'] }}", "{{ m['content'] | upper }}"), "changes the answer's text"),
        (None, "no chat template"),
    ],
)
def test_chat_templates_that_cannot_be_trained(chat: str | None, words: str) -> None:
    with pytest.raises(DataError, match=words):
        encode(make_tokenizer(chat=chat), "Q", "answer", template="chat")


def test_lengths() -> None:
    row = encode(PLAIN, "abc", "defg", template="raw", max_length=5)
    assert PLAIN.decode(row["input_ids"]) == "abcde"
    assert row["labels"][:3] == [-100] * 3
    assert len(encode(PLAIN, "abc", "defg", template="raw", max_length=9)["input_ids"]) == 7
    rows = [Row("abc", "d"), Row("abcde", "f"), Row("abc", "")]
    with pytest.raises(DataError) as caught:
        RowDataset(rows, PLAIN, "rows", template="raw", max_length=5)
    assert "2 rows are bad" in str(caught.value)
    assert "row 1 (rows): the prompt has 5 tokens in template 'raw' and max_length is 5" in str(caught.value)
    assert "row 2 (rows): the answer has no tokens" in str(caught.value)


def test_unknown_template() -> None:
    with pytest.raises(DataError, match=r"unknown template 'chatt'; allowed: auto, chat"):
        get_template("chatt")
