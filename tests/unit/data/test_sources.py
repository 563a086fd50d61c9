import json
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from securetune.data.records import Message, Record
from securetune.data.sources import load_records
from securetune.errors import ConfigError, DataError

LABELS = ["no", "yes"]
SECRET = "patient zero"


def options(path, *, file_format="auto", labels=LABELS):
    private = types.SimpleNamespace(source=None, path=path, format=file_format)
    return types.SimpleNamespace(private=private, labels=labels)


def jsonl(tmp_path, *rows, name="data.jsonl"):
    path = tmp_path / name
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return options(path)


def refused(config, task="classify", *, error=DataError):
    with pytest.raises(error) as caught:
        load_records(config, task)
    assert SECRET not in str(caught.value)
    return str(caught.value)


def test_labelled_texts_load_from_jsonl_csv_and_parquet_alike(tmp_path):
    rows = [{"text": 'comma, "quote"\nline', "label": "yes"}, {"text": "caf\u00e9\u2028\x85 ", "label": "no"}]
    records = load_records(jsonl(tmp_path, *rows), "classify")
    (tmp_path / "d.csv").write_bytes(
        b'\xef\xbb\xbftext,label\r\n"comma, ""quote""\nline",yes\r\n' + "caf\u00e9\u2028\x85 ,no\r\n".encode()
    )
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    assert [(record.text, record.label, record.number) for record in records] == [
        (rows[0]["text"], 1, 1),
        (rows[1]["text"], 0, 2),
    ]
    assert load_records(options(tmp_path / "d.csv"), "classify") == records
    assert load_records(options(tmp_path / "d.parquet"), "classify") == records


def test_prompts_with_completions_load(tmp_path):
    (record,) = load_records(jsonl(tmp_path, {"prompt": "", "completion": " b"}), "generate")
    assert (record.prompt, record.completion) == ("", " b")


def test_chats_load_from_jsonl_and_parquet(tmp_path):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    config = jsonl(tmp_path, {"messages": chat})
    (record,) = load_records(config, "generate")
    assert record.messages == (Message("user", "a"), Message("assistant", "b"))
    pq.write_table(pa.Table.from_pylist([{"messages": chat}]), tmp_path / "d.parquet")
    assert load_records(options(tmp_path / "d.parquet"), "generate") == [record]


@pytest.mark.parametrize(("value", "label"), [(1, "1"), (1.0, "1"), (True, "true"), ("1", "1")])
def test_labels_may_be_numbers_or_booleans(tmp_path, value, label):
    config = jsonl(tmp_path, {"text": "a", "label": value})
    config.labels = ["other", label]
    assert load_records(config, "classify")[0].label == 1


def test_blank_lines_and_other_columns_are_passed_over(tmp_path, caplog):
    config = jsonl(tmp_path, {"text": "a", "label": "no", "id": 7}, "", {"text": "b", "label": "yes"})
    assert [record.number for record in load_records(config, "classify")] == [1, 2]
    assert "columns that are not used: 'id'" in caplog.text


def test_a_csv_file_holds_chats_as_json(tmp_path):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "d.csv").write_text('messages\n"' + json.dumps(chat).replace('"', '""') + '"\n')
    (record,) = load_records(options(tmp_path / "d.csv"), "generate")
    assert record.messages == (Message("user", "a"), Message("assistant", "b"))
    (tmp_path / "d.csv").write_text('messages\n"[{""role"": ""patient zero"","\n')
    assert "messages must be a list of objects with role and content, got a string" in refused(
        options(tmp_path / "d.csv"), "generate"
    )


def test_an_empty_label_is_located(tmp_path):
    (tmp_path / "d.csv").write_text("text,label\na,yes\nb,\n")
    assert "record 2 (line 3): label is empty" in refused(options(tmp_path / "d.csv"))


def test_a_label_without_records_is_told(tmp_path, caplog):
    load_records(jsonl(tmp_path, {"text": "a", "label": "no"}), "classify")
    assert "No record has the label 'yes'" in caplog.text


def test_a_missing_file_is_named(tmp_path):
    assert "there is no file '" in refused(options(tmp_path / "nowhere.csv"))
    assert "is a folder" in refused(options(tmp_path))


def test_an_unknown_ending_is_refused_with_the_known_ones(tmp_path):
    (tmp_path / "d.txt").write_text("x")
    message = refused(options(tmp_path / "d.txt"), error=ConfigError)
    assert ".jsonl, .ndjson, .csv, .parquet, .pq" in message


def test_the_format_can_be_named(tmp_path):
    (tmp_path / "d.txt").write_text('{"text": "a", "label": "no"}')
    assert len(load_records(options(tmp_path / "d.txt", file_format="jsonl"), "classify")) == 1


@pytest.mark.parametrize("name", ["d.jsonl", "d.csv", "d.parquet"])
def test_an_empty_file_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    assert "is empty (0 bytes)" in refused(options(tmp_path / name))


def test_a_file_without_rows_is_refused(tmp_path):
    (tmp_path / "d.csv").write_text("text,label\n")
    assert "holds no records" in refused(options(tmp_path / "d.csv"))


@pytest.mark.parametrize("name", ["d.jsonl", "d.csv"])
def test_invalid_utf8_is_located(tmp_path, name):
    head = b"text,label\n" if name == "d.csv" else b'{"text": "a", "label": "no"}\n'
    (tmp_path / name).write_bytes(head + SECRET.encode() + b" \xe9t\xe9\n")
    message = refused(options(tmp_path / name))
    assert "line 2: not valid UTF-8 at byte 14 of the line" in message
    assert "iconv" in message


def test_missing_columns_are_named_with_those_found(tmp_path):
    message = refused(jsonl(tmp_path, {"body": SECRET, "label": "no"}))
    assert "line 1: text missing" in message
    assert "Columns found: 'body', 'label'" in message
    message = refused(jsonl(tmp_path, {"text": SECRET, "label": "no"}), "generate")
    assert "prompt and completion missing" in message


def test_a_later_row_without_a_column_is_located(tmp_path):
    assert "line 2: label missing" in refused(jsonl(tmp_path, {"text": "a", "label": "no"}, {"text": SECRET}))


@pytest.mark.parametrize(("value", "kind"), [(5, "a number"), (None, "nothing (null)"), ([SECRET], "a list")])
def test_a_text_of_the_wrong_type_is_refused(tmp_path, value, kind):
    message = refused(jsonl(tmp_path, {"text": value, "label": "no"}))
    assert f"record 1 (line 1): text must be a string, got {kind}" in message


def test_an_empty_text_is_refused(tmp_path):
    assert "text is empty" in refused(jsonl(tmp_path, {"text": " \n", "label": "no"}))


def test_many_bad_records_are_counted_and_a_few_listed(tmp_path):
    message = refused(jsonl(tmp_path, *[{"text": None, "label": "no"}] * 12))
    assert message.startswith("12 records of ")
    assert message.count("record ") == 5
    assert "and 7 more" in message


def test_an_unknown_label_is_shown_with_the_allowed_ones(tmp_path):
    rows = [{"text": SECRET, "label": "Yes"}, {"text": "b", "label": "Yes"}, {"text": "c", "label": "yes"}]
    message = refused(jsonl(tmp_path, *rows))
    assert "'Yes' in 2 records, the first is record 1" in message
    assert "Allowed: 'no', 'yes'" in message


def test_a_text_in_the_label_column_is_not_shown(tmp_path):
    long = SECRET + " " * 40
    assert f"a value of {len(long)} characters" in refused(jsonl(tmp_path, {"text": "a", "label": long}))


def test_labels_are_needed_to_classify(tmp_path):
    config = jsonl(tmp_path, {"text": "a", "label": "no"})
    for labels in ([], ["no"], ["no", "no"]):
        config.labels = labels
        assert "data.labels must name at least two different labels" in refused(config, error=ConfigError)


@pytest.mark.parametrize(
    ("row", "place"),
    [
        ('{"text": "patient zero"', "line 2: is not valid JSON"),
        ('["patient zero", "no"]', "line 2: a row must be a JSON object (one JSON object per line"),
        ('{"text": "patient zero", "text": "b", "label": "no"}', "line 2: holds the key 'text' twice"),
    ],
)
def test_a_bad_json_line_is_located(tmp_path, row, place):
    assert place in refused(jsonl(tmp_path, {"text": "a", "label": "no"}, row))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("text,label\na,no,patient zero\n", "line 2: 3 fields, but the header has 2"),
        ("text,text\na,no\n", "line 1: a column name appears twice"),
        ('text,label\n"patient zero,no\n', "not valid CSV"),
    ],
)
def test_a_bad_csv_line_is_located(tmp_path, content, problem):
    (tmp_path / "d.csv").write_text(content)
    assert problem in refused(options(tmp_path / "d.csv"))


def test_a_long_csv_field_is_read(tmp_path):
    (tmp_path / "d.csv").write_text(f"text,label\n{'a' * 200_000},no\n")
    assert len(load_records(options(tmp_path / "d.csv"), "classify")[0].text) == 200_000


def test_a_damaged_parquet_file_is_refused(tmp_path):
    (tmp_path / "d.parquet").write_bytes(b"PAR1 not really")
    assert "is not a valid Parquet file" in refused(options(tmp_path / "d.parquet"))


def test_a_file_with_damaged_pages_is_refused(tmp_path):
    path = tmp_path / "d.parquet"
    pq.write_table(pa.table({"text": ["a"] * 200, "label": ["no"] * 200}), path, compression="none")
    content = bytearray(path.read_bytes())
    content[10:40] = bytes(byte ^ 255 for byte in content[10:40])
    path.write_bytes(content)
    assert "is not a valid Parquet file" in refused(options(path))


@pytest.mark.parametrize(
    "column",
    [
        pa.array([2**62 + 1], pa.int64()).cast(pa.timestamp("ns")),
        pa.array([-(2**60)], pa.int64()).cast(pa.timestamp("ms")),
    ],
)
def test_times_that_python_cannot_hold_are_named(tmp_path, column):
    pq.write_table(pa.table({"text": ["a"], "label": ["no"], "when": column}), tmp_path / "d.parquet")
    assert "column 'when' of type timestamp" in refused(options(tmp_path / "d.parquet"))


def test_a_parquet_column_that_is_there_twice_is_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text", "text"])
    pq.write_table(table, tmp_path / "d.parquet")
    assert "a column name appears twice" in refused(options(tmp_path / "d.parquet"))


def test_folder_names_add_no_columns(tmp_path, caplog):
    folder = tmp_path / "when=2020"
    folder.mkdir()
    pq.write_table(pa.table({"text": ["a"], "label": ["no"]}), folder / "d.parquet")
    assert len(load_records(options(folder / "d.parquet"), "classify")) == 1
    assert "when" not in caplog.text.replace(str(tmp_path), "")


def test_half_a_surrogate_pair_in_a_label_is_located(tmp_path):
    assert "record 1 (line 1): the label holds half" in refused(
        jsonl(tmp_path, '{"text": "a", "label": "\\ud800"}')
    )


def test_a_number_with_too_many_digits_is_located(tmp_path):
    assert "line 1: holds a whole number of more digits" in refused(
        jsonl(tmp_path, f'{{"text": "a", "label": {"9" * 5000}}}')
    )


def test_half_a_surrogate_pair_is_located(tmp_path):
    assert "record 1 (line 1): The text holds half" in refused(
        jsonl(tmp_path, '{"text": "a\\ud800", "label": "no"}')
    )


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        (SECRET, "messages must be a list of objects with role and content, got a string"),
        ([], "messages must be a list"),
        ([SECRET], "message 1 must be an object"),
        ([{"role": "user"}], "message 1: content must be a string, got nothing (null)"),
        (
            [{"role": "bot", "content": SECRET}],
            "message 1 has the role 'bot'; allowed: system, developer, user",
        ),
        (
            [{"role": "user", "content": SECRET, "tool_calls": [1]}],
            "message 1 holds 'tool_calls'; only role and",
        ),
        ([{"role": "user", "content": SECRET}], "there is no assistant message"),
        ([{"role": "assistant", "content": ""}], "there is no assistant message"),
    ],
)
def test_a_bad_chat_is_refused(tmp_path, messages, problem):
    assert problem in refused(jsonl(tmp_path, {"messages": messages}), "generate")


def test_a_record_without_completion_is_refused(tmp_path):
    assert "completion is empty" in refused(jsonl(tmp_path, {"prompt": SECRET, "completion": ""}), "generate")
    wrong = jsonl(tmp_path, {"prompt": SECRET, "completion": 4})
    assert "completion must be a string, got a number" in refused(wrong, "generate")


def test_two_shapes_in_one_file_are_refused(tmp_path):
    config = jsonl(tmp_path, {"messages": [], "prompt": SECRET, "completion": "b"})
    assert "holds both messages and prompt" in refused(config, "generate")


USERS = [{"text": "a", "label": "no", "who": "ann"}, {"text": "a", "label": "no", "who": 7}]


def test_the_users_of_records_load_from_jsonl_csv_and_parquet_alike(tmp_path, caplog):
    records = load_records(jsonl(tmp_path, *USERS), "classify", user_field="who")
    plain = Record.labelled("a", 0)
    assert records == [plain.of_user("ann"), plain.of_user("7")]
    assert "not used" not in caplog.text
    (tmp_path / "d.csv").write_text("text,label,who\na,no,ann\na,no,7\n")
    assert load_records(options(tmp_path / "d.csv"), "classify", user_field="who") == records
    table = pa.Table.from_pylist([{**row, "who": str(row["who"])} for row in USERS])
    pq.write_table(table, tmp_path / "d.parquet")
    assert load_records(options(tmp_path / "d.parquet"), "classify", user_field="who") == records
    chat = {"messages": [{"role": "assistant", "content": "b"}], "who": 3}
    (record,) = load_records(jsonl(tmp_path, chat), "generate", user_field="who")
    assert record.user_id == plain.of_user("3").user_id


def test_a_row_without_the_user_column_is_named_with_the_remedy(tmp_path):
    config = jsonl(tmp_path, USERS[0], {"text": "b", "label": "no"})
    with pytest.raises(DataError) as caught:
        load_records(config, "classify", user_field="who")
    assert "line 2: column 'who' missing, which data.user_field names as the user of" in str(caught.value)
    assert "Columns found: 'text', 'label'. Add it to every row, or correct the option." in str(caught.value)


@pytest.mark.parametrize("who", [None, "", " ", True, 1.5, ["ann"]])
def test_a_record_without_a_user_is_named_with_the_remedy(tmp_path, who):
    config = jsonl(tmp_path, USERS[0], {**USERS[0], "who": who})
    with pytest.raises(DataError) as caught:
        load_records(config, "classify", user_field="who")
    assert "record 2 (line 2): who must name the record's user by text or a whole number" in str(caught.value)
    assert "give each record without a known user a name of its own" in str(caught.value)
