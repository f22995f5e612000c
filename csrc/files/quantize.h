// quantize.h - rows of weights to and from the number formats of a GGUF file, by ggml's own quantisers.
#pragma once

#include "error.h"

// See pyllava.h; the pointers are good.
pyllava_status tensor_type_find(const char * name, pyllava_tensor_type * out);
pyllava_status quantize_rows(const pyllava_rows * rows, const float * from, void * out);
pyllava_status dequantize_rows(const pyllava_rows * rows, const void * from, float * out);
