// rounding.py in C++: the random bits of 128 elements at a time, and the rounding of 128 values by them.

#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace rounding {

constexpr int64_t kBlock = 128;  // elements that share 16 calls of Philox: element 16 l + c takes lane l of call c
constexpr int kCalls = 16;

// A call's words lie in lanes of 64 bits, whose upper halves hold anything: a product of the lower halves fills both.
#if defined(__AVX512F__)
typedef uint64_t Lanes __attribute__((vector_size(64)));
inline Lanes product(Lanes a, Lanes b) { return (Lanes)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
#elif defined(__AVX2__)
typedef uint64_t Lanes __attribute__((vector_size(32)));
inline Lanes product(Lanes a, Lanes b) { return (Lanes)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
#else
typedef uint64_t Lanes __attribute__((vector_size(32)));
inline Lanes product(Lanes a, Lanes b) { return (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF); }
#endif
constexpr int kLanes = sizeof(Lanes) / sizeof(uint64_t);
// What the random bits of a tensor's elements are made of.
struct Stream {
  uint64_t key;
  uint32_t n, tensor;
};

// 16 random bits of each of a block's elements, in its lower half. The calls of even and of odd numbers lie in lanes of
// their own, so that their words fit together in the end.
inline void random_bits(const Stream& stream, uint64_t block, uint32_t* __restrict bits) {
  const uint64_t first = block * kCalls;  // a multiple of 16, so that no call's lower half carries into the upper
  const Lanes by_a = Lanes{} + uint64_t{0xD2511F53}, by_c = Lanes{} + uint64_t{0xCD9E8D57};
  for (int begin = 0; begin < kCalls; begin += 2 * kLanes) {
    Lanes a[2], b[2], c[2], d[2];
    for (int odd = 0; odd < 2; ++odd) {
      for (int lane = 0; lane < kLanes; ++lane) a[odd][lane] = first + begin + 2 * lane + odd;
      b[odd] = Lanes{} + (first >> 32);
      c[odd] = Lanes{} + uint64_t{stream.n};
      d[odd] = Lanes{} + uint64_t{stream.tensor};
    }
    uint32_t low = static_cast<uint32_t>(stream.key), high = static_cast<uint32_t>(stream.key >> 32);
    for (int round = 0; round < 10; ++round) {
      for (int odd = 0; odd < 2; ++odd) {
        const Lanes of_a = product(a[odd], by_a), of_c = product(c[odd], by_c);
        a[odd] = (of_c >> 32) ^ b[odd] ^ uint64_t{low};
        c[odd] = (of_a >> 32) ^ d[odd] ^ uint64_t{high};
        b[odd] = of_c;
        d[odd] = of_a;
      }
      low += 0x9E3779B9;
      high += 0xBB67AE85;
    }
    const Lanes* words[4] = {a, b, c, d};
    for (int word = 0; word < 4; ++word) {
      const Lanes both = (words[word][0] & uint64_t{0xFFFFFFFF}) | (words[word][1] << 32);
      const Lanes lower = both & uint64_t{0x0000FFFF0000FFFF}, upper = (both >> 16) & uint64_t{0x0000FFFF0000FFFF};
      std::memcpy(bits + 2 * word * kCalls + begin, &lower, sizeof lower);
      std::memcpy(bits + (2 * word + 1) * kCalls + begin, &upper, sizeof upper);
    }
  }
}

// rounding.rounded, of a block. Nothing but the sum is needed where all values lie below bf16's largest number.
inline void round_block(const float* __restrict values, const uint32_t* __restrict bits, uint16_t* __restrict into) {
  constexpr uint32_t kInfinite = 0x7F800000, kLargest = 0x7F7FFFFF, kNan = 0x7FC00000;
  uint32_t value[kBlock], most = 0;
  std::memcpy(value, values, sizeof value);
  for (int64_t i = 0; i < kBlock; ++i) {
    const uint32_t magnitude = value[i] & 0x7FFFFFFF;
    most = magnitude > most ? magnitude : most;
    into[i] = static_cast<uint16_t>((value[i] + bits[i]) >> 16);
  }
  if (most < (kLargest & 0xFFFF0000)) return;
  for (int64_t i = 0; i < kBlock; ++i) {
    const uint32_t magnitude = value[i] & 0x7FFFFFFF, moved = magnitude + bits[i];
    const uint32_t finite = moved < kLargest ? moved : kLargest;
    const uint32_t kept = (magnitude < kInfinite ? finite : magnitude) | (value[i] & 0x80000000);
    into[i] = static_cast<uint16_t>((magnitude > kInfinite ? kNan : kept) >> 16);
  }
}

}  // namespace rounding
