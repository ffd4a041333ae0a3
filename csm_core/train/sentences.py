"""The text that the teacher reads: dictionary examples, sentences from a small grammar, and word lists.

Writes one sentence a line. Knows no audio. The sentences of the judge, and anything that shares five consecutive words
with one of them, are left out, so that the judge hears only unseen text.

    python -m csm_core.train.sentences --out runs/voice/sentences.txt        (needs the Debian package wordnet-base)
"""

import argparse
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from wordfreq import top_n_list

JUDGE_SENTENCES = Path(__file__).with_name("judge_sentences.txt")
WORDNET = Path("/usr/share/wordnet")

PEOPLE = """I you we they he she my_brother my_sister her_mother his_father the_boy the_girl the_man the_woman
the_doctor the_teacher the_driver our_neighbor my_friend the_children the_students nobody everyone somebody
the_old_lady the_farmer the_king a_stranger the_police the_workers my_uncle your_son their_daughter the_captain
the_writer the_boss our_guests""".split()
THINGS = """book letter car house garden table chair window door phone bag coat hat shirt shoe cup bottle plate knife
spoon box key lamp clock picture map ticket boat train bus bicycle ring watch dress bed blanket pillow mirror basket
newspaper camera computer machine engine bridge road wall gate fence roof farm field tree flower apple orange cake
bread cheese fish soup egg potato horse cow dog cat bird ball game song story film question answer plan idea problem
mistake lesson report list name number price bill gift prize job""".split()
ADJECTIVES = """big small old new good bad red blue green white black long short heavy light cheap expensive beautiful
ugly clean dirty empty full hot cold warm dry wet strange simple difficult quiet loud strong weak famous dangerous
safe lovely broken wooden golden bright dark soft hard sweet fresh early late quick slow rich poor young happy sad
angry tired hungry sick brave clever kind""".split()
VERBS = """sees/saw/see finds/found/find buys/bought/buy sells/sold/sell wants/wanted/want needs/needed/need
likes/liked/like loves/loved/love brings/brought/bring takes/took/take keeps/kept/keep loses/lost/lose
breaks/broke/break makes/made/make draws/drew/draw carries/carried/carry opens/opened/open closes/closed/close
washes/washed/wash paints/painted/paint moves/moved/move holds/held/hold remembers/remembered/remember
forgets/forgot/forget hates/hated/hate gets/got/get leaves/left/leave hides/hid/hide sends/sent/send shows/showed/show
chooses/chose/choose uses/used/use checks/checked/check changes/changed/change fixes/fixed/fix cleans/cleaned/clean
watches/watched/watch""".split()
MOTIONS = """goes/went/go comes/came/come runs/ran/run walks/walked/walk drives/drove/drive flies/flew/fly
travels/traveled/travel moves/moved/move returns/returned/return hurries/hurried/hurry swims/swam/swim rides/rode/ride
jumps/jumped/jump""".split()
PLACES = """school church market station airport hospital library museum park beach village city farm forest river
lake mountain island hotel restaurant kitchen bathroom bedroom office factory theater bank shop store bridge street
corner square castle border coast""".split()
TIMES = """today yesterday tomorrow tonight this_morning last_week next_month every_day on_Monday on_Tuesday
on_Wednesday on_Thursday on_Saturday on_Sunday in_the_evening at_noon at_night in_January in_March in_April in_August
in_October in_December in_spring in_winter again for_a_long_time for_three_days after_work before_lunch after_dinner
all_day_long an_hour_ago two_years_ago in_a_few_minutes soon later at_six_o'clock at_a_quarter_to_nine
at_half_past_ten once_a_year twice_a_month from_time_to_time right_away""".split()
NUMBERS = """one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety a_hundred a_thousand
a_million""".split()
ADVERBS = """quickly slowly quietly carefully suddenly really never always often sometimes usually finally almost
already probably certainly clearly easily hardly simply still just also only even""".split()
OPINIONS = """I_think I_hope I_know I_believe we_know they_say she_said he_said you_know I_am_afraid I_am_sure
it_seems_that he_told_me she_knew do_you_think did_you_know I_heard everyone_says maybe perhaps""".split()

WHERE = "to from near at in behind past across around through".split()
UNITS = "dollars minutes hours pounds years days".split()
OPENINGS = "thank_you_for what_about look_at give_me tell_me_about is_this where_is who_took".split()
BEING = "we_are they_are I_am you_were she_is he_was".split()
DOING = "going walking driving coming looking working waiting sitting standing talking reading sleeping".split()
BESIDE = "on under behind beside inside".split()


def dictionary_examples(folder: Path) -> Iterator[str]:
    """The usage examples in WordNet's glosses (wndb(5WN): the gloss follows ``|``, examples stand in double quotes)."""
    for name in ("data.adj", "data.adv", "data.noun", "data.verb"):
        for line in (folder / name).read_text(encoding="latin-1").splitlines():
            _, _, gloss = line.partition(" | ")
            yield from re.findall(r'"([^"]+)"', gloss)


def grammar_sentence(rng: random.Random) -> str:
    """One sentence of the everyday kind that dictionary examples lack: persons, questions, requests, times, numbers."""

    def pick(words: list[str]) -> str:
        return rng.choice(words).replace("_", " ")

    def noun_phrase() -> str:
        noun = rng.choice(THINGS)
        adjective = rng.choice(ADJECTIVES) + " " if rng.random() < 0.45 else ""
        if rng.random() < 0.12:
            plural = noun + ("es" if noun.endswith(("x", "s", "ch", "sh")) else "s")
            return f"{pick(NUMBERS[1:])} {adjective}{plural.replace('knifes', 'knives')}"
        article = rng.choice(
            ["the", "the", "a", "my", "your", "his", "her", "our", "their", "this", "that", "some", "another", "every"]
        )
        if article == "a" and (adjective or noun)[0] in "aeiou":
            article = "an"
        return f"{article} {adjective}{noun}"

    def place() -> str:
        return f"{pick(WHERE)} the {pick(PLACES)}"

    def tail() -> str:
        return " " + rng.choice(
            [pick(TIMES), place(), "with " + noun_phrase(), "because it was " + rng.choice(ADJECTIVES), ""]
        )

    present, past, base = rng.choice(VERBS).split("/")
    goes, went, go = rng.choice(MOTIONS).split("/")
    who, time, thing, other = pick(PEOPLE), pick(TIMES), noun_phrase(), noun_phrase()
    he = rng.choice(["he", "she", "my brother", "the teacher", "the woman", "the dog", "your friend", "it", "nobody"])
    modal = rng.choice(["will", "can", "could", "should", "must", "would", "might", "did not", "cannot", "may"])
    patterns = [
        f"{who} {past} {thing}{tail()}",
        f"{who} {went} {place()}{tail()}",
        f"{who} {modal} {base} {thing}{tail()}",
        f"{he} {present} {thing} {pick(ADVERBS)}",
        f"{he} {goes} {place()} {time}",
        f"do you {base} {thing}?",
        f"{rng.choice(['why', 'when', 'where', 'how'])} did {who} {base} {thing}?",
        f"please {base} {thing} and {go} {place()}",
        f"{pick(OPINIONS)} {he} {past} {thing}",
        f"{thing} is {rng.choice(['not', 'very', 'too', 'so', 'quite', 'really', 'never'])} {rng.choice(ADJECTIVES)}",
        f"{thing} was {rng.choice(ADJECTIVES)} and {rng.choice(ADJECTIVES)}, but {other} was {rng.choice(ADJECTIVES)}",
        f"there {rng.choice(['is', 'was'])} {rng.choice(['a', 'no', 'one'])} {rng.choice(THINGS)} {place()}",
        f"there {rng.choice(['are', 'were'])} {pick(NUMBERS[1:])} {rng.choice(ADJECTIVES)} people {place()}",
        f"if {who} {past} {thing}, {he} would {base} {other}",
        f"when {who} {went} {place()}, {he} {past} {thing}",
        f"{who} {rng.choice(['have', 'had'])} {rng.choice(['been', 'never been', 'already been'])} {place()} {time}",
        f"it {rng.choice(['costs', 'takes', 'weighs', 'needs'])} {pick(NUMBERS)} {pick(UNITS)}",
        f"{pick(OPENINGS)} {thing}",
        f"{pick(BEING)} {pick(DOING)} {place()} {time}",
        f"{thing} that {who} {past} {rng.choice(['is', 'was'])} {pick(BESIDE)} {other}",
    ]
    sentence = re.sub(r"\s+", " ", rng.choice(patterns)).strip()
    return sentence[0].upper() + sentence[1:] + ("" if sentence.endswith("?") else ".")


def words_of(sentence: str) -> list[str]:
    return re.findall(r"[a-z']+", sentence.lower())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--wordnet", type=Path, default=WORDNET)
    parser.add_argument("--vocabulary", type=int, default=12_000, help="most frequent English words that may occur")
    parser.add_argument("--grammar", type=int, default=12_000, help="sentences from the grammar")
    parser.add_argument("--lists", type=int, default=7_000, help="lists of two to five words, rare words first")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    rng = random.Random(args.seed)
    vocabulary = [
        w
        for w in top_n_list("en", args.vocabulary)
        if re.fullmatch(r"[a-z]+('[a-z]+)?", w) and (len(w) > 1 or w in "ai")
    ]
    known = set(vocabulary)
    unseen = [words_of(s) for s in JUDGE_SENTENCES.read_text().splitlines()]
    forbidden = {tuple(s[i : i + 5]) for s in unseen for i in range(len(s) - 4)}

    def allowed(sentence: str) -> bool:
        words = words_of(sentence)
        return 2 <= len(words) <= 16 and not any(tuple(words[i : i + 5]) in forbidden for i in range(len(words) - 4))

    sentences: dict[str, None] = {}  # ordered set
    for example in sorted(set(dictionary_examples(args.wordnet))):
        plain = re.fullmatch(r"[A-Za-z',.;:?!\- ]+", example)
        if plain and all(w in known for w in words_of(example)) and allowed(example):
            sentences[example] = None
    while args.grammar > 0:
        sentence = grammar_sentence(rng)
        if sentence not in sentences and allowed(sentence):
            sentences[sentence] = None
            args.grammar -= 1

    # Word lists even the counts out: a word that the sentences hold less often is drawn more often.
    counts = Counter(w for s in sentences for w in words_of(s))
    weights = [1.0 / (1.0 + counts[w]) for w in vocabulary]
    for _ in range(args.lists):
        chosen = rng.choices(vocabulary, weights, k=rng.randint(2, 5))
        sentences[" ".join(chosen) + "."] = None

    lines = list(sentences)
    rng.shuffle(lines)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines) + "\n")
    words_each = sum(len(words_of(s)) for s in lines) / len(lines)
    print(f"{len(lines)} sentences, {words_each:.1f} words each, {len(known)} words known -> {args.out}")


if __name__ == "__main__":
    main()
