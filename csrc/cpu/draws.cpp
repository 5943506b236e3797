// The draws of Python's random and of NumPy's RandomState, and the rows of a task made of them, where the interpreter
// would take most of the time.
#include "cpu/draws.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <numeric>
#include <unordered_map>
#include <utility>
#include <vector>

namespace metafast {
namespace {

struct Release {
  void operator()(PyObject* object) const { Py_DECREF(object); }
};
using Owned = std::unique_ptr<PyObject, Release>;

int bit_length(Py_ssize_t n) { return n > 0 ? 64 - __builtin_clzll(static_cast<unsigned long long>(n)) : 0; }

// Numbers of random.Random._randbelow. Of each it draws words of 32 bits, here many in one call: `certain` tells how many
// numbers will be drawn at least, each of which takes one word or more.
class Draws {
 public:
  Draws(PyObject* getrandbits, Py_ssize_t certain) : getrandbits_(getrandbits), certain_(certain) {}

  // A number below n, 0 < n < 2^32; -1 where getrandbits failed.
  Py_ssize_t below(Py_ssize_t n) {
    const int unused = 32 - bit_length(n);
    while (true) {
      if (next_ == words_.size() && !refill()) return -1;
      const Py_ssize_t number = words_[next_++] >> unused;
      if (number < n) {
        --certain_;
        return number;
      }
    }
  }

 private:
  bool refill() {
    const Py_ssize_t count = std::min<Py_ssize_t>(std::max<Py_ssize_t>(certain_, 1), 4096);
    words_.clear();
    next_ = 0;
    return count <= kFewWords ? draw_few(count) : draw_many(count);
  }

  // One call for every two words.
  bool draw_few(Py_ssize_t count) {
    for (; count > 0; count -= 2) {
      const Owned drawn = call(32 * std::min<Py_ssize_t>(count, 2));
      if (!drawn) return false;
      const unsigned long long bits = PyLong_AsUnsignedLongLong(drawn.get());
      if (PyErr_Occurred()) return false;
      words_.push_back(static_cast<uint32_t>(bits));
      if (count > 1) words_.push_back(static_cast<uint32_t>(bits >> 32));
    }
    return true;
  }

  bool draw_many(Py_ssize_t count) {
    const Owned drawn = call(32 * count);
    if (!drawn) return false;
    // The first word is the lowest.
    const Owned bytes(PyObject_CallMethod(drawn.get(), "to_bytes", "ns", 4 * count, "little"));
    if (!bytes) return false;
    char* begin = nullptr;
    Py_ssize_t size = 0;
    if (PyBytes_AsStringAndSize(bytes.get(), &begin, &size) != 0) return false;
    words_.resize(size / 4);
    for (size_t i = 0; i < words_.size(); ++i) {
      words_[i] = 0;
      for (size_t k = 4; k-- > 0;) words_[i] = words_[i] << 8 | static_cast<unsigned char>(begin[4 * i + k]);
    }
    return true;
  }

  Owned call(Py_ssize_t bits) {
    const Owned number(PyLong_FromSsize_t(bits));
    return Owned(number ? PyObject_CallFunctionObjArgs(getrandbits_, number.get(), nullptr) : nullptr);
  }

  // Up to so many, the calls for two of them take less time than one that makes a large number.
  static constexpr Py_ssize_t kFewWords = 16;
  PyObject* getrandbits_;
  Py_ssize_t certain_;
  std::vector<uint32_t> words_;
  size_t next_ = 0;
};

// random.Random.sample draws from a list of what is left of a population up to this size.
Py_ssize_t list_limit(Py_ssize_t k) {
  Py_ssize_t covered = 1;
  while (k > 5 && covered < 3 * k) covered *= 4;
  return k > 5 ? 21 + covered : 21;
}

// Numbers of rows that were drawn.
class Taken {
 public:
  explicit Taken(Py_ssize_t k) {
    size_t size = 4;
    while (size < 4 * static_cast<size_t>(k)) size *= 2;
    slots_.assign(size, -1);
  }

  // False for one that is there already.
  bool add(Py_ssize_t number) {
    const size_t mask = slots_.size() - 1;
    size_t slot = static_cast<size_t>(number) & mask;
    for (; slots_[slot] >= 0; slot = (slot + 1) & mask) {
      if (slots_[slot] == number) return false;
    }
    slots_[slot] = number;
    return true;
  }

 private:
  std::vector<Py_ssize_t> slots_;
};

// k places out of n; fewer where getrandbits failed.
std::vector<Py_ssize_t> draw_places(Draws& draws, Py_ssize_t n, Py_ssize_t k) {
  std::vector<Py_ssize_t> places;
  places.reserve(k);
  if (n <= list_limit(k)) {
    std::vector<Py_ssize_t> left(n);
    for (Py_ssize_t i = 0; i < n; ++i) left[i] = i;
    for (Py_ssize_t last = n - 1; last >= n - k; --last) {
      const Py_ssize_t j = draws.below(last + 1);
      if (j < 0) break;
      places.push_back(left[j]);
      left[j] = left[last];
    }
    return places;
  }
  Taken taken(k);
  while (static_cast<Py_ssize_t>(places.size()) < k) {
    const Py_ssize_t j = draws.below(n);
    if (j < 0) break;
    if (taken.add(j)) places.push_back(j);
  }
  return places;
}

bool expect(const char* name, Py_ssize_t wanted, Py_ssize_t given) {
  if (given != wanted) PyErr_Format(PyExc_TypeError, "%s: expected %zd arguments, got %zd", name, wanted, given);
  return given == wanted;
}

// Is a population small enough for draws of one word, and no smaller than k?
bool can_draw(Py_ssize_t n, Py_ssize_t k) {
  if (k < 0 || k > n) {
    PyErr_Format(PyExc_ValueError, "k: expected 0 to %zd, the size of the population, got %zd", n, k);
  } else if (bit_length(n) > 32) {
    PyErr_Format(PyExc_ValueError, "population: expected fewer than 2^32 of them, got %zd", n);
  }
  return !PyErr_Occurred();
}

// Appends k out of a population to a list.
bool append_sample(Draws& draws, PyObject* population, Py_ssize_t k, PyObject* list) {
  const Py_ssize_t n = PySequence_Size(population);
  if (n < 0 || !can_draw(n, k)) return false;
  const std::vector<Py_ssize_t> places = draw_places(draws, n, k);
  if (static_cast<Py_ssize_t>(places.size()) < k) return false;
  if (PyList_CheckExact(population)) {
    // They lie anywhere in memory: all are on their way before the first is touched.
    for (const Py_ssize_t place : places) __builtin_prefetch(PyList_GetItem(population, place), 1);
    for (const Py_ssize_t place : places) {
      PyObject* item = PyList_GetItem(population, place);
      if (item == nullptr || PyList_Append(list, item) != 0) return false;
    }
    return true;
  }
  for (const Py_ssize_t place : places) {
    const Owned item(PySequence_GetItem(population, place));
    if (!item || PyList_Append(list, item.get()) != 0) return false;
  }
  return true;
}

bool is_list(const char* name, PyObject* object) {
  if (PyList_Check(object)) return true;
  PyErr_Format(PyExc_TypeError, "%s: expected a list, got %R", name, reinterpret_cast<PyObject*>(Py_TYPE(object)));
  return false;
}

// sample(getrandbits, population, k): random.sample(population, k), whose bits getrandbits draws.
PyObject* sample(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (!expect("sample", 3, count)) return nullptr;
  const Py_ssize_t k = PyLong_AsSsize_t(arguments[2]);
  if (PyErr_Occurred()) return nullptr;
  Draws draws(arguments[0], k);
  Owned drawn(PyList_New(0));
  return drawn && append_sample(draws, arguments[1], k, drawn.get()) ? drawn.release() : nullptr;
}

// sample_task(getrandbits, labels, rows_of, ways, rows): random.sample(labels, ways), and of each label that it drew
// random.sample(rows_of[label], rows), one after the other.
PyObject* sample_task(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (!expect("sample_task", 5, count)) return nullptr;
  const Py_ssize_t ways = PyLong_AsSsize_t(arguments[3]), rows = PyLong_AsSsize_t(arguments[4]);
  if (PyErr_Occurred()) return nullptr;
  if (ways < 0 || rows < 0) {
    return PyErr_Format(PyExc_ValueError, "ways, rows: expected 0 or more, got %zd and %zd", ways, rows);
  }
  const Py_ssize_t largest = 1 << 20;
  Draws draws(arguments[0], std::min(ways, largest) * (1 + std::min(rows, largest)));
  const Owned labels(PyList_New(0));
  Owned task(PyList_New(0));
  if (!labels || !task || !append_sample(draws, arguments[1], ways, labels.get())) return nullptr;
  for (Py_ssize_t i = 0; i < ways; ++i) {
    const Owned members(PyObject_GetItem(arguments[2], PyList_GetItem(labels.get(), i)));
    if (!members || !append_sample(draws, members.get(), rows, task.get())) return nullptr;
  }
  return task.release();
}

// shuffle(getrandbits, values): random.shuffle of a list, whose bits getrandbits draws.
PyObject* shuffle(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (!expect("shuffle", 2, count)) return nullptr;
  PyObject* values = arguments[1];
  if (!is_list("values", values)) return nullptr;
  const Py_ssize_t n = PyList_Size(values);
  if (!can_draw(n, n)) return nullptr;
  Draws draws(arguments[0], n - 1);
  for (Py_ssize_t last = n - 1; last > 0; --last) {
    const Py_ssize_t j = draws.below(last + 1);
    if (j < 0) return nullptr;
    Owned first(Py_XNewRef(PyList_GetItem(values, j))), second(Py_XNewRef(PyList_GetItem(values, last)));
    if (!first || !second) return nullptr;
    if (PyList_SetItem(values, j, second.release()) != 0) return nullptr;
    if (PyList_SetItem(values, last, first.release()) != 0) return nullptr;
  }
  return Py_NewRef(Py_None);
}

// split_rows(items, labels, ways, shots, queries): of each of the `ways` runs of items the first `shots` are of the support
// set, the others queries. Gives one bytearray of int64, which are the items of the support set, those of the queries, and
// for both the places of their labels among the different ones; and a list of these, in the order of a set of the labels
// of items. None where an item is no row of labels or a label is no int of 64 bits.
PyObject* split_rows(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (!expect("split_rows", 5, count)) return nullptr;
  PyObject *items = arguments[0], *labels = arguments[1];
  const Py_ssize_t ways = PyLong_AsSsize_t(arguments[2]), shots = PyLong_AsSsize_t(arguments[3]),
                   queries = PyLong_AsSsize_t(arguments[4]);
  if (PyErr_Occurred()) return nullptr;
  if (!is_list("items", items) || !is_list("labels", labels)) return nullptr;
  const Py_ssize_t rows = PyList_Size(items), labelled = PyList_Size(labels);
  const Py_ssize_t each = ways > 0 ? rows / ways : 0;
  const bool fits =
      ways > 0 ? rows % ways == 0 && shots >= 0 && queries >= 0 && each - shots == queries : ways == 0 && rows == 0;
  if (!fits) {
    return PyErr_Format(PyExc_ValueError, "items: expected %zd * (%zd + %zd) of them, got %zd", ways, shots, queries,
                        rows);
  }
  const Py_ssize_t supports = ways > 0 ? ways * shots : 0;
  const Owned parts(PyByteArray_FromStringAndSize(nullptr, 2 * 8 * rows)), different(PySet_New(nullptr));
  if (!parts || !different) return nullptr;
  int64_t* const places = reinterpret_cast<int64_t*>(PyByteArray_AsString(parts.get()));
  const auto part_of = [&](Py_ssize_t i) {
    const Py_ssize_t way = i / each, row = i % each;
    return row < shots ? way * shots + row : supports + way * queries + row - shots;
  };
  std::vector<int64_t> rows_of_items(rows), values(rows);
  for (Py_ssize_t i = 0; i < rows; ++i) {
    PyObject* item = PyList_GetItem(items, i);
    if (!PyLong_CheckExact(item)) return Py_NewRef(Py_None);
    int overflow = 0;
    rows_of_items[i] = PyLong_AsLongLongAndOverflow(item, &overflow);
    if (overflow != 0 || rows_of_items[i] < 0 || rows_of_items[i] >= labelled) return Py_NewRef(Py_None);
    places[part_of(i)] = rows_of_items[i];
  }
  // As in append_sample.
  for (const int64_t row : rows_of_items) __builtin_prefetch(PyList_GetItem(labels, static_cast<Py_ssize_t>(row)));
  for (Py_ssize_t i = 0; i < rows; ++i) {
    PyObject* label = PyList_GetItem(labels, static_cast<Py_ssize_t>(rows_of_items[i]));
    if (!PyLong_CheckExact(label)) return Py_NewRef(Py_None);
    int overflow = 0;
    values[i] = PyLong_AsLongLongAndOverflow(label, &overflow);
    if (overflow != 0) return Py_NewRef(Py_None);
    if ((i == 0 || values[i] != values[i - 1]) && PySet_Add(different.get(), label) != 0) return nullptr;
  }
  const Owned classes(PySequence_List(different.get()));
  if (!classes) return nullptr;
  std::unordered_map<int64_t, int64_t> numbers;
  for (Py_ssize_t k = 0; k < PyList_Size(classes.get()); ++k) {
    numbers[PyLong_AsLongLong(PyList_GetItem(classes.get(), k))] = k;
  }
  int64_t number = 0;
  for (Py_ssize_t i = 0; i < rows; ++i) {
    if (i == 0 || values[i] != values[i - 1]) number = numbers[values[i]];
    places[rows + part_of(i)] = number;
  }
  return PyTuple_Pack(2, parts.get(), classes.get());
}

// NumPy's bitgen_t, which the capsule of a bit generator holds: how other libraries draw from its stream.
struct BitGenerator {
  void* state;
  uint64_t (*next_uint64)(void*);
  uint32_t (*next_uint32)(void*);
  double (*next_double)(void*);
  uint64_t (*next_raw)(void*);
};

// The words of numpy.random.RandomState(seed): Matsumoto and Nishimura's MT19937, seeded by one number.
class MersenneTwister {
 public:
  explicit MersenneTwister(uint32_t seed) {
    for (uint32_t i = 0; i < kSize; ++i) {
      words_[i] = seed;
      seed = 1812433253u * (seed ^ seed >> 30) + i + 1;
    }
  }

  // Words are made when they are asked for, since a permutation takes few of them.
  uint32_t next() {
    const uint32_t after = next_ + 1 < kSize ? next_ + 1 : 0,
                   far = next_ + (next_ < kSize - kFar ? kFar : kFar - kSize);
    const uint32_t mixed = (words_[next_] & 0x80000000u) | (words_[after] & 0x7fffffffu);
    uint32_t word = words_[next_] = words_[far] ^ mixed >> 1 ^ (mixed & 1 ? 0x9908b0dfu : 0u);
    next_ = after;
    word ^= word >> 11;
    word ^= word << 7 & 0x9d2c5680u;
    word ^= word << 15 & 0xefc60000u;
    return word ^ word >> 18;
  }

 private:
  static constexpr uint32_t kSize = 624, kFar = 397;
  uint32_t words_[kSize];
  uint32_t next_ = 0;
};

// RandomState.shuffle of a vector; `word` gives the next 32 bits.
template <typename Word>
void shuffle_legacy(int64_t* values, int64_t count, Word word) {
  for (int64_t last = count - 1; last > 0; --last) {
    const uint32_t mask = ~uint32_t{0} >> __builtin_clz(static_cast<uint32_t>(last));
    int64_t other = 0;
    do other = word() & mask;
    while (other > last);
    std::swap(values[last], values[other]);
  }
}

// `count` numbers of a list, each 0 or more and below 2^32; false with an error set where it has others.
bool read_numbers(const char* name, PyObject* list, Py_ssize_t count, std::vector<int64_t>& numbers) {
  if (!is_list(name, list)) return false;
  if (PyList_Size(list) != count) {
    PyErr_Format(PyExc_ValueError, "%s: expected %zd numbers, got %zd", name, count, PyList_Size(list));
    return false;
  }
  for (Py_ssize_t i = 0; i < count; ++i) {
    const long long number = PyLong_AsLongLong(PyList_GetItem(list, i));
    if (number == -1 && PyErr_Occurred()) return false;
    if (number < 0 || number >> 32 != 0) {
      PyErr_Format(PyExc_ValueError, "%s: expected 0 or more and less than 2^32, got %lld", name, number);
      return false;
    }
    numbers.push_back(number);
  }
  return true;
}

// split_orders(generator, seeds, rows, first, counts): the rows of each class in the order of
// numpy.random.RandomState(seed).permutation(rows), parted: for each split the next counts[split][class] of them, as far as
// there are as many, which RandomState.shuffle brings into another order by words of `generator`, the capsule of its bit
// generator. Gives a list for each split, of the rows of one class after the other, each of them `first` of its class more.
PyObject* split_orders(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (!expect("split_orders", 5, count)) return nullptr;
  const auto* generator = static_cast<BitGenerator*>(PyCapsule_GetPointer(arguments[0], "BitGenerator"));
  if (generator == nullptr || !is_list("seeds", arguments[1]) || !is_list("counts", arguments[4])) return nullptr;
  const Py_ssize_t classes = PyList_Size(arguments[1]), splits = PyList_Size(arguments[4]);
  std::vector<int64_t> seeds, rows, first, counts;
  if (!read_numbers("seeds", arguments[1], classes, seeds) || !read_numbers("rows", arguments[2], classes, rows) ||
      !read_numbers("first", arguments[3], classes, first)) {
    return nullptr;
  }
  for (Py_ssize_t split = 0; split < splits; ++split) {
    if (!read_numbers("counts", PyList_GetItem(arguments[4], split), classes, counts)) return nullptr;
  }
  std::vector<std::vector<int64_t>> found(splits);
  std::vector<int64_t> order;
  for (Py_ssize_t i = 0; i < classes; ++i) {
    order.resize(rows[i]);
    std::iota(order.begin(), order.end(), int64_t{0});
    MersenneTwister words(static_cast<uint32_t>(seeds[i]));
    shuffle_legacy(order.data(), rows[i], [&] { return words.next(); });
    int64_t begin = 0;
    for (Py_ssize_t split = 0; split < splits; ++split) {
      const int64_t taken = std::min(counts[split * classes + i], rows[i] - begin);
      shuffle_legacy(order.data() + begin, taken, [&] { return generator->next_uint32(generator->state); });
      for (const int64_t end = begin + taken; begin < end; ++begin) found[split].push_back(first[i] + order[begin]);
    }
  }
  Owned parts(PyList_New(0));
  if (!parts) return nullptr;
  for (const std::vector<int64_t>& part : found) {
    const Owned list(PyList_New(0));
    if (!list || PyList_Append(parts.get(), list.get()) != 0) return nullptr;
    for (const int64_t row : part) {
      const Owned number(PyLong_FromLongLong(row));
      if (!number || PyList_Append(list.get(), number.get()) != 0) return nullptr;
    }
  }
  return parts.release();
}

using Function = PyObject*(PyObject*, PyObject* const*, Py_ssize_t);

// A function for Python, which knows no C++ exceptions.
template <Function* function>
PyObject* guarded(PyObject* module, PyObject* const* arguments, Py_ssize_t count) {
  try {
    return function(module, arguments, count);
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
}

// Python's table has one type for functions of every convention.
template <Function* function>
PyCFunction erased() {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(guarded<function>));
}

}  // namespace

PyMethodDef draws_methods[] = {
    {"sample", erased<sample>(), METH_FASTCALL, nullptr},
    {"sample_task", erased<sample_task>(), METH_FASTCALL, nullptr},
    {"shuffle", erased<shuffle>(), METH_FASTCALL, nullptr},
    {"split_orders", erased<split_orders>(), METH_FASTCALL, nullptr},
    {"split_rows", erased<split_rows>(), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace metafast
