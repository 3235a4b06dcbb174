// Products of a packed weight with a few rows of input, and its unpacking, on a CPU.
//
// A weight is a bitmap of 32 columns a word, lowest bit first, and its kept values row after row. A row is multiplied
// word by word: the next popcount(word) values are expanded to the places of the word's bits, zeros elsewhere, and
// multiplied with 32 inputs. How is a matter of the instruction set; what follows from it is in rows.h, once.
//
// Every expansion may read 32 values from where it stands. Rows too near to the end of the values are copied first, so
// nothing is read beyond them, provided that starts are the sums of the bitmap's popcounts: PackedWeight.of in Python computes them so.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define X86 1
#endif

namespace {

#define INLINE __attribute__((always_inline)) inline

constexpr int64_t WORD = 32;          // columns
constexpr int64_t MOST = 16;          // rows of input; more are multiplied with the unpacked weight
constexpr int64_t GRAIN = 1 << 15;    // weights that are worth a thread
constexpr int64_t PANEL = 1 << 21;    // weights that are unpacked at once, to be multiplied with many rows of input
constexpr int64_t AHEAD = 4096;       // bytes: prefetched across pages, which the processor itself does not cross

template <class Value>
struct Weight {
  const uint32_t* bitmap;  // (rows, words)
  const Value* values;     // (count)
  const int64_t* starts;   // (rows + 1)
  const float* scale;      // (rows), or null
  const at::BFloat16* bias;  // (rows), or null
  int64_t rows, words, columns, count;

  // Values of a row, from where 32 can be read at each of its words.
  const Value* readable(int64_t r, std::vector<Value>& copy) const {
    if (starts[r + 1] + WORD <= count) return values + starts[r];
    copy.assign(starts[r + 1] - starts[r] + WORD, Value(0));
    std::copy(values + starts[r], values + starts[r + 1], copy.begin());
    return copy.data();
  }

  // Write a product, of one row and one input.
  void put(at::BFloat16* out, int64_t input, int64_t r, float product) const {
    out[input * rows + r] = product * (scale ? scale[r] : 1.0f) + (bias ? float(bias[r]) : 0.0f);
  }
};

inline int64_t grain(int64_t columns) { return std::max<int64_t>(1, GRAIN / std::max<int64_t>(columns, 1)); }

// Rows of input in the form that an instruction set multiplies, each padded with zeros to whole words.
template <class X>
struct Inputs {
  const X* data;
  int64_t count, stride;
};

inline float widen(uint16_t bits) {
  uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}
inline float widen(int8_t value) { return value; }

// Places of a byte's values: element j is the number of kept values before bit j, or 128 where bit j is not set, for
// which a byte shuffle gives 0. Of elements of one byte and of two.
struct Places {
  alignas(64) uint8_t one[256][8];
  alignas(64) uint8_t two[256][16];
  constexpr Places() : one(), two() {
    for (int byte = 0; byte < 256; ++byte)
      for (int bit = 0, before = 0; bit < 8; ++bit) {
        bool kept = byte >> bit & 1;
        one[byte][bit] = kept ? before : 128;
        two[byte][2 * bit] = kept ? 2 * before : 128;
        two[byte][2 * bit + 1] = kept ? 2 * before + 1 : 128;
        before += kept;
      }
  }
};
constexpr Places PLACES;

// -- portable -------------------------------------------------------------------------------------------------

namespace portable {
#define TARGET
using X = float;
struct Sum { float part[8] = {}; };
struct Weights { float value[WORD] = {}; };

template <class Value>
inline void store(Value* out, const Value* values, uint32_t word) {
  std::memset(out, 0, WORD * sizeof(Value));
  for (; word; word &= word - 1) out[__builtin_ctz(word)] = *values++;
}

template <class Value>
inline Weights expand(const Value* values, uint32_t word) {
  Weights weights;
  for (; word; word &= word - 1) weights.value[__builtin_ctz(word)] = widen(*values++);
  return weights;
}

inline void dot(Sum& sum, const Weights& weights, const X* x) {
  for (int first = 0; first < WORD; first += 8)
    for (int j = 0; j < 8; ++j) sum.part[j] += weights.value[first + j] * x[first + j];
}

inline float total(const Sum& sum) {
  float all = 0;
  for (float part : sum.part) all += part;
  return all;
}

#include "rows.h"
#undef TARGET
}  // namespace portable

#ifdef X86

// -- AVX2: values of a byte of the bitmap at a time, by a table of shuffles -----------------------------------

namespace avx2 {
#define TARGET __attribute__((target("avx2,fma,popcnt,bmi,bmi2")))
using X = float;
struct Sum { __m256 part[2] = {}; };
struct Weights { __m256 part[4]; };

TARGET inline __m128i shuffled(const uint16_t* values, uint32_t byte) {
  return _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)values), _mm_load_si128((const __m128i*)PLACES.two[byte]));
}
TARGET inline __m128i shuffled(const int8_t* values, uint32_t byte) {
  return _mm_shuffle_epi8(_mm_loadl_epi64((const __m128i*)values), _mm_loadl_epi64((const __m128i*)PLACES.one[byte]));
}

TARGET inline void store(uint16_t* out, const uint16_t* values, uint32_t word) {
  for (int i = 0; i < 4; ++i, word >>= 8) {
    _mm_storeu_si128((__m128i*)(out + 8 * i), shuffled(values, word & 255));
    values += __builtin_popcount(word & 255);
  }
}
TARGET inline void store(int8_t* out, const int8_t* values, uint32_t word) {
  for (int i = 0; i < 4; ++i, word >>= 8) {
    _mm_storel_epi64((__m128i*)(out + 8 * i), shuffled(values, word & 255));
    values += __builtin_popcount(word & 255);
  }
}
inline void store(uint32_t* out, const uint32_t* values, uint32_t word) { portable::store(out, values, word); }

TARGET inline Weights expand(const uint16_t* values, uint32_t word) {
  Weights weights;
  for (int i = 0; i < 4; ++i, word >>= 8) {
    __m256i wide = _mm256_cvtepu16_epi32(shuffled(values, word & 255));
    weights.part[i] = _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    values += __builtin_popcount(word & 255);
  }
  return weights;
}
TARGET inline Weights expand(const int8_t* values, uint32_t word) {
  Weights weights;
  for (int i = 0; i < 4; ++i, word >>= 8) {
    weights.part[i] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(shuffled(values, word & 255)));
    values += __builtin_popcount(word & 255);
  }
  return weights;
}

TARGET inline void dot(Sum& sum, const Weights& weights, const X* x) {
  for (int i = 0; i < 4; ++i)
    sum.part[i & 1] = _mm256_fmadd_ps(weights.part[i], _mm256_loadu_ps(x + 8 * i), sum.part[i & 1]);
}

TARGET inline float total(const Sum& sum) {
  alignas(32) float parts[8];
  _mm256_store_ps(parts, _mm256_add_ps(sum.part[0], sum.part[1]));
  float all = 0;
  for (float part : parts) all += part;
  return all;
}

#include "rows.h"
#undef TARGET
}  // namespace avx2

// -- AVX-512 without VBMI2 and BF16: 16 values at a time, as float32 -------------------------------------------

namespace avx512 {
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,popcnt,bmi,bmi2")))
using X = float;
struct Sum { __m512 part = {}; };
struct Weights { __m512 part[2]; };

TARGET inline __m512 floats(const uint16_t* values) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)values)), 16));
}
TARGET inline __m512 floats(const int8_t* values) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)values)));
}

template <class Value>
TARGET inline void store(Value* out, const Value* values, uint32_t word) { avx2::store(out, values, word); }

template <class Value>
TARGET inline Weights expand(const Value* values, uint32_t word) {
  const Value* second = values + __builtin_popcount(word & 0xFFFF);
  return {{_mm512_maskz_expand_ps(word & 0xFFFF, floats(values)), _mm512_maskz_expand_ps(word >> 16, floats(second))}};
}

TARGET inline void dot(Sum& sum, const Weights& weights, const X* x) {
  sum.part = _mm512_fmadd_ps(weights.part[0], _mm512_loadu_ps(x), sum.part);
  sum.part = _mm512_fmadd_ps(weights.part[1], _mm512_loadu_ps(x + 16), sum.part);
}

TARGET inline float total(const Sum& sum) { return _mm512_reduce_add_ps(sum.part); }

#include "rows.h"
#undef TARGET
}  // namespace avx512

// -- AVX-512 with VBMI2 and BF16: 32 values at a time ----------------------------------------------------------

namespace vbmi2 {
#define TARGET \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx512bf16,avx2,fma,popcnt,bmi,bmi2")))
using X = uint16_t;
struct Sum { __m512 part = {}; };
struct Weights { __m512i part; };

// On Zen 4 and 5 an expansion with zeroing waits for the last value of its output register (llvm #206849): it is merged
// into a zero, of which the compiler does not know that it is one.
TARGET inline __m512i zero() {
  __m512i bits = _mm512_setzero_si512();
  asm("" : "+v"(bits));
  return bits;
}
TARGET inline __m512i expanded(const uint16_t* values, uint32_t word) {
  __m512i loaded = _mm512_loadu_si512(values);
  asm("" : "+v"(loaded));  // the form that loads is slower
  return _mm512_mask_expand_epi16(zero(), word, loaded);
}
TARGET inline __m256i expanded(const int8_t* values, uint32_t word) {
  __m256i loaded = _mm256_loadu_si256((const __m256i*)values);
  asm("" : "+v"(loaded));
  return _mm256_mask_expand_epi8(_mm512_castsi512_si256(zero()), word, loaded);
}

TARGET inline void store(uint16_t* out, const uint16_t* values, uint32_t word) {
  _mm512_storeu_si512(out, expanded(values, word));
}
TARGET inline void store(int8_t* out, const int8_t* values, uint32_t word) {
  _mm256_storeu_si256((__m256i*)out, expanded(values, word));
}
TARGET inline void store(uint32_t* out, const uint32_t* values, uint32_t word) {
  const uint32_t* second = values + __builtin_popcount(word & 0xFFFF);
  _mm512_storeu_si512(out, _mm512_mask_expand_epi32(zero(), word & 0xFFFF, _mm512_loadu_si512(values)));
  _mm512_storeu_si512(out + 16, _mm512_mask_expand_epi32(zero(), word >> 16, _mm512_loadu_si512(second)));
}

TARGET inline Weights expand(const uint16_t* values, uint32_t word) { return {expanded(values, word)}; }
TARGET inline Weights expand(const int8_t* values, uint32_t word) {
  __m256i bytes = expanded(values, word);  // integers of 8 bits are exact in bfloat16
  __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
  __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
  return {(__m512i)_mm512_cvtne2ps_pbh(high, low)};
}

TARGET inline void dot(Sum& sum, const Weights& weights, const X* x) {
  sum.part = _mm512_dpbf16_ps(sum.part, (__m512bh)weights.part, (__m512bh)_mm512_loadu_si512(x));
}

TARGET inline float total(const Sum& sum) { return _mm512_reduce_add_ps(sum.part); }

#include "rows.h"
#undef TARGET
}  // namespace vbmi2

// -- AMX: 16 rows and up to 16 inputs at a time, expanded as above into a tile ----------------------------------

namespace amx {
#define TARGET                                                                                                       \
  __attribute__((target(                                                                                             \
      "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx512bf16,avx2,fma,popcnt,bmi,bmi2,amx-tile,amx-bf16")))

constexpr int SIDE = 16;   // rows of a tile, and inputs
constexpr int DEPTH = 8;   // words that are expanded before they are multiplied
constexpr int WIDE = 64;   // bytes of a row of a tile
constexpr int64_t FEW = 5;  // inputs, with fewer of which a tile does not pay

struct alignas(64) Tiles {  // the processor's layout: product, weights, inputs
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {WIDE, WIDE, WIDE};
  uint8_t rows[16] = {SIDE, SIDE, SIDE};
};

inline bool here() {  // Linux asks for a permission, once for each process
#if defined(__linux__)
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
  return false;
#endif
}

template <class Value>
TARGET void groups(
    const Weight<Value>& weight, int64_t first, int64_t last, const uint16_t* x, int64_t inputs, at::BFloat16* out) {
  constexpr Tiles tiles;
  alignas(64) uint16_t expanded[DEPTH][SIDE][WORD];
  alignas(64) float products[SIDE][SIDE];
  std::vector<Value> copies[SIDE];
  const Value* values[SIDE];
  _tile_loadconfig(&tiles);
  for (int64_t start = first * SIDE; start < last * SIDE; start += SIDE) {
    for (int r = 0; r < SIDE; ++r) values[r] = weight.readable(start + r, copies[r]);
    int64_t ahead = weight.starts[start + SIDE] - weight.starts[start];  // the same row of the next group
    _tile_zero(0);
    for (int64_t word = 0; word < weight.words; word += DEPTH) {
      int depth = std::min<int64_t>(DEPTH, weight.words - word);
      for (int r = 0; r < SIDE; ++r) {
        const uint32_t* bitmap = weight.bitmap + (start + r) * weight.words + word;
        __builtin_prefetch(bitmap + SIDE * weight.words);
        for (int d = 0; d < depth; ++d) {
          _mm512_store_si512(expanded[d][r], vbmi2::expand(values[r], bitmap[d]).part);
          __builtin_prefetch(values[r] + ahead);
          values[r] += __builtin_popcount(bitmap[d]);
        }
      }
      asm volatile("" ::: "memory");  // the intrinsics do not say that they read it
      for (int d = 0; d < depth; ++d) {
        _tile_loadd(1, expanded[d], WIDE);
        _tile_loadd(2, x + (word + d) * SIDE * WORD, WIDE);
        _tile_dpbf16ps(0, 1, 2);
      }
    }
    _tile_stored(0, products, WIDE);
    for (int r = 0; r < SIDE; ++r)
      for (int64_t m = 0; m < inputs; ++m) weight.put(out, m, start + r, products[r][m]);
  }
  _tile_release();
}

template <class Value>
void multiply(const Weight<Value>& weight, const at::Tensor& input, at::BFloat16* out) {
  int64_t inputs = input.size(0), whole = weight.rows / SIDE;
  if (inputs < FEW || whole == 0) return vbmi2::multiply(weight, input, out);
  // A tile of inputs: two columns of all inputs in each of its rows.
  at::Tensor tiles = at::zeros({weight.words, SIDE, SIDE, 2}, input.options());
  auto* to = (uint16_t*)tiles.data_ptr();
  auto* given = (const uint16_t*)input.const_data_ptr();
  for (int64_t m = 0; m < inputs; ++m)
    for (int64_t j = 0; j < weight.columns; ++j) to[(j / 2 * SIDE + m) * 2 + j % 2] = given[m * weight.columns + j];
  at::parallel_for(0, whole, grain(weight.columns * SIDE), [&](int64_t first, int64_t last) {
    groups(weight, first, last, to, inputs, out);
  });
  vbmi2::multiply(weight, input, out, whole * SIDE);
}

template <class Value>
void unpack(const Weight<Value>& weight, int64_t start, int64_t end, Value* out) {
  vbmi2::unpack(weight, start, end, out);
}
#undef TARGET
}  // namespace amx

#endif  // X86

// -- choice ---------------------------------------------------------------------------------------------------

// One instruction set: its name, whether this processor has it, and what is computed by it.
struct Path {
  const char* name;
  bool here;
  void (*multiply_bf16)(const Weight<uint16_t>&, const at::Tensor&, at::BFloat16*);
  void (*multiply_int8)(const Weight<int8_t>&, const at::Tensor&, at::BFloat16*);
  void (*unpack_1)(const Weight<int8_t>&, int64_t, int64_t, int8_t*);
  void (*unpack_2)(const Weight<uint16_t>&, int64_t, int64_t, uint16_t*);
  void (*unpack_4)(const Weight<uint32_t>&, int64_t, int64_t, uint32_t*);
};

#define PATH(space, here) \
  {#space, bool(here), space::multiply, space::multiply, space::unpack, space::unpack, space::unpack}

const std::vector<Path>& paths() {  // the fastest first
#ifdef X86
  static const bool avx2_here =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  static const bool avx512_here = avx2_here && __builtin_cpu_supports("avx512vl") &&
                                  __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  static const bool vbmi2_here =
      avx512_here && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bf16");
#endif
  static const std::vector<Path> all{
#ifdef X86
      PATH(amx, vbmi2_here && amx::here()),
      PATH(vbmi2, vbmi2_here),
      PATH(avx512, avx512_here),
      PATH(avx2, avx2_here),
#endif
      PATH(portable, true),
  };
  return all;
}

const Path& path_named(c10::string_view name) {
  for (const Path& path : paths())
    if (path.here && (name.empty() || name == path.name)) return path;
  TORCH_CHECK(false, "this processor has no instruction set '", name, "'");
}

std::vector<std::string> packed_paths() {
  std::vector<std::string> names;
  for (const Path& path : paths())
    if (path.here) names.emplace_back(path.name);
  return names;
}

// -- operators ------------------------------------------------------------------------------------------------

using at::Tensor;
using Maybe = std::optional<Tensor>;

template <class Value>
Weight<Value> weight_of(
    const Tensor& bitmap, const Tensor& values, const Tensor& starts, const Maybe& scale, const Maybe& bias,
    int64_t columns) {
  return {
      (const uint32_t*)bitmap.const_data_ptr(),
      (const Value*)values.const_data_ptr(),
      starts.const_data_ptr<int64_t>(),
      scale ? scale->const_data_ptr<float>() : nullptr,
      bias ? bias->const_data_ptr<at::BFloat16>() : nullptr,
      bitmap.size(0), bitmap.size(1), columns, values.numel()};
}

// What can be checked at every call. That starts are the sums of the popcounts is checked once for each weight.
void check(const Tensor& bitmap, const Tensor& values, const Tensor& starts, const Maybe& scale, int64_t columns) {
  TORCH_CHECK(bitmap.dim() == 2 && bitmap.scalar_type() == at::kInt && bitmap.is_contiguous(), "bitmap: int32, 2-D");
  TORCH_CHECK(columns >= 0 && bitmap.size(1) == (columns + WORD - 1) / WORD, "bitmap: not of ", columns, " columns");
  TORCH_CHECK(values.dim() == 1 && values.is_contiguous(), "values: one dimension");
  int64_t rows = bitmap.size(0);
  TORCH_CHECK(starts.scalar_type() == at::kLong && starts.dim() == 1 && starts.numel() == rows + 1 &&
              starts.is_contiguous(), "starts: int64, one more than rows");
  const int64_t* start = starts.const_data_ptr<int64_t>();
  TORCH_CHECK(start[0] == 0 && start[rows] == values.numel(), "starts: not those of the values");
  TORCH_CHECK(!scale || (scale->dim() == 1 && scale->numel() == rows), "scale: one for each row");
}

// Rows of the weight from ``first`` to ``last``, dense.
Tensor unpacked(
    const Path& by, const Tensor& bitmap, const Tensor& values, const Tensor& starts, const Maybe& scale,
    int64_t columns, int64_t first, int64_t last, at::ScalarType dtype) {
  Tensor out = at::empty({last - first, columns}, values.options());
  auto unpack = [&](auto value, auto how) {
    using Value = decltype(value);
    how(weight_of<Value>(bitmap, values, starts, {}, {}, columns), first, last, (Value*)out.data_ptr());
  };
  switch (values.element_size()) {
    case 1: unpack(int8_t(), by.unpack_1); break;
    case 2: unpack(uint16_t(), by.unpack_2); break;
    case 4: unpack(uint32_t(), by.unpack_4); break;
    default: TORCH_CHECK(false, "values: of 1, 2 or 4 bytes");
  }
  if (scale) out = out.to(at::kFloat).mul_(scale->narrow(0, first, last - first).to(at::kFloat).unsqueeze(1));
  return out.to(dtype);
}

Tensor packed_unpack(
    const Tensor& bitmap, const Tensor& values, const Tensor& starts, const Maybe& scale, int64_t columns,
    at::ScalarType dtype, c10::string_view path) {
  check(bitmap, values, starts, scale, columns);
  return unpacked(path_named(path), bitmap, values, starts, scale, columns, 0, bitmap.size(0), dtype);
}

Tensor packed_linear(
    const Tensor& input, const Tensor& bitmap, const Tensor& values, const Tensor& starts, const Maybe& scale,
    const Maybe& bias, int64_t columns, c10::string_view path) {
  check(bitmap, values, starts, scale, columns);
  TORCH_CHECK(input.dim() > 0 && input.size(-1) == columns, "input: not of ", columns, " columns");
  int64_t rows = bitmap.size(0), count = input.numel() / std::max<int64_t>(columns, 1);
  bool int8 = values.scalar_type() == at::kChar && scale, bf16 = values.scalar_type() == at::kBFloat16 && !scale;
  bool plain = !bias || (bias->scalar_type() == at::kBFloat16 && bias->numel() == rows && bias->is_contiguous());
  const Path& by = path_named(path);
  auto shape = input.sizes().vec();
  shape.back() = rows;
  Tensor out = at::empty(shape, input.options());
  if (input.scalar_type() != at::kBFloat16 || !(int8 || bf16) || !plain || count == 0 || count > MOST) {
    // By panels that stay in a cache: a whole dense weight would be memory that the system gives and takes every time.
    int64_t panel = std::max<int64_t>(1, PANEL / std::max<int64_t>(columns, 1));
    for (int64_t first = 0; first < rows; first += panel) {
      int64_t last = std::min(rows, first + panel);
      Tensor weight = unpacked(by, bitmap, values, starts, scale, columns, first, last, input.scalar_type());
      out.narrow(-1, first, last - first)
          .copy_(at::linear(input, weight, bias ? Maybe(bias->narrow(0, first, last - first)) : Maybe()));
    }
    return out;
  }
  Maybe factors = scale ? Maybe(scale->to(at::kFloat).contiguous()) : Maybe();
  Tensor x = input.reshape({count, columns}).contiguous();
  auto* to = (at::BFloat16*)out.data_ptr();
  if (int8)
    by.multiply_int8(weight_of<int8_t>(bitmap, values, starts, factors, bias, columns), x, to);
  else
    by.multiply_bf16(weight_of<uint16_t>(bitmap, values, starts, {}, bias, columns), x, to);
  return out;
}

// Ask for large pages under a tensor, on Linux: with 4 KiB pages, looking up addresses takes a good part of the time.
void packed_large_pages(const Tensor& tensor) {
#if defined(__linux__)
  constexpr uintptr_t LARGE = 1 << 21;
  uintptr_t first = (uintptr_t)tensor.const_data_ptr(), last = first + tensor.nbytes();
  first = (first + LARGE - 1) / LARGE * LARGE;
  last = last / LARGE * LARGE;
  if (first < last) {  // where the system refuses, small pages stay
    constexpr int COLLAPSE = 25;  // MADV_COLLAPSE, of Linux 6.1
    madvise((void*)first, last - first, MADV_HUGEPAGE);
    madvise((void*)first, last - first, COLLAPSE);
  }
#endif
}

}  // namespace

TORCH_LIBRARY_IMPL(leap_pl, CPU, library) {
  library.impl("packed_linear", packed_linear);
  library.impl("packed_unpack", packed_unpack);
  library.impl("packed_large_pages", packed_large_pages);
}

TORCH_LIBRARY_IMPL(leap_pl, CompositeExplicitAutograd, library) { library.impl("packed_paths", packed_paths); }
