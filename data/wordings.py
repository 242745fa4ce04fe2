"""Sentences for questions and reasoning. Each list holds equivalent wordings; one is drawn at random.

Slots: {x}, {y} labels of sounds, {k} an ordinal, {n} a number of times, {t} a number of seconds. The grammar
holds for singular, plural and mass labels alike ("the slow knocks", "the running water"). A citation is
written between a lead and a tail. No lead names a sound that the question has not named: what a span holds
is said after its tag, and the tail starts with a comma or a lower-case word, so that the sentence runs on
over inserted audio (`R_consist` in the paper punishes anything else).
"""

from __future__ import annotations

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")

QUESTIONS: dict[str, tuple[str, ...]] = {
    "kth": (
        "Which sound is the {k} one?",
        "Which sound comes {k} in the recording?",
        "What is the {k} sound?",
        "Listening in order, which sound is number {n}?",
    ),
    "last": (
        "Which sound is the last one?",
        "Which sound comes last?",
        "What is the final sound?",
        "With which sound does the recording end?",
    ),
    "after": (
        "Which sound comes right after the {x}?",
        "What is heard right after the {x}?",
        "Which sound follows the {x}?",
        "Once the {x} is over, what is the next sound?",
    ),
    "before": (
        "Which sound comes right before the {x}?",
        "What is heard right before the {x}?",
        "Which sound leads directly into the {x}?",
        "What is the last sound heard before the {x}?",
    ),
    "count_label": (
        "How many times do you hear the {x}?",
        "How often does the recording bring the {x}?",
        "Count the {x}: how many separate times is that sound heard?",
    ),
    "count_which": (
        "Which of these sounds is heard {n}?",
        "Which sound occurs exactly {n}?",
        "One of these sounds is heard {n}: which one?",
    ),
    "count_before": (
        "How many sounds are heard before the {x}?",
        "How many sounds come before the {x}?",
        "Counting from the start, how many sounds lead up to the {x}?",
    ),
    "gap": (
        "How much time passes from the end of the {x} to the start of the {y}?",
        "How long is it from the end of the {x} to the start of the {y}?",
        "After the {x} has ended, how long does it take until the {y} starts?",
    ),
    "longest": (
        "Which of these sounds lasts longest?",
        "Which sound goes on for the longest time?",
        "Comparing the durations, which sound is the longest?",
    ),
    "shortest": (
        "Which of these sounds lasts shortest?",
        "Which sound is over in the shortest time?",
        "Comparing the durations, which sound is the shortest?",
    ),
    "overlap": (
        "Which sound overlaps with the {x}?",
        "Which sound can be heard at the same time as the {x}?",
        "What else is sounding during part of the {x}?",
    ),
    "moment": (
        "Which sound is heard at {m} seconds?",
        "What can be heard {m} seconds into the recording?",
        "Which sound is going on at {m} seconds?",
    ),
    "span": (
        "Which sound is heard between {s} and {e} seconds?",
        "What can be heard between {s} and {e} seconds?",
        "Which sound lasts from {s} to {e} seconds?",
    ),
}

# ------------------------------------------------------------------ full style: why a span is needed, what it shows

OPENINGS: dict[str, tuple[str, ...]] = {
    "kth": (
        "The question is about the order of the sounds, so I have to locate number {n} exactly.",
        "To find the {k} sound I follow the recording from its start and check the right place again.",
        "Several sounds come one after another here, and only the {k} one matters.",
    ),
    "last": (
        "Only the end of the recording matters here, so I go to the last thing that can be heard.",
        "To find out how the recording ends I listen once more to its final sound.",
        "The order decides this, and the place to check is the last event.",
    ),
    "after": (
        "I first need to find the {x} and then check what follows directly.",
        "The {x} is my anchor here; whatever begins next is the answer.",
        "To be sure about the order, I look for the {x} and listen on from there.",
    ),
    "before": (
        "I first need to find the {x} and then check what came directly before.",
        "The {x} is my anchor here; the sound that ends just before it is the answer.",
        "To be sure about the order, I look for the {x} and step back by one sound.",
    ),
    "count_label": (
        "To count the {x} I must check each place where that sound might be.",
        "The same sound may return, so I go through every candidate for the {x}.",
        "I want to be careful not to miss a repetition of the {x}.",
    ),
    "count_which": (
        "Something is repeated here, and I have to find each place where it returns.",
        "To know how often a sound is heard I go through the places one at a time.",
        "The sounds that return matter, so I listen for a repetition.",
    ),
    "count_before": (
        "I go through the recording from its start and count until the {x} comes.",
        "To get the number right, I check the sounds one at a time up to the {x}.",
        "Everything ahead of the {x} counts, so I listen to each sound in turn.",
    ),
    "gap": (
        "I need the moment where the {x} ends and the moment where the {y} begins.",
        "The time asked for lies between two sounds, so both borders have to be heard exactly.",
        "To measure the distance I locate the {x} first and then the {y}.",
    ),
    "longest": (
        "I have to compare durations, so each of the sounds needs a start and an end.",
        "Only the lengths decide this, and I measure the sounds one at a time.",
        "To compare them fairly I listen to every candidate again and note how long it lasts.",
    ),
    "shortest": (
        "I have to compare durations, so each of the sounds needs a start and an end.",
        "Only the lengths decide this, and I measure the sounds one at a time.",
        "To compare them fairly I listen to every candidate again and note how long it lasts.",
    ),
    "overlap": (
        "I need the place of the {x} and then any sound that shares time with it.",
        "Two sounds run together somewhere, and the {x} tells me where to listen.",
        "The answer must be sounding while the {x} is still going on, so I look there.",
    ),
    "moment": (
        "Only what happens around {m} seconds matters, so I go back to that place.",
        "The question names a time, and I have to hear what is there.",
        "From memory I cannot be sure what sounded then, so I listen again.",
    ),
    "span": (
        "The question gives the place, and I have to hear what is there.",
        "Only this part of the recording matters, so I go back to it.",
        "From memory I cannot be sure what sounded there, so I listen again.",
    ),
}

ANCHOR_LEADS = (
    "I believe the {x} can be found at",
    "The place to check for the {x} is",
    "Going back, the {x} should be around",
    "What I remember as the {x} lies at",
)
ANCHOR_TAILS = (
    ", and listening again, I clearly hear the {x}",
    ", where the {x} can indeed be heard",
    "; this does match the {x}",
    ", and yes, there I have the {x}",
)
FOUND_LEADS: dict[str, tuple[str, ...]] = {
    "next": (
        "The next thing that begins is at",
        "Right afterwards I have to hear",
        "Moving on, something new starts in",
        "The following event covers",
    ),
    "previous": (
        "Directly before that, there is something at",
        "One step back I find",
        "The event that ends just before it covers",
        "Going back by one sound leads to",
    ),
    "kth": (
        "Counting up to number {n} brings me to",
        "The {k} event covers",
        "The right place for the {k} sound is",
    ),
    "last": (
        "The last event covers",
        "Nothing follows after",
        "The recording ends with what happens in",
    ),
    "together": (
        "While it is going on, something else is sounding in",
        "Sharing time with it, another event covers",
        "A second sound runs into it during",
    ),
    "span": (
        "The place that is asked for is",
        "I listen once more to",
        "What matters is",
    ),
    "moment": (
        "Around {m} seconds there is the event at",
        "The time that is asked for lies within",
        "What is sounding then covers",
    ),
    "item": (
        "I check",
        "Another place to hear is",
        "There is an event at",
        "I also listen to",
        "Something happens in",
    ),
}
FOUND_TAILS = (
    ", which I recognise as the {y}",
    ", and what I hear there is the {y}",
    "; listening again, I take this for the {y}",
    ", where the character of the sound fits the {y}",
)
ITEM_TAILS = (", the {y}", ", where I hear the {y}", "; that matches the {y}")
LENGTH_TAILS = (", the {y}, {t} long", ", where I hear the {y} for {t}", "; the {y} takes {t} here")

CLOSINGS: dict[str, tuple[str, ...]] = {
    "kth": ("So the {k} sound is the {a}.", "That makes the {a} number {n}."),
    "last": ("So the recording ends with the {a}.", "Nothing comes later than the {a}."),
    "after": (
        "So the {x} is followed by the {a}.",
        "Hence the sound after the {x} must be the {a}.",
    ),
    "before": ("So right before the {x} I hear the {a}.", "Hence the {a} leads into the {x}."),
    "count_label": ("So I count the {x} {n} in all.", "In total that gives {n} for the {x}."),
    "count_which": ("So the sound that is heard {n} is the {a}.", "Only the {a} can be heard {n}."),
    "count_before": (
        "So the number of sounds before the {x} is {a}.",
        "That makes {a} ahead of the {x}.",
    ),
    "gap": (
        "From the end at {e} to the start at {s} it is {a}.",
        "The time from {e} to {s} is therefore {a}.",
    ),
    "longest": ("Nothing lasts longer than the {a}.", "So the longest one is the {a}."),
    "shortest": ("Nothing is shorter than the {a}.", "So the shortest one is the {a}."),
    "overlap": (
        "So the {x} overlaps with the {a}.",
        "The two that run together are the {x} and the {a}.",
    ),
    "moment": ("So at {m} seconds it is the {a}.", "Hence the sound at that time is the {a}."),
    "span": ("So the sound from {s} to {e} is the {a}.", "Hence the sound there is the {a}."),
}

# ------------------------------------------------------------------ short style: every token is CPU time

SHORT_ANCHOR = (
    ("The {x} is at", ", yes the {x}."),
    ("I find the {x} in", ", the {x} indeed."),
    ("The {x}:", " is the {x}."),
)
SHORT_FOUND: dict[str, tuple[tuple[str, str], ...]] = {
    "next": (
        ("Next comes", ", that is the {y}."),
        ("After it", " is the {y}."),
        ("Then", ", the {y}."),
    ),
    "previous": (
        ("Before it comes", ", that is the {y}."),
        ("Before that", " is the {y}."),
        ("Just before,", ", the {y}."),
    ),
    "kth": (
        ("The {k} one is at", ", that is the {y}."),
        ("Number {n} is", ", the {y}."),
        ("Sound {n}:", " is the {y}."),
    ),
    "last": (
        ("The last one is at", ", that is the {y}."),
        ("It ends with", ", the {y}."),
        ("Last comes", " with the {y}."),
    ),
    "together": (
        ("Meanwhile", ", that is the {y}."),
        ("Over it", " is the {y}."),
        ("With it", ", the {y}."),
    ),
    # The time is said again, so that a small model learns to carry it over from the question.
    "moment": (
        ("At {m} there is", ", that is the {y}."),
        ("Around {m}:", " is the {y}."),
        ("For {m} I go to", ", the {y}."),
    ),
    "span": (
        ("There", ", that is the {y}."),
        ("Here", " is the {y}."),
        ("I hear", ", the {y}."),
    ),
    "item": (
        ("I hear", ", the {y}."),
        ("At", " is the {y}."),
        ("Then", ", the {y}."),
    ),
}
SHORT_LENGTH = (("At", ", the {y}, {t}."), ("Then", " is the {y}, {t}."))

# ------------------------------------------------------------------ scan: the scene in time order

SCAN_OPENINGS = (
    "I walk through the recording in order until I know.",
    "I take the sounds one at a time, from the start.",
    "Going through the recording from its beginning should settle this.",
    "To keep the order straight, I listen to one sound after another.",
)
SCAN_LEADS_FIRST = ("First there is", "It begins at", "The first sound is at", "I start with")
SCAN_LEADS = ("Then comes", "Next is", "After that I check", "It goes on with", "Following that,")
SCAN_TAILS = (", the {y}.", ", where I hear the {y}.", "; that is the {y}.")
SHORT_SCAN_FIRST = "First"
SHORT_SCAN = "Then"
SHORT_SCAN_TAIL = ", {y}."

# ------------------------------------------------------------------ base stage: naming, captions, presence

NAMING_PROMPTS: dict[str, tuple[str, ...]] = {
    "full": (
        "What is this sound?",
        "Name the sound in this clip.",
        "Which sound do you hear?",
        "Listen to this short clip and name it.",
    ),
    "short": ("Name it.", "What is this?", "Which sound?"),
}
NAMING_ANSWERS: dict[str, tuple[str, ...]] = {
    "full": ("That is the {y}.", "I hear the {y}.", "This sounds like the {y}.", "the {y}"),
    "short": ("the {y}.", "that is the {y}."),
}
INLINE_PROMPTS: dict[str, tuple[str, ...]] = {
    "full": ("Go through these clips and name each.", "Name the clips one at a time."),
    "short": ("Name them.", "Which sounds?"),
}
# Around a clip that stands in the middle of the assistant's own text.
INLINE_LEADS: dict[str, tuple[str, ...]] = {
    "full": ("Listening to", "Here is", "The next clip,", "Now I hear"),
    "short": ("Here", "Now", "Then", "I hear"),
}
INLINE_TAILS: dict[str, tuple[str, ...]] = {
    "full": (", which is the {y}.", ", that is the {y}.", " holds the {y}."),
    "short": (", that is the {y}.", " is the {y}.", ", the {y}."),
}
CHOICE_PROMPTS: dict[str, tuple[str, ...]] = {
    "full": (
        "Which of these sounds is it: {choices}?",
        "Choose what you hear from: {choices}.",
        "One of these can be heard: {choices}. Which one?",
    ),
    "short": ("Which one? {choices}.", "Choose: {choices}.", "Which sound? {choices}."),
}
SCENE_CHOICE_PROMPTS: dict[str, tuple[str, ...]] = {
    "full": (
        "Which of these sounds can be heard in this recording: {choices}?",
        "One of these occurs in the recording: {choices}. Which one?",
    ),
    "short": ("Which one is heard? {choices}.", "Which sound is there? {choices}."),
}
# As the question prompts ask for it (echo_jax.text.prompts), without any reasoning.
CHOICE_ANSWER = "<answer>{y}</answer>"
CAPTION_PROMPTS: dict[str, tuple[str, ...]] = {
    "full": (
        "Which sounds occur in this recording?",
        "List the sounds that you hear, in any order.",
        "Describe what can be heard.",
    ),
    "short": ("Which sounds?", "List the sounds."),
}
CAPTION_ANSWERS: dict[str, tuple[str, ...]] = {
    "full": ("I hear {list}.", "The recording has {list}.", "There are these sounds: {list}."),
    "short": ("{list}.",),
}
PRESENCE_PROMPTS: dict[str, tuple[str, ...]] = {
    "full": ("Do you hear the {x}?", "Is the {x} in this recording?", "Does the {x} occur?"),
    "short": ("Is the {x} there?", "Do you hear the {x}?"),
}
PRESENCE_ANSWERS: dict[bool, tuple[str, ...]] = {
    True: ("Yes.", "Yes, the {x} can be heard."),
    False: ("No.", "No, the {x} cannot be heard."),
}
