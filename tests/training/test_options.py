import pytest

from shards.errors import BadRequest
from training.options import TrainOptions, parse, to_flags

REQUIRED = ["--data", "d", "--output", "o"]


def test_flags_give_the_options_again():
    options = TrainOptions(
        data="d@1", output="o", max_steps=7, betas=(0.8, 0.9), lm="tiny", learning_rate=2e-4
    )
    assert parse(to_flags(options)) == options


def test_defaults_are_left_out_of_flags():
    assert to_flags(parse(REQUIRED)) == REQUIRED


def test_every_option_is_described():
    assert all(field.description for field in TrainOptions.model_fields.values())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--max-step", "3"], "unknown option --max-step; did you mean --max-steps?"),
        (["--zzz"], "unknown option --zzz; there are --data"),
        (["extra"], "unexpected 'extra'"),
        (["--batch-size", "0"], "--batch-size 0: input should be greater than or equal to 1"),
        (["--learning-rate", "fast"], "--learning-rate fast: input should be a valid number"),
        (["--learning-rate", "nan"], "--learning-rate nan: input should be a finite number"),
        (["--betas", "0.9", "1"], "--betas 1: input should be less than 1"),
        (["--betas", "0.9"], "argument --betas: expected 2 arguments"),
    ],
)
def test_bad_options_are_named(words, says):
    with pytest.raises(BadRequest) as raised:
        parse([*REQUIRED, *words])
    assert str(raised.value).startswith(says)
    assert "\n" not in str(raised.value)


def test_missing_option_is_named():
    with pytest.raises(BadRequest, match="--output is missing"):
        parse(["--data", "d"])
