import pytest

from securetune.data.sft import encode_sft
from securetune.errors import DataError
from tests.tiny import tiny_tokenizer

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "yo"}


def learnt(row, **options):
    """What the model learns to write, and all it reads."""
    tokenizer = tiny_tokenizer()
    (example,) = encode_sft([row], tokenizer, max_length=200, **options)
    assert len(example["input_ids"]) == len(example["labels"]) == len(example["attention_mask"])
    kept = [
        token for token, label in zip(example["input_ids"], example["labels"], strict=True) if label != -100
    ]
    assert [label for label in example["labels"] if label != -100] == kept
    return tokenizer.decode(kept), tokenizer.decode(example["input_ids"])


def test_completion_and_its_end_are_learnt():
    assert learnt({"prompt": "Say it:", "completion": " yes"}) == (" yes<|im_end|>", "Say it: yes<|im_end|>")


def test_text_is_learnt_but_for_its_first_token():
    assert learnt({"text": "abc"}) == ("bc<|im_end|>", "abc<|im_end|>")


def test_every_assistant_turn_of_a_chat_is_learnt():
    other = {"role": "assistant", "content": "no"}
    text, whole = learnt({"messages": [USER, ASSISTANT, USER, other]})
    assert text == "yo<|im_end|>no<|im_end|>"
    assert whole.startswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo")


def test_of_a_conversational_prompt_only_the_completion_is_learnt():
    last = {"role": "assistant", "content": "no"}
    text, whole = learnt({"prompt": [USER, ASSISTANT, USER], "completion": [last]})
    assert text == "no<|im_end|>"
    assert whole == learnt({"messages": [USER, ASSISTANT, USER, last]})[1]


def test_rows_that_are_dropped_do_not_shift_the_others():
    rows = [
        {"prompt": "a", "completion": "b" * 100},
        {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]},
    ]
    (example,) = encode_sft(rows, tiny_tokenizer(), max_length=80, on_overlong="drop")
    kept = [label for label in example["labels"] if label != -100]
    assert tiny_tokenizer().decode(kept) == "yo<|im_end|>"


def test_other_columns_and_empty_ones_are_left_out():
    row = {"prompt": "a", "completion": "b", "messages": None, "source": "web"}
    assert learnt(row)[0] == "b<|im_end|>"


@pytest.mark.parametrize("column", ["tools", "chat_template_kwargs", "images"])
def test_column_that_would_be_rendered_is_refused_not_dropped(column):
    row = {"messages": [USER, ASSISTANT], column: {"enable_thinking": False}}
    with pytest.raises(DataError, match=f"row 1 holds {column}"):
        encode_sft([row], tiny_tokenizer(), max_length=50)
    assert learnt({**row, column: None})[0] == "yo<|im_end|>"  # as parquet fills up


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"prompt": "a"},
        {"prompt": "a", "completion": [ASSISTANT]},
        {"text": "a", "messages": [USER, ASSISTANT]},
        {"text": 3},
        {"prompt": [USER], "completion": [USER]},
        {"messages": [USER]},
    ],
)
def test_row_of_another_shape_is_refused_by_number(row):
    with pytest.raises(DataError, match="row 2"):
        encode_sft([{"text": "fine"}, row], tiny_tokenizer(), max_length=50)


def test_truncation_that_leaves_nothing_to_learn_is_refused():
    row = {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]}
    with pytest.raises(DataError, match="no token of its completion"):
        encode_sft([row], tiny_tokenizer(), max_length=40, on_overlong="truncate")
