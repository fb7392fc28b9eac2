// Runs kernels on the host. The threads of a block are fibers of one thread of the process: each runs until it waits for
// others, in an order that the policy chooses. Blocks run one after the other.
//
// With SPURGE_EMULATION_TSAN, ThreadSanitizer is told of fibers and barriers; this file itself is compiled without it.
// A barrier named in the environment, SPURGE_EMULATION_WITHOUT=FILE:LINE, does nothing: tests have to notice.
#include "emulation/cuda_runtime.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef SPURGE_EMULATION_TSAN
#include <sanitizer/tsan_interface.h>
#define SPURGE_TSAN(...) __VA_ARGS__
#else
#define SPURGE_TSAN(...)
#endif

#ifndef __x86_64__
#error "fibers are switched for x86-64 only"
#endif

// Keeps the stack pointer, behind the registers that a call preserves, in *from, and goes on where `to` was kept.
extern "C" void spurge_switch(void** from, void* to);
asm(R"(
.text
.globl spurge_switch
.hidden spurge_switch
.type spurge_switch,@function
spurge_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size spurge_switch,.-spurge_switch
)");

namespace spurge::emulation {

Policy policy;
cudaError_t last_error = cudaSuccess;

namespace {

constexpr int kMostThreads = 1024, kWarp = 32;
constexpr std::size_t kStack = 256 * 1024, kMostShared = 227 * 1024, kPage = 4096;

enum class State { ready, at_barrier, in_warp, done };

struct Fiber {
  void* sp = nullptr;
  char* stack = nullptr;
  State state = State::done;
  const char* file = nullptr;  // of what it waits for
  int line = 0, lanes = 0;     // lanes: 0 of a barrier, else what the lane's number is combined with
  unsigned mask = 0;
  std::uint64_t value = 0, found = 0;
  uint3 thread{};
  SPURGE_TSAN(void* tsan = nullptr;)
};

struct Memory {
  void* at;
  std::size_t bytes;
};

std::vector<Fiber> fibers;
std::vector<Memory> shared;
Fiber* running = nullptr;
Here place;
void* scheduler_sp = nullptr;
const std::function<void()>* body = nullptr;
const char* kernel_name = "";
std::string failure;
char* dynamic_end = nullptr;
std::size_t dynamic_bytes = 0, dynamic_allowed = 48 * 1024;
SPURGE_TSAN(void* scheduler_tsan; char start_tag, end_tag, block_tags[2], warp_tags[kMostThreads / kWarp][2];
            int block_meetings, warp_meetings[kMostThreads / kWarp];)

void fail(const std::string& what) {
  if (failure.empty()) failure = what;
}

std::string spot(const Fiber& f) {
  const std::string file = f.file ? f.file : "?";
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(f.line);
}

int index_of(const Fiber* f) { return static_cast<int>(f - fibers.data()); }

void to_scheduler() {
  SPURGE_TSAN(__tsan_switch_to_fiber(scheduler_tsan, __tsan_switch_to_fiber_no_sync);)
  spurge_switch(&running->sp, scheduler_sp);
}

void to_fiber(Fiber& f) {
  running = &f;
  place.thread = f.thread;
  SPURGE_TSAN(__tsan_switch_to_fiber(f.tsan, __tsan_switch_to_fiber_no_sync);)
  spurge_switch(&scheduler_sp, f.sp);
}

[[noreturn]] void fiber_main() {
  for (;;) {
    SPURGE_TSAN(__tsan_acquire(&start_tag);)
    (*body)();
    SPURGE_TSAN(__tsan_release(&end_tag);)
    running->state = State::done;
    to_scheduler();
  }
}

// Lets a fiber begin anew.
void prepare(Fiber& f) {
  auto** top = reinterpret_cast<void**>(f.stack + kStack - 64);
  *--top = nullptr;  // nobody to return to
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int k = 0; k < 6; ++k) *--top = nullptr;
  f.sp = top;
}

char* mapped(std::size_t bytes) {
  void* const at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) throw std::runtime_error("emulation: no memory for fibers");
  return static_cast<char*>(at);
}

void make_fibers(std::size_t n) {
  while (fibers.size() < n) {
    Fiber f;
    f.stack = mapped(kStack);
    SPURGE_TSAN(f.tsan = __tsan_create_fiber(0);)
    prepare(f);
    fibers.push_back(f);
  }
}

// Dynamic shared memory ends where a page begins that nobody may touch.
void make_dynamic(std::size_t bytes) {
  if (!dynamic_end) {
    const std::size_t size = (kMostShared + kPage - 1) / kPage * kPage;
    dynamic_end = mapped(size + kPage) + size;
    mprotect(dynamic_end, kPage, PROT_NONE);
  }
  dynamic_bytes = (bytes + 15) / 16 * 16;
}

void poison() {
  for (const Memory& m : shared) std::memset(m.at, policy.poison, m.bytes);
  std::memset(dynamic_end - dynamic_bytes, policy.poison, dynamic_bytes);
}

template <class T>
void arrange(std::vector<T>& items, std::mt19937_64& random) {
  if (policy.order == Order::backward) std::reverse(items.begin(), items.end());
  if (policy.order == Order::shuffled) std::shuffle(items.begin(), items.end(), random);
}

// Whether all lanes that a lane waits for are where it is.
bool complete(const Fiber& f, int first, int threads) {
  if (!(f.mask >> (index_of(&f) - first) & 1)) fail("a lane outside its own mask at " + spot(f));
  for (int k = 0; k < kWarp; ++k) {
    if (!(f.mask >> k & 1)) continue;
    if (first + k >= threads) {
      fail("a mask names lanes that the block has not, at " + spot(f));
      continue;
    }
    const Fiber& other = fibers[static_cast<std::size_t>(first + k)];
    if (other.state == State::done) fail("a lane has left that others wait for at " + spot(f));
    if (other.state != State::in_warp || other.mask != f.mask || spot(other) != spot(f)) return false;
  }
  return true;
}

// Lets those lanes go that wait for nobody any more; whether there are any.
bool release_warps(int threads) {
  bool some = false;
  for (int first = 0; first < threads; first += kWarp) {
    const int end = std::min(first + kWarp, threads);
    for (int t = first; t < end; ++t) {
      const Fiber f = fibers[static_cast<std::size_t>(t)];
      if (f.state != State::in_warp || !complete(fibers[static_cast<std::size_t>(t)], first, threads)) continue;
      for (int k = 0; k < kWarp && first + k < end; ++k) {
        if (!(f.mask >> k & 1)) continue;
        Fiber& lane = fibers[static_cast<std::size_t>(first + k)];
        const int from = k ^ lane.lanes;
        if (first + from >= end || !(f.mask >> from & 1)) fail("a lane reads one outside its mask at " + spot(lane));
        else lane.found = fibers[static_cast<std::size_t>(first + from)].value;
        lane.state = State::ready;
      }
      SPURGE_TSAN(++warp_meetings[first / kWarp];)
      some = true;
    }
  }
  return some;
}

// Lets all go who wait for the whole block.
bool release_block(int threads) {
  const Fiber& first = fibers[0];
  for (int t = 0; t < threads; ++t) {
    const Fiber& f = fibers[static_cast<std::size_t>(t)];
    if (f.state != State::at_barrier || spot(f) != spot(first)) {
      const Fiber& waiting = f.state == State::done ? first : f;
      fail("not all threads reach the same barrier: " + spot(first) + ", " + spot(waiting));
      return false;
    }
  }
  SPURGE_TSAN(++block_meetings;)
  for (int t = 0; t < threads; ++t) fibers[static_cast<std::size_t>(t)].state = State::ready;
  return true;
}

void run_block(int threads, std::mt19937_64& random) {
  poison();
  for (int t = 0; t < threads; ++t) {
    Fiber& f = fibers[static_cast<std::size_t>(t)];
    const unsigned i = static_cast<unsigned>(t), x = place.threads.x, y = place.threads.y;
    f.thread = {i % x, i / x % y, i / x / y};
    f.state = State::ready;
  }
  SPURGE_TSAN(__tsan_release(&start_tag);)
  std::vector<int> round;
  while (failure.empty()) {
    round.clear();
    bool waiting = false;
    for (int t = 0; t < threads; ++t) {
      const State state = fibers[static_cast<std::size_t>(t)].state;
      if (state == State::ready) round.push_back(t);
      waiting = waiting || state != State::done;
    }
    if (round.empty() && !waiting) break;
    if (round.empty() && !release_warps(threads) && !release_block(threads)) break;
    arrange(round, random);
    for (int t : round) {
      to_fiber(fibers[static_cast<std::size_t>(t)]);
      if (!failure.empty()) break;
    }
  }
  SPURGE_TSAN(__tsan_acquire(&end_tag);)
}

void wait(State state, unsigned mask, int lanes, const char* file, int line) {
  running->state = state;
  running->mask = mask;
  running->lanes = lanes;
  running->file = file;
  running->line = line;
  to_scheduler();
}

bool left_out(const char* file, int line) {
  static const char* const wanted = std::getenv("SPURGE_EMULATION_WITHOUT");
  if (!wanted || !*wanted) return false;
  const std::string here = std::string(file) + ":" + std::to_string(line), name = wanted;
  return here.size() >= name.size() && here.compare(here.size() - name.size(), name.size(), name) == 0;
}

bool fits(const dim3& blocks, const dim3& threads) {
  const std::uint64_t all = std::uint64_t(threads.x) * threads.y * threads.z;
  return all > 0 && all <= kMostThreads && threads.z <= 64 && blocks.x > 0 && blocks.x <= 0x7fffffffu && blocks.y > 0 &&
         blocks.y <= 65535 && blocks.z > 0 && blocks.z <= 65535;
}

}  // namespace

const Here& here() { return place; }

bool register_shared(void* memory, std::size_t bytes) {
  shared.push_back({memory, bytes});
  std::memset(memory, policy.poison, bytes);
  return true;
}

void* dynamic_shared() { return dynamic_end - dynamic_bytes; }
void allow_dynamic(int bytes) { dynamic_allowed = static_cast<std::size_t>(bytes); }

void block_barrier(const char* file, int line) {
  if (left_out(file, line)) return;
  SPURGE_TSAN(char* const tag = &block_tags[block_meetings & 1]; __tsan_release(tag);)
  wait(State::at_barrier, 0, 0, file, line);
  SPURGE_TSAN(__tsan_acquire(tag);)
}

void warp_barrier(unsigned mask, const char* file, int line) {
  if (left_out(file, line)) return;
  SPURGE_TSAN(const int warp = index_of(running) / kWarp; char* const tag = &warp_tags[warp][warp_meetings[warp] & 1];
              __tsan_release(tag);)
  wait(State::in_warp, mask, 0, file, line);
  SPURGE_TSAN(__tsan_acquire(tag);)
}

// A shuffle hands on values, and orders no memory.
std::uint64_t warp_xor(unsigned mask, std::uint64_t value, int lanes, const char* file, int line) {
  running->value = value;
  wait(State::in_warp, mask, lanes, file, line);
  return running->found;
}

void trap() {
  fail("trap");
  to_scheduler();
  std::abort();  // nobody comes back
}

void launch(const char* kernel, const Grid& grid, const std::function<void()>& thread) {
  if (!fits(grid.blocks, grid.threads) || grid.shared > std::min(dynamic_allowed, kMostShared)) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  const int threads = static_cast<int>(grid.threads.x * grid.threads.y * grid.threads.z);
  make_fibers(static_cast<std::size_t>(threads));
  make_dynamic(grid.shared);
  SPURGE_TSAN(scheduler_tsan = __tsan_get_current_fiber();)
  place.threads = grid.threads;
  place.blocks = grid.blocks;
  body = &thread;
  kernel_name = kernel;
  failure.clear();
  std::mt19937_64 random(policy.seed);
  std::vector<std::int64_t> order(std::size_t(grid.blocks.x) * grid.blocks.y * grid.blocks.z);
  std::iota(order.begin(), order.end(), std::int64_t{0});
  arrange(order, random);
  for (const std::int64_t id : order) {
    const std::int64_t x = grid.blocks.x, y = grid.blocks.y;
    place.block = {unsigned(id % x), unsigned(id / x % y), unsigned(id / x / y)};
    run_block(threads, random);
    if (failure.empty()) continue;
    for (Fiber& f : fibers) prepare(f);  // those that wait never go on
    throw std::runtime_error(std::string(kernel_name) + ": " + failure);
  }
}

}  // namespace spurge::emulation
