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
    yes = 0
    for index, scene in enumerate(SCENES):
        rng = np.random.default_rng(index)
        labels = {event.label for event in scene.events}
        caption = listening.caption_chat(scene, rng, config).turns[1].parts[0]
        assert {label for label in VOCABULARY if label in caption} == labels
        assert not any(char.isdigit() for char in caption)
        chat = listening.presence_chat(scene, rng, config, VOCABULARY)
        question, answer = chat.turns[0].parts[1], chat.turns[1].parts[0]
        there = any(label in question for label in labels)
        assert answer.startswith("Yes" if there else "No")
        yes += there
    assert 20 < yes < 60
