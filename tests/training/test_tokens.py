from training.model import IGNORED, IMAGE_TOKEN
from training.tokens import ChatEncoder

QUESTION = {"role": "user", "content": "<image>\nWhat is it?"}
ANSWER = {"role": "assistant", "content": "A red circle."}
TALK = [
    QUESTION,
    ANSWER,
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes,\nI am."},
]


def test_only_the_assistants_tokens_are_learned(encoder, tiny):
    text = encoder.encode(TALK)
    learned = [token for token, label in zip(text.ids, text.labels, strict=True) if label != IGNORED]
    assert tiny.tokenizer.decode(learned) == "A red circle.<|im_end|>Yes,\nI am.<|im_end|>"
    assert all(label in (IGNORED, token) for token, label in zip(text.ids, text.labels, strict=True))


def test_the_whole_conversation_is_the_chat_templates(encoder, tiny):
    text = encoder.encode(TALK)
    rendered = tiny.tokenizer.apply_chat_template(TALK, tokenize=False)
    shown = tiny.tokenizer.decode(text.ids).replace(IMAGE_TOKEN * 49, IMAGE_TOKEN)
    assert shown == rendered.rstrip("\n")


def test_the_image_becomes_49_visual_tokens(encoder, tiny):
    image = tiny.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    text = encoder.encode(TALK)
    first = text.ids.index(image)
    assert text.ids.count(image) == tiny.visual_tokens == 49
    assert set(text.ids[first : first + 49]) == {image}


def test_a_prompt_is_how_its_training_text_begins(encoder):
    prompt = encoder.prompt([QUESTION])
    text = encoder.encode([QUESTION, ANSWER])
    assert text.ids[: len(prompt)] == prompt
    assert text.labels[len(prompt)] != IGNORED


def test_long_text_is_cut_and_what_leaves_no_answer_is_refused(tiny):
    whole = ChatEncoder(tiny.tokenizer, 49, 256).encode([QUESTION, ANSWER])
    length = len(whole.ids) - 48
    cut = ChatEncoder(tiny.tokenizer, 49, length - 2).encode([QUESTION, ANSWER])
    assert cut.ids == whole.ids[:-2]
    short = ChatEncoder(tiny.tokenizer, 49, 20)
    assert short.encode([QUESTION, ANSWER]) is None
    assert short.refused == 1


def test_a_template_that_refuses_the_turns_is_counted(tiny, monkeypatch):
    encoder = ChatEncoder(tiny.tokenizer, 49, 256)
    strict = "{{ raise_exception('no system turns') }}"
    monkeypatch.setattr(tiny.tokenizer, "chat_template", strict)
    assert encoder.encode([QUESTION, ANSWER]) is None
    assert encoder.refused == 1
