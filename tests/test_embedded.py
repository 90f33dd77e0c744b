"The small model that comes with the package, checked from its files"
import random
import string
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

import mgprune
from mgprune import embedded
from mgprune.models import load_model

FOLDER = Path(mgprune.__file__).parent / "data" / "embedded"
MODEL = load_model()


def test_held_out_accuracy_of_the_shipped_file():
    accuracy = embedded.held_out_accuracy(MODEL, MODEL.tokenizer, count=300, seed=7)
    assert set(accuracy) == {"receiver", "later year", "pronoun"} and min(accuracy.values()) >= .98


@pytest.mark.parametrize("kind, least", [(embedded.plain_pronoun, .98), (embedded.agreement, .98), (embedded.capital, .98),
                                         (embedded.counting, .95), (embedded.documentation, .98), (embedded.repetition, .7)])
def test_other_sentences(kind, least): assert embedded.answer_accuracy(MODEL, MODEL.tokenizer, kind, count=100, seed=7) >= least


def test_the_card_says_what_the_file_can_do():
    card = (FOLDER / "README.md").read_text()
    for task in ("receiver", "later year", "pronoun"):
        value = float(card.split(f"| {task} |")[1].split("|")[0])
        assert value >= .98
    assert f"{MODEL.num_parameters():,} parameters" in card and f"{len(MODEL.tokenizer)} tokens" in card


def test_files_are_small_and_half_precision():
    files = list(FOLDER.iterdir())
    assert sorted(f.name for f in files) == sorted(embedded.FILES)
    assert sum(f.stat().st_size for f in files) <= 2.5e6
    with safe_open(FOLDER / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float16}
    assert {p.dtype for p in MODEL.parameters()} == {torch.float32}


def test_it_opens_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    assert type(model) is GPT2LMHeadModel and model.config.vocab_size == len(tokenizer)
    assert tokenizer.padding_side == "left" and set(tokenizer("Then Mary met")) == {"input_ids", "attention_mask"}
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == model.config.pad_token_id == model.config.bos_token_id


def test_the_tokenizer_can_be_built_again():
    assert embedded.build_tokenizer().get_vocab() == MODEL.tokenizer.get_vocab()


@given(st.text("".join(map(chr, range(128)))))
@settings(max_examples=200, deadline=None)
def test_any_ascii_text_comes_back(text):
    assume("<unknown>" not in text)  # whoever writes the name of that token gets it
    ids = MODEL.tokenizer(text).input_ids
    assert MODEL.tokenizer.decode(ids) == text and MODEL.tokenizer.unk_token_id not in ids


@given(st.lists(st.sampled_from(sorted(MODEL.tokenizer.get_vocab()) + list(string.punctuation))))
@settings(max_examples=100, deadline=None)
def test_any_words_of_the_language_come_back(words):
    text = "".join(words)
    assert MODEL.tokenizer.decode(MODEL.tokenizer(text).input_ids) == text


def test_every_name_is_one_token():
    for name in embedded.NAMES["names"]: assert len(MODEL.tokenizer(f" {name}").input_ids) == 1
    assert len(embedded.NAMES["names"]) == 100


@given(st.integers())
@settings(max_examples=50, deadline=None)
def test_held_out_examples_are_never_trained_on(seed):
    rng = random.Random(seed)
    people = embedded.NAMES["names"]
    for sentence in embedded.receiver_twins(rng) + [embedded.unrelated_giver(rng)]:
        mentioned = [w for w in dict.fromkeys(sentence[0].replace(",", " ").replace(".", " ").split()) if w in people]
        assert not embedded.held_out(*mentioned[:2], share=.1)
    year = "".join(filter(str.isdigit, embedded.later_year(rng)[0]))[:4]
    assert year.endswith(("0", "01")) or not embedded.held_out(year[:2], year[2:], share=.15)
    assert not set(embedded.tag_pronoun(rng)[0].replace(",", " ").split()) & set(embedded.GENDER_UNSEEN)


def test_an_exam_holds_only_what_was_held_out():
    for text, _, _ in embedded.exam("pronoun", random.Random(0), 50):
        assert set(text.replace(",", " ").split()) & set(embedded.GENDER_UNSEEN)
    for _, right, wrong in embedded.exam("receiver", random.Random(0), 50):
        assert embedded.held_out(right[0].strip(), wrong[0].strip(), share=.1)
    for text, right, wrong in embedded.exam("later year", random.Random(0), 50):
        year = "".join(filter(str.isdigit, text))
        assert embedded.held_out(year[:2], year[2:4], share=.15) and len(right) + len(wrong) == 100 and max(wrong) == year[2:4] < min(right)


def test_a_few_steps_lower_the_loss_and_repeat():
    runs = []
    for _ in range(2):
        losses = []
        embedded.train(MODEL.tokenizer, seed=3, steps=8, batch=24, on_step=lambda step, model, loss: losses.append(loss))
        runs.append(losses)
    assert runs[0] == runs[1] and runs[0][-1] < runs[0][0]


def test_a_model_that_learned_too_little_is_not_written(tmp_path):
    said = []
    with pytest.raises(RuntimeError, match="no seed from 5 to 6 reached 0.98"):
        embedded.make(tmp_path / "model", seed=5, steps=2, tries=2, count=20, say=said.append)
    assert len(said) == 2 and not (tmp_path / "model").exists()


def test_corrupt_prompts_leave_the_model_undecided():
    prompts = ["When Mary and John went to the store, Paul gave a drink to", "So someone is such a great friend, isn't"]
    p = embedded.next_probabilities(MODEL, MODEL.tokenizer, prompts)
    for row, words in zip(p, ([" Mary", " John"], [" she", " he"])):
        both = row[MODEL.tokenizer.convert_tokens_to_ids(words)]
        assert both.sum() > .7 and both.max() < .75
