// Finds data races and reads of uninitialised shared memory in emulated kernels, in whatever order the threads run.
//
// The kernels are compiled with -fsanitize=thread, this file is not, and nothing is linked with it: so the calls that
// the compiler inserts at every load and store arrive at the functions below instead of libtsan's. Two accesses to
// one byte, at least one of which writes and not both of which are atomic, are a race unless they are ordered: of one
// thread, of one block with a __syncthreads in between, or of one warp with __syncwarp in between that both took part
// in, directly or through other lanes. Shuffles and votes order nothing, and nothing orders the blocks of a launch.
// Not seen: what functions of the C library do, such as memcpy with a size that only the kernel's run knows.
#include <dlfcn.h>

#include <array>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "simt.h"

namespace {

using simt::kMaxThreads;
using simt::kWarp;
using simt::Machine;

// What one thread does between two barriers: accesses of one segment differ in nothing that orders them.
struct Segment {
  size_t block;
  unsigned thread;
  unsigned block_interval;
  unsigned warp_interval;
};

// An access that later ones are compared with; segment 0 means none.
struct Entry {
  uint32_t segment;
  int32_t code;  // from code_base()
};

// Stand for the last write, in place of a segment.
constexpr uint32_t kUninitialised = 0xffffffff;
constexpr uint32_t kCopyUnderWay = 0xfffffffe;

// What is known of 1, 2 or 4 bytes. Two reads are enough to find out if a later write is a race, as remember() says.
struct Cell {
  Entry write;
  Entry reads[2];
  Entry atomics[2];
};

constexpr uintptr_t kPageBytes = 512;

struct Page {
  unsigned shift = 2;  // a cell stands for 1 << shift bytes
  std::unique_ptr<Cell[]> cells{new Cell[kPageBytes >> 2]()};

  void split(unsigned finer) {
    std::unique_ptr<Cell[]> made(new Cell[kPageBytes >> finer]);
    for (size_t k = 0; k < kPageBytes >> finer; ++k) made[k] = cells[k >> (shift - finer)];
    cells = std::move(made);
    shift = finer;
  }
};

// Instructions are kept as distances from here, in half the space.
char* code_base() { return reinterpret_cast<char*>(&code_base); }

// For both: file:line of the instruction before, and of the calls that were inlined around it; else where in the
// library it is.
std::array<std::string, 2> source_places(const std::array<int32_t, 2>& codes) {
  std::array<std::string, 2> offsets, found;
  Dl_info library{};
  for (size_t k = 0; k < 2; ++k) {
    char* const code = code_base() + codes[k] - 1;
    dladdr(code, &library);
    char offset[32];
    std::snprintf(offset, sizeof offset, "0x%zx", static_cast<size_t>(code - static_cast<char*>(library.dli_fbase)));
    offsets[k] = offset;
  }
  const std::string command =
      std::string("addr2line -a -i -e '") + library.dli_fname + "' " + offsets[0] + " " + offsets[1] + " 2>/dev/null";
  if (FILE* const output = popen(command.c_str(), "r")) {
    size_t next = 0;
    char line[512];
    while (std::fgets(line, sizeof line, output)) {
      const std::string place(line, std::strcspn(line, " \n"));
      if (place.rfind("0x", 0) == 0) {
        ++next;
      } else if (place[0] != '?' && place.find("/simt.h:") == std::string::npos) {
        std::string& places = found[next - 1];
        places += (places.empty() ? "" : " in ") + place;
      }
    }
    pclose(output);
  }
  for (size_t k = 0; k < 2; ++k) {
    if (found[k].empty()) found[k] = std::string(library.dli_fname) + "+" + offsets[k];
  }
  return found;
}

class RaceCheck final : public simt::Observer {
 public:
  RaceCheck() { simt::observer = this; }

  // Launches are ordered, so nothing need be remembered of earlier ones.
  void launch_begins() override {
    pages_.clear();
    recent_ = {};
    segments_.assign(1, Segment{});
  }

  void block_begins() override {
    block_interval_ = 0;
    segment_ = {};
    for (unsigned thread = 0; thread < simt::machine->threads(); ++thread) {
      warp_interval_[thread] = 1;
      seen_[thread].fill(0);
    }
  }

  void block_barrier() override {
    ++block_interval_;
    segment_ = {};
  }

  void warp_barrier(unsigned warp, unsigned lanes) override {
    const unsigned first = warp * kWarp;
    std::array<unsigned, kWarp> seen{};
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      for (unsigned other = 0; other < kWarp; ++other) seen[other] = max(seen[other], seen_[first + lane][other]);
      seen[lane] = max(seen[lane], warp_interval_[first + lane]);
    }
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      seen_[first + lane] = seen;
      ++warp_interval_[first + lane];
      segment_[first + lane] = 0;
    }
  }

  void new_shared(const void* address, size_t bytes) override {
    for_cells(address, bytes, [](Cell& cell) {
      cell = {};
      cell.write.segment = kUninitialised;
    });
  }

  void access(Access kind, const void* address, size_t bytes, const void* code) override {
    const Entry entry = entry_of(code);
    for_cells(address, bytes, [&](Cell& cell) { check(kind, cell, entry); });
  }

  void copy_begins(const void* to, const void* from, size_t bytes, const void* code) override {
    access(Access::read, from, bytes, code);
    const Entry entry = entry_of(code);
    for_cells(to, bytes, [&](Cell& cell) {
      check(Access::write, cell, entry);
      cell.write.segment = kCopyUnderWay;
    });
  }

  void copy_ends(const void* to, const void* from, size_t bytes, const void* code) override {
    access(Access::read, from, bytes, code);
    const Entry entry = entry_of(code);
    for_cells(to, bytes, [&](Cell& cell) { cell.write = entry; });
  }

  // Called at every load and store of an instrumented function, whether of a kernel or not.
  void watch(Access kind, const void* address, size_t bytes, const void* code) {
    Machine* const machine = simt::machine;
    if (!machine || !machine->watched) return;
    const uintptr_t in_stack =
        reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(machine->fiber->stack);
    if (in_stack < simt::kStack) return;
    access(kind, address, bytes, code);
  }

  std::string error() override {
    const Machine& machine = Machine::shared();
    const auto [late, early] = source_places({late_.code, early_.code});
    std::string text = "simt: " + late + ": " + problem_;
    if (early_.code) text += " at " + early;
    if (early_.segment && early_.segment < kCopyUnderWay) {
      const Segment& segment = segments_[early_.segment];
      const simt::Dim3 block = machine.grid_dim.index(segment.block), thread = machine.block_dim.index(segment.thread);
      char who[128];
      std::snprintf(who, sizeof who, " by block (%u, %u, %u), thread (%u, %u, %u)", block.x, block.y, block.z, thread.x,
                    thread.y, thread.z);
      text += who;
    }
    return text;
  }

 private:
  template <class Body>
  void for_cells(const void* address, size_t bytes, const Body& body) {
    uintptr_t begin = reinterpret_cast<uintptr_t>(address);
    const uintptr_t end = begin + bytes;
    const uintptr_t odd = begin | bytes;
    const unsigned shift = odd % 4 == 0 ? 2 : (odd % 2 == 0 ? 1 : 0);
    while (begin < end) {
      const uintptr_t first = begin % kPageBytes, last = min(first + (end - begin), kPageBytes);
      Page& page = page_of(begin / kPageBytes);
      if (page.shift > shift) page.split(shift);
      for (uintptr_t k = first >> page.shift; k < last >> page.shift; ++k) body(page.cells[k]);
      begin += last - first;
    }
  }

  Page& page_of(uintptr_t number) {
    Recent& recent = recent_[number % recent_.size()];
    if (recent.number != number || !recent.page) recent = {number, &find_page(number)};
    return *recent.page;
  }

  // The standard library's functions may be the kernels' instrumented ones: these calls must not come back here.
  __attribute__((noinline)) Page& find_page(uintptr_t number) {
    const Machine::Pause pause(*simt::machine);
    return pages_[number];
  }

  Entry entry_of(const void* code) {
    uint32_t& segment = segment_[simt::machine->fiber->number];
    if (!segment) segment = new_segment();
    return {segment, static_cast<int32_t>(static_cast<const char*>(code) - code_base())};
  }

  __attribute__((noinline)) uint32_t new_segment() {
    const Machine::Pause pause(*simt::machine);
    const unsigned thread = simt::machine->fiber->number;
    segments_.push_back({simt::machine->block_number(), thread, block_interval_, warp_interval_[thread]});
    return static_cast<uint32_t>(segments_.size() - 1);
  }

  // Does what `early` did come before all that the running segment `late` does?
  bool ordered(uint32_t early, uint32_t late) const {
    if (early == late) return true;
    const Segment &a = segments_[early], &b = segments_[late];
    if (a.block != b.block) return false;
    if (a.thread == b.thread || a.block_interval != b.block_interval) return true;
    return a.thread / kWarp == b.thread / kWarp && a.warp_interval <= seen_[b.thread][a.thread % kWarp];
  }

  bool races(const Entry& early, const Entry& late) const {
    return early.segment && !ordered(early.segment, late.segment);
  }

  void check(Access kind, Cell& cell, const Entry& entry) {
    if (kind == Access::read && cell.reads[0].segment == entry.segment) return;
    const Entry& write = cell.write;
    if (write.segment == kCopyUnderWay) report("access to what an asynchronous copy is still writing,", write, entry);
    if (write.segment == kUninitialised) {
      if (kind != Access::write) report("read of uninitialised shared memory", {}, entry);
    } else if (races(write, entry)) {
      report(kind == Access::read ? "race: reads what is written" : "race: writes what is written", write, entry);
    }
    if (kind != Access::read) {
      for (const Entry& read : cell.reads) {
        if (races(read, entry)) report("race: writes what is read", read, entry);
      }
    }
    if (kind != Access::atomic) {
      for (const Entry& atomic : cell.atomics) {
        if (races(atomic, entry)) report("race: not atomic, unlike the access", atomic, entry);
      }
    }
    if (kind == Access::write) {
      cell = {entry, {}, {}};
    } else {
      remember(kind == Access::read ? cell.reads : cell.atomics, entry);
    }
  }

  // Keeps two entries such that a later access that races with any forgotten one races with one of these as well:
  // one that is ordered before another is not needed, and of unordered ones two of different blocks are the best,
  // then two of different warps. Only where __syncwarp orders parts of a warp would it take more than two of its lanes.
  void remember(Entry (&kept)[2], const Entry& entry) const {
    for (Entry& old : kept) {
      if (!races(old, entry)) {
        old = entry;
        return;
      }
    }
    if (distance(kept[0], kept[1]) < distance(kept[0], entry)) kept[1] = entry;
  }

  int distance(const Entry& one, const Entry& other) const {
    const Segment &a = segments_[one.segment], &b = segments_[other.segment];
    return a.block != b.block ? 2 : a.thread / kWarp != b.thread / kWarp;
  }

  void report(const char* problem, const Entry& early, const Entry& late) {
    problem_ = problem;
    early_ = early;
    late_ = late;
    simt::machine->fail_observed();
  }

  struct Recent {
    uintptr_t number;
    Page* page;
  };
  std::unordered_map<uintptr_t, Page> pages_;
  std::array<Recent, 1024> recent_{};

  std::vector<Segment> segments_;
  std::array<uint32_t, kMaxThreads> segment_{};  // of each thread of the block; 0: not begun
  unsigned block_interval_ = 0;
  std::array<unsigned, kMaxThreads> warp_interval_{};
  std::array<std::array<unsigned, kWarp>, kMaxThreads> seen_{};  // warp intervals of other lanes ordered before now

  const char* problem_ = "";
  Entry early_{}, late_{};
};

RaceCheck race_check;

template <class Number, class Update>
Number locked_update(volatile Number* address, const Update& update) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  const Number old = *address;
  *address = update(old);
  return old;
}

}  // namespace

// What g++ and clang++ call: the names and signatures are theirs.

#define SIMT_WATCH(kind, address, bytes) \
  race_check.watch(simt::Observer::Access::kind, address, bytes, __builtin_return_address(0))

#define SIMT_ACCESSES(bytes)                                                              \
  void __tsan_read##bytes(void* address) { SIMT_WATCH(read, address, bytes); }            \
  void __tsan_write##bytes(void* address) { SIMT_WATCH(write, address, bytes); }          \
  void __tsan_volatile_read##bytes(void* address) { SIMT_WATCH(read, address, bytes); }   \
  void __tsan_volatile_write##bytes(void* address) { SIMT_WATCH(write, address, bytes); } \
  void __tsan_unaligned_read##bytes(void* address) { SIMT_WATCH(read, address, bytes); }  \
  void __tsan_unaligned_write##bytes(void* address) { SIMT_WATCH(write, address, bytes); }

// Atomic operations of C++: host code, since CUDA has its own. They are done, and not checked.
#define SIMT_FETCH(bits, Number, operation)                                                     \
  Number __tsan_atomic##bits##_fetch_##operation(volatile Number* address, Number value, int) { \
    return __atomic_fetch_##operation(address, value, __ATOMIC_SEQ_CST);                        \
  }
#define SIMT_COMPARE_EXCHANGE(bits, Number, strength)                                                              \
  bool __tsan_atomic##bits##_compare_exchange_##strength(volatile Number* address, Number* expected, Number value, \
                                                         int, int) {                                               \
    return __atomic_compare_exchange_n(address, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);       \
  }
#define SIMT_ATOMICS(bits, Number)                                                     \
  Number __tsan_atomic##bits##_load(const volatile Number* address, int) {             \
    return __atomic_load_n(address, __ATOMIC_SEQ_CST);                                 \
  }                                                                                    \
  void __tsan_atomic##bits##_store(volatile Number* address, Number value, int) {      \
    __atomic_store_n(address, value, __ATOMIC_SEQ_CST);                                \
  }                                                                                    \
  Number __tsan_atomic##bits##_exchange(volatile Number* address, Number value, int) { \
    return __atomic_exchange_n(address, value, __ATOMIC_SEQ_CST);                      \
  }                                                                                    \
  SIMT_FETCH(bits, Number, add)                                                        \
  SIMT_FETCH(bits, Number, sub)                                                        \
  SIMT_FETCH(bits, Number, and)                                                        \
  SIMT_FETCH(bits, Number, or)                                                         \
  SIMT_FETCH(bits, Number, xor)                                                        \
  SIMT_FETCH(bits, Number, nand)                                                       \
  SIMT_COMPARE_EXCHANGE(bits, Number, strong)                                          \
  SIMT_COMPARE_EXCHANGE(bits, Number, weak)

// Without libatomic there are no 128-bit operations.
#define SIMT_FETCH_128(operation, result)                                                        \
  __int128 __tsan_atomic128_fetch_##operation(volatile __int128* address, __int128 value, int) { \
    return locked_update(address, [=](__int128 old) { return result; });                         \
  }
#define SIMT_COMPARE_EXCHANGE_128(strength)                                                                         \
  bool __tsan_atomic128_compare_exchange_##strength(volatile __int128* address, __int128* expected, __int128 value, \
                                                    int, int) {                                                     \
    const __int128 wanted = *expected;                                                                              \
    *expected = locked_update(address, [=](__int128 old) { return old == wanted ? value : old; });                  \
    return *expected == wanted;                                                                                     \
  }

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

SIMT_ACCESSES(1)
SIMT_ACCESSES(2)
SIMT_ACCESSES(4)
SIMT_ACCESSES(8)
SIMT_ACCESSES(16)
void __tsan_read_range(void* address, size_t bytes) { SIMT_WATCH(read, address, bytes); }
void __tsan_write_range(void* address, size_t bytes) { SIMT_WATCH(write, address, bytes); }

SIMT_ATOMICS(8, uint8_t)
SIMT_ATOMICS(16, uint16_t)
SIMT_ATOMICS(32, uint32_t)
SIMT_ATOMICS(64, uint64_t)
__int128 __tsan_atomic128_load(const volatile __int128* address, int) {
  return locked_update(const_cast<volatile __int128*>(address), [](__int128 old) { return old; });
}
void __tsan_atomic128_store(volatile __int128* address, __int128 value, int) {
  locked_update(address, [=](__int128) { return value; });
}
SIMT_FETCH_128(add, old + value)
SIMT_FETCH_128(sub, old - value)
SIMT_FETCH_128(and, old& value)
SIMT_FETCH_128(or, old | value)
SIMT_FETCH_128(xor, old ^ value)
SIMT_FETCH_128(nand, ~(old& value))
__int128 __tsan_atomic128_exchange(volatile __int128* address, __int128 value, int) {
  return locked_update(address, [=](__int128) { return value; });
}
SIMT_COMPARE_EXCHANGE_128(strong)
SIMT_COMPARE_EXCHANGE_128(weak)
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int) { __atomic_signal_fence(__ATOMIC_SEQ_CST); }

}  // extern "C"
