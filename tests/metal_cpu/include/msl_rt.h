// Runtime interface between MSL text compiled for the CPU and the fiber scheduler.
#pragma once
#include <cstddef>
#include <cstdint>

namespace mslrt {
struct U3 {
  uint32_t x, y, z;
};
// Everything a kernel may ask for through a [[attribute]] argument.
struct Ctx {
  U3 thread_position_in_grid, thread_position_in_threadgroup,
      threadgroup_position_in_grid, threadgroups_per_grid, threads_per_grid,
      threads_per_threadgroup, dispatch_threads_per_threadgroup, grid_origin, grid_size;
  uint32_t thread_index_in_threadgroup, simdgroup_index_in_threadgroup,
      thread_index_in_simdgroup, simdgroups_per_threadgroup,
      dispatch_simdgroups_per_threadgroup, threads_per_simdgroup, thread_execution_width,
      thread_index_in_quadgroup, quadgroup_index_in_threadgroup,
      quadgroups_per_threadgroup, dispatch_quadgroups_per_threadgroup;
};
const Ctx& ctx();
void* tg_alloc(int key, size_t bytes, size_t align);  // `threadgroup T x[N];`
// Rendezvous of the 32 lanes of one simdgroup. `mine` (<=64 bytes) is published,
// the returned table holds what each lane published (stride 64), `mask` the lanes
// that took part. A lane that arrives with another op or line is an error.
const unsigned char* simd_exchange(int op, int line, const void* mine, size_t n,
                                   uint32_t* mask);
void simd_fence(int line, int flags);  // simdgroup_barrier
void tg_barrier(int line, int flags);  // threadgroup_barrier
void note_atomic(const volatile void* p, size_t n);
float fast_noise(float x, float ulp);  // models fast:: error
[[noreturn]] void fail(const char* fmt, ...);
}  // namespace mslrt

// Emitted by the generated translation unit.
extern "C" void msl_kernel_entry(void** buffers);
