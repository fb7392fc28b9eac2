"""Words as a model's input embeddings have them."""

from __future__ import annotations

import torch

from helpers.tiny_models import tiny, tiny_language, tiny_tokenizer
from spurge import Verbalizer
from spurge.engine.models.handle import Handle
from spurge.engine.recordings.embedding import word_pieces, word_vectors


def test_a_vector_is_the_mean_of_the_pieces_at_unit_length():
    handle = Handle.of(tiny("bert"), tiny_tokenizer())
    table = handle.model.get_input_embeddings().weight.detach()
    units = ["film", "walking", "good film"]
    pieces = word_pieces(handle, units)
    assert [len(ids) for ids in pieces] == [1, 2, 2]
    for ids, vector in zip(pieces, word_vectors(handle, units), strict=True):
        expected = table[torch.tensor(ids)].mean(0)
        assert torch.allclose(vector, expected / expected.norm(), atol=1e-6)
    assert word_vectors(handle, []).shape == (0, table.shape[1])


def test_the_template_of_a_prompt_is_no_part_of_a_word():
    language, tokenizer = tiny_language("llama"), tiny_tokenizer(decoder=True)
    model, prompted = Verbalizer({"bad": ["bad"], "good": ["good"]}, "{text} it was").wrap(language, tokenizer)
    units = ["film", "good film"]
    assert torch.equal(word_vectors(Handle(model, prompted), units), word_vectors(Handle(language, tokenizer), units))
