"Pairs, tasks and their refusals: more cases than a reader of the notebooks wants"
import csv
import inspect
import json
import random
import warnings
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mgprune import reading, tasks
from mgprune.corruption import CORRUPTIONS, corruption_named, random_tokens
from mgprune.files import digest
from mgprune.tree import level_shapes, site_masks
from mgprune.models import InputError, cache_folder, load_model
from mgprune.objective import is_right, logit_difference, probability_difference
from mgprune.sites import find_sites
from mgprune.hooks import host_of
from mgprune.passes import answer_logits, example_bytes, fitting_size
from mgprune.streams import prepare
from mgprune.tasks import Batch, Drawn, Pair, Task, templated
from mgprune.words import CAPITALS, EVENTS, FEMALE, FOLLOWING, MALE, NEUTRAL, NOUNS, PLACES, ROLES, THINGS, TRAITS

UNREADABLE = ("successor",)                      # by the embedded model's tokenizer
UNLEARNED = ("addition", "multiple_choice")      # by the embedded model
APART = ("capital", "addition")                  # tasks whose parts ask about things of their own
BUILT_IN = [(name, corruption) for name, fitting in tasks.FITTING.items() if name not in UNREADABLE for corruption in fitting]
KNOWN = [two for two in BUILT_IN if two[0] not in UNLEARNED]
FLIPS = [("ioi", "swap_subject"), ("gendered_pronoun", "other_gender"), ("subject_verb_agreement", "other_number"),
         ("docstring", "swap_listed"), ("induction", "swap_listed"), ("capital", "other_question")]
SMALL = (20, 10, 20)
ROWS = [dict(clean=f"Then {a} met", corrupt=f"Then {b} met", answer=[" Anna", " Lucy"], wrong=[" Paul"])
        for a, b in (("Mary", "John"), ("Emma", "Mark"), ("Laura", "Tom"), ("Julia", "James"), ("Alice", "David"))]


@pytest.fixture(scope="module")
def tokenizer(model): return model.tokenizer


def splits(task): return task.train, task.valid, task.test


def worded(words, **settings):
    "A tokenizer that knows just these words, letters and digits"
    vocabulary = {w: i for i, w in enumerate(dict.fromkeys(["<unk>", *map(chr, range(32, 127)), *words]))}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>", continuing_subword_prefix=""))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(settings.pop("split", r" ?[A-Za-z]+|[0-9]| |[^A-Za-z0-9 ]")), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", **settings)


def every_word():
    texts = " ".join(tasks.IOI_TEMPLATES + tasks.YEAR_TEMPLATES + tasks.PRONOUN_TEMPLATES + tasks.AGREEMENT_TEMPLATES +
                     (tasks.CAPITAL_TEMPLATE, tasks.SUCCESSOR_TEMPLATE, tasks.CHOICE_TEMPLATE, "she he is are comes isn wasn List"))
    pools = (FEMALE, MALE, NEUTRAL, PLACES, THINGS, EVENTS, TRAITS, ROLES,
             NOUNS, NOUNS.values(), CAPITALS, CAPITALS.values(), FOLLOWING, FOLLOWING.values())
    words = [w.strip("?,:.") for w in texts.split()]
    return [f" {w}" for w in words if w.isalpha()] + words + [f" {w}" for words in pools for w in words]


# of all pairs that seed 0 gives, as they were before the built-in tasks were written with `templated`
ALL_PAIRS = {
    "ioi unrelated_names": "38c3e9a8ea33f53f",
    "ioi swap_subject": "2118172067a356a9",
    "greater_than year_01": "dc559751e450a84b",
    "greater_than decade_start": "13b59b1fb9576426",
    "gendered_pronoun other_gender": "96c55fff9abf76f2",
    "gendered_pronoun neutral_word": "ef8a7e641d27ac6b",
    "subject_verb_agreement other_number": "656e03003495436d",
    "docstring unrelated_words": "5b9855f5d2e7b627",
    "docstring swap_listed": "8bf265f3ed2ece87",
    "induction unrelated_words": "453b8065c4ea7fd8",
    "induction swap_listed": "d627f61784ffc2e4",
    "capital other_question": "b75ed94f21e548d6",
    "addition other_question": "d59c609426926dee",
    "multiple_choice other_question": "fa20f7aad478ccc0",
    "multiple_choice swap_listed": "f2b51070a7fee5af"}


def drawn(task): return digest(repr([(p.clean, p.corrupt, p.answer, p.wrong) for part in splits(task) for p in part]).encode())


@pytest.mark.parametrize("name, corruption", BUILT_IN)
def test_built_in_task(model, name, corruption):
    task = tasks.load(model, name, corruption=corruption)
    assert drawn(task) == ALL_PAIRS[f"{name} {corruption}"]
    prompts = [{p.clean for p in part} for part in splits(task)]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) and sum(map(len, splits(task))) >= 256 and len(task.test) >= 64
    both = [{text for p in part for text in (p.clean, p.corrupt)} for part in splits(task)]
    assert sum(map(len, both)) == len(set.union(*both))
    if name not in ("capital", "subject_verb_agreement"): assert [len(part) for part in splits(task)] == [2048, 512, 512]
    if name not in APART: assert sum(map(len, splits(task))) == sum(map(len, prompts))
    assert len({p for part in splits(task) for p in part}) == sum(map(len, splits(task)))
    assert all(p.clean != p.corrupt for part in splits(task) for p in part)
    batch = task.batch("test")
    assert isinstance(batch, Batch) and batch.clean.shape == batch.corrupt.shape == batch.attention_mask.shape
    assert (batch.clean[:, -1] == batch.corrupt[:, -1]).all() and batch.attention_mask[:, -1].all()
    assert (batch.attention_mask.diff(dim=1) >= 0).all()  # padding on the left only
    assert (batch.answer[:, 0] >= 0).all() and (batch.wrong[:, 0] >= 0).all()


HELD_OUT = dict(ioi=("first", "second", "giver"), greater_than=("event",), gendered_pronoun=("name", "role"), subject_verb_agreement=("subject", "counterpart"),
                docstring=("thing", "place"), induction=tuple(f"listed{i}" for i in range(10)), capital=("asked", "other"), multiple_choice=("listed0", "listed1", "listed2"))


@pytest.mark.parametrize("name", HELD_OUT)
def test_parts_have_words_of_their_own(model, name):
    task = tasks.load(model, name)
    words = [{p.slots[slot] for p in part for slot in HELD_OUT[name]} for part in splits(task)]
    assert all(words) and sum(map(len, words)) == len(set.union(*words))
    if name == "greater_than": assert len({p.clean[-9:] for p in task.train}) > 1 and not {year(p) for p in task.train} & {year(p) for p in task.test}
    if name not in ("capital", "docstring", "induction", "multiple_choice"):
        for held in ("templates", "both"):
            apart = [{p.slots["template"] for p in part} for part in splits(tasks.load(model, name, n=SMALL, hold_out=held))]
            assert sum(map(len, apart)) == len(set.union(*apart))
    else:
        with pytest.raises(InputError, match="has 1 templates; expected at least 3"): tasks.load(model, name, hold_out="templates")


def year(pair): return "".join(str(pair.slots[part]) for part in ("century", "tens", "units"))


def test_parts_of_own_pairs_share_no_prompt(model):
    words = [" " + w for w in "Mary John Emma Mark Laura Tom Julia James".split()]
    def pair(a, b): return dict(clean=f"Then{words[a]} met", corrupt=f"Then{words[b]} met", answer=" Anna")
    apart = tasks.from_pairs(model, [pair(a, a ^ 1) for a in range(8)])
    texts = [{text for p in part for text in (p.clean, p.corrupt)} for part in splits(apart)]
    assert sum(map(len, texts)) == len(set.union(*texts)) and apart.hold_out == "prompts" and [*map(len, splits(apart))] == [4, 2, 2]
    with pytest.warns(UserWarning, match="linked by prompts"): cycle = tasks.from_pairs(model, [pair(a, (a + 1) % 8) for a in range(8)])
    assert cycle.hold_out == "clean prompts" and cycle == tasks.from_pairs(model, [pair(a, (a + 1) % 8) for a in range(8)], hold_out="clean prompts")
    with pytest.warns(UserWarning, match="1 of 2 held-out pairs: another part has"):
        Task("own", "own", 0, *[(Pair(**pair(*two)),) for two in ((0, 1), (2, 0), (4, 5))], model)


@pytest.mark.parametrize("name, corruption", BUILT_IN)
def test_the_same_seed_gives_the_same_pairs_whatever_the_global_state(model, name, corruption):
    random.seed(1)
    first = tasks.load(model, name, corruption=corruption, n=SMALL, seed=3)
    random.seed(2)
    state = random.getstate()
    assert first == tasks.load(model, name, corruption=corruption, n=SMALL, seed=3)
    assert random.getstate() == state
    other = tasks.load(model, name, corruption=corruption, n=SMALL, seed=4)
    assert first != other and first.train != other.train


DRAWN = {
    "ioi unrelated_names": "339aaeacf0b2a630",
    "ioi swap_subject": "3b844698bf86fd45",
    "greater_than year_01": "488e3fcd623f776a",
    "greater_than decade_start": "127121fdc7a4ca1d",
    "gendered_pronoun other_gender": "86cfaa25505c8d39",
    "gendered_pronoun neutral_word": "f5b9c1f77eecd26b",
    "subject_verb_agreement other_number": "a45665793dfb2e09",
    "docstring unrelated_words": "5fe3226b17196c34",
    "docstring swap_listed": "96ff73dc3a6fd7ae",
    "induction unrelated_words": "d5cb201e771bd7de",
    "induction swap_listed": "79bb13fa85362ce9",
    "capital other_question": "385b2f962e2f860b",
    "addition other_question": "0b9e408460343fe0",
    "multiple_choice other_question": "5cc3bc5f6a9ffb89",
    "multiple_choice swap_listed": "295c83437dd0b926"}
DRAWN_BEFORE = {  # by versions whose parts shared words, for circuits that were found then
    "ioi unrelated_names": "73345ebc8cf1222d",
    "ioi swap_subject": "f5ecf9a0bf7c37fd",
    "greater_than year_01": "e17333d896b307cc",
    "greater_than decade_start": "95177c51057098cd",
    "gendered_pronoun other_gender": "87523b82d6875a23",
    "gendered_pronoun neutral_word": "636ded23ce4fc705",
    "subject_verb_agreement other_number": "cd05c84bf947f918",
    "docstring unrelated_words": "360a3b11d0905af8",
    "docstring swap_listed": "7686d42c0f078642",
    "induction unrelated_words": "abfe598e5f2ab920",
    "induction swap_listed": "6e3d801144ce3733",
    "capital other_question": "dc8488be2021ae16",
    "addition other_question": "0b9e408460343fe0",
    "multiple_choice other_question": "7a9da79033b7da06",
    "multiple_choice swap_listed": "65f971b1c2a992ab"}


@pytest.mark.parametrize("name", DRAWN)
def test_a_seed_goes_on_giving_the_pairs_it_gave(model, name):
    task, corruption = name.split()
    assert drawn(tasks.load(model, task, corruption=corruption, n=(8, 8, 8))) == DRAWN[name]
    assert drawn(tasks.load(model, task, corruption=corruption, n=(8, 8, 8), hold_out="clean prompts")) == DRAWN_BEFORE[name]


@pytest.mark.parametrize("name, corruption", KNOWN)
def test_the_model_prefers_the_right_answers(model, name, corruption):
    batch = tasks.load(model, name, corruption=corruption, n=(1, 1, 64)).batch("test")
    with torch.no_grad(): p = answer_logits(model, batch.clean, batch.attention_mask).softmax(-1)
    total = lambda ids: p.gather(1, ids.clamp(0)).masked_fill(ids < 0, 0).sum(1)
    assert (total(batch.answer) > total(batch.wrong)).float().mean() >= .96


@pytest.mark.parametrize("name, corruption", FLIPS)
def test_the_answer_flips_with_these_corruptions(model, name, corruption):
    batch = tasks.load(model, name, corruption=corruption, n=(1, 1, 64)).batch("test")
    with torch.no_grad(): logits = answer_logits(model, batch.corrupt, batch.attention_mask)
    assert is_right(logits, batch).float().mean() <= .05


@pytest.mark.parametrize("name", tasks.FITTING)
def test_the_first_fitting_corruption_is_the_default(name):
    assert inspect.signature(tasks.BUILT_IN[name]).parameters["corruption"].default == tasks.FITTING[name][0]


@pytest.mark.parametrize("name", ("capital", "addition"))
def test_no_part_asks_what_another_asks(model, name):
    question = dict(capital=lambda p: p.answer, addition=lambda p: p.clean.split(", ")[-1])[name]
    asked = [{question(p) for p in part} for part in splits(tasks.load(model, name))]
    assert sum(map(len, asked)) == len(set.union(*asked)) == dict(capital=30, addition=35)[name]


def test_sums_are_right(model):
    for pair in tasks.addition(model, n=SMALL).test:
        for text, answer in ((pair.clean, pair.answer), (pair.corrupt, pair.wrong)):
            *shown, last = [part.split(" = ") for part in (text + answer[0]).split(", ")]
            assert len(shown) == 3 and (text == pair.corrupt or last[0] not in [asked for asked, _ in shown])
            assert all(sum(map(int, sum_.split(" + "))) == int(found) for sum_, found in (*shown, last))


def test_digits_follow_the_tokenizer():
    apart, joined = (tasks.addition(worded(digits, split=split), n=SMALL).test[0]
                     for digits, split in (([], r"[0-9]| |[^0-9 ]"), ([f" {d}" for d in range(10)], r" ?[0-9]| |[^0-9 ]")))
    assert apart.clean.endswith(" = ") and len(apart.answer[0]) == 1
    assert joined.clean.endswith(" =") and joined.answer[0].startswith(" ")


def test_successor_and_choice_with_a_tokenizer_that_knows_the_words():
    knows = worded(every_word(), split=r" ?[A-Za-z]+|[0-9]| |[^A-Za-z0-9 ]")
    task = tasks.successor(knows)
    for pair in task.train + task.test:
        word = lambda text: text.split()[2].rstrip(",")
        assert pair.answer == (f" {FOLLOWING[word(pair.clean)]}",) and pair.wrong == (f" {FOLLOWING[word(pair.corrupt)]}",)
    for corruption in tasks.FITTING["multiple_choice"]:
        for pair in tasks.multiple_choice(knows, corruption=corruption, n=SMALL).test:
            for text, (letter,) in ((pair.clean, pair.answer), (pair.corrupt, pair.wrong)):
                assert f"{text.split()[-2]} ({letter})" in text


# --- templates of one's own

def some_person(pool, rng):
    gender, answer, wrong = rng.choice((("female", " she", " he"), ("male", " he", " she")))
    return Drawn(dict(name=rng.choice(pool[gender])), answer, wrong)


OWN = dict(name="reason", templates=["Yesterday {name} went to the store because"], draw=some_person, corruption="other_gender", n=(12, 4, 4))


def test_a_templated_task_has_what_was_drawn(model):
    task = templated(model, **OWN)
    assert [len(part) for part in splits(task)] == [12, 4, 4] and (task.name, task.corruption, task.seed) == ("reason", "other_gender", 0)
    assert task == templated(model, **OWN) != templated(model, **OWN, seed=1)
    for pair in task.train:
        names = [text.split()[1] for text in (pair.clean, pair.corrupt)]
        assert (names[0] in FEMALE, names[1] in FEMALE) == (pair.answer == (" she",), pair.wrong == (" she",)) and pair.clean.replace(*names) == pair.corrupt
    def someone(slots, pool, rng): return dict(slots, name=pool["people"][0])
    own = templated(model, **OWN | dict(corruption=someone), words=dict(people=["Annabel", "someone"]))
    assert own.corruption == "someone" and {p.corrupt for p in own.test} == {"Yesterday someone went to the store because"}


def test_a_key_occurs_once_and_parts_ask_apart(model):
    def capital(pool, rng):
        asked = rng.choice(pool["asked"])
        return Drawn(dict(asked=asked, other="Japan"), f" {CAPITALS[asked]}", key=(asked,))
    countries = [c for c in tasks.word_pool(model)["countries"] if c != "Japan"]
    task = templated(model, "towns", ["The capital of {asked} is", "The capital of {asked} is"], capital, "other_question", n=(8, 4, 4), asked=countries)
    answers = [p.answer for part in splits(task) for p in part]
    assert len({*answers}) == len(answers) == 16
    with pytest.raises(InputError, match="only [0-9]+ different prompts found, 100 asked for"):
        templated(model, "towns", ["The capital of {asked} is"], capital, "other_question", n=(100, 4, 4), asked=countries)


def test_letters_in_a_row_may_be_meant(model):
    spelt = OWN | dict(templates=["Zxqvw {name} went"])
    with pytest.raises(InputError, match="reason does not fit this tokenizer, which spells words out in letters"): templated(model, **spelt)
    assert len(templated(model, **spelt, letters=True).train) == 12


@pytest.mark.parametrize("change, message", [
    (dict(draw=None), "draw=None: expected a function"), (dict(draw="some_person"), "draw='some_person': expected a function"),
    (dict(draw=lambda pool, rng: (dict(name="Mary"), " she")), "what draw returns=.*: expected a Drawn"),
    (dict(draw=lambda pool, rng: None), "what draw returns=None: expected a Drawn"),
    (dict(draw=lambda pool, rng: Drawn(dict(name="Mary"), " she", key=[])), "key=.*: expected"),
    (dict(draw=lambda pool, rng: Drawn(dict(name="Mary"), " she", key=([],))), "key=.*: expected"),
    (dict(draw=lambda pool, rng: Drawn({1: "Mary"}, " she")), "slots=.*: expected a dictionary"),
    (dict(draw=lambda pool, rng: Drawn(dict(name="Mary"), ())), "answer=.*: expected one or more texts"),
    (dict(draw=lambda pool, rng: Drawn(dict(name=rng.choice(pool["female"])), " xylophonist")), "the token after the|is not one token"),
    (dict(corruption=None), "corruption=None: expected"), (dict(corruption="other"), "unknown corruption 'other'.*other_gender"),
    (dict(corruption="swap_listed"), "the slot right, other is missing"), (dict(corruption=lambda slots, pool, rng: 3), "what the corruption returns=3: expected"),
    (dict(corruption=lambda slots, pool, rng: {}), "cannot be filled"), (dict(corruption=lambda slots, pool, rng: slots), "only 0 different prompts"),
    (dict(templates="Then {name}"), "expected one or more texts in a list"), (dict(templates=[]), "expected one or more texts in a list"),
    *((dict(templates=[bad]), r"the template .* cannot be filled with the slots \['name'\]: expected their names in braces")
      for bad in ("{nam} met", "{} met", "{0} met", "{name met", "name} met", "{name.first} met", "{name!x} met", "{name[first]} met", "{name:d} met")),
    (dict(words=dict(people=["Annabel"])), "fewer than 1 of the words for people"), (dict(words=["Mary"]), "expected lists of words by name"),
    (dict(needs=dict(female=1000)), "fewer than 1000 of the words for female"), (dict(needs=dict(people=1)), "no list 'people' in the pool; expected female"), (dict(apart=dict(people=1)), "apart=.*no list 'people' in the pool"),
    (dict(needs=dict(female=0)), "expected numbers of at least 1"), (dict(asked=["a", "b"]), "asked=.*: expected at least 3"),
])
def test_templates_that_do_not_fit_are_refused(model, change, message):
    with pytest.raises(InputError, match=message): templated(model, **OWN | change)


# --- other tokenizers

def test_a_tokenizer_that_spells_words_out_is_refused(model):
    with pytest.raises(InputError, match="successor does not fit this tokenizer, which spells words out in letters"): tasks.successor(model)
    with pytest.raises(InputError, match="none of the verbs"): tasks.subject_verb_agreement(worded([]))
    with pytest.raises(InputError, match="fewer than 20 of the words for words are one token"): tasks.induction(worded([]))
    glued = worded(every_word() + [f"({c}" for c in "ABC"], split=r" ?[A-Za-z]+| ?\([ABC]|[0-9]| |[^A-Za-z0-9 ]")
    with pytest.raises(InputError, match="does not read the answer '[ABC]' as the token after the prompt"): tasks.multiple_choice(glued)


def test_people_of_the_test_never_meet_in_training(model):
    task = tasks.ioi(model)
    people = [{frozenset(p.answer + p.wrong) for p in part} for part in splits(task)]
    assert sum(map(len, people)) == len(set.union(*people))


def test_corruptions_change_only_their_slots(model):
    for pair in tasks.ioi(model, n=SMALL).test:
        clean, corrupt = set(pair.clean.split()), set(pair.corrupt.split())
        assert len((corrupt - clean)) == 3 and not {a.strip() for a in pair.answer + pair.wrong} & corrupt
    for pair in tasks.gendered_pronoun(model, n=SMALL).test:
        assert len(set(pair.clean.split()) ^ set(pair.corrupt.split())) == 2
    assert set(CORRUPTIONS) == {corruption for fitting in tasks.FITTING.values() for corruption in fitting}


@pytest.mark.parametrize("split, ending", [(r" ?[A-Za-z]+|[0-9]| |[^A-Za-z0-9 ]", 1), (r" ?[0-9]{2}| ?[A-Za-z]+|[0-9]| |[^A-Za-z0-9 ]", 2)])
def test_years_follow_the_tokenizer(split, ending):
    numbers = [f"{n:02}" for n in range(100)] + [f" {n}" for n in range(10, 100)]
    task = tasks.greater_than(worded(every_word() + numbers, split=split), n=SMALL)
    for pair in task.train + task.test:
        start, given = "".join(filter(str.isdigit, pair.clean))[:4], pair.clean.split()[-1]
        assert given == start[:4 - ending] and all(len(e) == ending for e in pair.answer + pair.wrong)
        assert min(pair.answer) > start[4 - ending:] == max(pair.wrong)
        assert len(pair.answer) + len(pair.wrong) == 10 ** ending


def test_other_tokenizers_are_refused():
    with pytest.raises(InputError, match="greater_than needs the last two digits"):
        tasks.greater_than(worded(every_word() + [" 1732"], split=r" ?[A-Za-z0-9]+| |[^A-Za-z0-9 ]"))
    with pytest.raises(InputError, match="fewer than 3 of the words for .*female.*from_pairs"): tasks.ioi(worded([]))


def test_few_names_give_few_prompts():
    few = worded([w for w in every_word() if w.strip() not in FEMALE[3:] + MALE[3:]])
    assert len(tasks.ioi(few, n=(5, 5, 5)).train) == 5
    with pytest.raises(InputError, match="only 15 different prompts found, 16 asked for"): tasks.ioi(few, n=(5, 5, 6))


def test_a_tokenizer_that_puts_a_token_first(tokenizer):
    from tokenizers import processors
    first = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), bos_token="<end>",
                                    unk_token="<unknown>")
    first.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 0)])
    with_first, plain = (tasks.ioi(t, n=SMALL).batch("test") for t in (first, tokenizer))
    assert with_first.clean.shape[1] == plain.clean.shape[1] + 1 and (with_first.answer == plain.answer).all()


def test_a_tokenizer_that_writes_a_space_before_every_text():
    words = ["\u2581" + w for w in "the Then Mary John Anna Paul met".split()]
    core = Tokenizer(models.WordPiece({w: i for i, w in enumerate(["<unk>", "\u2581", *words])}, unk_token="<unk>",
                                      continuing_subword_prefix=""))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    batch = tasks.encode([Pair("Then Mary met", "Then John met", (" Anna",), ("Paul",))], tokenizer)
    assert tokenizer.convert_ids_to_tokens(batch.answer[0].tolist() + batch.wrong[0].tolist()) == ["\u2581Anna", "\u2581Paul"]


def write(path, rows):
    if path.suffix == ".jsonl": path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            out = csv.DictWriter(file, reading.FIELDS)
            out.writeheader()
            out.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows)
    return path


def test_list_csv_and_jsonl_give_the_same_task(model, tmp_path):
    listed = tasks.from_pairs(model, ROWS, name="meeting", seed=5)
    files = write(tmp_path / "meeting.csv", ROWS), write(tmp_path / "meeting.jsonl", ROWS)
    assert all(tasks.from_pairs(model, path, seed=5) == tasks.load(model, str(path), seed=5) == listed for path in files)
    assert listed == tasks.from_pairs(model, [Pair(r["clean"], r["corrupt"], tuple(r["answer"]), tuple(r["wrong"])) for r in ROWS],
                                      name="meeting", seed=5)
    bars = "clean,corrupt,answer,wrong\n" + "\n".join(f"{r['clean']},{r['corrupt']}, Anna| Lucy, Paul" for r in ROWS)
    (tmp_path / "meeting.csv").write_text(bars)
    assert tasks.from_pairs(model, tmp_path / "meeting.csv", seed=5) == listed
    assert sorted(p.clean for part in splits(listed) for p in part) == sorted(r["clean"] for r in ROWS)


texts = st.text(st.characters(codec="utf-8", exclude_characters="\x00", exclude_categories=["Cs"]), min_size=1)


@given(st.lists(st.builds(dict, clean=texts, corrupt=texts, answer=st.lists(texts, min_size=1), wrong=st.lists(texts)), min_size=1))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_survives_a_file(tmp_path, rows):
    listed = tasks.read_pairs(rows)
    for name in ("pairs.csv", "pairs.jsonl"): assert tasks.read_pairs(write(tmp_path / name, rows)) == listed


@given(st.integers(3, 40), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_parts_share_no_prompt_and_lose_none(count, seed):
    pairs = [Pair(f"a{i // 2 if i > 5 else i}", f"b{i}", ("c",)) for i in range(count)]
    parts, held = tasks._divide(pairs, seed, "prompts")
    prompts = [{p.clean for p in part} for part in parts]
    assert all(prompts) and sum(map(len, prompts)) == len(set.union(*prompts))
    assert sorted(p.corrupt for part in parts for p in part) == sorted(p.corrupt for p in pairs)
    assert (parts, held) == tasks._divide(pairs, seed, "prompts")


REFUSED = [
    (dict(corrupt="Then Mary and John met"), r"pair 2: clean and corrupt prompt must have the same number of tokens, here 3 and 5: clean has \['Then', ' Laura', ' met'\], corrupt \['Then', ' Mary', ' and', ' John', ' met'\]"),
    (dict(clean="Then Zoe met"), r"here 6 and 3: ' Zoe' is 4 \[' ', 'Z', 'o', 'e'\], ' Tom' is 1 \[' Tom'\]"),
    (dict(answer=[" Annabel"]), r"pair 2: answer ' Annabel' is not one token but \[.*space before the word"),
    (dict(wrong=[" Annabel"]), "pair 2: answer ' Annabel' is not one token"),
    (dict(answer=[]), "pair 2: answer is missing or empty"),
    (dict(answer=[""]), r"pair 2: Pair: answer=\(''.*\): expected one or more texts, none of them empty"),
    (dict(answer="Anna"), "pair 2: answer 'Anna' is not one token but .*; ' Anna', with the space before it, is one"),
    (dict(wrong=[" Lucy"]), r"pair 2: \[' Lucy'\] is given as correct and as wrong"),
    (dict(clean=""), "pair 2: clean is missing or empty"),
    (dict(clean=3), "pair 2: Pair: clean=3: expected a text"),
    (dict(answer=3), "pair 2: 3 as an answer: expected a text in quotes"),
    (dict(answer=[3]), "pair 2: 3 as an answer: expected a text in quotes"),
    (dict(clean="Then Mary met\u00e9", corrupt="Then John met\u00e9"), "pair 2: the tokenizer cannot read all of"),
    (dict(clean="Then" + " Mary" * 64, corrupt="Then" + " John" * 64), "pair 2: the clean prompt has 65 tokens; this model takes at most 64"),
    (dict(worng=" Anna"), "pair 2: unknown field 'worng': it is not used; expected clean, corrupt, answer, wrong"),
]


@pytest.mark.parametrize("change, message", REFUSED)
def test_a_bad_pair_is_refused_by_its_number(model, change, message):
    rows = [dict(r) for r in ROWS]
    rows[2] |= change
    with pytest.raises(InputError, match=message): tasks.from_pairs(model, rows)


@pytest.mark.parametrize("rows, message", [
    ([], "no pairs; expected at least 3"), (ROWS[:2], "2 different clean prompts; expected at least 3"),
    ([ROWS[0]] * 5, "1 different clean prompts"), (["Then Mary met"], "pair 0: expected an object with clean")])
def test_too_few_pairs_are_refused(model, rows, message):
    with pytest.raises(InputError, match=message): tasks.from_pairs(model, rows)


GOOD = json.dumps(ROWS[0])


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", "", "no pairs; expected at least 3"),
    ("a.jsonl", f"{GOOD}\n\n{{'clean'}}\n", r"a.jsonl, line 3: no JSON object"),
    ("a.jsonl", f"{GOOD}\n[1, 2]\n", r"a.jsonl, line 2: expected an object with clean"),
    ("a.jsonl", f'{GOOD}\n{{"clean": "a", "corrupt": "b"}}\n', r"a.jsonl, line 2: answer is missing"),
    ("a.csv", "", "no pairs"),
    ("a.csv", "clean,corrupt,answer,wrong\n", "no pairs"),
    ("a.csv", "clean,answer\na,b\n", "a.csv, line 1: corrupt is missing in the header"),
    ("a.csv", "clean,corrupt,answer\na,b\n", "a.csv, line 2: answer is missing"),
    ("a.csv", "clean,corrupt,answer,wrong\nOh, Mary,Oh John, Anna, Paul\n", "a.csv, line 2: more cells than columns"),
    ("a.csv", 'clean,corrupt,answer,wrong\na,b,[c, d\n', r"a.csv, line 2: answer '\[c' is not one token"),
    ("a.csv", "prompt,corrupt,answer\na,b,c\n", "a.csv, line 1: unknown field 'prompt'"),
    ("a.csv", 'clean,corrupt,answer\n"a\n",b, c\n"a,b, c\n' + "a,b, c\n" * 50_000, "a.csv, line 4: a cell that begins with a quotation mark"),
    ("a.csv", "clean;corrupt;answer\na;b;[c]\n", r"a.csv, line 2: '\[c\]' is no list"),
    ("a.csv", "clean,corrupt,answer,answers\na,b,c,d\n", "a.csv, line 1: 'answer' and 'answers' are both the field answer"),
    ("a.csv", "clean,corrupt,correct_idx\na,b,1\n", "a.csv, line 1: correct_idx without incorrect_idx"),
    ("a.csv", "clean,corrupted,correct_idx,incorrect_idx\na,b,7000,8\n", "a.csv, line 2: token id '7000': expected a whole number below 633"),
    ("a.csv", "clean,corrupt,answer\na,b,c\0\n", "a.csv, line 2: the character NUL"),
    ("a.csv", f"clean,corrupt,answer\na,{'b' * 200_000},c\n", "a.csv, line 2: .*the tokenizer|a.csv, line 2: the corrupt prompt has"),
    ("a.json", f'[{GOOD},\n{{"clean"}}]', "a.json, line 2: no JSON"),
    ("a.jsonl", "[" * 100_000, "a.jsonl, no JSON that can be read"),
    ("a.jsonl", '{"clean": ' + "9" * 5000 + "}", "a.jsonl, line 1: no JSON object"),
    ("a.jsonl", '{"clean": "\\ud800", "corrupt": "b", "answer": "c"}', "a.jsonl, line 1: Pair: clean='.ud800': expected a text that UTF-8 can write"),
    ("a.jsonl", '{"clean": "a", "clean": "b", "corrupt": "b", "answer": "c"}', "a.jsonl, line 1: no JSON object .a name stands twice"),
    ("a.json", '{"clean": {"0": "a"}, "corrupt": {"0": "b"}, "answer": {"0": "c"}}', "a.json, line 1: {'0': 'c'} as an answer: expected a text"),
    ("a.txt", "a", "ends in .csv, .tsv, .json or .jsonl"),
])
def test_a_bad_file_is_refused_by_its_line(model, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as refusal: tasks.from_pairs(model, tmp_path / name)
    assert len(str(refusal.value)) < 500


def test_files_that_cannot_be_read_are_refused(model, tmp_path):
    with pytest.raises(InputError, match="no file"): tasks.load(model, tmp_path / "none.csv")
    with pytest.raises(InputError, match="no file"): tasks.load(model, str(tmp_path / "none.jsonl"))
    (tmp_path / "a.csv").write_bytes(b"clean,corrupt,answer\n\xff\xfe,b,c\n")
    with pytest.raises(InputError, match="a.csv, line 2: not UTF-8"): tasks.load(model, tmp_path / "a.csv")
    (tmp_path / "folder.csv").mkdir()
    for path, message in (("folder.csv", "Is a directory"), ("a" * 300 + ".csv", "name too long"), ("", "expected a file that ends in")):
        with pytest.raises(InputError, match=message): tasks.from_pairs(model, tmp_path / path)


def test_unknown_names_are_refused_with_the_known_ones(model):
    with pytest.raises(InputError, match="unknown task 'iio': expected ioi, greater_than, .*, multiple_choice, or a file"): tasks.load(model, "iio")
    with pytest.raises(InputError, match="unknown corruption 'year_01'.*expected one of unrelated_names, swap_subject"):
        tasks.ioi(model, corruption="year_01")
    with pytest.raises(InputError, match="takes no option 'n'; expected corruption, seed, name"): tasks.load(model, "a.csv", n=3)
    for n in ((1, 1), (0, 1, 1), (1, 1, 1.5), 300):
        with pytest.raises(InputError, match="expected three sizes of at least 1"): tasks.ioi(model, n=n)
    for seed in (None, "3", 1.5, -1, True):
        with pytest.raises(InputError, match="seed=.*: expected a whole number"): tasks.ioi(model, n=SMALL, seed=seed)
        with pytest.raises(InputError, match="seed=.*: expected a whole number"): tasks.from_pairs(model, ROWS, seed=seed)
    with pytest.raises(InputError, match="expected a model from load_model or a tokenizer"): tasks.ioi("gpt2")


def test_different_last_tokens_warn_once(model):
    rows = [dict(r, corrupt=r["clean"].replace(" met", " found")) for r in ROWS]
    with pytest.warns(UserWarning, match="end in different tokens") as seen: task = tasks.from_pairs(model, rows)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task.batch("train"), task.batch("test"), tasks.ioi(model, n=SMALL)


def test_an_answer_without_its_space_warns(model):
    rows = [dict(r, answer=["s"], wrong=[]) for r in ROWS]
    with pytest.warns(UserWarning, match="pair 0: answer 's' would go on in the middle of the word 'met'; a new word is written ' s'"):
        tasks.from_pairs(model, rows)


def test_one_answer_may_be_a_text():
    assert Pair("a", "b", "c", ["d"]) == Pair("a", "b", ("c",), ("d",)) != Pair("a", "b", ("c",))


def test_batch_slices_and_moves(model):
    batch = tasks.ioi(model, n=SMALL).batch("train")
    rows = torch.tensor([3, 1])
    assert len(batch) == 20 and len(batch[2:5]) == 3 and len(batch[0]) == 1 and (batch[rows].clean == batch.clean[rows]).all()
    assert batch.to("meta").answer.device.type == "meta"


def test_a_batch_row_is_its_prompt_alone(model, tokenizer):
    task = tasks.ioi(model, n=SMALL)
    batch = task.batch("test")
    for pair, ids, mask in zip(task.test, batch.clean, batch.attention_mask):
        assert tokenizer.decode(ids[mask.bool()]) == pair.clean


@pytest.mark.parametrize("seed", range(10))
def test_random_tokens_keep_length_and_end(model, seed):
    prompt = "When Mary and John went to the store, John gave a drink to"
    read = lambda text: model.tokenizer(text).input_ids
    made = random_tokens(prompt, model, random.Random(seed))
    assert len(read(made)) == len(read(prompt)) and read(made)[-1] == read(prompt)[-1] and made != prompt


# --- prompts of different lengths

WORDS = st.lists(st.sampled_from(PLACES + THINGS), min_size=1, max_size=12)


@given(st.lists(WORDS, min_size=1, max_size=6), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_two_prompts_of_a_pair_always_stand_side_by_side(model, prompts, rng):
    text = lambda words: " ".join(("List:", *words))
    pairs = [Pair(text(words), text(rng.choices(THINGS, k=len(words))), " book") for words in prompts]
    batch = tasks.encode(pairs, model)
    assert batch.clean.shape == batch.corrupt.shape == batch.attention_mask.shape
    for i, pair in enumerate(pairs):
        real = batch.attention_mask[i].bool()
        assert real.sum() == len(model.tokenizer(pair.clean).input_ids) and real[-int(real.sum()):].all()
        assert model.tokenizer.decode(batch.clean[i][real]) == pair.clean and model.tokenizer.decode(batch.corrupt[i][real]) == pair.corrupt
        assert (batch.clean[i][~real] == batch.corrupt[i][~real]).all()
    rows = rng.sample(range(len(pairs)), len(pairs))
    assert (batch[rows].clean == tasks.encode([pairs[r] for r in rows], model).clean).all()


def test_pairs_of_different_length_answer_as_they_do_alone(model):
    task = tasks.from_pairs(model, [p for make in (tasks.ioi, tasks.capital, tasks.docstring) for p in make(model, n=(4, 4, 4)).test])
    sites, generator = find_sites(model), torch.Generator().manual_seed(0)
    masks = site_masks({level: torch.rand(shape, generator=generator) for level, shape in level_shapes(sites).items()}, sites)
    lengths = task.batch("train").attention_mask.sum(-1)
    assert len(lengths.unique()) > 2
    together = prepare(model, task.batch("train"))
    logits = together.logits(masks)
    for i, pair in enumerate(task.train):
        alone = prepare(model, tasks.encode([pair], model))
        assert alone.batch.attention_mask.all()
        assert torch.allclose(alone.full[0], together.full[i], atol=1e-4) and torch.allclose(alone.closed[0], together.closed[i], atol=1e-4)
        assert torch.allclose(alone.logits(masks)[0], logits[i], atol=1e-4)


def test_a_long_prompt_is_refused_by_what_the_model_takes(model):
    unlimited = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(model.tokenizer.backend_tokenizer.to_str()), unk_token="<unknown>")
    own = load_model()
    own.tokenizer = unlimited
    long = Pair("Then" + " Mary" * 64, "Then" + " John" * 64, " Anna")
    with pytest.raises(InputError, match="pair 0: the clean prompt has 65 tokens; this model takes at most 64"): tasks.encode([long], own)
    assert tasks.encode([long], unlimited).clean.shape == (1, 65)


def test_an_end_token_is_not_put_behind_a_prompt(tokenizer):
    from tokenizers import processors
    ends = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), eos_token="<end>",
                                   unk_token="<unknown>", pad_token="<end>")
    ends.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<end> $A <end>", special_tokens=[("<end>", 0)])
    with_end, plain = (tasks.ioi(t, n=SMALL).batch("test") for t in (ends, tokenizer))
    assert (with_end.clean[:, -plain.clean.shape[1]:] == plain.clean).all() and with_end.clean.shape[1] == plain.clean.shape[1] + 1


# --- answers

def test_sets_of_answers_count_as_a_whole(model):
    pairs = [Pair("The cats near the dog", "The cat near the dog", (" are",), (" is",)),
             Pair("Then Mary met", "Then John met", (" Anna", " Lucy", " Emma"), (" Paul", " Mark")), Pair("Then Mary met", "Then John met", " Anna")]
    batch = tasks.encode(pairs, model)
    assert batch.answer.shape == (3, 3) and batch.wrong.shape == (3, 2) and (batch.wrong[2] == -1).all()
    with torch.no_grad(): logits = answer_logits(model, batch.clean, batch.attention_mask)
    p = logits.softmax(-1)
    ids = lambda texts: [tasks.answer_id(t, model.tokenizer) for t in texts]
    for i, pair in enumerate(pairs):
        right, wrong = p[i, ids(pair.answer)].sum(), p[i, ids(pair.wrong)].sum()
        assert torch.isclose(probability_difference(logits, batch)[i], right - wrong, atol=1e-5)
        odds = right / (wrong if pair.wrong else 1 - right)
        assert torch.isclose(logit_difference(logits, batch)[i], odds.log(), atol=1e-3)
        assert is_right(logits, batch)[i] == (right > wrong if pair.wrong else p[i].argmax() in ids(pair.answer))
    assert torch.allclose(logit_difference(logits, batch)[1:2], logit_difference(logits[1:2], tasks.encode(pairs[1:2], model)))


@pytest.mark.parametrize("name", ("ioi", "capital", "docstring", "greater_than"))
def test_what_follows_the_answer_changes_nothing(model, name):
    for pair in tasks.load(model, name, n=(4, 1, 1)).train:
        text = pair.clean + pair.answer[0] + "."
        prompt = tasks.cut_before(text, pair.answer[0], model)
        assert prompt == pair.clean
        batch, ids = tasks.encode([pair], model), model.tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad(): whole = model(ids).logits[0, batch.clean.shape[1] - 1]
        with torch.no_grad(): assert torch.allclose(answer_logits(model, batch.clean, batch.attention_mask)[0], whole, atol=1e-4)


def test_places_that_cannot_be_cut_are_refused(model):
    text = "Then Mary met Anna and Anna."
    assert tasks.cut_before(text, " Anna", model, which=0) == "Then Mary met" and tasks.cut_before(text, " Anna", model) == "Then Mary met Anna and"
    for answer, which in ((" Anna", 2), (" Anna", -3), (" Paul", -1), ("", 0)):
        with pytest.raises(InputError, match=r"occurs [0-2] times in"): tasks.cut_before(text, answer, model, which)
    with pytest.raises(InputError, match="is not a token of its own"): tasks.cut_before(text, " An", model)
    with pytest.raises(InputError, match="is not a token of its own"): tasks.cut_before(text, "Anna", model)


def test_a_space_at_the_end_of_a_prompt_warns(model):
    rows = [dict(r, clean=r["clean"] + " ", corrupt=r["corrupt"] + " ", answer=["A"], wrong=[]) for r in ROWS]
    known = worded(["Then", *(f" {w}" for w in "Mary John Emma Mark Laura Tom Julia James Alice David met A".split())])
    with pytest.warns(UserWarning, match="pair 0: together with its answer 'A' the prompt is read as"): tasks.from_pairs(known, rows)


# --- chats

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


def talking(**settings):
    words = [f" {w}" for w in "Who met Mary Anna did".split()] + ["Who", "user", "assistant", "system"]
    tokenizer = worded(words, split=r"<s>| ?[A-Za-z]+|[0-9]| |[^A-Za-z0-9 ]", **settings)
    tokenizer.add_special_tokens(dict(bos_token="<s>"))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_a_question_is_put_into_the_template(tokenizer):
    plain = talking()
    assert tasks.chat("Who met Mary?", plain, " Anna did") == "<s>[user] Who met Mary? [assistant] Anna did"
    assert tasks.chat("Who met Mary?", plain, system="Who") == "<s>[system] Who [user] Who met Mary? [assistant]"
    with pytest.raises(InputError, match="no chat template"): tasks.chat("Who met Mary?", tokenizer)


def test_a_first_token_is_not_written_twice():
    from tokenizers import processors
    first = talking()
    first.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", first.bos_token_id)])
    ids = tasks.read_prompt(tasks.chat("Who met Mary?", first), first)
    assert ids.count(first.bos_token_id) == 1 and ids[0] == first.bos_token_id
    assert ids == first.apply_chat_template([dict(role="user", content="Who met Mary?")], add_generation_prompt=True).input_ids


SMOLLM2 = cache_folder() / "smollm2-135m-instruct"


@pytest.mark.skipif(not (SMOLLM2 / "tokenizer.json").exists(), reason="SmolLM2 has not been converted here")
def test_the_template_of_smollm2():
    from transformers import AutoTokenizer
    real = AutoTokenizer.from_pretrained(SMOLLM2)
    said = [dict(role="user", content="What is the capital of France?")]
    assert tasks.read_prompt(tasks.chat(said[0]["content"], real), real) == real.apply_chat_template(said, add_generation_prompt=True).input_ids
    pairs = [Pair(*(tasks.chat(f"What is the capital of {c}?", real, f"The capital of {c} is") for c in two), f" {CAPITALS[two[0]]}",
                  f" {CAPITALS[two[1]]}") for two in (("France", "Japan"), ("Japan", "Italy"), ("Italy", "France"))]
    task = tasks.from_pairs(real, pairs)
    tokens = real.convert_ids_to_tokens(task.batch("train").clean[0])
    assert tokens.count("<|im_start|>") == 3 and tokens[-1] == "\u0120is" and tokens.count("<|im_end|>") == 2
    assert all(len(tasks.load(real, name, n=(2, 2, 2)).test) == 2 for name in tasks.BUILT_IN)


# --- how many at once

def test_the_batch_is_smaller_where_memory_is_short(model, monkeypatch):
    examples = prepare(model, tasks.ioi(model, n=SMALL).batch("test"))
    each, seen = example_bytes(examples.host, examples.batch), []
    for free, size in ((1, 1), (10 * each, 5), (1 << 60, 32)):
        monkeypatch.setattr("mgprune.passes.free_bytes", lambda device: free)
        assert fitting_size(examples.host, examples.batch) == size
        hook = model.register_forward_pre_hook(lambda module, args, named: seen.append(len(named["input_ids"])), with_kwargs=True)
        again = prepare(model, examples.batch)
        hook.remove()
        assert max(seen) == min(size, len(again)) and torch.allclose(again.full, examples.full, atol=1e-4)
        seen.clear()


@pytest.mark.parametrize("attention", ("sdpa", "eager"))
@pytest.mark.parametrize("length", (8, 60))
def test_the_estimate_covers_what_a_pass_takes(attention, length):
    model = load_model()
    model.set_attn_implementation(attention)
    text = "List:" + " book" * (length - 2)
    batch = tasks.encode([Pair(text, text, " lamp")] * 16, model)
    prepare(model, batch)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as run: prepare(model, batch, batch_size=16)
    events = sorted((e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    held = torch.tensor([e.nbytes() for e in events]).cumsum(0)
    assert held.max() / 16 < example_bytes(host_of(model), batch) < 6 * held.max() / 16


def test_the_command_line_lists_tasks_and_corruptions(capsys):
    from mgprune.cli import main
    with pytest.raises(SystemExit): main(["discover", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for name, fitting in tasks.FITTING.items(): assert name in said and f"{name}: {' or '.join(fitting)}" in said


# --- pairs as people have them

def as_csv(separator=",", header=("clean", "corrupt", "answer", "wrong"), end="\n", quote='"', begin="", bar="|"):
    cells = [header, *([r["clean"], r["corrupt"], bar.join(r["answer"]), bar.join(r["wrong"])] for r in ROWS)]
    return begin + end.join(separator.join(f"{quote}{cell}{quote}" for cell in row) for row in cells) + end


WRITTEN = {
    "semicolons.csv": as_csv(";"), "tabs.csv": as_csv("\t", quote=""), "tabs.tsv": as_csv("\t"), "windows.csv": as_csv(end="\r\n"), "old.csv": as_csv(end="\r"),
    "mark.csv": "\ufeff" + as_csv(), "spaced.csv": as_csv(", "), "blank.csv": "\n\n" + as_csv().replace("\n", "\n\n") + ",,,\n",
    "filled.csv": as_csv(quote="").replace("\n", ",,\n"), "named.csv": as_csv(header=(" Clean", "CORRUPTED", "correct", "incorrect"), quote=""),
    "printed.csv": as_csv().replace('" Anna| Lucy"', "\"[' Anna', ' Lucy']\""), "index.csv": as_csv(header=("", "clean", "corrupt", "answer", "wrong"), quote="").replace("\nThen", "\n7,Then"),
    "lines.jsonl": "\r\n".join(map(json.dumps, ROWS)), "list.jsonl": json.dumps(ROWS), "list.json": json.dumps(ROWS, indent=1), "lines.json": "\n".join(map(json.dumps, ROWS)),
    "others.jsonl": "\n".join(json.dumps(dict(clean=r["clean"], corrupted=r["corrupt"], answers=r["answer"], wrong_answers=r["wrong"])) for r in ROWS),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_file_is_read_as_people_write_it(tmp_path, name):
    (tmp_path / name).write_bytes(WRITTEN[name].encode())
    assert tasks.read_pairs(tmp_path / name) == tasks.read_pairs(ROWS)


def test_a_separator_may_stand_in_a_quoted_cell(tmp_path):
    for separator in ",;\t":
        (tmp_path / "a.csv").write_text(f'clean{separator}corrupt{separator}answer\n"a{separator} ""b""" {separator} "c"{separator} d')
        assert tasks.read_pairs(tmp_path / "a.csv") == (Pair(f'a{separator} "b"', "c", " d"),)


def test_a_home_folder_may_be_written_short(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.jsonl", ROWS)
    assert tasks.read_pairs("~/a.jsonl") == tasks.read_pairs(ROWS)


def test_every_kind_of_list_gives_the_same_pairs(model, tmp_path):
    import numpy as np
    import pandas as pd
    listed, frame = tasks.read_pairs(ROWS), pd.DataFrame(ROWS)
    frame.to_csv(tmp_path / "frame.csv")
    frame.to_json(tmp_path / "frame.json", orient="records")
    for rows in ((r for r in ROWS), tuple(ROWS), np.array(ROWS, dtype=object), listed, frame, frame.assign(answer=frame.answer.map(np.array)),
                 pd.read_csv(tmp_path / "frame.csv").drop(columns=["answer", "wrong"]).join(frame[["answer", "wrong"]]), tmp_path / "frame.csv", tmp_path / "frame.json"):
        assert tasks.read_pairs(rows) == listed
    for nothing in (None, float("nan"), pd.NA, [], ""):
        assert tasks.read_pairs([dict(r, wrong=nothing) for r in ROWS])[0].wrong == ()
    for odd in (listed[0], ROWS[0], dict(clean=["a"]), b"a", {*listed}, 3, None, model.config, np.array(3), "folder", len):
        with pytest.raises(InputError): tasks.read_pairs(odd)
    with pytest.raises(InputError, match="both the field clean"): tasks.read_pairs(pd.concat([frame, frame], axis=1))


def test_token_ids_become_the_tokens(model, tmp_path):
    listed = [Pair(r["clean"], r["corrupt"], " Anna", " Paul") for r in ROWS]
    anna, paul = (tasks.answer_id(text, model.tokenizer) for text in (" Anna", " Paul"))
    lines = [f'{i},{p.clean},{p.corrupt},not used,{anna},{paul}' for i, p in enumerate(listed)]
    (tmp_path / "eap.csv").write_text("\n".join([",clean,corrupted,corrupted_hard,correct_idx,incorrect_idx", *lines]))
    assert tasks.read_pairs(tmp_path / "eap.csv", model) == tuple(listed)
    assert tasks.from_pairs(model, tmp_path / "eap.csv") == tasks.from_pairs(model, listed, name="eap")
    with pytest.raises(InputError, match=r"read_pairs\(source, model\)"): tasks.read_pairs(tmp_path / "eap.csv")
    for wrong in (-1, 633, 1.5, True, "x", None, 10 ** 4000):
        with pytest.raises(InputError): tasks.read_pairs([dict(clean="a", corrupt="b", correct_idx=wrong, incorrect_idx=paul)], model)


def test_records_of_mib_are_read_or_explained():
    record = dict(prompt="Then Mary met", choices=["Mary", "Anna"], answerKey=1, metadata=dict(subject="Mary", indirect_object="Anna"),
                  s2_io_flip_counterfactual=dict(prompt="Then John met"), abc_counterfactual=dict(prompt="Then Tom met"))
    assert tasks.read_pairs([record]) == (Pair("Then Mary met", "Then John met", " Anna", " Mary"),)
    del record["s2_io_flip_counterfactual"]
    with pytest.raises(InputError, match="counterfactuals abc_counterfactual: choose one"): tasks.read_pairs([record])


# --- words that the tokenizer spells out

@pytest.mark.parametrize("form", ["list", "csv", "jsonl"])
def test_words_in_letters_are_warned_about_however_the_pairs_come(model, tmp_path, form):
    rows = [dict(clean=f"Today {a} put on a hauberk, and", corrupt=f"Today {b} put on a hauberk, and", answer=" she", wrong=" he")
            for a, b in (("Mary", "John"), ("Anna", "Tom"), ("Emma", "Paul"))]
    given, path = rows, tmp_path / f"armour.{form}"
    if form == "csv": path.write_text("\n".join(["clean;corrupt;answer;wrong", *(";".join(row.values()) for row in rows)]))
    if form == "jsonl": path.write_text("\n".join(map(json.dumps, rows)))
    if form != "list": given = path
    with pytest.warns(UserWarning, match="3 of 3 pairs: the tokenizer spells words .*'(put|hauberk,)'.*word_pool"): tasks.from_pairs(model, given)


@pytest.mark.parametrize("text", ["Today Mary went to the store because", "When {} came to the museum,", "A B C D {} said", "Today {} said XYZ,"])
def test_other_prompts_are_not_called_spelt_out(model, text):
    text = text if "{}" in text else text.replace("Mary", "{}")
    rows = [dict(clean=text.format(a), corrupt=text.format(b), answer=" she", wrong=" he") for a, b in (("Mary", "John"), ("Anna", "Tom"), ("Emma", "Paul"))]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        tasks.from_pairs(model, rows)
    assert not any("spells words" in str(w.message) for w in seen)


# --- many bad pairs, and pairs that show nothing

def test_bad_pairs_are_all_counted_and_can_be_left_out(model):
    bad = [dict(ROWS[0], clean="Then Zoe met"), dict(ROWS[1], answer=" Annabel"), dict(ROWS[2], answer=" Annabel"), 3]
    with pytest.raises(InputError) as refusal: tasks.from_pairs(model, [*ROWS, *bad])
    said = str(refusal.value)
    assert said.startswith("4 of 9 pairs cannot be used (2 with an answer that is not one token, 1 with prompts of different length, 1 with what")
    assert "pair 5: clean and corrupt" in said and "pair 6: answer ' Annabel'" in said and "and 2 more" in said and "skip=True" in said and len(said) < 500
    with pytest.warns(UserWarning, match="left out: 4 of 9 pairs") as seen: task = tasks.from_pairs(model, [*ROWS, *bad], skip=True)
    assert len(seen) == 1 and task == tasks.from_pairs(model, ROWS)
    with pytest.raises(InputError, match="4 of 4 pairs"), warnings.catch_warnings(): tasks.from_pairs(model, bad, skip=True)
    with pytest.raises(InputError, match="2 of 2 pairs"): tasks.encode([Pair("a", "Then Mary", " Annabel")] * 2, model)


def test_a_file_can_be_read_without_its_bad_lines(model, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([*map(json.dumps, ROWS), "{", json.dumps(dict(ROWS[0], answer=" Annabel"))]))
    with pytest.raises(InputError, match="2 of 7 pairs cannot be used(.|\n)*a.jsonl, line 6: no JSON object(.|\n)*a.jsonl, line 7: answer"): tasks.load(model, path)
    with pytest.warns(UserWarning, match="left out: 2 of 7"): assert tasks.load(model, path, skip=True) == tasks.from_pairs(model, ROWS, name="a")


@pytest.mark.parametrize("change, message", [
    (lambda rows: [dict(r, corrupt=r["clean"]) for r in rows[:2]] + rows[2:], "2 of 5 pairs: clean and corrupt prompt are the same"),
    (lambda rows: rows + rows[:1], "1 of 6 pairs: another pair is the same in everything"),
    (lambda rows: rows + [dict(rows[0], clean="Then John met", corrupt="Then Mary met")], "2 of 6 pairs: another pair asks the corrupt prompt for the same answer"),
    (lambda rows: rows + [dict(rows[0], answer=" Emma")], "2 of 6 pairs: another pair gives the clean prompt other answers")])
def test_pairs_that_are_hardly_meant_are_counted(model, change, message):
    with pytest.warns(UserWarning, match=message) as seen: tasks.from_pairs(model, change(ROWS))
    assert len(seen) == 1


def test_equal_prompts_alone_are_refused(model):
    with pytest.raises(InputError, match="the same in all 5 pairs"): tasks.from_pairs(model, [dict(r, corrupt=r["clean"]) for r in ROWS])


def test_a_start_token_that_stands_twice_warns(tokenizer):
    from tokenizers import processors
    first = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), bos_token="<end>", unk_token="<unknown>")
    first.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 0)])
    rows = [dict(r, clean="<end>" + r["clean"], corrupt="<end>" + r["corrupt"]) for r in ROWS]
    with pytest.warns(UserWarning, match="5 of 5 pairs: the start token stands twice"): tasks.from_pairs(first, rows)


# --- tokens and the model's own

def test_a_token_counts_once_as_an_answer(model):
    batch = tasks.encode([Pair("Then Mary met", "Then John met", (" Anna", " Anna", " Lucy"), (" Paul",) * 3)], model)
    assert batch.answer.shape == (1, 2) and batch.wrong.shape == (1, 1)


def test_a_character_of_several_tokens_is_one_piece():
    from tokenizers import decoders
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = PreTrainedTokenizerFast(tokenizer_object=core)
    assert tasks.pieces(letters, "\u7389 \u00fc\U0001f600a") == ("\u7389", " ", "\u00fc", "\U0001f600", "a")
    with pytest.raises(InputError, match="' \u7389\u7389' is 7 .*, ' \u00e4\u00e4' is 5"): tasks.encode([Pair("a \u7389\u7389", "a \u00e4\u00e4", "b")], letters)
    with pytest.raises(InputError) as refusal: tasks.encode([Pair("\u7389\u7389", "\u7389\u00e4", "\u7389")], letters)
    assert "\u7389" in str(refusal.value) and "\u00e4" in str(refusal.value) and "\u0120" not in str(refusal.value) and "\ufffd" not in str(refusal.value)


def test_padding_is_a_token_that_the_model_has(tokenizer):
    own, added = load_model(), PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), unk_token="<unknown>")
    added.add_special_tokens({"pad_token": "[PAD]", "additional_special_tokens": ["[NEW]"]})
    own.tokenizer = added
    pairs = [Pair("Then Mary met", "Then John met", " Anna"), Pair("When Mary and John met", "When Anna and John met", " Anna")]
    batch = tasks.encode(pairs, own)
    assert batch.clean.max() < own.config.vocab_size and (batch.attention_mask[0] == 0).sum() == 2
    with torch.no_grad(): alone, together = (answer_logits(own, b.clean, b.attention_mask)[0] for b in (tasks.encode(pairs[:1], own), batch))
    assert torch.allclose(alone, together, atol=1e-4)
    for bad in (Pair("Then[NEW] met", "Then John met", " Anna"), Pair("Then Mary met", "Then John met", "[NEW]")):
        with pytest.raises(InputError, match="token 634 in .* is not among the 633 that this model has"): tasks.encode([bad], own)


def test_words_are_sorted_by_whether_they_are_one_token(model):
    assert tasks.one_token(model, ["Mary", " John", "Annabel", "Zoe", "Mary"]) == (" Mary", " John")
    for bad in ("Mary", [3], None, ["\ud800"]):
        with pytest.raises(InputError): tasks.one_token(model, bad)


# --- anything at all

ODD = st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.integers(10 ** 20, 10 ** 400), st.floats(), st.text(max_size=6), st.binary(max_size=3), st.just("\ud800"), st.just(len),
                st.just("x" * 10 ** 5), st.builds(object), st.lists(st.one_of(st.integers(-2, 2), st.text(max_size=3), st.none()), max_size=3), st.just(torch.zeros(2)),
                st.tuples(st.integers(), st.text(max_size=2)), st.dictionaries(st.sampled_from(["clean", "corrupt", "answer", "first", "name", "x"]), st.text(max_size=3), max_size=3))
SLOTS = dict(first="Mary", second="John", giver="John", name="Mary", century="17", tens="1", units="2", subject="cat", counterpart="cats", asked="a", other="b", right="a", listed0="a", listed1="b")


def calls(model):
    "Good arguments for every public function and dataclass"
    pair, task, rng = Pair("Then Mary met", "Then John met", " Anna"), tasks.ioi(model, n=(1, 1, 1)), random.Random(0)
    parts = {split: getattr(task, split) for split in tasks.SPLITS}
    return [
        (Pair, dict(clean="a", corrupt="b", answer="c", wrong="d")), (Task, dict(name="a", corruption="b", seed=0, tokenizer=model.tokenizer, **parts)), (task.batch, dict(split="test")),
        (tasks.read_prompt, dict(text="Then", tokenizer=model.tokenizer)), (tasks.answer_id, dict(text=" Mary", tokenizer=model.tokenizer)),
        (tasks.pieces, dict(model=model, text="Then")), (tasks.one_token, dict(model=model, words=["Mary"], before=" ")), (tasks.encode, dict(pairs=[pair], model=model)),
        (tasks.cut_before, dict(text="Then Mary met", answer=" met", model=model, which=-1)), (tasks.chat, dict(question="a", model=talking(), reply="b", system="c")),
        (partial(templated, draw=some_person, corruption=CORRUPTIONS["other_gender"]), dict(
            {name: OWN[name] for name in ("name", "templates")}, model=model, n=(1, 1, 1), seed=0, words={}, needs={}, asked=None, letters=False)),
        (Drawn, dict(slots=dict(name="Mary"), answer="a", wrong="b", key="c")),
        (tasks.read_pairs, dict(source=ROWS, model=model, skip=False)), (tasks.from_pairs, dict(model=model, pairs=ROWS, name="a", corruption="b", seed=0, skip=False)),
        (tasks.load, dict(model=model, name="ioi", n=(1, 1, 1), seed=0, corruption="swap_subject")), (tasks.word_pool, dict(model=model.tokenizer)),
        *((make, dict(model=model, corruption=tasks.FITTING[name][0], n=(1, 1, 1), seed=0)) for name, make in tasks.BUILT_IN.items()),
        *((change, dict(slots=SLOTS, pool=dict(tasks.word_pool(model)), rng=rng)) for change in CORRUPTIONS.values()),
        (corruption_named, dict(name="year_01", allowed=["year_01"])), (random_tokens, dict(prompt="Then Mary met", model=model, rng=rng, positions=[1], tries=3))]


@pytest.fixture(scope="module")
def functions(model): return calls(model)


@given(st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_argument_gives_a_result_or_a_refusal(functions, data):
    function, arguments = functions[data.draw(st.integers(0, len(functions) - 1))]
    changed = {name: data.draw(ODD) for name in data.draw(st.lists(st.sampled_from([*arguments]), min_size=1, max_size=2, unique=True))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try: function(**dict(arguments, **changed))
        except InputError as refusal: assert len(str(refusal)) < 700


@given(st.lists(st.one_of(ODD, st.fixed_dictionaries(dict(clean=st.one_of(ODD, st.just("Then Mary met")), corrupt=ODD, answer=ODD), optional=dict(wrong=ODD)))), st.booleans())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_row_gives_a_result_or_a_refusal(model, rows, skip):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try: tasks.from_pairs(model, [*ROWS, *rows], skip=skip)
        except InputError as refusal: assert rows and len(str(refusal)) < 700


@given(st.sampled_from([".csv", ".tsv", ".json", ".jsonl"]), st.one_of(st.binary(max_size=80), st.text(st.sampled_from('clean,corupt;answer\n\r\t "\'|[]{}:\\0'), max_size=80).map(
    lambda text: b"clean,corrupt,answer\n" + text.encode())))
@example(".csv", b",")
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_gives_a_result_or_a_refusal(tmp_path, ending, content):
    path = tmp_path / f"a{ending}"
    path.write_bytes(content)
    try: tasks.read_pairs(path)
    except InputError as refusal: assert "a" + ending in str(refusal) and len(str(refusal)) < 700
