// The ridge regression head on a GPU: a block factorises the matrix of a task and solves with it; products and
// combinations of rows of features go to the kernels of rows.cuh. A label outside 0..C-1 makes all results of its task
// NaN, and so does a matrix that is not positive definite.
#pragma once

#include "cuda/block_products.cuh"
#include "cuda/labels.cuh"
#include "cuda/rows.cuh"

namespace metafast::cuda {

// The upper factor U of a = U^T U in the place of the upper half of a [n, n], whose lower half becomes 0. From the first
// pivot that is not positive on the rows are NaN. Begins and ends with a barrier.
template <class A>
__device__ __forceinline__ void cholesky(A* a, int64_t n) {
  for (int64_t k = 0; k < n; ++k) {
    __syncthreads();
    const A square = a[k * n + k];
    const A pivot = square > A(0) ? std::sqrt(square) : not_a_number<A>();
    __syncthreads();
    for (int64_t j = threadIdx.x; j < n; j += kThreads) {
      A* entry = a + k * n + j;
      *entry = j < k ? A(0) : (j == k ? pivot : *entry / pivot);
    }
    __syncthreads();
    const int64_t rest = n - k - 1;
    for_each_element(rest, rest, [&](int64_t r, int64_t s) {
      const int64_t i = k + 1 + r, j = k + 1 + s;
      if (j >= i) a[i * n + j] = std::fma(-a[k * n + i], a[k * n + j], a[i * n + j]);
    });
  }
  __syncthreads();
}

// The rows of b [n, C] become those of (U^T U)^-1 b. Begins and ends with a barrier.
template <class A>
__device__ __forceinline__ void cholesky_solve(const A* u, int64_t n, A* b, int64_t C) {
  for (int64_t k = 0; k < n; ++k) {
    __syncthreads();
    for_each_element(n - k - 1, C, [&](int64_t r, int64_t c) {
      const int64_t j = k + 1 + r;
      b[j * C + c] = std::fma(-u[k * n + j], b[k * C + c] / u[k * n + k], b[j * C + c]);
    });
  }
  __syncthreads();
  for_each_element(n, C, [&](int64_t k, int64_t c) { b[k * C + c] /= u[k * n + k]; });
  for (int64_t k = n - 1; k >= 0; --k) {
    __syncthreads();
    for_each_element(k, C, [&](int64_t j, int64_t c) {
      b[j * C + c] = std::fma(-u[j * n + k], b[k * C + c] / u[k * n + k], b[j * C + c]);
    });
  }
  __syncthreads();
  for_each_element(n, C, [&](int64_t k, int64_t c) { b[k * C + c] /= u[k * n + k]; });
  __syncthreads();
}

// What the solution is made for: class numbers, or targets [T, n, C].
template <class A>
struct RidgeTargets {
  Labels labels;
  const A* soft;  // null: the labels
};

METAFAST_HOST_DEVICE int64_t ridge_memory(int64_t n, int64_t C) { return n * (n + C); }

// alpha [T, n, C] = (X X^T + regularisation)^-1 Y and the factor [T, n, n]. A block is one task.
template <class A>
__global__ void __launch_bounds__(kThreads)
    ridge_solve_kernel(Products<A> gram, RidgeTargets<A> targets, Scale<A> regularisation, A* __restrict__ alpha,
                       A* __restrict__ factor, int64_t C, A* memory) {
  const int64_t t = blockIdx.x, n = gram.n;
  A *u = working_memory(memory, ridge_memory(n, C)), *b = u + n * n;
  const bool bad = __syncthreads_or(targets.soft == nullptr && sees_bad_label(targets.labels, t, C)) != 0;
  for_each_element(n, n, [&](int64_t i, int64_t j) {
    A value = gram.at(t, i, j);
    if (i == j) value += regularisation.at(t);
    u[i * n + j] = bad ? not_a_number<A>() : value;
  });
  for_each_element(n, C, [&](int64_t i, int64_t c) {
    b[i * C + c] = targets.soft == nullptr ? A(c == targets.labels.of(t)[i]) : targets.soft[(t * n + i) * C + c];
  });
  cholesky(u, n);
  cholesky_solve(u, n, b, C);
  for (int64_t k = threadIdx.x; k < n * n; k += kThreads) factor[t * n * n + k] = u[k];
  for (int64_t k = threadIdx.x; k < n * C; k += kThreads) alpha[t * n * C + k] = b[k];
}

// What the gradients of a task are made from, all [T, ...] in rows.
template <class A>
struct RidgeSaved {
  const A* grad;    // [T, m, C], upstream
  const A* slopes;  // [T, C, d], the gradient of the weight before its scale
  const A* weight;  // [T, C, d]
  const A* alpha;   // [T, n, C]
  const A* factor;  // [T, n, n]
  Labels labels;    // null: targets
  int64_t m;
  int64_t d;
};

// Of each task; null where not wanted.
template <class A>
struct RidgeGradients {
  A* solution;        // [T, n, C]: minus the gradient of the targets
  A* labels;          // [T, n, C]
  A* regularisation;  // [T]
  A* scale;           // [T]
  A* offset;          // [T]
};

// products [T, n, C] = X . slopes. A block is one task.
template <class A>
__global__ void __launch_bounds__(kThreads)
    ridge_gradients_kernel(Products<A> products, RidgeSaved<A> saved, Scale<A> scale, RidgeGradients<A> to, A* memory) {
  const int64_t t = blockIdx.x, n = products.n, C = products.m;
  A *u = working_memory(memory, ridge_memory(n, C)), *b = u + n * n;
  for (int64_t k = threadIdx.x; k < n * n; k += kThreads) u[k] = saved.factor[t * n * n + k];
  for_each_element(n, C, [&](int64_t i, int64_t c) { b[i * C + c] = scale.at(t) * products.at(t, i, c); });
  cholesky_solve(u, n, b, C);
  double of_regularisation = 0, of_scale = 0, of_offset = 0;
  for (int64_t k = threadIdx.x; k < n * C; k += kThreads) {
    of_regularisation -= static_cast<double>(b[k]) * saved.alpha[t * n * C + k];
    to.solution[t * n * C + k] = -b[k];
    if (to.labels != nullptr) to.labels[t * n * C + k] = b[k];
  }
  for (int64_t k = threadIdx.x; to.scale != nullptr && k < C * saved.d; k += kThreads) {
    const int64_t at = t * C * saved.d + k;
    of_scale += static_cast<double>(saved.slopes[at]) * saved.weight[at];
  }
  for (int64_t k = threadIdx.x; k < saved.m * C; k += kThreads) of_offset += saved.grad[t * saved.m * C + k];
  // Everything else is made from the factor, which is NaN then.
  if (saved.labels.data != nullptr && sees_bad_label(saved.labels, t, C)) of_offset = not_a_number<double>();
  of_regularisation = block_sum(of_regularisation);
  __syncthreads();
  of_scale = block_sum(of_scale);
  __syncthreads();
  of_offset = block_sum(of_offset);
  if (threadIdx.x != 0) return;
  if (to.regularisation != nullptr) to.regularisation[t] = static_cast<A>(of_regularisation);
  if (to.scale != nullptr) to.scale[t] = static_cast<A>(of_scale);
  to.offset[t] = static_cast<A>(of_offset);
}

template <class A>
void launch_ridge_solve(const Products<A>& gram, const RidgeTargets<A>& targets, Scale<A> regularisation, A* alpha,
                        A* factor, int64_t C, A* memory, unsigned shared_bytes, Stream stream) {
  METAFAST_LAUNCH((ridge_solve_kernel<A>), grid_size(gram.tasks), kThreads, shared_bytes, stream, gram, targets,
                  regularisation, alpha, factor, C, memory);
}

template <class A>
void launch_ridge_gradients(const Products<A>& products, const RidgeSaved<A>& saved, Scale<A> scale,
                            const RidgeGradients<A>& to, A* memory, unsigned shared_bytes, Stream stream) {
  METAFAST_LAUNCH((ridge_gradients_kernel<A>), grid_size(products.tasks), kThreads, shared_bytes, stream, products,
                  saved, scale, to, memory);
}

}  // namespace metafast::cuda
