"""Conversations as token ids and labels, by the tokenizer's own chat template. Only the assistant's tokens are learned."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase

from training.model import IGNORED, IMAGE_TOKEN

Message = dict[str, str]


class TextTokens(NamedTuple):
    """Token ids and labels of one conversation, equally long, visual tokens included; labels are -100 or the id."""

    ids: Sequence[int]
    labels: Sequence[int]


class ChatEncoder:
    """Encodes conversations that hold `<image>` once; there the ids hold `visual_tokens` image tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, visual_tokens: int, max_tokens: int) -> None:
        self._tokenizer, self._visual_tokens, self._max_tokens = tokenizer, visual_tokens, max_tokens
        self._image_token_id = tokenizer.encode(IMAGE_TOKEN, add_special_tokens=False)[0]
        self._end_of_turn = str(tokenizer.eos_token)
        self._control_tokens = [token for token in tokenizer.all_special_tokens if token != IMAGE_TOKEN]
        self.refused = 0

    def encode(self, messages: Sequence[Message]) -> TextTokens | None:
        """Ids and labels, cut to `max_tokens` of text.

        None, counted in `refused`, where that leaves no image or no answer, or the template does not take the turns.
        """
        try:
            pieces = list(self._pieces(messages))
        except (
            jinja2.TemplateError
        ):  # some templates raise it for a system turn, or for roles that do not alternate
            pieces = []
        ids: list[int] = []
        labels: list[int] = []
        for text, is_answer in pieces:
            # Each piece by itself: at inference the prompt, too, is tokenised without what follows.
            piece = self._tokenizer.encode(text, add_special_tokens=False)
            ids += piece
            labels += piece if is_answer else [IGNORED] * len(piece)
        ids, labels = ids[: self._max_tokens], labels[: self._max_tokens]
        if self._image_token_id not in ids or all(label == IGNORED for label in labels):
            self.refused += 1
            return None
        place = ids.index(self._image_token_id)
        return TextTokens(
            self._expand(ids, place, self._image_token_id), self._expand(labels, place, IGNORED)
        )

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation that the assistant is to continue; not cut."""
        ids = self._tokenizer.encode(self._render(messages, True), add_special_tokens=False)
        return self._expand(ids, ids.index(self._image_token_id), self._image_token_id)

    def text(self, ids: Sequence[int]) -> str:
        """Ids of an answer as text, without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def _expand(self, values: list[int], place: int, value: int) -> list[int]:
        return [*values[:place], *[value] * self._visual_tokens, *values[place + 1 :]]

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        turns = [message | {"content": self._plain(message["content"])} for message in messages]
        return str(
            self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    def _plain(self, text: str) -> str:
        """Text without the tokenizer's control tokens: a caption is data and opens no turn of its own."""
        for token in self._control_tokens:
            text = text.replace(token, "")
        return text

    def _pieces(self, messages: Sequence[Message]) -> Iterator[tuple[str, bool]]:
        """The rendered conversation in pieces, and whether each is an answer.

        An answer ends with the end-of-turn token, which is learned; line breaks of the template behind it are not.
        """
        done = 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:index], True)
            after = self._render(messages[: index + 1], False)
            end = after.rfind(self._end_of_turn, len(before))
            stop = end + len(self._end_of_turn) if end >= 0 else len(after)
            yield before[done:], False
            yield after[len(before) : stop], True
            done = stop
