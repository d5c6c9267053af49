// The ops that ops.cpp binds.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>

namespace blocksched {

using torch::stable::Tensor;

// y = x + fc2(relu(fc1(rms_norm(x)))^2), without x where not `residual`; formulas.h.
// x [..., d], w1 [hidden, d], w2 [d, hidden], one dtype and device.
// Returns y like x and, for backward, h [rows, hidden] and the scale of each row.
std::tuple<Tensor, Tensor, Tensor> mlp_forward(Tensor x, Tensor w1, Tensor w2, double eps,
                                               bool residual);

// y alone; nothing is kept.
Tensor mlp_inference(Tensor x, Tensor w1, Tensor w2, double eps, bool residual);

// dx, dw1 and dw2; what is not asked for is an empty tensor and is not computed.
std::tuple<Tensor, Tensor, Tensor> mlp_backward(Tensor dy, Tensor x, Tensor w1, Tensor w2, Tensor h,
                                                Tensor scale, bool residual, bool needs_dx,
                                                bool needs_dw1, bool needs_dw2);

}  // namespace blocksched
