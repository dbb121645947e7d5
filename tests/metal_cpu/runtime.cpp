// CPU runtime for MSL kernels: one fiber per GPU thread, deterministic schedules,
// MSL barrier rules enforced, every memory access seen (via the hooks that
// -fsanitize=thread calls; ThreadSanitizer itself is not linked).
#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "msl_rt.h"

using namespace mslrt;
extern "C" char __executable_start;
static void* rel(void* pc) { return (void*)((char*)pc - &__executable_start); }
namespace {
constexpr size_t kStack = 128 << 10, kTgMax = 32768, kRed = 4096;
enum State { READY, AT_SIMD, AT_TG, DONE };
struct Fiber {
  void* sp;
  char* stack;
  State st;
  Ctx c;
  int op, line, flags;
  uint32_t n_simd = 0;        // simd rendezvous passed (parity selects the table)
  uint32_t e_tg[2] = {0, 0};  // barriers passed that order {device, threadgroup} memory
  uint32_t e_sg[2] = {0, 0};
};
struct Simd {
  unsigned char tab[2][32][64];
  uint32_t arrived = 0, exist = 0, mask[2] = {0, 0};
  int op = 0, line = 0;
};
struct Cell {  // shadow of one byte
  uint32_t wt = 0, we = 0, ws = 0,
           wg = 0;  // writer thread+1, its epochs, its threadgroup+1
  uint32_t rt = 0, re = 0, rs = 0, rg = 0;
  bool init = false, many = false, atom = false;
};
struct Buf {
  std::string name;
  bool out;
  char* p;
  size_t n;
  std::vector<Cell> sh;
  std::vector<uint32_t> tgseen;
  std::vector<bool> seen;
  uint64_t rd = 0, wr = 0, rd_ops = 0, uniq = 0, tguniq = 0;
};

std::vector<Fiber> F;
std::vector<Simd> S;
std::vector<Buf> B;
Fiber* cur = nullptr;
void* sched_sp;
uint32_t cur_tg = 0;
int fastulp = 0, strict = 1;
char* tgmem;
size_t tgused = 0, tgpeak = 0;
std::map<int, size_t> tgkeys;
std::vector<Cell> tgsh(kTgMax);
char* arena;
size_t arena_n = 0;
uint64_t rng = 88172645463325252ull, n_simd_ops = 0, n_barriers = 0, tg_rd = 0, tg_wr = 0;
void** bufptrs;
int race_count = 0;
uint64_t xs() {
  rng ^= rng << 13;
  rng ^= rng >> 7;
  rng ^= rng << 17;
  return rng;
}

#if defined(__x86_64__)
extern "C" void msl_switch(void** save, void* load);
asm(R"(.text
.globl msl_switch
msl_switch: pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
 movq %rsp,(%rdi); movq %rsi,%rsp
 popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret
)");
void* make_stack(char* base, void (*fn)()) {
  void** s = (void**)(base + kStack);
  *--s = nullptr;
  *--s = (void*)fn;
  for (int i = 0; i < 6; i++) *--s = nullptr;
  return s;
}
#elif defined(__aarch64__)
extern "C" void msl_switch(void** save, void* load);
asm(R"(.text
.globl msl_switch
msl_switch: sub sp,sp,#160
 stp x19,x20,[sp]; stp x21,x22,[sp,#16]; stp x23,x24,[sp,#32]; stp x25,x26,[sp,#48]; stp x27,x28,[sp,#64]; stp x29,x30,[sp,#80]
 stp d8,d9,[sp,#96]; stp d10,d11,[sp,#112]; stp d12,d13,[sp,#128]; stp d14,d15,[sp,#144]
 mov x9,sp; str x9,[x0]; mov sp,x1
 ldp x19,x20,[sp]; ldp x21,x22,[sp,#16]; ldp x23,x24,[sp,#32]; ldp x25,x26,[sp,#48]; ldp x27,x28,[sp,#64]; ldp x29,x30,[sp,#80]
 ldp d8,d9,[sp,#96]; ldp d10,d11,[sp,#112]; ldp d12,d13,[sp,#128]; ldp d14,d15,[sp,#144]
 add sp,sp,#160; ret
)");
void* make_stack(char* base, void (*fn)()) {
  char* s = base + kStack - 160;
  memset(s, 0, 160);
  ((void**)s)[11] = (void*)fn;
  return s;
}
#endif
void park(State st) {
  cur->st = st;
  msl_switch(&cur->sp, sched_sp);
}
void body() {
  msl_kernel_entry(bufptrs);
  park(DONE);
}
std::string who(uint32_t t1) {
  char b[96];
  uint32_t t = t1 - 1;
  snprintf(b, sizeof b, "thread %u (simdgroup %u lane %u)", t, t / 32, t % 32);
  return b;
}
}  // namespace

namespace mslrt {
void fail(const char* fmt, ...) {
  va_list ap;
  va_start(ap, fmt);
  printf("ERROR ");
  vprintf(fmt, ap);
  va_end(ap);
  if (cur)
    printf(" [threadgroup %u thread %u]", cur_tg, cur->c.thread_index_in_threadgroup);
  printf("\n");
  fflush(stdout);
  _exit(3);
}
const Ctx& ctx() { return cur->c; }
void* tg_alloc(int key, size_t n, size_t al) {
  auto it = tgkeys.find(key);
  if (it == tgkeys.end()) {
    size_t o = (tgused + al - 1) / al * al;
    if (o + n > kTgMax) fail("threadgroup memory %zu > 32768 bytes", o + n);
    tgused = o + n;
    tgpeak = std::max(tgpeak, tgused);
    it = tgkeys.emplace(key, o).first;
  }
  return tgmem + it->second;
}
const unsigned char* simd_exchange(int op, int line, const void* mine, size_t n,
                                   uint32_t* mask) {
  Simd& s = S[cur->c.simdgroup_index_in_threadgroup];
  uint32_t l = cur->c.thread_index_in_simdgroup, par = cur->n_simd & 1;
  if (n > 64) fail("simd payload");
  if (!s.arrived) {
    s.op = op;
    s.line = line;
  } else if (s.op != op || s.line != line)
    fail(
        "divergent simdgroup op: lane %u is at line %d (op %d), others at line %d (op "
        "%d)",
        l, line, op, s.line, s.op);
  memcpy(s.tab[par][l], mine, n);
  s.arrived |= 1u << l;
  cur->n_simd++;
  cur->op = op;
  cur->line = line;
  if (s.arrived == s.exist) {  // last lane: release all
    s.mask[par] = s.arrived;
    s.arrived = 0;
    n_simd_ops++;
    uint32_t g = cur->c.simdgroup_index_in_threadgroup;
    for (uint32_t i = 0; i < 32; i++)
      if (s.exist >> i & 1) F[g * 32 + i].st = READY;
  } else
    park(AT_SIMD);
  *mask = s.mask[par];
  return s.tab[par][0];
}
void simd_fence(int line, int fl) {
  uint32_t m;
  int z = fl;
  simd_exchange(99, line, &z, sizeof z, &m);
  if (fl & 1) cur->e_sg[0]++;
  if (fl & 2) cur->e_sg[1]++;
}
void tg_barrier(int line, int fl) {
  cur->line = line;
  cur->flags = fl;
  park(AT_TG);
  if (fl & 1) cur->e_tg[0]++;
  if (fl & 2) cur->e_tg[1]++;
}
float fast_noise(float x, float ulp) {
  if (!fastulp || !std::isfinite(x)) return x;
  double u = ((int64_t)(xs() >> 11) / (double)(1ull << 52) * 2 - 1) * ulp * fastulp;
  return (float)(x + u * std::ldexp(std::fabs((double)x), -23));
}
}  // namespace mslrt

// ---- memory hooks ------------------------------------------------------------------
static void note(bool ok, const char* kind, void* pc, const Buf* b, size_t off,
                 const Cell* c, bool wr, bool vs_read) {
  if (ok) return;
  printf("ERROR %s pc=%p %s+%zu by %s", kind, rel(pc),
         b ? b->name.c_str() : "threadgroup", off,
         who(cur->c.thread_index_in_threadgroup + 1).c_str());
  if (c)
    printf(" (%s) against %s of %s", wr ? "write" : "read", vs_read ? "read" : "write",
           who(vs_read ? c->rt : c->wt).c_str());
  printf(" threadgroup %u\n", cur_tg);
  fflush(stdout);
  if (++race_count >= 4) _exit(3);
}
static inline bool conflict(uint32_t t, uint32_t e, uint32_t s, uint32_t other_t,
                            uint32_t other_e, uint32_t other_s) {
  if (!other_t || other_t == t) return false;
  if (other_e != e) return false;  // a threadgroup_barrier between
  return (other_t - 1) / 32 != (t - 1) / 32 ||
         other_s == s;  // same simdgroup: needs simdgroup_barrier
}
static void access(void* a, size_t n, bool wr, void* pc, bool atom = false) {
  char* p = (char*)a;
  if (!cur) return;
  if ((size_t)(p - tgmem) < kTgMax) {
    size_t o = p - tgmem;
    if (wr)
      tg_wr += n;
    else
      tg_rd += n;
    if (o + n > tgused) {
      note(false, "out-of-bounds", pc, nullptr, o, nullptr, wr, false);
      _exit(3);
    }
    uint32_t t = cur->c.thread_index_in_threadgroup + 1, e = cur->e_tg[1],
             s = cur->e_sg[1];
    for (size_t i = o; i < o + n; i++) {
      Cell& c = tgsh[i];
      if (atom) {
        c.init = true;
        c.atom = true;
        continue;
      }
      if (wr) {
        note(!conflict(t, e, s, c.wt, c.we, c.ws), "race", pc, nullptr, i, &c, true,
             false);
        note(!(conflict(t, e, s, c.rt, c.re, c.rs) || (c.many && c.re == e && c.rs == s)),
             "race", pc, nullptr, i, &c, true, true);
        c.wt = t;
        c.we = e;
        c.ws = s;
        c.init = true;
        c.rt = 0;
        c.many = false;
      } else {
        note(c.init, "uninitialised-read", pc, nullptr, i, nullptr, false, false);
        note(!conflict(t, e, s, c.wt, c.we, c.ws), "race", pc, nullptr, i, &c, false,
             false);
        c.many = c.rt && c.rt != t && c.re == e && c.rs == s;
        c.rt = t;
        c.re = e;
        c.rs = s;
      }
      if (race_count) return;
    }
    return;
  }
  if ((size_t)(p - arena) >= arena_n) return;  // stack, globals, runtime
  for (auto& b : B) {
    if (p < b.p - kRed || p >= b.p + b.n + kRed) continue;
    if (p < b.p || p + n > b.p + b.n) {
      note(false, "out-of-bounds", pc, &b, p - b.p, nullptr, wr, false);
      _exit(3);
    }
    size_t o = p - b.p;
    if (n > 1 && !atom && ((uintptr_t)p & (n - 1)) && (n & (n - 1)) == 0)
      note(false, "misaligned", pc, &b, o, nullptr, wr, false);
    if (wr && !b.out) {
      note(false, "write-to-input", pc, &b, o, nullptr, wr, false);
      _exit(3);
    }
    if (wr)
      b.wr += n;
    else {
      b.rd += n;
      b.rd_ops++;
    }
    uint32_t t = cur->c.thread_index_in_threadgroup + 1, e = cur->e_tg[0],
             s = cur->e_sg[0], g = cur_tg + 1;
    for (size_t i = o; i < o + n; i++) {
      if (!b.seen[i]) {
        b.seen[i] = true;
        b.uniq++;
      }
      if (b.tgseen[i] != g) {
        b.tgseen[i] = g;
        b.tguniq++;
      }
      if (!b.out) continue;
      Cell& c = b.sh[i];
      if (atom) {
        c.init = true;
        c.atom = true;
        c.wg = 0;
        c.wt = 0;
        continue;
      }
      if (wr) {
        if (c.wt && c.wg != g)
          note(false, "race-between-threadgroups", pc, &b, i, &c, true, false);
        note(!(c.wg == g && conflict(t, e, s, c.wt, c.we, c.ws)), "race", pc, &b, i, &c,
             true, false);
        c.wt = t;
        c.we = e;
        c.ws = s;
        c.wg = g;
        c.init = true;
      } else {
        note(c.init, "uninitialised-read", pc, &b, i, nullptr, false, false);
        if (c.wt && c.wg != g)
          note(false, "race-between-threadgroups", pc, &b, i, &c, false, false);
        note(!(c.wg == g && conflict(t, e, s, c.wt, c.we, c.ws)), "race", pc, &b, i, &c,
             false, false);
      }
      if (race_count) return;
    }
    return;
  }
  printf("ERROR out-of-bounds pc=%p address between buffers\n", rel(pc));
  fflush(stdout);
  _exit(3);
}
namespace mslrt {
void note_atomic(const volatile void* p, size_t n) {
  access((void*)p, n, true, __builtin_return_address(0), true);
}
}  // namespace mslrt
#define PC __builtin_return_address(0)
extern "C" {
// libgcc before 13 lacks the float -> bfloat rounding helper. It returns 16 bits in the
// low half of a vector register, hence the float-typed twin (clang would turn a body
// written with __bf16 into a call of itself).
__attribute__((weak)) float msl_truncsfbf2(float f) __asm__("__truncsfbf2");
float msl_truncsfbf2(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  u = f != f ? 0x7fc0u : (u + 0x7fffu + (u >> 16 & 1)) >> 16;
  memcpy(&f, &u, 4);
  return f;
}
#define HK(n)                                                         \
  void __tsan_read##n(void* a) { access(a, n, false, PC); }           \
  void __tsan_write##n(void* a) { access(a, n, true, PC); }           \
  void __tsan_unaligned_read##n(void* a) { access(a, n, false, PC); } \
  void __tsan_unaligned_write##n(void* a) { access(a, n, true, PC); } \
  void __tsan_read_write##n(void* a) {                                \
    access(a, n, false, PC);                                          \
    access(a, n, true, PC);                                           \
  }                                                                   \
  void __tsan_unaligned_read_write##n(void* a) {                      \
    access(a, n, false, PC);                                          \
    access(a, n, true, PC);                                           \
  }                                                                   \
  void __tsan_volatile_read##n(void* a) { access(a, n, false, PC); }  \
  void __tsan_volatile_write##n(void* a) { access(a, n, true, PC); }
HK(1) HK(2) HK(4) HK(8) HK(16) void __tsan_read_range(void* a, size_t n) {
  access(a, n, false, PC);
}
void __tsan_write_range(void* a, size_t n) { access(a, n, true, PC); }
void* __tsan_memcpy(void* d, const void* s, size_t n) {
  access((void*)s, n, false, PC);
  access(d, n, true, PC);
  return memcpy(d, s, n);
}
void* __tsan_memmove(void* d, const void* s, size_t n) {
  access((void*)s, n, false, PC);
  access(d, n, true, PC);
  return memmove(d, s, n);
}
void* __tsan_memset(void* d, int v, size_t n) {
  access(d, n, true, PC);
  return memset(d, v, n);
}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}

static void on_signal(int sig, siginfo_t* si, void*) {
  printf("ERROR signal %d at address %p", sig, si->si_addr);
  if (cur)
    printf(" [threadgroup %u thread %u]", cur_tg, cur->c.thread_index_in_threadgroup);
  printf("\n");
  fflush(stdout);
  _exit(4);
}

// One threadgroup: run fibers in the order `sched` dictates until all are done.
static void run_group(uint32_t n, int sched) {
  std::vector<uint32_t> ord(n);
  for (uint32_t i = 0; i < n; i++) ord[i] = i;
  std::mt19937 g(sched * 7919 + cur_tg);
  for (;;) {
    if (sched == 1) std::reverse(ord.begin(), ord.end());
    if (sched > 1) std::shuffle(ord.begin(), ord.end(), g);
    bool any = false;
    for (uint32_t i : ord) {
      if (F[i].st != READY) continue;
      any = true;
      cur = &F[i];
      msl_switch(&sched_sp, cur->sp);
    }
    cur = nullptr;
    if (sched == 1) std::reverse(ord.begin(), ord.end());
    if (any) continue;
    uint32_t done = 0, sd = 0;
    int line = -1, fl = 0, other = -1;
    uint32_t a = 0;
    for (uint32_t i = 0; i < n; i++) {
      Fiber& f = F[i];
      done += f.st == DONE;
      sd += f.st == AT_SIMD;
      if (f.st == AT_TG) {
        a = i;
        if (line < 0) {
          line = f.line;
          fl = f.flags;
        } else if (line != f.line || fl != f.flags)
          other = f.line;
      }
      if (f.st == AT_SIMD) a = i;
    }
    if (done == n) return;
    if (sd) {  // some lanes wait for lanes that will not come
      Fiber& f = F[a];
      Simd& s = S[f.c.simdgroup_index_in_threadgroup];
      bool gone = true;  // the missing lanes have all returned
      for (uint32_t i = 0; i < 32; i++) {
        uint32_t j = f.c.simdgroup_index_in_threadgroup * 32 + i;
        if ((s.exist >> i & 1) && !(s.arrived >> i & 1) && F[j].st != DONE) gone = false;
      }
      cur = &f;
      if (strict || !gone)
        fail("simdgroup op at line %d reached by lanes %08x of %08x only", s.line,
             s.arrived, s.exist);
      s.exist = s.arrived;
      uint32_t par = (f.n_simd - 1) & 1;
      s.mask[par] = s.arrived;
      s.arrived = 0;
      for (uint32_t i = 0; i < 32; i++)
        if (s.exist >> i & 1) F[f.c.simdgroup_index_in_threadgroup * 32 + i].st = READY;
      cur = nullptr;
      continue;
    }
    cur = &F[a];
    if (other >= 0)
      fail("threads wait at different threadgroup_barriers (lines %d and %d)", line,
           other);
    if (done)
      fail("threadgroup_barrier at line %d: %u of %u threads have already returned", line,
           done, n);
    cur = nullptr;
    n_barriers++;
    for (uint32_t i = 0; i < n; i++) F[i].st = READY;
  }
}

int main(int argc, char** argv) {
  // argv: job file. Lines: grid x y z | group x y z | sched s | fastulp k | strict b |
  // buf name in|out|init path bytes offset
  U3 G{1, 1, 1}, T{1, 1, 1};
  int sched = 0;
  FILE* jf = fopen(argv[1], "r");
  char kw[64];
  struct In {
    std::string name, kind, path;
    size_t n, off;
  };
  std::vector<In> ins;
  while (fscanf(jf, "%63s", kw) == 1) {
    std::string k = kw;
    int z = 0;
    if (k == "grid")
      z = fscanf(jf, "%u %u %u", &G.x, &G.y, &G.z);
    else if (k == "group")
      z = fscanf(jf, "%u %u %u", &T.x, &T.y, &T.z);
    else if (k == "sched")
      z = fscanf(jf, "%d", &sched);
    else if (k == "fastulp")
      z = fscanf(jf, "%d", &fastulp);
    else if (k == "strict")
      z = fscanf(jf, "%d", &strict);
    else if (k == "buf") {
      char a[128], b[16], c[512];
      size_t n, o;
      z = fscanf(jf, "%127s %15s %511s %zu %zu", a, b, c, &n, &o);
      ins.push_back({a, b, c, n, o});
    }
    (void)z;
  }
  fclose(jf);
  struct sigaction sa;
  memset(&sa, 0, sizeof sa);
  sa.sa_sigaction = on_signal;
  sa.sa_flags = SA_SIGINFO | SA_ONSTACK;
  static char alt[64 << 10];
  stack_t ss{alt, 0, sizeof alt};
  sigaltstack(&ss, nullptr);
  for (int s : {SIGSEGV, SIGBUS, SIGILL, SIGFPE}) sigaction(s, &sa, nullptr);
  for (auto& i : ins) arena_n += (i.n + i.off + 3 * kRed + 16383) / 16384 * 16384 + 16384;
  arena_n += 16384;
  arena = (char*)mmap(nullptr, arena_n, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  tgmem = (char*)mmap(nullptr, kTgMax * 2, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  size_t at = 16384;
  std::vector<void*> ptrs;
  for (auto& i : ins) {
    Buf b;
    b.name = i.name;
    b.out = i.kind != "in";
    b.p = arena + at + i.off;
    b.n = i.n;
    memset(arena + at - kRed, 0xFF, i.n + i.off + 2 * kRed);
    if (i.kind != "out") {
      FILE* f = fopen(i.path.c_str(), "rb");
      size_t got = fread(b.p, 1, i.n, f);
      fclose(f);
      if (got != i.n) {
        printf("ERROR short buffer\n");
        return 5;
      }
    }
    if (b.out) {
      b.sh.resize(i.n);
      if (i.kind == "init")
        for (auto& c : b.sh) c.init = true;
    }
    b.tgseen.assign(i.n, 0);
    b.seen.assign(i.n, false);
    at += (i.n + i.off + 3 * kRed + 16383) / 16384 * 16384 + 16384;
    ptrs.push_back(b.p);
    B.push_back(std::move(b));
  }
  bufptrs = ptrs.data();
  T = {std::min(T.x, G.x), std::min(T.y, G.y),
       std::min(T.z, G.z)};  // as CustomKernel::eval_gpu
  U3 NG{(G.x + T.x - 1) / T.x, (G.y + T.y - 1) / T.y, (G.z + T.z - 1) / T.z};
  uint32_t maxn = T.x * T.y * T.z;
  if (maxn > 1024) {
    printf("ERROR threadgroup of %u threads > 1024\n", maxn);
    return 3;
  }
  char* stacks = (char*)mmap(nullptr, kStack * maxn, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  uint64_t ngrp = (uint64_t)NG.x * NG.y * NG.z;
  std::vector<uint64_t> group_order(ngrp);
  for (uint64_t i = 0; i < ngrp; i++) group_order[i] = i;
  if (sched == 1) std::reverse(group_order.begin(), group_order.end());
  if (sched > 1) {
    std::mt19937 g(sched);
    std::shuffle(group_order.begin(), group_order.end(), g);
  }
  for (uint64_t gi : group_order) {
    U3 g{(uint32_t)(gi % NG.x), (uint32_t)(gi / NG.x % NG.y),
         (uint32_t)(gi / NG.x / NG.y)};
    U3 t{std::min(T.x, G.x - g.x * T.x), std::min(T.y, G.y - g.y * T.y),
         std::min(T.z, G.z - g.z * T.z)};
    uint32_t n = t.x * t.y * t.z, ns = (n + 31) / 32;
    cur_tg = gi;
    F.assign(n, Fiber());
    S.assign(ns, Simd());
    memset(tgmem, 0xFF, kTgMax);
    tgkeys.clear();
    tgused = 0;
    std::fill(tgsh.begin(), tgsh.end(), Cell());
    for (uint32_t i = 0; i < n; i++) {
      Fiber& f = F[i];
      Ctx& c = f.c;
      f.stack = stacks + kStack * i;
      f.sp = make_stack(f.stack, body);
      f.st = READY;
      U3 l{i % t.x, i / t.x % t.y, i / t.x / t.y};
      c.thread_position_in_threadgroup = l;
      c.threadgroup_position_in_grid = g;
      c.threadgroups_per_grid = NG;
      c.thread_position_in_grid = {g.x * T.x + l.x, g.y * T.y + l.y, g.z * T.z + l.z};
      c.threads_per_grid = c.grid_size = G;
      c.grid_origin = {0, 0, 0};
      c.threads_per_threadgroup = t;
      c.dispatch_threads_per_threadgroup = T;
      c.thread_index_in_threadgroup = i;
      c.simdgroup_index_in_threadgroup = i / 32;
      c.thread_index_in_simdgroup = i % 32;
      c.simdgroups_per_threadgroup = ns;
      c.dispatch_simdgroups_per_threadgroup = (maxn + 31) / 32;
      c.threads_per_simdgroup = c.thread_execution_width = 32;
      c.thread_index_in_quadgroup = i % 4;
      c.quadgroup_index_in_threadgroup = i / 4;
      c.quadgroups_per_threadgroup = (n + 3) / 4;
      c.dispatch_quadgroups_per_threadgroup = (maxn + 3) / 4;
      S[i / 32].exist |= 1u << (i % 32);
    }
    run_group(n, sched);
    if (race_count) break;
  }
  if (race_count) return 3;
  for (size_t i = 0; i < B.size(); i++)
    if (B[i].out) {
      FILE* f = fopen(ins[i].path.c_str(), "wb");
      fwrite(B[i].p, 1, B[i].n, f);
      fclose(f);
    }
  printf(
      "STAT {\"threadgroups\": %lu, \"threads_per_threadgroup\": %u, "
      "\"threadgroup_memory\": %zu, \"simd_ops\": %lu, \"barriers\": %lu, \"tg_read\": "
      "%lu, \"tg_write\": %lu, \"buffers\": {",
      ngrp, maxn, tgpeak, n_simd_ops, n_barriers, tg_rd, tg_wr);
  for (size_t i = 0; i < B.size(); i++) {
    uint64_t un = 0;
    if (B[i].out)
      for (auto& c : B[i].sh) un += !c.init;
    printf(
        "%s\"%s\": {\"bytes\": %zu, \"read\": %lu, \"loads\": %lu, \"write\": %lu, "
        "\"touched\": %lu, \"touched_per_threadgroup\": %lu, \"never_written\": %lu}",
        i ? ", " : "", B[i].name.c_str(), B[i].n, B[i].rd, B[i].rd_ops, B[i].wr,
        B[i].uniq, B[i].tguniq, un);
  }
  printf("}}\n");
  return 0;
}
