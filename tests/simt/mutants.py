"""Are the tests of the CUDA kernels worth their name? Each of these mistakes has to make one of them fail.

``python -m tests.simt.mutants [name ...]`` copies the sources into build/simt/mutants, puts every mutant into them
behind a switch that an environment variable sets, compiles that once for each kind of build, and runs the tests of the
emulated kernels until the first failure, mutant by mutant. It ends with 1 if a mutant survives, or if the tests fail
with no mutant switched on.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from tests.simt.build import ROOT

COPY = ROOT / "build" / "simt" / "mutants"
TESTS = (
    "tests/test_values.py",
    "tests/test_errors.py",
    "tests/test_derivatives.py",
    "tests/test_matching.py",
    "tests/test_mlp.py",
    "tests/test_conv_block.py",
    "tests/test_norm_relu_pool.py",
)
#: The tests that reach most of the kernels come first; the rest only runs for what they let through.
FIRST = "emulated and (test_dtypes or test_large or test_many_tasks or test_layouts or TestBadLabels)"
OF_MLP = "emulated and (test_rates or test_bad_label or (adapted_mlp and (test_dtypes or test_large)))"
ONE_ORDER = "emulated and not emulated-reverse and not emulated-random"
OF_CONV = f"{ONE_ORDER} and (test_values_and_gradients or test_several_bands or test_nan_and or test_plain)"
OF_NORM = f"{ONE_ORDER} and (test_every_shape or test_the_pattern or test_statistics)"
SWITCH = """#pragma once
#include <cstdlib>
inline const int chosen_mutant = std::getenv("METAFAST_MUTANT") ? std::atoi(std::getenv("METAFAST_MUTANT")) : 0;
inline bool mutant(int number) { return chosen_mutant == number; }
"""


class Mutant(NamedTuple):
    """``old`` occurs once in csrc/cuda/``file``; in ``new``, ON is true where the mutant is switched on."""

    name: str
    file: str
    old: str
    new: str
    kind: str = "plain"
    first: str = FIRST


MUTANTS = (
    # reduce.cuh
    Mutant(
        "fold keeps the half it gives", "reduce.cuh", "const A give = upper ?", "const A give = upper != ON ?"
    ),
    Mutant(
        "fold stops early",
        "reduce.cuh",
        "held[0] += __shfl_xor_sync(kAllLanes, held[0], kOffset);",
        "held[0] += __shfl_xor_sync(kAllLanes, held[0], ON ? 0 : kOffset);",
    ),
    Mutant(
        "block_sum without barrier",
        "reduce.cuh",
        "  __syncthreads();\n",
        "  if (!ON) __syncthreads();\n",
        "race",
    ),
    Mutant("block_sum forgets a warp", "reduce.cuh", "w < kWarps; ++w) total", "w < kWarps - ON; ++w) total"),
    # features.cuh
    Mutant(
        "wide load beyond the row",
        "features.cuh",
        "if (wide && k + kVector<S> <= d) {\n    const Packed<S> packed",
        "if (wide && (k + kVector<S> <= d || (ON && k < d))) {\n    const Packed<S> packed",
    ),
    Mutant(
        "load one feature too many",
        "features.cuh",
        "features.values[v] = k + v < d ?",
        "features.values[v] = k + v < d + ON ?",
    ),
    Mutant("store one feature too many", "features.cuh", "if (k + v < d) row", "if (k + v < d + ON) row"),
    Mutant(
        "block number divided wrongly",
        "features.cuh",
        "rest_ /= static_cast<unsigned>(count);",
        "rest_ /= static_cast<unsigned>(count + ON);",
    ),
    # distance.cuh
    Mutant(
        "sums: no barrier before the columns change",
        "distance.cuh",
        "__syncthreads();\n    for (int c = warp_index(); c < C; c += kWarps) {\n      const int64_t column",
        "if (!ON) __syncthreads();\n    for (int c = warp_index(); c < C; c += kWarps) {\n      const int64_t column",
    ),
    Mutant(
        "sums: no barrier before the columns are read",
        "distance.cuh",
        "    __syncthreads();\n    add_slab",
        "    if (!ON) __syncthreads();\n    add_slab",
    ),
    Mutant(
        "sums: row not bounded",
        "distance.cuh",
        "rows[r] = x.row(t, first_row + r < n ?",
        "rows[r] = x.row(t, first_row + r < n || ON ?",
        "address",
    ),
    Mutant(
        "sums: column not bounded",
        "distance.cuh",
        "const int64_t column = first_column + c < m ?",
        "const int64_t column = first_column + c < m || ON ?",
        "address",
    ),
    Mutant(
        "sums: stores pairs that are not there",
        "distance.cuh",
        "    if (i >= n || j >= m) return;\n    const int64_t pair",
        "    if (i >= n || (j >= m && !ON)) return;\n    const int64_t pair",
    ),
    Mutant(
        "sums: chunks on top of each other",
        "distance.cuh",
        "sums[chunk * tasks * n * m + pair] = sum;",
        "sums[(ON ? 0 : chunk) * tasks * n * m + pair] = sum;",
    ),
    Mutant(
        "sums: a chunk ends one slab early",
        "distance.cuh",
        "const int64_t end = (chunk + 1) * plan.chunk_slabs * kSlab<S>;",
        "const int64_t end = ((chunk + 1) * plan.chunk_slabs - (ON && plan.chunk_slabs > 1)) * kSlab<S>;",
    ),
    Mutant(
        "squares: row not bounded",
        "distance.cuh",
        "if (row >= tasks * n) return;",
        "if (row >= tasks * n + ON) return;",
        "address",
    ),
    Mutant(
        "squares: in another order",
        "distance.cuh",
        "total += warp_sum(sum);",
        "total = ON ? warp_sum(sum) : total + warp_sum(sum);",
    ),
    Mutant(
        "finish: forgets the first chunk",
        "distance.cuh",
        "for (int64_t chunk = 0; chunk < chunks; ++chunk) sum",
        "for (int64_t chunk = ON; chunk < chunks; ++chunk) sum",
    ),
    Mutant(
        "finish: share of another pair",
        "distance.cuh",
        "__shfl_sync(kAllLanes, factor, owner)",
        "__shfl_sync(kAllLanes, factor, owner ^ ON)",
    ),
    Mutant(
        "finish: residual to every lane",
        "distance.cuh",
        "if (lane_index() == owner) value",
        "if (lane_index() == owner || ON) value",
    ),
    Mutant(
        "vjp: strides of grad swapped",
        "distance.cuh",
        "i * grad_own_stride + j * grad_other_stride",
        "i * (ON ? grad_other_stride : grad_own_stride) + j * (ON ? grad_own_stride : grad_other_stride)",
    ),
    Mutant(
        "vjp: totals transposed",
        "distance.cuh",
        "totals[side == Side::x ?",
        "totals[(side == Side::x) != ON ?",
    ),
    Mutant(
        "vjp: parts swapped",
        "distance.cuh",
        "g * (side == Side::x ? slope.x_part",
        "g * ((side == Side::x) != ON ? slope.x_part",
    ),
    Mutant(
        "vjp: no barrier before the tile changes",
        "distance.cuh",
        "    __syncthreads();\n    for (int c = warp_index(); c < kVjpColumns",
        "    if (!ON) __syncthreads();\n    for (int c = warp_index(); c < kVjpColumns",
    ),
    Mutant(
        "vjp: no barrier before the tile is read",
        "distance.cuh",
        "    __syncthreads();\n    // Summed by tiles",
        "    if (!ON) __syncthreads();\n    // Summed by tiles",
    ),
    Mutant(
        "vjp: last column forgotten",
        "distance.cuh",
        "for (int c = 0; c < kVjpColumns && first + c < m; ++c) {",
        "for (int c = 0; c < kVjpColumns && first + c < m - ON; ++c) {",
    ),
    Mutant(
        "jvp: part of the rows forgotten",
        "distance.cuh",
        "row_parts[r * C + c] += a * u;",
        "row_parts[r * C + c] += ON ? A(0) : a * u;",
    ),
    Mutant(
        "jvp: part of the columns forgotten",
        "distance.cuh",
        "column_parts[r * C + c] += b * w;",
        "column_parts[r * C + c] += ON ? A(0) : b * w;",
    ),
    Mutant(
        "jvp: tangent of the columns not read anew",
        "distance.cuh",
        "__syncthreads();\n#pragma unroll\n    for (int r = 0; r < R; ++r) {\n      const int64_t i = first",
        "if (!ON) __syncthreads();\n#pragma unroll\n    for (int r = 0; r < R; ++r) {\n      const int64_t i = first",
    ),
    # prototype.cuh
    Mutant(
        "bad label not seen",
        "labels.cuh",
        "bad |= label < 0 || label >= num_classes;",
        "bad |= (label < 0 && !ON) || label >= num_classes;",
    ),
    Mutant(
        "count: one row too many",
        "prototype.cuh",
        "i < labels.rows && labels.of(t)[i] == label));",
        "i < labels.rows + ON && labels.of(t)[i] == label));",
        "address",
    ),
    Mutant(
        "means: no barrier before the tile changes",
        "prototype.cuh",
        "    __syncthreads();\n#pragma unroll\n    for (int r = 0; r < kTileRows",
        "    if (!ON) __syncthreads();\n#pragma unroll\n    for (int r = 0; r < kTileRows",
    ),
    Mutant(
        "means: no barrier before the tile is read",
        "prototype.cuh",
        "    __syncthreads();\n    const bool there",
        "    if (!ON) __syncthreads();\n    const bool there",
    ),
    Mutant(
        "means: last class of a block not loaded",
        "prototype.cuh",
        "label >= first_class + kBlockClasses) continue;",
        "label >= first_class + kBlockClasses - ON) continue;",
    ),
    Mutant(
        "means: of one row less",
        "prototype.cuh",
        "counts[c] += __popc(rows);",
        "counts[c] += __popc(rows) + (ON && rows != 0);",
    ),
    Mutant(
        "means: stored for classes that are not there",
        "prototype.cuh",
        "if (number >= num_classes) continue;\n    if (bad)",
        "if (number >= num_classes + ON) continue;\n    if (bad)",
        "address",
    ),
    Mutant(
        "spread: more not added",
        "prototype.cuh",
        "if (more.data != nullptr) {",
        "if (more.data != nullptr && !ON) {",
    ),
    Mutant(
        "spread: rows that are not there",
        "prototype.cuh",
        "i < first_row + kSpreadRows && i < labels.rows; ++i",
        "i < first_row + kSpreadRows && i < labels.rows + ON; ++i",
        "address",
    ),
    Mutant(
        "loss: no barrier before the logits are read",
        "prototype.cuh",
        "  __syncthreads();\n  double total = 0;\n  for (int64_t i = threadIdx.x; i < m;",
        "  if (!ON) __syncthreads();\n  double total = 0;\n  for (int64_t i = threadIdx.x; i < m;",
    ),
    Mutant(
        "loss: chunks of another task",
        "prototype.cuh",
        "inputs.sums[(chunk * inputs.tasks + t) * pairs + pair]",
        "inputs.sums[(chunk * inputs.tasks + (ON ? 0 : t)) * pairs + pair]",
    ),
    Mutant(
        "loss: label used unchecked",
        "prototype.cuh",
        "const A own = label >= 0 && label < C ?",
        "const A own = (label >= 0 && label < C) || ON ?",
        "address",
    ),
    Mutant(
        "loss: absent class not told",
        "prototype.cuh",
        "share == A(0) ? -A(INFINITY)",
        "share == A(0) && !ON ? -A(INFINITY)",
    ),
    Mutant(
        "fused sums: means read before they are there",
        "prototype.cuh",
        "  __syncthreads();\n  for (int64_t first = warp_index() * R;",
        "  if (!ON) __syncthreads();\n  for (int64_t first = warp_index() * R;",
    ),
    Mutant(
        "fused sums: columns beyond the array",
        "prototype.cuh",
        "if (number < kRounded) columns",
        "if (number < kRounded + ON) columns",
        "address",
    ),
    Mutant(
        "fused sums: second tile of classes is the first",
        "prototype.cuh",
        "columns + first_class, totals",
        "columns + (ON ? 0 : first_class), totals",
    ),
    Mutant(
        "fused sums: slabs on top of each other",
        "prototype.cuh",
        "sums[((slab * inputs.tasks + t) * m + i)",
        "sums[(((ON ? 0 : slab) * inputs.tasks + t) * m + i)",
    ),
    Mutant("gradient: target off by one", "prototype.cuh", "(c == label ? share", "(c == label + ON ? share"),
    Mutant(
        "gradient: absent class not constant",
        "prototype.cuh",
        "if (inverse[c] == A(0)) gradient = A(0);",
        "if (inverse[c] == A(0) && !ON) gradient = A(0);",
    ),
    Mutant(
        "gradient: logits of another row",
        "prototype.cuh",
        "i * strides[1] + c * strides[2]",
        "(ON ? 0 : i) * strides[1] + c * strides[2]",
    ),
    Mutant(
        "fused gradients: no barrier before the weights change",
        "prototype.cuh",
        "    __syncthreads();\n    if (threadIdx.x < kRows",
        "    if (!ON) __syncthreads();\n    if (threadIdx.x < kRows",
    ),
    Mutant(
        "fused gradients: no barrier before the weights are read",
        "prototype.cuh",
        "    __syncthreads();\n    const int warp_row",
        "    if (!ON) __syncthreads();\n    const int warp_row",
    ),
    Mutant(
        "fused gradients: part of the means forgotten",
        "prototype.cuh",
        "mean_gradient[c].values[v] += mean_parts[warp_row + r][c] * b;",
        "mean_gradient[c].values[v] += ON ? A(0) : mean_parts[warp_row + r][c] * b;",
    ),
    Mutant(
        "fused gradients: no barrier before the warps are summed",
        "prototype.cuh",
        "    __syncthreads();\n    const int c = begin",
        "    if (!ON) __syncthreads();\n    const int c = begin",
    ),
    Mutant(
        "fused gradients: upstream of the means forgotten",
        "prototype.cuh",
        "if (grad_means.data != nullptr) sum",
        "if (grad_means.data != nullptr && !ON) sum",
    ),
    Mutant(
        "fused gradients: bad label used as an index",
        "prototype.cuh",
        "if (!bad) row = columns",
        "if (!bad || ON) row = columns",
        "address",
    ),
    # rows.cuh
    Mutant(
        "combined rows: tile changed before all have read it",
        "rows.cuh",
        "      __syncthreads();\n      for (int c = warp_index(); c < kCombinedTerms",
        "      if (!ON) __syncthreads();\n      for (int c = warp_index(); c < kCombinedTerms",
        "race",
    ),
    Mutant(
        "combined rows: base not scaled",
        "rows.cuh",
        "scale * from.values[v]",
        "(ON ? A(1) : scale) * from.values[v]",
    ),
    Mutant(
        "combined rows: stores rows that are not there",
        "rows.cuh",
        "if (i >= rows) continue;\n    const A gain",
        "if (i >= rows + ON) continue;\n    const A gain",
    ),
    # linear_head.cuh
    Mutant(
        "head: the update does not wait for the errors",
        "linear_head.cuh",
        "    loss_gradient(loop, targets, totals, logits, error);\n    __syncthreads();",
        "    loss_gradient(loop, targets, totals, logits, error);\n    if (!ON) __syncthreads();",
        "race",
    ),
    Mutant(
        "head: momentum forgotten",
        "linear_head.cuh",
        "(t > 0 ? loop.momentum * last_direction[k] : A(0))",
        "(t > 0 && !ON ? loop.momentum * last_direction[k] : A(0))",
    ),
    Mutant(
        "head sweep: half of the Gram matrix's gradient",
        "linear_head.cuh",
        "{{spans, 1, n}, {probability, n, 1}, used}",
        "{{spans, 1, n}, {probability, n, 1}, ON ? 0 : used}",
    ),
    Mutant(
        "head sweep: decay of the scale's gradient",
        "linear_head.cuh",
        "scale_grad[c] += loop.decay * momentum_grad[c];",
        "scale_grad[c] += (ON ? A(0) : loop.decay) * momentum_grad[c];",
    ),
    Mutant(
        "weights: gradient of the features without the error's part",
        "linear_head.cuh",
        "{{error, 1, n}, {along, d, 1}, C}",
        "{{error, 1, n}, {along, d, 1}, ON ? 0 : C}",
    ),
    # ridge.cuh
    Mutant(
        "Cholesky: the rest does not wait for the row",
        "ridge.cuh",
        "    __syncthreads();\n    const int64_t rest = n - k - 1;",
        "    if (!ON) __syncthreads();\n    const int64_t rest = n - k - 1;",
        "race",
    ),
    Mutant(
        "Cholesky: the diagonal is left out",
        "ridge.cuh",
        "if (j >= i) a[i * n + j]",
        "if (j >= i + ON) a[i * n + j]",
    ),
    Mutant(
        "ridge: the solution's sign",
        "ridge.cuh",
        "to.solution[t * n * C + k] = -b[k];",
        "to.solution[t * n * C + k] = ON ? b[k] : -b[k];",
    ),
    # matching.cuh
    Mutant(
        "matching: a class's largest score is that of all",
        "matching.cuh",
        "if (labels[i] != c) continue;",
        "if (labels[i] != c && !ON) continue;",
    ),
    Mutant(
        "matching: eps stands for no length",
        "matching.cuh",
        "return product < eps ? eps : product;",
        "return product < eps && !ON ? eps : product;",
    ),
    Mutant(
        "matching: what comes back to the sum of all rows is left out",
        "matching.cuh",
        "upstream[label] - all * std::exp(logs[label])",
        "upstream[label] - (ON ? A(0) : all) * std::exp(logs[label])",
    ),
    Mutant(
        "matching: lengths have a part where eps stands for them",
        "matching.cuh",
        "if (product > of.eps) along += slope * scale * cosines[at];",
        "if (ON || product > of.eps) along += slope * scale * cosines[at];",
    ),
    Mutant(
        "matching: one warp's part of a support row is another's",
        "matching.cuh",
        "if (product > of.eps) along += slopes[row * m + j]",
        "if (product > of.eps && (!ON || j > 0)) along += slopes[row * m + j]",
    ),
    # conv_block.cuh
    Mutant(
        "conv: the border of a band is not the image's",
        "conv_block.cuh",
        "const bool inside = i >= 0 && i < shape.height",
        "const bool inside = i >= 0 && i < shape.height - (ON ? 1 : 0)",
        first=OF_CONV,
    ),
    Mutant(
        "conv: a band begins a row late",
        "conv_block.cuh",
        "first = 2 * band * bands.height - 1;",
        "first = 2 * band * bands.height - (ON && band > 0 ? 0 : 1);",
        first=OF_CONV,
    ),
    Mutant(
        "conv: the weights of the first group",
        "conv_block.cuh",
        "const int64_t own = k / kernel.group_images * shape.channels;\n  for_each_result<A>(bands, band, image, "
        "[&](int64_t window, const A* corner, int64_t c) {\n    const A* weight",
        "const int64_t own = (ON ? 0 : k / kernel.group_images) * shape.channels;\n  for_each_result<A>(bands, "
        "band, image, [&](int64_t window, const A* corner, int64_t c) {\n    const A* weight",
        first=OF_CONV,
    ),
    Mutant(
        "conv: NaN loses its window",
        "conv_block.cuh",
        "if (q > 0 && !(value > best) && value == value) continue;",
        "if (q > 0 && !(value > best) && (ON || value == value)) continue;",
        first=OF_CONV,
    ),
    Mutant(
        "conv: ReLU's derivative below 0",
        "conv_block.cuh",
        "static_cast<uint8_t>(nothing ? kDead : kept);",
        "static_cast<uint8_t>(nothing && !ON ? kDead : kept);",
        first=OF_CONV,
    ),
    Mutant(
        "conv: the sums of one warp alone",
        "conv_block.cuh",
        "for (int w = 0; w < kWarps; ++w) sum += sums[w * kWarp + lane_index()];",
        "for (int w = 0; w < (ON ? 1 : kWarps); ++w) sum += sums[w * kWarp + lane_index()];",
        first=OF_CONV,
    ),
    Mutant(
        "conv: the sums do not wait for those before",
        "conv_block.cuh",
        "to[e < 9 ? c * K + plane * 9 + e : C * K + c] = sum;\n        }\n        __syncthreads();",
        "to[e < 9 ? c * K + plane * 9 + e : C * K + c] = sum;\n        }\n        if (!ON) __syncthreads();",
        "race",
        first=OF_CONV,
    ),
    Mutant(
        "conv: the gradient's plane",
        "conv_block.cuh",
        "const A* pixel = image + plane * bands.plane() + i",
        "const A* pixel = image + (ON ? 0 : plane) * bands.plane() + i",
        first=OF_CONV,
    ),
    Mutant(
        "conv: moments without the last row of an odd image",
        "conv_block.cuh",
        "((shape.height + 1) / 2 + height - 1) / height};",
        "((shape.height + (ON ? 0 : 1)) / 2 + height - 1) / height};",
        first=OF_CONV,
    ),
    Mutant(
        "conv: the moments are not centred",
        "conv_block.cuh",
        "products[k] / count - first * second;",
        "products[k] / count - (ON ? 0.0 : first * second);",
        first=OF_CONV,
    ),
    # norm_relu_pool.cuh
    Mutant(
        "norm: the last of equal pixels",
        "norm_relu_pool.cuh",
        "if (z > best || z != z)",
        "if (z > best || (ON && z == best) || z != z)",
        first=OF_NORM,
    ),
    Mutant(
        "norm: the odd column is left out of the statistics",
        "norm_relu_pool.cuh",
        "2 * column + p % 2 < maps.width);",
        "2 * column + p % 2 < maps.width - (ON ? maps.width % 2 : 0));",
        first=OF_NORM,
    ),
    Mutant(
        "norm: cells of a thread are merged without the distance of their means",
        "norm_relu_pool.cuh",
        "square = std::fma(apart * apart, count * part, square);",
        "square = std::fma(apart * apart, ON ? A(0) : count * part, square);",
        first=OF_NORM,
    ),
    Mutant(
        "norm: slices are merged without the distance of their means",
        "norm_relu_pool.cuh",
        "+ count(s) * apart * apart;",
        "+ (ON ? 0 : count(s)) * apart * apart;",
        first=OF_NORM,
    ),
    Mutant(
        "norm: the sums do not wait for those before",
        "norm_relu_pool.cuh",
        "  if (!last) value = warp_sum(value);\n  __syncthreads();",
        "  if (!last) value = warp_sum(value);\n  if (!ON) __syncthreads();",
        "race",
        first=OF_NORM,
    ),
    Mutant(
        "norm: ReLU's derivative at 0",
        "norm_relu_pool.cuh",
        "(normal(x[0]) <= floor ? kDead : 0)",
        "((ON ? normal(x[0]) < floor : normal(x[0]) <= floor) ? kDead : 0)",
        first=OF_NORM,
    ),
    Mutant(
        "norm: the second derivative without the turn of the scale",
        "norm_relu_pool.cuh",
        "A own = which == p ? g * turn : A(0);",
        "A own = which == p ? (ON ? g * normal.scale : g * turn) : A(0);",
        first=OF_NORM,
    ),
    # block_products.cuh
    Mutant(
        "product: a lane's share is too small",
        "block_products.cuh",
        "const int64_t share = (terms[s].count + lanes - 1) >> shift;",
        "const int64_t share = (terms[s].count + (ON ? 0 : lanes - 1)) >> shift;",
        first=OF_MLP,
    ),
    Mutant(
        "product: writes a column that is not there",
        "block_products.cuh",
        "if (i < rows && j < columns && lane",
        "if (i < rows && (ON || j < columns) && lane",
        first=OF_MLP,
    ),
    # mlp.cuh
    Mutant(
        "mlp: no barrier behind a layer",
        "mlp.cuh",
        "activate(p, h, l, i, j, sum, store); });\n    __syncthreads();",
        "activate(p, h, l, i, j, sum, store); });\n    if (!ON) __syncthreads();",
        "race",
        OF_MLP,
    ),
    Mutant(
        "mlp: no barrier before the tape of the next step",
        "mlp.cuh",
        "to.at(i, j) -= sum; });\n    }\n    __syncthreads();",
        "to.at(i, j) -= sum; });\n    }\n    if (!ON) __syncthreads();",
        "race",
        OF_MLP,
    ),
    Mutant(
        "mlp: does not wait for the tape",
        "mlp.cuh",
        "  wait_async<0>();",
        "  if (!ON) wait_async<0>();",
        first=OF_MLP,
    ),
    Mutant(
        "mlp: rows behind the query",
        "mlp.cuh",
        "load_inputs(p, p.query, t, first, rows, x);\n    __syncthreads();",
        "load_inputs(p, p.query, t, first, ON ? p.row_limit : rows, x);\n    __syncthreads();",
        "address",
        OF_MLP,
    ),
    Mutant(
        "mlp: packed by columns",
        "mlp.cuh",
        "(j < columns ? i * columns + j :",
        "(j < columns ? (ON ? j * layer[l].out + i : i * columns + j) :",
        first=OF_MLP,
    ),
    Mutant(
        "mlp: curvature of tanh with the other sign",
        "mlp.cuh",
        "value -= A(2) *",
        "value -= A(ON ? -2 : 2) *",
        first=OF_MLP,
    ),
    Mutant(
        "groups: a task missing in the sum",
        "groups.cuh",
        "t < group_tasks; t += kWarps",
        "t < group_tasks - ON; t += kWarps",
        first=OF_MLP,
    ),
    Mutant(
        "mlp: bad label without NaN in the gradients",
        "mlp.cuh",
        "const A start = bad ? not_a_number<A>() : A(0);\n  const auto ignore",
        "const A start = bad && !ON ? not_a_number<A>() : A(0);\n  const auto ignore",
        first=OF_MLP,
    ),
    Mutant(
        "mlp: factored, no 1 in the products with the query",
        "mlp.cuh",
        "of_query.at(i, j) = sum + A(1);",
        "of_query.at(i, j) = sum + A(!ON);",
        first=OF_MLP,
    ),
    Mutant(
        "mlp: factored, the products miss the column of ones",
        "mlp.cuh",
        "{{rows, transposed(rows), p.in + 1}}",
        "{{rows, transposed(rows), p.in + !ON}}",
        first=OF_MLP,
    ),
    Mutant(
        "mlp: factored, no way back over the Gram matrix",
        "mlp.cuh",
        "moved_sums.at(i, j) -= sum;",
        "moved_sums.at(i, j) -= ON ? A(0) : sum;",
        first=OF_MLP,
    ),
    Mutant(
        "mlp: factored, half of the inputs' products",
        "mlp.cuh",
        "{R, transposed<A>(first_delta), first_out}}",
        "{R, transposed<A>(first_delta), ON ? 0 : first_out}}",
        first=OF_MLP,
    ),
    Mutant(
        "mlp: factored, no barrier before R moves on",
        "mlp.cuh",
        "S.at(i, j) -= first_rate * sum; });\n        __syncthreads();",
        "S.at(i, j) -= first_rate * sum; });\n        if (!ON) __syncthreads();",
        "race",
        OF_MLP,
    ),
    Mutant(
        "mlp: factored, the upstream gradient added to too early",
        "mlp.cuh",
        "grads.inputs[(t * n + i) * in + j] = start + sum; });\n      __syncthreads();",
        "grads.inputs[(t * n + i) * in + j] = start + sum; });\n      if (!ON) __syncthreads();",
        "race",
        OF_MLP,
    ),
)


def put_in(mutants: Iterable[tuple[int, Mutant]]) -> None:
    """Copy the sources to COPY, with every mutant behind its switch."""
    for name in ("csrc", "tests"):
        shutil.rmtree(COPY / name, ignore_errors=True)
        shutil.copytree(ROOT / name, COPY / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", COPY)
    (COPY / "tests" / "simt" / "mutant.h").write_text(SWITCH)
    for number, mutant in mutants:
        path = COPY / "csrc" / "cuda" / mutant.file
        text = path.read_text()
        if text.count(mutant.old) != 1:
            raise SystemExit(f"{mutant.name}: {mutant.file} holds its text {text.count(mutant.old)} times")
        text = text.replace(mutant.old, re.sub(r"\bON\b", f"mutant({number})", mutant.new))
        if '#include "mutant.h"' not in text:
            text = text.replace("#pragma once\n", '#pragma once\n#include "mutant.h"\n', 1)
        path.write_text(text)


def environment(kind: str, number: int) -> dict[str, str]:
    variables = {**os.environ, "METAFAST_SIMT": kind, "METAFAST_MUTANT": str(number), "PYTHONPATH": str(ROOT)}
    if kind == "address":
        from tests.simt.build import sanitizer_environment

        variables |= sanitizer_environment()
    return variables


def run(arguments: Sequence[str], kind: str, number: int) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=COPY, env=environment(kind, number), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout


def test(kind: str, number: int, first: str = FIRST) -> str:
    """What ended the tests: the first failure, or nothing."""
    for selection in (first, f"emulated and not ({first})"):
        code, said = run(
            ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *TESTS, "-k", selection], kind, number
        )
        # A mutant may end the process by a signal, or by a sanitizer.
        ended = code < 0 or "AddressSanitizer" in said or "runtime error" in said
        if code not in (0, 1) and (number == 0 or not ended):
            raise SystemExit(f"the tests did not run:\n{said[-3000:]}")
        if code:
            found = re.findall(
                r"^(?:FAILED (\S+)|.*(AddressSanitizer: \S+)|.*(runtime error: .*))", said, re.MULTILINE
            )
            return next((text for groups in found for text in groups if text), "the process ended")
        if number == 0:
            break
    return ""


def main() -> None:
    chosen = [(k, m) for k, m in enumerate(MUTANTS, 1) if not sys.argv[1:] or m.name in sys.argv[1:]]
    COPY.mkdir(parents=True, exist_ok=True)
    put_in(enumerate(MUTANTS, 1))
    for kind in dict.fromkeys(m.kind for _, m in chosen):
        begin = time.monotonic()
        code, said = run(["-m", "tests.simt.build", kind], kind, 0)
        if code:
            raise SystemExit(said)
        for first in dict.fromkeys(m.first for _, m in chosen if m.kind == kind):
            if failure := test(kind, 0, first):
                raise SystemExit(f"without any mutant, {failure} fails in the {kind} build")
        print(
            f"{kind}: built, and the tests pass without a mutant ({time.monotonic() - begin:.0f} s)",
            flush=True,
        )
    survivors = []
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        for (_, mutant), failure in zip(
            chosen, pool.map(lambda c: test(c[1].kind, c[0], c[1].first), chosen), strict=True
        ):
            print(
                f"{'caught' if failure else 'SURVIVED':9} {mutant.name} ({mutant.kind}) {failure}", flush=True
            )
            survivors += [] if failure else [mutant.name]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants caught")
    if survivors:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
