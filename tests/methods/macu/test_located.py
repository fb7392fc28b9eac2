"""What was located: sets, tables, files."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spurge.engine.base.files import FileError
from spurge.engine.base.statistics import spearman
from spurge.engine.cascade.scores import NeuronScores, NeuronSet
from spurge.methods.macu.located import Located


def located() -> Located:
    generator = torch.Generator().manual_seed(0)
    maps = [
        NeuronScores({f"mlp.{i}": torch.randn(5, generator=generator) for i in (2, 10)}, {"method": "MacU"})
        for _ in range(2)
    ]
    certificate = {"neurons": [{"neuron": "mlp.2[0]"}], "agreement": {"causal": 0.5, "spurious": math.nan}}
    phrases = [{"text": "on tuesday", "label": "positive", "count": 7, "strength": 4.25}]
    info = {
        "phrases": phrases,
        "method": "MacU",
        "texts": 7,
        "completeness": {"mlp.2": {"causal_effect": 1.5, "causal_gap": 0.1}},
    }
    return Located(*maps, NeuronSet({"mlp.2": [0, 1]}), NeuronSet({"mlp.2": [1], "mlp.10": [4]}), certificate, info)


def test_overlap_and_spurious_only() -> None:
    found = located()
    assert found.overlap == NeuronSet({"mlp.2": [1]})
    assert found.spurious_only == NeuronSet({"mlp.10": [4]})
    assert repr(found) == "Located(2 causal and 2 spurious neurons of 10, 1 in both)"
    assert str(found).splitlines()[2].split() == ["mlp.2", "5", "2", "1", "1"]
    assert "causal 0.50" in str(found)
    assert "goes with positive: 'on tuesday' (7 texts, z 4.2)" in str(found)


def test_summary_and_result_rows() -> None:
    first, second = located().summary()
    assert (first["site"], first["causal"], first["spurious"], first["overlap"]) == ("mlp.2", 2, 1, 1)
    assert (first["causal_effect"], first["causal_gap"], first["spurious_gap"]) == (1.5, 0.1, None)
    assert second["causal_effect"] is None
    assert first["causal_sum"] == pytest.approx(located().causal.per_site()["mlp.2"])
    rows = located().rows()
    assert {"case": "all", "method": "MacU", "metric": "overlap neurons", "value": 1}.items() <= rows[2].items()
    assert all(set(row) == {"case", "method", "metric", "value", "spread", "n", "unit"} for row in rows)


def test_another_wrapper_changes_the_names_alone() -> None:
    found = located()
    assert found.called_as_in(["mlp.2", "mlp.10"]) is found
    other = found.called_as_in(["base_model.model.mlp.2", "base_model.model.mlp.10"])
    assert other.spurious_set == NeuronSet({"base_model.model.mlp.2": [1], "base_model.model.mlp.10": [4]})
    assert other.causal.widths == {"base_model.model.mlp.2": 5, "base_model.model.mlp.10": 5}
    assert [row["causal_gap"] for row in other.summary()] == [0.1, None]
    back = other.called_as_in(["mlp.2", "mlp.10"])
    assert str(back) == str(found)
    assert back.rows() == found.rows()


def test_files(tmp_path: Path) -> None:
    found = located()
    found.save(tmp_path / "located.safetensors")
    again = Located.load(tmp_path / "located.safetensors")
    for side in ("causal", "spurious"):
        for site, vector in getattr(found, side).values.items():
            assert torch.equal(vector, getattr(again, side).values[site])
        assert getattr(found, side).info == getattr(again, side).info
    assert (found.causal_set, found.spurious_set) == (again.causal_set, again.spurious_set)
    assert (found.certificate, found.info) == (again.certificate, again.info)
    data = bytearray((tmp_path / "located.safetensors").read_bytes())
    data[-3] ^= 1
    (tmp_path / "flipped").write_bytes(data)
    (tmp_path / "short").write_bytes(data[:-9])
    for name in ("flipped", "short"):
        with pytest.raises(FileError):
            Located.load(tmp_path / name)
    found.causal.save(tmp_path / "scores")
    with pytest.raises(FileError, match="expected 'located'"):
        Located.load(tmp_path / "scores")


def test_bad_parts() -> None:
    found = located()
    other = NeuronScores({"mlp.2": torch.ones(5)})
    with pytest.raises(ValueError, match="same sites and widths"):
        Located(found.causal, other, found.causal_set, found.spurious_set)
    with pytest.raises(ValueError, match="got index 5"):
        Located(found.causal, found.spurious, NeuronSet({"mlp.2": [5]}), found.spurious_set)


def test_spearman() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 1, 2, 2], [1, 2, 3, 4]) == pytest.approx(2 / math.sqrt(5))  # ranks 0.5 0.5 2.5 2.5
    assert spearman([1, 1], [1, 2]) is None
    assert spearman([], []) is None


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=2, max_size=30))
def test_spearman_ignores_monotone_maps(pairs: list[tuple[int, int]]) -> None:
    a, b = zip(*pairs, strict=True)
    plain, bent = spearman(a, b), spearman([x**3 for x in a], [math.exp(x / 4) for x in b])
    assert (plain is None) == (bent is None)
    if plain is not None:
        assert bent == pytest.approx(plain)
        assert -1 - 1e-9 <= plain <= 1 + 1e-9
