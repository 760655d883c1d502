// The whole step of PopRiskAdamW on a CPU: all tensors of a group that have the same formats, in one call.
//
// `_cpu_build.py` compiles it and `_cpu.py` calls it. COLUMNS (scalars of a tensor at this step),
// FIELDS (what is known of a tensor) and SETTINGS (what holds for all tensors of a call) are lists
// of names that come from there, so that both sides agree on their order.
// The arithmetic is that of `_eager.single_tensor_poprisk_adamw`, in its order.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

enum Column { COLUMNS, N_COLUMNS };
enum Field { FIELDS };
enum Setting { SETTINGS };
enum Format { FLOAT32, BFLOAT16, CODES, FLOAT64 };
// SHRUNK: signal / (signal + penalty * noise), "soft" and "snr". GIVEN: one number for a row or a
// tensor; 1 without a gate.
enum Gate { GIVEN, SHRUNK, HARD };

constexpr int64_t CHUNK = 1 << 14;  // elements that a thread takes at a time
constexpr int64_t BUFFER = 1024;    // elements that are converted at a time, whole blocks of codes
constexpr int64_t BLOCK = 64;       // codes with a scale of their own
constexpr int64_t PARALLEL = 1 << 15;  // waking threads costs as much as some ten thousand elements

// a * b + c, rounded once where the processor does that at once, as torch's kernels do
template <class T>
T fma(T a, T b, T c) {
#ifdef __FP_FAST_FMAF
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

struct Sums {
  double gate = 0, open = 0, ungated = 0, gated = 0, dead = 0;
};

struct Call {
  const int64_t* settings;
  const int64_t* table;  // column by column
  const double* rows;
  int64_t operator[](Setting name) const { return settings[name]; }
  int64_t of(Field name, int64_t tensor) const { return table[name * settings[count] + tensor]; }
  const double* row(int64_t tensor) const { return rows + N_COLUMNS * of(row_index, tensor); }
};

template <class T>
struct Scalars {
  T grad_factor, mean_scale, dev_decay, dev_weight, mean_weight, sq_decay, sq_weight, root_scale,
      noise_scale, eps, boundary, cut, penalty, gate_eps, blend, rest, step_size, decay, gated_decay;
  bool is_signal;  // the published rule's first step, where s_hat = m_hat^2

  Scalars(const double* row, const Call& call)
      : grad_factor(call[maximizes] ? -row[::grad_factor] : row[::grad_factor]),
        mean_scale(row[::mean_scale]), dev_decay(row[::dev_decay]), dev_weight(row[::dev_weight]),
        mean_weight(row[::mean_weight]), sq_decay(row[::sq_decay]), sq_weight(row[::sq_weight]),
        root_scale(1 / row[bias_correction2_sqrt]), noise_scale(row[::noise_scale]), eps(row[::eps]),
        boundary(row[::boundary]), cut(call[shifts] ? row[::boundary] : 0), penalty(row[::penalty]), gate_eps(row[::gate_eps]),
        blend(row[::blend]), rest(1 - row[::blend]), step_size(row[::step_size]),
        decay(call[gates_decay] ? 1 : row[param_scale]),
        gated_decay(call[gates_decay] ? row[weight_decay] : 0),
        is_signal(row[noise_is_signal] > 0) {}
};

// One step of n elements. HAS_NOISE: s is a state, else it is read off v and m.
template <class T, Gate GATE, bool HAS_NOISE, bool COLLECTS>
void update(T* __restrict p, const T* __restrict g, T* __restrict m, T* __restrict v,
            T* __restrict s, int64_t n, const Scalars<T> c, const T given, Sums& sums) {
  double gate = 0, open = 0, ungated = 0, gated = 0, dead = 0;
#pragma omp simd reduction(+ : gate, open, ungated, gated, dead)
  for (int64_t i = 0; i < n; ++i) {
    const T grad = g[i] * c.grad_factor;
    const T before = m[i];
    T noise = 0;
    if constexpr (HAS_NOISE) {
      // the deviation from the mean before it moves
      const T deviation = fma(-c.mean_scale, before, grad);
      noise = fma(c.dev_weight * deviation, deviation, s[i] * c.dev_decay);
      s[i] = noise;
    }
    const T mean = fma(c.mean_weight, grad - before, before);
    const T square = fma(c.sq_weight * grad, grad, v[i] * c.sq_decay);
    m[i] = mean;
    v[i] = square;
    const T denom = std::sqrt(square) * c.root_scale + c.eps;
    T q = 1;
    T mean_sq = mean * mean;
    if constexpr (GATE == GIVEN) {
      q = given;
    } else {
      if constexpr (!HAS_NOISE) noise = std::max(square * c.noise_scale - mean_sq, T(0));
      noise = c.is_signal ? mean_sq : noise;
      if constexpr (GATE == HARD) {
        q = mean_sq > c.boundary * noise ? T(1) : T(0);
      } else {
        const T signal = std::max(fma(-c.cut, noise, mean_sq), T(0));
        const T total = fma(c.penalty, noise, signal) + c.gate_eps;
        q = signal / std::max(total, std::numeric_limits<T>::min());
      }
      q = c.blend * q + c.rest;
    }
    p[i] = p[i] * (c.decay - c.gated_decay * q) - (c.step_size * (mean * q)) / denom;
    if constexpr (COLLECTS) {
      const T direction = mean / denom;
      const bool is_open = GATE == GIVEN || c.blend == 0 || mean_sq > c.boundary * noise;
      gate += q;
      open += is_open ? 1.0 : 0.0;
      dead += !is_open && mean_sq == 0 ? 1.0 : 0.0;
      ungated += double(direction) * double(direction);
      gated += double(direction * q) * double(direction * q);
    }
  }
  sums.gate += gate;
  sums.open += open;
  sums.ungated += ungated;
  sums.gated += gated;
  sums.dead += dead;
}

// Stochastic rounding: see `_rounding.py`
uint32_t hash32(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

struct Draw {  // 16 bits for each element, from its global index
  uint32_t key, first;
  int shift;  // of two streams with the same hash one takes the upper half
  uint32_t operator()(int64_t i) const { return hash32((first + uint32_t(i)) ^ key) >> shift & 0xFFFF; }
};

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

void load_bfloat16(const uint16_t* source, float* values, int64_t n) {
  for (int64_t i = 0; i < n; ++i) values[i] = float_of(uint32_t(source[i]) << 16);
}

template <class Add>
void store_bfloat16(const float* values, uint16_t* target, int64_t n, const Add add) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = bits_of(values[i]);
    const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    target[i] = is_nan ? 0x7FC0 : uint16_t((bits + add(i, bits)) >> 16);
  }
}

// Codes with a scale for each block: see `_states.encode_blocks`. NAME says which moment.
template <Field NAME>
void load_codes(const uint8_t* codes, const float* scale, float* values, int64_t n) {
  for (int64_t start = 0; start < n; start += BLOCK) {
    const int64_t stop = std::min(n, start + BLOCK);
    const float unit = scale[start / BLOCK];
    for (int64_t i = start; i < stop; ++i) {
      float relative = NAME == exp_avg ? (float(codes[i]) - 128) / 127 : float(codes[i]) / 255;
      relative *= NAME == exp_avg ? std::fabs(relative) : relative;
      if (NAME != exp_avg) relative *= relative;
      values[i] = relative * unit;
    }
  }
}

template <Field NAME>
void store_codes(const float* values, uint8_t* codes, float* scale, int64_t n, const Draw draw) {
  constexpr float top = NAME == exp_avg ? 127 : 255;
  for (int64_t start = 0; start < n; start += BLOCK) {
    const int64_t stop = std::min(n, start + BLOCK);
    uint32_t largest = 0;  // bits without the sign, so that it is NaN if any value is
    for (int64_t i = start; i < stop; ++i)
      largest = std::max(largest, bits_of(values[i]) & 0x7FFFFFFFu);
    const float unit = float_of(largest);
    scale[start / BLOCK] = unit;
    const float divisor = std::max(unit, std::numeric_limits<float>::min());
    for (int64_t i = start; i < stop; ++i) {
      const float relative = values[i] / divisor;
      float root = std::sqrt(NAME == exp_avg ? std::fabs(relative) : std::max(relative, 0.0f));
      if (NAME != exp_avg) root = std::sqrt(root);
      const float level = root * top;
      const float low = std::min(std::floor(level), top - 1), high = low + 1;
      float at = level * level, below = low * low, above = high * high;
      if (NAME != exp_avg) at *= at, below *= below, above *= above;
      // the probability of the upper level in the value's own units, not in those of its root
      const float threshold = (float(int32_t(draw(i))) + 0.5f) / 65536;
      float code = low + ((at - below) / (above - below) > threshold ? 1.0f : 0.0f);
      if (NAME == exp_avg) code = 128 + (relative < 0 ? -code : relative > 0 ? code : 0.0f);
      if (NAME == exp_avg_sq) code = std::max(code, relative > 0 ? 1.0f : 0.0f);
      codes[i] = uint8_t(int32_t(code));
    }
  }
}

// One tensor's values as they are worked on: in place, or in a buffer and stored afterwards.
struct Values {
  const Call& call;
  int64_t tensor, start;  // the first element of those taken
  Field field;
  Format format;
  float buffer[BUFFER];  // filled only where it is used

  Values(const Call& call, int64_t tensor, Field field, Setting format)
      : call(call), tensor(tensor), start(0), field(field), format(Format(call[format])) {}

  template <class T>
  T* load(int64_t n) {
    const int64_t address = call.of(field, tensor);
    if (format == FLOAT32 || format == FLOAT64) return address ? (T*)address + start : nullptr;
    if (format == BFLOAT16) load_bfloat16((const uint16_t*)address + start, buffer, n);
    if (format == CODES) {
      const auto codes = (const uint8_t*)address + start;
      if (field == exp_avg)
        load_codes<exp_avg>(codes, scale(), buffer, n);
      else  // exp_dev_sq likewise
        load_codes<exp_avg_sq>(codes, scale(), buffer, n);
    }
    return (T*)buffer;
  }

  void store(int64_t n) {
    if (format == FLOAT32 || format == FLOAT64) return;
    // the order of `_rounding.STREAMS`
    const bool is_first = field == param || field == exp_dev_sq;
    const uint32_t key = uint32_t(call.of(::key, tensor));
    const Draw draw{is_first ? key : hash32(key ^ 1), uint32_t(call.of(offset, tensor) + start),
                    field == param || field == exp_avg ? 0 : 16};
    const int64_t address = call.of(field, tensor);
    if (format == CODES) {
      const auto codes = (uint8_t*)address + start;
      if (field == exp_avg) return store_codes<exp_avg>(buffer, codes, scale(), n, draw);
      if (field == exp_avg_sq) return store_codes<exp_avg_sq>(buffer, codes, scale(), n, draw);
      return store_codes<exp_dev_sq>(buffer, codes, scale(), n, draw);
    }
    uint16_t* target = (uint16_t*)address + start;
    if (field == param && !call[rounds_param])
      store_bfloat16(buffer, target, n,
                     [](int64_t, uint32_t bits) { return 0x7FFFu + (bits >> 16 & 1); });
    else
      store_bfloat16(buffer, target, n, [=](int64_t i, uint32_t) { return draw(i); });
  }

  float* scale() const {  // of the first block
    const int64_t columns = call.of(numel, tensor) / call.of(rows, tensor);
    const int64_t blocks = (columns + BLOCK - 1) / BLOCK;
    const Field name = field == exp_avg ? scale_avg : field == exp_avg_sq ? scale_sq : scale_dev;
    return (float*)call.of(name, tensor) + start / columns * blocks + start % columns / BLOCK;
  }
};

template <class T, Gate GATE, bool HAS_NOISE>
void chunk(const Call& call, int64_t tensor, int64_t start, int64_t stop, Sums& sums) {
  const Scalars<T> c(call.row(tensor), call);
  Values p(call, tensor, param, param_format), g(call, tensor, grad, grad_format),
      m(call, tensor, exp_avg, avg_format), v(call, tensor, exp_avg_sq, sq_format),
      s(call, tensor, exp_dev_sq, dev_format);
  const bool is_plain = !call[converts];
  const bool by_row = call.of(rows, tensor) > 1;
  const int64_t columns = call.of(numel, tensor) / call.of(rows, tensor);
  const double* gates = (const double*)call.of(gate, tensor);
  for (int64_t n; start < stop; start += n) {
    n = stop - start;
    if (!is_plain) n = std::min(n, BUFFER);
    if (by_row) n = std::min(n, columns - start % columns);
    p.start = g.start = m.start = v.start = s.start = start;
    T *pp = p.load<T>(n), *gg = g.load<T>(n), *mm = m.load<T>(n), *vv = v.load<T>(n);
    T* ss = HAS_NOISE ? s.load<T>(n) : nullptr;
    const T given = GATE == GIVEN && gates ? T(gates[by_row ? start / columns : 0]) : T(1);
    if (call[collects])
      update<T, GATE, HAS_NOISE, true>(pp, gg, mm, vv, ss, n, c, given, sums);
    else
      update<T, GATE, HAS_NOISE, false>(pp, gg, mm, vv, ss, n, c, given, sums);
    if (is_plain) continue;
    p.store(n), m.store(n), v.store(n);
    if (HAS_NOISE) s.store(n);
  }
}

template <class T>
auto chunk_for(const Call& call) {
  const bool has_noise = call[measures];
  switch (Gate(call[gate_kind])) {
    case SHRUNK: return has_noise ? chunk<T, SHRUNK, true> : chunk<T, SHRUNK, false>;
    case HARD: return has_noise ? chunk<T, HARD, true> : chunk<T, HARD, false>;
    default: return has_noise ? chunk<T, GIVEN, true> : chunk<T, GIVEN, false>;
  }
}

struct Part {
  int64_t tensor, start, stop;
};

// Parts of all tensors, the same for any number of threads; `rows`: no row is cut.
template <class Numel, class Rows>
std::vector<Part> parts_of(int64_t count, const Numel numel, const Rows rows, int64_t& total,
                           int64_t chunk = CHUNK) {
  std::vector<Part> parts;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t n = numel(i), columns = rows(i) > 1 ? n / rows(i) : 1;
    const int64_t size = columns > 0 ? std::max<int64_t>(1, chunk / columns) * columns : chunk;
    for (int64_t start = 0; start < n; start += size)
      parts.push_back({i, start, std::min(n, start + size)});
    total += n;
  }
  return parts;
}

// The largest bits without the sign: of finite numbers, order is that of their size. Eight places
// are read in turn, because one after the other waits for memory at each new page.
template <class Bits>
Bits largest(const Bits* bits, int64_t n) {
  constexpr int64_t PLACES = 8, LINE = 64 / sizeof(Bits);
  constexpr Bits mask = std::numeric_limits<Bits>::max() >> 1;
  const int64_t size = n / (PLACES * LINE) * LINE;
  Bits found[PLACES][LINE] = {};
  for (int64_t i = 0; i < size; i += LINE)
    for (int64_t place = 0; place < PLACES; ++place)
      for (int64_t k = 0; k < LINE; ++k)
        found[place][k] = std::max<Bits>(found[place][k], bits[place * size + i + k] & mask);
  Bits result = 0;
  for (int64_t i = PLACES * size; i < n; ++i) result = std::max<Bits>(result, bits[i] & mask);
  for (const auto& line : found)
    for (const Bits value : line) result = std::max(result, value);
  return result;
}

}  // namespace

// Whether all gradients are finite, and so is the square of four times any element (a deviation
// from the mean is at most about twice the largest gradient).
extern "C" int32_t poprisk_all_finite(const int64_t* addresses, const int64_t* numels,
                                      int64_t count, int64_t format, int64_t threads) {
  int64_t total = 0;
  const auto parts = parts_of(
      count, [=](int64_t i) { return numels[i]; }, [](int64_t) { return 1; }, total, 4 * CHUNK);
  const int workers = total < PARALLEL ? 1 : int(threads);
  int bad = 0;
#pragma omp parallel for num_threads(workers) schedule(dynamic) reduction(| : bad) if (workers > 1)
  for (size_t k = 0; k < parts.size(); ++k) {
    const auto [i, start, stop] = parts[k];
    const int64_t n = stop - start, address = addresses[i];
    // 2^62, and 2^510: the squares of four times these leave the range
    if (format == FLOAT32)
      bad |= largest((const uint32_t*)address + start, n) >= 189u << 23;
    else if (format == BFLOAT16)
      bad |= largest((const uint16_t*)address + start, n) >= 189u << 7;
    else
      bad |= largest((const uint64_t*)address + start, n) >= uint64_t(1533) << 52;
  }
  return !bad;
}

// The step, and its sums for the gate statistics where they are asked for.
extern "C" void poprisk_step(const int64_t* settings, const int64_t* table, const double* scalars,
                             double* sums) {
  const Call call{settings, table, scalars};
  int64_t total = 0;
  auto parts = parts_of(
      call[count], [&](int64_t i) { return call.of(numel, i); },
      [&](int64_t i) { return call.of(rows, i); }, total);
  std::vector<Sums> found(parts.size());
  const auto step = call[param_format] == FLOAT64 ? chunk_for<double>(call) : chunk_for<float>(call);
  const int workers = total < PARALLEL ? 1 : int(call[threads]);
  // backwards: the gradients that were checked last are still in the caches
#pragma omp parallel for num_threads(workers) schedule(dynamic) if (workers > 1)
  for (size_t k = 0; k < parts.size(); ++k) {
    const auto [i, start, stop] = parts[parts.size() - 1 - k];
    step(call, i, start, stop, found[k]);
  }
  for (int64_t i = 0; i < call[count]; ++i) {
    *(float*)call.of(::step, i) += 1;
    if (call.of(dev_step, i) && call.row(i)[dev_weight] > 0) *(float*)call.of(dev_step, i) += 1;
  }
  for (const Sums& s : found) {
    sums[0] += s.open;
    sums[1] += s.gate;
    sums[2] += s.ungated;
    sums[3] += s.gated;
    sums[4] += s.dead;
  }
}
