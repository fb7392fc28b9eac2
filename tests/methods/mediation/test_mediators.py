from __future__ import annotations

import pytest
import torch

from spurge.methods.mediation.mediators import along_difference, mlp_units, neuron_units, principal, units_of


class FakeRecording:
    """What mediators read of a recording."""

    widths = {"layer.0": 3, "layer.1": 5}  # noqa: RUF012
    device = torch.device("cpu")

    def __init__(self, rows=60):
        generator = torch.Generator().manual_seed(0)
        self._outputs = {site: torch.randn(rows, 4, generator=generator) for site in self.widths}
        self._neurons = {site: torch.randn(rows, width, generator=generator) for site, width in self.widths.items()}
        self.rows = rows

    def __len__(self):
        return self.rows

    def outputs(self, site):
        return self._outputs[site]

    def neurons(self, site, part=None):
        return self._neurons[site][:, part]

    def fingerprint(self):
        return "print"


def arms(rows):
    return torch.arange(rows) % 2 == 0


def collected(units, size):
    values = torch.empty(len(units), units.rows)
    for place, block in units.blocks(size):
        assert block.shape[1] == units.rows
        assert block.shape[0] == place.stop - place.start <= size
        values[place] = block.flatten(2).squeeze(-1) if block.dim() == 3 else block
    return values


@pytest.mark.parametrize("size", [1, 2, 4, 100])
def test_neurons_come_in_order_whatever_the_block(size):
    recording = FakeRecording()
    units = neuron_units(recording)
    assert len(units) == 8
    want = torch.cat([recording.neurons(site, slice(None)).t() for site in recording.widths])
    assert torch.equal(collected(units, size), want)
    assert (units.name(2), units.name(3)) == ("layer.0[2]", "layer.1[0]")
    with pytest.raises(ValueError, match="unit: there are 8"):
        units.name(8)


def test_some_sites():
    units = neuron_units(FakeRecording(), ["layer.1"])
    assert units.widths == {"layer.1": 5}
    with pytest.raises(ValueError, match=r"sites: 'layer\.7' is not among"):
        neuron_units(FakeRecording(), ["layer.7"])
    with pytest.raises(ValueError, match="sites: 'none' is not among"):
        neuron_units(FakeRecording(), [])


@pytest.mark.parametrize("size", [1, 5])
def test_an_mlp_is_one_unit(size):
    recording = FakeRecording()
    units = mlp_units(recording, arms(60), reduction="norm")
    want = torch.stack([recording.outputs(site).norm(dim=1) for site in recording.widths])
    assert torch.equal(collected(units, size), want)
    assert units.name(1) == "layer.1"


def test_the_direction_of_a_prompt_comes_from_the_other_folds():
    """Random outputs of many numbers: in-sample the arms would lie sqrt(4 H / N) = 2.8 apart."""
    generator = torch.Generator().manual_seed(1)
    outputs, treatment = torch.randn(200, 400, generator=generator), arms(200)
    fold = torch.arange(200) // 2 % 5
    values = along_difference(outputs, treatment, fold)
    apart = float(values[treatment].mean() - values[~treatment].mean())
    assert abs(apart) < 0.6
    direction = outputs[treatment].mean(0) - outputs[~treatment].mean(0)
    assert float(direction.norm()) > 2.5
    own = fold == 2
    rest = [outputs[~own & arm].mean(0) for arm in (treatment, ~treatment)]
    unit = (rest[0] - rest[1]) / (rest[0] - rest[1]).norm()
    torch.testing.assert_close(values[own], (outputs[own] - (rest[0] + rest[1]) / 2) @ unit)


def test_a_real_difference_is_found():
    treatment = arms(300)
    outputs = torch.randn(300, 10, generator=torch.Generator().manual_seed(2))
    outputs[:, 3] += 4 * treatment
    values = along_difference(outputs, treatment, torch.arange(300) // 2 % 5)
    assert float(values[treatment].mean() - values[~treatment].mean()) == pytest.approx(4, abs=0.4)
    constant = along_difference(torch.ones(300, 4), treatment, torch.arange(300) // 2 % 5)
    assert torch.equal(constant, torch.zeros(300))


def test_components_are_those_of_the_svd():
    outputs = torch.randn(50, 6, generator=torch.Generator().manual_seed(3)) * torch.tensor([5.0, 3, 2, 1, 0.5, 0.1])
    found = principal(outputs, 2)
    _, _, vectors = torch.linalg.svd((outputs - outputs.mean(0)).double(), full_matrices=False)
    want = (outputs - outputs.mean(0)).double() @ vectors[:2].t()
    torch.testing.assert_close(found.double().abs(), want.abs(), rtol=1e-4, atol=1e-4)
    assert mlp_units(FakeRecording(), arms(60), reduction="components", components=3).numbers == 3


def test_folds_follow_the_seed():
    recording = FakeRecording()
    values = [collected(mlp_units(recording, arms(60), seed=seed), 9) for seed in (0, 0, 1)]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


def test_says_what_is_wrong():
    recording = FakeRecording()
    assert len(mlp_units(recording, torch.arange(60) < 2, reduction="norm")) == 2  # which needs no folds
    with pytest.raises(ValueError, match="treatment: expected one for each of 60 prompts"):
        mlp_units(recording, arms(50))
    with pytest.raises(ValueError, match="reduction: expected one of difference, norm, components, got 'sum'"):
        mlp_units(recording, arms(60), reduction="sum")
    with pytest.raises(ValueError, match="components: at most 10, got 11"):
        mlp_units(recording, arms(60), components=11)
    with pytest.raises(ValueError, match="treatment: an arm has 2 prompts, too few for 5 folds"):
        mlp_units(recording, torch.arange(60) < 2)


def test_numbers_of_a_user():
    units = units_of(torch.arange(6.0).view(2, 3), ["a", "b"])
    assert torch.equal(collected(units, 1), torch.arange(6.0).view(2, 3))
    assert units.name(1) == "b"
    with pytest.raises(ValueError, match="names: expected 2 different ones, got 1"):
        units_of(torch.zeros(2, 3), ["a", "a"])
    with pytest.raises(ValueError, match="units: expected finite numbers, got another in 'b' at prompt 1"):
        units_of(torch.tensor([[0.0, 1], [1, torch.nan]]), ["a", "b"])
