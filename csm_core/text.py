"""Text on its way to the model: clean-up, sentences, and token ids in the ``[speaker]text`` template.

Every step is linear in the text's length. Knows no model, no audio and no checkpoint; a tokenizer comes in ready.
"""

import re
import unicodedata

import sentencex
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from csm_core.errors import InvalidInputError

MAX_CHARS = 20_000  # about twenty minutes of speech; longer texts are several requests
MAX_SPEAKER = 99


_SURROGATE = re.compile("[\ud800-\udfff]")
_NEWLINE = re.compile("\r\n?|[\v\f\x85\u2028\u2029]")
_CONTROL = re.compile("[\0-\x08\x0e-\x1f\x7f-\x9f]")
# Unicode emoji: those drawn as pictures by default, and any symbol that asks for it with U+FE0F. The music signs
# U+266D..266F stay (C♯), so do ©, ®, ™ and plain arrows.
_PICTURE = (
    "[\U0001f000-\U0001faff\u2600-\u266c\u2670-\u27bf\u231a\u231b\u23cf\u23e9-\u23f3\u23f8-\u23fa\u25fd\u25fe"
    "\u2b1b\u2b1c\u2b50\u2b55]|[0-9#*]\ufe0f?\u20e3|[\u203c\u2049\u2139\u2190-\u21ff\u24c2\u25a0-\u25ff\u2900-\u2bff"
    "\u3030\u303d\u3297\u3299]\ufe0f"
)
_EMOJI = re.compile(f"(?:{_PICTURE})(?:{_PICTURE}|[\u200d\ufe0e\ufe0f\u20e3\U000e0020-\U000e007f])*")
# Zero-width and direction marks, variation selectors, tags. The joiners are spelling after Arabic and Indic letters.
_INVISIBLE = re.compile(
    "[\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\ufff9-\ufffc"
    "\U000e0000-\U000e01ef]|(?<![\u0600-\u0dff])[\u200c\u200d]"
)
_BLANKS = re.compile(r"[^\S\n]+")
_GAP = re.compile(" ?(?:\0 ?)+")  # where emoji were; \0 is free as a mark once control characters are gone

# Rules and underlines of headings, code fences, the rule under a table's head.
_DROPPED_LINE = re.compile(r"([-*_=~])(?: ?\1){2,}|(?:`{3,}|~{3,}) ?[\w+#.-]*|\|(?=[:| ]*-)[-:| ]*\|")
_QUOTE = re.compile(r"^(?:> ?)*> ")
_BLOCK = re.compile(r"#{1,6} |[-*•] (?:\[[ xX]\] )?")
_NUMBERED = re.compile(r"\d{1,3}[.)] ")
_LINK = re.compile(r'!?\[([^\[\]]*)\]\(<?((?:[^\s()]|\([^\s()]*\))+)(?: "[^"]*")?\)')
_AUTOLINK = re.compile(r"<((?:https?://|mailto:)[^\s<>]+)>")
_CODE = re.compile(r"(?<!`)(`{1,3})(?!`)([^`]+)\1(?!`)")
# As in CommonMark a marker opens before and closes after text, but never touches a word on its outer side: 2*3*4 and
# snake_case stay.
_STARS = re.compile(r"(?<![\w*])(\*{1,3})(?![\s*)\]},.;:!?])([^*]*[^\s*])\1(?![\w*])")
_UNDERLINES = re.compile(r"(?<!\w)(__?)(?![\s_)\]},.;:!?])([^_]*[^\s_])\1(?!\w)")
_ENDED = re.compile(r"""[.!?:;,…]["')\]”’*_`]{0,4}$""")
_STRUCK = re.compile(r"~~(?![\s~])([^~]+)~~")


def clean(text: str) -> str:
    """Text to speak: NFC, one line, single spaces, no markdown, emoji, control or zero-width characters.

    Ordinary text comes back as it was. Headings and list items that run on without a full stop get one, or they would
    be read as one sentence. Raises InvalidInputError for more than MAX_CHARS characters, lone surrogates, and nothing
    to speak.
    """
    if not isinstance(text, str):
        raise InvalidInputError(f"The text must be a string, not {type(text).__name__}.", "text")
    if len(text) > MAX_CHARS:
        raise InvalidInputError(
            f"The text has {len(text):,} characters; at most {MAX_CHARS:,} are spoken at once. Send it in parts.",
            "text",
        )
    if half := _SURROGATE.search(text):
        raise InvalidInputError(
            f"The text has half a character (lone surrogate U+{ord(half[0]):04X} at position {half.start()}): send it "
            "as UTF-8, or in JSON with both \\u escapes of the pair.",
            "text",
        )
    text = _CONTROL.sub("", _NEWLINE.sub("\n", unicodedata.normalize("NFC", text)))
    text = _INVISIBLE.sub("", _EMOJI.sub("\0", text))
    text = _join_lines(_BLANKS.sub(" ", text).split("\n"))
    for _ in range(2):  # the second time for what stood inside: an image in a link, italics in bold
        text = _without_inline_marks(text)
    text = " ".join(_GAP.sub(_close_gap, text).split())
    if not _is_spoken(text):
        raise InvalidInputError("There is nothing to speak: the text has no letter and no digit.", "text")
    return text


def _is_spoken(text: str) -> bool:
    return any(char.isalnum() for char in text)


def _join_lines(lines: list[str]) -> str:
    """One line of text out of many, block marks removed."""
    parts: list[str] = []
    item = blank = False  # the last part belongs to a heading, list item or table row; an empty line followed it
    for line in (_QUOTE.sub("", line.strip(" \0")) for line in lines):
        if not line or _DROPPED_LINE.fullmatch(line):
            blank, item = True, item or bool(line)
            continue
        plain = line[block.end() :] if (block := _BLOCK.match(line)) else line
        if len(line) > 2 and line[0] == line[-1] == "|":
            plain = ", ".join(cell for cell in map(str.strip, line[1:-1].split("|")) if cell)
        marked = plain != line or _NUMBERED.match(line) is not None
        if parts and item and (marked or blank) and not _ENDED.search(parts[-1]):
            parts[-1] += "."
        item, blank = marked or (item and not blank), block is not None and block[0][0] == "#"
        parts.append(plain)
    return " ".join(parts)


def _without_inline_marks(text: str) -> str:
    text = _LINK.sub(lambda link: link[1] if any(mark in link[2] for mark in "/.#:") else link[0], text)
    text = _CODE.sub(r"\2", _AUTOLINK.sub(r"\1", text))
    return _STRUCK.sub(r"\1", _UNDERLINES.sub(r"\2", _STARS.sub(r"\2", text)))


def _close_gap(gap: re.Match[str]) -> str:
    return "" if gap.string[gap.end() : gap.end() + 1] in tuple(".,!?;:)]") else " "


_CLAUSE_END = re.compile(r"[,;:—–](?=\s)|[)…](?=\s)| (?=—|–|\()")


def split_sentences(text: str, max_chars: int = 240, language: str = "en") -> list[str]:
    """Sentences of clean text, none longer than ``max_chars``, none without something to speak.

    An over-long sentence is cut after its last clause mark that fits, else at the last space, else hard. ``language``
    is an ISO 639 code; sentencex falls back to a related one.
    """
    pieces = [piece for sentence in sentencex.segment(language, text) for piece in _cut(sentence.strip(), max_chars)]
    spoken: list[str] = []
    for piece in pieces:  # a lone "..." would be a silent take: it goes with its neighbour, or goes
        if _is_spoken(piece):
            spoken.append(piece)
        elif spoken and len(spoken[-1]) + len(piece) < max_chars:
            spoken[-1] += f" {piece}"
    return spoken


def _cut(sentence: str, max_chars: int) -> list[str]:
    pieces = []
    while len(sentence) > max_chars:
        start = sentence[: max_chars + 1]
        clauses = [mark.end() for mark in _CLAUSE_END.finditer(start, max_chars // 3)]
        at = clauses[-1] if clauses else start.rfind(" ")
        at = at if at > 0 else max_chars
        pieces.append(sentence[:at].rstrip())
        sentence = sentence[at:].lstrip()
    return [*pieces, sentence] if sentence else pieces


def check_speaker(speaker: int) -> int:
    """Return ``speaker`` if it can stand in a ``[speaker]`` tag: an int, 0..MAX_SPEAKER. Raises InvalidInputError."""
    if isinstance(speaker, bool) or not isinstance(speaker, int) or not 0 <= speaker <= MAX_SPEAKER:
        raise InvalidInputError(
            f"speaker must be a whole number from 0 to {MAX_SPEAKER}, not {speaker!r:.40}.", "speaker"
        )
    return speaker


class TextTokenizer:
    """Text -> ids of ``BOS [speaker]text EOS``, the template of CSM's training (SesameAILabs/csm, ``generator.py``).

    Takes over ``tokenizer``: padding, truncation and the recognition of special tokens in plain text are switched off
    in it. BOS and EOS are placed here, so there is one of each whatever post-processor the file brings.
    """

    def __init__(self, tokenizer: Tokenizer, bos_id: int, eos_id: int) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True  # a caller's "<|end_of_text|>" is thirteen characters like any others
        self._tokenizer = tokenizer
        self._normalizer = tokenizer.normalizer
        self._bos_id = bos_id
        self._eos_id = eos_id
        added = tokenizer.get_added_tokens_decoder()
        self._reserved = {bos_id, eos_id} | {index for index, token in added.items() if token.special}

    def encode(self, text: str, speaker: int) -> list[int]:
        """Ids with exactly one BOS, first, and one EOS, last.

        Raises InvalidInputError as ``check_speaker``, and for a text whose letters are all unknown to a tokenizer that
        drops what it does not know (the bundled voice and Cyrillic): the model would be asked to speak nothing.
        """
        if _is_spoken(text) and self._normalizer and not _is_spoken(self._normalizer.normalize_str(text)):
            raise InvalidInputError("This model knows none of the letters in a sentence of the text.", "text")
        # Tag and text together: their border is inside a token of a BPE vocabulary.
        encoding = self._tokenizer.encode(f"[{check_speaker(speaker)}]{text}", add_special_tokens=False)
        # A vocabulary that holds its special tokens as words as well could still produce them.
        ids = [index for index in encoding.ids if index not in self._reserved]
        return [self._bos_id, *ids, self._eos_id]


_LETTERS = {"æ": "ae", "œ": "oe", "ø": "o", "ß": "ss", "ł": "l", "đ": "d", "ð": "d", "þ": "th", "ı": "i"}
_LOOKALIKES = {"’": "'", "‘": "'", "ʼ": "'", "—": ",", "–": ",", ";": ",", ":": ",", "…": "."}


def character_tokenizer(alphabet: str) -> Tokenizer:
    """A tokenizer with one id per character: ``[BOS]`` 0, ``[EOS]`` 1, ``[UNK]`` 2, then ``alphabet`` in its order.

    Text is lower-cased and loses its accents; dashes, colons and curly quotes become comma or apostrophe; every other
    stranger becomes a space. The alphabet needs the space and the tag's ``[``, ``]`` and digits.
    """
    special = ["[BOS]", "[EOS]", "[UNK]"]
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    if len(vocabulary) != len(special) + len(alphabet) or not {" ", "[", "]", "0"} <= set(alphabet):
        raise ValueError(f"An alphabet is distinct characters with ' ', '[', ']' and '0' among them, not {alphabet!r}.")
    replacements = _LETTERS | {sign: plain for sign, plain in _LOOKALIKES.items() if sign not in alphabet}
    known = "".join(f"\\{char}" if not char.isalnum() else char for char in alphabet)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))  # noqa: S106 -- no password
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
        + [normalizers.Replace(sign, plain) for sign, plain in replacements.items()]
        + [
            normalizers.Replace(Regex(f"[^{known}]"), " "),
            normalizers.Replace(Regex("(?<=\\]) +| +(?=[ ,.!?])"), ""),  # the gaps that strangers leave
            normalizers.Strip(left=False, right=True),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return tokenizer
