"""The prepared object: what a cascade gives, from kept passes, recorded graphs, copies and threads alike."""

from __future__ import annotations

import copy
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.tiny_models import tiny, tiny_inputs, tiny_tokenizer
from spurge.engine.cascade import locator as locator_module
from spurge.engine.cascade.attribution import Attribution
from spurge.engine.cascade.cascade import Cascade, Rows, predicted_logit
from spurge.engine.cascade.locator import MOST_GRAPHS, Locator

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def model_of(family: str = "llama", **settings: Any) -> Any:
    return tiny(family, **{"language": family in ("llama", "gpt2"), **settings})


def assert_same(got: Attribution, want: Attribution, within: float = 1e-5) -> None:
    assert list(got.values) == list(want.values)
    for name, value in want.values.items():
        assert float((got.values[name] - value).norm()) <= within * float(value.norm()), name
    torch.testing.assert_close(got.full, want.full)


def first_logit(rows: Rows) -> Tensor:
    return rows.logits[:, 0]


class Replayed:
    """Stands for a CUDA graph: one run per capture and replay, over inputs and results in memory of its own."""

    made = 0

    def __init__(self, run: Any, inputs: dict[str, Tensor]):
        Replayed.made += 1
        self.run, self.inputs = run, {name: value.clone() for name, value in inputs.items()}
        self.result = run(self.inputs)

    def __call__(self, inputs: dict[str, Tensor]) -> Any:
        for name, value in self.inputs.items():
            value.copy_(inputs[name])
        found, checks = self.run(self.inputs)
        for name, value in self.result[0].values.items():
            value.copy_(found.values[name])
        self.result[0].full.copy_(found.full)
        for (kept, _), (new, _) in zip(self.result[1], checks, strict=True):
            kept.copy_(new)
        return self.result


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> type[Replayed]:
    """Locators record on the CPU too, by a stand-in for the graph."""
    monkeypatch.setattr(locator_module, "CudaGraph", Replayed)
    Replayed.made = 0
    return Replayed


def recording(model: Any, *arguments: Any, **settings: Any) -> Locator:
    locator = Locator(model, *arguments, **({"path": "layer"} | settings))
    locator._records = True
    return locator


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("rule", ["legendre", "radau"])
def test_is_the_cascade(family: str, rule: Any) -> None:
    model, inputs = model_of(family), tiny_inputs(family)
    locator = Locator(model, rule=rule, path="layer")
    want = Cascade(model, nodes=2, rule=rule, completeness=False, path="layer").attribute(inputs, predicted_logit)
    assert_same(locator(inputs), want)
    assert_same(locator.ask(inputs).result(), want)
    other = Cascade(model, nodes=2, rule=rule, completeness=False, path="layer").attribute(inputs, first_logit)
    assert_same(locator(inputs, first_logit), other)


@pytest.mark.parametrize("rule", ["legendre", "radau"])
def test_questions_of_a_prompt_share_its_unedited_pass(rule: Any) -> None:
    model, inputs = model_of(), tiny_inputs("llama")
    locator = Locator(model, rule=rule, path="layer")
    prompt = locator.read(inputs)
    assert prompt.traces
    passes: list[int] = []
    with model.model.embed_tokens.register_forward_hook(lambda *_: passes.append(1)):
        for target in (predicted_logit, first_logit, predicted_logit):
            assert_same(locator(prompt, target), locator(inputs, target))
    # one for each question of the prompt; for each of the inputs two more: the unedited pass, and the proof of it
    assert len(passes) == 3 * (1 + 3)


def test_a_prompt_that_does_not_fit_is_read_again() -> None:
    model, inputs = model_of(), tiny_inputs("llama")
    locator = Locator(model, memory="400kB", path="layer")
    locator.cascade.budget = 4 * locator.cascade.footprint(inputs).kept(4, differentiable=False) - 4
    prompt = locator.read(inputs)
    assert not prompt.traces
    assert prompt.kept == 0
    assert_same(Locator(model, path="layer")(prompt), Locator(model, path="layer")(inputs))


def test_completeness_and_tolerance() -> None:
    model, inputs = model_of(), tiny_inputs("llama")
    assert not Locator(model, path="layer")(inputs).erased
    assert Locator(model, completeness=True, path="layer")(inputs).erased
    assert Locator(model, tolerance=1e-3, path="layer")(inputs).relative_residual() <= 1e-3


def test_texts_of_one_bucket_share_a_graph(recorded: type[Replayed]) -> None:
    model = model_of()
    locator = recording(model, bucket=8)
    for tokens in (5, 7, 8, 9, 12):
        inputs = tiny_inputs("llama", rows=2, tokens=tokens, seed=tokens)
        assert_same(
            locator(inputs),
            Cascade(model, nodes=2, completeness=False, path="layer").attribute(inputs, predicted_logit),
        )
    assert recorded.made == 2


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_padding_to_a_bucket_is_what_a_classifier_takes_for_padding(family: str, recorded: type[Replayed]) -> None:
    model = tiny(family, labels=3, pad_token_id=7 if family == "llama" else 0)
    inputs = tiny_inputs(family, rows=1, pad=False)
    locator = recording(model, bucket=16)
    assert_same(
        locator(inputs), Cascade(model, nodes=2, completeness=False, path="layer").attribute(inputs, predicted_logit)
    )
    assert recorded.made == 1


def test_answers_outlive_the_next_replay(recorded: type[Replayed]) -> None:
    model = model_of()
    locator = recording(model)
    first, second = (tiny_inputs("llama", seed=seed) for seed in (1, 2))
    kept = locator(first)
    locator(second)
    assert_same(kept, Locator(model, path="layer")(first))


def test_few_graphs_are_kept(recorded: type[Replayed]) -> None:
    locator = recording(model_of(layers=1), bucket=1)
    for tokens in range(3, 3 + MOST_GRAPHS + 2):
        locator(tiny_inputs("llama", rows=1, tokens=tokens))
    assert len(locator._graphs) == MOST_GRAPHS


def test_what_cannot_be_recorded_runs_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(run: Any, inputs: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(locator_module, "CudaGraph", refuse)
    model, inputs = model_of(), tiny_inputs("llama")
    locator = recording(model)
    with pytest.warns(UserWarning, match="no CUDA graph of LlamaForCausalLM: operation not permitted"):
        got = locator(inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(locator(inputs), got)


def test_checks_wait_for_the_result(recorded: type[Replayed]) -> None:
    """A text without a real token is queued like any other, and refused when its answer is asked for."""
    locator = recording(model_of())
    good = tiny_inputs("llama")
    locator(good)
    bad = good | {"attention_mask": good["attention_mask"].clone()}
    bad["attention_mask"][2] = 0
    answer = locator.ask(bad)
    with pytest.raises(ValueError, match=r"inputs: an example has no real token|target: is NaN"):
        answer.result()


def test_mistakes_are_said_at_once_on_a_cpu() -> None:
    model, inputs = model_of(), tiny_inputs("llama")
    with pytest.raises(ValueError, match="target: is NaN or infinite"):
        Locator(model, path="layer").ask(inputs, lambda rows: rows.logits[:, 0] * float("nan"))
    with pytest.raises(ValueError, match="bucket: "):
        Locator(model, bucket=0, path="layer")
    with pytest.raises(ValueError, match=r"dtype: expected a floating-point type, 'fastest' or None, got torch\.int8"):
        Locator(model, dtype=torch.int8, path="layer")
    with pytest.raises(ValueError, match="read: a classifier has one vector"):
        Locator(tiny("llama"), read=2, path="layer")


def test_another_type_is_computed_on_a_copy() -> None:
    model, inputs = model_of(), tiny_inputs("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    locator = Locator(model, dtype=torch.bfloat16, path="layer")
    assert locator.dtype == torch.bfloat16
    assert_same(locator(inputs), Locator(copy.deepcopy(model).bfloat16(), path="layer")(inputs))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert Locator(model, dtype=torch.float32, path="layer").cascade.model is model


@pytest.mark.parametrize(("ratio", "dtype"), [(0.5, torch.bfloat16), (0.95, torch.float32), (2.0, torch.float32)])
def test_the_fastest_type_has_to_be_faster_by_a_fifth(
    ratio: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locator_module, "_seconds", lambda w: ratio if w.dtype == torch.bfloat16 else 1.0)
    model = model_of()
    locator = Locator(model, dtype="fastest", path="layer")
    assert locator.dtype == dtype
    assert (locator.cascade.model is model) == (dtype == torch.float32)


def test_threads_with_a_locator_each_take_turns() -> None:
    model = model_of()
    batches = [tiny_inputs("llama", seed=seed) for seed in range(4)]
    want = [Locator(model, path="layer")(inputs) for inputs in batches]
    got: dict[int, list[Attribution]] = {}

    def work(number: int) -> None:
        own = Locator(model, path="layer")
        got[number] = [own(batches[number]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, answers in got.items():
        for answer in answers:
            assert_same(answer, want[number])
    assert len(got) == 4
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("rule", ["legendre", "radau"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_give_what_plain_calls_give(family: str, rule: Any, dtype: torch.dtype) -> None:
    model = model_of(family).to("cuda", dtype)
    graphs, plain = Locator(model, rule=rule, path="layer"), Locator(model, rule=rule, graphs=False, path="layer")
    for seed in range(3):
        inputs = {name: value.cuda() for name, value in tiny_inputs(family, rows=2, seed=seed).items()}
        assert_same(graphs(inputs), plain(inputs), within=1e-5 if dtype == torch.float32 else 0.05)
    assert len(graphs._graphs) == 1
    assert None not in graphs._graphs.values()


@pytest.mark.cuda
@needs_gpu
def test_work_is_queued_on_the_callers_stream() -> None:
    model = model_of().cuda()
    locator = Locator(model, path="layer")
    inputs = {name: value.cuda() for name, value in tiny_inputs("llama").items()}
    want = locator(inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        answer = locator.ask(inputs)
    stream.synchronize()
    assert_same(answer.result(), want)


def test_a_tolerance_without_an_audit_is_refused():
    with pytest.raises(ValueError, match="audit: a tolerance needs at least 32, got 0"):
        Locator(tiny("bert"), tolerance=0.1, audit=0)


@pytest.mark.parametrize("texts", ["good film", ["good film", "bad"]])
def test_texts_in_the_place_of_inputs(texts: Any) -> None:
    model, tokenizer = tiny("bert"), tiny_tokenizer()
    locator = Locator(model, tokenizer=tokenizer)
    inputs = tokenizer(texts if isinstance(texts, list) else [texts], padding=True, return_tensors="pt")
    assert_same(locator(texts), locator(inputs), within=0)
    assert_same(locator(locator.read(texts)), locator(inputs))


def test_texts_that_cannot_be_read() -> None:
    with pytest.raises(TypeError, match=r"inputs: .* got str; tokenize it"):
        Locator(tiny("bert"))("good film")
    with pytest.raises(ValueError, match="inputs: need at least 1"):
        Locator(tiny("bert"), tokenizer=tiny_tokenizer())([])
