// What every exported function asks of its dtype and its bits.
#pragma once

#include <stdint.h>

#include "../ttaq_native.h"

namespace ttaq {

inline bool is_float(int dtype) { return dtype >= TTAQ_FLOAT32 && dtype <= TTAQ_FLOAT16; }

inline int64_t bytes_of(int dtype) { return dtype == TTAQ_FLOAT32 ? 4 : 2; }

// Whether codes of so many bits are packed.
inline bool has_width(int bits) { return bits == 2 || bits == 3 || bits == 4 || bits == 8; }

}  // namespace ttaq
