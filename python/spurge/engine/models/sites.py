"""Sites: where a model keeps its feed-forward neurons and attention heads, found from the module tree.

A site is the input of a layer's down projection ``u = z W2' + b``, ``z`` ``[R, T, F]``. One coordinate of ``z`` is a
neuron; in a gated layer ``z = act(gate(x)) * up(x)``, so the neuron is counted after the product. The routed experts
of a layer are one site (`spurge.engine.models.experts`), beside that of a shared expert.

The heads of a layer's self-attention are a site of the same kind: the input of its output projection, head k being
coordinates ``k d`` to ``(k + 1) d - 1``, with d the width of a head.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import Tensor, nn

from spurge.engine.base.checks import choice
from spurge.engine.base.tensor_parallel import is_sharded
from spurge.engine.models.attention import head_width
from spurge.engine.models.experts import SUPPORTED, Experts, is_routed, refusal
from spurge.engine.models.parameters import named_as, plain_name
from spurge.engine.models.projections import Composite, Linear, Projection, features, is_linear, linears, plain
from spurge.engine.models.sharded_projection import RowSharded
from spurge.engine.models.sharded_projection import refusal as refused_shards

Units = Literal["neurons", "heads", "both"]

# Names that transformers' model families use. Shapes decide first; a name decides where shapes leave a choice, which
# they do only when F = H. A pattern matches the end of a module path.
_DOWN = (
    "output.dense",  # BERT, RoBERTa, ELECTRA, DeBERTa, ViT of transformers 4
    "ffn.lin2",  # DistilBERT
    "mlp.c_proj",  # GPT-2
    "dense_4h_to_h",  # GPT-NeoX
    "down_proj",  # LLaMA, Mistral, Qwen, Gemma, GLM-4
    "fc2",  # Phi, OPT, BART, ViT of transformers 5
    "fc_out",  # GPT-J
    "linear2",  # torch.nn.TransformerEncoderLayer
    "wo",  # T5
    "Wo",  # ModernBERT
)
_QUERY = ("query", "query_proj", "q_proj", "q_lin", "q")
_HEADS_OUT = ("output.dense", "o_proj", "out_lin", "c_proj", "out_proj", "dense", "Wo", "o")


@dataclass(frozen=True)
class NeuronRef:
    """One neuron: coordinate ``index`` (from 0) of the site called ``site``.

    Raises:
        TypeError: ``site`` is no string or ``index`` no integer.
        ValueError: ``index`` is negative.
    """

    site: str
    index: int

    def __post_init__(self) -> None:
        if not isinstance(self.site, str):
            raise TypeError(f"site: expected a module path, got {type(self.site).__name__}")
        if isinstance(self.index, bool) or not hasattr(self.index, "__index__"):
            raise TypeError(f"index: expected an integer, got {type(self.index).__name__}")
        object.__setattr__(self, "index", self.index.__index__())
        if self.index < 0:
            raise ValueError(f"index: must not be negative, got {self.index}")

    def __str__(self) -> str:
        return f"{self.site}[{self.index}]"


@dataclass(frozen=True, eq=False)
class Site:
    """One feed-forward layer, or the heads of one attention; the model's own modules, nothing is copied.

    Attributes:
        name: module path of the down projection, ``"bert.encoder.layer.3.output.dense"``, or of the module that holds
            the routed experts, ``"model.layers.3.mlp.experts"``; of heads, of attention's output projection; as without
            ``torch.compile``.
        layer: position of its block, from 0 (an encoder-decoder counts on from the encoder's last).
        width: F, the neurons (heads) of the site; of E experts, neuron ``e * F / E + k`` is neuron k of expert e.
        hidden: H, the model's width.
        projection: the down projection, or attention's output projection.
        block: the transformer layer that holds it (a hand-named site outside all layers: ``down`` itself).
        block_name: module path of ``block``.
        ffn: the module that receives the feed-forward layer's input ``[R, T, H]`` as its first argument, and that of
            the experts beside it; None where experts stand in the block itself.
        attention: the module that computes (self-)attention: the one transformers hands to its attention function.
        query: the separate query projection; None where query, key and value are one matrix.
        attention_output: the projection of the joined heads.
    """

    name: str
    layer: int
    width: int
    hidden: int
    projection: Projection
    block: nn.Module
    block_name: str
    ffn: nn.Module | None
    attention: nn.Module | None
    query: nn.Module | None
    attention_output: nn.Module | None

    @property
    def down(self) -> nn.Module:
        """The down projection's module: a linear layer, one of several parts (LoRA) whole, or an experts module."""
        return self.projection.module

    @property
    def parameter(self) -> Tensor:
        """The parameter that holds W2, in its own shape."""
        return self.projection.parameter

    def weight(self) -> Tensor:
        """W2 as ``[H, F * size]``: column k belongs to neuron k. A view of the parameter; of experts, maybe a copy."""
        return self.projection.weight()

    def bias(self) -> Tensor | None:
        """The down projection's bias ``[H]`` (of experts ``[E, H]``), or None."""
        return self.projection.bias()

    def __repr__(self) -> str:
        return f"Site({self.name!r}, layer={self.layer}, width={self.width}, hidden={self.hidden})"


def find_sites(model: nn.Module, names: Sequence[str] | None = None, *, units: Units = "neurons") -> list[Site]:
    """The sites of ``model``, ordered by layer.

    Blocks are the children of the longest ``ModuleList`` whose children hold attention beside a feed-forward pair
    (up: H to F or 2F, down: F to H) or routed experts; an encoder-decoder has two such lists.

    Args:
        model: any ``transformers`` model, bare or with a head, or a ``torch.nn.TransformerEncoder``.
        names: module paths of down projections or experts modules, to take these instead of what would be found (a
            projection outside all blocks, such as a classifier, is allowed). They come back ordered by layer.
        units: ``"neurons"``; ``"heads"``: those of self-attention, sites with the names of its output projections (of
            shared keys and values, every query head is one); or ``"both"``, a layer's heads before its neurons. Without
            heads, a named output projection has its single coordinates as neurons.

    Raises:
        TypeError: ``model`` is no module, or ``names`` is one string or holds something else than strings.
        ValueError: nothing was found, heads cannot be told apart, experts are held in a form that is not supported,
            ranks hold a down projection in another way than by its neurons, or a name is unknown, repeated or no such
            module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    choice("units", units, get_args(Units))
    lists = _block_lists(model)
    if names is not None:
        return [_of_units(site, units) for site in _named(model, lists, names)]
    longest = max((len(blocks) for blocks in lists), default=0)
    blocks = [block for blocks in lists if len(blocks) == longest for block in blocks]
    sites = [site for layer, (name, block) in enumerate(blocks) for site in _sites_in(block, name, layer)]
    if not sites:
        raise ValueError(
            f"model: found no feed-forward layers beside attention in {type(model).__name__}; name the down "
            f"projections by hand, names=[...]{_advice([*map(plain_name, linears(model))])}"
        )
    if units == "neurons":
        return sites
    heads = {site.block_name: heads_of(site) for site in sites}
    return sorted([*heads.values(), *(sites if units == "both" else ())], key=lambda site: site.layer)


def heads_of(site: Site) -> Site:
    """The heads of the self-attention in a site's block.

    Raises:
        ValueError: they cannot be told apart.
    """
    output = site.attention_output
    projection = None if output is None else projection_of(output)
    if output is None or not isinstance(projection, Linear):
        raise ValueError(f"model: the heads of {site.block_name!r} cannot be told apart: it has no output projection")
    path = next(path for path, module in site.block.named_modules() if module is output)
    name = plain_name(f"{site.block_name}.{path}")
    _check_shards(name, output)
    width = head_width(site.attention, projection.inputs)
    if isinstance(width, str):
        raise ValueError(f"model: the heads of {site.block_name!r} cannot be told apart: {width}")
    projection = replace(projection, size=width)
    hidden, heads = projection.shape
    return replace(site, name=name, width=heads, hidden=hidden, projection=projection)


def joins_heads(site: Site) -> bool:
    """Whether a site is the output projection of its block's attention."""
    return site.down is site.attention_output


def _of_units(site: Site, units: Units) -> Site:
    """A named site, an attention's output projection as its heads where these are asked for."""
    if units == "heads" and not joins_heads(site):
        raise ValueError(f"names: {site.name!r} must be the output projection of an attention, got another module")
    return heads_of(site) if units != "neurons" and joins_heads(site) else site


def incoming(site: Site) -> dict[str, nn.Module]:
    """The projections that a site's neurons come from, by module path; each gives F or 2F (gate and up) outputs."""
    shapes = [(site.hidden, site.width), (site.hidden, 2 * site.width)]
    found = {path: linear for path, linear in _split(site.block)[1].items() if linear is not site.down}
    return {plain_name(f"{site.block_name}.{path}"): one for path, one in found.items() if _shape(one) in shapes}


def known_sites(model: nn.Module) -> list[Site]:
    """The sites of ``model``, none where none are found."""
    try:
        return find_sites(model)
    except ValueError:
        return []


def widths(sites: Sequence[Site]) -> dict[str, int]:
    """Site name to F, in the order given."""
    return {site.name: site.width for site in sites}


def projection_of(module: nn.Module) -> Projection | None:
    """What can be a site's down projection, or None."""
    if is_linear(module):
        if _is_sharded(module):
            return RowSharded(module)
        return Linear(module) if plain(module) else Composite(module)
    return Experts(module) if refusal(module) is None else None


def _is_sharded(linear: nn.Module) -> bool:
    return is_sharded(linear._parameters.get("weight"))


def _check_shards(name: str, module: nn.Module) -> None:
    """Raises ValueError where ranks hold a linear layer in a way that does not deal out its neurons."""
    if is_linear(module) and _is_sharded(module) and (odd := refused_shards(module)):
        raise ValueError(f"model: the down projection {name!r} is {odd}")


def _shape(linear: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer."""
    found = features(linear)
    assert found is not None
    return found


def _matches(path: str, patterns: Sequence[str]) -> bool:
    path = plain_name(path)
    return any(path == pattern or path.endswith("." + pattern) for pattern in patterns)


def _attention_path(path: str) -> str | None:
    """The part of ``path`` up to the attention it lies in: ``"attention"`` of ``"attention.self.key"``, else None."""
    parts = path.split(".")
    for depth, part in enumerate(parts[:-1]):
        if "attn" in part.lower() or "attention" in part.lower():
            return ".".join(parts[: depth + 1])
    return None


def _split(block: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """A block's projections: those inside attention, and the others; routed experts are in neither."""
    inside: dict[str, nn.Module] = {}
    outside: dict[str, nn.Module] = {}
    for path, linear in linears(block).items():
        if "experts" in path.split("."):
            continue
        (outside if _attention_path(path) is None else inside)[path] = linear
    return inside, outside


def _pairs(block: nn.Module) -> Iterator[tuple[str, str]]:
    """(up, down) paths of the feed-forward layers of one block."""
    inside, outside = _split(block)
    if not inside:
        return
    # The first projection of attention (query, or all three in one) reads the model's width; where its width is
    # hidden in torch's MultiheadAttention, the output projection has it on both sides.
    hidden = _shape(next(iter(inside.values())))[0]
    shapes = {path: _shape(linear) for path, linear in outside.items()}
    found = []
    for down, (width, out) in shapes.items():
        ups = [
            up
            for up, (reads, gives) in shapes.items()
            if up != down and reads == hidden and gives in (width, 2 * width)
        ]
        if out == hidden and ups:
            found.append((ups[0], down))
    known = [pair for pair in found if _matches(pair[1], _DOWN)]
    yield from known or found


def _routed(block: nn.Module) -> list[str]:
    """Paths of the routed experts of one block, in whatever form they are held."""
    if not _split(block)[0]:
        return []
    return [path for path, module in block.named_modules() if is_routed(path, module)]


def _block_lists(model: nn.Module) -> list[list[tuple[str, nn.Module]]]:
    """Every innermost ``ModuleList`` with transformer layers in it, as (path, block) of the children that are such."""
    lists = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            prefix = f"{name}." if name else ""
            blocks = [
                (prefix + key, child) for key, child in module.named_children() if any(_pairs(child)) or _routed(child)
            ]
            if blocks:
                lists[name] = blocks
    inner = [a for a in lists if not any(b != a and b.startswith(f"{a}." if a else "") for b in lists)]
    return [lists[name] for name in inner]


def _sites_in(block: nn.Module, block_name: str, layer: int) -> list[Site]:
    routed = _routed(block)
    for path in routed:
        experts = block.get_submodule(path)
        if refusal(experts) is not None:
            raise ValueError(f"model: {_refused(f'{block_name}.{path}', experts)}")
    pairs = [*((None, path) for path in routed), *_pairs(block)]
    return [_site(block, block_name, layer, up, down) for up, down in pairs]


def _refused(name: str, experts: nn.Module) -> str:
    return f"the experts {name!r} are {refusal(experts)}; expected {SUPPORTED}"


def _site(block: nn.Module, block_name: str, layer: int, up: str | None, down: str) -> Site:
    module, name = block.get_submodule(down), f"{block_name}.{down}"
    _check_shards(name, module)
    projection = projection_of(module)
    assert projection is not None
    hidden, width = projection.shape
    attention, query, heads_out = _attention_parts(block)
    return Site(
        name=plain_name(name),
        layer=layer,
        width=width,
        hidden=hidden,
        projection=projection,
        block=block,
        block_name=plain_name(block_name),
        ffn=_ffn(block, up, down),
        attention=attention,
        query=query,
        attention_output=heads_out,
    )


def _ffn(block: nn.Module, up: str | None, down: str) -> nn.Module | None:
    routed = _routed(block)
    for mixture in (path.rpartition(".")[0] for path in routed):
        if mixture and down.startswith(f"{mixture}."):
            return block.get_submodule(mixture)
    if down in routed:
        return None
    return block.get_submodule(down if up is None else _ffn_path(block, up, down))


def _ffn_path(block: nn.Module, up: str, down: str) -> str:
    """The smallest module holding both projections; where that holds attention too (BERT), its child on up's side."""
    parts, depth = up.split("."), 0
    for a, b in zip(parts, down.split("."), strict=False):
        if a != b:
            break
        depth += 1
    shared = ".".join(parts[:depth])
    around = any(f"{path}.".startswith(f"{shared}.") or not shared for path in _split(block)[0])
    return ".".join(parts[: depth + 1]) if around else shared


def _attention_parts(block: nn.Module) -> tuple[nn.Module | None, nn.Module | None, nn.Module | None]:
    """(attention, query, output projection) of a block's first attention, which is self-attention."""
    inside, _ = _split(block)
    if not inside:
        return None, None, None
    first = next(iter(inside))
    whole = str(_attention_path(first))
    own = {path: linear for path, linear in inside.items() if path.startswith(whole + ".")}
    parent = first.removesuffix("._orig_mod").rpartition(".")[0]
    attention = block.get_submodule(parent)
    queries = [
        m for path, m in own.items() if path.startswith(f"{parent}.") and _matches(path[len(parent) + 1 :], _QUERY)
    ]
    outs = [linear for path, linear in own.items() if _matches(path, _HEADS_OUT)]
    return attention, queries[0] if queries else None, outs[-1] if outs else None


def _named(model: nn.Module, lists: list[list[tuple[str, nn.Module]]], names: Sequence[str]) -> list[Site]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"names: expected a sequence of module paths, got {names!r}")
    if len(names) == 0:
        raise ValueError("names: need at least 1, got none")
    if len(set(map(plain_name, names))) < len(names):
        raise ValueError(f"names: each site may be named once, got {list(names)}")
    paths, blocks = (
        {plain_name(path): path for path, _ in model.named_modules()},
        [b for blocks in lists for b in blocks],
    )
    layers = {plain_name(path): layer for path, layer in linears(model).items()}
    sites = []
    for name in (named_as(plain_name(name), paths) for name in names):
        if name not in paths:
            raise ValueError(f"names: the model has no module {name!r}{_advice(layers, name)}")
        module = model.get_submodule(paths[name])
        whole = next((path for path in layers if name.startswith(f"{path}.")), None)
        if whole is not None:
            raise ValueError(
                f"names: {name!r} is a part of {whole!r}, a {type(layers[whole]).__name__} whose input the neurons "
                f"are; name {whole!r}"
            )
        if projection_of(module) is None:
            below = [path for path in layers if path.startswith(f"{name}.")]
            if is_routed(name, module):
                raise ValueError(f"names: {_refused(name, module)}")
            raise ValueError(
                f"names: {name!r} must be a linear projection, got {type(module).__name__}{_advice(below, name)}"
            )
        sites.append(_site_of(paths[name], module, blocks))
    return sorted(sites, key=lambda site: site.layer)


def _site_of(name: str, module: nn.Module, blocks: list[tuple[str, nn.Module]]) -> Site:
    for layer, (block_name, block) in enumerate(blocks):
        if name.startswith(f"{block_name}."):
            down = name[len(block_name) + 1 :]
            ups = {d: u for u, d in _pairs(block)}
            return _site(block, block_name, layer, ups.get(down), down)
    _check_shards(name, module)
    projection = projection_of(module)
    assert projection is not None
    hidden, width = projection.shape
    name = plain_name(name)
    return Site(name, len(blocks), width, hidden, projection, module, name, module, None, None, None)


def _advice(paths: Sequence[str] | dict[str, nn.Module], name: str | None = None) -> str:
    """``"; did you mean ..."`` with up to three of ``paths``: the closest to ``name``, or the last ones."""
    paths = list(paths)
    close = paths[-3:] if name is None else difflib.get_close_matches(name, paths, n=3, cutoff=0.6)
    verb = "for example" if name is None else "did you mean"
    return f"; {verb} {', '.join(map(repr, close))}" if close else ""
