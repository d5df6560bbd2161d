// Stand-ins for what a kernel that TileLang generates for sm_80 or sm_90 calls, so that it runs on a CPU (__init__.py).
//
// A thread of a block is a fiber that runs until it waits for others; of those that can run, the first in a fixed order
// runs next, so a warp gets as far ahead of the others as barriers let it. What is asynchronous on a GPU happens either
// at once or as late as it may: a copy when its thread waits for it, a product when its warp does. Until then a late
// one's target holds POISON, which is no valid number in any type. Products and the instructions of a whole warp are
// performed when the last of its lanes comes. Layouts are those of the PTX manual, "Asynchronous Warpgroup Level Matrix
// Multiply-Accumulate Instructions", "Warp-level matrix load/store instructions" and "Matrix multiply-accumulate
// operation using mma instruction".
#pragma once

#include <csetjmp>
#include <csignal>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <type_traits>
#include <utility>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static __attribute__((section("emulated_shared")))

// ---------------------------------------------------------------------------------------------------- numbers

struct HalfFormat {
  using Bits = uint16_t;
  static float widen(uint16_t bits) {
    uint32_t magnitude = uint32_t(bits & 0x7fff) << 13, sign = uint32_t(bits & 0x8000) << 16;
    float value;
    std::memcpy(&value, &magnitude, 4);
    value *= 0x1p112f;  // of the exponents' biases
    std::memcpy(&magnitude, &value, 4);
    if ((bits & 0x7c00) == 0x7c00) magnitude |= 0x7f800000;
    magnitude |= sign;
    std::memcpy(&value, &magnitude, 4);
    return value;
  }
  static uint16_t narrow(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return 0x7fff;
    if (magnitude >= 0x477ff000) return sign | 0x7c00;
    if (magnitude < 0x38800000) {  // below the smallest normal one: a multiple of 2^-24
      float scaled;
      std::memcpy(&scaled, &magnitude, 4);
      return sign | uint16_t(std::nearbyint(scaled * 0x1p24f));
    }
    return sign | uint16_t((magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13);
  }
};

struct BFloatFormat {
  using Bits = uint16_t;
  static float widen(uint16_t bits) {
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
  static uint16_t narrow(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
};

struct TensorFloatFormat {  // of a product's operands, which cut off what is left of an fp32 number
  using Bits = uint32_t;
  static float widen(uint32_t bits) {
    float value;
    bits &= ~0x1fffu;
    std::memcpy(&value, &bits, 4);
    return value;
  }
};

template <class Format> struct Sixteen {  // computes as a float
  uint16_t bits;
  Sixteen() = default;
  template <class Number, class = std::enable_if_t<std::is_arithmetic_v<Number>>>
  Sixteen(Number value) : bits(Format::narrow(float(value))) {}
  operator float() const { return Format::widen(bits); }
};

using half_t = Sixteen<HalfFormat>;
using bfloat16_t = Sixteen<BFloatFormat>;
using tfloat32_t = float;
using uchar = unsigned char;

struct uint1 { unsigned x; };
struct alignas(8) uint2 { unsigned x, y; };
struct uint3 { unsigned x, y, z; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(4) half2 { half_t x, y; };
struct alignas(4) __nv_bfloat162 { bfloat16_t x, y; };

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline half2 __float22half2_rn(float2 v) { return {v.x, v.y}; }
inline float2 __half22float2(half2 v) { return {v.x, v.y}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {v.x, v.y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }
template <class Format> unsigned __pack_half2(Sixteen<Format> low, Sixteen<Format> high) {
  return unsigned(high.bits) << 16 | low.bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

template <class A, class B> std::common_type_t<A, B> min(A a, B b) {
  if constexpr (std::is_floating_point_v<std::common_type_t<A, B>>) return std::fmin(a, b);
  else return a < b ? a : b;
}
template <class A, class B> std::common_type_t<A, B> max(A a, B b) {
  if constexpr (std::is_floating_point_v<std::common_type_t<A, B>>) return std::fmax(a, b);
  else return a < b ? b : a;
}
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
// instructions that stand in the source as assembly, by their names
inline float ex2_approx_ftz_f32(float x) {
  float y = std::exp2(x);
  return std::fpclassify(y) == FP_SUBNORMAL ? 0 : y;
}
inline unsigned cvt_rna_tf32_f32(float x) { return (__float_as_uint(x) + 0x1000) & ~0x1fffu; }

// ---------------------------------------------------------------------------------------------------- fibers

uint3 threadIdx, blockIdx, blockDim, gridDim;
unsigned char* buf_dyn_shmem;  // dynamic shared memory, up to a page that cannot be touched
extern "C" {
extern unsigned char __start_emulated_shared[] __attribute__((weak, visibility("hidden")));
extern unsigned char __stop_emulated_shared[] __attribute__((weak, visibility("hidden")));
const void* emulated_fault;  // the address that a launch which failed must not have touched
}

namespace emulated {

constexpr int WARP = 32, STACK_BYTES = 1 << 16, MAX_SHARED_BYTES = 227 << 10, BARRIERS = 16, SLOT_BYTES = 32;
constexpr uint16_t POISON = 0x7fff;  // NaN in fp16, bf16 and, twice, in fp32; twice an index far out of any tensor

struct Copy {
  void* target;
  const void* source;
  int bytes, taken;  // the rest: zeros
};

struct Product {
  void (*perform)(Product&, int warp);
  uint64_t a, b;              // descriptors
  const uint32_t* a_of[WARP];  // or registers of a lane
  float* sums_of[WARP];
  std::vector<float> before;  // the sums of all lanes; empty: they are in the registers
  bool adds;
};

struct Fiber {
  ucontext_t context;
  jmp_buf at;
  bool started, done;
  const unsigned* gate;  // it can run once this is another number than the one it saw
  unsigned seen;
  unsigned meetings;
  std::vector<Copy> copies;
  size_t copied;
  std::vector<size_t> groups;  // copies there were at each commit
  size_t products;             // that it started
  std::vector<size_t> batches;
};

struct Gate {
  int arrived, expected;
  unsigned opened;
  bool any, result;
};

struct Warp {
  Gate gate;
  alignas(16) unsigned char slots[2][WARP][SLOT_BYTES];  // what its lanes show each other
  std::deque<Product> products;
  size_t performed;
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
Gate barriers[BARRIERS];
std::vector<unsigned char> fenced;  // shared memory at the last fence of the async proxy
bool late;
int shared_bytes, self;
jmp_buf scheduler;
sigjmp_buf failure;
char message[400];
void (*body)(void**);
void** arguments;

[[noreturn]] inline void fail(const char* format, ...) {
  int length = std::snprintf(message, sizeof message, "block %u %u %u, thread %d: ", blockIdx.x, blockIdx.y,
                             blockIdx.z, self);
  va_list values;
  va_start(values, format);
  std::vsnprintf(message + length, sizeof message - length, format, values);
  va_end(values);
  siglongjmp(failure, 1);
}

inline Fiber& fiber() { return fibers[self]; }
inline Warp& warp() { return warps[self / WARP]; }
inline int lane() { return self % WARP; }

inline void poison(void* target, size_t bytes) {
  for (size_t i = 0; i + 1 < bytes; i += 2) std::memcpy((char*)target + i, &POISON, 2);
}

__attribute__((noinline)) inline void leave() {
  if (!_setjmp(fiber().at)) _longjmp(scheduler, 1);
}

template <class Action> void arrive(Gate& gate, int expected, Action last) {
  if (gate.arrived && gate.expected != expected) fail("one barrier with %d and %d threads", gate.expected, expected);
  gate.expected = expected;
  if (++gate.arrived == expected) {
    gate.arrived = 0;
    last();
    ++gate.opened;
  }
}

template <class Action> void meet(Gate& gate, int expected, Action last) {
  fiber().gate = &gate.opened;
  fiber().seen = gate.opened;
  arrive(gate, expected, last);
  leave();
}

inline bool barrier(int number, int expected, bool value = false) {
  Gate& gate = barriers[number];
  gate.any |= value;
  meet(gate, expected, [&] {
    gate.result = gate.any;
    gate.any = false;
  });
  return gate.result;
}

template <class T> struct Lanes {
  const unsigned char (*slots)[SLOT_BYTES];
  T operator[](int lane) const {
    T value;
    std::memcpy(&value, slots[lane], sizeof value);
    return value;
  }
};

// What each lane of the warp brings; `last` runs once, when all have come. Two sets of slots: a lane that is ahead is
// at most one meeting ahead.
template <class T, class Action> Lanes<T> together(T mine, Action last) {
  static_assert(sizeof(T) <= SLOT_BYTES);
  auto& slots = warp().slots[fiber().meetings++ & 1];
  std::memcpy(slots[lane()], &mine, sizeof mine);
  meet(warp().gate, WARP, [&] { last(Lanes<T>{slots}); });
  return {slots};
}

template <class T> T shuffle(unsigned mask, T value, int from) {
  if (mask != ~0u) fail("a shuffle of some lanes is not emulated");
  return together(value, [](auto) {})[from];
}

// ---------------------------------------------------------------------------------------------------- launching

inline void enter() {
  body(arguments);
  fiber().done = true;
  _longjmp(scheduler, 1);
}

__attribute__((noinline)) inline void resume(int thread) {
  self = thread;
  threadIdx = {unsigned(thread), 0, 0};
  if (_setjmp(scheduler)) return;
  if (fiber().started) _longjmp(fiber().at, 1);
  fiber().started = true;
  setcontext(&fiber().context);
}

inline void run_block(const std::vector<int>& order, unsigned char* stacks) {
  int threads = int(order.size());
  poison(buf_dyn_shmem, shared_bytes);
  poison(__start_emulated_shared, __stop_emulated_shared - __start_emulated_shared);
  poison(stacks, size_t(threads) * STACK_BYTES);
  fenced.assign(buf_dyn_shmem, buf_dyn_shmem + shared_bytes);
  fibers.clear();
  fibers.resize(threads);
  warps.clear();
  warps.resize(threads / WARP);
  std::memset(barriers, 0, sizeof barriers);
  const unsigned open = 1;
  for (int thread = 0; thread < threads; ++thread) {
    ucontext_t& context = fibers[thread].context;
    fibers[thread].gate = &open;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks + size_t(thread) * STACK_BYTES;
    context.uc_stack.ss_size = STACK_BYTES;
    makecontext(&context, enter, 0);
  }
  for (int left = threads; left;) {
    int next = -1;
    for (int thread : order) {
      Fiber& one = fibers[thread];
      if (!one.done && *one.gate != one.seen) {
        next = thread;
        break;
      }
    }
    if (next < 0) fail("%d threads wait for others that do not come", left);
    resume(next);
    left -= fibers[next].done;
    uint16_t word;
    std::memcpy(&word, stacks + size_t(next) * STACK_BYTES, 2);
    if (word != POISON) fail("its stack is full");
  }
}

inline void on_fault(int, siginfo_t* info, void*) {
  emulated_fault = info->si_addr;
  siglongjmp(failure, 2);
}

// In which order threads, and blocks, run: forward, backward, or threads scattered.
inline std::vector<int> order_of(int count, int kind) {
  std::vector<int> order;
  for (int i = 0; i < count; ++i) order.push_back(kind == 0 ? i : kind == 1 ? count - 1 - i : i * 37 % count);
  return order;
}

// Null, or what went wrong.
inline const char* launch(
    void (*kernel)(void**), void** values, const int* grid, int threads, int bytes, int is_late, int order) {
  body = kernel;
  arguments = values;
  late = is_late;
  shared_bytes = (bytes + 1023) / 1024 * 1024;
  emulated_fault = nullptr;
  blockDim = {unsigned(threads), 1, 1};
  gridDim = {unsigned(grid[0]), unsigned(grid[1]), unsigned(grid[2])};
  if (threads % WARP || shared_bytes > MAX_SHARED_BYTES) return "no such block";

  const size_t page = 1 << 16, stacks_bytes = size_t(threads) * STACK_BYTES;
  const size_t room = (shared_bytes + page - 1) / page * page, size = stacks_bytes + room + 2 * page;
  auto* memory = (unsigned char*)mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return "no memory";
  mprotect(memory + stacks_bytes + room, page, PROT_NONE);
  buf_dyn_shmem = memory + stacks_bytes + room - shared_bytes;

  struct sigaction action = {}, segv, bus;
  stack_t alternate = {}, stack_before;  // the one a fault is handled on
  alternate.ss_sp = memory + stacks_bytes + room + page;
  alternate.ss_size = page;
  sigaltstack(&alternate, &stack_before);
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &segv);
  sigaction(SIGBUS, &action, &bus);

  const char* found = nullptr;
  const int blocks = grid[0] * grid[1] * grid[2];
  const std::vector<int> threads_order = order_of(threads, order), blocks_order = order_of(blocks, order == 1);
  if (int code = sigsetjmp(failure, 1)) {
    if (code == 2) std::snprintf(message, sizeof message, "block %u %u %u, thread %d: memory that is in no tensor",
                                 blockIdx.x, blockIdx.y, blockIdx.z, self);
    found = message;
  } else {
    for (int block : blocks_order) {
      blockIdx = {unsigned(block % grid[0]), unsigned(block / grid[0] % grid[1]), unsigned(block / grid[0] / grid[1])};
      run_block(threads_order, memory);
    }
  }
  sigaction(SIGSEGV, &segv, nullptr);
  sigaction(SIGBUS, &bus, nullptr);
  sigaltstack(&stack_before, nullptr);
  munmap(memory, size);
  return found;
}

template <class... P, size_t... I>
void call(void (*kernel)(P...), void** values, std::index_sequence<I...>) {
  kernel(*(std::remove_reference_t<P>*)values[I]...);
}
template <class... P> void call(void (*kernel)(P...), void** values) {
  call(kernel, values, std::index_sequence_for<P...>());
}

}  // namespace emulated

// `values`: the address of each argument.
#define EMULATE(kernel)                                                                                             \
  extern "C" const char* emulated_launch(                                                                           \
      void** values, const int* grid, int threads, int shared_bytes, int late, int order) {                         \
    return emulated::launch(                                                                                        \
        [](void** each) { emulated::call(kernel, each); }, values, grid, threads, shared_bytes, late, order);       \
  }

inline void __syncthreads() { emulated::barrier(0, blockDim.x); }
inline int __syncthreads_or(int value) { return emulated::barrier(0, blockDim.x, value != 0); }
inline void __syncwarp(unsigned = ~0u) { emulated::together(0, [](auto) {}); }

template <class T> T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  int base = emulated::lane() / width * width;
  return emulated::shuffle(mask, value, base + from % width);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  int from = emulated::lane() ^ bits;
  return emulated::shuffle(mask, value, from / width == emulated::lane() / width ? from : emulated::lane());
}
template <class T> T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32) {
  int from = emulated::lane() - delta;
  return emulated::shuffle(mask, value, from < emulated::lane() / width * width ? emulated::lane() : from);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, int delta, int width = 32) {
  int from = emulated::lane() + delta;
  return emulated::shuffle(mask, value, from >= (emulated::lane() / width + 1) * width ? emulated::lane() : from);
}

namespace tl {

inline void __sync_thread_partial(int number, int threads) { emulated::barrier(number, threads); }
inline void __named_barrier_arrive(int number, int threads) {
  emulated::arrive(emulated::barriers[number], threads, [] {});
}
template <int REGISTERS> void warpgroup_reg_alloc() {}
template <int REGISTERS> void warpgroup_reg_dealloc() {}

// ---------------------------------------------------------------------------------------------------- copies

inline void cp_async(void* target, const void* source, int bytes, int taken) {
  using namespace emulated;
  if ((uintptr_t(target) | uintptr_t(source)) % bytes) fail("a copy of %d bytes that is not aligned", bytes);
  fiber().copies.push_back({target, source, bytes, taken});
  if (late) poison(target, bytes);
}
inline void cp_async_perform(size_t count) {
  using namespace emulated;
  for (size_t& i = fiber().copied; i < count; ++i) {
    const Copy& copy = fiber().copies[i];
    std::memcpy(copy.target, copy.source, copy.taken);
    std::memset((char*)copy.target + copy.taken, 0, copy.bytes - copy.taken);
  }
}
template <int BYTES> void cp_async_gs_conditional(const void* target, const void* source, bool condition) {
  cp_async((void*)target, source, BYTES, condition ? BYTES : 0);
  if (!emulated::late) cp_async_perform(emulated::fiber().copies.size());
}
template <int BYTES> void cp_async_gs(const void* target, const void* source) {
  cp_async_gs_conditional<BYTES>(target, source, true);
}
inline void cp_async_commit() { emulated::fiber().groups.push_back(emulated::fiber().copies.size()); }
template <int PENDING> void cp_async_wait() {
  emulated::Fiber& fiber = emulated::fiber();
  size_t groups = fiber.groups.size();
  if (PENDING == 0) cp_async_perform(fiber.copies.size());  // wait_all: not only those of a group
  else if (groups > PENDING) cp_async_perform(fiber.groups[groups - 1 - PENDING]);
}

// ---------------------------------------------------------------------------------------------------- small matrices

// Matrix i of 8 x 8: lane 8 i + r has the address of its row r, lane 4 r + j elements 2 j and 2 j + 1 of row r (of
// column r if transposed) in register i.
struct Matrices {
  void* row;
  uint32_t* registers;
};
template <int COUNT, bool TRANSPOSED, class Element>
void each_element(emulated::Lanes<Matrices> lanes, Element element) {
  for (int i = 0; i < COUNT; ++i)
    for (int r = 0; r < 8; ++r)
      for (int c = 0; c < 8; ++c) {
        auto* in_memory = (uint16_t*)lanes[8 * i + (TRANSPOSED ? c : r)].row + (TRANSPOSED ? r : c);
        element(in_memory, (uint16_t*)(lanes[4 * r + c / 2].registers + i) + c % 2);
      }
}
template <int COUNT, bool TRANSPOSED> void load_matrices(const void* row, void* registers) {
  emulated::together(Matrices{(void*)row, (uint32_t*)registers}, [](auto lanes) {
    each_element<COUNT, TRANSPOSED>(
        lanes, [](uint16_t* in_memory, uint16_t* in_register) { *in_register = *in_memory; });
  });
}
template <bool TRANSPOSED, class... Register> void store_matrices(const void* row, Register... registers) {
  uint32_t held[] = {uint32_t(registers)...};
  emulated::together(Matrices{(void*)row, held}, [](auto lanes) {
    each_element<sizeof...(Register), TRANSPOSED>(
        lanes, [](uint16_t* in_memory, uint16_t* in_register) { *in_memory = *in_register; });
  });
}
inline void ptx_ldmatrix_x1(const void* row, void* to) { load_matrices<1, false>(row, to); }
inline void ptx_ldmatrix_x2(const void* row, void* to) { load_matrices<2, false>(row, to); }
inline void ptx_ldmatrix_x4(const void* row, void* to) { load_matrices<4, false>(row, to); }
inline void ptx_ldmatrix_x1_trans(const void* row, void* to) { load_matrices<1, true>(row, to); }
inline void ptx_ldmatrix_x2_trans(const void* row, void* to) { load_matrices<2, true>(row, to); }
inline void ptx_ldmatrix_x4_trans(const void* row, void* to) { load_matrices<4, true>(row, to); }
inline void ptx_stmatrix_m8n8_x1(const void* row, int a) { store_matrices<false>(row, a); }
inline void ptx_stmatrix_m8n8_x2(const void* row, int a, int b) { store_matrices<false>(row, a, b); }
inline void ptx_stmatrix_m8n8_x4(const void* row, int a, int b, int c, int d) {
  store_matrices<false>(row, a, b, c, d);
}
inline void ptx_stmatrix_m8n8_x1_trans(const void* row, int a) { store_matrices<true>(row, a); }
inline void ptx_stmatrix_m8n8_x2_trans(const void* row, int a, int b) { store_matrices<true>(row, a, b); }
inline void ptx_stmatrix_m8n8_x4_trans(const void* row, int a, int b, int c, int d) {
  store_matrices<true>(row, a, b, c, d);
}

// ---------------------------------------------------------------------------------------------------- products

enum class DataType { kFloat16, kBFloat16, kTensorFloat32, kFloat32 };

// Bits 0-13, 16-29 and 32-45: the address, the leading and the stride offset, in units of 16 bytes; 62-63: the swizzle.
struct GmmaDescriptor {
  uint64_t bits = 0;
  operator uint64_t() const { return bits; }
  GmmaDescriptor operator+(int units) const { return {(bits & ~0xffffffffull) | uint32_t(uint32_t(bits) + units)}; }
};
template <int SWIZZLE, int LEADING, int STRIDE, class T>
void initialize_wgmma_descriptor(GmmaDescriptor& descriptor, T* start) {
  uint64_t offset = (unsigned char*)start - buf_dyn_shmem;
  if (offset >= uint64_t(emulated::shared_bytes) || offset % 16) emulated::fail("no operand of a product lies there");
  descriptor.bits = offset >> 4 | uint64_t(LEADING) << 16 | uint64_t(STRIDE) << 32 | uint64_t(SWIZZLE) << 62;
}
template <class T> void increase_descriptor_offset(GmmaDescriptor& descriptor, T bytes) {
  descriptor = descriptor + int(bytes >> 4);
}

inline void fence_proxy_async() { emulated::fenced.assign(buf_dyn_shmem, buf_dyn_shmem + emulated::shared_bytes); }
inline void warpgroup_arrive() {}
template <class T> void warpgroup_fence_operand(T*, int) {}

// Element (row, k) of an operand: K lies behind one another, or if `transposed` the rows (M or N) do.
template <class Bits> Bits operand_bits(uint64_t descriptor, bool transposed, int row, int k) {
  unsigned address = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
  unsigned stride = (descriptor >> 32 & 0x3fff) << 4, swizzle = descriptor >> 62, width = 256 >> swizzle;
  if (!swizzle) emulated::fail("an operand without a swizzle is not emulated");
  if (transposed) address += row * 2 / width * leading + row * 2 % width + k / 8 * stride + k % 8 * width;
  else address += row / 8 * stride + row % 8 * width + k * sizeof(Bits);
  address ^= address >> 3 & (width - 16);
  if (address >= unsigned(emulated::shared_bytes)) emulated::fail("a product reads past the end of shared memory");
  Bits bits, bits_fenced;
  std::memcpy(&bits, buf_dyn_shmem + address, sizeof bits);
  std::memcpy(&bits_fenced, &emulated::fenced[address], sizeof bits);
  if (bits != bits_fenced)
    emulated::fail("a product reads byte %u of shared memory, written after the last fence of the async proxy",
                   address);
  return bits;
}

// A warp's sixteen rows of M = 64. Lane 4 g + j has rows g and g + 8: of the sums columns 8 n + 2 j and the next, of A
// in registers columns 2 j, 2 j + 1, 2 j + 8 and 2 j + 9.
template <class Format, int N, bool IN_REGISTERS, bool TRANSPOSED_A, bool TRANSPOSED_B, int SIGN>
void multiply(emulated::Product& product, int warp) {
  using Bits = typename Format::Bits;
  constexpr int K = 32 / sizeof(Bits), ROWS = 16;
  static_assert(sizeof(Bits) == 2 || !(IN_REGISTERS || TRANSPOSED_A || TRANSPOSED_B));
  static float a[ROWS][K], b[K][N], sums[ROWS][N];
  auto sum_of = [&](int row, int n) -> float& {
    int lane = row % 8 * 4 + n % 8 / 2, i = n / 8 * 4 + row / 8 * 2 + n % 2;
    return product.sums_of[lane][i];
  };
  for (int row = 0; row < ROWS; ++row)
    for (int k = 0; k < K; ++k) {
      Bits bits;
      if constexpr (IN_REGISTERS)
        bits = ((const uint16_t*)product.a_of[row % 8 * 4 + k % 8 / 2])[(k / 8 * 2 + row / 8) * 2 + k % 2];
      else bits = operand_bits<Bits>(product.a, TRANSPOSED_A, warp % 4 * ROWS + row, k);
      a[row][k] = SIGN * Format::widen(bits);
    }
  for (int k = 0; k < K; ++k)
    for (int n = 0; n < N; ++n) b[k][n] = Format::widen(operand_bits<Bits>(product.b, TRANSPOSED_B, n, k));
  if (!product.before.empty())
    for (int lane = 0; lane < emulated::WARP; ++lane)
      std::memcpy(product.sums_of[lane], &product.before[lane * N / 2], N / 2 * sizeof(float));
  for (int row = 0; row < ROWS; ++row) {
    for (int n = 0; n < N; ++n) sums[row][n] = product.adds ? sum_of(row, n) : 0;
    for (int k = 0; k < K; ++k)
      for (int n = 0; n < N; ++n) sums[row][n] += a[row][k] * b[k][n];
    for (int n = 0; n < N; ++n) sum_of(row, n) = sums[row][n];
  }
}

inline void perform_products(size_t count) {
  emulated::Warp& warp = emulated::warp();
  for (size_t& i = warp.performed; i < count; ++i) {
    emulated::Product& product = warp.products[i];
    product.perform(product, emulated::self / emulated::WARP);
    product.before = {};
  }
}

inline void start_product(
    void (*perform)(emulated::Product&, int), uint64_t a, uint64_t b, const uint32_t* in_registers, float* sums, int n,
    bool adds) {
  using namespace emulated;
  std::deque<Product>& products = warp().products;
  const size_t index = fiber().products++;
  if (index == products.size()) products.push_back({perform, a, b, {}, {}, {}, adds});
  Product& product = products[index];
  if (product.perform != perform || product.a != a || product.b != b || product.adds != adds)
    fail("the lanes of a warp start different products");
  product.a_of[lane()] = in_registers;
  product.sums_of[lane()] = sums;
  if (!late) {
    together(0, [&](auto) { perform_products(index + 1); });
    return;
  }
  for (size_t i = warp().performed; i < index; ++i)
    if (products[i].sums_of[lane()] == sums) return;  // the sums are those of a product under way
  product.before.resize(WARP * n / 2);
  std::memcpy(&product.before[lane() * n / 2], sums, n / 2 * sizeof(float));
  poison(sums, n / 2 * sizeof(float));
}

template <DataType A>
using format_of = std::conditional_t<
    A == DataType::kFloat16, HalfFormat,
    std::conditional_t<A == DataType::kBFloat16, BFloatFormat, TensorFloatFormat>>;
template <DataType A, DataType B, DataType C, int M, int K>
constexpr bool is_product = A == B && A != DataType::kFloat32 && C == DataType::kFloat32 && M == 64 &&
                            K * sizeof(typename format_of<A>::Bits) == 32;

template <DataType A, DataType B, DataType C, int M, int N, int K, bool TA, bool TB, int SA, int SB>
void wgmma_ss(uint64_t a, uint64_t b, uint32_t* sums, bool adds) {
  static_assert(is_product<A, B, C, M, K>);
  start_product(multiply<format_of<A>, N, false, TA, TB, SA * SB>, a, b, nullptr, (float*)sums, N, adds);
}
template <DataType A, DataType B, DataType C, int M, int N, int K, bool TA, bool TB, int SA, int SB>
void wgmma_rs(const uint32_t* a, uint64_t b, uint32_t* sums, bool adds) {
  static_assert(is_product<A, B, C, M, K> && !TA);
  start_product(multiply<format_of<A>, N, true, false, TB, SA * SB>, 0, b, a, (float*)sums, N, adds);
}
inline void warpgroup_commit_batch() { emulated::fiber().batches.push_back(emulated::fiber().products); }
template <int PENDING> void wait_wgmma() {
  const std::vector<size_t>& batches = emulated::fiber().batches;
  const size_t count = batches.size() > PENDING ? batches[batches.size() - 1 - PENDING] : 0;
  emulated::together(0, [&](auto) { perform_products(count); });
}
template <int PENDING> void warpgroup_wait() { wait_wgmma<PENDING>(); }

// A warp's product of 16 rows and 8 columns, all operands in registers. Lane 4 g + j has in each of A's registers, of
// four bytes, row g or (the odd ones) g + 8, and of B's column g: elements of K from PER j on, PER of them in a
// register, in A's upper two and B's second one those of the upper half of K; of the sums it has what wgmma's have.
template <class Format> void multiply_fragments(float* sums[], const unsigned* a[], const unsigned* b[]) {
  using Bits = typename Format::Bits;
  constexpr int PER = 4 / sizeof(Bits), HALF = 4 * PER;
  auto element = [](const unsigned* const* held, int lane_row, int k, int number) {
    Bits bits;
    std::memcpy(&bits, (const Bits*)(held[lane_row * 4 + k % HALF / PER] + number) + k % PER, sizeof bits);
    return Format::widen(bits);
  };
  for (int row = 0; row < 16; ++row)
    for (int n = 0; n < 8; ++n) {
      float& sum = sums[row % 8 * 4 + n / 2][row / 8 * 2 + n % 2];
      for (int k = 0; k < 2 * HALF; ++k)
        sum += element(a, row % 8, k, row / 8 + k / HALF * 2) * element(b, n, k, k / HALF);
    }
}
struct Fragments {
  float* sums;
  const unsigned *a, *b;
};
template <DataType A, DataType B, DataType C, int M, int N, int K, bool TA, bool TB>
void mma_sync(float* sums, const unsigned* a, const unsigned* b) {
  static_assert(is_product<A, B, C, 4 * M, K> && N == 8 && !TA && TB);
  emulated::together(Fragments{sums, a, b}, [](auto lanes) {
    float* all_sums[emulated::WARP];
    const unsigned *all_a[emulated::WARP], *all_b[emulated::WARP];
    for (int lane = 0; lane < emulated::WARP; ++lane) {
      const Fragments each = lanes[lane];
      all_sums[lane] = each.sums, all_a[lane] = each.a, all_b[lane] = each.b;
    }
    multiply_fragments<format_of<A>>(all_sums, all_a, all_b);
  });
}

// ---------------------------------------------------------------------------------------------------- reductions

inline float fast_rcp(float x) { return 1 / x; }
template <class T> T shfl_sync(unsigned mask, T value, int from) { return __shfl_sync(mask, value, from); }
template <class T> T shfl_xor_sync(unsigned mask, T value, int bits) { return __shfl_xor_sync(mask, value, bits); }
template <class T> T shfl_up_sync(unsigned mask, T value, int delta) { return __shfl_up_sync(mask, value, delta); }
template <class T> T shfl_down_sync(unsigned mask, T value, int delta) { return __shfl_down_sync(mask, value, delta); }

struct SumOp {
  template <class T> T operator()(T a, T b) { return a + b; }
};
struct MaxOp {
  template <class T> T operator()(T a, T b) { return max(a, b); }
};
struct MinOp {
  template <class T> T operator()(T a, T b) { return min(a, b); }
};
struct SyncThreadsBarrier {
  template <int NUMBER> static void sync() { __syncthreads(); }
};
template <int THREADS> struct NamedBarrier {
  template <int NUMBER> static void sync() { emulated::barrier(NUMBER, THREADS); }
};

// Of `THREADS / SCALE` threads that are `SCALE` apart.
template <class Operation, int THREADS, int SCALE, int FIRST = 0, class Barrier = SyncThreadsBarrier> struct AllReduce {
  template <class T> static T run(T value, T* room = nullptr) {
    for (int distance = THREADS / 2; distance >= SCALE; distance /= 2) {
      T other;
      if (distance >= emulated::WARP) {
        Barrier::template sync<1>();
        room[emulated::self - FIRST] = value;
        Barrier::template sync<2>();
        other = room[(emulated::self - FIRST) ^ distance];
      } else {
        other = shfl_xor_sync(~0u, value, distance);
      }
      value = Operation()(value, other);
    }
    return value;
  }
};

}  // namespace tl
