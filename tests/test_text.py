"""Clean-up that leaves ordinary text alone, sentences, and ids from real tokenizers."""

import contextlib
import json
import time
import unicodedata
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from csm_core.errors import InvalidInputError
from csm_core.spelling import spell_out
from csm_core.text import (
    MAX_CHARS,
    TextTokenizer,
    character_tokenizer,
    check_speaker,
    clean,
    split_sentences,
)

SETTINGS = settings(max_examples=150, deadline=None, derandomize=True)

# What looks like markdown, code or an emoji to a careless pattern.
ODD_WORDS = """
    don't it's o'clock rock'n'roll e-mail a@b.c snake_case foo_bar_ __x _private C# F# #hashtag #1 2*3*4 f(x) [1]
    a[0] {x} 5% $5.50 €3 £1,000.00 -5 +3 3.14 1/2 7:30 24/7 1990s & @home AT&T ~5 x^2 a|b |x| <3 a<b>c \\n
    :) e.g. U.S. 5* people* (*) ... – — “quoted” ‘single’ «x» ¿qué? ©2020 Acme™ 20°C C♯ 1→2 ½ m²
    https://a.b/c_d_e?f=g_h #
"""
GAPS = [" "] * 6 + [", ", ". ", "! ", "? ", "; ", ": ", " - ", " * ", " = ", " > ", "-"]
WORDS = st.one_of(
    st.text("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", min_size=1, max_size=9),
    st.text("éèüßñçåøæœłÉÜабвгд日本語العربية", min_size=1, max_size=6),
    st.sampled_from(ODD_WORDS.split()),
)
ORDINARY = st.lists(st.tuples(WORDS, st.sampled_from(GAPS)), min_size=1, max_size=12).map(
    lambda pairs: unicodedata.normalize("NFC", "The " + "".join(f"{word}{gap}" for word, gap in pairs) + "end.")
)


@SETTINGS
@given(ORDINARY)
def test_ordinary_text_is_not_changed(text: str) -> None:
    assert clean(text) == text


@SETTINGS
@given(st.text(max_size=60))
def test_any_text_is_cleaned_or_refused(text: str) -> None:
    try:
        plain = clean(text)
    except InvalidInputError:
        return
    assert plain == " ".join(plain.split())
    assert all(unicodedata.category(char) not in {"Cc", "Cs"} for char in plain)
    assert any(char.isalnum() for char in plain)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        # markdown
        ("**bold**, *italic*, ***both***, __bold__ and _italic_.", "bold, italic, both, bold and italic."),
        ("**bold with *italics* inside** it", "bold with italics inside it"),
        ("(*aside*) and \"**really**\"", '(aside) and "really"'),
        ("~~gone~~ `code` ``more code`` it's", "gone code more code it's"),
        ("# Title\n\nText.", "Title. Text."),
        ("## Really?\nYes.", "Really? Yes."),
        ("Title\n=====\ntext", "Title. text"),
        ("# Only a title", "Only a title"),
        ("Buy:\n- milk\n- eggs,\n* tea\n• jam\n\nThanks", "Buy: milk. eggs, tea. jam. Thanks"),
        ("1. one\n2. two", "1. one. 2. two"),
        ("- an item that\n  goes on\n- next", "an item that goes on. next"),
        ("- [x] done\n- [ ] open", "done. open"),
        ("> quoted\n> text\n\nplain", "quoted text plain"),
        ("one.\n\n---\n\ntwo.", "one. two."),
        ("See [the page](https://a.b/c_(d) \"title\") or <https://a.b>.", "See the page or https://a.b."),
        ("![a cat](cat.png) and [![badge](i.svg)](u.html)", "a cat and badge"),
        ("call f[i](x) now", "call f[i](x) now"),
        ("Run:\n```python\nprint(1)\n```\nDone", "Run: print(1). Done"),
        ("| a | b |\n|---|:-:|\n| 1 | 2 |\n\nend", "a, b. 1, 2. end"),
        # emoji
        ("Hi 👋🏽 there 🎉!", "Hi there!"),
        ("👨‍👩‍👧‍👦 family 🇩🇪 🏴󠁧󠁢󠁥󠁮󠁧󠁿 flags 1️⃣ #️⃣ I ❤️ it ☎", "family flags I it"),
        ("nice👍work", "nice work"),
        ("**🔥 Hot**: news", "Hot: news"),
        ("5 ™️ ©", "5 ™ ©"),
        # characters
        ("cafe\u0301", "café"),
        ("a\0b\x07c\x1b[0m", "abc[0m"),
        ("zero\u200bwidth\ufeff soft\u00adhyphen \u202eabc\u202c", "zerowidth softhyphen abc"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("a\u200db", "ab"),
        ("  a \t b\u00a0c\r\nd\u2028e\u3000f ", "a b c d e f"),
    ],
)  # fmt: skip
def test_marks_go_and_words_stay(text: str, plain: str) -> None:
    assert clean(text) == plain


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "nothing to speak"),
        (" \n\t", "nothing to speak"),
        ("...", "nothing to speak"),
        ("👍", "nothing to speak"),
        ("***", "nothing to speak"),
        ("\0", "nothing to speak"),
        ("ab\ud83dc", r"lone surrogate U\+D83D at position 2\): send it as UTF-8"),
        ("\udfff", "lone surrogate"),
        ("\ud83d\ude00", "lone surrogate"),
        ("a" * (MAX_CHARS + 1), "20,001 characters; at most 20,000"),
        (None, "NoneType"),
        (b"hello", "bytes"),
        (5, "int"),
    ],
)
def test_what_cannot_be_spoken_gets_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(InvalidInputError, match=sentence) as caught:
        clean(text)
    assert caught.value.param == "text"


def test_the_longest_text_is_accepted() -> None:
    assert len(clean("word " * (MAX_CHARS // 5))) == MAX_CHARS - 1


UNITS = """
    [ ( * _ ` ~ # > - | < = \0 👍 1 a . 1, 1. 1- a. [a]( [a](b( ![ [a](b[a](b *a _a `a ~~a **a* <https:// $1
    1:11 '1s 1️⃣ é \u200d ,111 1-1 1km 1.m. 1:11p.m.- one.
"""
MARKS = "* _ [ > # - | 👍 1. $1 |a|"
HOSTILE = [
    *UNITS.split(),
    *(f"{mark} " for mark in MARKS.split()),
    *(f"{mark}\n" for mark in MARKS.split()),
    *(" ", "\n", "a\n\n", '[a](b "'),
]


@pytest.mark.parametrize("unit", HOSTILE)
@pytest.mark.parametrize(("head", "tail"), [("", ""), ("|", "x"), ("**a", " b")])
def test_hostile_repetition_takes_no_time(unit: str, head: str, tail: str) -> None:
    text = (head + unit * MAX_CHARS)[: MAX_CHARS - len(tail)] + tail
    began = time.process_time()
    with contextlib.suppress(InvalidInputError):
        split_sentences(spell_out(clean(text)))
    assert time.process_time() - began < 0.25  # 0.06 on one core; one quadratic pass takes 0.4


def test_ten_megabytes_are_refused_at_once() -> None:
    text = "[" * 10_000_000
    began = time.process_time()
    with pytest.raises(InvalidInputError, match="10,000,000 characters"):
        clean(text)
    assert time.process_time() - began < 0.05


def test_sentences_end_where_english_ends_them() -> None:
    text = 'Dr. Smith paid $5.50 today! Did he? Yes, e.g. at 5 p.m. by card. "Stop!" she said.'
    assert split_sentences(text) == [
        "Dr. Smith paid $5.50 today!", "Did he?", "Yes, e.g. at 5 p.m. by card.", '"Stop!" she said.',
    ]  # fmt: skip


def test_other_languages_have_their_own_ends() -> None:
    assert split_sentences("今日は。元気ですか。", language="ja") == ["今日は。", "元気ですか。"]


def test_long_sentences_are_cut_at_clauses_then_spaces_then_hard() -> None:
    assert split_sentences("We went to the sea, where it was cold; nobody swam.", max_chars=40) == [
        "We went to the sea, where it was cold;",
        "nobody swam.",
    ]
    assert split_sentences("one two three four five six", max_chars=10) == ["one two", "three four", "five six"]
    assert split_sentences("a" * 25, max_chars=10) == ["a" * 10, "a" * 10, "a" * 5]
    assert split_sentences("A, " + "b" * 6 + " " + "c" * 8, max_chars=12) == ["A, bbbbbb", "cccccccc"]


def test_no_piece_is_silent() -> None:
    assert split_sentences("Well. ... Then.") == ["Well. ...", "Then."]
    assert split_sentences("... Then.")[-1].endswith("Then.")
    assert split_sentences("a" + "." * 1000, max_chars=100)[0].startswith("a.")


@SETTINGS
@given(ORDINARY.map(lambda text: text * 3), st.integers(1, 300))
def test_nothing_is_lost_and_nothing_too_long(text: str, max_chars: int) -> None:
    pieces = split_sentences(text, max_chars)
    assert all(len(piece) <= max_chars and piece == piece.strip() for piece in pieces)
    letters = [char for char in text if char.isalnum()]
    assert [char for piece in pieces for char in piece if char.isalnum()] == letters
    assert all(any(char.isalnum() for char in piece) for piece in pieces)
    if max_chars > len(text):
        assert "".join("".join(pieces).split()) == "".join(text.split())


BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"


def bpe_tokenizer() -> Tokenizer:
    """A small byte-level BPE with Llama 3's special tokens and a post-processor that adds BOS and EOS by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello world [0]hello [1]world end of text begin_of_text"] * 9, trainer)
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, bos), (EOS, eos)]
    )
    return tokenizer


def with_model(change: Callable[[dict], None]) -> Tokenizer:
    tree = json.loads(bpe_tokenizer().to_str())
    change(tree)
    return Tokenizer.from_str(json.dumps(tree))


def truncating() -> Tokenizer:
    tokenizer = bpe_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    return tokenizer


TOKENIZERS = {
    "bpe": bpe_tokenizer,
    "no post-processor": lambda: with_model(lambda tree: tree.update(post_processor=None)),
    # whole words straight from the vocabulary, in which the special tokens are words too
    "ignores merges": lambda: with_model(
        lambda tree: tree.update(
            pre_tokenizer={"type": "WhitespaceSplit"}, model=tree["model"] | {"ignore_merges": True}
        )
    ),
    "truncates and pads": truncating,
}


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize(
    "text",
    [
        "hello world",
        "",
        EOS,
        f"hello{EOS}{BOS} world",
        f"hello {EOS} world",
        f"{BOS}[1]hello",
        "<|end_of_text",
        "[1]hello",
        "\ud55c 👍",
    ],
)
def test_exactly_one_bos_and_eos(make: Callable[[], Tokenizer], text: str) -> None:
    tokenizer = make()
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    ids = TextTokenizer(tokenizer, bos, eos).encode(text, 0)
    assert (ids[0], ids[-1]) == (bos, eos)
    assert {bos, eos}.isdisjoint(ids[1:-1])


@pytest.mark.parametrize("text", ["hello world", EOS, f"a{BOS}b[1]", "[1]hello", "한 👍\n"])
def test_special_tokens_in_a_text_are_read_as_text(text: str) -> None:
    tokenizer = bpe_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    ids = TextTokenizer(tokenizer, tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)).encode(text, 1)
    assert tokenizer.decode(ids[1:-1], skip_special_tokens=False) == f"[1]{text}"


def test_tag_and_text_are_tokenized_together() -> None:
    tokenizer = bpe_tokenizer()
    expected = tokenizer.encode("[0]hello", add_special_tokens=True).ids
    assert TextTokenizer(tokenizer, expected[0], expected[-1]).encode("hello", 0) == expected


@pytest.mark.parametrize("speaker", [-1, 100, "0", "x", None, True, 1.0, float("nan")])
def test_a_speaker_is_a_small_number(speaker) -> None:
    with pytest.raises(InvalidInputError, match="whole number from 0 to 99") as caught:
        check_speaker(speaker)
    assert caught.value.param == "speaker"


ALPHABET = " abcdefghijklmnopqrstuvwxyz',.?![]0123456789"


def read(tokenizer: Tokenizer, text: str, speaker: int = 0) -> str:
    ids = TextTokenizer(tokenizer, tokenizer.token_to_id("[BOS]"), tokenizer.token_to_id("[EOS]")).encode(text, speaker)
    return "".join(tokenizer.id_to_token(index) for index in ids)


@pytest.mark.parametrize(
    ("text", "characters"),
    [
        ("Hello, World!", "hello, world!"),
        ("Ünïcödé Ærø Straße Łódź ﬁn", "unicode aero strasse lodz fin"),
        ("It’s “fine” — really; yes: (sure)…", "it's fine, really, yes, sure..."),
        ('"Hi", she said', "hi, she said"),
        ("日本 a\n\tb\\c^d-e", "a b c d e"),
        ("[BOS] [EOS] [UNK]", "[bos][eos][unk]"),
        ("", ""),
    ],
)
def test_characters_of_the_alphabet_only(text: str, characters: str) -> None:
    assert read(character_tokenizer(ALPHABET), text, 1) == f"[BOS][1]{characters}[EOS]"


@pytest.mark.parametrize("text", ["Привет, мир!", "日本。", "Ж"])
def test_a_text_without_a_known_letter_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError, match="none of the letters"):
        read(character_tokenizer(ALPHABET), text)
    bpe = bpe_tokenizer()
    assert len(TextTokenizer(bpe, 0, 1).encode(text, 0)) > len(TextTokenizer(bpe, 0, 1).encode("", 0))


def test_character_ids_are_stable_and_survive_a_file(tmp_path) -> None:
    tokenizer = character_tokenizer(ALPHABET)
    assert [tokenizer.token_to_id(token) for token in ("[BOS]", "[EOS]", "[UNK]", " ", "a")] == [0, 1, 2, 3, 4]
    assert tokenizer.get_vocab_size() == len(ALPHABET) + 3
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    again = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "Ça va? [EOS] It’s £5 — ok"
    assert TextTokenizer(again, 0, 1).encode(text, 12) == TextTokenizer(tokenizer, 0, 1).encode(text, 12)


@SETTINGS
@given(st.text(max_size=40))
def test_no_character_is_unknown(text: str) -> None:
    try:
        ids = TextTokenizer(character_tokenizer(ALPHABET), 0, 1).encode(text, 0)
    except InvalidInputError:
        assert not any(char in ALPHABET for char in text.lower() if char.isalnum())
        return
    assert (ids[0], ids[-1]) == (0, 1)
    assert all(3 <= index < len(ALPHABET) + 3 for index in ids[1:-1])


@pytest.mark.parametrize("alphabet", ["abc", "aab [0]", ""])
def test_an_alphabet_can_write_its_tag(alphabet: str) -> None:
    with pytest.raises(ValueError, match="alphabet"):
        character_tokenizer(alphabet)
