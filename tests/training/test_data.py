import itertools
import threading

import numpy as np
import torch

from images.decode import Limits, decode
from shards.ids import image_id_of
from shards.snapshot import open_snapshot
from tests.training.drawn import caption_turns, drawn_images, make_sample, write_snapshot
from training.data import (
    batches,
    collate,
    endless,
    epoch_order,
    load_pixels,
    normalise,
    run_ahead,
    split_for_captions,
    usable_samples,
)
from training.model import IGNORED
from training.tokens import TextTokens

A, B = bytes(32), bytes(range(32))
ASK, TELL = ("human", "<image>\nWhat?"), ("gpt", "That.")


def test_what_cannot_be_used_is_counted_in_words():
    samples = [
        make_sample([A], [ASK, TELL]),
        make_sample([A], []),
        make_sample([], [("human", "Hi"), TELL]),
        make_sample([A, B], [ASK, TELL]),
        make_sample([A], [ASK]),
        make_sample([A], [TELL]),
        make_sample([A], [TELL, ASK]),
        make_sample([A], [ASK, ("robot", "Beep"), TELL]),
        make_sample([A], [("human", "<image><image>"), TELL]),
        make_sample([A], [("human", "Draw"), ("gpt", "<image>")]),
    ]
    usable = usable_samples(samples)
    assert [sample.sample_id for sample in usable.samples] == [samples[0].sample_id]
    assert dict(usable.skipped) == {
        "without a conversation": 1,
        "of text only": 1,
        "with several images": 1,
        "without a question and an answer to it": 3,
        "with an unknown speaker": 1,
        "with <image> twice or outside a question": 2,
    }


def test_a_question_that_shows_no_image_begins_with_it():
    turns = [("system", "Be brief."), ("human", "What?"), TELL]
    (sample,) = usable_samples([make_sample([A], turns)]).samples
    assert sample.messages[1] == {"role": "user", "content": "<image>\nWhat?"}
    assert sample.question == 1


def test_an_image_may_come_with_a_later_question():
    turns = [("human", "Hello"), ("gpt", "Hi"), ASK, TELL]
    (sample,) = usable_samples([make_sample([A], turns)]).samples
    assert sample.question == 2


def test_the_order_does_not_depend_on_the_shards(tmp_path, data):
    images = drawn_images()
    samples = [make_sample([image_id_of(png)], caption_turns(*what)) for what, png in images.items()]
    spread = write_snapshot(tmp_path / "spread", list(images.values()), samples, shards=5)
    one, five = (usable_samples(open_snapshot(str(out)).samples()).samples for out in (data, spread))
    assert one != five
    for epoch in range(3):
        assert epoch_order(one, 7, epoch) == epoch_order(five, 7, epoch)
    orders = {tuple(s.sample_id for s in epoch_order(one, *key)) for key in ((7, 0), (7, 1), (8, 0))}
    assert len(orders) == 3


def test_an_epoch_holds_every_sample_once(data):
    samples = usable_samples(open_snapshot(str(data)).samples()).samples
    two = list(itertools.islice(endless(samples, 0), 24))
    assert sorted(two[:12]) == sorted(two[12:]) == sorted(samples)


def test_captioned_images_are_held_out_where_there_are_enough():
    many = usable_samples(make_sample([bytes([i]) * 32], [ASK, ("gpt", f"{i}")]) for i in range(40)).samples
    training, captioned = split_for_captions(many, 3, 0)
    assert (len(training), len(captioned)) == (37, 3)
    assert not {s.image_id for s in training} & {s.image_id for s in captioned}
    assert split_for_captions(many[:12], 3, 0)[0] == list(many[:12])


def test_batches_hold_the_curated_pixels_in_order(data, encoder, tiny):
    snapshot = open_snapshot(str(data))
    samples = epoch_order(usable_samples(snapshot.samples()).samples, 0, 0)
    first, second = batches(iter(samples[:9]), snapshot.media, encoder, tiny.tower, 4)
    assert first.pixel_values.shape == (4, 3, 224, 224)
    encoded = snapshot.media.read(samples[5].image_id)
    expected = decode(encoded, tiny.tower.geometry, Limits()).pixels / 255 * 2 - 1
    assert np.abs(second.pixel_values[1].permute(1, 2, 0).numpy() - expected).max() < 1e-6
    assert first.labels.ne(IGNORED).any(dim=1).all()


def test_a_bright_pixel_is_normalised_by_channel(tiny):
    tower = tiny.tower._replace(mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 0.25))
    white = normalise(np.full((1, 1, 1, 3), 255, np.uint8), tower)
    assert white.flatten().tolist() == [1.0, 1.0, 0.0]


def test_shorter_texts_are_padded_on_the_right(tiny):
    pixels = np.zeros((2, 224, 224, 3), np.uint8)
    batch = collate([TextTokens([5, 6, 7], [IGNORED, 6, 7]), TextTokens([8], [8])], pixels, tiny.tower)
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert batch.input_ids.dtype == torch.int64


def test_load_pixels_gives_the_towers_size(data, tiny):
    snapshot = open_snapshot(str(data))
    image_id = min(snapshot.media.ids())
    pixels = load_pixels(snapshot.media, image_id, tiny.tower.geometry)
    assert (pixels.shape, pixels.dtype) == ((224, 224, 3), np.uint8)


def test_running_ahead_keeps_the_order_and_the_depth():
    taken = []

    def numbers():
        for number in itertools.count():
            taken.append(number)
            yield number

    stream = run_ahead(numbers(), lambda number: number * number, depth=4)
    assert list(itertools.islice(stream, 10)) == [n * n for n in range(10)]
    assert len(taken) <= 10 + 4 + 1
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode_")]
