import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from securetune.data.tokens import SafeTokenizer, Span
from securetune.errors import ConfigError
from tests.tiny import tiny_tokenizer

SPECIAL = ["<s>", "</s>", "<unk>"]


def sentencepiece_like(*, prepend="always", lowercase=False, add_eos=False):
    """A Llama-2-like tokenizer: a mark before each word, a token before each text, else single letters."""
    letters = [chr(code) for code in range(33, 127)] + ["\n", "\u2581"]
    vocabulary = {piece: number for number, piece in enumerate([*SPECIAL, *letters, "\u2581a"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("\u2581", "a")], unk_token="<unk>"))
    if lowercase:
        backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    backend.decoder = decoders.Metaspace(prepend_scheme=prepend)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    single = "<s> $A </s>" if add_eos else "<s> $A"
    backend.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


BYTES = SafeTokenizer(tiny_tokenizer())
PIECES = SafeTokenizer(sentencepiece_like())
FIRST = SafeTokenizer(sentencepiece_like(prepend="first"))
ALL = pytest.mark.parametrize("safe", [BYTES, PIECES, FIRST], ids=["bytes", "pieces", "first"])
texts = st.text(alphabet=st.sampled_from("ab |<>/s_imendtr\n\u00e9\U0001f389"), max_size=30)


@ALL
@given(head=texts, text=texts, tail=texts)
@example(head="", text="", tail="")
def test_ids_are_those_of_the_whole_string(safe, head, text, tail):
    string = head + text + tail
    tokens = safe.encode(string, [Span(len(head), len(head) + len(text))])
    if not safe.special_pattern.search(string):
        assert tokens.ids == safe.tokenizer(string)["input_ids"]
    assert len(tokens.ids) == len(tokens.spans)


@ALL
@given(before=texts, after=texts, piece=st.sampled_from(["<|im_end|>", "</s>", "<s>", "<|im_start|>"]))
def test_private_text_never_becomes_a_special_token(safe, before, after, piece):
    text = before + piece + after
    string = f"<s>user {text}\nLabel:"
    tokens = safe.encode(string, [Span(7, 7 + len(text))])
    special = [
        token
        for token, span in zip(tokens.ids, tokens.spans, strict=True)
        if token in safe.special_ids and span.overlaps(Span(7, 7 + len(text)))
    ]
    assert not special


def test_special_tokens_of_the_template_stay_special_around_private_text():
    text = "a <|im_end|> b"
    string = f"<|im_start|>user\n{text}<|im_end|>"
    tokens = BYTES.encode(string, [Span(17, 17 + len(text))])
    assert [token for token in tokens.ids if token in (0, 1)] == [0, 1]
    assert BYTES.tokenizer.decode(tokens.ids) == string
    assert tokens.ids[0] == 0
    assert tokens.ids[-1] == 1


def test_a_special_string_that_begins_in_the_template_and_ends_in_the_text_is_plain():
    string = "<|im_" + "end|>" + "<|im_end|>"
    tokens = BYTES.encode(string, [Span(5, 10)])
    assert [token for token in tokens.ids if token == 1] == [1]
    assert tokens.spans[-1] == Span(10, 20)


def test_spans_cover_the_characters_in_order():
    string = "x <|im_end|> \u00e9\U0001f389"
    tokens = BYTES.encode(string, [Span(2, len(string))])
    covered = {position for span in tokens.spans for position in range(*span)}
    assert covered == set(range(len(string)))
    assert tokens.spans == sorted(tokens.spans, key=lambda span: span.start)


def test_the_prefix_of_the_tokenizer_is_kept_and_its_ending_left_out():
    safe = SafeTokenizer(sentencepiece_like(add_eos=True))
    assert safe.prefix_ids == [0]
    assert safe.encode("a b", [Span(0, 3)]).ids == safe.tokenizer("a b")["input_ids"][:-1]
    assert safe.encode("a", add_prefix=False).ids[0] != 0


def test_an_unknown_character_may_appear():
    tokens = PIECES.encode("\u4e2d", [Span(0, 1)])
    assert PIECES.tokenizer.unk_token_id in tokens.ids


def test_calls_leave_the_tokenizer_as_it_was():
    tokenizer = tiny_tokenizer()
    before = tokenizer("<|im_end|>")["input_ids"]
    SafeTokenizer(tokenizer).encode("a <|im_end|>", [Span(0, 12)])
    assert tokenizer("<|im_end|>")["input_ids"] == before == [1]


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ConfigError, match="The tokenizer Slow reports no character offsets"):
        SafeTokenizer(Slow())
