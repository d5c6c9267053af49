// The fused layer: the framework's matrix products, and the passes between them.
//
// The equations are in formulas.h. What a product needs transposed is a view of other strides.
#include "mlp.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "ops.h"

// Weak, so that what was built with CUDA also loads beside a torch without.
#ifdef BS_WITH_CUDA
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_cuda_mm_out(AtenTensorHandle, AtenTensorHandle,
                                                            AtenTensorHandle);
__attribute__((weak)) AOTITorchError aoti_torch_cuda_addmm_out(AtenTensorHandle, AtenTensorHandle,
                                                               AtenTensorHandle, AtenTensorHandle,
                                                               double, double);
__attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
}
#endif

namespace blocksched {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t SPAN = 512;  // rows whose hidden units stay in a CPU's cache between products

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::Double: return Dtype::f64;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: break;
  }
  STD_TORCH_CHECK(false, "the fused layer takes float32, float64, bfloat16 and float16: cast x");
}

ScalarType wide_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A matrix [rows, columns] over t's memory, from `offset` numbers on; autograd knows nothing of it.
Tensor matrix(const Tensor& t, int64_t rows, int64_t columns, int64_t row_stride,
              int64_t column_stride, int64_t offset = 0) {
  const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
      t.get(), 2, sizes, strides, offset, &made));
  return Tensor(made);
}

Tensor transposed(const Tensor& t) {
  return matrix(t, t.size(1), t.size(0), t.stride(1), t.stride(0));
}

Tensor rows_of(const Tensor& t, int64_t begin, int64_t count) {
  return matrix(t, count, t.size(1), t.stride(0), t.stride(1), begin * t.stride(0));
}

Tensor rows_of_vector(const Tensor& t, int64_t begin, int64_t count) {
  return matrix(t, count, 1, 1, 1, begin);
}

// All of a tensor [..., d] as dense rows of d.
Tensor dense_rows(const Tensor& t) {
  const Tensor dense = torch::stable::contiguous(t);
  const int64_t width = dense.size(dense.dim() - 1);
  return matrix(dense, width ? dense.numel() / width : 0, width, width, 1);
}

Tensor like(const Tensor& t, std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(t, sizes, dtype);
}

// One device's products and passes.
class Device {
 public:
  explicit Device(const Tensor& x) : cpu_(x.is_cpu()), passes_(cpu_ ? cpu_passes : gpu_passes()) {
#ifdef BS_WITH_CUDA
    if (!cpu_) {
      guard_.emplace(x.get_device_index());
      TORCH_ERROR_CODE_CHECK(
          aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_));
    }
#endif
  }

  // out = a b, or out = start + a b; `start` may be `out`.
  void product(const Tensor& out, const Tensor& a, const Tensor& b,
               const Tensor* start = nullptr) const {
    AOTITorchError error = 0;
    if (cpu_) {
      error = start ? aoti_torch_cpu_addmm_out(out.get(), start->get(), a.get(), b.get(), 1, 1)
                    : aoti_torch_cpu_mm_out(out.get(), a.get(), b.get());
    } else {
#ifdef BS_WITH_CUDA
      error = start ? aoti_torch_cuda_addmm_out(out.get(), start->get(), a.get(), b.get(), 1, 1)
                    : aoti_torch_cuda_mm_out(out.get(), a.get(), b.get());
#endif
    }
    TORCH_ERROR_CODE_CHECK(error);
  }

  void row_scale(const Tensor& x, const Tensor& scale, double eps) const {
    check(passes_.row_scale(dtype_of(x), x.data_ptr(), scale.data_ptr(), x.size(0), x.size(1), eps,
                            stream_));
  }

  void relu_squared(const Tensor& u, const Tensor& scale) const {
    check(passes_.relu_squared(dtype_of(u), u.data_ptr(), scale.data_ptr(), u.size(0), u.size(1),
                               stream_));
  }

  void hidden_backward(const Tensor& dh, const Tensor& h, const Tensor& scale,
                       const Tensor* dot) const {
    check(passes_.hidden_backward(dtype_of(h), dh.data_ptr(), h.data_ptr(), scale.data_ptr(),
                                  dot ? dot->data_ptr() : nullptr, h.size(0), h.size(1), stream_));
  }

  void input_backward(const Tensor& dx, const Tensor* dy, const Tensor& x, const Tensor& scale,
                      const Tensor& dot) const {
    check(passes_.input_backward(dtype_of(x), dx.data_ptr(), dy ? dy->data_ptr() : nullptr,
                                 x.data_ptr(), scale.data_ptr(), dot.data_ptr(), x.size(0),
                                 x.size(1), stream_));
  }

 private:
  static const Passes& gpu_passes() {
#ifdef BS_WITH_CUDA
    return cuda_passes;
#else
    return cpu_passes;  // never: no op is registered for CUDA then
#endif
  }

  static void check(const char* error) { STD_TORCH_CHECK(error == nullptr, error); }

  bool cpu_;
  const Passes& passes_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  void* stream_ = nullptr;
};

// Products of bfloat16 and float16 that this device only emulates are done in float32 instead: on
// a CPU with AVX-512 but no AVX512-BF16, oneDNN's take 3 to 5 times as long as float32 ones.
bool widened(const Tensor& x) {
  if (!x.is_cpu()) return false;
  const bool half = x.scalar_type() == ScalarType::Half;
#if defined(__x86_64__) && defined(__GNUC__)
  return half || (x.scalar_type() == ScalarType::BFloat16 && !__builtin_cpu_supports("avx512bf16"));
#else
  return half;
#endif
}

void check(const Tensor& x, const Tensor& w1, const Tensor& w2) {
  dtype_of(x);
  STD_TORCH_CHECK(x.dim() >= 1 && w1.dim() == 2 && w2.dim() == 2 && x.size(x.dim() - 1) >= 1 &&
                      w1.size(1) == x.size(x.dim() - 1) && w2.size(0) == w1.size(1) &&
                      w2.size(1) == w1.size(0) && w1.size(0) >= 1,
                  "the fused layer takes x [..., d], fc1 [hidden, d] and fc2 [d, hidden], none 0: "
                  "check their shapes");
  STD_TORCH_CHECK(w1.scalar_type() == x.scalar_type() && w2.scalar_type() == x.scalar_type(),
                  "the fused layer takes x and weights of one dtype: cast x, or use autocast");
  STD_TORCH_CHECK(w1.device() == x.device() && w2.device() == x.device(),
                  "the fused layer takes x and weights on one device: move the module, or x");
}

// Tensors in the dtype of the products: themselves, or copies in a buffer for all spans.
class Staged {
 public:
  Staged(const Tensor& source, int64_t span, bool staged)
      : source_(source), buffer_(staged ? like(source, {span, source.size(1)}, ScalarType::Float)
                                        : source), staged_(staged) {}

  Tensor rows(int64_t begin, int64_t count) const {
    return rows_of(buffer_, staged_ ? 0 : begin, count);
  }

  Tensor read(int64_t begin, int64_t count) const {
    Tensor rows = this->rows(begin, count);
    if (staged_) torch::stable::copy_(rows, rows_of(source_, begin, count));
    return rows;
  }

  void written(int64_t begin, int64_t count) const {
    if (!staged_) return;
    Tensor target = rows_of(source_, begin, count);
    torch::stable::copy_(target, rows(begin, count));
  }

 private:
  Tensor source_, buffer_;
  bool staged_;
};

Tensor whole(const Tensor& t, bool wide) { return Staged(t, t.size(0), wide).read(0, t.size(0)); }

struct Forward {
  Tensor y, h, scale;
};

// `keep`: h and scale of all rows, for backward. Else they are buffers, used again and again.
Forward forward(const Tensor& input, const Tensor& fc1, const Tensor& fc2, double eps,
                bool residual, bool keep) {
  check(input, fc1, fc2);
  const Tensor x = dense_rows(input);
  const Device device(x);
  const bool wide = widened(x);
  const int64_t n = x.size(0), d = x.size(1), hidden = fc1.size(0);
  const int64_t span = x.is_cpu() && (wide || !keep) ? std::min(n, SPAN) : n;
  const auto sizes = input.sizes();
  const Tensor result = like(x, {sizes.begin(), sizes.end()}, x.scalar_type());
  const Tensor h = like(x, {keep ? n : span, hidden}, keep || !wide ? x.scalar_type()
                                                                   : ScalarType::Float);
  const Tensor scale = like(x, {keep ? n : span}, wide_type(x));
  const Tensor w1 = transposed(whole(fc1, wide)), w2 = transposed(whole(fc2, wide));
  const Staged xs(x, span, wide), ys(matrix(result, n, d, d, 1), span, wide);
  const Staged hs(h, span, wide && keep);
  for (int64_t begin = 0; begin < n; begin += span) {
    const int64_t count = std::min(span, n - begin), kept = keep ? begin : 0;
    const Tensor a = xs.read(begin, count), u = hs.rows(kept, count), y = ys.rows(begin, count);
    const Tensor s = rows_of_vector(scale, kept, count);
    device.row_scale(a, s, eps);
    device.product(u, a, w1);
    device.relu_squared(u, s);
    device.product(y, u, w2, residual ? &a : nullptr);
    hs.written(kept, count);
    ys.written(begin, count);
  }
  return {result, h, scale};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> mlp_forward(Tensor x, Tensor w1, Tensor w2, double eps,
                                               bool residual) {
  Forward made = forward(x, w1, w2, eps, residual, true);
  return {made.y, made.h, made.scale};
}

Tensor mlp_inference(Tensor x, Tensor w1, Tensor w2, double eps, bool residual) {
  return forward(x, w1, w2, eps, residual, false).y;
}

std::tuple<Tensor, Tensor, Tensor> mlp_backward(Tensor grad, Tensor input, Tensor fc1, Tensor fc2,
                                                Tensor h, Tensor scale, bool residual,
                                                bool needs_dx, bool needs_dw1, bool needs_dw2) {
  check(input, fc1, fc2);
  const int64_t all = input.numel() / fc1.size(1);
  STD_TORCH_CHECK(grad.numel() == input.numel() && h.dim() == 2 && h.size(0) == all &&
                      h.size(1) == fc1.size(0) && h.is_contiguous() && scale.numel() == all &&
                      scale.is_contiguous() && grad.scalar_type() == input.scalar_type() &&
                      h.scalar_type() == input.scalar_type() &&
                      scale.scalar_type() == wide_type(input),
                  "mlp_backward takes dy like x, and h and scale as mlp_forward gave them");
  const Tensor x = dense_rows(input), dy = dense_rows(grad);
  const Device device(x);
  const bool wide = widened(x);
  const int64_t n = x.size(0), d = x.size(1), hidden = fc1.size(0);
  const int64_t span = std::max<int64_t>(1, wide ? std::min(n, SPAN) : n);
  const ScalarType type = x.scalar_type(), product_type = wide ? ScalarType::Float : type;
  const auto sizes = input.sizes();
  const std::vector<int64_t> none = {0};
  const Tensor dx = like(x, needs_dx ? std::vector<int64_t>{sizes.begin(), sizes.end()} : none,
                         type);
  const Tensor dw1 = like(x, needs_dw1 ? std::vector{hidden, d} : none, product_type);
  const Tensor dw2 = like(x, needs_dw2 ? std::vector{d, hidden} : none, product_type);
  const Tensor dh = like(x, {needs_dx || needs_dw1 ? span : 0, hidden}, product_type);
  const Tensor dots = like(x, {span}, wide_type(x));
  const Tensor w1 = whole(fc1, wide), w2 = whole(fc2, wide);
  const Staged xs(x, span, wide), dys(dy, span, wide), hs(h, span, wide);
  const Staged dxs(matrix(dx, needs_dx ? n : 0, d, d, 1), span, wide);
  for (int64_t begin = 0; begin == 0 || begin < n; begin += span) {
    const int64_t count = std::min(span, n - begin);
    const Tensor a = xs.read(begin, count), g = dys.read(begin, count), b = hs.read(begin, count);
    const Tensor s = rows_of_vector(scale, begin, count);
    if (needs_dw2) device.product(dw2, transposed(g), b, begin ? &dw2 : nullptr);
    if (!needs_dx && !needs_dw1) continue;
    const Tensor dz = rows_of(dh, 0, count), dot = rows_of_vector(dots, 0, count);
    device.product(dz, g, w2);
    device.hidden_backward(dz, b, s, needs_dx ? &dot : nullptr);
    if (needs_dw1) device.product(dw1, transposed(dz), a, begin ? &dw1 : nullptr);
    if (!needs_dx) continue;
    const Tensor out = dxs.rows(begin, count);
    device.input_backward(out, residual ? &g : nullptr, a, s, dot);
    device.product(out, dz, w1, &out);
    dxs.written(begin, count);
  }
  return {dx, wide ? torch::stable::to(dw1, type) : dw1, wide ? torch::stable::to(dw2, type) : dw2};
}

}  // namespace blocksched
