import pytest
import torch

from looplm.stability.vectors import mask_padding, num_real, per_sequence_dot, random_unit, scale, squared_norm

MASK = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 0, 0, 0]])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def dict_state():
    """A part with positions and one without."""
    draw = generator(5)
    return {"tokens": torch.randn(3, 4, 2, generator=draw), "memory": torch.randn(3, 5, generator=draw)}


def test_vectors_have_unit_length_and_vanish_on_padding():
    vector = random_unit(torch.zeros(3, 4, 5, dtype=torch.float64), MASK, generator())
    torch.testing.assert_close(vector.square().sum((1, 2)), torch.ones(3, dtype=torch.float64))
    assert torch.all(vector[MASK == 0] == 0)
    assert torch.all(vector[MASK == 1] != 0)


def test_the_parts_of_a_dict_form_one_vector():
    vector = random_unit(dict_state(), MASK, generator())
    total = vector["tokens"].square().sum((1, 2)) + vector["memory"].square().sum(1)
    torch.testing.assert_close(total, torch.ones(3))
    assert torch.all(vector["tokens"][MASK == 0] == 0)
    assert torch.all(vector["memory"] != 0)


def test_vectors_are_uniform_on_the_sphere_of_real_positions():
    """Second moment I/n and no mean; every sequence draws its own."""
    draws = 20_000
    mask = torch.tensor([[0, 1, 1]]).expand(draws, -1)
    vector = random_unit(torch.zeros(draws, 3, 2, dtype=torch.float64), mask, generator()).flatten(1)
    n = 4
    expected = torch.diag(torch.tensor([0, 0, 1, 1, 1, 1], dtype=torch.float64)) / n
    assert (vector.T @ vector / draws - expected).abs().max() < 5 / n / draws**0.5
    assert vector.mean(0).abs().max() < 5 / (n * draws) ** 0.5
    assert len(vector[:, 2].unique()) == draws


def test_vectors_depend_on_the_generator_alone():
    hidden = torch.randn(3, 4, 5)
    first = random_unit(hidden, None, generator(1))
    torch.manual_seed(1234)
    assert torch.equal(random_unit(hidden + 1, None, generator(1)), first)
    assert not torch.equal(random_unit(hidden, None, generator(2)), first)


def test_a_sequence_without_real_positions_gets_the_zero_vector():
    vector = random_unit(torch.ones(2, 4, 5), torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]]), generator())
    assert torch.all(vector[0] == 0)
    torch.testing.assert_close(vector[1].norm(), torch.tensor(1.0))


def test_vectors_have_the_number_type_of_the_state():
    vector = random_unit(torch.ones(2, 100, 50, dtype=torch.bfloat16), None, generator())
    assert vector.dtype == torch.bfloat16
    torch.testing.assert_close(squared_norm(vector), torch.ones(2), rtol=1e-2, atol=0)


def test_dimension_counts_real_entries():
    assert num_real(torch.zeros(3, 4, 5), MASK).tolist() == [20, 10, 5]
    assert num_real(torch.zeros(3, 4, 5), None).tolist() == [20, 20, 20]
    assert num_real(dict_state(), MASK).tolist() == [8 + 5, 4 + 5, 2 + 5]


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_any_non_zero_mask_value_means_real(kind):
    hidden = torch.randn(3, 4, 5)
    segments = (MASK * torch.tensor([1, 1, 2, 3])).to(kind)
    expected = torch.where(MASK[..., None] == 1, hidden, 0.0)
    torch.testing.assert_close(mask_padding(hidden, segments), expected)


def test_inner_products_pair_the_parts_of_a_dict_by_name():
    a, b = dict_state(), {name: 2 * part for name, part in reversed(dict_state().items())}
    expected = 2 * (a["tokens"].flatten(1).square().sum(1) + a["memory"].square().sum(1))
    torch.testing.assert_close(per_sequence_dot(a, b), expected)
    torch.testing.assert_close(
        squared_norm(scale(a, torch.tensor([1.0, 2.0, 0.0]))), expected / 2 * torch.tensor([1, 4, 0])
    )


def test_norms_of_half_precision_states_are_summed_in_float32():
    # In bfloat16 the running sum would stop at 256, where adding 1 rounds to nothing.
    assert squared_norm(torch.ones(1, 1000, dtype=torch.bfloat16)).tolist() == [1000.0]
