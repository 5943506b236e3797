// Runs CUDA kernels on the CPU: what csrc/cuda/device.cuh includes when a C++ compiler reads it instead of nvcc.
//
// Every thread of a block is a fiber of the launching OS thread. A fiber runs until it waits in a barrier or a warp
// collective, so between two of these the threads run one after the other, in the order that the test asks for; the
// blocks of a grid likewise. What CUDA leaves undefined is an error with its file, line, block and thread, thrown from
// the launch, or it shows in the result: shared memory begins as NaN, and asynchronous copies arrive at their wait.
// -fsanitize=address sees every shared array as an allocation of its own size; race_check.cpp sees every access.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_UCONTEXT
#endif
#if defined(SIMT_UCONTEXT)
#include <ucontext.h>
#endif

// The race check watches kernels, not the emulator.
#define SIMT_UNWATCHED __attribute__((no_sanitize_thread))

namespace simt {

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxShared = 48 * 1024;  // static and dynamic together, as without opting in to more
constexpr size_t kStack = 64 * 1024;
constexpr size_t kGuard = 4096;

enum class Order { forward, reverse, random };

struct Stream {};

struct Dim3 {
  unsigned x, y, z;
  constexpr Dim3(unsigned x_size = 1, unsigned y_size = 1, unsigned z_size = 1) : x(x_size), y(y_size), z(z_size) {}
  constexpr size_t count() const { return size_t{x} * y * z; }
  constexpr Dim3 index(size_t number) const {
    return {static_cast<unsigned>(number % x), static_cast<unsigned>(number / x % y),
            static_cast<unsigned>(number / x / y)};
  }
};

// A place in a kernel; as a default argument, that of the call.
struct Location {
  const char* file;
  int line;
  static constexpr Location here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  bool operator==(const Location& other) const {
    return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
  }
  std::string text() const { return std::string(file) + ":" + std::to_string(line); }
};

struct KernelName {
  std::string name;
  Location launched;
  KernelName(const char* kernel, Location at = Location::here()) : name(kernel), launched(at) {
    // METAFAST_LAUNCH wants parentheses around the name of a template with commas.
    if (name.front() == '(' && name.back() == ')') name = name.substr(1, name.size() - 2);
  }
};

// Listens to what a kernel does. There is one in the build with the race check, none in the others.
class Observer {
 public:
  enum class Access { read, write, atomic };
  virtual void launch_begins() = 0;
  virtual void block_begins() = 0;
  virtual void block_barrier() = 0;
  virtual void warp_barrier(unsigned warp, unsigned lanes) = 0;
  virtual void new_shared(const void* address, size_t bytes) = 0;
  virtual void access(Access kind, const void* address, size_t bytes, const void* code) = 0;
  virtual void copy_begins(const void* to, const void* from, size_t bytes, const void* code) = 0;
  virtual void copy_ends(const void* to, const void* from, size_t bytes, const void* code) = 0;
  // What stopped the fiber, asked for on the launching thread's own stack.
  virtual std::string error() = 0;

 protected:
  ~Observer() = default;
};
inline Observer* observer = nullptr;

class Random {  // SplitMix64
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  SIMT_UNWATCHED uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  template <class Number>
  SIMT_UNWATCHED void shuffle(Number* numbers, size_t count) {
    for (size_t k = count; k > 1; --k) {
      const size_t other = next() % k;
      const Number swapped = numbers[k - 1];
      numbers[k - 1] = numbers[other];
      numbers[other] = swapped;
    }
  }

 private:
  uint64_t state_;
};

struct AsyncCopy {
  void* to;
  const void* from;
  size_t bytes;
  const void* code;  // behind the instruction that issued it
  Location at;
};

// One CUDA thread.
struct Fiber {
  unsigned number, lane, warp;  // within the block, within the warp, of the warp
  Dim3 index;
  Location waits;
  std::vector<AsyncCopy> copies;    // issued and not yet waited for,
  std::vector<size_t> copy_groups;  // of which those committed: copies per group
  char* stack = nullptr;
  void* fake_stack = nullptr;  // of the address sanitizer
#if defined(SIMT_UCONTEXT)
  ucontext_t context;
#else
  void* stack_pointer;
#endif
};

// Where the lanes of one mask meet. Slots alternate, since slow lanes still read when fast ones have moved on.
struct Collective {
  unsigned mask;
  Collective* next;  // of the same warp
  bool barrier = false;
  unsigned arrived = 0;
  unsigned round = 0;
  Location at{"", 0};
  unsigned took_part[2] = {0, 0};
  uint64_t values[2][kWarp];
};

struct Warp {
  unsigned running;  // lanes that exist and have not returned
  Collective* collectives;
};

struct SharedArray {
  const void* key;
  void* address;
  size_t bytes;
  size_t block;  // the last that used it
};

class Machine;
inline thread_local Machine* machine __attribute__((tls_model("initial-exec"))) = nullptr;

#if !defined(SIMT_UCONTEXT)
// Saves the registers that a call must preserve on the stack that is left, and takes them from the other.
__attribute__((naked, noinline, no_profile_instrument_function)) inline void switch_stack(void** /*left*/,
                                                                                          void* /*entered*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif

// Runs one launch at a time and keeps the stacks for the next.
class Machine {
 public:
  static Machine& shared() {
    static Machine only;
    return only;
  }
  Machine(const Machine&) = delete;
  ~Machine() {
    for (Fiber& fiber : fibers_) {
      if (fiber.stack) free_stack(fiber.stack);
    }
  }

  void configure(Order order, uint64_t seed) {
    const std::lock_guard<std::mutex> lock(mutex_);
    order_ = order;
    random_ = Random(seed);
    most_dynamic_ = 0;
  }

  // Dynamic shared memory, in bytes, of the launch since then that had most.
  size_t most_dynamic_shared() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return most_dynamic_;
  }

  uint64_t launches() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return launches_;
  }

  // ---- what a kernel calls, on the stack of its fiber

  // While one lives, the emulator's code runs and not the kernel's.
  class Pause {
   public:
    SIMT_UNWATCHED explicit Pause(Machine& machine) : machine_(machine), watched_(machine.watched) {
      machine.watched = false;
    }
    SIMT_UNWATCHED ~Pause() { machine_.watched = watched_; }

   private:
    Machine& machine_;
    bool watched_;
  };

  // Abandons the fiber; the launch throws.
  [[noreturn, gnu::format(printf, 3, 4)]] SIMT_UNWATCHED void fail(Location at, const char* format, ...) {
    watched = false;
    int length = std::snprintf(error_, sizeof error_, "simt: %s:%d: ", at.file, at.line);
    va_list arguments;
    va_start(arguments, format);
    length += std::vsnprintf(error_ + length, sizeof error_ - static_cast<size_t>(length), format, arguments);
    va_end(arguments);
    failed_ = true;
    leave(true);
    std::abort();
  }

  // Abandons the fiber; the launch throws what the observer says.
  [[noreturn]] SIMT_UNWATCHED void fail_observed() {
    watched = false;
    failed_ = true;
    error_[0] = '\0';
    leave(true);
    std::abort();
  }

  // Returns in how many threads the predicate holds.
  __attribute__((noinline)) SIMT_UNWATCHED unsigned meet_block(bool predicate, Location at) {
    const Pause pause(*this);
    Fiber& fiber = *this->fiber;
    if (running_ != threads_) fail(at, "__syncthreads when %u thread(s) have returned", threads_ - running_);
    if (barrier_arrived_ > 0 && !(barrier_at_ == at)) {
      fail(at, "divergent __syncthreads: other threads of the block wait at %s:%d", barrier_at_.file, barrier_at_.line);
    }
    fiber.waits = barrier_at_ = at;
    barrier_arriving_ += predicate;
    states_[fiber.number] = State::at_barrier;
    if (++barrier_arrived_ < running_) {
      leave(false);
      return barrier_count_;
    }
    barrier_count_ = barrier_arriving_;
    barrier_arriving_ = barrier_arrived_ = 0;
    for (unsigned k = 0; k < threads_; ++k) states_[k] = State::ready;
    if (observer) observer->block_barrier();
    return barrier_count_;
  }

  struct Meeting {
    unsigned lanes;
    const uint64_t* values;  // by lane
  };

  // Waits for the lanes of the mask that have not returned, and gives what each brought. A barrier orders memory too.
  __attribute__((noinline)) SIMT_UNWATCHED Meeting meet_warp(const char* name, unsigned mask, uint64_t value,
                                                             bool barrier, Location at) {
    const Pause pause(*this);
    Fiber& fiber = *this->fiber;
    if (!(mask >> fiber.lane & 1)) fail(at, "%s: lane %u is not in its own mask 0x%08x", name, fiber.lane, mask);
    Collective& collective = collective_of(fiber.warp, mask);
    if (collective.arrived && !(collective.at == at)) {
      fail(at, "%s: other lanes of the warp are in a different collective at %s:%d", name, collective.at.file,
           collective.at.line);
    }
    const unsigned slot = collective.round % 2;
    collective.values[slot][fiber.lane] = value;
    collective.barrier = barrier;
    fiber.waits = collective.at = at;
    states_[fiber.number] = State::at_collective;
    collective.arrived |= 1u << fiber.lane;
    finish_if_all_arrived(fiber.warp, collective);
    if (states_[fiber.number] != State::ready) leave(false);
    return {collective.took_part[slot], collective.values[slot]};
  }

  __attribute__((noinline)) SIMT_UNWATCHED void* shared_array(const void* key, size_t bytes, Location at) {
    const Pause pause(*this);
    SharedArray* array = nullptr;
    for (SharedArray& known : shared_) {
      if (known.key == key) array = &known;
    }
    if (!array) {
      shared_.push_back({key, allocate_shared(bytes), bytes, 0});
      array = &shared_.back();
    }
    if (array->block != blocks_run_) {
      array->block = blocks_run_;
      static_bytes_ += bytes;
      if (static_bytes_ + dynamic_bytes_ > kMaxShared) {
        fail(at, "%zu bytes of static and %zu of dynamic shared memory, at most %zu are there", static_bytes_,
             dynamic_bytes_, kMaxShared);
      }
      clear_shared(array->address, bytes);
    }
    return array->address;
  }

  SIMT_UNWATCHED void* dynamic_shared() const { return dynamic_; }

  __attribute__((noinline)) SIMT_UNWATCHED void copy_async(void* to, const void* from, size_t bytes, const void* code,
                                                           Location at) {
    const Pause pause(*this);
    if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes) {
      fail(at, "asynchronous copy from %p to %p: both must be multiples of its %zu bytes", from, to, bytes);
    }
    if (observer) observer->copy_begins(to, from, bytes, code);
    fiber->copies.push_back({to, from, bytes, code, at});
  }

  SIMT_UNWATCHED void commit_async() {
    const Pause pause(*this);
    size_t uncommitted = fiber->copies.size();
    for (size_t group : fiber->copy_groups) uncommitted -= group;
    fiber->copy_groups.push_back(uncommitted);
  }

  __attribute__((noinline)) SIMT_UNWATCHED void wait_async(size_t groups) {
    const Pause pause(*this);
    auto& pending = fiber->copy_groups;
    if (pending.size() <= groups) return;
    const auto last = pending.end() - static_cast<std::ptrdiff_t>(groups);
    const size_t arriving = std::accumulate(pending.begin(), last, size_t{0});
    pending.erase(pending.begin(), last);
    for (size_t k = 0; k < arriving; ++k) {
      const AsyncCopy& copy = fiber->copies[k];
      std::memcpy(copy.to, copy.from, copy.bytes);
      if (observer) observer->copy_ends(copy.to, copy.from, copy.bytes, copy.code);
    }
    fiber->copies.erase(fiber->copies.begin(), fiber->copies.begin() + static_cast<std::ptrdiff_t>(arriving));
  }

  // ---- what a launch calls, on the stack of the OS thread

  void run(const KernelName& kernel, Dim3 grid, Dim3 block, size_t shared_bytes, void (*body)(void*), void* argument) {
    if (machine) throw std::runtime_error("simt: a launch from inside a kernel");
    const std::lock_guard<std::mutex> lock(mutex_);
    check_launch(kernel, grid, block, shared_bytes);
    const Running running(*this);
    ++launches_;
    kernel_ = kernel.name;
    grid_dim = grid;
    block_dim = block;
    threads_ = static_cast<unsigned>(block.count());
    body_ = body;
    body_argument_ = argument;
    dynamic_bytes_ = shared_bytes;
    most_dynamic_ = std::max(most_dynamic_, shared_bytes);
    if (shared_bytes) dynamic_ = allocate_shared(shared_bytes);
    for (Warp& warp : warps_) warp.collectives = nullptr;
    for (unsigned k = 0; k < threads_; ++k) {
      if (!fibers_[k].stack) fibers_[k].stack = new_stack();
    }
    if (observer) observer->launch_begins();

    std::vector<size_t> blocks(grid.count());
    put_in_order(blocks.data(), blocks.size());
    put_in_order(turns_, threads_);
    for (size_t number : blocks) run_block(number);
  }

  // What the macros below stand for.
  Dim3 grid_dim, block_dim, block_index;
  Fiber* fiber = nullptr;
  bool watched = false;  // does the kernel's own code run, which the race check is to see?
  unsigned threads() const { return threads_; }
  size_t block_number() const { return block_number_; }

 private:
  enum class State : uint8_t { ready, at_barrier, at_collective, returned };

  Machine() = default;

  // Leaves nothing behind, whichever way the launch ends.
  class Running {
   public:
    explicit Running(Machine& owner) : owner_(owner) { machine = &owner; }
    ~Running() {
      machine = nullptr;
      for (const SharedArray& array : owner_.shared_) std::free(array.address);
      owner_.shared_.clear();
      std::free(owner_.dynamic_);
      owner_.dynamic_ = nullptr;
      owner_.collectives_.clear();
      if (owner_.failed_) {
        for (unsigned k = 0; k < owner_.threads_; ++k) unpoison(owner_.fibers_[k].stack);
      }
      owner_.failed_ = false;
    }

   private:
    Machine& owner_;
  };

  // ---- stacks

  static char* new_stack() {
    void* memory = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    // Too large a frame crashes here instead of writing into another thread's.
    mprotect(memory, kGuard, PROT_NONE);
    return static_cast<char*>(memory) + kGuard;
  }

  static void free_stack(char* stack) {
    unpoison(stack);
    munmap(stack - kGuard, kGuard + kStack);
  }

  // The red zones of frames that were never left would be found by the next user of these addresses.
  static void unpoison([[maybe_unused]] char* stack) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack, kStack);
#endif
  }

  // Back to the launching thread's stack, for good if `last`.
  SIMT_UNWATCHED void leave([[maybe_unused]] bool last) {
    [[maybe_unused]] Fiber& left = *fiber;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(last ? nullptr : &left.fake_stack, host_stack_, host_stack_bytes_);
#endif
#if defined(SIMT_UCONTEXT)
    swapcontext(&left.context, &host_context_);
#else
    switch_stack(&left.stack_pointer, host_stack_pointer_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(left.fake_stack, &host_stack_, &host_stack_bytes_);
#endif
  }

  SIMT_UNWATCHED void enter(Fiber& entered) {
    fiber = &entered;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&host_fake_stack_, entered.stack, kStack);
#endif
#if defined(SIMT_UCONTEXT)
    swapcontext(&host_context_, &entered.context);
#else
    switch_stack(&host_stack_pointer_, entered.stack_pointer);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(host_fake_stack_, nullptr, nullptr);
#endif
  }

  SIMT_UNWATCHED static void fiber_main() {
    Machine& self = *machine;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &self.host_stack_, &self.host_stack_bytes_);
#endif
    self.watched = true;
    self.body_(self.body_argument_);
    self.watched = false;
    self.finish_fiber();
    self.leave(true);
    std::abort();
  }

  SIMT_UNWATCHED void start_fiber(Fiber& fiber, unsigned number) {
    states_[number] = State::ready;
    fiber.number = number;
    fiber.lane = number % kWarp;
    fiber.warp = number / kWarp;
    fiber.index = block_dim.index(number);
    fiber.copies.clear();
    fiber.copy_groups.clear();
    fiber.fake_stack = nullptr;
#if defined(SIMT_UCONTEXT)
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &fiber_main, 0);
#else
    // Tops at different offsets in their pages, or the caches could hold only a few of them.
    const size_t offset = number % 32 * 128;
    // What switch_stack pops: six registers and an address to return to, which the ABI wants 8 past a multiple of 16.
    void** top = reinterpret_cast<void**>(fiber.stack + kStack - 16 - offset);
    top[0] = nullptr;
    top[-1] = nullptr;
    top[-2] = reinterpret_cast<void*>(&fiber_main);
    for (int saved = 3; saved <= 8; ++saved) top[-saved] = nullptr;
    fiber.stack_pointer = top - 8;
#endif
  }

  SIMT_UNWATCHED void finish_fiber() {
    Fiber& fiber = *this->fiber;
    if (!fiber.copies.empty()) fail(fiber.copies[0].at, "the thread returned without waiting for its copy");
    if (barrier_arrived_ > 0) fail(barrier_at_, "__syncthreads where others wait, but this thread has returned");
    states_[fiber.number] = State::returned;
    --running_;
    Warp& warp = warps_[fiber.warp];
    warp.running &= ~(1u << fiber.lane);
    for (Collective* c = warp.collectives; c; c = c->next) finish_if_all_arrived(fiber.warp, *c);
  }

  // ---- collectives

  SIMT_UNWATCHED Collective& collective_of(unsigned warp, unsigned mask) {
    for (Collective* c = warps_[warp].collectives; c; c = c->next) {
      if (c->mask == mask) return *c;
    }
    collectives_.emplace_back();
    Collective& made = collectives_.back();
    made.mask = mask;
    made.next = warps_[warp].collectives;
    warps_[warp].collectives = &made;
    return made;
  }

  SIMT_UNWATCHED void finish_if_all_arrived(unsigned warp, Collective& collective) {
    const unsigned lanes = collective.arrived;
    if (lanes == 0 || lanes != (collective.mask & warps_[warp].running)) return;
    collective.took_part[collective.round++ % 2] = lanes;
    collective.arrived = 0;
    if (collective.barrier && observer) observer->warp_barrier(warp, lanes);
    for (unsigned rest = lanes; rest; rest &= rest - 1) {
      states_[warp * kWarp + static_cast<unsigned>(__builtin_ctz(rest))] = State::ready;
    }
  }

  // ---- shared memory

  // Of the exact size, so that a sanitizer's red zone begins right behind.
  static void* allocate_shared(size_t bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, bytes)) throw std::bad_alloc();
    return memory;
  }

  SIMT_UNWATCHED void clear_shared(void* memory, size_t bytes) {
    std::memset(memory, 0xFF, bytes);
    if (observer) observer->new_shared(memory, bytes);
  }

  // ---- blocks and launches

  static void check_launch(const KernelName& kernel, Dim3 grid, Dim3 block, size_t shared_bytes) {
    const auto text = [](Dim3 size) {
      return "(" + std::to_string(size.x) + ", " + std::to_string(size.y) + ", " + std::to_string(size.z) + ")";
    };
    const std::string what = "simt: " + kernel.launched.text() + ": launch of " + kernel.name;
    if (!grid.count() || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
      throw std::runtime_error(what + ": a grid of " + text(grid) + " blocks");
    if (!block.count() || block.x > kMaxThreads || block.y > kMaxThreads || block.z > 64 || block.count() > kMaxThreads)
      throw std::runtime_error(what + ": blocks of " + text(block) + " threads");
    if (shared_bytes > kMaxShared)
      throw std::runtime_error(what + ": " + std::to_string(shared_bytes) + " bytes of dynamic shared memory");
  }

  template <class Number>
  void put_in_order(Number* numbers, size_t count) {
    std::iota(numbers, numbers + count, Number{0});
    if (order_ == Order::reverse) std::reverse(numbers, numbers + count);
    if (order_ == Order::random) random_.shuffle(numbers, count);
  }

  SIMT_UNWATCHED void run_block(size_t number) {
    block_number_ = number;
    block_index = grid_dim.index(number);
    ++blocks_run_;
    running_ = threads_;
    barrier_arrived_ = barrier_arriving_ = 0;
    static_bytes_ = 0;
    if (observer) observer->block_begins();
    if (dynamic_) clear_shared(dynamic_, dynamic_bytes_);
    for (unsigned k = 0; k < threads_; ++k) {
      start_fiber(fibers_[k], k);
      warps_[k / kWarp].running = (2u << k % kWarp) - 1;
    }
    while (running_ > 0) run_ready_fibers();
  }

  SIMT_UNWATCHED void run_ready_fibers() {
    bool any_ready = false;
    if (order_ == Order::random) {
      random_.shuffle(turns_, threads_);
      any_ready = run_turns(0, threads_);
    } else {
      // Each warp as far as it gets, since the stacks of a whole block do not fit in the nearest cache.
      for (unsigned first = 0, last = 0; first < threads_; first = last) {
        while (last < threads_ && turns_[last] / kWarp == turns_[first] / kWarp) ++last;
        while (run_turns(first, last)) any_ready = true;
      }
    }
    if (!any_ready) throw_deadlock();
  }

  // In random order some stay behind, however often the others pass them.
  SIMT_UNWATCHED bool run_turns(unsigned first, unsigned last) {
    bool any_ready = false;
    for (unsigned turn = first; turn < last; ++turn) {
      const unsigned k = turns_[turn];
      if (states_[k] != State::ready) continue;
      any_ready = true;
      if (order_ == Order::random && random_.next() % 4 == 0) continue;
      enter(fibers_[k]);
      if (failed_) throw std::runtime_error((error_[0] ? error_ : observer->error()) + who(*fiber));
    }
    return any_ready;
  }

  std::string who(const Fiber& fiber) const {
    char text[160];
    std::snprintf(text, sizeof text, ", block (%u, %u, %u), thread (%u, %u, %u)", block_index.x, block_index.y,
                  block_index.z, fiber.index.x, fiber.index.y, fiber.index.z);
    return " [" + kernel_ + text + "]";
  }

  [[noreturn]] void throw_deadlock() {
    failed_ = true;
    std::string waiting;
    for (State state : {State::at_collective, State::at_barrier}) {
      for (unsigned k = 0; k < threads_; ++k) {
        const Fiber& fiber = fibers_[k];
        if (states_[k] != state) continue;
        const bool collective = state == State::at_collective;
        waiting += (waiting.empty() ? "simt: " : "; ") + fiber.waits.text() + ": deadlock, waits in " +
                   (collective ? "a warp collective for lanes that do not arrive" : "__syncthreads") + who(fiber);
        break;
      }
    }
    throw std::runtime_error(waiting);
  }

  std::mutex mutex_;
  Order order_ = Order::forward;
  Random random_{1};
  uint64_t launches_ = 0;

  Fiber fibers_[kMaxThreads];
  State states_[kMaxThreads];
  unsigned turns_[kMaxThreads];
  Warp warps_[kMaxThreads / kWarp];
  std::deque<Collective> collectives_;
  std::vector<SharedArray> shared_;
  void* dynamic_ = nullptr;
  size_t dynamic_bytes_ = 0, static_bytes_ = 0, most_dynamic_ = 0;

  std::string kernel_;
  void (*body_)(void*) = nullptr;
  void* body_argument_ = nullptr;
  size_t block_number_ = 0, blocks_run_ = 0;
  unsigned threads_ = 0, running_ = 0;
  unsigned barrier_arrived_ = 0, barrier_arriving_ = 0, barrier_count_ = 0;
  Location barrier_at_{"", 0};

  bool failed_ = false;
  char error_[1024];

#if defined(SIMT_UCONTEXT)
  ucontext_t host_context_;
#else
  void* host_stack_pointer_ = nullptr;
#endif
  const void* host_stack_ = nullptr;
  size_t host_stack_bytes_ = 0;
  void* host_fake_stack_ = nullptr;
};

// ---- what device.cuh and the CUDA names below call, on the stack of a fiber

SIMT_UNWATCHED inline Dim3 thread_index() { return machine->fiber->index; }
SIMT_UNWATCHED inline Dim3 block_index() { return machine->block_index; }
SIMT_UNWATCHED inline Dim3 block_dim() { return machine->block_dim; }
SIMT_UNWATCHED inline Dim3 grid_dim() { return machine->grid_dim; }

SIMT_UNWATCHED inline void* shared_array(const void* key, size_t bytes, Location at = Location::here()) {
  return machine->shared_array(key, bytes, at);
}
SIMT_UNWATCHED inline void* dynamic_shared() { return machine->dynamic_shared(); }

__attribute__((noinline)) SIMT_UNWATCHED inline void copy_async(void* to, const void* from, size_t bytes,
                                                                Location at = Location::here()) {
  machine->copy_async(to, from, bytes, __builtin_return_address(0), at);
}
SIMT_UNWATCHED inline void commit_async() { machine->commit_async(); }
SIMT_UNWATCHED inline void wait_async(size_t groups) { machine->wait_async(groups); }

// Gives each lane the value of the lane that `source` names, given its own lane and the first and last of its group.
template <class T, class Source>
SIMT_UNWATCHED T shuffle(const char* name, unsigned mask, T value, int width, Location at, Source source) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= sizeof(uint64_t), "what a shuffle can move");
  const Machine::Pause pause(*machine);
  if (width <= 0 || width > static_cast<int>(kWarp) || (width & (width - 1))) {
    machine->fail(at, "%s: a width of %d", name, width);
  }
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const Machine::Meeting meeting = machine->meet_warp(name, mask, bits, false, at);
  const int lane = static_cast<int>(machine->fiber->lane);
  const int first = lane & ~(width - 1);
  const int from = source(lane, first, first + width - 1);
  if (!(meeting.lanes >> from & 1)) machine->fail(at, "%s reads lane %d, which does not take part", name, from);
  std::memcpy(&value, &meeting.values[from], sizeof value);
  return value;
}

SIMT_UNWATCHED inline unsigned ballot(const char* name, unsigned mask, bool predicate, Location at) {
  const Machine::Pause pause(*machine);
  const Machine::Meeting meeting = machine->meet_warp(name, mask, predicate, false, at);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (meeting.lanes >> lane & meeting.values[lane] & 1) votes |= 1u << lane;
  }
  return votes;
}

// Returns the old value. Nothing can come between, since fibers are not interrupted.
template <class T, class Update>
__attribute__((noinline)) SIMT_UNWATCHED T atomic_update(T* address, Update update) {
  const Machine::Pause pause(*machine);
  if (observer) observer->access(Observer::Access::atomic, address, sizeof(T), __builtin_return_address(0));
  const T old = *address;
  *address = update(old);
  return old;
}

template <class... Parameters>
struct Call {
  void (*kernel)(Parameters...);
  std::tuple<Parameters...> arguments;

  template <size_t... I>
  SIMT_UNWATCHED void with(std::index_sequence<I...>) {
    kernel(std::get<I>(arguments)...);
  }
  SIMT_UNWATCHED static void run(void* call) {
    static_cast<Call*>(call)->with(std::index_sequence_for<Parameters...>());
  }
};

template <class... Parameters, class... Arguments>
void launch(KernelName name, void (*kernel)(Parameters...), Dim3 grid, Dim3 block, size_t shared_bytes, Stream,
            Arguments&&... arguments) {
  Call<Parameters...> call{kernel, {static_cast<Parameters>(arguments)...}};
  Machine::shared().run(name, grid, block, shared_bytes, &Call<Parameters...>::run, &call);
}

// A value that does not take part in the deduction of T.
template <class T>
struct Same {
  using type = T;
};
template <class T>
using same_t = typename Same<T>::type;

}  // namespace simt

// ---- the CUDA names that kernels use

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::block_index())
#define blockDim (::simt::block_dim())
#define gridDim (::simt::grid_dim())

using dim3 = simt::Dim3;
constexpr int warpSize = static_cast<int>(simt::kWarp);

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};

SIMT_UNWATCHED inline void __syncthreads(simt::Location at = simt::Location::here()) {
  simt::machine->meet_block(false, at);
}
SIMT_UNWATCHED inline int __syncthreads_count(bool predicate, simt::Location at = simt::Location::here()) {
  return static_cast<int>(simt::machine->meet_block(predicate, at));
}
SIMT_UNWATCHED inline int __syncthreads_or(bool predicate, simt::Location at = simt::Location::here()) {
  return simt::machine->meet_block(predicate, at) > 0;
}
SIMT_UNWATCHED inline int __syncthreads_and(bool predicate, simt::Location at = simt::Location::here()) {
  return simt::machine->meet_block(predicate, at) == simt::machine->threads();
}

SIMT_UNWATCHED inline void __syncwarp(unsigned mask = 0xffffffffu, simt::Location at = simt::Location::here()) {
  simt::machine->meet_warp("__syncwarp", mask, 0, true, at);
}
template <class T>
SIMT_UNWATCHED T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize,
                             simt::Location at = simt::Location::here()) {
  return simt::shuffle("__shfl_sync", mask, value, width, at,
                       [=](int, int first, int last) { return first + (lane & (last - first)); });
}
template <class T>
SIMT_UNWATCHED T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                                simt::Location at = simt::Location::here()) {
  return simt::shuffle("__shfl_up_sync", mask, value, width, at, [=](int lane, int first, int) {
    return delta > static_cast<unsigned>(lane - first) ? lane : lane - static_cast<int>(delta);
  });
}
template <class T>
SIMT_UNWATCHED T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                                  simt::Location at = simt::Location::here()) {
  return simt::shuffle("__shfl_down_sync", mask, value, width, at, [=](int lane, int, int last) {
    return delta > static_cast<unsigned>(last - lane) ? lane : lane + static_cast<int>(delta);
  });
}
// Earlier groups can be read, later ones not: that is the definition.
template <class T>
SIMT_UNWATCHED T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                                 simt::Location at = simt::Location::here()) {
  return simt::shuffle("__shfl_xor_sync", mask, value, width, at, [=](int lane, int, int last) {
    const int other = lane ^ (lane_mask & (warpSize - 1));
    return other > last ? lane : other;
  });
}
SIMT_UNWATCHED inline unsigned __ballot_sync(unsigned mask, bool predicate,
                                             simt::Location at = simt::Location::here()) {
  return simt::ballot("__ballot_sync", mask, predicate, at);
}
SIMT_UNWATCHED inline int __any_sync(unsigned mask, bool predicate, simt::Location at = simt::Location::here()) {
  return simt::ballot("__any_sync", mask, predicate, at) != 0;
}
SIMT_UNWATCHED inline int __all_sync(unsigned mask, bool predicate, simt::Location at = simt::Location::here()) {
  return simt::ballot("__all_sync", mask, !predicate, at) == 0;
}

// Inlined, so that the race check names the kernel's line.
template <class T>
__forceinline__ T atomicAdd(T* address, simt::same_t<T> value) {
  return simt::atomic_update(address, [=](T old) { return static_cast<T>(old + value); });
}
template <class T>
__forceinline__ T atomicMax(T* address, simt::same_t<T> value) {
  return simt::atomic_update(address, [=](T old) { return old < value ? value : old; });
}
template <class T>
__forceinline__ T atomicMin(T* address, simt::same_t<T> value) {
  return simt::atomic_update(address, [=](T old) { return value < old ? value : old; });
}
template <class T>
__forceinline__ T atomicExch(T* address, simt::same_t<T> value) {
  return simt::atomic_update(address, [=](T) { return value; });
}
template <class T>
__forceinline__ T atomicCAS(T* address, simt::same_t<T> expected, simt::same_t<T> value) {
  return simt::atomic_update(address, [=](T old) { return old == expected ? value : old; });
}
inline void __threadfence() {}

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
