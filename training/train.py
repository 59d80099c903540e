"""Train a vision-language model on a snapshot: one stage, the projector alone, in one process.

There is no resume: a run that was broken off is started again, in an empty folder. `python -m training.train --help`.
"""

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from shards.errors import BadRequest, RunFailed, ShardmillError
from shards.snapshot import open_snapshot
from training.options import TrainOptions, parse

FAILED, BAD_REQUEST, INTERRUPTED = 1, 2, 130


def main(options: TrainOptions) -> int:
    """Train, save, caption. Returns 0; raises BadRequest before anything is written, RunFailed where training breaks off.

    On a CPU equal options and data give equal losses, bit for bit, on one machine with one number of threads.
    """
    output = _new_folder(options.output)
    snapshot = open_snapshot(options.data)

    # torch and transformers take seconds to import: a bad request should not wait for them.
    import torch
    from transformers.utils import logging as transformers_logging

    from embeddings.backbone import torch_device
    from training.captions import Caption, answer, reference, write_captions
    from training.card import model_card
    from training.data import batches, endless, split_for_captions, usable_samples
    from training.log import Step, TrainingLog, ends
    from training.model import (
        autocast,
        build_model,
        learned_parameters,
        next_token_loss,
        save_model,
    )
    from training.tokens import ChatEncoder

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

    # what to learn from
    usable = usable_samples(snapshot.samples())
    skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(usable.skipped.items())) or "none"
    print(
        f"data: {len(usable.samples)} samples of snapshot {snapshot.id[:12]}; skipped: {skipped}", flush=True
    )
    if not usable.samples:
        raise BadRequest(
            f"--data {options.data}: no sample has one image and a conversation; skipped: {skipped}"
        )
    training, captioned = split_for_captions(usable.samples, options.caption_samples, options.seed)

    # what learns
    device = torch_device(options.device)
    torch.manual_seed(options.seed)
    vlm = build_model(options.vision, options.lm, device)
    encoder = ChatEncoder(vlm.tokenizer, vlm.visual_tokens, options.max_tokens)
    if not any(encoder.encode(sample.messages) for sample in training):
        raise BadRequest(f"--max-tokens {options.max_tokens}: cuts off every answer; give more")
    learned = learned_parameters(vlm.model)
    count = sum(parameter.numel() for parameter in learned)
    print(
        f"model: {options.vision} -> projector ({count:,} parameters learn) -> {options.lm}, on {device}",
        flush=True,
    )

    # the loop
    output.mkdir(parents=True, exist_ok=True)
    before = [answer(vlm, encoder, sample, snapshot.media) for sample in captioned]
    encoder.refused = 0
    optimizer = torch.optim.AdamW(learned, betas=options.betas, weight_decay=options.weight_decay)
    stream = batches(endless(training, options.seed), snapshot.media, encoder, vlm.tower, options.batch_size)
    with TrainingLog(output, options.max_steps, options.log_every) as log:
        for step in range(options.max_steps):
            started = time.perf_counter()
            batch = next(stream)
            data_wait_s = time.perf_counter() - started
            learning_rate = learning_rate_at(step, options)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            with autocast(device):
                loss = next_token_loss(vlm.model, *(tensor.to(device) for tensor in batch))
            if not math.isfinite(loss.item()):
                raise RunFailed(f"the loss is {loss.item()} at step {step + 1}; lower --learning-rate")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learned, options.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            tokens, samples = int(batch.attention_mask.sum()), len(batch.input_ids)
            step_s = time.perf_counter() - started
            log.write(Step(step + 1, loss.item(), learning_rate, tokens, samples, data_wait_s, step_s))

    # what came of it
    first, last = ends(log.losses)
    after = [answer(vlm, encoder, sample, snapshot.media) for sample in captioned]
    save_model(vlm, output)
    card = model_card(options, vlm, snapshot.id, len(training), first, last)
    (output / "README.md").write_text(card, encoding="utf-8")
    seen = {sample.image_id for sample in training}
    captions = [
        Caption(sample.image_id.hex(), sample.image_id not in seen, *reference(sample), early, late)
        for sample, early, late in zip(captioned, before, after, strict=True)
    ]
    write_captions(output / "captions.jsonl", captions)
    for caption in captions:
        print(f"image {caption.image_id[:12]}{', held out' if caption.held_out else ''}")
        for name in ("reference", "before", "caption"):
            print(f"  {name}: {' '.join(getattr(caption, name).split())}")
    if encoder.refused:
        print(
            f"left out {encoder.refused} times: samples without image or answer in {options.max_tokens} tokens"
        )
    print(f"loss: {first:.4f} at first, {last:.4f} at last (means of three steps)")
    print(f"model: {output}")
    print(f"next: tensorboard --logdir {output / 'tensorboard'}; {output / 'README.md'} says how to load it")
    return 0


def learning_rate_at(step: int, options: TrainOptions) -> float:
    """Linear warm-up, then a cosine down to nearly 0. `step` counts from 0."""
    warmup = math.ceil(options.warmup_fraction * options.max_steps)
    if step < warmup:
        return options.learning_rate * (step + 1) / warmup
    done = (step - warmup) / (options.max_steps - warmup)
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def _new_folder(name: str) -> Path:
    folder = Path(name).expanduser()
    if folder.is_file():
        raise BadRequest(f"--output {name}: is a file; give a new or empty folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise BadRequest(
            f"--output {name}: is not empty, and a run cannot be resumed; give a new or empty folder"
        )
    return folder


def command(argv: Sequence[str]) -> int:
    """The exit code of a command line: 0 done, 1 failed, 2 bad request, 130 interrupted; one line on stderr unless done."""
    try:
        return main(parse(argv))
    except BadRequest as error:
        return _fail(str(error), BAD_REQUEST)
    except (ShardmillError, OSError) as error:
        return _fail(str(error), FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted before it was done; start again with a new --output", INTERRUPTED)


def _fail(message: str, code: int) -> int:
    print(f"shardmill train: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
