"""Arguments of ``plan``, ``locate`` and ``edit``: the neurons behind a shortcut."""

from __future__ import annotations

import argparse

from spurge.cli.arguments import Container, add_data, add_golden, add_model, positive

#: Options of ``locate`` and ``edit`` that `MacU` takes.
MACU_SETTINGS = (
    *("objective", "units", "batch_size", "max_length", "memory"),
    *("path", "exact", "audit", "nodes", "tolerance", "top_k", "correlation_set", "keep_punctuation"),
    *("fraction", "share", "cap", "texts", "certify"),
    *("search", "neurons", "edit_texts", "guard"),
    *("which", "controls"),
)
#: Options of ``edit`` that `Repair` takes.
REPAIR_SETTINGS = ("steps", "rank", "last_layer")
#: Options of ``plan`` that `Cascade` takes.
CASCADE_SETTINGS = ("path", "units", "exact", "audit", "nodes", "rule", "tolerance", "memory")


def add_plan(parser: argparse.ArgumentParser) -> None:
    """``spurge plan``: what a localisation will take."""
    parser.description = (
        "Says what scoring the neurons of a model will take, before it is started: rows, blocks, operations, memory, "
        "and time by a measurement of a few seconds on the model itself."
    )
    add_model(parser, verbalizer=True)
    add_data(parser, required=False)
    parser.add_argument("--tokens", type=int, default=32, metavar="T", help="of a text, without --data (%(default)s)")
    parser.add_argument("--examples", type=int, metavar="N", help="texts; default those of --data, else 1")
    settings = parser.add_argument_group("settings")
    _add_integral(settings)
    settings.add_argument("--rule", choices=("legendre", "radau"), help="of the quadrature (legendre)")
    settings.add_argument("--batch-size", type=int, default=32, metavar="N", help="texts in a batch (%(default)s)")
    settings.add_argument("--max-length", type=positive, metavar="N", help="tokens a text is cut to")
    settings.add_argument("--memory", metavar="SIZE", help="budget beyond the model's own, e.g. 256MiB")


def add_locate(parser: argparse.ArgumentParser) -> None:
    """``spurge locate``: scores of all neurons, and the sets chosen by them."""
    parser.description = (
        "Scores every neuron by MacU's Eq. 5; writes two score maps, the chosen sets and their overlap."
    )
    add_model(parser, verbalizer=True)
    add_data(parser, weights=True)
    add_golden(parser, required=True)
    parser.add_argument("--out", metavar="FILE", required=True, help="where to write, e.g. located.safetensors")
    parser.add_argument("--resume", metavar="DIR", help="keep finished batches here; a second run goes on from them")
    settings = _add_preset(parser)
    _add_integral(settings)
    settings.add_argument("--top-k", type=int, metavar="K", help="correlation tokens of a text")
    settings.add_argument(
        "--correlation-set",
        choices=("occurrences", "words"),
        help="a word that stands twice in a text is two of its correlation tokens, or one",
    )
    settings.add_argument(
        "--keep-punctuation", action="store_true", default=None, help="punctuation can be a correlation token"
    )
    settings.add_argument("--fraction", type=float, metavar="X", help="select neurons with this share of the maximum")
    settings.add_argument("--share", type=float, metavar="X", help="keep neurons that this share of batches selects")
    settings.add_argument("--cap", type=int, metavar="N", help="select at most N neurons for each set")
    settings.add_argument("--texts", type=int, metavar="N", help="training texts the scores are summed over")
    settings.add_argument("--certify", type=int, metavar="N", help="neurons of each side to ablate exactly, 0 for none")


def add_edit(parser: argparse.ArgumentParser) -> None:
    """``spurge edit``: gates for located neurons, or a repair by training weights."""
    parser.description = (
        "Finds gates for located neurons, or (--search weights) trains weights on texts whose words were swapped, and "
        "writes them as an edit file."
    )
    add_model(parser, verbalizer=True)
    parser.add_argument(
        "--located", metavar="FILE", help="what spurge locate wrote; a repair needs it for --which neurons alone"
    )
    add_data(parser)
    add_golden(parser, required=True)
    parser.add_argument("--out", metavar="FILE", required=True, help="where to write, e.g. edit.safetensors")
    parser.add_argument(
        "--resume", metavar="FILE", help="keep the swarm, or the training, here; a second run goes on from it"
    )
    settings = _add_preset(parser)
    settings.add_argument(
        "--search", choices=("pso", "gradient", "weights"), help="gates by particle swarm or gradient, or a repair"
    )
    settings.add_argument("--neurons", choices=("located", "all"), help="which neurons the search may move")
    settings.add_argument("--texts", dest="edit_texts", type=int, metavar="N", help="training texts the search uses")
    settings.add_argument("--guard", type=float, metavar="X", help="points of accuracy a swarm's particle may lose")
    repair = parser.add_argument_group("repair", "with --search weights")
    repair.add_argument(
        "--which", choices=("neurons", "lora", "all"), help="weights of located neurons, low rank, or all (the default)"
    )
    repair.add_argument("--dev", metavar="FILE", help="texts that choose its strength; default a quarter of --data")
    repair.add_argument("--steps", type=positive, metavar="N", help="minibatches (100)")
    repair.add_argument("--rank", type=positive, metavar="R", help="of --which lora (8)")
    repair.add_argument(
        "--last-layer", action="store_true", default=None, help="refit the last layer, where that is better"
    )
    repair.add_argument(
        "--controls",
        action="store_true",
        default=None,
        help="also repair random neurons, and without swaps: each takes as long again",
    )


def _add_preset(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("settings", "those not given are the preset's")
    group.add_argument("--preset", choices=("best", "paper"), help="settings to start from (best)")
    group.add_argument("--objective", choices=("proximity", "counterfactual"), help="what a neuron is judged by")
    group.add_argument("--batch-size", type=int, metavar="N", help="texts in a batch")
    group.add_argument("--max-length", type=int, metavar="N", help="tokens a text is cut to")
    group.add_argument("--memory", metavar="SIZE", help="budget beyond the model's own, e.g. 256MiB")
    return group


def _add_integral(settings: Container) -> None:
    settings.add_argument(
        "--units",
        choices=("neurons", "heads", "both"),
        help="feed-forward neurons (the default), attention heads, or both; edit and evaluate read it from their files",
    )
    settings.add_argument(
        "--path",
        choices=("gradient", "neuron", "layer", "joint"),
        help="each neuron alone, by one gradient (the default) or measured; or a layer's, or all, moved together",
    )
    settings.add_argument("--exact", type=int, metavar="N", help="neurons measured beside the gradient")
    settings.add_argument("--audit", type=int, metavar="N", help="neurons drawn to say how good the scores are")
    settings.add_argument("--nodes", type=int, metavar="N", help="quadrature nodes of the layer and joint paths")
    settings.add_argument(
        "--tolerance", type=float, metavar="X", help="relative error up to which more is measured, or halved"
    )
