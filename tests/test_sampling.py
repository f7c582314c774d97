"""How a token is drawn: shares of many draws against the probabilities worked out by hand."""
import torch

from memformers.generate import filter_min_p, sample

ODDS = torch.tensor([0.5, 0.3, 0.15, 0.05])


def shares(**options):
    """How often each of four tokens is drawn."""
    generator = torch.Generator().manual_seed(0)
    drawn = sample(ODDS.log().expand(20_000, 4), generator=generator, **options)
    return torch.bincount(drawn, minlength=4) / len(drawn)


def close(a, b): torch.testing.assert_close(a, b, atol=0.015, rtol=0)


def test_tokens_are_drawn_by_their_probability(): close(shares(), ODDS)


def test_a_low_temperature_sharpens_and_a_high_one_flattens():
    for temperature in (0.5, 2.0):
        want = ODDS ** (1 / temperature)
        close(shares(temperature=temperature), want / want.sum())


def test_min_p_is_relative_to_the_likeliest():
    kept = filter_min_p(ODDS.log()[None], 0.5).isfinite()[0]
    assert kept.tolist() == [True, True, False, False]   # 0.3 is at least half of 0.5, 0.15 is not
    close(shares(min_p=0.5), torch.tensor([0.625, 0.375, 0.0, 0.0]))


def test_a_generator_decides_alone():
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return sample(torch.zeros(8, 1000), generator=generator)
    torch.manual_seed(0)
    first = draw(1)
    assert torch.equal(draw(1), first)
    assert not torch.equal(draw(2), first)
