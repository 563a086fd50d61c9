import pytest
from hypothesis import given
from hypothesis import strategies as st

from securetune.data.encode import encode_records, encode_texts, label_token_ids, split_prompt
from securetune.data.records import Message, Record
from securetune.errors import ConfigError, DataError
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SECRET = "patient zero"


def classify(*texts, **options):
    records = [Record.labelled(text, 1) for text in texts]
    return encode_records(records, TOKENIZER, task="classify", **{"max_length": 100} | options)


def generate(*records, **options):
    return encode_records(records, TOKENIZER, task="generate", **{"max_length": 200} | options)


def marked(example, flags):
    return TOKENIZER.decode([token for token, flag in zip(example.input_ids, flags, strict=True) if flag])


def refused(call, error=DataError):
    with pytest.raises(error) as caught:
        call()
    assert SECRET not in str(caught.value)
    return str(caught.value)


@given(
    text=st.text(min_size=1, max_size=40).filter(str.strip),
    prompt=st.sampled_from(["{text}\nLabel:", "A: {text} B"]),
)
def test_the_prompt_is_filled_and_exactly_the_text_may_be_attacked(text, prompt):
    (example,) = classify(text, prompt=prompt, max_length=1000)
    assert TOKENIZER.decode(example.input_ids) == prompt.replace("{text}", text)
    attacked = marked(example, example.attack_mask)
    assert attacked.removeprefix(" ") == text or attacked == text
    assert (example.label, any(example.supervised)) == (1, False)


def test_braces_in_text_and_prompt_are_ordinary():
    (example,) = classify("{text} {0} {", prompt="{x} {text} }:")
    assert TOKENIZER.decode(example.input_ids) == "{x} {text} {0} { }:"


def test_special_tokens_of_the_prompt_count_and_those_of_the_text_do_not():
    (example,) = classify("a <|im_end|> b", prompt="<|im_start|>{text}<|im_end|>:")
    assert [token for token in example.input_ids if token < 2] == [0, 1]


def test_texts_are_encoded_like_records():
    (example,) = encode_texts(["good"], TOKENIZER, max_length=100)
    assert example.input_ids == classify("good")[0].input_ids
    assert example.label is None


def test_an_overlong_record_is_named_with_its_length_and_the_remedy():
    message = refused(lambda: classify("short", SECRET * 3, max_length=20))
    assert "1 of 2 records are over data.max_length = 20 tokens: record 2 has 43 tokens" in message
    assert "data.on_overlong to 'truncate' or 'drop'" in message


def test_the_record_number_is_that_of_the_source():
    record = Record.labelled(SECRET, 0, number=77)
    assert "record 77 has" in refused(
        lambda: encode_records([record], TOKENIZER, task="classify", max_length=9)
    )


def test_dropping_leaves_out_overlong_records_only(caplog):
    examples = classify("a", "b" * 50, "c", max_length=20, on_overlong="drop")
    assert [marked(example, example.attack_mask) for example in examples] == ["a", "c"]
    assert "Dropped 1 of 3 records over 20 tokens" in caplog.text


@given(text=st.text(alphabet="ab \u00e9\U0001f389", min_size=1, max_size=60).filter(str.strip))
def test_truncating_cuts_the_end_of_the_text_and_keeps_the_prompt(text):
    try:
        (example,) = classify(text, max_length=20, on_overlong="truncate")
    except DataError:
        assert not text[:12].strip()
        return
    string = TOKENIZER.decode(example.input_ids)
    shown = string.removesuffix("\nLabel:")
    assert len(example.input_ids) <= 20
    assert text.startswith(shown)
    assert example.is_truncated == (shown != text)
    assert tuple(TOKENIZER(string)["input_ids"]) == example.input_ids
    assert marked(example, example.attack_mask) == shown


def test_truncating_keeps_as_much_text_as_fits():
    (example,) = classify("a" * 60, max_length=20, on_overlong="truncate")
    assert len(example.input_ids) == 20


def test_a_prompt_that_leaves_no_room_is_an_error():
    message = refused(lambda: classify(SECRET, max_length=5, on_overlong="truncate"))
    assert "record 1 has 19 tokens, and its prompt template leaves no room for text" in message


def test_an_empty_text_is_refused():
    assert "record 1 has an empty text" in refused(lambda: classify("  "))


def test_a_record_of_another_task_is_refused():
    assert "record 1 has no text" in refused(
        lambda: encode_records([Record.completed("a", "b")], TOKENIZER, task="classify", max_length=9)
    )
    assert "record 1 has neither completion nor messages" in refused(
        lambda: generate(Record.labelled(SECRET, 0))
    )


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [("Label:", "0 times"), ("{text} {text}:", "2 times"), ("Text: {text}", "must be followed by a cue")],
)
def test_a_prompt_that_cannot_work_is_refused(prompt, problem):
    with pytest.raises(ConfigError, match=problem):
        split_prompt(prompt)


def test_label_words_are_single_tokens_after_the_prompt():
    ids = label_token_ids(TOKENIZER, [" negative", " positive"])
    assert TOKENIZER.convert_ids_to_tokens(ids) == ["\u0120negative", "\u0120positive"]


def test_a_label_word_of_several_tokens_is_named_with_its_tokens():
    with pytest.raises(
        ConfigError, match=r"label word ' bad' is not one token .*: it becomes \['\u0120', 'b', 'a', 'd'\]"
    ):
        label_token_ids(TOKENIZER, [" positive", " bad"])


def test_a_label_word_that_merges_with_the_prompt_is_refused():
    with pytest.raises(ConfigError, match="label word 'positive' is not one token"):
        label_token_ids(TOKENIZER, ["positive", "x"], prompt="{text}\nLabel: ")


def test_label_words_must_differ_and_be_two():
    with pytest.raises(ConfigError, match="' ham' and ' ham' are the same token"):
        label_token_ids(TOKENIZER, [" ham", " ham"])
    with pytest.raises(ConfigError, match="at least two are needed, got 1"):
        label_token_ids(TOKENIZER, [" ham"])


def test_a_special_token_is_no_label_word():
    with pytest.raises(ConfigError, match="is not one token"):
        label_token_ids(TOKENIZER, [" ham", "<|im_end|>"])


def test_the_completion_and_its_end_are_learnt():
    (example,) = generate(Record.completed("What?", " yes, <|im_end|>"))
    assert TOKENIZER.decode(example.input_ids) == "What? yes, <|im_end|><|im_end|>"
    assert marked(example, example.supervised) == " yes, <|im_end|><|im_end|>"
    assert marked(example, example.attack_mask) == "What?"
    assert [token for token in example.input_ids if token < 2] == [1]
    assert example.label is None


def test_the_prompt_is_tokenised_as_at_inference():
    prompt, completion = "Answer: posit", "ive"
    (example,) = generate(Record.completed("A posit", "ive"))
    alone = TOKENIZER("A posit")["input_ids"]
    assert list(example.input_ids[: len(alone)]) == alone
    (example,) = generate(Record.completed(prompt, completion))
    assert TOKENIZER.decode(example.input_ids) == prompt + completion + "<|im_end|>"
    assert marked(example, example.supervised) == completion + "<|im_end|>"


def test_nothing_can_predict_the_first_token():
    (example,) = generate(Record.completed("", "yes"))
    assert example.supervised == (False, True, True, True)


def test_a_truncated_completion_loses_its_end():
    (example,) = generate(Record.completed("ab", "cdefg"), max_length=5, on_overlong="truncate")
    assert TOKENIZER.decode(example.input_ids) == "abcde"
    assert example.is_truncated


def test_a_record_without_supervised_token_is_refused():
    record = Record.completed(SECRET, "b")
    message = refused(lambda: generate(record, max_length=8, on_overlong="truncate"))
    assert "record 1 has no supervised token left after truncation" in message


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        encode_records([Record.completed("a", "b")], tokenizer, task="generate", max_length=9)


def test_only_assistant_turns_are_learnt():
    messages = (
        Message("system", "Be kind."),
        Message("user", "user <|im_end|>?"),
        Message("assistant", "assistant!"),
        Message("user", "More"),
        Message("assistant", " no"),
    )
    (example,) = generate(Record.chat(messages))
    expected = TOKENIZER.apply_chat_template([message._asdict() for message in messages], tokenize=False)
    assert TOKENIZER.decode(example.input_ids) == expected
    assert marked(example, example.supervised) == "assistant!<|im_end|> no<|im_end|>"
    assert marked(example, example.attack_mask) == "user <|im_end|>?More"
    assert [token for token in example.input_ids if token < 2] == [0, 1] * 5


def test_a_chat_without_special_strings_has_the_tokenizers_own_ids():
    messages = [{"role": "user", "content": "good?"}, {"role": "assistant", "content": " yes"}]
    (example,) = generate(Record.chat(tuple(Message(**message) for message in messages)))
    assert list(example.input_ids) == TOKENIZER.apply_chat_template(messages, return_dict=False)


def test_reprs_show_no_text():
    assert "input_ids" not in repr(classify("a")[0])


def test_a_length_limit_below_two_is_refused():
    with pytest.raises(ConfigError, match="max_length must be >= 2, got 1"):
        classify("a", max_length=1)
