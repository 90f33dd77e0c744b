"Pairs, tasks and their refusals: more cases than a reader of the notebooks wants"
import csv
import json
import random
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mgprune import tasks
from mgprune.corruption import CORRUPTIONS, random_tokens
from mgprune.models import InputError, load_model
from mgprune.tasks import Batch, Pair, Task

BUILT_IN = [("ioi", "unrelated_names"), ("ioi", "swap_subject"), ("greater_than", "year_01"), ("greater_than", "decade_start"),
            ("gendered_pronoun", "other_gender"), ("gendered_pronoun", "neutral_word")]
SMALL = (20, 10, 20)
ROWS = [dict(clean=f"Then {a} met", corrupt=f"Then {b} met", answer=[" Anna", " Lucy"], wrong=[" Paul"])
        for a, b in (("Mary", "John"), ("Emma", "Mark"), ("Laura", "Tom"), ("Julia", "James"), ("Alice", "David"))]


@pytest.fixture(scope="module")
def model(): return load_model()


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
    texts = " ".join(tasks.IOI_TEMPLATES + tasks.YEAR_TEMPLATES + tasks.PRONOUN_TEMPLATES + ("she he",))
    pools = (tasks.FEMALE, tasks.MALE, tasks.NEUTRAL, tasks.PLACES, tasks.THINGS, tasks.EVENTS, tasks.TRAITS, tasks.ROLES)
    return [f" {w}" for w in texts.split() if w.isalpha()] + [f" {w}" for words in pools for w in words]


@pytest.mark.parametrize("name, corruption", BUILT_IN)
def test_built_in_task(model, name, corruption):
    task = tasks.load(model, name, corruption=corruption)
    assert [len(part) for part in splits(task)] == [2048, 512, 512]
    prompts = [{p.clean for p in part} for part in splits(task)]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 3072
    assert all(p.clean != p.corrupt for part in splits(task) for p in part)
    batch = task.batch("test")
    assert isinstance(batch, Batch) and batch.clean.shape == batch.corrupt.shape == batch.attention_mask.shape
    assert (batch.clean[:, -1] == batch.corrupt[:, -1]).all() and batch.attention_mask[:, -1].all()
    assert (batch.attention_mask.diff(dim=1) >= 0).all()  # padding on the left only
    assert (batch.answer[:, 0] >= 0).all() and (batch.wrong[:, 0] >= 0).all()


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


@pytest.mark.parametrize("name, corruption", BUILT_IN)
def test_the_model_prefers_the_right_answers(model, name, corruption):
    batch = tasks.load(model, name, corruption=corruption, n=(1, 1, 64)).batch("test")
    positions = (batch.attention_mask.cumsum(-1) - 1).clamp(0)
    with torch.no_grad(): p = model(batch.clean, attention_mask=batch.attention_mask, position_ids=positions).logits[:, -1].softmax(-1)
    total = lambda ids: p.gather(1, ids.clamp(0)).masked_fill(ids < 0, 0).sum(1)
    assert (total(batch.answer) > total(batch.wrong)).float().mean() >= .98


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
    assert set(CORRUPTIONS) == {corruption for _, corruption in BUILT_IN}


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
    with pytest.raises(InputError, match="fewer than three of the built-in words for .*female.*from_pairs"): tasks.ioi(worded([]))


def test_few_names_give_few_prompts():
    few = worded([w for w in every_word() if w.strip() not in tasks.FEMALE[3:] + tasks.MALE[3:]])
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
            out = csv.DictWriter(file, tasks.FIELDS)
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
    parts = tasks._divide(pairs, seed)
    prompts = [{p.clean for p in part} for part in parts]
    assert all(prompts) and sum(map(len, prompts)) == len(set.union(*prompts))
    assert sorted(p.corrupt for part in parts for p in part) == sorted(p.corrupt for p in pairs)
    assert parts == tasks._divide(pairs, seed)


REFUSED = [
    (dict(corrupt="Then Mary and John met"), r"pair 2: clean and corrupt prompt must have the same number of tokens(.|\n)*clean: 3 .*\n?.*corrupt: 5 "),
    (dict(answer=[" Annabel"]), r"pair 2: answer ' Annabel' is not one token but \[.*space before the word"),
    (dict(wrong=[" Annabel"]), "pair 2: answer ' Annabel' is not one token"),
    (dict(answer=[]), "pair 2: answer is missing or empty"),
    (dict(answer=[""]), "pair 2: answer '' is not one token"),
    (dict(wrong=[" Lucy"]), r"pair 2: \[' Lucy'\] is given as right and as wrong"),
    (dict(clean=""), "pair 2: clean is missing or empty"),
    (dict(clean=3), "pair 2: expected a text in quotes as clean, got 3"),
    (dict(answer=3), "pair 2: expected a text in quotes or a list of them"),
    (dict(answer=[3]), "pair 2: expected a text in quotes or a list of them"),
    (dict(clean="Then Mary met\u00e9", corrupt="Then John met\u00e9"), "pair 2: the tokenizer cannot read all of"),
    (dict(clean="Then" + " Mary" * 64, corrupt="Then" + " John" * 64), "pair 2: the clean prompt has 65 tokens; this model takes at most 64"),
    (dict(worng=" Anna"), "pair 2: unknown field 'worng'; expected clean, corrupt, answer, wrong"),
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
    ("a.csv", "clean,answer\na,b\n", "a.csv, line 2: corrupt is missing"),
    ("a.csv", "clean,corrupt,answer,wrong\nOh, Mary,Oh John, Anna, Paul\n", "a.csv, line 2: more cells than columns"),
    ("a.csv", 'clean,corrupt,answer,wrong\na,b,[c, d\n', "a.csv, line 2: '\\[c' is no JSON list|more cells"),
    ("a.csv", "prompt,corrupt,answer\na,b,c\n", "a.csv, line 2: unknown field 'prompt'"),
    ("a.txt", "a", "ends in .csv or .jsonl"),
])
def test_a_bad_file_is_refused_by_its_line(model, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message): tasks.from_pairs(model, tmp_path / name)


def test_files_that_cannot_be_read_are_refused(model, tmp_path):
    with pytest.raises(InputError, match="no file"): tasks.load(model, tmp_path / "none.csv")
    with pytest.raises(InputError, match="no file"): tasks.load(model, str(tmp_path / "none.jsonl"))
    (tmp_path / "a.csv").write_bytes(b"clean,corrupt,answer\n\xff\xfe,b,c\n")
    with pytest.raises(InputError, match="not UTF-8"): tasks.load(model, tmp_path / "a.csv")


def test_unknown_names_are_refused_with_the_known_ones(model):
    with pytest.raises(InputError, match="unknown task 'iio': expected ioi, greater_than, gendered_pronoun, or a file"): tasks.load(model, "iio")
    with pytest.raises(InputError, match="unknown corruption 'year_01'.*expected one of unrelated_names, swap_subject"):
        tasks.ioi(model, corruption="year_01")
    with pytest.raises(InputError, match="takes no option 'n'; expected corruption, seed, name"): tasks.load(model, "a.csv", n=3)
    for n in ((1, 1), (0, 1, 1), (1, 1, 1.5), 300):
        with pytest.raises(InputError, match="expected three sizes of at least 1"): tasks.ioi(model, n=n)
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
