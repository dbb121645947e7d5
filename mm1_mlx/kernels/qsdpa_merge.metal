// States over disjoint keys to attention: out = sum_i w_i o_i / sum_i w_i l_i with
// w_i = exp(m_i - max m). A thread owns one number; a row without keys gets 0.

    const int d = int(thread_position_in_grid.x);
    const size_t row = thread_position_in_grid.y;
    const int n = parts;
    float largest = -1e30f;
    for (int i = 0; i < n; i++) {
        largest = max(largest, pm[row * n + i]);
    }
    float o = 0.0f;
    float l = 0.0f;
    for (int i = 0; i < n; i++) {
        const float weight = metal::fast::exp(pm[row * n + i] - largest);
        l += weight * pl[row * n + i];
        o += weight * po[(row * n + i) * D + d];
    }
    out[row * D + d] = static_cast<T>(l > 0.0f ? o / l : 0.0f);
