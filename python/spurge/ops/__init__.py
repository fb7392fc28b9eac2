r"""The kernels as torch sees them: for each op its schema, its contract, its kernel and its public face.

* The schema and the *fake* kernel (shapes, dtypes, error messages) are the contract, which
  ``torch.compile`` and ``opcheck`` use.
* The kernel allocates the outputs and calls the compiled module ``_core``, which sees no torch and makes
  the same checks again: an eager call costs microseconds, and Python checks would treble them. CUDA kernels
  run on torch's current stream, and can be captured in a CUDA graph.
* On a device without kernels (another accelerator, or CUDA where the build has none) the op runs its
  float64 twin in :mod:`spurge.reference`, and says so once.

:func:`proximity` is differentiable once. No other op is: autograd looks through them, and results do not require grad.

Where an op promises the same bits, NaN is any NaN: its sign and payload may differ.

Letters: B examples, T tokens, H hidden, F neurons of a site, S nodes, R rows, P particles, n columns,
D dimensions, U units, G golden sets, Y labels. Of a last layer: N samples, M features, O outputs, C classes,
E edited outputs, S segments of samples. Of balancing: N rows, K covariates, P problems, S strata, U units, V outcomes.
"""

from __future__ import annotations

from spurge.ops._association import associate_ as associate_
from spurge.ops._balance import balance_batch as balance_batch
from spurge.ops._balance import balance_strata as balance_strata
from spurge.ops._balance import balance_sweep as balance_sweep
from spurge.ops._gate import gate_columns_ as gate_columns_
from spurge.ops._gate import open_rows as open_rows
from spurge.ops._ig import first_order as first_order
from spurge.ops._ig import multiply_sum as multiply_sum
from spurge.ops._ig import node_sum as node_sum
from spurge.ops._median import segment_medians as segment_medians
from spurge.ops._proximity import proximity as proximity
from spurge.ops._proximity import proximity_gradient as proximity_gradient
from spurge.ops._swarm import swarm_best_ as swarm_best_
from spurge.ops._swarm import swarm_step_ as swarm_step_
from spurge.ops._sweep import correct_interval as correct_interval
