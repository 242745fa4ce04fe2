from __future__ import annotations

import numpy as np

from data import listening, scenes

CONFIG = scenes.SceneConfig(counts={}, overlap_probability=0.5)
SCENES = [scenes.plan_scene(CONFIG, "train", i).scene for i in range(80)]
VOCABULARY = CONFIG.class_names


def test_naming_clips_hold_their_event_and_no_other():
    config = listening.ListeningConfig(jitter_s=0.3, naming_turns=9, max_clip_s=0.9)
    for index, scene in enumerate(SCENES):
        chat = listening.naming_chat(scene, np.random.default_rng(index), config)
        users, answers = chat.turns[::2], chat.turns[1::2]
        assert len(users) == len(answers) >= 1
        for user, answer in zip(users, answers, strict=True):
            clip = user.parts[0]
            assert 0.29 < clip.end_s - clip.start_s < 0.91
            assert clip.start_s >= 0
            assert clip.end_s <= scene.duration_s
            heard = [
                e.label
                for e in scene.events
                if min(e.end_s, clip.end_s) - max(e.start_s, clip.start_s) > 1e-9
            ]
            assert len(heard) == 1
            assert heard[0] in answer.parts[0]


def test_captions_and_presence_say_what_is_there_and_no_time():
    config = listening.ListeningConfig()
    yes = no = chosen = 0
    for index, scene in enumerate(SCENES):
        rng = np.random.default_rng(index)
        labels = {event.label for event in scene.events}
        caption = listening.caption_chat(scene, rng, config).turns[1].parts[0]
        assert {label for label in VOCABULARY if label in caption} == labels
        assert not any(char.isdigit() for char in caption)
        chat = listening.presence_chat(scene, rng, config, VOCABULARY)
        question, answer = chat.turns[0].parts[1], chat.turns[1].parts[0]
        there = [label for label in VOCABULARY if label in question and label in labels]
        if answer.startswith("<answer>"):
            assert len([label for label in VOCABULARY if label in question]) == 4
            assert answer == f"<answer>{there[0]}</answer>"
            assert len(there) == 1
            chosen += 1
            continue
        assert answer.startswith("Yes" if there else "No")
        yes, no = yes + bool(there), no + (not there)
    assert chosen > 25
    assert yes > 10
    assert no > 10


def test_choices_hold_the_sound_of_the_clip_once_and_the_answer_is_it():
    inline = 0
    for index, scene in enumerate(SCENES):
        config = listening.ListeningConfig(naming_turns=4, inline_fraction=0.5)
        chat = listening.choice_chat(scene, np.random.default_rng(index), config, VOCABULARY)
        users, answers = chat.turns[::2], chat.turns[1::2]
        assert 1 <= len(users) == len(answers) <= 2
        for user, answer in zip(users, answers, strict=True):
            (clip,) = [part for part in user.parts + answer.parts if not isinstance(part, str)]
            (heard,) = {
                e.label
                for e in scene.events
                if min(e.end_s, clip.end_s) - max(e.start_s, clip.start_s) > 1e-9
            }
            named = [label for label in VOCABULARY if label in user.parts[-1]]
            assert len(named) == 4
            assert heard in named
            assert answer.parts[-1] == f"<answer>{heard}</answer>"
            assert not any(char.isdigit() for char in user.parts[-1])
        inline += clip in chat.turns[-1].parts
    assert 20 < inline < 60
