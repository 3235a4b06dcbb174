// Rows of a packed weight, by the instruction set of the namespace that includes this: X, Sum, Weights, expand, dot,
// total and store of it, and TARGET, the attribute of every function.

// Add the products of one word to M sums, and go on to the next word.
template <class Value, size_t... M>
TARGET INLINE void step(
    const uint32_t*& word, const Value*& values, const X*& x, int64_t stride, Sum* sums, std::index_sequence<M...>) {
  Weights weights = expand(values, *word);
  (dot(sums[M], weights, x + M * stride), ...);
  values += __builtin_popcount(*word++);
  x += WORD;
}

// Multiply one row with M inputs, U words at a time, each with sums of its own: an addition need not wait for the last.
// Every index of the sums is a constant, so that they are kept in registers.
template <int M, class Value, size_t... U>
TARGET INLINE void row(
    const uint32_t* word, const Value* values, int64_t words, const X* x, int64_t stride, float (&found)[M],
    std::index_sequence<U...>) {
  constexpr std::make_index_sequence<M> each;
  Sum sums[M * sizeof...(U)];
  const uint32_t* last = word + words;
  for (const uint32_t* whole = last - words % sizeof...(U); word != whole;) {
    __builtin_prefetch((const char*)values + AHEAD);
    __builtin_prefetch((const char*)word + AHEAD / 4);
    (step(word, values, x, stride, sums + U * M, each), ...);
  }
  while (word != last) step(word, values, x, stride, sums, each);
  for (int m = 0; m < M; ++m) found[m] = (total(sums[U * M + m]) + ...);
}

template <int M, int U, class Value>
TARGET void row_of(
    const Weight<Value>& weight, int64_t r, const Value* values, const Inputs<X>& x, int64_t first,
    at::BFloat16* out) {
  float found[M];
  row<M>(
      weight.bitmap + r * weight.words, values, weight.words, x.data + first * x.stride, x.stride, found,
      std::make_index_sequence<U>());
  for (int m = 0; m < M; ++m) weight.put(out, first + m, r, found[m]);
}

template <class Value>
TARGET void rows(const Weight<Value>& weight, int64_t first, int64_t last, const Inputs<X>& x, at::BFloat16* out) {
  std::vector<Value> copy;
  for (int64_t r = first; r < last; ++r) {
    const Value* values = weight.readable(r, copy);
    int64_t done = 0;
    for (; done + 8 <= x.count; done += 8) row_of<8, 1>(weight, r, values, x, done, out);
    if (x.count & 4) row_of<4, 1>(weight, r, values, x, done, out), done += 4;
    if (x.count & 2) row_of<2, 2>(weight, r, values, x, done, out), done += 2;
    if (x.count & 1) row_of<1, 4>(weight, r, values, x, done, out);
  }
}

// Multiply the rows of a weight from ``start`` on with inputs (count, columns) of bfloat16.
template <class Value>
void multiply(const Weight<Value>& weight, const at::Tensor& input, at::BFloat16* out, int64_t start) {
  const uint16_t* given = (const uint16_t*)input.const_data_ptr();
  Inputs<X> x{(const X*)given, input.size(0), weight.words * WORD};
  at::Tensor padded;
  if (sizeof(X) != sizeof(uint16_t) || weight.columns != x.stride || x.count > 1) {
    x.stride = (weight.words | 1) * WORD;  // at a power of two, a cache has the same few places for all rows
    padded = at::empty({x.count * x.stride * (int64_t)sizeof(X)}, input.options().dtype(at::kByte));
    X* to = (X*)padded.data_ptr();
    for (int64_t i = 0; i < x.count; ++i, given += weight.columns, to += x.stride) {
      for (int64_t j = 0; j < weight.columns; ++j) to[j] = std::is_same_v<X, float> ? X(widen(given[j])) : X(given[j]);
      std::fill(to + weight.columns, to + x.stride, X(0));
    }
    x.data = (const X*)padded.const_data_ptr();
  }
  at::parallel_for(start, weight.rows, grain(weight.columns), [&](int64_t first, int64_t last) {
    rows(weight, first, last, x, out);
  });
}

template <class Value>
void multiply(const Weight<Value>& weight, const at::Tensor& input, at::BFloat16* out) {
  multiply(weight, input, out, 0);
}

template <class Value>
TARGET void unpack_rows(const Weight<Value>& weight, int64_t first, int64_t last, int64_t start, Value* out) {
  std::vector<Value> copy;
  int64_t whole = weight.columns / WORD, rest = weight.columns % WORD;
  for (int64_t r = first; r < last; ++r) {
    const uint32_t* bitmap = weight.bitmap + r * weight.words;
    const Value* values = weight.readable(r, copy);
    Value* to = out + (r - start) * weight.columns;
    for (int64_t word = 0; word < whole; ++word) {
      store(to + word * WORD, values, bitmap[word]);
      values += __builtin_popcount(bitmap[word]);
    }
    if (rest) {
      Value last_word[WORD];
      store(last_word, values, bitmap[whole]);
      std::memcpy(to + whole * WORD, last_word, rest * sizeof(Value));
    }
  }
}

// Unpack the rows of a weight from ``start`` to ``end``.
template <class Value>
void unpack(const Weight<Value>& weight, int64_t start, int64_t end, Value* out) {
  at::parallel_for(start, end, grain(weight.columns), [&](int64_t first, int64_t last) {
    unpack_rows(weight, first, last, start, out);
  });
}
