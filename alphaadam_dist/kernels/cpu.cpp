// The CPU kernels: rule.py over lists of local shards, each pass once over memory.
//
// An element's result depends on its own values alone, never on its place or on the number of threads: every operation
// is rounded by itself (-ffp-contract=off; the fused multiply-adds written out are those of torch's AdamW), so the
// vector body and the scalar tail that the compiler makes of a loop give the same bits. Counts are integers. Squared
// norms are summed over fixed chunks in a fixed order.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <utility>
#include <vector>

#include "rounding.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

using at::Tensor;
using at::TensorList;

constexpr int64_t kChunk = 1 << 18;    // elements a thread takes at a time: long runs, for the memory prefetcher
constexpr int64_t kBlock = 1 << 10;    // of them, those converted from 16 bits at a time
constexpr int64_t kAlone = 1 << 15;    // elements that one thread does faster than several
constexpr int kLanes = 16;             // partial sums of a norm

struct Chunk {
  int64_t tensor, begin, size;
};

std::vector<Chunk> chunks_of(TensorList tensors) {
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < tensors.size(); ++i)
    for (int64_t begin = 0, numel = tensors[i].numel(); begin < numel; begin += kChunk)
      chunks.push_back({static_cast<int64_t>(i), begin, std::min(kChunk, numel - begin)});
  return chunks;
}

// body(index, chunk) for every chunk, on torch's threads.
template <typename Body>
void for_each(TensorList tensors, const std::vector<Chunk>& chunks, const Body& body) {
  int64_t elements = 0;
  for (const Tensor& tensor : tensors) elements += tensor.numel();
  const int64_t count = static_cast<int64_t>(chunks.size());
  at::parallel_for(0, count, elements <= kAlone ? count : 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) body(i, chunks[i]);
  });
}

void widen(const at::BFloat16* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i].x) << 16;
    std::memcpy(to + i, &bits, sizeof bits);
  }
}

void widen(const at::Half* from, float* to, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < n; ++i) to[i] = static_cast<float>(from[i]);
}

template <typename G, typename T>
void widen(const G* from, T* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(from[i]);
}

// body(offset, gradient in T, n) over a chunk, in blocks where the gradient is converted.
template <typename T, typename G, typename Body>
void with_gradient(const Tensor& grad, const Chunk& chunk, const Body& body) {
  const G* g = grad.const_data_ptr<G>() + chunk.begin;
  if constexpr (std::is_same_v<G, T>) {
    body(chunk.begin, g, chunk.size);
  } else {
    T block[kBlock];
    for (int64_t at = 0; at < chunk.size; at += kBlock) {
      const int64_t n = std::min(kBlock, chunk.size - at);
      widen(g + at, block, n);
      body(chunk.begin + at, static_cast<const T*>(block), n);
    }
  }
}

// body.template operator()<T, G>() for the type that is computed in and the gradient's. In fp32 where a moment is bf16.
template <typename Body>
void typed(const Tensor& moment, const Tensor& grad, const Body& body) {
  const auto with_grad = [&](auto zero) {
    using T = decltype(zero);
    switch (grad.scalar_type()) {
      case at::kFloat: return body.template operator()<T, float>();
      case at::kDouble: return body.template operator()<T, double>();
      case at::kBFloat16: return body.template operator()<T, at::BFloat16>();
      default: return body.template operator()<T, at::Half>();
    }
  };
  moment.scalar_type() == at::kDouble ? with_grad(double()) : with_grad(float());
}

// ---- the rule, one coordinate at a time

// Does the moment oppose the gradient? rule.classify, where the threshold is 0 and where it is not.
template <bool kThreshold, typename T>
inline bool opposes(T g, T m, T threshold) {
  if constexpr (kThreshold) {
    const T against = std::copysign(T(1), g) * m;
    return (g != 0) & (against < -threshold * std::abs(g));
  } else {
    return ((g > 0) & (m < 0)) | ((g < 0) & (m > 0));
  }
}

// a + weight (b - a) as torch's lerp computes it.
template <typename T>
inline T lerp(T a, T b, T weight) {
  const bool small = weight < T(0.5);
  return std::fma(small ? weight : weight - 1, b - a, small ? a : b);
}

// The directions: one parameter's numbers, and an update of one coordinate whose direction is multiplied by f.
//
//   decay     rule.decay_of: what the parameter is multiplied by
//   size      rule.size_of, for Adam rule.sizes_of: the length of the step, negative
//   keep      1 - beta of the momentum: the gradient's weight in it
//   ahead     the gradient's weight in the direction: of Lion 1 - beta1; of Adam c (1 - beta1^t), the momentum's being 1
//   gain      of Adam, 1 - beta2: the squared gradient's weight in the second moment
//   root      of Adam, the root of 1 - beta2^t, which corrects the second moment's

template <typename T>
struct Adam {
  static constexpr bool kSecondMoment = true;
  T decay, keep, ahead, beta2, gain, root, eps, size;

  Adam(double step, double decay, double size, double beta1, double beta2, double eps, double lookahead)
      : decay(static_cast<T>(decay)),
        keep(static_cast<T>(1 - beta1)),
        ahead(static_cast<T>(lookahead * (1 - std::pow(beta1, step)))),
        beta2(static_cast<T>(beta2)),
        gain(static_cast<T>(1 - beta2)),
        root(static_cast<T>(std::sqrt(1 - std::pow(beta2, step)))),
        eps(static_cast<T>(eps)),
        size(static_cast<T>(size)) {}

  void operator()(T& p, T g, T& m, T& v, T f) const {
    m = lerp(m, g, keep);
    v = std::fma(gain * g, g, v * beta2);
    const T direction = ahead != 0 ? std::fma(g, ahead, m) : m;
    p = p * decay + size * (direction * f) / (std::sqrt(v) / root + eps);
  }
};

template <typename T>
struct Lion {
  static constexpr bool kSecondMoment = false;
  T decay, ahead, keep, size;

  Lion(double decay, double size, double beta1, double beta2)
      : decay(static_cast<T>(decay)),
        ahead(static_cast<T>(1 - beta1)),
        keep(static_cast<T>(1 - beta2)),
        size(static_cast<T>(size)) {}

  void operator()(T& p, T g, T& m, T&, T f) const {
    const T between = lerp(m, g, ahead);
    const T sign = static_cast<T>(between > 0) - static_cast<T>(between < 0);
    p = std::fma(sign * f, size, p * decay);
    m = lerp(m, g, keep);
  }
};

template <typename T>
struct Sgd {
  static constexpr bool kSecondMoment = false;
  T decay, momentum, size;
  bool nesterov;

  Sgd(double decay, double size, double momentum, bool nesterov)
      : decay(static_cast<T>(decay)),
        momentum(static_cast<T>(momentum)),
        size(static_cast<T>(size)),
        nesterov(nesterov) {}

  void operator()(T& p, T g, T& m, T&, T f) const {
    m = m * momentum + g;
    const T direction = nesterov ? std::fma(m, momentum, g) : m;
    p = std::fma(direction * f, size, p * decay);
  }
};

// ---- passes over one chunk

struct Counts {
  int64_t agree = 0, conflict = 0;
};

template <bool kThreshold, typename T>
Counts judge(const T* g, const T* m, int64_t n, T scale, T threshold) {
  int32_t evidence = 0, conflict = 0;
  for (int64_t i = 0; i < n; ++i) {
    const T grad = g[i] * scale;
    evidence += grad != 0;
    conflict += opposes<kThreshold>(grad, m[i], threshold);
  }
  return {evidence - conflict, conflict};
}

template <typename T>
double squares(const T* g, int64_t n) {
  double lanes[kLanes] = {}, sum = 0;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += static_cast<double>(g[i + lane]) * g[i + lane];
  for (; i < n; ++i) lanes[0] += static_cast<double>(g[i]) * g[i];
  for (const double lane : lanes) sum += lane;
  return sum;
}

// What decides and what multiplies a direction; a copy, so that the compiler sees that no store changes it.
template <typename T>
struct Mask {
  T scale, threshold;  // what makes a gradient the true one; rule.classify's
  T agree, conflict;   // f where momentum and gradient agree, and where they conflict
};

template <bool kThreshold, typename T, typename Direction>
Counts sweep(T* __restrict p, const T* __restrict g, T* __restrict m, T* __restrict v, int64_t n, const Mask<T> mask,
             const Direction direction) {
  int32_t evidence = 0, conflict = 0;
  for (int64_t i = 0; i < n; ++i) {
    const T grad = g[i] * mask.scale;
    const bool against = opposes<kThreshold>(grad, m[i], mask.threshold), any = grad != 0;
    evidence += any;
    conflict += against;
    const T f = against ? mask.conflict : any ? mask.agree : T(1);
    T param = p[i], first = m[i], second = 0;
    if constexpr (Direction::kSecondMoment) second = v[i];
    direction(param, grad, first, second, f);
    p[i] = param;
    m[i] = first;
    if constexpr (Direction::kSecondMoment) v[i] = second;
  }
  return {evidence - conflict, conflict};
}

// ---- what is kept in bf16: rounding.py

// Where the elements of a tensor stand in the model parameter, and what the random bits that round them are made of.
struct Rounding {
  int64_t start, inner, stride;  // element j of the tensor is start + j / inner * stride + j % inner
  uint64_t key;
  uint32_t n;
};

constexpr int64_t kNumbers = 4;  // of a tensor in the operators' `rounding`: key, start, inner, stride; n is before them

Rounding rounding_of(at::IntArrayRef numbers, int64_t tensor) {
  const int64_t* own = numbers.data() + 1 + kNumbers * tensor;
  return {own[1], own[2], own[3], static_cast<uint64_t>(own[0]), static_cast<uint32_t>(numbers[0])};
}

// body(element, place in the parameter, size) for runs that are consecutive in both and touch few blocks of random bits.
template <typename Body>
void for_each_run(const Rounding& rounding, const Chunk& chunk, const Body& body) {
  for (int64_t at = chunk.begin, end = chunk.begin + chunk.size; at < end;) {
    const int64_t column = at % rounding.inner, place = rounding.start + at / rounding.inner * rounding.stride + column;
    const int64_t size = std::min({rounding.inner - column, end - at, kBlock - place % rounding::kBlock});
    body(at, place, size);
    at += size;
  }
}

// A tensor in fp32 for a while: itself, or a run of bf16 elements, placed in their blocks, that is rounded back.
struct Wide {
  uint16_t* kept = nullptr;  // in bf16
  float* own = nullptr;      // in fp32
  alignas(64) float values[kBlock] = {};

  explicit Wide(const Tensor& tensor) {
    if (tensor.scalar_type() == at::kFloat)
      own = tensor.mutable_data_ptr<float>();
    else
      kept = reinterpret_cast<uint16_t*>(tensor.mutable_data_ptr<at::BFloat16>());
  }

  float* open(int64_t at, int64_t offset, int64_t n) {
    if (own != nullptr) return own + at;
    widen(reinterpret_cast<const at::BFloat16*>(kept + at), values + offset, n);
    return values + offset;
  }

  void close(int64_t at, int64_t place, int64_t n, const rounding::Stream& stream) {
    if (own != nullptr) return;
    const int64_t offset = place % rounding::kBlock;
    alignas(64) uint32_t bits[rounding::kBlock];
    alignas(64) uint16_t rounded[kBlock];
    for (int64_t i = 0; i < offset + n; i += rounding::kBlock) {
      rounding::random_bits(stream, (place - offset + i) / rounding::kBlock, bits);
      rounding::round_block(values + i, bits, rounded + i);
    }
    std::memcpy(kept + at, rounded + offset, n * sizeof(uint16_t));
  }
};

// One update of a chunk whose moments are kept in bf16.
template <bool kThreshold, typename G, typename Direction>
Counts sweep_rounded(const Tensor& param, const Tensor& grad, const Tensor& first, const Tensor* second,
                     const Chunk& chunk, const Mask<float> mask, const Direction direction, const Rounding& rounding) {
  Wide p(param), m(first), v(second == nullptr ? first : *second);
  const G* grads = grad.const_data_ptr<G>();
  float g[kBlock];
  Counts counts;
  for_each_run(rounding, chunk, [&](int64_t at, int64_t place, int64_t n) {
    const int64_t offset = place % rounding::kBlock;
    widen(grads + at, g, n);
    float *param_at = p.open(at, offset, n), *first_at = m.open(at, offset, n);
    float* second_at = Direction::kSecondMoment ? v.open(at, offset, n) : nullptr;
    const Counts some = sweep<kThreshold>(param_at, g, first_at, second_at, n, mask, direction);
    counts.agree += some.agree;
    counts.conflict += some.conflict;
    p.close(at, place, n, {rounding.key, rounding.n, 0});
    m.close(at, place, n, {rounding.key, rounding.n, 1});
    if constexpr (Direction::kSecondMoment) v.close(at, place, n, {rounding.key, rounding.n, 2});
  });
  return counts;
}

// ---- the operators: each returns counts without rows, having done nothing, where it does not serve the tensors

// Can the passes read lists of one length as flat memory? The gradients come first, then what is of the state's own
// dtype, or with `wide` moments in bf16 and parameters in that or fp32. Asked here and not by the caller: handing 300
// small tensors over from Python takes longer than updating them.
bool serves(std::initializer_list<TensorList> lists, bool wide) {
  const TensorList grads = *lists.begin();
  for (size_t i = 0; i < grads.size(); ++i) {
    const Tensor& grad = grads[i];
    const auto type = grad.scalar_type(), own = lists.begin()[1][i].scalar_type();
    if (type != at::kFloat && type != at::kDouble && type != at::kBFloat16 && type != at::kHalf) return false;
    if (own != at::kFloat && own != (wide ? at::kBFloat16 : at::kDouble)) return false;
    for (const TensorList list : lists) {
      if (list.empty()) continue;
      const Tensor& tensor = list[i];
      if (!tensor.device().is_cpu() || tensor.layout() != at::kStrided || tensor.numel() != grad.numel()) return false;
      if (tensor.unsafeGetTensorImpl()->is_python_dispatch()) return false;  // a subclass without memory of its own
      if (wide && !(tensor.is_contiguous() && grad.is_contiguous())) return false;
      const bool moment = list.data() != grads.data() && (list.data() != lists.begin()[1].data() || lists.size() == 2);
      if (list.data() != grads.data() && tensor.scalar_type() != (wide && moment ? at::kBFloat16 : own)) return false;
      if (!(tensor.is_contiguous() && grad.is_contiguous()) &&
          !(tensor.is_non_overlapping_and_dense() && tensor.strides() == grad.strides()))
        return false;
    }
  }
  return true;
}

Tensor not_served() { return at::zeros({0, 2}, at::kLong); }

Tensor sum_by_tensor(const std::vector<Chunk>& chunks, const std::vector<Counts>& counted, size_t tensors) {
  Tensor counts = at::zeros({static_cast<int64_t>(tensors), 2}, at::kLong);
  int64_t* row = counts.mutable_data_ptr<int64_t>();
  for (size_t i = 0; i < chunks.size(); ++i) {
    row[2 * chunks[i].tensor] += counted[i].agree;
    row[2 * chunks[i].tensor + 1] += counted[i].conflict;
  }
  return counts;
}

// Counts, int64 (n, 2): agree and conflict; squared norms of the gradients as they are, float64 (n), or none.
std::tuple<Tensor, Tensor> count(TensorList grads, TensorList moments, double threshold, double scale, bool norms,
                                 bool wide) {
  if (!serves({grads, moments}, wide)) return {not_served(), at::zeros({0}, at::kDouble)};
  const auto chunks = chunks_of(grads);
  std::vector<Counts> counted(chunks.size());
  std::vector<double> squared(norms ? chunks.size() : 0);
  for_each(grads, chunks, [&](int64_t i, const Chunk& chunk) {
    const Tensor &grad = grads[chunk.tensor], &moment = moments[chunk.tensor];
    typed(moment, grad, [&]<typename T, typename G>() {
      const T factor = static_cast<T>(scale), bound = static_cast<T>(threshold);
      const auto take = [&](const T* g, const T* m, int64_t n) {
        const Counts some = threshold > 0 ? judge<true>(g, m, n, factor, bound) : judge<false>(g, m, n, factor, bound);
        counted[i].agree += some.agree;
        counted[i].conflict += some.conflict;
        if (norms) squared[i] += squares(g, n);
      };
      if (wide) {
        T g[kBlock], m[kBlock];
        for (int64_t at = chunk.begin; at < chunk.begin + chunk.size; at += kBlock) {
          const int64_t n = std::min(kBlock, chunk.begin + chunk.size - at);
          widen(grad.const_data_ptr<G>() + at, g, n);
          widen(moment.const_data_ptr<at::BFloat16>() + at, m, n);
          take(g, m, n);
        }
        return;
      }
      const T* m = moment.const_data_ptr<T>();
      with_gradient<T, G>(grad, chunk, [&](int64_t at, const T* g, int64_t n) { take(g, m + at, n); });
    });
  });
  Tensor squared_norms = at::zeros({norms ? static_cast<int64_t>(grads.size()) : 0}, at::kDouble);
  for (size_t i = 0; i < squared.size(); ++i)
    squared_norms.mutable_data_ptr<double>()[chunks[i].tensor] += squared[i];
  return {sum_by_tensor(chunks, counted, grads.size()), squared_norms};
}

// One update of tensors that share hyperparameters: for each its direction, made by `direct` for (T, index). `rounding`
// is empty, or holds n and the numbers of each tensor.
template <typename Direct>
Tensor update(TensorList params, TensorList grads, TensorList firsts, TensorList seconds, const Tensor& strengths,
              double threshold, double scale, at::IntArrayRef rounding, const Direct& direct) {
  if (!serves({grads, params, firsts, seconds}, !rounding.empty())) return not_served();
  const auto chunks = chunks_of(params);
  std::vector<Counts> counted(chunks.size());
  const Tensor by_tensor = strengths.contiguous();
  for_each(params, chunks, [&](int64_t i, const Chunk& chunk) {
    const int64_t t = chunk.tensor;
    const double* f = by_tensor.const_data_ptr<double>() + 2 * t;
    typed(firsts[t], grads[t], [&]<typename T, typename G>() {
      const Mask<T> mask{static_cast<T>(scale), static_cast<T>(threshold), static_cast<T>(f[0]), static_cast<T>(f[1])};
      const auto direction = direct.template operator()<T>(t);
      if constexpr (std::is_same_v<T, float>)
        if (!rounding.empty()) {
          const Tensor* second = seconds.empty() ? nullptr : &seconds[t];
          const auto pass = threshold > 0 ? sweep_rounded<true, G, std::decay_t<decltype(direction)>>
                                          : sweep_rounded<false, G, std::decay_t<decltype(direction)>>;
          counted[i] = pass(params[t], grads[t], firsts[t], second, chunk, mask, direction, rounding_of(rounding, t));
          return;
        }
      T *p = params[t].mutable_data_ptr<T>(), *m = firsts[t].mutable_data_ptr<T>();
      T* v = seconds.empty() ? nullptr : seconds[t].mutable_data_ptr<T>();
      with_gradient<T, G>(grads[t], chunk, [&](int64_t at, const T* g, int64_t n) {
        const Counts some = threshold > 0 ? sweep<true>(p + at, g, m + at, v + at, n, mask, direction)
                                          : sweep<false>(p + at, g, m + at, v + at, n, mask, direction);
        counted[i].agree += some.agree;
        counted[i].conflict += some.conflict;
      });
    });
  });
  for (const TensorList list : {params, firsts, seconds})
    for (const Tensor& tensor : list)
      if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
  return sum_by_tensor(chunks, counted, params.size());
}

Tensor adam_(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs, const Tensor& strengths,
             double threshold, double scale, double decay, at::ArrayRef<double> sizes, at::ArrayRef<double> steps,
             double beta1, double beta2, double eps, double lookahead, at::IntArrayRef rounding) {
  return update(params, grads, exp_avgs, exp_avg_sqs, strengths, threshold, scale, rounding,
                [&]<typename T>(int64_t t) { return Adam<T>(steps[t], decay, sizes[t], beta1, beta2, eps, lookahead); });
}

Tensor lion_(TensorList params, TensorList grads, TensorList exp_avgs, const Tensor& strengths, double threshold,
             double scale, double decay, double size, double beta1, double beta2, at::IntArrayRef rounding) {
  return update(params, grads, exp_avgs, {}, strengths, threshold, scale, rounding,
                [&]<typename T>(int64_t) { return Lion<T>(decay, size, beta1, beta2); });
}

Tensor sgd_(TensorList params, TensorList grads, TensorList momentum_buffers, const Tensor& strengths, double threshold,
            double scale, double decay, double size, double momentum, bool nesterov, at::IntArrayRef rounding) {
  return update(params, grads, momentum_buffers, {}, strengths, threshold, scale, rounding,
                [&]<typename T>(int64_t) { return Sgd<T>(decay, size, momentum, nesterov); });
}

}  // namespace

TORCH_LIBRARY(alphaadam, library) {
  library.def(
      "count(Tensor[] grads, Tensor[] moments, float threshold, float scale, bool norms, bool wide=False) -> "
      "(Tensor, Tensor)");
  library.def(
      "adam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor strengths, "
      "float threshold, float scale, float decay, float[] sizes, float[] steps, float beta1, float beta2, float eps, "
      "float lookahead=0., int[] rounding=[]) -> Tensor");
  library.def(
      "lion_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor strengths, float threshold, "
      "float scale, float decay, float size, float beta1, float beta2, int[] rounding=[]) -> Tensor");
  library.def(
      "sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor strengths, float threshold, "
      "float scale, float decay, float size, float momentum, bool nesterov, int[] rounding=[]) -> Tensor");
}

// For tensors of every device, so that a list that is not all on the CPU is told so, too.
TORCH_LIBRARY_IMPL(alphaadam, CompositeExplicitAutograd, library) {
  library.impl("count", &count);
  library.impl("adam_", &adam_);
  library.impl("lion_", &lion_);
  library.impl("sgd_", &sgd_);
}
