// The CPU kernels: rule.py over lists of local shards, each pass once over memory.
//
// An element's result depends on its own values alone, never on its place or on the number of threads: every operation
// is rounded by itself (-ffp-contract=off; the fused multiply-adds written out are those of torch's AdamW), so the
// vector body and the scalar tail that the compiler makes of a loop give the same bits. Counts are integers. Squared
// norms are summed over fixed chunks in a fixed order.

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>
#include <utility>

#include "lists.h"
#include "rounding.h"

namespace {

constexpr int kLanes = 16;  // partial sums of a norm

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

constexpr int64_t kRun = 64;     // elements between two looks ahead: four cache lines of fp32
constexpr int64_t kAhead = 256;  // how many elements further the memory is asked for

// The arithmetic of one element leaves the processor no room to begin the loads of the next ones by itself.
template <typename T>
inline void look_ahead(const T* at) {
  for (int64_t i = 0; i < kRun; i += 64 / sizeof(T)) __builtin_prefetch(at + kAhead + i);
}

template <bool kThreshold, typename T>
Counts judge(const T* g, const T* m, int64_t n, T scale, T threshold) {
  int32_t evidence = 0, conflict = 0;
  const auto element = [&](int64_t i) {
    const T grad = g[i] * scale;
    evidence += grad != 0;
    conflict += opposes<kThreshold>(grad, m[i], threshold);
  };
  int64_t i = 0;
  for (; i + kRun <= n; i += kRun) {
    look_ahead(g + i);
    look_ahead(m + i);
    for (int64_t j = i; j < i + kRun; ++j) element(j);
  }
  for (; i < n; ++i) element(i);
  return {evidence - conflict, conflict};
}

// The sum of value(i)^2 over n elements; value gives a double.
template <typename Value>
double sum_of_squares(int64_t n, const Value& value) {
  double lanes[kLanes] = {}, sum = 0;
  const auto add = [&](int64_t i, int64_t lane) {
    const double one = value(i);
    lanes[lane] += one * one;
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) add(i + lane, lane);
  for (; i < n; ++i) add(i, 0);
  for (const double lane : lanes) sum += lane;
  return sum;
}

template <typename T>
double squares(const T* g, int64_t n) {
  return sum_of_squares(n, [g](int64_t i) { return static_cast<double>(g[i]); });
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
  const auto element = [&](int64_t i) {
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
  };
  int64_t i = 0;
  for (; i + kRun <= n; i += kRun) {
    for (const T* at : {static_cast<const T*>(p) + i, g + i, static_cast<const T*>(m) + i}) look_ahead(at);
    if constexpr (Direction::kSecondMoment) look_ahead(v + i);
    for (int64_t j = i; j < i + kRun; ++j) element(j);
  }
  for (; i < n; ++i) element(i);
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

// ---- what an update is told to measure

struct Norms {
  double gradient = 0, change = 0;  // squared: of the gradient as it is, of new minus old parameters
};

constexpr int64_t kKept = 1 << 12;  // elements whose old values are kept at a time, in the cache nearest to a core

// The elements of a part: where they lie, or if that is in bf16 in T in `wide`.
template <typename T>
const T* elements_of(const Tensor& tensor, const Chunk& part, T* wide) {
  if (tensor.scalar_type() != at::kBFloat16) return tensor.const_data_ptr<T>() + part.begin;
  widen(tensor.const_data_ptr<at::BFloat16>() + part.begin, wide, part.size);
  return wide;
}

// pass(part) over a chunk, a part at a time, and the norms of what it did. Not a part of the pass: without this, that is
// compiled and runs as if nobody could ask for norms.
template <typename T, typename G, typename Pass>
Norms measured(const Tensor& param, const Tensor& grad, const Chunk& chunk, const Pass& pass) {
  T before[kKept], wide[kKept];
  Norms squared;
  const int64_t end = chunk.begin + chunk.size;
  for (Chunk part{chunk.tensor, chunk.begin, 0}; part.begin < end; part.begin += part.size) {
    part.size = std::min(kKept, end - part.begin);
    std::memcpy(before, elements_of(param, part, wide), part.size * sizeof(T));
    pass(part);
    const T* after = elements_of(param, part, wide);
    squared.change +=
        sum_of_squares(part.size, [&](int64_t i) { return static_cast<double>(after[i]) - before[i]; });
    with_gradient<T, G>(grad, part, [&](int64_t, const T* g, int64_t n) { squared.gradient += squares(g, n); });
  }
  return squared;
}

// ---- the operators: each returns the indices of the tensors that it cannot read, whose rows are 0: it left them alone

using Odd = std::vector<int64_t>;
using Updated = std::tuple<Tensor, Tensor, Odd>;  // counts, norms, the odd ones

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
std::tuple<Tensor, Tensor, Odd> count(TensorList grads, TensorList moments, double threshold, double scale, bool norms,
                                      bool wide) {
  Odd odd = odd_ones({grads, moments}, wide);
  const auto chunks = chunks_of(grads, odd);
  std::vector<Counts> counted(chunks.size());
  std::vector<double> squared(norms ? chunks.size() : 0);
  // Backwards: the update, which goes forwards, finds what was read last still in the cache.
  for_each<true>(grads, chunks, [&](int64_t i, const Chunk& chunk) {
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
  return {sum_by_tensor(chunks, counted, grads.size()), squared_norms, std::move(odd)};
}

// One update of tensors that share hyperparameters: for each its direction, made by `direct` for (T, index). `rounding`
// is empty, or holds n and the numbers of each tensor. Counts as `count` has them; with `norms` float64 (n, 2), Norms.
template <typename Direct>
Updated update(TensorList params, TensorList grads, TensorList firsts, TensorList seconds, const Tensor& strengths,
               double threshold, double scale, at::IntArrayRef rounding, bool norms, const Direct& direct) {
  Odd odd = odd_ones({grads, params, firsts, seconds}, !rounding.empty());
  const auto chunks = chunks_of(params, odd);
  std::vector<Counts> counted(chunks.size());
  std::vector<Norms> squared(norms ? chunks.size() : 0);
  const Tensor by_tensor = strengths.contiguous();
  for_each(params, chunks, [&](int64_t i, const Chunk& chunk) {
    const int64_t t = chunk.tensor;
    const double* f = by_tensor.const_data_ptr<double>() + 2 * t;
    typed(firsts[t], grads[t], [&]<typename T, typename G>() {
      const Mask<T> mask{static_cast<T>(scale), static_cast<T>(threshold), static_cast<T>(f[0]), static_cast<T>(f[1])};
      const auto direction = direct.template operator()<T>(t);
      const auto add = [&](const Counts& some) {
        counted[i].agree += some.agree;
        counted[i].conflict += some.conflict;
      };
      const auto pass = [&](const Chunk& part) {
        if constexpr (std::is_same_v<T, float>)
          if (!rounding.empty()) {
            const Tensor* second = seconds.empty() ? nullptr : &seconds[t];
            const auto rounded = threshold > 0 ? sweep_rounded<true, G, std::decay_t<decltype(direction)>>
                                               : sweep_rounded<false, G, std::decay_t<decltype(direction)>>;
            add(rounded(params[t], grads[t], firsts[t], second, part, mask, direction, rounding_of(rounding, t)));
            return;
          }
        T *p = params[t].mutable_data_ptr<T>(), *m = firsts[t].mutable_data_ptr<T>();
        T* v = seconds.empty() ? nullptr : seconds[t].mutable_data_ptr<T>();
        with_gradient<T, G>(grads[t], part, [&](int64_t at, const T* g, int64_t n) {
          add(threshold > 0 ? sweep<true>(p + at, g, m + at, v + at, n, mask, direction)
                            : sweep<false>(p + at, g, m + at, v + at, n, mask, direction));
        });
      };
      if (norms)
        squared[i] = measured<T, G>(params[t], grads[t], chunk, pass);
      else
        pass(chunk);
    });
  });
  Tensor by_norm = at::zeros({norms ? static_cast<int64_t>(params.size()) : 0, 2}, at::kDouble);
  for (size_t i = 0; i < squared.size(); ++i) {
    double* row = by_norm.mutable_data_ptr<double>() + 2 * chunks[i].tensor;
    row[0] += squared[i].gradient;
    row[1] += squared[i].change;
  }
  for (const TensorList list : {params, firsts, seconds})
    for (const Tensor& tensor : list)
      if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
  return {sum_by_tensor(chunks, counted, params.size()), by_norm, std::move(odd)};
}

Updated adam_(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs, const Tensor& strengths,
              double threshold, double scale, double decay, at::ArrayRef<double> sizes, at::ArrayRef<double> steps,
              double beta1, double beta2, double eps, double lookahead, at::IntArrayRef rounding, bool norms) {
  return update(params, grads, exp_avgs, exp_avg_sqs, strengths, threshold, scale, rounding, norms,
                [&]<typename T>(int64_t t) { return Adam<T>(steps[t], decay, sizes[t], beta1, beta2, eps, lookahead); });
}

Updated lion_(TensorList params, TensorList grads, TensorList exp_avgs, const Tensor& strengths, double threshold,
              double scale, double decay, double size, double beta1, double beta2, at::IntArrayRef rounding,
              bool norms) {
  return update(params, grads, exp_avgs, {}, strengths, threshold, scale, rounding, norms,
                [&]<typename T>(int64_t) { return Lion<T>(decay, size, beta1, beta2); });
}

Updated sgd_(TensorList params, TensorList grads, TensorList momentum_buffers, const Tensor& strengths, double threshold,
             double scale, double decay, double size, double momentum, bool nesterov, at::IntArrayRef rounding,
             bool norms) {
  return update(params, grads, momentum_buffers, {}, strengths, threshold, scale, rounding, norms,
                [&]<typename T>(int64_t) { return Sgd<T>(decay, size, momentum, nesterov); });
}

// Counts an update of every parameter in its step, float32 () on the CPU, and returns t of each.
std::vector<double> advance_(TensorList steps) {
  std::vector<double> counted;
  counted.reserve(steps.size());
  for (const Tensor& step : steps) {
    TORCH_CHECK(step.is_cpu(), "a step is on ", step.device());
    counted.push_back(*step.mutable_data_ptr<float>() += 1);
    step.unsafeGetTensorImpl()->bump_version();
  }
  return counted;
}

}  // namespace

TORCH_LIBRARY(alphaadam, library) {
  library.def(
      "count(Tensor[] grads, Tensor[] moments, float threshold, float scale, bool norms, bool wide=False) -> "
      "(Tensor, Tensor, int[])");
  library.def(
      "adam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor strengths, "
      "float threshold, float scale, float decay, float[] sizes, float[] steps, float beta1, float beta2, float eps, "
      "float lookahead=0., int[] rounding=[], *, bool norms=False) -> (Tensor, Tensor, int[])");
  library.def(
      "lion_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor strengths, float threshold, "
      "float scale, float decay, float size, float beta1, float beta2, int[] rounding=[], *, bool norms=False) -> "
      "(Tensor, Tensor, int[])");
  library.def(
      "sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor strengths, float threshold, "
      "float scale, float decay, float size, float momentum, bool nesterov, int[] rounding=[], *, bool norms=False) -> "
      "(Tensor, Tensor, int[])");
  library.def("advance_(Tensor(a!)[] steps) -> float[]");
}

// For tensors of every device, so that a list that is not all on the CPU is told so, too.
TORCH_LIBRARY_IMPL(alphaadam, CompositeExplicitAutograd, library) {
  library.impl("count", &count);
  library.impl("adam_", &adam_);
  library.impl("lion_", &lion_);
  library.impl("sgd_", &sgd_);
  library.impl("advance_", &advance_);
}
