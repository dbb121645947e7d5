// A subset of <metal_stdlib> for clang on a CPU. Two flavours:
//   -DMSL_STRICT_AS : device/constant/threadgroup are real address spaces, so a
//                     missing or wrong qualifier is a compile error, as in MSL.
//   otherwise       : plain pointers, so that -fsanitize=thread instruments them.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "msl_rt.h"

#ifdef MSL_STRICT_AS
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#else
#define device
#define constant
#define threadgroup
#endif
#define thread
#define kernel
#define M_LOG2E_F 1.44269504088896340735992468100189214f
#define M_LN2_F 0.693147180559945309417232121458176568f
#define M_PI_F 3.14159265358979323846264338327950288f
#define METAL_FUNC inline __attribute__((always_inline))
#define MSL_INL inline __attribute__((always_inline))
#define MSL_NOSAN __attribute__((no_sanitize("thread")))

typedef _Float16 half;
typedef __bf16 bfloat;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef half float16_t;
typedef bfloat bfloat16_t;
#define MSL_VECS(T)                                   \
  typedef T T##2 __attribute__((ext_vector_type(2))); \
  typedef T T##3 __attribute__((ext_vector_type(3))); \
  typedef T T##4 __attribute__((ext_vector_type(4)));
MSL_VECS(char)
MSL_VECS(uchar) MSL_VECS(short) MSL_VECS(ushort) MSL_VECS(int) MSL_VECS(uint)
    MSL_VECS(long) MSL_VECS(ulong) MSL_VECS(half) MSL_VECS(bfloat) MSL_VECS(float)

// `threadgroup T name[N];` is rewritten to this by the front end.
#define MSL_TG(key, name, dims, ...)       \
  typedef __VA_ARGS__ msl_tgt_##name dims; \
  threadgroup msl_tgt_##name& name =       \
      *(threadgroup msl_tgt_##name*)mslrt::tg_alloc(key, sizeof(msl_tgt_##name), 16)

    // `float4(a, b, c, d)` is rewritten to msl_mk<float4>(a, b, c, d).
    template <class V>
    struct msl_vt;
template <class T, int N>
struct msl_vt<T __attribute__((ext_vector_type(N)))> {
  using E = T;
  static constexpr int n = N;
};
template <class T>
struct msl_isv : std::false_type {};
template <class T, int N>
struct msl_isv<T __attribute__((ext_vector_type(N)))> : std::true_type {};
template <class V, class A>
MSL_INL V msl_mk(A a) {
  if constexpr (msl_isv<A>::value)
    return __builtin_convertvector(a, V);
  else {
    V v;
    for (int i = 0; i < msl_vt<V>::n; i++) v[i] = (typename msl_vt<V>::E)a;
    return v;
  }
}
template <class V, class A, class B, class... R>
MSL_INL V msl_mk(A a, B b, R... r) {
  using E = typename msl_vt<V>::E;
  static_assert(2 + sizeof...(R) == msl_vt<V>::n,
                "vector constructor arity (shim takes scalars only)");
  E t[] = {(E)a, (E)b, (E)r...};
  V v;
  for (int i = 0; i < msl_vt<V>::n; i++) v[i] = t[i];
  return v;
}
template <class D, class S>
MSL_INL D as_type(S s) {
  static_assert(sizeof(D) == sizeof(S), "as_type size mismatch");
  D d;
  __builtin_memcpy(&d, &s, sizeof d);
  return d;
}

namespace metal {
template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));
using ::as_type;
using std::bool_constant;
using std::conditional_t;
using std::decay_t;
using std::declval;
using std::enable_if;
using std::enable_if_t;
using std::false_type;
using std::integral_constant;
using std::is_floating_point_v;
using std::is_integral;
using std::is_integral_v;
using std::is_same;
using std::is_same_v;
using std::is_signed_v;
using std::numeric_limits;
using std::remove_cv_t;
using std::remove_reference_t;
using std::true_type;
template <class T>
struct remove_addrspace {
  using type = T;
};
#ifdef MSL_STRICT_AS
#define MSL_RM(n)                                                      \
  template <class T>                                                   \
  struct remove_addrspace<__attribute__((address_space(n))) T> {       \
    using type = T;                                                    \
  };                                                                   \
  template <class T>                                                   \
  struct remove_addrspace<const __attribute__((address_space(n))) T> { \
    using type = const T;                                              \
  };
MSL_RM(1)
MSL_RM(2) MSL_RM(3)
#undef MSL_RM
#endif
    template <class T>
    using remove_addrspace_t = typename remove_addrspace<T>::type;

// ---- math: evaluated in float, rounded to the argument type --------------------
#define MSL_F1(name, expr)                                                              \
  template <class T>                                                                    \
  MSL_INL std::enable_if_t<!msl_isv<T>::value && !std::is_integral_v<T>, T> name(T v) { \
    float x = (float)v;                                                                 \
    return (T)(expr);                                                                   \
  }
#define MSL_F1ALL                                                                        \
  MSL_F1(exp, ::expf(x))                                                                 \
  MSL_F1(exp2, ::exp2f(x)) MSL_F1(exp10, ::powf(10.f, x)) MSL_F1(log, ::logf(x))         \
      MSL_F1(log2, ::log2f(x)) MSL_F1(sqrt, ::sqrtf(x)) MSL_F1(rsqrt, 1.0f / ::sqrtf(x)) \
          MSL_F1(tanh, ::tanhf(x)) MSL_F1(sin, ::sinf(x)) MSL_F1(cos, ::cosf(x))         \
              MSL_F1(floor, ::floorf(x)) MSL_F1(ceil, ::ceilf(x))                        \
                  MSL_F1(round, ::roundf(x)) MSL_F1(rint, ::rintf(x))                    \
                      MSL_F1(trunc, ::truncf(x)) MSL_F1(fabs, ::fabsf(x))
MSL_F1ALL
namespace precise {
MSL_F1ALL
}
#undef MSL_F1
#define MSL_F1(name, expr)                                                              \
  template <class T>                                                                    \
  MSL_INL std::enable_if_t<!msl_isv<T>::value && !std::is_integral_v<T>, T> name(T v) { \
    float x = (float)v;                                                                 \
    return (T)mslrt::fast_noise((float)(expr), 4.f);                                    \
  }
namespace fast {
MSL_F1ALL
template <class T>
MSL_INL T divide(T a, T b) {
  return (T)((float)a / (float)b);
}
}  // namespace fast
#undef MSL_F1
template <class T, class U>
using msl_c = std::common_type_t<T, U>;
template <class T, class U>
MSL_INL auto max(T a, U b) {
  using C = decltype(true ? a : b);
  return (C)a < (C)b ? (C)b : (C)a;
}
template <class T, class U>
MSL_INL auto min(T a, U b) {
  using C = decltype(true ? a : b);
  return (C)b < (C)a ? (C)b : (C)a;
}
template <class T>
MSL_INL T abs(T a) {
  return a < T(0) ? T(-a) : a;
}
template <class T>
MSL_INL T clamp(T x, T lo, T hi) {
  return min(max(x, lo), hi);
}
template <class T>
MSL_INL T fma(T a, T b, T c) {
  return (T)::fmaf((float)a, (float)b, (float)c);
}
template <class T>
MSL_INL T select(T a, T b, bool c) {
  return c ? b : a;
}
template <class T>
MSL_INL bool isnan(T a) {
  return a != a;
}
template <class T>
MSL_INL bool isinf(T a) {
  return std::isinf((float)a);
}
template <class T>
MSL_INL T pow(T a, T b) {
  return (T)::powf((float)a, (float)b);
}
template <class T, int N>
MSL_INL T dot(vec<T, N> a, vec<T, N> b) {
  T s = a[0] * b[0];
  for (int i = 1; i < N; i++) s += a[i] * b[i];
  return s;
}
MSL_INL float dot(float4 a, float4 b) {
  return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
}
MSL_INL float dot(float2 a, float2 b) { return a.x * b.x + a.y * b.y; }
MSL_INL uint popcount(uint v) { return __builtin_popcount(v); }
MSL_INL uint clz(uint v) { return v ? __builtin_clz(v) : 32; }
MSL_INL uint ctz(uint v) { return v ? __builtin_ctz(v) : 32; }

// ---- barriers ----------------------------------------------------------------
enum class mem_flags : int {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4
};
MSL_INL mem_flags operator|(mem_flags a, mem_flags b) {
  return mem_flags(int(a) | int(b));
}
MSL_INL void threadgroup_barrier(mem_flags f, int line = __builtin_LINE()) {
  mslrt::tg_barrier(line, int(f));
}
MSL_INL void simdgroup_barrier(mem_flags f, int line = __builtin_LINE()) {
  mslrt::simd_fence(line, int(f));
}

// ---- simdgroup functions ---------------------------------------------------------
enum {
  OP_SUM = 1,
  OP_PROD,
  OP_MAX,
  OP_MIN,
  OP_AND,
  OP_OR,
  OP_XOR,
  OP_SHUF,
  OP_SHUFX,
  OP_SHUFD,
  OP_SHUFU,
  OP_BCAST,
  OP_BALLOT,
  OP_PREI,
  OP_PREE,
  OP_MMA,
  OP_MLD,
  OP_MST,
  OP_QUAD
};
template <class T>
struct msl_lanes {
  const unsigned char* t;
  uint32_t mask;
  MSL_INL msl_lanes(int op, int line, T v) {
    t = mslrt::simd_exchange(op, line, &v, sizeof v, &mask);
  }
  MSL_INL bool has(uint i) const { return i < 32 && (mask >> i & 1); }
  MSL_INL T at(uint i) const {
    T v;
    __builtin_memcpy(&v, t + 64 * i, sizeof v);
    return v;
  }
};
// Pairwise (butterfly) order; lanes that do not exist contribute nothing.
template <class T, class F>
MSL_INL T msl_reduce(int op, int line, T v, F f) {
  msl_lanes<T> L(op, line, v);
  T b[32];
  bool h[32];
  for (uint i = 0; i < 32; i++) {
    h[i] = L.has(i);
    if (h[i]) b[i] = L.at(i);
  }
  for (uint s = 16; s; s >>= 1)
    for (uint i = 0; i < s; i++) {
      if (h[i] && h[i + s])
        b[i] = f(b[i], b[i + s]);
      else if (h[i + s]) {
        b[i] = b[i + s];
        h[i] = true;
      }
    }
  return b[0];
}
#define MSL_RED(name, op, e)                                            \
  template <class T>                                                    \
  MSL_INL T name(T v, int line = __builtin_LINE()) {                    \
    return msl_reduce<T>(op, line, v, [](T a, T b) { return (T)(e); }); \
  }
MSL_RED(simd_sum, OP_SUM, a + b)
MSL_RED(simd_product, OP_PROD, a* b) MSL_RED(simd_max, OP_MAX, a < b ? b : a)
    MSL_RED(simd_min, OP_MIN, b < a ? b : a) MSL_RED(simd_and, OP_AND, a& b)
        MSL_RED(simd_or, OP_OR, a | b) MSL_RED(simd_xor, OP_XOR, a ^ b)
#undef MSL_RED
            MSL_INL uint msl_lane() {
  return mslrt::ctx().thread_index_in_simdgroup;
}
#define MSL_SHUF(name, op, idx)                                                     \
  template <class T>                                                                \
  MSL_INL T name(T v, ushort d, int line = __builtin_LINE()) {                      \
    msl_lanes<T> L(op, line, v);                                                    \
    uint l = msl_lane();                                                            \
    int s = (idx);                                                                  \
    if (s < 0 || s > 31) return v; /* MSL: unmodified past the edge */              \
    if (!L.has(s)) mslrt::fail("line %d: shuffle reads inactive lane %d", line, s); \
    return L.at(s);                                                                 \
  }
MSL_SHUF(simd_shuffle, OP_SHUF, (int)d + 0 * l)
MSL_SHUF(simd_broadcast, OP_BCAST, (int)d + 0 * l)
    MSL_SHUF(simd_shuffle_xor, OP_SHUFX, (int)(l ^ d))
        MSL_SHUF(simd_shuffle_down, OP_SHUFD, (int)l + d)
            MSL_SHUF(simd_shuffle_up, OP_SHUFU, (int)l - d)
#undef MSL_SHUF
                template <class T>
                MSL_INL T simd_broadcast_first(T v, int line = __builtin_LINE()) {
  msl_lanes<T> L(OP_BCAST, line, v);
  return L.at(__builtin_ctz(L.mask));
}
MSL_INL bool simd_any(bool v, int line = __builtin_LINE()) {
  msl_lanes<uint> L(OP_BALLOT, line, v);
  for (uint i = 0; i < 32; i++)
    if (L.has(i) && L.at(i)) return true;
  return false;
}
MSL_INL bool simd_all(bool v, int line = __builtin_LINE()) {
  msl_lanes<uint> L(OP_BALLOT, line, v);
  for (uint i = 0; i < 32; i++)
    if (L.has(i) && !L.at(i)) return false;
  return true;
}
template <class T>
MSL_INL T simd_prefix_inclusive_sum(T v, int line = __builtin_LINE()) {
  msl_lanes<T> L(OP_PREI, line, v);
  T s = 0;
  for (uint i = 0; i <= msl_lane(); i++)
    if (L.has(i)) s = s + L.at(i);
  return s;
}
template <class T>
MSL_INL T simd_prefix_exclusive_sum(T v, int line = __builtin_LINE()) {
  msl_lanes<T> L(OP_PREE, line, v);
  T s = 0;
  for (uint i = 0; i < msl_lane(); i++)
    if (L.has(i)) s = s + L.at(i);
  return s;
}
template <class T>
MSL_INL T quad_sum(T v, int line = __builtin_LINE()) {
  msl_lanes<T> L(OP_QUAD, line, v);
  uint q = msl_lane() & ~3u;
  return (T)((L.at(q) + L.at(q + 2)) + (L.at(q + 1) + L.at(q + 3)));
}

// ---- atomics (one host thread, so plain; noted for the race detector) -----------------
enum memory_order { memory_order_relaxed };
template <class T>
struct atomic {
  T v_;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
#define MSL_ATOM(AS)                                                                 \
  template <class T, class U>                                                        \
  MSL_NOSAN inline T atomic_fetch_add_explicit(AS atomic<T>* p, U x, memory_order) { \
    mslrt::note_atomic((const volatile void*)p, sizeof(T));                          \
    T o = p->v_;                                                                     \
    p->v_ = o + (T)x;                                                                \
    return o;                                                                        \
  }                                                                                  \
  template <class T, class U>                                                        \
  MSL_NOSAN inline T atomic_fetch_max_explicit(AS atomic<T>* p, U x, memory_order) { \
    mslrt::note_atomic((const volatile void*)p, sizeof(T));                          \
    T o = p->v_;                                                                     \
    p->v_ = o < (T)x ? (T)x : o;                                                     \
    return o;                                                                        \
  }                                                                                  \
  template <class T, class U>                                                        \
  MSL_NOSAN inline void atomic_store_explicit(AS atomic<T>* p, U x, memory_order) {  \
    mslrt::note_atomic((const volatile void*)p, sizeof(T));                          \
    p->v_ = (T)x;                                                                    \
  }                                                                                  \
  template <class T>                                                                 \
  MSL_NOSAN inline T atomic_load_explicit(const AS atomic<T>* p, memory_order) {     \
    mslrt::note_atomic((const volatile void*)p, sizeof(T));                          \
    return p->v_;                                                                    \
  }
MSL_ATOM(device)
#ifdef MSL_STRICT_AS
MSL_ATOM(threadgroup)
#endif
#undef MSL_ATOM

// ---- simdgroup_matrix 8x8: lane l owns (row, col) and (row, col+1); layout as used by
// MLX's steel/gemm/mma.h (get_coord), which is the layout of Apple GPUs. ----------------
MSL_INL ushort2 msl_coord(uint l) {
  uint q = l / 4;
  ushort2 c;
  c.y = (q & 4) + (l / 2) % 4;
  c.x = (q & 2) * 2 + (l % 2) * 2;
  return c;
}
template <class T, int R, int C>
struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "only 8x8");
  typedef vec<T, 2> storage_type;
  storage_type e_;
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T d) {
    ushort2 c = msl_coord(msl_lane());
    e_[0] = c.x == c.y ? d : T(0);
    e_[1] = c.x + 1 == c.y ? d : T(0);
  }
  storage_type& thread_elements() { return e_; }
  const storage_type& thread_elements() const { return e_; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;
template <class T, int R, int C>
MSL_INL simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T v) {
  simdgroup_matrix<T, R, C> m;
  m.e_[0] = v;
  m.e_[1] = v;
  return m;
}
#define MSL_MLD(AS)                                                               \
  template <class T, int R, int C>                                                \
  MSL_INL void simdgroup_load(thread simdgroup_matrix<T, R, C>& m, const AS T* p, \
                              ulong ld = C, ulong2 o = 0, bool tr = false,        \
                              int line = __builtin_LINE()) {                      \
    uint32_t k;                                                                   \
    int z = 0;                                                                    \
    mslrt::simd_exchange(OP_MLD, line, &z, sizeof z, &k);                         \
    if (k != ~0u)                                                                 \
      mslrt::fail("line %d: simdgroup_load with %08x active lanes", line, k);     \
    ushort2 c = msl_coord(msl_lane());                                            \
    for (int j = 0; j < 2; j++) {                                                 \
      ulong r = c.y, q = c.x + j;                                                 \
      m.e_[j] = tr ? p[(o.y + q) * ld + o.x + r] : p[(o.y + r) * ld + o.x + q];   \
    }                                                                             \
  }
#define MSL_MST(AS)                                                                \
  template <class T, int R, int C>                                                 \
  MSL_INL void simdgroup_store(simdgroup_matrix<T, R, C> m, AS T* p, ulong ld = C, \
                               ulong2 o = 0, bool tr = false,                      \
                               int line = __builtin_LINE()) {                      \
    uint32_t k;                                                                    \
    int z = 0;                                                                     \
    mslrt::simd_exchange(OP_MST, line, &z, sizeof z, &k);                          \
    if (k != ~0u)                                                                  \
      mslrt::fail("line %d: simdgroup_store with %08x active lanes", line, k);     \
    ushort2 c = msl_coord(msl_lane());                                             \
    for (int j = 0; j < 2; j++) {                                                  \
      ulong r = c.y, q = c.x + j;                                                  \
      (tr ? p[(o.y + q) * ld + o.x + r] : p[(o.y + r) * ld + o.x + q]) = m.e_[j];  \
    }                                                                              \
  }
MSL_MLD(device)
MSL_MST(device)
#ifdef MSL_STRICT_AS
    MSL_MLD(threadgroup) MSL_MST(threadgroup)
#endif
#undef MSL_MLD
#undef MSL_MST
        template <class D, class A, class B, class E>
        MSL_INL void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8>& d,
                                                   thread simdgroup_matrix<A, 8, 8>& a,
                                                   thread simdgroup_matrix<B, 8, 8>& b,
                                                   thread simdgroup_matrix<E, 8, 8>& c,
                                                   int line = __builtin_LINE()) {
  struct {
    float a[2], b[2];
  } mine = {{(float)a.e_[0], (float)a.e_[1]}, {(float)b.e_[0], (float)b.e_[1]}};
  uint32_t k;
  const unsigned char* t = mslrt::simd_exchange(OP_MMA, line, &mine, sizeof mine, &k);
  if (k != ~0u)
    mslrt::fail("line %d: simdgroup_multiply_accumulate with %08x active lanes", line, k);
  float A_[8][8], B_[8][8];
  for (uint l = 0; l < 32; l++) {
    ushort2 p = msl_coord(l);
    const float* f = (const float*)(t + 64 * l);
    for (int j = 0; j < 2; j++) {
      A_[p.y][p.x + j] = f[j];
      B_[p.y][p.x + j] = f[2 + j];
    }
  }
  ushort2 p = msl_coord(msl_lane());
  for (int j = 0; j < 2; j++) {
    float s = (float)c.e_[j];
    for (int i = 0; i < 8; i++) s += A_[p.y][i] * B_[i][p.x + j];
    d.e_[j] = (D)s;
  }
}
template <class D, class A, class B>
MSL_INL void simdgroup_multiply(thread simdgroup_matrix<D, 8, 8>& d,
                                thread simdgroup_matrix<A, 8, 8>& a,
                                thread simdgroup_matrix<B, 8, 8>& b,
                                int line = __builtin_LINE()) {
  auto z = make_filled_simdgroup_matrix<D, 8, 8>((D)0);
  simdgroup_multiply_accumulate(d, a, b, z, line);
}
}  // namespace metal

// ---- what MLX prepends to every custom kernel (mlx/backend/metal/kernels/utils.h)
// -------
namespace mlx_preamble_ns {}
using namespace metal;
template <class U>
struct Limits;
#define MSL_LIM(T, hi)                          \
  template <>                                   \
  struct Limits<T> {                            \
    static constexpr T max = (T)INFINITY;       \
    static constexpr T min = (T) - INFINITY;    \
    static constexpr T finite_max = (T)(hi);    \
    static constexpr T finite_min = (T) - (hi); \
  };
MSL_LIM(float, 3.402823466e38f)
MSL_LIM(half, 65504.f) MSL_LIM(bfloat, 3.38953139e38f)
#undef MSL_LIM
    template <class IdxT = int64_t>
    MSL_INL IdxT elem_to_loc(IdxT elem, constant const int* shape,
                             constant const int64_t* strides, int ndim) {
  IdxT loc = 0;
  for (int i = ndim - 1; i >= 0 && elem > 0; --i) {
    loc += (elem % shape[i]) * IdxT(strides[i]);
    elem /= shape[i];
  }
  return loc;
}
template <class T, class U>
MSL_INL T ceildiv(T n, U m) {
  return (n + m - 1) / m;
}
