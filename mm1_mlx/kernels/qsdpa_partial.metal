// The state (o, m, l) of a few query rows over one block of keys; see metal.py.
//
// A threadgroup owns (batch row, key-value head, R query rows, block of keys). Each of its
// SG simdgroups takes 32 keys at a time:
//   scores:  4 lanes a key, 8 keys a step, 4 steps. A lane unpacks a quarter of the key
//            once for all R rows; scale and bias are applied to sums, not to numbers:
//            sum (s c + b) q = s sum c q + b sum q. Two shuffles a row and step.
//   softmax: a lane owns one key; one simd_max a row.
//   values:  a lane owns D / 32 columns; a key's weight comes by one shuffle a row.
// Everything is accumulated in float. There are no infinities, so any math mode is safe.
// BITS is 0 where keys and values are plain; then ks, kb, vs and vb are not read.

    // Arrays that are indexed by a loop are registers only where it is unrolled.
    #define UNROLL _Pragma("clang loop unroll(full)")

    constexpr int DL = D / 4;        // numbers of a key that a lane multiplies
    constexpr int VD = D / 32;       // columns of the values that a lane owns
    constexpr int QP = DL + 4;       // a quarter of a query row, padded against conflicts
    constexpr float NEVER = -1e30f;

    threadgroup float qs[R * 4 * QP];
    threadgroup float red_o[SG * R * D];
    threadgroup float red_m[SG * R];
    threadgroup float red_l[SG * R];

    const int tid = int(thread_index_in_threadgroup);
    const int lane = int(thread_index_in_simdgroup);
    const int sg = int(simdgroup_index_in_threadgroup);
    const int quad = lane / 4;
    const int quarter = lane % 4;

    const int capacity = sizes[0];
    const int chunk = sizes[1];
    const int T_q = sizes[2];        // queries of a sequence; 1 where all see every key
    const int H = sizes[3];
    const int rows = sizes[4];       // of a key-value head
    const int blocks = sizes[5];
    const int last = sizes[6];       // one past the last key
    const int tiles = (rows + R - 1) / R;

    // Tiles of one block are neighbours, so that what one has read is still near.
    const int block = int(threadgroup_position_in_grid.x) / tiles;
    const int row0 = int(threadgroup_position_in_grid.x) % tiles * R;
    const int h = int(threadgroup_position_in_grid.y);
    const int b = int(threadgroup_position_in_grid.z);
    const int live = min(R, rows - row0);
    const int begin = max(int(starts[b]), block * chunk);
    const int end = min(last, (block + 1) * chunk);

    const size_t head = size_t(b) * H + h;
    const size_t at0 = head * rows + row0;   // of the first query row
    const size_t key0 = head * capacity;

    for (int i = tid; i < R * D; i += SG * 32) {
        const int r = i / D;
        const int d = i % D;
        const float x = r < live ? float(q[(at0 + r) * D + d]) * scale : 0.0f;
        qs[(r * 4 + d / DL) * QP + d % DL] = x;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    float qsum[R], m[R], l[R], o[R][VD];
    UNROLL
    for (int r = 0; r < R; r++) {
        float sum = 0.0f;
        for (int d = 0; d < DL; d++) {
            sum += qs[(r * 4 + quarter) * QP + d];
        }
        qsum[r] = sum;
        m[r] = NEVER;
        l[r] = 0.0f;
        UNROLL
        for (int d = 0; d < VD; d++) {
            o[r][d] = 0.0f;
        }
    }

    for (int t = begin + sg * 32; t < end; t += SG * 32) {
        float s[R];
        UNROLL
        for (int r = 0; r < R; r++) {
            s[r] = 0.0f;
        }
        for (int step = 0; step < 4; step++) {
            // Past the end a lane repeats the last key; its score is dropped below.
            const size_t key = key0 + min(t + step * 8 + quad, end - 1);
            const threadgroup float4* rows4 = (const threadgroup float4*)(qs + quarter * QP);
            float acc[R];
            UNROLL
            for (int r = 0; r < R; r++) {
                acc[r] = 0.0f;
            }
            float unit = 1.0f;
            float zero = 0.0f;
            if constexpr (BITS == 0) {
                typedef vec<T, 4> Four;
                const device Four* from = (const device Four*)(k + key * D + quarter * DL);
                for (int i = 0; i < DL / 4; i++) {
                    const Four x = from[i];
                    const float4 c = float4(float(x[0]), float(x[1]), float(x[2]), float(x[3]));
                    UNROLL
                    for (int r = 0; r < R; r++) {
                        acc[r] += dot(c, rows4[r * QP + i]);   // a row is QP float4
                    }
                }
            } else {
                constexpr int CODES = 32 / BITS;               // in a word
                constexpr int WORDS = DL / CODES;              // of a lane
                constexpr int WIDE = WORDS < 4 ? WORDS : 4;    // words a load
                constexpr uint MASK = (1u << BITS) - 1u;
                typedef vec<uint, WIDE> Some;
                const device Some* from =
                    (const device Some*)(k + key * (D / CODES) + quarter * WORDS);
                for (int i = 0; i < WORDS / WIDE; i++) {
                    const Some words = from[i];
                    for (int j = 0; j < WIDE; j++) {
                        for (int e = 0; e < CODES / 4; e++) {  // 4 codes at a time
                            const uint x = words[j] >> (e * 4 * BITS);
                            const float4 c = float4(
                                float(x & MASK),
                                float((x >> BITS) & MASK),
                                float((x >> (2 * BITS)) & MASK),
                                float((x >> (3 * BITS)) & MASK));
                            const int d4 = (i * WIDE + j) * CODES / 4 + e;
                            UNROLL
                            for (int r = 0; r < R; r++) {
                                acc[r] += dot(c, rows4[r * QP + d4]);
                            }
                        }
                    }
                }
                const size_t group = key * (D / GS) + quarter * DL / GS;
                unit = float(ks[group]);
                zero = float(kb[group]);
            }
            UNROLL
            for (int r = 0; r < R; r++) {
                float v = unit * acc[r] + zero * qsum[r];
                v += simd_shuffle_xor(v, 1);
                v += simd_shuffle_xor(v, 2);
                s[r] = quarter == step ? v : s[r];
            }
        }
        // From here a lane owns this key.
        const int mine = t + quarter * 8 + quad;
        UNROLL
        for (int r = 0; r < R; r++) {
            const bool seen = mine < min(end, last - T_q + (row0 + r) % T_q + 1);
            const float v = seen ? s[r] : NEVER;
            const float largest = max(m[r], simd_max(v));
            const float shrink = metal::fast::exp(m[r] - largest);
            s[r] = seen ? metal::fast::exp(v - largest) : 0.0f;
            l[r] = l[r] * shrink + s[r];
            m[r] = largest;
            UNROLL
            for (int d = 0; d < VD; d++) {
                o[r][d] *= shrink;
            }
        }
        const int keys = min(32, end - t);
        for (int j = 0; j < keys; j++) {
            const size_t key = key0 + t + j;
            float v[VD];
            if constexpr (BITS == 0) {
                typedef vec<T, VD> Own;
                const Own x = *(const device Own*)(values + key * D + lane * VD);
                UNROLL
                for (int d = 0; d < VD; d++) {
                    v[d] = float(x[d]);
                }
            } else {
                constexpr uint MASK = (1u << BITS) - 1u;
                const size_t group = key * (D / GS) + lane * VD / GS;
                const float unit = float(vs[group]);
                const float zero = float(vb[group]);
                const int bit = lane * VD * BITS;
                const device uint* from = (const device uint*)values;
                const uint word = from[key * (D * BITS / 32) + bit / 32] >> (bit % 32);
                UNROLL
                for (int d = 0; d < VD; d++) {
                    v[d] = unit * float((word >> (d * BITS)) & MASK) + zero;
                }
            }
            const ushort owner = ushort(j % 8 * 4 + j / 8);
            UNROLL
            for (int r = 0; r < R; r++) {
                const float weight = simd_shuffle(s[r], owner);
                UNROLL
                for (int d = 0; d < VD; d++) {
                    o[r][d] += weight * v[d];
                }
            }
        }
    }

    UNROLL
    for (int r = 0; r < R; r++) {
        const float sum = simd_sum(l[r]);
        if (lane == 0) {
            red_m[sg * R + r] = m[r];
            red_l[sg * R + r] = sum;
        }
        UNROLL
        for (int d = 0; d < VD; d++) {
            red_o[(sg * R + r) * D + lane * VD + d] = o[r][d];
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = tid; i < live * D; i += SG * 32) {
        const int r = i / D;
        const int d = i % D;
        float largest = NEVER;
        for (int g = 0; g < SG; g++) {
            largest = max(largest, red_m[g * R + r]);
        }
        float sum_o = 0.0f;
        float sum_l = 0.0f;
        for (int g = 0; g < SG; g++) {
            const float weight = metal::fast::exp(red_m[g * R + r] - largest);
            sum_o += weight * red_o[(g * R + r) * D + d];
            sum_l += weight * red_l[g * R + r];
        }
        const size_t at = (at0 + r) * blocks + block;
        po[at * D + d] = sum_o;
        if (d == 0) {
            pm[at] = largest;
            pl[at] = sum_l;
        }
    }
