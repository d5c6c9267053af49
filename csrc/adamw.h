// AdamW and the per-block sums on the CPU.
#pragma once

#include <cstdint>

namespace blocksched {

// Rows of the table that blocksched/cpu.py fills: addresses, 0 for none, then what is known of each
// tensor. Dtypes are those of mlp.h.
enum class Row {
  param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, master, step, seed, numel, dtype,
  narrow_moments,  // whether exp_avg and exp_avg_sq are bfloat16
  block,
  count
};

// int64 [Row::count, n], a column a parameter.
struct Table {
  const int64_t* entries;
  int64_t n;

  const int64_t& at(Row row, int64_t i) const { return entries[int64_t(row) * n + i]; }
};

struct AdamwNumbers {
  double lr, beta1, beta2, weight_decay, eps, grad_scale;
  bool maximize;
  bool update;  // else only the sums are taken
};

// One step of every parameter that has a gradient, and the sums before it, blocks [n_blocks, 3],
// added to `sums`. The reference is adamw_ref of blocksched.kernels.
void adamw(const Table& table, const AdamwNumbers& numbers, double* sums, int64_t n_blocks);

}  // namespace blocksched
