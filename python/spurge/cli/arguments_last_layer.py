"""Arguments of ``features``, ``fcr`` and ``neurontune``: the last layer of a classifier."""

from __future__ import annotations

import argparse

from spurge.cli.arguments import add_data, add_features_device, add_model, positive

#: Options of ``fcr`` that `FCR` takes.
FCR_SETTINGS = ("score", "reduction", "activation", "sign", "weights", "row", "rates", "candidates", "most", "memory")
#: Options of ``neurontune`` that `NeuronTune` takes.
NEURONTUNE_SETTINGS = (
    *("threshold", "classes", "signs", "least_wrong", "keep", "solver", "start", "l2", "select", "memory", "seed"),
)


def add_features(parser: argparse.ArgumentParser) -> None:
    """``spurge features``: what the head of a classifier reads, written once for all last-layer methods."""
    parser.description = (
        "Runs a transformers text classifier over a labelled file once and writes what its last layer reads, with "
        "labels, groups and the layer itself. spurge fcr and spurge neurontune start from such files."
    )
    parser.add_argument("--head", metavar="PATH", help="path of the linear layer in the model; default its own head")
    parser.add_argument("--out", metavar="FILE", required=True, help="where to write, e.g. train.safetensors")
    parser.add_argument(
        "--cross-groups", action="store_true", help="a group for each class in each group of the column"
    )
    parser.add_argument("--group-names", metavar="A,B", help="the groups in order, where a file may lack some of them")
    running = parser.add_argument_group("extraction")
    running.add_argument("--token", choices=("auto", "first", "last"), default="auto", help="whose features (auto)")
    running.add_argument("--batch-size", type=int, default=64, metavar="N", help="texts in a batch (%(default)s)")
    running.add_argument("--max-length", type=int, metavar="N", help="tokens a text is cut to")
    running.add_argument("--autocast", choices=("bfloat16", "float16"), help="run the model in mixed precision")
    running.add_argument("--storage", choices=("float32", "float16"), default="float32", help="type of the features")
    running.add_argument("--cache", metavar="FOLDER", help="keep finished blocks there, to resume and to reuse")
    running.add_argument("--memory", metavar="SIZE", help="budget of a batch, e.g. 256MiB")
    add_model(parser)
    add_data(parser, groups=True)


def add_fcr(parser: argparse.ArgumentParser) -> None:
    """``spurge fcr``: removal of a class or a feature by single weights."""
    parser.description = (
        "Removes a class, or what a feature does to the classes, by editing single weights of the last layer (FCR). A "
        "feature is known by the groups of --features; its rate is given or chosen on --select, whose "
        "worst group is one of each class in each group."
    )
    parser.add_argument("--features", metavar="FILE", required=True, help="features to work on (spurge features)")
    add_features_device(parser)
    select = "features of the validation set, to choose on; default a half of --features, which then finds no weights"
    parser.add_argument("--select", metavar="FILE", help=select)
    parser.add_argument("--test", metavar="NAME=FILE", action="append", default=[], help="test set, any number of them")
    parser.add_argument("--out", metavar="FILE", required=True, help="where to write, e.g. edit.safetensors")
    parser.add_argument("--removal", metavar="FILE", help="also write all that was found, e.g. removal.safetensors")
    what = parser.add_argument_group("what to remove").add_mutually_exclusive_group(required=True)
    what.add_argument("--remove-class", metavar="NAME", help="a class, by its name or number")
    what.add_argument(
        "--remove-feature",
        metavar="A,B|all",
        help="groups of --features by name or number; all: for each class the one that goes with it most",
    )
    tilt = parser.add_argument_group("how far").add_mutually_exclusive_group()
    tilt.add_argument("--rate", type=float, metavar="R", help="0 leaves the weight, 1 is orthogonal (Eq. 8)")
    tilt.add_argument("--angle", type=float, metavar="DEGREES", help="tilt of the hyperplane, 90 is orthogonal")
    criteria = ("gap", "worst_group", "worst_class", "independence")
    tilt.add_argument("--criterion", choices=criteria, help="choose the rate on --select; independence needs no labels")
    settings = parser.add_argument_group("settings", "those not given are the preset's")
    settings.add_argument("--preset", choices=("best", "paper"), help="settings to start from (best)")
    settings.add_argument("--score", choices=("sca", "product"), help="rank edges by SCA, or by G times A alone (sca)")
    settings.add_argument("--reduction", choices=("mean", "sum"), help="class means, or the paper's sums")
    settings.add_argument(
        "--activation", choices=("magnitude", "relu"), help="what negative features count (magnitude)"
    )
    settings.add_argument("--sign", choices=("positive", "any"), help="weights that may be edited (positive)")
    settings.add_argument("--weights", type=int, metavar="N", help="weights to edit for a class or feature (1)")
    settings.add_argument("--row", choices=("predicted", "labelled", "weight"), help="how a feature's class is told")
    settings.add_argument("--rates", choices=("shared", "each"), help="a criterion's rate for all edges or for each")
    settings.add_argument("--candidates", type=int, metavar="N", help="edges that a criterion compares")
    settings.add_argument("--most", type=float, metavar="R", help="greatest rate (1)")
    settings.add_argument("--memory", metavar="SIZE", help="budget of the scores, e.g. 256MiB")
    parser.add_argument("--no-controls", action="store_true", help="leave out random weights and moved thresholds")
    parser.add_argument("--draws", type=positive, default=20, metavar="N", help="draws of random weights (%(default)s)")
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="for intervals (%(default)s)")


def add_neurontune(parser: argparse.ArgumentParser) -> None:
    """``spurge neurontune``: suppression of spurious features and a new last layer."""
    parser.description = (
        "Zeroes features that are larger where the model is wrong, and retrains the last layer without them, balanced "
        "by class (NeuronTune). Needs no group labels. On test sets it is held beside the model, the same retraining "
        "without a mask, random masks of the same size and, with --dfr, the oracle with group labels."
    )
    parser.add_argument(
        "--features",
        metavar="FILE",
        required=True,
        help="features to retrain on; without --identify a validation set, halved: one half identifies",
    )
    add_features_device(parser)
    parser.add_argument("--identify", metavar="FILE", help="features of a validation set, to identify and select on")
    parser.add_argument("--test", metavar="NAME=FILE", action="append", default=[], help="test set, any number of them")
    parser.add_argument("--out", metavar="FILE", help="where to write the edit, e.g. edit.safetensors")
    parser.add_argument("--tuned", metavar="FILE", help="where to write all that was found, e.g. tuned.safetensors")
    no_mask = "also write the control without a mask as an edit, e.g. no-mask.safetensors"
    parser.add_argument("--no-mask-out", metavar="FILE", help=no_mask)
    dfr = "also write DFR's layer as an edit, e.g. dfr.safetensors; needs groups"
    parser.add_argument("--dfr-out", metavar="FILE", help=dfr)
    settings = parser.add_argument_group("settings", "several values are candidates that --criterion chooses from")
    settings.add_argument("--threshold", type=float, nargs="+", metavar="X", help="suppress above this score (0)")
    settings.add_argument("--classes", choices=("union", "intersection", "each"), help="above it for which (union)")
    settings.add_argument(
        "--signs", choices=("magnitude", "relu", "split", "raw"), help="how signed features are read (magnitude)"
    )
    settings.add_argument("--least-wrong", type=int, metavar="N", help="wrong predictions a class needs (10)")
    settings.add_argument("--keep", type=float, metavar="X", help="factor left of suppressed features (0)")
    settings.add_argument("--solver", choices=("lbfgs", "sgd"), help="to the minimum, or minibatches (lbfgs)")
    settings.add_argument("--start", choices=("fresh", "head"), help="begin anew or from the model's layer (fresh)")
    settings.add_argument("--l2", type=float, nargs="+", metavar="X", help="penalty of the layer (0.0001)")
    settings.add_argument(
        "--criterion", dest="select", choices=("sfit", "worst_class", "class_difference"), help="best candidate (sfit)"
    )
    settings.add_argument("--memory", metavar="SIZE", help="budget of fitting, e.g. 256MiB")
    controls = parser.add_argument_group("controls, where there are test sets")
    controls.add_argument("--no-controls", action="store_true", help="leave out the retraining with other masks")
    controls.add_argument("--draws", type=int, default=20, metavar="N", help="random masks (%(default)s)")
    dfr_of = "also DFR on each class in each group of the validation set"
    controls.add_argument("--dfr", action="store_true", help=dfr_of)
    controls.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="for intervals (%(default)s)")
