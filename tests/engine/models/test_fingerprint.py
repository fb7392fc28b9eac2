"""A model's print is the same for the same model, and another after any change of what it computes."""

from __future__ import annotations

import copy
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.tiny_models import FAMILIES, tiny, tiny_inputs
from spurge.engine.models.fingerprint import Opaque, model_print

SOURCE = """
import functools, logging, math
from collections import deque
from dataclasses import dataclass, field
import numpy as np
import torch
from torch import nn
import {other} as other

log = logging.getLogger("a model")
SCALE = {{"a": 2.0}}
KNOWN = frozenset({{"p", "q", "r"}})

@dataclass
class Settings:
    act: str = "relu"
    sizes: list = field(default_factory=lambda: [1, 2])

def helper(x, by=1.5):
    return x * SCALE["a"] * by if "p" in KNOWN else x

def outer(k):
    return lambda x: x + k

class Clamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clamp_min(0.25)

class Slots:
    __slots__ = ("size",)

    def __init__(self, size):
        self.size = size

scripted = torch.jit.CompilationUnit("def scripted(x):\\n    return x + 5\\n").scripted

class Base(nn.Module):
    def finish(self, x):
        return x - 1

class Net(Base):
    power = 2

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 4)
        self.fc = nn.Linear(4, 2)
        self.settings = Settings()
        self.steps = [outer(3), functools.partial(torch.add, other=1)]
        self.hidden = [nn.Linear(4, 4)]
        self.queue = deque([1, 2])
        self.table = torch.arange(4.0)
        self.attention = nn.MultiheadAttention(4, 2)
        self.itself = [self]
        self.numbers = [np.float32(0.5), range(3), slice(1, 2), Slots(7), logging.getLogger("b")]
        shared = nn.ReLU()
        self.shared = nn.ModuleList([shared, nn.ReLU(), shared])
        self.register_buffer("shift", torch.zeros(4), persistent=False)

    @torch.no_grad()
    def forward(self, x):
        from {other} import add

        log.debug("runs")
        x = scripted(add(x))
        return self.fc(self.finish(Clamp.apply(other.twice(helper(self.first(x))))))
"""
OTHER = """
def twice(x):
    return 2 * x

def add(x):
    return x + 1

unused = 3
"""


def load(source: str = SOURCE, other: str = OTHER):
    """The class Net of this source, as a module of its own."""
    names = []
    for name, text in (("spurge_test_other", other), ("spurge_test_net", source)):
        module = types.ModuleType(name)
        sys.modules[name] = module
        exec(compile(text.format(other="spurge_test_other"), name, "exec", dont_inherit=True), module.__dict__)
        names.append(module)
    return names[-1].Net().eval()


@pytest.fixture(autouse=True)
def _tidy():
    yield
    for name in ("spurge_test_other", "spurge_test_net"):
        sys.modules.pop(name, None)


CHANGES = {
    "a constant": ('"a": 2.0', '"a": 3.0'),
    "a member of a set": ('"q", "r"', '"q", "s"'),
    "a default": ("by=1.5", "by=1.6"),
    "an operation": ("x * SCALE", "x + SCALE"),
    "a field": ('"relu"', '"gelu"'),
    "a factory": ("lambda: [1, 2]", "lambda: [1, 3]"),
    "a closure": ("outer(3)", "outer(4)"),
    "a partial": ("other=1)", "other=2)"),
    "a function of torch": ("torch.add", "torch.sub"),
    "a static method": ("clamp_min(0.25)", "clamp_min(0.5)"),
    "a base class": ("x - 1", "x - 2"),
    "an attribute of the class": ("power = 2", "power = 3"),
    "a queue": ("deque([1, 2])", "deque([2, 1])"),
    "a plain tensor": ("arange(4.0)", "zeros(4)"),
    "a module in a list": ("[nn.Linear(4, 4)]", "[nn.Linear(4, 4, bias=False)]"),
    "heads of attention": ("MultiheadAttention(4, 2)", "MultiheadAttention(4, 1)"),
    "a buffer": ("torch.zeros(4), persistent", "torch.ones(4), persistent"),
    "a number of numpy": ("np.float32(0.5)", "np.float32(0.25)"),
    "a range": ("range(3)", "range(4)"),
    "a slot": ("Slots(7)", "Slots(8)"),
    "a scripted function": ("x + 5", "x + 6"),
    "which module is shared": ("nn.ReLU(), shared]", "*[nn.ReLU()] * 2]"),
    "forward": ("self.fc(self.finish(", "self.fc(-self.finish("),
}


def test_the_same_source_gives_the_same_print():
    model = load()
    assert model_print(model) == model_print(load()) == model_print(model)
    assert model_print(copy.deepcopy(model)) == model_print(model)
    assert model_print(load(SOURCE.replace("log.debug", "\n\n        log.debug"))) == model_print(model)


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_gives_another(change):
    before, after = CHANGES[change]
    assert before in SOURCE
    assert model_print(load(SOURCE.replace(before, after))) != model_print(load())


def test_code_of_another_file_counts():
    assert model_print(load(other=OTHER.replace("2 * x", "3 * x"))) != model_print(load())
    assert model_print(load(other=OTHER.replace("x + 1", "x + 2"))) != model_print(load())
    assert model_print(load(other=OTHER.replace("= 3", "= 4"))) == model_print(load())


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.first.weight.data.view(-1)[0].add_(1e-7),
        lambda model: model.shift.add_(1),
        lambda model: model.table.add_(1),
        lambda model: model.hidden[0].weight.data.add_(1),
        lambda model: model.half(),
        lambda model: setattr(model, "power", 5),
        lambda model: setattr(model.settings, "act", "tanh"),
        lambda model: model.attention.__setattr__("batch_first", True),
        lambda model: setattr(model, "fc", nn.Sequential(model.fc)),
        lambda model: setattr(model.fc, "weight", Odd(model.fc.weight)),
    ],
)
def test_a_change_of_the_object_counts(change):
    model = load()
    change(model)
    assert model_print(model) != model_print(load())


class Odd(nn.Parameter):
    """A parameter as quantised layers have them: with more than its bits."""


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, tmp_path):
    model = tiny(family)
    before = model_print(model)
    model(**tiny_inputs(family))
    assert model_print(model) == before == model_print(tiny(family))
    assert model_print(tiny(family, seed=1)) != before
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    again.save_pretrained(tmp_path / "b")
    assert model_print(type(model).from_pretrained(tmp_path / "b").eval()) == model_print(again)


def test_the_kind_of_attention_and_a_setting_count():
    prints = {model_print(tiny("bert", **settings)) for settings in ({}, {"attn_implementation": "eager"})}
    prints |= {model_print(tiny("bert", layer_norm_eps=1e-4)), model_print(tiny("bert", hidden_act="relu"))}
    assert len(prints) == 4


def test_hooks_that_only_record_are_no_hindrance():
    model = tiny("llama", attn_implementation="eager")
    before = model_print(model)
    with torch.no_grad():
        model(**tiny_inputs("llama"), output_attentions=True, output_hidden_states=True)
    assert model_print(model) == before


def test_a_forward_that_was_put_back_is_no_hindrance():
    """What wraps a forward for one call leaves the method behind on the object."""
    model = load()
    before = model_print(model)
    model.first.forward = model.first.forward  # type: ignore[method-assign]
    model.forward = model.forward
    assert model_print(model) == before


def test_what_nobody_can_look_into():
    model = nn.Sequential(nn.Linear(2, 2))
    handle = model[0].register_forward_pre_hook(lambda module, args: None)
    with pytest.raises(Opaque, match="module '0' has forward hooks"):
        model_print(model)
    handle.remove()
    model[0].forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(Opaque, match="the forward of module '0' was replaced"):
        model_print(model)
    del model[0].forward
    deep: list = []
    for _ in range(200):
        deep = [deep]
    model.deep = deep
    with pytest.raises(Opaque, match="nested too deeply"):
        model_print(model)
    with pytest.raises(ValueError, match="meta device"):
        model_print(nn.Linear(2, 2).to("meta"))


def test_the_print_is_the_same_in_another_process(tmp_path: Path):
    """Another seed of hashes, a fresh import from a file: sets and shared constants must not show."""
    (tmp_path / "spurge_test_net.py").write_text(SOURCE.format(other="spurge_test_other"))
    (tmp_path / "spurge_test_other.py").write_text(OTHER.format())
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from spurge.engine.models.fingerprint import model_print; from spurge_test_net import Net\n"
        "print(model_print(Net().eval()))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), *sys.path],
        env={"PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == model_print(load()) + "\n"
