"""What rows say: questions and captions about things, filled into the templates of a suite, and a text taken apart as MMEB-V2 stores it."""

from __future__ import annotations

from vlm2vec.data.made.pictures import Thing
from vlm2vec.data.sampler import random_words
from vlm2vec.prompts import PLACEHOLDER
from vlm2vec.suite import SetSpec

TEXT = "{text}"
PLACES = ("Ålesund", "Łódź", "São Tomé", "Kyōto 東京", "Київ", "القاهرة", "Zürich 🏔️", "Nairobi", "Çanakkale", "Hà Nội", "Ærø", "Montréal")
SIDES = ("left", "right")
QUESTIONS = (
    "What is on the {side}?",
    "What can be seen on the {side} side?",
    "Look at the {side} half: what does it show?",
    "Which things are at the {side}?",
)
FILLER = " The day was long, the road was quiet and nobody had anything to add to it."


def template(text: str) -> str:
    """A template as a suite writes it, with its newlines."""
    return text.replace("\\n", "\n")


def fill(text: str, words: str) -> str:
    """A row's text: `words` in the place of {text}."""
    return template(text).replace(TEXT, words)


# -- words -------------------------------------------------------------------------------------------------------------------------------


def sentence(words: str) -> str:
    return words[:1].upper() + words[1:]


def question(name: str, side: int) -> str:
    """How the set `name` asks for one half of a picture."""
    return QUESTIONS[int(random_words(1, "question", name)[0] % len(QUESTIONS))].format(side=SIDES[side])


def dialogue(thing: Thing) -> str:
    turns = [("how many are there", thing.words.split()[0]), (f"what shape {'is it' if thing.count == 1 else 'are they'}", thing.kind)]
    turns += [("what colour", thing.colour)] + ([("on what", thing.ground)] if thing.ground else [])
    return "\n".join(f"Q:{asked}\nA:{answer}" for asked, answer in turns)


def place(index: int) -> str:
    """Where a picture was taken; nothing in it shows that."""
    return PLACES[index % len(PLACES)]


def long(words: str) -> str:
    """`words` and some 22,000 more characters."""
    return words + FILLER * 300


# -- the form of MMEB-V2 -----------------------------------------------------------------------------------------------------------------


def family(spec: SetSpec) -> str:
    """Which of the five rules of MMEB-V2 composes the rows of a set: cls, qa, i2t, t2i or i2i_vg."""
    if spec.meta_task != "retrieval":
        return {"classification": "cls", "vqa": "qa", "grounding": "i2i_vg"}[spec.meta_task]
    return {("I", "T"): "i2t", ("T", "I"): "t2i", ("T", "I+T"): "t2i"}.get((spec.query_modality, spec.target_modality), "i2i_vg")


def taken_apart(text: str, words: str) -> tuple[str, str]:
    """(instruction, text) of a filled template: quotes around the words go with them, the space before them and the newlines to neither."""
    head, found, tail = template(text).partition(TEXT)
    if not found:
        return head.rstrip("\n"), ""
    quote = '"' if head.endswith('"') and tail.startswith('"') else ""
    return head.removesuffix(quote).removesuffix(" "), f"{quote}{words}{quote}"


def query_parts(spec: SetSpec, words: str) -> tuple[str, str]:
    """(qry_inst, qry_text). Two of the rules put the newline after the placeholder themselves, so there a space stands for it."""
    instruction, text = taken_apart(spec.query, words)
    if family(spec) in ("qa", "i2i_vg"):
        instruction = instruction.replace(f"{PLACEHOLDER}\n", f"{PLACEHOLDER} ")
    return instruction, text


def target_parts(spec: SetSpec, words: str) -> tuple[str, str]:
    """(tgt_inst, an entry of tgt_text). The rule i2i_vg adds no newline to an instruction without text, so there it is stored."""
    if spec.target_modality == "T":
        return "", words
    instruction, text = taken_apart(spec.target, words)
    return (template(spec.target) if not text and family(spec) == "i2i_vg" else instruction), text


# -- diverse instructions ----------------------------------------------------------------------------------------------------------------

# {task}: the instruction without its placeholder and final punctuation
PARAPHRASES = (
    "{image}\n{task}{stop}",
    "{task} {image}{stop}",
    "Look at {image} and do this - {task}{stop}",
    "Task for {image}\n{task}{stop}",
    "{task}, given {image}{stop}",
)
CLASSIFY = f"Represent {PLACEHOLDER} for classification.\n"


def diverse(text: str, words: str, number: int) -> str:
    """A training query's text with its instruction in other words: the placeholder may be anywhere, the row's own words stay."""
    head, found, tail = template(text).partition(TEXT)
    if PLACEHOLDER not in head:
        return f"{head if number % 2 else 'For the task at hand, ' + head[:1].lower() + head[1:]}{words}{tail}"
    if not found and "classification" in head and number % 2:
        return CLASSIFY
    asked = head.replace(f"{PLACEHOLDER}\n", "").rstrip('\n" ')
    task = asked.rstrip(".:")
    stop = asked[len(task) :] + head[len(head.rstrip('\n" ')) :].rstrip("\n")
    return PARAPHRASES[number % len(PARAPHRASES)].format(image=PLACEHOLDER, task=task, stop=stop) + (words + tail if found else "\n")
