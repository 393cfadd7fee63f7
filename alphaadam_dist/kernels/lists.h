// What the passes read: lists of local shards, one tensor each, cut into chunks for the threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <vector>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

using at::Tensor;
using at::TensorList;

constexpr int64_t kChunk = 1 << 18;    // elements a thread takes at a time: long runs, for the memory prefetcher
constexpr int64_t kBlock = 1 << 10;    // of them, those converted from 16 bits at a time
constexpr int64_t kAlone = 1 << 15;    // elements that one thread does faster than several

struct Chunk {
  int64_t tensor, begin, size;
};

// Of all tensors but the odd ones, whose indices ascend.
std::vector<Chunk> chunks_of(TensorList tensors, const std::vector<int64_t>& odd) {
  std::vector<Chunk> chunks;
  auto next = odd.begin();
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (next != odd.end() && *next == static_cast<int64_t>(i)) {
      ++next;
      continue;
    }
    for (int64_t begin = 0, numel = tensors[i].numel(); begin < numel; begin += kChunk)
      chunks.push_back({static_cast<int64_t>(i), begin, std::min(kChunk, numel - begin)});
  }
  return chunks;
}

// body(index, chunk) for every chunk, on torch's threads; each goes through its own forwards or backwards.
template <bool kBackwards = false, typename Body>
void for_each(TensorList tensors, const std::vector<Chunk>& chunks, const Body& body) {
  int64_t elements = 0;
  for (const Tensor& tensor : tensors) elements += tensor.numel();
  const int64_t count = static_cast<int64_t>(chunks.size());
  at::parallel_for(0, count, elements <= kAlone ? count : 1, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      const int64_t i = kBackwards ? first + last - 1 - n : n;
      body(i, chunks[i]);
    }
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

// Can the passes read tensor i of lists of one length as flat memory? The gradients come first, then what is of the
// state's own dtype, or with `wide` moments in bf16 and parameters in that or fp32.
bool serves(std::initializer_list<TensorList> lists, size_t i, bool wide) {
  const TensorList grads = lists.begin()[0], owns = lists.begin()[1];
  const Tensor& grad = grads[i];
  const auto type = grad.scalar_type(), own = owns[i].scalar_type();
  if (type != at::kFloat && type != at::kDouble && type != at::kBFloat16 && type != at::kHalf) return false;
  if (own != at::kFloat && own != (wide ? at::kBFloat16 : at::kDouble)) return false;
  for (const TensorList list : lists) {
    if (list.empty()) continue;
    const Tensor& tensor = list[i];
    if (!tensor.device().is_cpu() || tensor.layout() != at::kStrided || tensor.numel() != grad.numel()) return false;
    if (tensor.unsafeGetTensorImpl()->is_python_dispatch()) return false;  // a subclass without memory of its own
    if (wide && !(tensor.is_contiguous() && grad.is_contiguous())) return false;
    const bool moment = list.data() != grads.data() && (list.data() != owns.data() || lists.size() == 2);
    if (list.data() != grads.data() && tensor.scalar_type() != (wide && moment ? at::kBFloat16 : own)) return false;
    if (!(tensor.is_contiguous() && grad.is_contiguous()) &&
        !(tensor.is_non_overlapping_and_dense() && tensor.strides() == grad.strides()))
      return false;
  }
  return true;
}

// The indices, ascending, of what the passes cannot read. Asked here and not by the caller: handing 300 small tensors
// over from Python takes longer than updating them.
std::vector<int64_t> odd_ones(std::initializer_list<TensorList> lists, bool wide) {
  std::vector<int64_t> odd;
  for (size_t i = 0; i < lists.begin()->size(); ++i)
    if (!serves(lists, i, wide)) odd.push_back(static_cast<int64_t>(i));
  return odd;
}

}  // namespace
