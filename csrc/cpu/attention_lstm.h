// Arguments of the kernel of attention_lstm; the same type for every instruction set.
#pragma once

#include <cstdint>

namespace metafast {

// What some query rows of one task read.
template <class A>
struct AttentionLstm {
  const A* turned;     // [d, stride], the support rows as columns, and zeros
  const A* projected;  // [n, 4 d], what each support row adds to the gates
  const A* of_query;   // [d, 4 d], weights of the query row
  const A* of_state;   // [d, 4 d], weights of the hidden state
  const A* bias;       // [4 d]
  const A* query;      // [rows, d]
  int64_t stride;
  int64_t n;
  int64_t d;
  int64_t steps;
};

}  // namespace metafast
