// What a decode step does between its matrix products, for a CPU in bf16. `compiled_step.py` builds it for one
// model's shape: HEAD (a head's size), GROUPS (query heads to a key-value head), WIDTH (hidden size), NORMED (whether
// queries and keys are normed).
//
// Rounding is the model's own wherever its own operations round, but for attention, which stays in fp32.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

using bf16 = uint16_t;
constexpr int64_t HALF = HEAD / 2;

inline float wide(bf16 x) {
    uint32_t bits = static_cast<uint32_t>(x) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

// to the nearest, ties to even; a NaN stays one
inline bf16 narrow(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return static_cast<bf16>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

inline float rounded(float x) { return wide(narrow(x)); }

// e^x to a few units in fp32's last place, without a call, so that loops over it are vectors (Cephes' polynomial)
inline float exponential(float x) {
    x = x > -87.0f ? x : -87.0f;
    x = x < 88.0f ? x : 88.0f;
    float whole = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // to the nearest whole number, by what is too small
    float rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    float power = 1.9875691500e-4f;
    power = power * rest + 1.3981999507e-3f;
    power = power * rest + 8.3334519073e-3f;
    power = power * rest + 4.1665795894e-2f;
    power = power * rest + 1.6666665459e-1f;
    power = power * rest + 5.0000001201e-1f;
    power = power * rest * rest + rest + 1.0f;
    int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return power * scale;
}

// e^x, nothing where that is too small for an fp32: a token whose logit is -infinity has no mass
inline float mass(float x) { return x > -87.0f ? exponential(x) : 0.0f; }

// weight * (x / root mean square), in fp32, rounded before the weight as Llama does
inline void norm(const float* x, const bf16* weight, bf16* out, int64_t width, float eps) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; i++) sum += x[i] * x[i];
    float by = 1.0f / std::sqrt(sum / width + eps);
#pragma omp simd
    for (int64_t i = 0; i < width; i++) out[i] = narrow(wide(weight[i]) * rounded(x[i] * by));
}

// half a head turned by its position: `other` is the other half, to which the sine belongs
inline void turn(const bf16* x, const bf16* other, const bf16* cos, const bf16* sin, bf16* out) {
#pragma omp simd
    for (int64_t i = 0; i < HALF; i++) out[i] = narrow(rounded(wide(x[i]) * wide(cos[i])) + wide(other[i]) * wide(sin[i]));
}

inline void turned(const bf16* x, const bf16* weight, const bf16* cos, const bf16* sin, float eps, bf16* out) {
#if NORMED
    float plain[HEAD];
    bf16 normed[HEAD];
    for (int64_t i = 0; i < HEAD; i++) plain[i] = wide(x[i]);
    norm(plain, weight, normed, HEAD, eps);
    x = normed;
#endif
    turn(x, x + HALF, cos, sin, out);
    turn(x + HALF, x, cos + HALF, sin + HALF, out + HALF);
}

// Vectors, so that a head's sums stay in registers; a compiler without such wide ones makes them of smaller ones.
constexpr int64_t LANES = HEAD % 16 == 0 ? 16 : 8, PARTS = HEAD / LANES;
typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));
typedef bf16 Narrow __attribute__((vector_size(LANES * 2)));

inline Floats load(const bf16* x) {
    Narrow found;
    std::memcpy(&found, x, sizeof found);
    return reinterpret_cast<Floats>(__builtin_convertvector(found, Bits) << 16);
}

typedef float Four __attribute__((vector_size(16)));
typedef int32_t Places __attribute__((vector_size(16)));

// four of the eight of x and y, by their places
inline Four picked(Four x, Four y, Places places) {
#ifdef __clang__
    Four out;
    for (int i = 0; i < 4; i++) out[i] = places[i] < 4 ? x[places[i]] : y[places[i] - 4];
    return out;
#else
    return __builtin_shuffle(x, y, places);
#endif
}

inline Four quarter(Floats x) {
    Four part[LANES / 4], sum;
    std::memcpy(part, &x, sizeof x);
    sum = part[0] + part[1];
    if (LANES == 16) sum += part[LANES / 4 - 2] + part[LANES / 4 - 1];
    return sum;
}

// the sums of four vectors
inline Four totals(const Floats* x) {
    Four a = quarter(x[0]), b = quarter(x[1]), c = quarter(x[2]), d = quarter(x[3]);
    Four ab = picked(a, b, Places{0, 4, 1, 5}) + picked(a, b, Places{2, 6, 3, 7});
    Four cd = picked(c, d, Places{0, 4, 1, 5}) + picked(c, d, Places{2, 6, 3, 7});
    return picked(ab, cd, Places{0, 1, 4, 5}) + picked(ab, cd, Places{2, 3, 6, 7});
}

// a head's product with a key, in pieces that `total` adds up. Products of pairs in bf16 are exact in fp32, however they
// are made.
#if defined(__AVX512BF16__) && HEAD % 32 == 0
typedef __m512bh Pairs;
constexpr int64_t PIECES = HEAD / 32;
inline Pairs pairs(const bf16* x, int64_t p) {
    Pairs found;
    std::memcpy(&found, x + p * 32, sizeof found);
    return found;
}
inline Floats added(Floats sum, Pairs x, Pairs y) { return (Floats)_mm512_dpbf16_ps((__m512)sum, x, y); }
#else
typedef Floats Pairs;
constexpr int64_t PIECES = PARTS;
inline Pairs pairs(const bf16* x, int64_t p) { return load(x + p * LANES); }
inline Floats added(Floats sum, Pairs x, Pairs y) { return sum + x * y; }
#endif

// the scores of so many keys, one row of `stride` for each query
template <int64_t KEYS>
inline void score(const Pairs (&query)[GROUPS][PIECES], const bf16* keys, float scale, float* scores, int64_t stride) {
    Floats dots[GROUPS][4] = {};
#pragma GCC unroll 4
    for (int64_t i = 0; i < KEYS; i++)
#pragma GCC unroll 16
        for (int64_t p = 0; p < PIECES; p++) {
            Pairs key = pairs(keys + i * HEAD, p);
#pragma GCC unroll 16
            for (int64_t g = 0; g < GROUPS; g++) dots[g][i] = added(dots[g][i], query[g][p], key);
        }
#pragma GCC unroll 16
    for (int64_t g = 0; g < GROUPS; g++) {
        Four found = totals(dots[g]) * scale;
        std::memcpy(scores + g * stride, &found, KEYS * sizeof(float));
    }
}

// the queries of one key-value head over `count` columns; scores: room for GROUPS * count
inline void attend(const bf16* query, const bf16* keys, const bf16* values, int64_t count, float scale, float* scores,
                   bf16* out) {
    Floats mixed[GROUPS][PARTS] = {};
    Pairs q[GROUPS][PIECES];
    for (int64_t g = 0; g < GROUPS; g++)
        for (int64_t p = 0; p < PIECES; p++) q[g][p] = pairs(query + g * HEAD, p);
    int64_t fours = count / 4 * 4;
    for (int64_t c = 0; c < fours; c += 4) score<4>(q, keys + c * HEAD, scale, scores + c, count);
    for (int64_t c = fours; c < count; c++) score<1>(q, keys + c * HEAD, scale, scores + c, count);
    float sum[GROUPS];
    for (int64_t g = 0; g < GROUPS; g++) {
        float all = 0, top = -INFINITY, *row = scores + g * count;
#pragma omp simd reduction(max : top)
        for (int64_t c = 0; c < count; c++) top = row[c] > top ? row[c] : top;
#pragma omp simd reduction(+ : all)
        for (int64_t c = 0; c < count; c++) all += row[c] = exponential(row[c] - top);
        sum[g] = all;
    }
    for (int64_t c = 0; c < count; c++)
        for (int64_t p = 0; p < PARTS; p++) {
            Floats value = load(values + c * HEAD + p * LANES);
            for (int64_t g = 0; g < GROUPS; g++) mixed[g][p] += scores[g * count + c] * value;
        }
    for (int64_t g = 0; g < GROUPS; g++)
        for (int64_t p = 0; p < PARTS; p++)
            for (int64_t i = 0; i < LANES; i++) out[g * HEAD + p * LANES + i] = narrow(mixed[g][p][i] / sum[g]);
}

constexpr int64_t BLOCK = 128;

// the first place at which the sum of `masses` exceeds `draw`, which is left with what remains of it; if rounding
// leaves none, the last that has any
inline int64_t place(const float* masses, int64_t count, double& draw) {
    int64_t last = 0;
    for (int64_t i = 0; i < count; i++) {
        if (masses[i] > draw) return i;
        if (masses[i] > 0) last = i;
        draw -= masses[i];
    }
    draw = 0;
    return last;
}

}  // namespace

extern "C" {

// x += change, where there is one, and y = norm(x); all [rows, WIDTH]
void add_norm(bf16* x, const bf16* change, const bf16* weight, bf16* y, int64_t rows, float eps) {
#pragma omp parallel for
    for (int64_t b = 0; b < rows; b++) {
        bf16* row = x + b * WIDTH;
        float plain[WIDTH];
        if (change != nullptr) {
            const bf16* more = change + b * WIDTH;
#pragma omp simd
            for (int64_t i = 0; i < WIDTH; i++) row[i] = narrow(wide(row[i]) + wide(more[i]));
        }
#pragma omp simd
        for (int64_t i = 0; i < WIDTH; i++) plain[i] = wide(row[i]);
        norm(plain, weight, y + b * WIDTH, WIDTH, eps);
    }
}

// Turns queries and keys, writes keys and values into column `stop` and mixes what each row has in columns `first` to
// `stop`. qkv [rows, (GROUPS + 2) * heads, HEAD]: queries, keys, values; cos, sin [rows, HEAD]; keys, values
// [rows, heads, columns, HEAD]; out [rows, heads * GROUPS, HEAD].
void attention(const bf16* qkv, const bf16* cos, const bf16* sin, const bf16* query_norm, const bf16* key_norm,
               float eps, bf16* keys, bf16* values, const int64_t* first, bf16* out, int64_t rows, int64_t heads,
               int64_t columns, int64_t stop, float scale) {
#pragma omp parallel
    {
        std::vector<float> scores(GROUPS * (stop + 1));
#pragma omp for schedule(static)
        for (int64_t at = 0; at < rows * heads; at++) {
            int64_t b = at / heads, k = at % heads;
            const bf16* row = qkv + b * (GROUPS + 2) * heads * HEAD;
            const bf16 *c = cos + b * HEAD, *s = sin + b * HEAD;
            bf16 *key = keys + at * columns * HEAD, *value = values + at * columns * HEAD, query[GROUPS * HEAD];
            turned(row + (GROUPS * heads + k) * HEAD, key_norm, c, s, eps, key + stop * HEAD);
            std::memcpy(value + stop * HEAD, row + ((GROUPS + 1) * heads + k) * HEAD, HEAD * sizeof(bf16));
            for (int64_t g = 0; g < GROUPS; g++)
                turned(row + (k * GROUPS + g) * HEAD, query_norm, c, s, eps, query + g * HEAD);
            attend(query, key + first[b] * HEAD, value + first[b] * HEAD, stop + 1 - first[b], scale, scores.data(),
                   out + at * GROUPS * HEAD);
        }
    }
}

// gate = silu(gate) * up, each [size]
void gated(bf16* gate, const bf16* up, int64_t size) {
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < size; i++) {
        float x = wide(gate[i]);
        gate[i] = narrow(rounded(x / (1.0f + exponential(-x))) * wide(up[i]));
    }
}

// Each row's next token, where the cumulative mass of softmax(logits / temperature) first exceeds `uniform` of the
// whole, and its log-probability. First the block of tokens is found, then the token in it. logits [rows, vocabulary]
void draw(const bf16* logits, const float* uniform, float temperature, int64_t* token, float* logp, int64_t rows,
          int64_t vocabulary) {
    float by = 1.0f / temperature;
    int64_t blocks = (vocabulary + BLOCK - 1) / BLOCK;
#pragma omp parallel
    {
        std::vector<float> masses(blocks);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < rows; b++) {
            const bf16* row = logits + b * vocabulary;
            float top = -INFINITY, inside[BLOCK];
#pragma omp simd reduction(max : top)
            for (int64_t i = 0; i < vocabulary; i++) top = wide(row[i]) > top ? wide(row[i]) : top;
            double whole = 0;
            for (int64_t k = 0; k < blocks; k++) {
                int64_t end = k + 1 < blocks ? (k + 1) * BLOCK : vocabulary;
                float sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int64_t i = k * BLOCK; i < end; i++) sum += mass((wide(row[i]) - top) * by);
                whole += masses[k] = sum;
            }
            double left = uniform[b] * whole;
            int64_t start = place(masses.data(), blocks, left) * BLOCK;
            int64_t count = vocabulary - start < BLOCK ? vocabulary - start : BLOCK;
            for (int64_t i = 0; i < count; i++) inside[i] = mass((wide(row[start + i]) - top) * by);
            token[b] = start + place(inside, count, left);
            logp[b] = (wide(row[token[b]]) - top) * by - static_cast<float>(std::log(whole));
        }
    }
}
}
